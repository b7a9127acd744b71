//! What a teacher says of a batch.

use std::fmt;
use std::sync::{Arc, LazyLock};

use firebox_tensor::ops::SoftLoss;

/// What a student's stages learn from a teacher about one batch, besides its targets.
#[derive(Clone, Debug, Default)]
pub struct Taught {
    /// The loss of the last stage.
    pub soft: Option<SoftLoss>,
}

/// What a teacher says of a batch, asked for by the first stage that needs it: where ranks have different stages, the others never run the teacher. Clones share it.
#[derive(Clone)]
pub struct Lesson(Arc<LazyLock<Taught, Box<dyn FnOnce() -> Taught + Send>>>);

impl Lesson {
    /// The lesson that `teach` gives when it is asked.
    pub fn new(teach: impl FnOnce() -> Taught + Send + 'static) -> Self {
        Self(Arc::new(LazyLock::new(Box::new(teach))))
    }

    /// What it says.
    pub fn taught(&self) -> &Taught {
        LazyLock::force(&self.0)
    }
}

impl fmt::Debug for Lesson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lesson")
    }
}
