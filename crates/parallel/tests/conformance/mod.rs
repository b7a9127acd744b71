//! What every engine must do, whatever carries the messages. Each rank calls [`all`] with its handle to the world.

use firebox_parallel::{CommError, Communicator, Element, ReduceOp, bf16};

/// A type with values that show wrong orders and places.
pub trait Sample: Element {
    /// A value that depends on rank and place.
    fn sample(rank: usize, i: usize) -> Self;

    /// What the engines promise: reduced one after the other, in a type that holds the sums.
    fn reduced(op: ReduceOp, values: impl Iterator<Item = Self>) -> Self;
}

fn fold<T>(op: ReduceOp, values: impl Iterator<Item = T>, sum: fn(T, T) -> T, less: fn(&T, &T) -> bool) -> T {
    let pick = |a: T, b: T| match op {
        ReduceOp::Sum => sum(a, b),
        ReduceOp::Max => {
            if less(&a, &b) {
                b
            } else {
                a
            }
        }
        ReduceOp::Min => {
            if less(&b, &a) {
                b
            } else {
                a
            }
        }
    };
    values.reduce(pick).unwrap()
}

impl Sample for f32 {
    fn sample(rank: usize, i: usize) -> Self {
        // Of sizes so different that another order of the sum gives other bits.
        ((rank * 7919 + i * 104_729) % 1009) as f32 * 1.1f32.powi(((rank * 5 + i * 3) % 60) as i32 - 30)
    }

    fn reduced(op: ReduceOp, values: impl Iterator<Item = Self>) -> Self {
        fold(op, values, |a, b| a + b, |a, b| a < b)
    }
}

impl Sample for bf16 {
    fn sample(rank: usize, i: usize) -> Self {
        Self::from_f32(f32::sample(rank, i))
    }

    fn reduced(op: ReduceOp, values: impl Iterator<Item = Self>) -> Self {
        Self::from_f32(f32::reduced(op, values.map(Self::to_f32)))
    }
}

macro_rules! integers {
    ($($type:ty)*) => {$(
        impl Sample for $type {
            fn sample(rank: usize, i: usize) -> Self {
                (rank * 7919 + i * 104_729 + 13) as $type
            }

            fn reduced(op: ReduceOp, values: impl Iterator<Item = Self>) -> Self {
                fold(op, values, <$type>::wrapping_add, |a, b| a < b)
            }
        }
    )*};
}

integers!(i32 i64 u32 u8);

/// Everything.
pub fn all(world: &Communicator) -> Result<(), CommError> {
    typed::<f32>(world)?;
    typed::<bf16>(world)?;
    typed::<i32>(world)?;
    typed::<i64>(world)?;
    typed::<u32>(world)?;
    typed::<u8>(world)?;
    messages(world)?;
    groups(world)?;
    background(world)?;
    large(world)?;
    arguments(world);
    world.barrier()
}

fn lengths(n: usize) -> Vec<usize> {
    vec![0, 1, n - 1, n, n + 1, 3 * n + 2, 1023, 4099]
}

