//! From what a model makes to files.

use super::preprocess::Preprocess;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

impl Preprocess {
    /// The inverse of [`normalize`](Self::normalize): the pixels of what a model gives, `[C, size, size]`, each the nearest there is.
    ///
    /// # Panics
    /// If there are not as many values as an image has.
    pub fn bytes(&self, values: &[f32]) -> Vec<u8> {
        assert_eq!(values.len(), self.values(), "bytes: an image of {} x {0} x {}", self.size, self.channels);
        let planes = values.chunks_exact(self.size * self.size).zip(self.mean.iter().zip(&self.std));
        // `as` takes what is out of range to its ends, and what is no number to 0.
        planes
            .flat_map(|(plane, (mean, std))| plane.iter().map(move |v| ((v * std + mean) * 255.0).round() as u8))
            .collect()
    }
}

/// A PNG file of pixels `[C, size, size]`, of 3 channels or of 1.
///
/// # Panics
/// If there are not as many pixels.
pub fn png(pixels: &[u8], size: usize, channels: usize) -> Vec<u8> {
    assert_eq!(pixels.len(), channels * size * size, "png: an image of {size} x {size} x {channels}");
    let plane = size * size;
    let interleaved: Vec<u8> = (0..plane).flat_map(|at| (0..channels).map(move |c| pixels[c * plane + at])).collect();
    let color = if channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut out = vec![];
    let written = PngEncoder::new(&mut out).write_image(&interleaved, size as u32, size as u32, color);
    // PANIC: the pixels are as many as the sides say, and memory is not a disk that is full.
    written.expect("a PNG in memory");
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pixels_come_back() {
        for channels in [1, 3] {
            let preprocess = Preprocess::vit(4, channels);
            let pixels: Vec<u8> = (0..preprocess.values()).map(|i| (i * 5) as u8).collect();
            let mut values = vec![];
            preprocess.normalize(&pixels, &mut values);
            assert_eq!(preprocess.bytes(&values), pixels);
            assert_eq!(preprocess.pixels(&png(&pixels, 4, channels)).unwrap(), pixels);
        }
        assert_eq!(Preprocess::vit(1, 3).bytes(&[-9.0, 9.0, f32::NAN]), [0, 255, 0]);
    }
}
