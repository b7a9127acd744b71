//! From pixels of any size to what a model takes, and Hugging Face's `preprocessor_config.json`.

use super::decode::decode;
use super::resize::{Filter, Raster};
use serde_json::{Value, json};

/// How an image becomes square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// Both sides are stretched (ViT).
    Stretch,
    /// The shorter side is `edge` pixels long, and the middle of the longer one is kept (CLIP).
    Crop {
        /// Pixels of the shorter side before cropping.
        edge: usize,
    },
}

/// How images become what a model takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// Pixels on a side.
    pub size: usize,
    /// Values of a pixel: 3, or 1 for grey.
    pub channels: usize,
    /// How an image becomes square.
    pub fit: Fit,
    /// How it is resized.
    pub filter: Filter,
    /// Of each channel what is subtracted from values in `0..=1`.
    pub mean: Vec<f32>,
    /// And what they are divided by then.
    pub std: Vec<f32>,
}

impl Preprocess {
    /// As ViT: stretched, values from -1 to 1.
    pub fn vit(size: usize, channels: usize) -> Self {
        let half = vec![0.5; channels];
        Self { size, channels, fit: Fit::Stretch, filter: Filter::Bilinear, mean: half.clone(), std: half }
    }

    /// As CLIP: the middle, with mean and deviation of the images that it was trained on; of grey images their means.
    pub fn clip(size: usize, channels: usize) -> Self {
        let (mean, std) = match channels {
            1 => (vec![0.449], vec![0.269]),
            // openai/clip-vit-base-patch32, preprocessor_config.json
            _ => (vec![0.481_454_66, 0.457_827_5, 0.408_210_73], vec![0.268_629_54, 0.261_302_6, 0.275_777_1]),
        };
        Self { size, channels, fit: Fit::Crop { edge: size }, filter: Filter::Bicubic, mean, std }
    }

    /// How many values an image has.
    pub fn values(&self) -> usize {
        self.channels * self.size * self.size
    }

    /// The pixels of a file's bytes, `[C, size, size]`.
    ///
    /// # Errors
    /// As [`decode`].
    pub fn pixels(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        Ok(self.fitted(decode(bytes, self.channels)?).planes())
    }

    fn fitted(&self, image: Raster) -> Raster {
        match self.fit {
            Fit::Stretch => image.resize(self.size, self.size, self.filter),
            Fit::Crop { edge } => {
                let (w, h) = (image.width, image.height);
                let long = |short: usize, long: usize| (edge as f64 * long as f64 / short as f64) as usize;
                let (w, h) = if w <= h { (edge, long(w, h)) } else { (long(h, w), edge) };
                image.resize(w.max(1), h.max(1), self.filter).center_crop(self.size, self.size)
            }
        }
    }

    /// Appends what a model takes of pixels `[C, size, size]`.
    ///
    /// # Panics
    /// If there are not as many pixels as an image has.
    pub fn normalize(&self, pixels: &[u8], out: &mut Vec<f32>) {
        assert_eq!(pixels.len(), self.values(), "normalize: an image of {} x {0} x {}", self.size, self.channels);
        out.reserve(pixels.len());
        for (plane, (mean, std)) in pixels.chunks_exact(self.size * self.size).zip(self.mean.iter().zip(&self.std)) {
            out.extend(plane.iter().map(|&v| (f32::from(v) * (1.0 / 255.0) - mean) / std));
        }
    }

