//! Resizing as Pillow does it, to the last bit: what Hugging Face's image processors were made with.
//!
//! A filter as wide as what one new pixel covers (so that nothing is skipped when an image becomes smaller), first along the rows, then along the columns, in
//! integers of 22 bits below the point (Pillow 11, `Resample.c`; version 13 goes along the columns first where that is less work). Processors on torchvision differ from it by one step of 255 in some pixels.

/// An image of bytes, rows of pixels of `channels` values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raster {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Values of a pixel.
    pub channels: usize,
    /// `[height, width, channels]`
    pub values: Vec<u8>,
}

/// What a new pixel takes of the old ones around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// A triangle: `resample` 2 in Hugging Face's files, that of ViT.
    Bilinear,
    /// Keys' cubic with a = -0.5: `resample` 3, that of CLIP.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Filter::Bilinear => (1.0 - x).max(0.0),
            Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Filter::Bicubic => 0.0,
        }
    }
}

/// Bits below the point.
const BITS: u32 = 22;

/// What one new pixel is made of: the first of the old ones, and the weight of each from there on.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let of = |i: usize| {
        let center = (i as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end).map(|x| filter.at((x as f64 - center + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |w: f64| {
            let w = if sum == 0.0 { w } else { w / sum } * f64::from(1u32 << BITS);
            (w + 0.5f64.copysign(w)) as i32
        };
        Taps { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(of).collect()
}

/// The weighted sum as a byte.
fn byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

impl Raster {
    /// The image with other sides.
    ///
    /// # Panics
    /// If a side is 0, or the values are not as many as the sides say.
    pub fn resize(self, width: usize, height: usize, filter: Filter) -> Self {
        assert!(self.width * self.height * width * height > 0, "resize: an image without pixels");
        assert_eq!(self.values.len(), self.width * self.height * self.channels, "resize: values of an image");
        let wide = if self.width == width { self } else { self.resize_rows(width, filter) };
        if wide.height == height { wide } else { wide.resize_columns(height, filter) }
    }

    fn resize_rows(&self, width: usize, filter: Filter) -> Self {
        let (taps, c) = (taps(self.width, width, filter), self.channels);
        let mut values = Vec::with_capacity(width * self.height * c);
        for row in self.values.chunks_exact(self.width * c) {
            for Taps { first, weights } in &taps {
                values.extend((0..c).map(|k| {
                    let pixels = row[first * c + k..].iter().step_by(c);
                    byte(weights.iter().zip(pixels).fold(1 << (BITS - 1), |sum, (w, &v)| sum + w * i32::from(v)))
                }));
            }
        }
        Self { width, values, ..*self }
    }

    fn resize_columns(&self, height: usize, filter: Filter) -> Self {
        let line = self.width * self.channels;
        let mut values = Vec::with_capacity(height * line);
        let mut sums = vec![0i32; line];
        for Taps { first, weights } in taps(self.height, height, filter) {
            sums.fill(1 << (BITS - 1));
            for (w, row) in weights.iter().zip(self.values[first * line..].chunks_exact(line)) {
                sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += w * i32::from(v));
            }
            values.extend(sums.iter().map(|&sum| byte(sum)));
        }
        Self { height, values, ..*self }
    }

    /// The middle of the image, with black where it is smaller.
    pub fn center_crop(&self, width: usize, height: usize) -> Self {
        let c = self.channels;
        // Where the crop begins in the image, or the image in the crop.
        let offset = |of: usize, to: usize| (of.saturating_sub(to) / 2, to.saturating_sub(of) / 2);
        let ((left, pad_left), (top, pad_top)) = (offset(self.width, width), offset(self.height, height));
        let (w, h) = (self.width.min(width), self.height.min(height));
        let mut values = vec![0; width * height * c];
        for y in 0..h {
            let from = ((top + y) * self.width + left) * c;
            let to = ((pad_top + y) * width + pad_left) * c;
            values[to..to + w * c].copy_from_slice(&self.values[from..from + w * c]);
        }
        Self { width, height, channels: c, values }
    }

    /// Values as models take them: `[channels, height, width]`.
    pub fn planes(&self) -> Vec<u8> {
        (0..self.channels).flat_map(|k| self.values[k..].iter().step_by(self.channels.max(1)).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// An image of 7 x 5 pixels with sharp edges.
    fn image() -> Raster {
        let values = (0..7 * 5 * 3u32).map(|i| (i * i * 37 + i * 11) as u8).collect();
        Raster { width: 7, height: 5, channels: 3, values }
    }

    /// By `tests/golden/vision.py`: CRC-32 of what Pillow gives.
    #[test]
    fn every_pixel_is_pillows() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/images.json");
        let goldens: Vec<(String, usize, usize, u32)> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(goldens.len(), 12);
        for (filter, width, height, crc) in goldens {
            let filter = if filter == "bilinear" { Filter::Bilinear } else { Filter::Bicubic };
            let got = image().resize(width, height, filter);
            assert_eq!(got.values.len(), width * height * 3);
            assert_eq!(crc32(&got.values), crc, "{filter:?} to {width} x {height}");
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum()
    }

    #[test]
    fn crops_are_of_the_middle() {
        let image = image();
        let crop = image.center_crop(3, 3);
        assert_eq!(crop.values[..3], image.values[(7 + 2) * 3..(7 + 2) * 3 + 3]);
        let padded = image.center_crop(9, 5);
        assert_eq!(padded.values[..3], [0, 0, 0]);
        assert_eq!(padded.values[3..6], image.values[..3]);
    }

    #[test]
    fn planes_are_of_one_channel_each() {
        let image = Raster { width: 2, height: 1, channels: 3, values: vec![1, 2, 3, 4, 5, 6] };
        assert_eq!(image.planes(), [1, 4, 2, 5, 3, 6]);
    }
}
