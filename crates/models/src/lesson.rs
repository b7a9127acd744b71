//! What a teacher says of a batch.

use std::fmt;
use std::sync::{Arc, LazyLock};

use firebox_tensor::ops::{LossParts, Relations, SoftLoss};

/// What a student's stages learn from a teacher about one batch, besides its targets.
#[derive(Clone, Debug, Default)]
pub struct Taught {
    /// The loss of the last stage.
    pub soft: Option<SoftLoss>,
    /// What the outputs of blocks are held against.
    pub hidden: Option<Hints>,
    /// The attention relations that the last block's are held against, and the weight of that loss.
    pub relations: Option<(Relations, f64)>,
    /// Hears of the losses inside.
    pub parts: LossParts,
}

/// A teacher's hidden states.
#[derive(Clone, Debug)]
pub struct Hints {
    /// For each block of the student, `[B T, D']`.
    pub blocks: Vec<Arc<[f32]>>,
    /// The weight of their loss.
    pub weight: f64,
}

/// What a teacher says of a batch, asked for by the first stage that needs it: where ranks have different stages, the others never run the teacher. Clones share it.
#[derive(Clone)]
pub struct Lesson {
    taught: Arc<LazyLock<Taught, Box<dyn FnOnce() -> Taught + Send>>>,
    of_blocks: bool,
}

impl Lesson {
    /// The lesson that `teach` gives when it is asked, of blocks too or of the last stage alone.
    pub fn new(of_blocks: bool, teach: impl FnOnce() -> Taught + Send + 'static) -> Self {
        Self { taught: Arc::new(LazyLock::new(Box::new(teach))), of_blocks }
    }

    /// Whether blocks have something to learn.
    pub fn is_of_blocks(&self) -> bool {
        self.of_blocks
    }

    /// What it says.
    pub fn taught(&self) -> &Taught {
        LazyLock::force(&self.taught)
    }
}

impl fmt::Debug for Lesson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lesson")
    }
}
