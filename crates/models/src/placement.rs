//! Where the values of a parameter lie among the ranks that share it.

use std::iter;
use std::ops::Range;

/// How one parameter is divided among the ranks of a tensor-parallel group: data, from which a full parameter can be cut into parts or put together again
/// for any number of ranks.
///
/// Along one dimension, the parameter is a list of [`Segment`]s of which each rank has its part: `[gate | up]` are two, `[q | k | v]` are three. Without
/// segments every rank has all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    dim: usize,
    segments: Vec<Segment>,
}

/// A stretch of a dimension, in units that are not divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// How many units. With fewer units than ranks, whose number is then a multiple, neighbouring ranks have the same unit.
    pub units: usize,
    /// Length of a unit.
    pub width: usize,
}

impl Segment {
    /// The units of rank `rank` of `size`.
    fn part(self, rank: usize, size: usize) -> Range<usize> {
        let first = rank * self.units / size;
        first..((rank + 1) * self.units / size).max(first + 1)
    }

    /// Whether no rank before has what this one has.
    fn is_first(self, rank: usize, size: usize) -> bool {
        rank == 0 || self.part(rank - 1, size) != self.part(rank, size)
    }
}

impl Placement {
    /// Every rank has the whole parameter, with the same values and, after backward, the same gradients.
    pub fn replicated() -> Self {
        Self::default()
    }

    /// Divided along `dim` into parts of each of `segments`.
    pub fn split(dim: usize, segments: impl Into<Vec<Segment>>) -> Self {
        Self { dim, segments: segments.into() }
    }

    /// Whether every rank has all of it.
    pub fn is_replicated(&self) -> bool {
        self.segments.is_empty()
    }

    /// The dimension that is divided, and its stretches of the full parameter that rank `rank` of `size` has one after the other.
    fn ranges(&self, rank: usize, size: usize) -> impl Iterator<Item = (Segment, Range<usize>)> {
        self.segments.iter().scan(0, move |start, segment| {
            let part = segment.part(rank, size);
            let range = *start + part.start * segment.width..*start + part.end * segment.width;
            *start += segment.units * segment.width;
            Some((*segment, range))
        })
    }

    /// The shape of the part that rank `rank` of `size` has of a parameter of shape `full`.
    pub fn shape(&self, full: &[usize], rank: usize, size: usize) -> Vec<usize> {
        let mut shape = full.to_vec();
        if !self.is_replicated() {
            shape[self.dim] = self.ranges(rank, size).map(|(_, range)| range.len()).sum();
        }
        shape
    }

    /// The shape of the full parameter, of which some rank has a part of shape `part`.
    pub fn full_shape(&self, part: &[usize]) -> Vec<usize> {
        let mut shape = part.to_vec();
        if !self.is_replicated() {
            shape[self.dim] = self.segments.iter().map(|segment| segment.units * segment.width).sum();
        }
        shape
    }

    /// The stretches of the flat full parameter of shape `full` that are, one after the other, the flat part of rank `rank` of `size`.
    pub fn runs(&self, full: &[usize], rank: usize, size: usize) -> Vec<Range<usize>> {
        if self.is_replicated() {
            return iter::once(0..full.iter().product()).collect();
        }
        let ranges: Vec<Range<usize>> = self.ranges(rank, size).map(|(_, range)| range).collect();
        let (outer, inner) = (full[..self.dim].iter().product(), full[self.dim + 1..].iter().product::<usize>());
        let at = |o: usize, i: usize| (o * full[self.dim] + i) * inner;
        (0..outer).flat_map(|o| ranges.iter().map(move |range| at(o, range.start)..at(o, range.end))).collect()
    }

    /// The part of rank `rank` of `size`, from the flat full values.
    pub fn shard<T: Copy>(&self, values: &[T], full: &[usize], rank: usize, size: usize) -> Vec<T> {
        self.runs(full, rank, size).into_iter().flat_map(|run| values[run].iter().copied()).collect()
    }

    /// The flat full values of shape `full` from the parts of all ranks, in their order.
    ///
    /// # Panics
    /// If a part has not the length of [`shape`](Self::shape).
    pub fn unshard<T: Copy + Default>(&self, parts: &[impl AsRef<[T]>], full: &[usize]) -> Vec<T> {
        let mut values = vec![T::default(); full.iter().product()];
        for (rank, part) in parts.iter().enumerate() {
            let mut part = part.as_ref();
            for run in self.runs(full, rank, parts.len()) {
                let (next, rest) = part.split_at(run.len());
                values[run].copy_from_slice(next);
                part = rest;
            }
            assert!(part.is_empty(), "unshard: rank {rank} has {} values too many", part.len());
        }
        values
    }

    /// The stretches of a rank's flat part, of shape `part`, that no rank before it has. Sums over all values of a model, such as the norm of its gradient, take
    /// these alone, so that what several ranks have counts once.
    pub fn counted(&self, part: &[usize], rank: usize, size: usize) -> Vec<Range<usize>> {
        let first = |segment: Segment| segment.is_first(rank, size);
        if self.is_replicated() && rank > 0 {
            return vec![];
        }
        if self.segments.iter().all(|segment| first(*segment)) {
            return iter::once(0..part.iter().product()).collect();
        }
        let (outer, inner) = (part[..self.dim].iter().product(), part[self.dim + 1..].iter().product::<usize>());
        let mut counted = vec![];
        for o in 0..outer {
            let mut at = o * part[self.dim];
            for (segment, range) in self.ranges(rank, size) {
                if first(segment) {
                    counted.push(at * inner..(at + range.len()) * inner);
                }
                at += range.len();
            }
        }
        counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_the_whole_again_and_count_once() {
        let segment = |units, width| Segment { units, width };
        let cases = [
            (Placement::replicated(), vec![3, 5]),
            (Placement::split(0, [segment(13, 1)]), vec![13, 3]),
            (Placement::split(1, [segment(11, 1), segment(11, 1)]), vec![2, 22]),
            (Placement::split(1, [segment(8, 3), segment(2, 3), segment(2, 3)]), vec![5, 36]),
            (Placement::split(0, [segment(8, 3), segment(2, 3), segment(2, 3)]), vec![36]),
        ];
        for (placement, full) in cases {
            let n: usize = full.iter().product();
            let values: Vec<usize> = (1..=n).collect();
            for size in [1, 2, 4, 8] {
                let parts: Vec<Vec<usize>> =
                    (0..size).map(|rank| placement.shard(&values, &full, rank, size)).collect();
                assert_eq!(placement.unshard(&parts, &full), values);
                let mut seen: Vec<usize> = vec![];
                for (rank, part) in parts.iter().enumerate() {
                    let shape = placement.shape(&full, rank, size);
                    assert_eq!(shape.iter().product::<usize>(), part.len());
                    assert_eq!(placement.full_shape(&shape), full);
                    seen.extend(placement.counted(&shape, rank, size).into_iter().flat_map(|run| &part[run]));
                }
                seen.sort_unstable();
                assert_eq!(seen, values, "{placement:?} on {size} ranks");
            }
        }
    }
}
