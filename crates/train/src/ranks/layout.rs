//! How ranks divide a run, and in which groups they talk.

use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Axis, Communicator, Degrees, Mesh};

use firebox_models::decoder::ContextKind;

use crate::TrainError;

/// What data-parallel ranks divide among themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Zero {
    /// Nothing: each rank has all parameters, all gradients and the whole state of the optimizer.
    #[default]
    None,
    /// The optimizer's state, and with it the sum of gradients (ZeRO-1 and ZeRO-2, which differ in nothing here: no rank ever holds more of a sum than its part).
    States,
}

impl TryFrom<u8> for Zero {
    type Error = String;

    fn try_from(level: u8) -> Result<Self, String> {
        match level {
            0 => Ok(Self::None),
            1 | 2 => Ok(Self::States),
            _ => Err(format!("expected 0 (nothing is divided), 1 or 2 (optimizer state and gradients), got {level}")),
        }
    }
}

impl From<Zero> for u8 {
    fn from(zero: Zero) -> Self {
        match zero {
            Zero::None => 0,
            Zero::States => 2,
        }
    }
}

/// How ranks divide a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// What those divide that have data of their own.
    pub zero: Zero,
    /// Ranks that divide the model's stages; the others have copies of them.
    pub pp: usize,
    /// In which order they work.
    pub schedule: Schedule,
    /// Ranks that divide the tokens of each row.
    pub cp: usize,
    /// How their attention comes together.
    pub context: ContextKind,
    /// Ranks that divide each matrix.
    pub tp: usize,
    /// Whether they divide the tokens between the matrices as well (sequence parallel).
    pub sequence_parallel: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            zero: Zero::None,
            pp: 1,
            schedule: Schedule::OneForwardOneBackward,
            cp: 1,
            context: ContextKind::Ring,
            tp: 1,
            sequence_parallel: false,
        }
    }
}

/// The groups in which a rank takes part.
#[derive(Debug)]
pub struct Axes {
    /// Those that have other data, or other tokens of it: those of each row together.
    pub(super) dp_cp: Communicator,
    /// Those that have other data.
    pub(super) dp: Communicator,
    /// Those that have other tokens of the same rows.
    pub(crate) cp: Communicator,
    /// Those that have other stages.
    pub(super) pp: Communicator,
    /// Those that have other parts of the matrices.
    pub tp: Communicator,
}

impl Layout {
    /// The groups of a rank of `world`.
    ///
    /// # Errors
    /// [`TrainError::Input`] for degrees that do not divide the ranks; [`TrainError::Comm`].
    pub fn axes(&self, world: &Communicator) -> Result<Axes, TrainError> {
        let (n, Self { pp, tp, cp, .. }) = (world.size(), *self);
        let of_model = pp * tp * cp;
        if of_model == 0 || !n.is_multiple_of(of_model) {
            let got = format!("cp {cp}, pp {pp}, tp {tp}");
            let expected = format!("degrees whose product divides the {n} ranks");
            return Err(TrainError::Input { what: "ranks", expected, got });
        }
        let degrees = Degrees { dp_shard: n / of_model, cp, pp, tp, ..Degrees::default() };
        let mesh = Mesh::new(degrees, world.clone()).map_err(|error| TrainError::Input {
            what: "ranks",
            expected: "a mesh".into(),
            got: error.to_string(),
        })?;
        let [dp_cp, dp, cp, pp, tp] =
            [Axis::DpCp, Axis::Dp, Axis::Cp, Axis::Pp, Axis::Tp].map(|axis| mesh.group(axis).clone());
        Ok(Axes { dp_cp, dp, cp, pp, tp })
    }
}
