//! How ranks divide a run, and in which groups they talk.

use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Axis, Communicator, Degrees, Mesh};

use firebox_models::transformer::ContextKind;

use crate::TrainError;

/// What data-parallel ranks divide among themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Zero {
    /// Nothing: each rank has all parameters, all gradients and the whole state of the optimizer.
    #[default]
    None,
    /// The optimizer's state, and with it the sum of gradients (ZeRO-1 and ZeRO-2, which differ in nothing here: no rank ever holds more of a sum than its part).
    States,
    /// The parameters as well (ZeRO-3): a stage's are brought together before it runs, and dropped after it.
    Parameters,
}

impl Zero {
    /// Whether anything is.
    pub fn divides(self) -> bool {
        self != Self::None
    }
}

impl TryFrom<u8> for Zero {
    type Error = String;

    fn try_from(level: u8) -> Result<Self, String> {
        match level {
            0 => Ok(Self::None),
            1 | 2 => Ok(Self::States),
            3 => Ok(Self::Parameters),
            _ => Err(format!(
                "expected 0 (nothing is divided), 1 or 2 (optimizer state and gradients) or 3 (parameters too), got {level}"
            )),
        }
    }
}

impl From<Zero> for u8 {
    fn from(zero: Zero) -> Self {
        match zero {
            Zero::None => 0,
            Zero::States => 2,
            Zero::Parameters => 3,
        }
    }
}

/// How ranks divide a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// What those divide that have data of their own.
    pub zero: Zero,
    /// How many copies there are of what `zero` divides (hybrid sharding): the ranks with other data divide it in so many groups.
    pub dp_replicate: usize,
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
    /// Of the ranks that have data of their own, how many divide the experts among them; the others have copies of these.
    pub ep: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            zero: Zero::None,
            dp_replicate: 1,
            pp: 1,
            schedule: Schedule::OneForwardOneBackward,
            cp: 1,
            context: ContextKind::Ring,
            tp: 1,
            sequence_parallel: false,
            ep: 1,
        }
    }
}

/// The groups in which a rank takes part.
#[derive(Debug)]
pub struct Axes {
    /// Those that have other data, or other tokens of it: those of each row together.
    pub(super) dp_cp: Communicator,
    /// Those that have other data.
    pub dp: Communicator,
    /// Of these, those that divide what [`Zero`] says.
    pub(super) shard: Communicator,
    /// Of these, those that have copies of each other's part.
    pub(super) replicas: Communicator,
    /// Those that have other tokens of the same rows.
    pub(crate) cp: Communicator,
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
        let (n, Self { zero, dp_replicate, cp, pp, tp, ep, .. }) = (world.size(), *self);
        let copies = dp_replicate * cp * pp * tp;
        if copies == 0 || !n.is_multiple_of(copies) {
            let expected = format!("degrees whose product divides the {n} ranks");
            let got = format!("dp-replicate {dp_replicate}, cp {cp}, pp {pp}, tp {tp}");
            return Err(TrainError::Input { what: "ranks", expected, got });
        }
        if dp_replicate > 1 && !zero.divides() {
            let expected = "1 with zero 0, where every rank has a copy of all; or zero 1, 2 or 3".into();
            return Err(TrainError::Input { what: "dp-replicate", expected, got: dp_replicate.to_string() });
        }
        if ep > 1 && (cp > 1 || dp_replicate > 1 || zero == Zero::Parameters) {
            let expected = "1 with cp, dp-replicate or zero 3: it divides the experts among whole ranks".into();
            return Err(TrainError::Input { what: "ep", expected, got: ep.to_string() });
        }
        let degrees = Degrees { dp_replicate, dp_shard: n / copies, cp, pp, tp, ep };
        let mesh = Mesh::new(degrees, world.clone()).map_err(|error| TrainError::Input {
            what: "ranks",
            expected: "a mesh".into(),
            got: error.to_string(),
        })?;
        let axes = [Axis::DpCp, Axis::Dp, Axis::Cp, Axis::Shard, Axis::DpReplicate, Axis::Pp, Axis::Tp];
        let [dp_cp, dp, cp, shard, replicas, pp, tp] = axes.map(|axis| mesh.group(axis).clone());
        let [ep, expert_dp] = [Axis::Ep, Axis::ExpertDp].map(|axis| mesh.group(axis).clone());
        Ok(Axes { dp_cp, dp, cp, shard, replicas, pp, tp, ep, expert_dp })
    }
}
