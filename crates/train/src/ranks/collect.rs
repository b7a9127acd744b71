//! Tensors that ranks have in parts, put together on the rank that writes them.

use std::collections::BTreeMap;

use firebox_models::{Placement, Staged};
use firebox_optim::parameters;
use firebox_parallel::{CommError, Communicator};

use super::{Axes, Layout, Pipe};
use crate::TrainError;

/// The ranks of a run, in groups of their own: what they put together here goes on beside the steps.
#[derive(Debug)]
pub struct Collect {
    /// All of them.
    pub world: Communicator,
    axes: Axes,
    /// The rank of a pipeline that counts as the one that has a parameter, where stages are divided.
    owners: BTreeMap<String, usize>,
}

/// A tensor of which ranks may have parts.
#[derive(Debug)]
pub struct Parted<'a> {
    /// The parameter it belongs to.
    pub param: &'a str,
    /// The shape of the whole.
    pub shape: &'a [usize],
    /// How the ranks that divide matrices divide it.
    pub placement: Placement,
    /// Whether those divide it that ZeRO divides things among: then their parts follow one another.
    pub by_data: bool,
    /// Whether those divide it by experts, before that.
    pub by_experts: bool,
}

impl Collect {
    /// For a whole model, with the pipeline that will divide it. All ranks of `world` must call it.
    ///
    /// # Errors
    /// [`TrainError::Comm`]; [`TrainError::Optim`] if two parameters have one path.
    pub(super) fn new<M: Staged>(
        world: &Communicator,
        layout: &Layout,
        model: &M,
        pipe: Option<&Pipe>,
    ) -> Result<Self, TrainError> {
        // PANIC: a split gives a group to each rank that has a color.
        let world = world.split(Some(0), 0)?.expect("a rank with a color is in a group");
        let names = parameters(model)?.into_iter().map(|info| info.name);
        let owner = |name: String| Some((pipe?.usual().owner(model, &name), name));
        let owners = names.filter_map(owner).map(|(owner, name)| (name, owner)).collect();
        Ok(Self { axes: layout.axes(&world)?, world, owners })
    }

    /// Where a rank stands: among those that have copies, among those that divide what ZeRO says, in its pipeline, among those that divide matrices.
    fn coordinates(&self, rank: usize) -> [usize; 4] {
        let [shard, pp, tp] = [&self.axes.shard, &self.axes.pp, &self.axes.tp].map(Communicator::size);
        [rank / (shard * pp * tp), rank / (pp * tp) % shard, rank / tp % pp, rank % tp]
    }

    /// The whole of a tensor, on rank `root` alone. `mine` gives what this rank has, and is asked for it only if it is needed. All ranks must call it.
    ///
    /// # Errors
    /// [`CommError`]: ranks that are lost, late, or do something else.
    pub fn to(
        &self,
        root: usize,
        tensor: &Parted<'_>,
        mine: impl FnOnce() -> Vec<f32>,
    ) -> Result<Option<Vec<f32>>, CommError> {
        let Axes { shard, replicas, pp, tp, ep, .. } = &self.axes;
        let [to_replica, to_shard, to_pp, to_tp] = self.coordinates(root);
        // Its own copy is enough.
        if replicas.rank() != to_replica {
            return Ok(None);
        }
        let owner = self.owners.get(tensor.param).copied().unwrap_or(0);
        let mut values = None;
        if pp.size() == 1 || owner == pp.rank() {
            if tensor.by_experts {
                // The first block is enough where all have the same.
                let mine = if tensor.by_data || shard.rank() < ep.size() { mine() } else { vec![] };
                values = gather(shard, mine, to_shard)?.map(|parts| of_experts(&parts, ep.size(), tensor.shape));
            } else if tensor.by_data {
                values = gather(shard, mine(), to_shard)?.map(|parts| parts.concat());
            } else if shard.rank() == to_shard && (tp.rank() == to_tp || !tensor.placement.is_replicated()) {
                values = Some(mine());
            }
            if let (Some(part), false) = (&mut values, tensor.placement.is_replicated()) {
                values = gather(tp, std::mem::take(part), to_tp)?
                    .map(|parts| tensor.placement.unshard(&parts, tensor.shape));
            }
        }
        if owner == to_pp || pp.size() == 1 || (shard.rank(), tp.rank()) != (to_shard, to_tp) {
            return Ok(values.filter(|_| self.world.rank() == root));
        }
        match values {
            Some(values) if owner == pp.rank() => pp.send(values, to_pp, TAG).map(|()| None),
            _ if pp.rank() == to_pp => pp.recv(owner, TAG).map(Some),
            _ => Ok(None),
        }
    }
}

/// Of messages of this kind.
const TAG: u32 = 0;

/// A tensor of shape `shape` from the parts of the ranks of blocks of `block`: a place in a block has some of the experts, of which those at this place have parts one
/// after the other.
fn of_experts(parts: &[Vec<f32>], block: usize, shape: &[usize]) -> Vec<f32> {
    let order = (0..block).flat_map(|place| (place..parts.len()).step_by(block));
    let mut whole: Vec<f32> = order.flat_map(|rank| parts[rank].iter().copied()).collect();
    // A count of steps is the same of each part.
    whole.truncate(shape.iter().product());
    whole
}

/// What each rank of a group has, on one of them.
fn gather(group: &Communicator, mine: Vec<f32>, to: usize) -> Result<Option<Vec<Vec<f32>>>, CommError> {
    if group.size() == 1 {
        return Ok(Some(vec![mine]));
    }
    let mut counts = vec![0; group.size()];
    counts[to] = mine.len();
    let (all, counts) = group.all_to_all(&mine, &counts)?;
    let mut rest = all.as_slice();
    let parts = counts.iter().map(|&count| {
        let (part, others) = rest.split_at(count);
        rest = others;
        part.to_vec()
    });
    let parts = parts.collect();
    Ok((group.rank() == to).then_some(parts))
}