    /// Reads a `preprocessor_config.json`, of a model that takes images of `size` pixels on a side with `channels` values each.
    ///
    /// # Errors
    /// Key, value, and what would work.
    pub fn from_json(json: &Value, size: usize, channels: usize) -> Result<Self, String> {
        let fail = |key: &str, expected: &str| {
            let got = json.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string);
            Err(format!("preprocessor_config.json: `{key}`: expected {expected}, got {got}"))
        };
        let flag = |key: &str, default: bool| json.get(key).and_then(Value::as_bool).unwrap_or(default);
        let side = |value: &Value, names: [&str; 2]| {
            let of = |name: &str| value.get(name).and_then(Value::as_u64);
            let sides = names.map(of);
            let side = value.as_u64().or(if sides[0] == sides[1] { sides[0] } else { None });
            side.and_then(|side| usize::try_from(side).ok()).filter(|side| (1..=1 << 14).contains(side))
        };
        let square = ["height", "width"];
        let said = json.get("size").cloned().unwrap_or_else(|| size.into());
        let shortest = side(&said, ["shortest_edge"; 2]);
        let cropped = flag("do_center_crop", false);
        let fit = match shortest.filter(|_| cropped || said.is_object()) {
            Some(edge) => {
                let crop = json.get("crop_size").map_or(Some(size), |crop| side(crop, square));
                if !cropped || crop != Some(size) {
                    return fail("crop_size", &format!("{size}, what the model takes, with do_center_crop"));
                }
                Fit::Crop { edge }
            }
            None if side(&said, square) == Some(size) => Fit::Stretch,
            None => return fail("size", &format!("{size}, what the model takes, or a shortest_edge")),
        };
        let filter = match json.get("resample").map_or(Some(2), Value::as_u64) {
            Some(2) => Filter::Bilinear,
            Some(3) => Filter::Bicubic,
            _ => return fail("resample", "2 (bilinear) or 3 (bicubic)"),
        };
        if !flag("do_resize", true) {
            return fail("do_resize", "true");
        }
        let factor = json.get("rescale_factor").map_or(Some(1.0 / 255.0), Value::as_f64);
        if !flag("do_rescale", true) || factor.is_none_or(|factor| (factor * 255.0 - 1.0).abs() > 1e-3) {
            return fail("rescale_factor", "1 / 255, with do_rescale");
        }
        let numbers = |key: &str, default: f32| match json.get(key) {
            _ if !flag("do_normalize", true) => Some(vec![if key == "image_std" { 1.0 } else { 0.0 }; channels]),
            None => Some(vec![default; channels]),
            Some(list) => {
                let numbers = list.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32));
                let numbers: Vec<f32> = numbers.collect::<Option<_>>()?;
                let fit = numbers.len() == channels && numbers.iter().all(|v| v.is_finite());
                (fit && (key == "image_mean" || numbers.iter().all(|&v| v > 0.0))).then_some(numbers)
            }
        };
        let wanted = format!("{channels} numbers, one per channel");
        let Some(mean) = numbers("image_mean", 0.5) else { return fail("image_mean", &wanted) };
        let Some(std) = numbers("image_std", 0.5) else { return fail("image_std", &format!("{wanted}, above 0")) };
        Ok(Self { size, channels, fit, filter, mean, std })
    }

    /// The `preprocessor_config.json` that says this.
    pub fn to_json(&self) -> Value {
        let sides = json!({"height": self.size, "width": self.size});
        let mut json = json!({
            "image_processor_type": "ViTImageProcessor",
            "do_resize": true,
            "size": sides,
            "resample": if self.filter == Filter::Bilinear { 2 } else { 3 },
            "do_rescale": true,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": true,
            "image_mean": self.mean,
            "image_std": self.std,
        });
        if let (Fit::Crop { edge }, Some(map)) = (self.fit, json.as_object_mut()) {
            map.insert("image_processor_type".into(), "CLIPImageProcessor".into());
            map.insert("size".into(), json!({"shortest_edge": edge}));
            map.insert("do_center_crop".into(), true.into());
            map.insert("crop_size".into(), sides);
            map.insert("do_convert_rgb".into(), (self.channels == 3).into());
        }
        json
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for preprocess in [Preprocess::vit(8, 1), Preprocess::vit(224, 3), Preprocess::clip(32, 3)] {
            let read = Preprocess::from_json(&preprocess.to_json(), preprocess.size, preprocess.channels);
            assert_eq!(read.unwrap(), preprocess);
        }
        // As older files have it.
        let old = json!({"size": 32, "crop_size": 32, "do_center_crop": true, "resample": 3,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]});
        assert_eq!(Preprocess::from_json(&old, 32, 3).unwrap().fit, Fit::Crop { edge: 32 });
        for (key, value) in [
            ("size", json!({"height": 16, "width": 32})),
            ("resample", json!(1)),
            ("image_mean", json!([0.5])),
            ("image_std", json!([0.5, 0.0, 0.5])),
            ("rescale_factor", json!(1.0)),
        ] {
            let mut json = Preprocess::vit(32, 3).to_json();
            json[key] = value;
            let error = Preprocess::from_json(&json, 32, 3).unwrap_err();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn values_are_of_the_channel() {
        let preprocess = Preprocess { mean: vec![0.0, 1.0, 0.0], std: vec![1.0, 1.0, 0.5], ..Preprocess::vit(1, 3) };
        let mut out = vec![];
        preprocess.normalize(&[255, 0, 255], &mut out);
        assert_eq!(out, [1.0, -1.0, 2.0]);
    }
}
