//! Ranks as threads: the conformance suite on 1 to 8 ranks, and faults, each of which must end every rank with an error
//! that names the culprit.

#![allow(clippy::unwrap_used, missing_docs)]

mod conformance;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use firebox_parallel::{CommError, Communicator, Failure, ReduceOp, Threads, WorldError, spawn};

const SHORT: Duration = Duration::from_millis(400);

/// Far above any wait in these tests but what [`SHORT`] bounds, also on a busy machine.
const IN_TIME: Duration = Duration::from_secs(60);

#[test]
fn one_to_eight_ranks_conform() {
    for n in 1..=8 {
        spawn(n, |comm| conformance::all(&comm)).unwrap();
    }
}

#[test]
fn results_come_in_the_order_of_the_ranks() {
    let ranks = spawn(5, |comm| Ok::<_, CommError>((comm.rank(), comm.size()))).unwrap();
    assert_eq!(ranks, [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5)]);
    assert_eq!(spawn(0, |comm| Ok::<_, CommError>(comm.size())).unwrap(), [1]);
}

#[test]
fn sums_have_the_same_bits_every_time_and_everywhere() {
    let run = || {
        spawn(7, |comm| {
            thread::sleep(Duration::from_micros(137 * ((comm.rank() as u64 * 5) % 7)));
            let mut data: Vec<f32> = (0..10_007).map(|i| (i as f32 * 0.37 + comm.rank() as f32).sin()).collect();
            comm.all_reduce(&mut data, ReduceOp::Sum)?;
            Ok::<_, CommError>(data.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        })
        .unwrap()
    };
    let first = run();
    assert!(first.iter().all(|bits| *bits == first[0]));
    assert_eq!(run(), first);
}

/// What a rank does.
type RankCall = fn(&Communicator) -> Result<(), CommError>;

/// Runs ranks of which some fail, and returns each one's error beside the world's.
fn faults(
    n: usize,
    f: impl Fn(&Communicator) -> Result<(), CommError> + Send + Sync + 'static,
) -> (Vec<Option<CommError>>, WorldError<CommError>) {
    let start = Instant::now();
    let seen = Arc::new(Mutex::new(vec![None; n]));
    let record = seen.clone();
    let error = Threads::new(n)
        .timeout(SHORT)
        .run(move |comm| f(&comm).inspect_err(|error| record.lock().unwrap()[comm.rank()] = Some(error.clone())))
        .unwrap_err();
    assert!(start.elapsed() < IN_TIME);
    let seen = seen.lock().unwrap().clone();
    (seen, error)
}

/// That every rank but `culprit` failed because that one is gone.
fn assert_lost(seen: &[Option<CommError>], culprit: usize, why: &str) {
    for (rank, error) in seen.iter().enumerate().filter(|(rank, _)| *rank != culprit) {
        match error {
            Some(CommError::RankLost { rank: lost, why: said, at, .. }) => {
                assert_eq!((*lost, *at), (culprit, rank));
                assert!(said.contains(why), "{said}");
            }
            other => panic!("rank {rank} got {other:?}"),
        }
    }
}

#[test]
fn a_panic_reaches_every_rank_wherever_it_waits() {
    let (seen, error) = faults(5, |comm| match comm.rank() {
        0 => comm.barrier(),
        1 => comm.all_reduce(&mut [0.0f32; 10], ReduceOp::Sum),
        // Nobody who waits for the culprit itself, in a group without it.
        2 => comm.recv::<u8>(1, 0).map(|_| ()),
        3 => comm.start_barrier()?.wait(),
        _ => {
            thread::sleep(Duration::from_millis(50));
            panic!("out of memory at step {}", 12);
        }
    });
    assert_lost(&seen, 4, "out of memory at step 12");
    assert_eq!(error.rank, 4);
    assert!(matches!(&error.failure, Failure::Panic(message) if message == "out of memory at step 12"));
    assert_eq!(error.to_string(), "rank 4 failed: it panicked: out of memory at step 12");
    let message = seen[1].as_ref().unwrap().to_string();
    assert!(message.starts_with("rank 1 in all_reduce (sum) of 10 f32: rank 4 is gone"), "{message}");
}

#[test]
fn a_panic_in_the_middle_of_background_work_reaches_every_rank() {
    let (seen, error) = faults(3, |comm| {
        let pending = comm.start_all_reduce(vec![1.0f32; 1000], ReduceOp::Sum)?;
        let _never = if comm.rank() == 0 { Some(comm.start_barrier()?) } else { None };
        pending.wait()?;
        assert_ne!(comm.rank(), 0, "boom");
        comm.barrier()
    });
    assert_lost(&seen, 0, "panicked");
    assert_eq!(error.rank, 0);
}

#[test]
fn an_error_of_one_rank_reaches_every_rank() {
    let (seen, error) = faults(4, |comm| {
        let group = comm.split(Some((comm.rank() / 2) as u32), 0)?.unwrap();
        if comm.rank() == 2 {
            return Err(CommError::Engine { operation: "read the batch", why: "no such file".to_owned() });
        }
        // Rank 3 waits for rank 2; ranks 0 and 1 for rank 3.
        group.barrier()?;
        comm.barrier()
    });
    assert_lost(&seen, 2, "no such file");
    assert_eq!(error.rank, 2);
}

#[test]
fn a_rank_that_leaves_early_is_missed() {
    let (seen, error) = faults(3, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier() });
    assert_lost(&seen, 1, "dropped its communicator");
    assert_ne!(error.rank, 1);
    // A group that is dropped while the world lives.
    let (seen, _) = faults(2, |comm| {
        let group = comm.split(Some(0), 0)?.unwrap();
        if comm.rank() == 1 {
            drop(group);
            return comm.barrier();
        }
        group.barrier()
    });
    assert!(matches!(seen[0], Some(CommError::RankLost { rank: 1, .. })), "{:?}", seen[0]);
}

