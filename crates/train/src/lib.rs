//! # firebox-train
//!
//! The training loop of Firebox and everything around it: [recipes](recipe), the [`Trainer`] and its
//! [engine], [checkpoints](checkpoint) that survive a kill,
//! [observers](observe) and the report, [evaluation](evaluate), [generation](generate), [export], the [range of learning rates](lr_find).
//!
//! A run is determined by a recipe and a corpus. It gives the same bits twice, and after an interruption.
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//! use firebox_data::{Source, prepare};
//! use firebox_tensor::device::Backend;
//! use firebox_train::observe::Observers;
//! use firebox_train::{Recipe, Trainer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let text = dir.path().join("text.txt");
//! std::fs::write(&text, "the quick brown fox jumps over the lazy dog\n".repeat(200))?;
//!
//! let recipe = Recipe::load("tiny", &["data.tokenizer=char".into(), "data.val_split=tail".into(), "train.steps=3".into(), "eval.sample_tokens=8".into()])?;
//! let recipe = recipe.with(&["schedule={ kind = \"constant\" }".into(), "model.context=16".into()])?;
//! let source = Source::new([text.display().to_string()]);
//! let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {})?;
//! let device = Backend::NdArray.device()?;
//! let mut trainer = Trainer::new(recipe, &dir.path().join("run"), &dataset, &device, None)?;
//! let mut observers = Observers::new();
//! let info = trainer.info("ndarray", 1, "one sentence".into());
//! let summary = trainer.run(&info, &mut observers, &AtomicBool::new(false))?;
//! assert_eq!(summary.steps, 3);
//! # Ok(())
//! # }
//! ```

mod adapter;
mod batch_warmup;
pub mod chat;
pub mod checkpoint;
pub mod compress;
mod cooldown;
pub mod coordinates;
mod curvature;
mod distill;
pub mod draw;
pub mod engine;
mod error;
pub mod evaluate;
pub mod export;
mod fault;
pub mod generate;
mod image_tokenizer;
pub mod import;
mod init;
pub mod lr_find;
pub mod metrics;
pub mod model_io;
mod mup;
mod noise;
pub mod observe;
mod optimizer_recipe;
mod precision;
pub mod prune;
mod qat;
pub mod quantized;
mod ranks;
pub mod recipe;
pub mod reshape;
mod sentences;
pub mod task;
pub mod timeline;
mod trainer;
mod watch;
mod words;

pub use adapter::{AdapterRecipe, BaseFormat, FreezeRecipe, merge_adapters};
pub use batch_warmup::BatchWarmup;
pub use cooldown::Cooldown;
pub use distill::{DistillRecipe, StudentInit};
pub use error::TrainError;
pub use image_tokenizer::ImageTokenizer;
pub use noise::NoiseScale;
pub use optimizer_recipe::OptimizerRecipe;
pub use precision::{ComputeType, LossScale, LossScaling, ParamType, PrecisionRecipe};
pub use qat::{QatMethod, QatRecipe, QatSteps, qat_steps};
pub use ranks::{Layout, Zero};
pub use recipe::Recipe;
pub use trainer::{Held, LastEval, State, Trainer, prompt_ids};
pub use watch::{OnSpike, Watch, WatchRecipe};
pub use words::{Ends, Words};