/// Every collective on one type, in both forms.
fn typed<T: Sample>(comm: &Communicator) -> Result<(), CommError> {
    let (rank, n) = (comm.rank(), comm.size());
    for len in lengths(n) {
        let of = |rank: usize| -> Vec<T> { (0..len).map(|i| T::sample(rank, i)).collect() };
        for op in ReduceOp::ALL {
            let expected: Vec<T> = (0..len).map(|i| T::reduced(op, (0..n).map(|r| T::sample(r, i)))).collect();
            let mut data = of(rank);
            comm.all_reduce(&mut data, op)?;
            assert_eq!(data, expected, "all_reduce {op} of {len}");
            assert_eq!(comm.start_all_reduce(of(rank), op)?.wait()?, expected);

            // Parts that shrink with the rank, down to nothing; the first takes the rest.
            let part = |r: usize| len.min(2 * (n - 1 - r));
            let rest: usize = (1..n).map(part).sum();
            if rest <= len {
                let part = |r: usize| if r == 0 { len - rest } else { part(r) };
                let begin: usize = (0..rank).map(part).sum();
                let mut out = vec![T::default(); part(rank)];
                comm.reduce_scatter(&of(rank), &mut out, op)?;
                assert_eq!(out, expected[begin..begin + part(rank)], "reduce_scatter {op} of {len}");
                let pending = comm.start_reduce_scatter(of(rank), vec![T::default(); part(rank)], op)?;
                assert_eq!(pending.wait()?, (out, of(rank)));
            }
        }

        // Rank r has len + r elements.
        let mine: Vec<T> = (0..len + rank).map(|i| T::sample(rank, i)).collect();
        let expected: Vec<T> = (0..n).flat_map(|r| (0..len + r).map(move |i| T::sample(r, i))).collect();
        let mut out = vec![T::default(); expected.len()];
        comm.all_gather(&mine, &mut out)?;
        assert_eq!(out, expected, "all_gather of {len}");
        assert_eq!(comm.start_all_gather(mine, expected.len())?.wait()?, expected);

        // From a to b go as many elements as this says, none for some.
        let count = |a: usize, b: usize| (len * (a + 2 * b)) % 5;
        let block = |a: usize, b: usize| (0..count(a, b)).map(move |i| T::sample(a, 1000 * b + i));
        let data: Vec<T> = (0..n).flat_map(|b| block(rank, b)).collect();
        let counts: Vec<usize> = (0..n).map(|b| count(rank, b)).collect();
        let expected: Vec<T> = (0..n).flat_map(|a| block(a, rank)).collect();
        let expected_counts: Vec<usize> = (0..n).map(|a| count(a, rank)).collect();
        assert_eq!(comm.all_to_all(&data, &counts)?, (expected.clone(), expected_counts.clone()));
        assert_eq!(comm.start_all_to_all(data, counts)?.wait()?, (expected, expected_counts));

        for root in 0..n {
            let mut data = of(rank);
            comm.broadcast(&mut data, root)?;
            assert_eq!(data, of(root), "broadcast of {len} from {root}");
            assert_eq!(comm.start_broadcast(of(rank), root)?.wait()?, of(root));
        }
    }
    Ok(())
}

/// Messages keep their order by sender and tag, and go to receives in the order of these.
fn messages(comm: &Communicator) -> Result<(), CommError> {
    let (rank, n) = (comm.rank(), comm.size());
    if n == 1 {
        return Ok(());
    }
    let (next, previous) = ((rank + 1) % n, (rank + n - 1) % n);
    for i in 0..20u32 {
        comm.send(vec![i; i as usize], next, 0)?;
        comm.send(vec![i as f32; 3], next, 1)?;
    }
    // The other tag first, then waits in the reverse order.
    for i in 0..20 {
        assert_eq!(comm.recv::<f32>(previous, 1)?, [i as f32; 3]);
    }
    let pending: Result<Vec<_>, _> = (0..19).map(|_| comm.start_recv::<u32>(previous, 0)).collect();
    assert_eq!(comm.recv::<u32>(previous, 0)?, [19; 19]);
    for (i, pending) in pending?.into_iter().enumerate().rev() {
        assert_eq!(pending.wait()?, vec![i as u32; i]);
    }
    // Large messages both ways at once: no send waits for its receiver.
    let large: Vec<i64> = (0..200_000).map(|i| i64::sample(rank, i)).collect();
    let pending = comm.start_recv::<i64>(next, 2)?;
    comm.send(large, previous, 2)?;
    let large = pending.wait()?;
    assert!((0..large.len()).step_by(999).all(|i| large[i] == i64::sample(next, i)) && large.len() == 200_000);
    // A message of another type.
    comm.send(vec![1u8, 2], next, 3)?;
    let error = comm.recv::<f32>(previous, 3).unwrap_err();
    assert!(matches!(error, CommError::WrongType { from, .. } if from == comm.world_ranks()[previous]), "{error}");
    comm.barrier()
}

