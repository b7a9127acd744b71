//! How ranks are laid out: the axes along which a model and its data are divided.
//!
//! The ranks of a world are the points of a grid `dp_replicate × dp_shard × cp × pp × tp`, the last axis varying fastest: ranks that
//! talk most are neighbours. Experts have no axis of their own: they are divided over the data axes. The ranks of one pipeline
//! stage and tensor part, numbered along `dp_replicate × dp_shard × cp`, form blocks of `ep` neighbours that share the experts
//! among them; the ranks at the same place of all blocks hold the same experts.

use std::fmt;

use crate::communicator::Communicator;
use crate::error::CommError;

/// How many ranks each axis has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Degrees {
    /// Copies of a sharded model, each with its own data.
    pub dp_replicate: usize,
    /// Ranks with their own data that divide parameters, gradients or optimizer states (ZeRO) among them.
    pub dp_shard: usize,
    /// Ranks that divide the sequence (context parallel).
    pub cp: usize,
    /// Ranks that divide the stages (pipeline parallel).
    pub pp: usize,
    /// Ranks that divide each matrix (tensor parallel).
    pub tp: usize,
    /// Ranks among which experts are divided; takes part of the data axes, not ranks of its own.
    pub ep: usize,
}

impl Default for Degrees {
    /// One rank.
    fn default() -> Self {
        Self { dp_replicate: 1, dp_shard: 1, cp: 1, pp: 1, tp: 1, ep: 1 }
    }
}

impl fmt::Display for Degrees {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dp_replicate, dp_shard, cp, pp, tp, ep } = self;
        write!(f, "dp_replicate {dp_replicate} × dp_shard {dp_shard} × cp {cp} × pp {pp} × tp {tp} (ep {ep})")
    }
}

/// Degrees that make no mesh.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MeshError {
    /// A degree is zero.
    #[error("the mesh {degrees} has a degree of 0; an axis that is not used has 1")]
    Zero {
        /// The degrees.
        degrees: Degrees,
    },
    /// The degrees do not multiply to the number of ranks.
    #[error("the mesh {degrees} has {product} ranks, but there are {world}; change a degree or start {product} ranks")]
    Size {
        /// The degrees.
        degrees: Degrees,
        /// Their product.
        product: u128,
        /// The number of ranks.
        world: usize,
    },
    /// `ep` does not divide the data axes.
    #[error(
        "the mesh {degrees} cannot divide experts {} ways: ep must divide dp_replicate × dp_shard × cp = {data}",
        degrees.ep
    )]
    Experts {
        /// The degrees.
        degrees: Degrees,
        /// The product of the data axes.
        data: usize,
    },
    /// Splitting the world into the groups failed.
    #[error("cannot make the groups of the mesh {degrees}: {source}")]
    Comm {
        /// The degrees.
        degrees: Degrees,
        /// Why.
        source: Box<CommError>,
    },
}

/// A group in which a rank takes part: the ranks that differ from it in these coordinates only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Copies of the same shard.
    DpReplicate,
    /// Shards of the same copy.
    DpShard,
    /// Parts of the same sequences.
    Cp,
    /// Stages of the same pipeline.
    Pp,
    /// Parts of the same matrices.
    Tp,
    /// `dp_replicate × dp_shard`: all that have data of their own.
    Dp,
    /// `dp_replicate × dp_shard × cp`: over these losses are averaged and gradients summed.
    DpCp,
    /// `dp_shard × cp`: all that divide one copy of what ZeRO divides.
    Shard,
    /// `pp × tp`: all parts of one copy of the model, over which a gradient norm is summed.
    Model,
    /// The ranks among which experts are divided: a part of [`DpCp`](Self::DpCp).
    Ep,
    /// The ranks with the same experts, over which their gradients are summed: the other part of `DpCp`.
    ExpertDp,
}

impl Axis {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::DpReplicate,
        Self::DpShard,
        Self::Cp,
        Self::Pp,
        Self::Tp,
        Self::Dp,
        Self::DpCp,
        Self::Shard,
        Self::Model,
        Self::Ep,
        Self::ExpertDp,
    ];
}

/// Where a rank stands on each axis, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the fields are those of Degrees")]
pub struct Coordinates {
    pub dp_replicate: usize,
    pub dp_shard: usize,
    pub cp: usize,
    pub pp: usize,
    pub tp: usize,
    /// Its place in its block of experts' ranks.
    pub ep: usize,
}

impl Degrees {
    /// Checks that these degrees make a mesh of `world` ranks.
    ///
    /// # Errors
    ///
    /// A degree of 0, a product that is not `world` (the message prints every factor), an `ep` that does not divide the data axes.
    pub fn check(&self, world: usize) -> Result<(), MeshError> {
        let degrees = *self;
        let Self { dp_replicate, dp_shard, cp, pp, tp, ep } = degrees;
        if [dp_replicate, dp_shard, cp, pp, tp, ep].contains(&0) {
            return Err(MeshError::Zero { degrees });
        }
        let product =
            [dp_replicate, dp_shard, cp, pp, tp].iter().fold(1u128, |product, n| product.saturating_mul(*n as u128));
        if product != world as u128 {
            return Err(MeshError::Size { degrees, product, world });
        }
        let data = dp_replicate * dp_shard * cp;
        if !data.is_multiple_of(ep) {
            return Err(MeshError::Experts { degrees, data });
        }
        Ok(())
    }

