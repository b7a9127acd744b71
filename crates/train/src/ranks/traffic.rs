//! What the ranks tell each other about their work.

use firebox_parallel::{CommError, Meter};

use super::Ranks;

impl Ranks {
    /// What this rank sends, and how long it takes, in all groups.
    pub fn meter(&self) -> &Meter {
        self.world.meter()
    }

    /// The number of this rank among all.
    pub fn world_rank(&self) -> usize {
        self.world.rank()
    }

    /// The number of this rank among all, and how many there are.
    pub fn world_place(&self) -> (usize, usize) {
        (self.world.rank(), self.world.size())
    }

    /// How many ranks have the loss of the same tokens: those that have the parts of the same matrices.
    pub fn with_the_same_loss(&self) -> usize {
        self.tp.size()
    }

    /// The numbers of all ranks.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn numbers<const N: usize>(&self, here: [u64; N]) -> Result<Vec<[u64; N]>, CommError> {
        let mut all = vec![0i64; N * self.world.size()];
        self.world.all_gather(&here.map(|x| x as i64), &mut all)?;
        Ok(all.as_chunks::<N>().0.iter().map(|numbers| numbers.map(|x| x as u64)).collect())
    }

    /// What each rank has written.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn writings(&self, here: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let lengths = self.numbers([here.len() as u64])?;
        let mut all = vec![0u8; lengths.iter().map(|[len]| *len as usize).sum()];
        self.world.all_gather(here, &mut all)?;
        let mut rest = &all[..];
        let take = |[len]: [u64; 1]| {
            let (mine, others) = rest.split_at(len as usize);
            rest = others;
            mine.to_vec()
        };
        Ok(lengths.into_iter().map(take).collect())
    }
}