/// Groups of every shape, groups of groups, and calls in several at once.
fn groups(world: &Communicator) -> Result<(), CommError> {
    let (rank, n) = (world.rank(), world.size());
    // The members of the group that a rank gets into, for colors and keys that are functions of the rank.
    let check = |color: fn(usize, usize) -> Option<u32>, key: fn(usize, usize) -> i32| {
        let group = world.split(color(rank, n), key(rank, n))?;
        let Some(mine) = color(rank, n) else {
            assert!(group.is_none());
            return Ok(());
        };
        let group = group.unwrap();
        let mut members: Vec<usize> = (0..n).filter(|r| color(*r, n) == Some(mine)).collect();
        members.sort_by_key(|r| (key(*r, n), *r));
        assert_eq!(group.world_ranks(), members);
        assert_eq!(members[group.rank()], rank);
        typed_in_group(&group)
    };
    check(|_, _| Some(7), |_, _| 0)?;
    check(|r, _| Some(r as u32), |_, _| 0)?;
    check(|r, _| Some((r % 2) as u32), |r, _| -(r as i32))?;
    check(|r, n| Some((r * 2 / n) as u32), |r, n| ((r + 1) % n) as i32)?;
    check(|r, _| (r != 0).then_some(0), |_, _| 0)?;
    check(|r, n| (r + 1 == n).then_some(u32::MAX), |_, _| i32::MIN)?;
    check(|_, _| None, |_, _| 0)?;

    // A grid of 2 columns: rows and columns, each also in the background, waited for in another order on every other rank.
    let row = world.split(Some((rank / 2) as u32), 0)?.unwrap();
    let column = world.split(Some((rank % 2) as u32), 0)?.unwrap();
    let ones = || vec![1i32; 5000];
    let (a, b) = (row.start_all_reduce(ones(), ReduceOp::Sum)?, column.start_all_reduce(ones(), ReduceOp::Sum)?);
    let mut sum = vec![1i32; 3];
    world.all_reduce(&mut sum, ReduceOp::Sum)?;
    assert_eq!(sum, [n as i32; 3]);
    let (a, b) = if rank.is_multiple_of(2) {
        let a = a.wait()?;
        (a, b.wait()?)
    } else {
        let b = b.wait()?;
        (a.wait()?, b)
    };
    assert_eq!((a[4999], b[4999]), (row.size() as i32, column.size() as i32));

    // A group of a group; its errors and ranks are still the world's.
    let half = world.split(Some((rank % 2) as u32), 0)?.unwrap();
    let quarter = half.split(Some((half.rank() % 2) as u32), 0)?.unwrap();
    let expected: Vec<usize> = (0..n).filter(|r| r % 4 == rank % 4).collect();
    assert_eq!(quarter.world_ranks(), expected);
    typed_in_group(&quarter)
}

fn typed_in_group(group: &Communicator) -> Result<(), CommError> {
    let mut data = vec![group.rank() as u32; 5];
    group.all_reduce(&mut data, ReduceOp::Sum)?;
    let n = group.size() as u32;
    assert_eq!(data, [n * (n - 1) / 2; 5]);
    messages(group)
}

/// Many calls under way at once, mixed with blocking ones, some never waited for.
fn background(comm: &Communicator) -> Result<(), CommError> {
    let n = comm.size() as i64;
    let mut pending = vec![];
    for i in 0..30i64 {
        pending.push((i, comm.start_all_reduce(vec![i; 100 + i as usize], ReduceOp::Sum)?));
        if i % 7 == 0 {
            comm.barrier()?;
            drop(comm.start_broadcast(vec![comm.rank() as u8; 10], 0)?);
            let mut largest = [comm.rank() as i64];
            comm.all_reduce(&mut largest, ReduceOp::Max)?;
            assert_eq!(largest, [n - 1]);
        }
    }
    let barrier = comm.start_barrier()?;
    for (i, pending) in pending.into_iter().rev() {
        assert_eq!(pending.wait()?, vec![i * n; 100 + i as usize]);
    }
    barrier.wait()
}

/// More than engines handle in one piece.
fn large(comm: &Communicator) -> Result<(), CommError> {
    let (rank, n) = (comm.rank(), comm.size());
    let len = 700_001 * n;
    let mut data: Vec<f32> = (0..len).map(|i| f32::sample(rank, i)).collect();
    comm.all_reduce(&mut data, ReduceOp::Sum)?;
    let right = |i: usize| data[i] == f32::reduced(ReduceOp::Sum, (0..n).map(|r| f32::sample(r, i)));
    assert_eq!((0..len).step_by(97).chain([len - 1]).find(|i| !right(*i)), None);
    Ok(())
}

/// What cannot be right is refused before anybody waits.
fn arguments(comm: &Communicator) {
    let (rank, n) = (comm.rank(), comm.size());
    let refused = |error: CommError| assert!(matches!(error, CommError::Argument { .. }), "{error}");
    refused(comm.broadcast(&mut [0u8], n).unwrap_err());
    refused(comm.send(vec![0u8], n, 0).unwrap_err());
    refused(comm.send(vec![0u8], rank, 0).unwrap_err());
    refused(comm.recv::<u8>(rank, 0).unwrap_err());
    refused(comm.all_to_all(&[0u8; 3], &vec![1; n + 1]).unwrap_err());
    refused(comm.all_to_all(&vec![0u8; n + 1], &vec![1; n]).unwrap_err());
}
