//! From the bytes of a file to pixels.

use super::resize::Raster;
use image::{ColorType, DynamicImage, ImageFormat, ImageReader, Limits};
use std::io::Cursor;

/// Most pixels on a side: a header can claim more than there is memory.
pub const MAX_SIDE: u32 = 1 << 14;

/// Most bytes that decoding may take.
const MAX_BYTES: u64 = 1 << 30;

/// The pixels of a PNG or JPEG, as RGB or as shades of grey: `channels` is 3 or 1. Transparency is dropped and a camera's orientation ignored, as Hugging Face's processors do; grey is Pillow's `L`
/// (ITU-R 601).
///
/// # Errors
/// What is wrong, in a few words: another format, a broken or an oversized file.
pub fn decode(bytes: &[u8], channels: usize) -> Result<Raster, String> {
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| format!("the file cannot be read: {error}"))?;
    if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::Jpeg)) {
        return Err("expected a PNG or a JPEG, got something else".to_owned());
    }
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let image = reader.decode().map_err(|error| {
        let error = error.to_string();
        error.lines().next().unwrap_or_default().to_owned()
    })?;
    let (width, height) = (image.width() as usize, image.height() as usize);
    if width * height == 0 {
        return Err(format!("expected pixels, got an image of {width} x {height}"));
    }
    let values = match (channels, image.color()) {
        (1, ColorType::L8 | ColorType::L16 | ColorType::La8 | ColorType::La16) => image.into_luma8().into_raw(),
        (1, _) => grey(&image),
        _ => image.into_rgb8().into_raw(),
    };
    Ok(Raster { width, height, channels: if channels == 1 { 1 } else { 3 }, values })
}

fn grey(image: &DynamicImage) -> Vec<u8> {
    // Pillow, `Convert.c`: 16 bits below the point.
    let weighted = |p: &[u8]| 19595 * u32::from(p[0]) + 38470 * u32::from(p[1]) + 7471 * u32::from(p[2]) + 0x8000;
    image.to_rgb8().as_raw().chunks_exact(3).map(|p| (weighted(p) >> 16) as u8).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

    fn png(values: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut out = vec![];
        PngEncoder::new(&mut out).write_image(values, width, height, color).unwrap();
        out
    }

    #[test]
    fn colors_become_grey_and_grey_becomes_colors() {
        let rgb = png(&[255, 0, 0, 0, 255, 0], 2, 1, ExtendedColorType::Rgb8);
        assert_eq!(decode(&rgb, 3).unwrap().values, [255, 0, 0, 0, 255, 0]);
        // Pillow's: Image.new("RGB", (1, 1), (255, 0, 0)).convert("L") and so on.
        assert_eq!(decode(&rgb, 1).unwrap().values, [76, 150]);
        let grey = png(&[7, 9], 2, 1, ExtendedColorType::L8);
        assert_eq!(decode(&grey, 3).unwrap().values, [7, 7, 7, 9, 9, 9]);
        assert_eq!(decode(&grey, 1).unwrap().values, [7, 9]);
        let clear = png(&[1, 2, 3, 0], 1, 1, ExtendedColorType::Rgba8);
        assert_eq!(decode(&clear, 3).unwrap().values, [1, 2, 3]);
    }

    #[test]
    fn what_is_broken_is_said() {
        let whole = png(&[9; 300], 10, 10, ExtendedColorType::Rgb8);
        assert!(decode(b"GIF89a", 3).unwrap_err().contains("PNG or a JPEG"));
        assert!(decode(b"", 3).unwrap_err().contains("PNG or a JPEG"));
        for cut in [9, 20, whole.len() / 2, whole.len() - 20] {
            assert!(!decode(&whole[..cut], 3).unwrap_err().is_empty(), "cut at {cut}");
        }
        // A header that claims 2^31 - 1 pixels on a side.
        let mut huge = whole.clone();
        huge[16..24].copy_from_slice(&[0x7f, 255, 255, 255, 0x7f, 255, 255, 255]);
        let mut crc = flate2::Crc::new();
        crc.update(&huge[12..29]);
        huge[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        let error = decode(&huge, 3).unwrap_err();
        assert!(error.to_lowercase().contains("limit"), "{error}");
    }
}