    /// Where a rank stands.
    pub fn coordinates(&self, rank: usize) -> Coordinates {
        let (rest, tp) = (rank / self.tp, rank % self.tp);
        let (data, pp) = (rest / self.pp, rest % self.pp);
        let (rest, cp) = (data / self.cp, data % self.cp);
        let (dp_replicate, dp_shard) = (rest / self.dp_shard, rest % self.dp_shard);
        Coordinates { dp_replicate, dp_shard, cp, pp, tp, ep: data % self.ep }
    }

    /// The rank that stands there; `ep` follows from the others and is not looked at.
    pub fn rank(&self, at: Coordinates) -> usize {
        (self.data_index(at) * self.pp + at.pp) * self.tp + at.tp
    }

    /// The number of a rank along `dp_replicate × dp_shard × cp`.
    fn data_index(&self, at: Coordinates) -> usize {
        (at.dp_replicate * self.dp_shard + at.dp_shard) * self.cp + at.cp
    }

    /// The number of ranks in each group of an axis.
    pub fn size(&self, axis: Axis) -> usize {
        let dp = self.dp_replicate * self.dp_shard;
        match axis {
            Axis::DpReplicate => self.dp_replicate,
            Axis::DpShard => self.dp_shard,
            Axis::Cp => self.cp,
            Axis::Pp => self.pp,
            Axis::Tp => self.tp,
            Axis::Dp => dp,
            Axis::DpCp => dp * self.cp,
            Axis::Shard => self.dp_shard * self.cp,
            Axis::Model => self.pp * self.tp,
            Axis::Ep => self.ep,
            Axis::ExpertDp => dp * self.cp / self.ep,
        }
    }

    /// The ranks of the group of `rank` along an axis, in order.
    pub fn members(&self, axis: Axis, rank: usize) -> Vec<usize> {
        let own = self.coordinates(rank);
        let block = |at| self.data_index(at) / self.ep;
        let together = |at: Coordinates| {
            let data = (at.dp_replicate, at.dp_shard, at.cp) == (own.dp_replicate, own.dp_shard, own.cp);
            let model = (at.pp, at.tp) == (own.pp, own.tp);
            match axis {
                Axis::DpReplicate => model && (at.dp_shard, at.cp) == (own.dp_shard, own.cp),
                Axis::DpShard => model && (at.dp_replicate, at.cp) == (own.dp_replicate, own.cp),
                Axis::Cp => model && (at.dp_replicate, at.dp_shard) == (own.dp_replicate, own.dp_shard),
                Axis::Pp => data && at.tp == own.tp,
                Axis::Tp => data && at.pp == own.pp,
                Axis::Dp => model && at.cp == own.cp,
                Axis::DpCp => model,
                Axis::Shard => model && at.dp_replicate == own.dp_replicate,
                Axis::Model => data,
                Axis::Ep => model && block(at) == block(own),
                Axis::ExpertDp => model && at.ep == own.ep,
            }
        };
        let world = self.size(Axis::DpCp) * self.size(Axis::Model);
        (0..world).filter(|other| together(self.coordinates(*other))).collect()
    }
}

/// A world laid out along the axes, as one of its ranks sees it: a communicator for each group in which the rank takes part.
#[derive(Clone, Debug)]
pub struct Mesh {
    degrees: Degrees,
    world: Communicator,
    groups: Vec<Communicator>,
}

impl Mesh {
    /// Splits the world into the groups of every [`Axis`]. All ranks must call it with the same degrees.
    ///
    /// # Errors
    ///
    /// Degrees that make no mesh of this size, before any rank talks to another; errors of the communicator.
    pub fn new(degrees: Degrees, world: Communicator) -> Result<Self, MeshError> {
        degrees.check(world.size())?;
        let rank = world.rank();
        let split = |axis| {
            // The first rank of a group is in no other group of the axis: it serves as the color.
            let first = degrees.members(axis, rank)[0];
            match world.split(Some(first as u32), 0) {
                Ok(Some(group)) => Ok(group),
                // PANIC: a split gives a group to each rank that has a color.
                Ok(None) => unreachable!("a rank with a color is in a group"),
                Err(source) => Err(MeshError::Comm { degrees, source: Box::new(source) }),
            }
        };
        let groups = Axis::ALL.into_iter().map(split).collect::<Result<_, _>>()?;
        Ok(Self { degrees, world, groups })
    }

    /// The degrees it was made from.
    pub fn degrees(&self) -> Degrees {
        self.degrees
    }

    /// All ranks.
    pub fn world(&self) -> &Communicator {
        &self.world
    }

    /// Where this rank stands.
    pub fn coordinates(&self) -> Coordinates {
        self.degrees.coordinates(self.world.rank())
    }

    /// This rank's group along an axis.
    pub fn group(&self, axis: Axis) -> &Communicator {
        &self.groups[axis as usize]
    }
}
