//! Fixed positions of patches.

/// Vectors `[1 + grid grid, width]` of the class token, of zeros, and of patches in raster order: sines and cosines (Vaswani et al., arXiv:1706.03762, section 3.5) of the column in the first half,
/// and of the row in the second, as in the weights that He et al. have published.
pub(super) fn positions(grid: usize, width: usize) -> Vec<f32> {
    let quarter = width / 4;
    let angle = |at: usize, i: usize| at as f64 * 10_000f64.powf(-(i as f64) / quarter as f64);
    let of = |at: usize| {
        (0..2 * quarter).map(move |i| {
            let angle = angle(at, i % quarter);
            (if i < quarter { angle.sin() } else { angle.cos() }) as f32
        })
    };
    let patches = (0..grid * grid).flat_map(|patch| of(patch % grid).chain(of(patch / grid)));
    vec![0.0; width].into_iter().chain(patches).collect()
}
