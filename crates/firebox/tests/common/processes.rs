//! Processes that run under another one, and their ends.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Ended, PATIENCE, Random, Run, signal};

/// The processes of a program below another process: of `firebox` ranks, or the one that has them.
pub fn below(ancestor: u32, program: &str) -> Vec<u32> {
    let mut found: Vec<(u32, u32, String)> = vec![];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // ID (NAME) STATE PARENT ...; it may be gone by now.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{id}/stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(')') else { continue };
        let mut after = after.split_whitespace();
        let (state, parent) = (after.next().unwrap_or("Z"), after.next().and_then(|parent| parent.parse().ok()));
        if let (true, Some(parent)) = (state != "Z", parent) {
            let name = before.split_once('(').map_or("", |(_, name)| name);
            found.push((id, parent, name.to_owned()));
        }
    }
    let mut below = BTreeSet::from([ancestor]);
    while let Some((id, ..)) = found.iter().find(|(id, parent, _)| below.contains(parent) && !below.contains(id)) {
        below.insert(*id);
    }
    let of_program = |(id, _, name): &&(u32, u32, String)| *id != ancestor && below.contains(id) && name == program;
    found.iter().filter(of_program).map(|(id, ..)| *id).collect()
}

pub fn kill(id: u32) {
    let status = Command::new("kill").args(["-9", &id.to_string()]).stderr(Stdio::null()).status();
    // It may have ended by itself.
    let _ = status.unwrap();
}

/// Runs a supervisor, and kills one of the processes below it so many times: mostly at a random moment after a new checkpoint, sometimes while they start. Then
/// lets the run end, or with `stop` asks it to.
#[track_caller]
pub fn kill_at_random(mut supervisor: Command, run: &Run, kills: u64, stop: bool, random: &mut Random) -> Ended {
    let what = format!("{supervisor:?}");
    let child = supervisor.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let mut killed = BTreeSet::new();
    let mut saved = run.saved().last().copied();
    for kill_number in 0..kills {
        let starting = kill_number % 5 == 3;
        let begun = Instant::now();
        let victims = loop {
            assert!(begun.elapsed() < PATIENCE, "nothing happens in {what}");
            assert!(std::path::Path::new(&format!("/proc/{id}/fd")).is_dir(), "{what} ended before kill {kill_number}");
            let victims: Vec<u32> = below(id, "firebox").into_iter().filter(|id| !killed.contains(id)).collect();
            if !victims.is_empty() && (starting || run.saved().last().copied() > saved) {
                break victims;
            }
            if std::fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| stat.contains(") Z ")) {
                let ended = Ended::new(child.wait_with_output().unwrap(), what);
                panic!("ended before kill {kill_number}: {ended:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        std::thread::sleep(Duration::from_micros(random.below(if starting { 300_000 } else { 20_000 })));
        kill(victims[random.below(victims.len() as u64) as usize]);
        // The others end with it, and are no victims of the next kill.
        killed.extend(victims);
        saved = run.saved().last().copied();
    }
    if stop {
        // Once more than the kills needed, it goes on.
        let begun = Instant::now();
        while run.saved().last().copied() <= saved {
            assert!(begun.elapsed() < PATIENCE, "nothing happens in {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, "INT");
    }
    Ended::new(child.wait_with_output().unwrap(), what)
}
