//! How ranks divide a run, and in which groups they talk.

use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Axis, Communicator, Degrees, Mesh};

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
    /// Ranks that divide each matrix.
    pub tp: usize,
    /// Whether they divide the tokens between the matrices as well (sequence parallel).
    pub sequence_parallel: bool,
    /// Of the ranks that have data of their own, how many divide the experts among them; the others have copies of these.
    pub ep: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            zero: Zero::None,
            pp: 1,
            schedule: Schedule::OneForwardOneBackward,
            tp: 1,
            sequence_parallel: false,
            ep: 1,
        }
    }
}

/// The groups in which a rank takes part.
#[derive(Debug)]
pub struct Axes {
    /// Those that have other data.
    pub(super) dp: Communicator,
    /// Those that have other stages.
    pub(super) pp: Communicator,
    /// Those that have other parts of the matrices.
    pub tp: Communicator,
    /// Of those that have other data, those that have the other experts.
    pub ep: Communicator,
    /// And those that have the same.
    pub(super) expert_dp: Communicator,
}

impl Layout {
    /// The groups of a rank of `world`.
    ///
    /// # Errors
    /// [`TrainError::Input`] for degrees that do not divide the ranks; [`TrainError::Comm`].
    pub fn axes(&self, world: &Communicator) -> Result<Axes, TrainError> {
        let (n, Self { pp, tp, ep, .. }) = (world.size(), *self);
        let of_model = pp * tp;
        if of_model == 0 || !n.is_multiple_of(of_model) {
            let (expected, got) = (format!("degrees whose product divides the {n} ranks"), format!("pp {pp}, tp {tp}"));
            return Err(TrainError::Input { what: "ranks", expected, got });
        }
        let degrees = Degrees { dp_shard: n / of_model, pp, tp, ep, ..Degrees::default() };
        let mesh = Mesh::new(degrees, world.clone()).map_err(|error| TrainError::Input {
            what: "ranks",
            expected: "a mesh".into(),
            got: error.to_string(),
        })?;
        let [dp, pp, tp, ep, expert_dp] =
            [Axis::Dp, Axis::Pp, Axis::Tp, Axis::Ep, Axis::ExpertDp].map(|axis| mesh.group(axis).clone());
        Ok(Axes { dp, pp, tp, ep, expert_dp })
    }
}
