//! Makes a small data set of pictures with captions: coloured shapes at some place of the picture.
//!
//! ```sh
//! cargo run --release -p firebox-data --example shapes -- shapes 4000
//! ```
//!
//! writes `shapes/N.png` and `shapes/rows.jsonl`, of which each line has `image`, `caption`, and the words of the caption by themselves: `color`, `shape`, `place`. Tests take the same pictures from memory.
#![allow(clippy::unwrap_used, dead_code, missing_docs)]

use std::fmt::Write as _;
use std::path::Path;

use firebox_data::images::png;

pub const COLORS: [(&str, [u8; 3]); 6] = [
    ("red", [220, 40, 40]),
    ("green", [40, 160, 60]),
    ("blue", [40, 80, 220]),
    ("yellow", [240, 200, 40]),
    ("purple", [140, 50, 170]),
    ("black", [30, 30, 30]),
];
pub const SHAPES: [&str; 3] = ["circle", "square", "triangle"];
/// Names, and where in the picture, of whose sides each is 1.
pub const PLACES: [(&str, [f64; 2]); 5] = [
    ("top left", [0.27, 0.27]),
    ("top right", [0.73, 0.27]),
    ("bottom left", [0.27, 0.73]),
    ("bottom right", [0.73, 0.73]),
    ("middle", [0.5, 0.5]),
];

/// A picture and what is on it.
#[derive(Debug, Clone)]
pub struct Drawn {
    pub caption: String,
    pub color: usize,
    pub shape: usize,
    pub place: usize,
    /// `[3, size, size]`
    pub pixels: Vec<u8>,
}

/// SplitMix64: a number in [0, 1) of seed and index.
fn random(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index.wrapping_mul(0xD1B5_4A32_D192_ED03));
    for factor in [0xBF58_476D_1CE4_E5B9u64, 0x94D0_49BB_1331_11EB] {
        z = (z ^ (z >> 30)).wrapping_mul(factor);
    }
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Picture number `index` of a seed, `size` pixels on a side: any colour, shape and place, of any of a range of sizes, and not quite at its place.
pub fn drawn(size: usize, seed: u64, index: u64) -> Drawn {
    let at = |k: u64| random(seed, index * 8 + k);
    let pick = |k: u64, n: usize| (at(k) * n as f64) as usize;
    let (color, shape, place) = (pick(0, COLORS.len()), pick(1, SHAPES.len()), pick(2, PLACES.len()));
    let center = [PLACES[place].1[0] + 0.1 * (at(3) - 0.5), PLACES[place].1[1] + 0.1 * (at(4) - 0.5)];
    let radius = 0.14 + 0.08 * at(5);
    let inside = |x: f64, y: f64| {
        let (dx, dy) = ((x - center[0]) / radius, (y - center[1]) / radius);
        match SHAPES[shape] {
            "circle" => dx * dx + dy * dy <= 1.0,
            "square" => dx.abs().max(dy.abs()) <= 0.88,
            // Its tip is above, its base at 0.8.
            _ => dy <= 0.8 && dx.abs() * 1.8 <= dy + 1.0,
        }
    };
    // The share of a pixel that is inside, of 4 x 4 points.
    let step = 1.0 / (4 * size) as f64;
    let share = |row: usize, column: usize| {
        let points =
            (0..16).map(|i| (((column * 4 + i % 4) as f64 + 0.5) * step, ((row * 4 + i / 4) as f64 + 0.5) * step));
        points.filter(|(x, y)| inside(*x, *y)).count() as f64 / 16.0
    };
    let shares: Vec<f64> = (0..size * size).map(|i| share(i / size, i % size)).collect();
    let ink = COLORS[color].1;
    let pixels = (0..3).flat_map(|c| {
        shares.iter().map(move |share| (share * f64::from(ink[c]) + (1.0 - share) * 245.0).round() as u8)
    });
    let caption = format!("a {} {} in the {}", COLORS[color].0, SHAPES[shape], PLACES[place].0);
    Drawn { caption, color, shape, place, pixels: pixels.collect() }
}

/// Writes pictures number `0..n` as files and as lines of `rows.jsonl`.
pub fn write(dir: &Path, n: u64, size: usize, seed: u64) {
    std::fs::create_dir_all(dir).unwrap();
    let mut rows = String::new();
    for i in 0..n {
        let Drawn { caption, color, shape, place, pixels } = drawn(size, seed, i);
        std::fs::write(dir.join(format!("{i}.png")), png(&pixels, size, 3)).unwrap();
        let (color, shape, place) = (COLORS[color].0, SHAPES[shape], PLACES[place].0);
        writeln!(rows, "{{\"image\": \"{i}.png\", \"caption\": \"{caption}\", \"color\": \"{color}\", \"shape\": \"{shape}\", \"place\": \"{place}\"}}").unwrap();
    }
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, n] = &args[..] else {
        eprintln!("usage: shapes FOLDER HOW_MANY");
        std::process::exit(2);
    };
    write(Path::new(dir), n.parse().unwrap(), 32, 0);
    println!("{n} pictures with captions: {dir}/rows.jsonl");
}