#[test]
fn a_hung_rank_is_named_by_every_call_that_waits_for_it() {
    let calls: [RankCall; 4] = [
        |comm| comm.all_reduce(&mut [1i32], ReduceOp::Sum),
        |comm| comm.start_all_gather(vec![1i32], 3)?.wait().map(|_| ()),
        |comm| comm.recv::<u8>(2, 5).map(|_| ()),
        |comm| comm.split(Some(0), 0).map(|_| ()),
    ];
    for call in calls {
        let (seen, error) = faults(3, move |comm| {
            if comm.rank() == 2 {
                // Until the end of the test program.
                thread::sleep(Duration::from_secs(3600));
            }
            call(comm)
        });
        let timed_out =
            |error: &Option<CommError>| matches!(error, Some(CommError::Timeout { missing, .. }) if *missing == [2]);
        // The other one fails with the same error, or since the first to see it failed.
        assert!(timed_out(&seen[0]) || timed_out(&seen[1]), "{seen:?}");
        assert!(seen[0].is_some() && seen[1].is_some(), "{seen:?}");
        assert_eq!(error.hung, [2]);
        let message = error.to_string();
        assert!(message.contains("for rank 2; hung") && message.ends_with("rank 2 did not return"), "{message}");
    }
}

#[test]
fn calls_that_differ_are_told_to_all() {
    let (seen, _) = faults(4, |comm| match comm.rank() {
        2 => comm.broadcast(&mut [0.0f32; 8], 1),
        _ => comm.all_reduce(&mut [0.0f32; 8], ReduceOp::Sum),
    });
    for error in &seen {
        assert_eq!(
            error.as_ref().unwrap().to_string(),
            "rank 0 called all_reduce (sum) of 8 f32, but rank 2 called broadcast from 1 of 8 f32; all ranks of a group \
             must make the same calls in the same order"
        );
    }
    let differs = |f: RankCall| {
        let (seen, _) = faults(3, f);
        assert!(seen.iter().all(|error| matches!(error, Some(CommError::Mismatch { a: 0, .. }))), "{seen:?}");
    };
    differs(|comm| comm.all_reduce(&mut vec![0.0f32; 8 + comm.rank()], ReduceOp::Sum));
    differs(|comm| {
        if comm.rank() == 1 {
            comm.all_reduce(&mut [0i32; 8], ReduceOp::Sum)
        } else {
            comm.all_reduce(&mut [0u32; 8], ReduceOp::Sum)
        }
    });
    differs(|comm| comm.all_reduce(&mut [0i32], if comm.rank() == 2 { ReduceOp::Max } else { ReduceOp::Sum }));
    differs(|comm| comm.broadcast(&mut [0i32], comm.rank()));
    differs(|comm| if comm.rank() == 1 { comm.split(None, 0).map(|_| ()) } else { comm.barrier() });
    differs(|comm| comm.start_broadcast(vec![0u8; comm.rank()], 0)?.wait().map(|_| ()));
}

#[test]
fn parts_that_do_not_add_up_are_told_to_all() {
    let wrong = |f: RankCall| {
        let (seen, _) = faults(3, f);
        let told =
            |error: &Option<CommError>| matches!(error, Some(CommError::Argument { got, .. }) if got == "[2, 2, 2]");
        assert!(seen.iter().all(told), "{seen:?}");
    };
    wrong(|comm| comm.all_gather(&[0.0f32; 2], &mut [0.0; 7]));
    wrong(|comm| comm.reduce_scatter(&[0.0f32; 5], &mut [0.0; 2], ReduceOp::Sum));
}

#[test]
fn a_broken_group_stays_broken_and_others_go_on() {
    let results = spawn(4, |comm| {
        let group = comm.split(Some((comm.rank() / 2) as u32), 0)?.unwrap();
        let first = group.all_reduce(&mut vec![0u8; comm.rank()], ReduceOp::Sum);
        let second = group.barrier();
        comm.barrier()?;
        Ok::<_, CommError>((first, second))
    })
    .unwrap();
    for (first, second) in results {
        assert!(matches!(first, Err(CommError::Mismatch { .. })));
        assert_eq!(first, second);
    }
}
