//! Pictures from text.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::Tokenizer;
use firebox_data::images::{Preprocess, png};
use firebox_models::transformer::{KvCache, Transformer};

use crate::TrainError;
use crate::checkpoint::resolve;
use crate::generate::Sampling;
use crate::image_tokenizer::ImageTokenizer;
use crate::model_io::{Loaded, load_checkpoint, to_host};
use crate::task::{CaptionLayout, LAYOUT};

/// What a run of `task.kind = "text_to_image"` has learned to draw with.
#[derive(Debug)]
pub struct Studio {
    model: Transformer,
    text: Tokenizer,
    images: ImageTokenizer,
    layout: CaptionLayout,
}

impl Studio {
    /// Loads a run, or one of its checkpoints.
    ///
    /// # Errors
    /// [`TrainError`]: nothing there, a model that does not draw, or files that do not fit together.
    pub fn load(path: &Path, device: &Device) -> Result<Self, TrainError> {
        let checkpoint = resolve(path)?.checkpoint;
        let fail =
            |expected: &str, got: String| Err(TrainError::Input { what: "checkpoint", expected: expected.into(), got });
        if !checkpoint.contains(LAYOUT) {
            let got = format!("none in {}", checkpoint.path().display());
            return fail("a model that draws (task.kind = \"text_to_image\"), with its text_to_image.json", got);
        }
        let layout: CaptionLayout = checkpoint.read_json(LAYOUT)?;
        let images = ImageTokenizer::within(&checkpoint, device)?;
        let Loaded { model, tokenizer: Some(text) } = load_checkpoint(&checkpoint, device)? else {
            return fail("a tokenizer.json beside the model", format!("none in {}", checkpoint.path().display()));
        };
        let (codes, of) = (images.model.config().codes, images.model.config().image.patches());
        let fits = (layout.codes, layout.image_tokens) == (codes, of)
            && text.vocab_size() == layout.text_vocab
            && (1..=model.config().context).contains(&layout.text_tokens)
            && layout.context() <= model.config().context
            && layout.vocab_size() <= model.config().vocab_size;
        if !fits {
            let got = format!("{layout:?} with {codes} codes, {of} of an image, and {:?}", model.config());
            return fail("files that fit together", got);
        }
        Ok(Self { model, text, images, layout })
    }

    /// Who draws with it.
    pub fn painter(&self) -> Painter<'_> {
        Painter::new(&self.model, &self.text, &self.images, self.layout)
    }
}

/// Draws with a model, on a device without gradients.
#[derive(Debug, Clone, Copy)]
pub struct Painter<'a> {
    model: &'a Transformer,
    text: &'a Tokenizer,
    images: &'a ImageTokenizer,
    layout: CaptionLayout,
}

impl<'a> Painter<'a> {
    pub(crate) fn new(
        model: &'a Transformer,
        text: &'a Tokenizer,
        images: &'a ImageTokenizer,
        layout: CaptionLayout,
    ) -> Self {
        Self { model, text, images, layout }
    }

    /// How codes are chosen unless one says otherwise: as the model thinks.
    pub fn sampling() -> Sampling {
        Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() }
    }

    /// A picture of what the prompt says.
    ///
    /// # Errors
    /// [`TrainError`]: a prompt that the tokenizer cannot encode or that is too long, or impossible sampling.
    pub fn draw(&self, prompt: &str, sampling: &Sampling) -> Result<Picture, TrainError> {
        sampling.validate()?;
        let CaptionLayout { text_vocab, codes, image_tokens, .. } = self.layout;
        let too_long = |got: String| TrainError::Input {
            what: "prompt",
            expected: "a caption like those that the model has learned".into(),
            got,
        };
        let mut fresh = self.layout.caption(&self.text.encode(prompt.as_bytes())?).map_err(too_long)?;
        let (mut cache, mut drawn) = (KvCache::new(self.model), vec![]);
        for _ in 0..image_tokens {
            let logits = to_host(self.model.forward_cached(&fresh, &mut cache));
            // What is no code is not drawn.
            let code = sampling.choose(&logits[text_vocab..text_vocab + codes], &drawn);
            drawn.push(code);
            fresh = vec![text_vocab as i32 + code];
        }
        Ok(Picture::of(&self.images.model.decode(&drawn), &self.images.preprocess))
    }
}

/// An image that a model has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels on a side.
    pub size: usize,
    /// Values of a pixel: 3, or 1 for grey.
    pub channels: usize,
    /// `[C, S, S]`
    pub pixels: Vec<u8>,
}

impl Picture {
    /// From what a model gives, `[C, S, S]`.
    fn of(values: &[f32], preprocess: &Preprocess) -> Self {
        Self { size: preprocess.size, channels: preprocess.channels, pixels: preprocess.bytes(values) }
    }

    /// As a PNG file.
    pub fn png(&self) -> Vec<u8> {
        png(&self.pixels, self.size, self.channels)
    }
}
