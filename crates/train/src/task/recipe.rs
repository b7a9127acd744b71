//! The recipe's `[task]`.

use serde::{Deserialize, Serialize};

use super::hidden::{MaskedRecipe, SpansRecipe};
use super::image_tokens::ImageTokensRecipe;
use super::images::{ImageClassesRecipe, ImageTextRecipe};
use super::labelled::{ClassesRecipe, EmbeddingRecipe, TokenClassesRecipe, ValuesRecipe};
use super::masked_image::MaskedImageRecipe;
use super::text_to_image::TextToImageRecipe;
use super::{ChatRecipe, PreferenceRecipe};

/// What a model is trained for: `kind` says which, the other keys belong to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TaskRecipe {
    /// The next token of text.
    #[default]
    Language,
    /// A class per row of text.
    Classes(ClassesRecipe),
    /// A class per word of a row.
    TokenClasses(TokenClassesRecipe),
    /// Numbers per row of text.
    Values(ValuesRecipe),
    /// A vector per text, near to that of what belongs to it.
    Embedding(EmbeddingRecipe),
    /// The model's answers in conversations, or what follows prompts.
    Chat(ChatRecipe),
    /// Better answers over worse ones.
    Preference(PreferenceRecipe),
    /// A class per image.
    ImageClasses(ImageClassesRecipe),
    /// Images and texts that belong together.
    ImageText(Box<ImageTextRecipe>),
    /// Images from their codes: a quantizer.
    ImageTokens(ImageTokensRecipe),
    /// Masked patches of images.
    MaskedImage(MaskedImageRecipe),
    /// Images from text, by their codes.
    TextToImage(TextToImageRecipe),
    /// The tokens of text that are hidden, from those around them.
    Masked(MaskedRecipe),
    /// Spans of text that are hidden, after the text.
    Spans(SpansRecipe),
}

impl TaskRecipe {
    /// Whether it is language modelling, the task of a recipe that names none.
    pub fn is_language(&self) -> bool {
        *self == Self::Language
    }
}
