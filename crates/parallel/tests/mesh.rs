//! Meshes: coordinates, the groups of every axis, and the communicators made from them.

#![allow(clippy::unwrap_used, missing_docs)]

use firebox_parallel::{Axis, Degrees, Mesh, MeshError, ReduceOp, spawn};
use proptest::prelude::*;

fn degrees() -> impl Strategy<Value = Degrees> {
    (1..4usize, 1..4usize, 1..3usize, 1..4usize, 1..4usize, any::<prop::sample::Index>()).prop_map(
        |(dp_replicate, dp_shard, cp, pp, tp, pick)| {
            let data = dp_replicate * dp_shard * cp;
            let divisors: Vec<usize> = (1..=data).filter(|n| data % n == 0).collect();
            Degrees { dp_replicate, dp_shard, cp, pp, tp, ep: divisors[pick.index(divisors.len())] }
        },
    )
}

fn world(d: Degrees) -> usize {
    d.dp_replicate * d.dp_shard * d.cp * d.pp * d.tp
}

proptest! {
    #[test]
    fn every_axis_divides_the_world_into_groups_of_its_size(d in degrees()) {
        d.check(world(d)).unwrap();
        for axis in Axis::ALL {
            for rank in 0..world(d) {
                let members = d.members(axis, rank);
                prop_assert_eq!(members.len(), d.size(axis));
                prop_assert!(members.contains(&rank));
                // The relation is the same from each member's side, so the groups are disjoint.
                for member in &members {
                    prop_assert_eq!(&d.members(axis, *member), &members);
                }
            }
        }
        for rank in 0..world(d) {
            prop_assert_eq!(d.rank(d.coordinates(rank)), rank);
            let both = |a, b| {
                let other = d.members(b, rank);
                d.members(a, rank).into_iter().filter(|r| other.contains(r)).collect::<Vec<_>>()
            };
            // Two axes that make up a third meet in one rank.
            prop_assert_eq!(both(Axis::Ep, Axis::ExpertDp), [rank]);
            prop_assert_eq!(both(Axis::DpCp, Axis::Model), [rank]);
            prop_assert_eq!(both(Axis::DpReplicate, Axis::DpShard), [rank]);
        }
    }
}

#[test]
fn the_last_axis_varies_fastest() {
    let d = Degrees { dp_shard: 2, pp: 2, tp: 2, ..Degrees::default() };
    assert_eq!(d.members(Axis::Tp, 5), [4, 5]);
    assert_eq!(d.members(Axis::Pp, 5), [5, 7]);
    assert_eq!(d.members(Axis::Dp, 5), [1, 5]);
    assert_eq!(d.members(Axis::Model, 5), [4, 5, 6, 7]);
    let d = Degrees { dp_replicate: 2, dp_shard: 2, cp: 2, ep: 4, ..Degrees::default() };
    assert_eq!(d.members(Axis::Ep, 6), [4, 5, 6, 7]);
    assert_eq!(d.members(Axis::ExpertDp, 6), [2, 6]);
}

#[test]
fn degrees_that_make_no_mesh_are_told() {
    let d = Degrees { dp_replicate: 2, dp_shard: 3, cp: 1, pp: 2, tp: 4, ep: 1 };
    assert_eq!(
        d.check(8).unwrap_err().to_string(),
        "the mesh dp_replicate 2 × dp_shard 3 × cp 1 × pp 2 × tp 4 (ep 1) has 48 ranks, but there are 8; change a degree \
         or start 48 ranks"
    );
    assert!(matches!(Degrees { tp: 0, ..d }.check(0), Err(MeshError::Zero { .. })));
    assert!(matches!(Degrees { tp: usize::MAX, pp: usize::MAX, ..d }.check(8), Err(MeshError::Size { .. })));
    let error = Degrees { ep: 4, ..d }.check(48).unwrap_err();
    assert_eq!(error, MeshError::Experts { degrees: Degrees { ep: 4, ..d }, data: 6 });
}

#[test]
fn communicators_are_those_of_the_groups() {
    let d = Degrees { dp_replicate: 1, dp_shard: 2, cp: 1, pp: 2, tp: 2, ep: 2 };
    spawn(8, move |world| {
        let rank = world.rank();
        let mesh = Mesh::new(d, world)?;
        for axis in Axis::ALL {
            let group = mesh.group(axis);
            assert_eq!(group.world_ranks(), d.members(axis, rank));
            let mut sum = [rank as i32];
            group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum[0] as usize, d.members(axis, rank).iter().sum::<usize>());
        }
        assert_eq!(mesh.degrees().rank(mesh.coordinates()), rank);
        Ok::<_, MeshError>(())
    })
    .unwrap();
    let error = spawn(4, move |world| Mesh::new(d, world).map(|_| ())).unwrap_err();
    assert!(error.to_string().contains("has 8 ranks, but there are 4"), "{error}");
}
