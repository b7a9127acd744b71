//! Pipeline schedules: every plan is proved complete, free of deadlock and within its memory over many sizes; broken plans are
//! refused; the bubbles are those of the papers; stages are cut at the optimum.

#![allow(clippy::unwrap_used, missing_docs)]

use firebox_parallel::pipeline::{Action, Costs, Payload, Plan, PlanError, Schedule, ScheduleError, Work, cut};
use proptest::prelude::*;

fn plan() -> impl Strategy<Value = (Schedule, usize, usize)> {
    (0..5, 1..12usize, 1..30usize, 1..5usize).prop_map(|(kind, p, m, v)| match kind {
        0 => (Schedule::AllForwardAllBackward, p, m),
        1 => (Schedule::OneForwardOneBackward, p, m),
        2 => (Schedule::Interleaved { stages_per_rank: v }, p, m.next_multiple_of(p)),
        3 => (Schedule::ZeroBubbleH1, p, m),
        _ => (Schedule::ZeroBubbleV, p, m),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_plan_is_right((schedule, p, m) in plan(), message in 0..3u8) {
        let plan = schedule.plan(p, m).unwrap();
        let checked = plan.check().unwrap();
        prop_assert_eq!(plan.stages(), p * schedule.stages_per_rank());
        let stages_per_rank = (0..p).map(|r| plan.placement.iter().filter(|s| **s == r).count());
        prop_assert!(stages_per_rank.eq(std::iter::repeat_n(schedule.stages_per_rank(), p)));
        // The bound is not only kept but reached by some rank: it says what is needed.
        prop_assert!(checked.peak.iter().zip(&plan.memory_bound).any(|(peak, bound)| peak == bound), "{:?}", checked);

        let mut costs = Costs::uniform(plan.stages());
        costs.message = f64::from(message) * 0.25;
        let timeline = plan.simulate(&costs).unwrap();
        let units = (3 * m * schedule.stages_per_rank()) as f64;
        prop_assert!(timeline.makespan() >= units);
        prop_assert!((0.0..1.0).contains(&timeline.bubble_share()));
        for spans in &timeline.ranks {
            prop_assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
            prop_assert_eq!(spans.iter().map(|span| span.end - span.start).sum::<f64>(), units);
        }
    }

    #[test]
    fn a_plan_that_lost_or_repeats_an_action_is_refused((schedule, p, m) in plan(), pick in any::<prop::sample::Index>()) {
        let plan = schedule.plan(p, m).unwrap();
        let rank = pick.index(p);
        let at = pick.index(plan.actions[rank].len());
        let mut lost = plan.clone();
        let action = lost.actions[rank].remove(at);
        prop_assert!(lost.check().is_err(), "{action} on rank {rank} was not missed");
        let mut twice = plan;
        twice.actions[rank].push(action);
        prop_assert_eq!(twice.check().unwrap_err(), PlanError::Twice { rank, action });
    }

    #[test]
    fn cuts_are_as_good_as_any(costs in prop::collection::vec(0.0..10.0f64, 1..9), pick in any::<prop::sample::Index>()) {
        let stages = 1 + pick.index(costs.len());
        let ranges = cut(&costs, stages).unwrap();
        prop_assert_eq!(ranges.len(), stages);
        prop_assert!(ranges.iter().all(|range| !range.is_empty()));
        prop_assert!(ranges.iter().cloned().flatten().eq(0..costs.len()));
        let dearest = |bounds: &[usize]| {
            bounds.windows(2).map(|pair| costs[pair[0]..pair[1]].iter().rev().sum::<f64>()).fold(0.0, f64::max)
        };
        let mut ours: Vec<usize> = ranges.iter().map(|range| range.start).collect();
        ours.push(costs.len());
        // All ways to choose where the stages begin.
        let best = (0u32..1 << (costs.len() - 1))
            .filter(|choice| choice.count_ones() as usize == stages - 1)
            .map(|choice| {
                let inner = (1..costs.len()).filter(|i| choice >> (i - 1) & 1 == 1);
                dearest(&std::iter::once(0).chain(inner).chain([costs.len()]).collect::<Vec<_>>())
            })
            .fold(f64::INFINITY, f64::min);
        prop_assert_eq!(dearest(&ours), best);
    }
}

/// Idle time of the busiest case: the step's length less the work of a rank, with uniform costs.
fn bubble(schedule: Schedule, p: usize, m: usize) -> f64 {
    let plan = schedule.plan(p, m).unwrap();
    plan.simulate(&Costs::uniform(plan.stages())).unwrap().makespan() - (3 * m * schedule.stages_per_rank()) as f64
}

#[test]
fn bubbles_are_those_of_the_papers() {
    for p in 1..=8 {
        for m in [2 * p, 3 * p, 5 * p] {
            let ends = (p - 1) as f64;
            // F + B + W = 3 of each of the p - 1 ranks.
            assert_eq!(bubble(Schedule::AllForwardAllBackward, p, m), 3.0 * ends);
            assert_eq!(bubble(Schedule::OneForwardOneBackward, p, m), 3.0 * ends);
            // The same number of units, each of which is v times shorter.
            for v in 1..=4 {
                assert_eq!(bubble(Schedule::Interleaved { stages_per_rank: v }, p, m), 3.0 * ends);
            }
            // (p - 1)(F + B - W).
            assert_eq!(bubble(Schedule::ZeroBubbleH1, p, m), ends, "ZB-H1 {p} {m}");
            // Only what the last rank waits for the first micro-batch, in units of half a rank's.
            assert_eq!(bubble(Schedule::ZeroBubbleV, p, m), ends, "ZB-V {p} {m}");
        }
    }
}

#[test]
fn memory_is_that_of_the_papers() {
    let peak = |schedule: Schedule| schedule.plan(4, 12).unwrap().check().unwrap().peak;
    assert_eq!(peak(Schedule::AllForwardAllBackward), [12; 4]);
    assert_eq!(peak(Schedule::OneForwardOneBackward), [4, 3, 2, 1]);
    assert_eq!(peak(Schedule::Interleaved { stages_per_rank: 2 }), [11, 9, 7, 5]);
    assert_eq!(peak(Schedule::ZeroBubbleH1), [4; 4]);
    // Of stages of half the size.
    assert_eq!(peak(Schedule::ZeroBubbleV), [8; 4]);
}

#[test]
fn one_forward_one_backward_by_hand() {
    let plan = Schedule::OneForwardOneBackward.plan(2, 2).unwrap();
    let compute = |work, stage, micro_batch| Action::Compute { work, stage, micro_batch };
    let send = |payload, stage, micro_batch, to| Action::Send { payload, stage, micro_batch, to };
    let recv = |payload, stage, micro_batch, from| Action::Recv { payload, stage, micro_batch, from };
    let (f, b) = (Work::Forward, Work::Backward);
    let (a, g) = (Payload::Activation, Payload::Gradient);
    let first = [
        compute(f, 0, 0),
        send(a, 0, 0, 1),
        compute(f, 0, 1),
        send(a, 0, 1, 1),
        recv(g, 1, 0, 1),
        compute(b, 0, 0),
        recv(g, 1, 1, 1),
        compute(b, 0, 1),
    ];
    let second = [
        recv(a, 0, 0, 0),
        compute(f, 1, 0),
        compute(b, 1, 0),
        send(g, 1, 0, 0),
        recv(a, 0, 1, 0),
        compute(f, 1, 1),
        compute(b, 1, 1),
        send(g, 1, 1, 0),
    ];
    assert_eq!(plan.actions, [first, second]);
}

#[test]
fn broken_plans_are_told_what_is_wrong() {
    let good = || Schedule::OneForwardOneBackward.plan(2, 3).unwrap();
    let error = |change: fn(&mut Plan)| {
        let mut plan = good();
        change(&mut plan);
        plan.check().unwrap_err()
    };
    // Each rank waits for what the other sends later.
    let deadlock = error(|plan| {
        let recv = plan.actions[0].iter().position(|action| matches!(action, Action::Recv { .. })).unwrap();
        let recv = plan.actions[0].remove(recv);
        plan.actions[0].insert(0, recv);
    });
    let PlanError::Deadlock { blocked } = &deadlock else { panic!("{deadlock}") };
    assert_eq!(blocked.len(), 2);
    assert!(
        deadlock.to_string().contains("rank 0 waits in receive gradient of stage 1, micro-batch 0 from rank 1"),
        "{deadlock}"
    );

    assert!(matches!(error(|plan| plan.memory_bound[0] = 1), PlanError::Memory { rank: 0, peak: 2, bound: 1 }));
    assert!(matches!(error(|plan| plan.placement.swap(0, 1)), PlanError::Misplaced { rank: 0, .. }));
    assert!(matches!(error(|plan| plan.micro_batches = 4), PlanError::Missing { .. }));
    // All of rank 1 in the reverse order of micro-batches: it would end, but with other bits.
    let order = error(|plan| {
        for (rank, list) in plan.actions.iter_mut().enumerate() {
            *list = Schedule::AllForwardAllBackward.plan(2, 3).unwrap().actions.swap_remove(rank);
            for action in list.iter_mut() {
                let (Action::Compute { micro_batch, .. }
                | Action::Send { micro_batch, .. }
                | Action::Recv { micro_batch, .. }) = action;
                *micro_batch = 2 - *micro_batch;
            }
        }
        plan.memory_bound.fill(3);
    });
    assert!(matches!(order, PlanError::Order { .. }), "{order}");
}

#[test]
fn sizes_without_a_schedule_are_refused() {
    let interleaved = Schedule::Interleaved { stages_per_rank: 2 };
    let error = interleaved.plan(4, 6).unwrap_err();
    assert_eq!(error, ScheduleError::Groups { schedule: interleaved, ranks: 4, micro_batches: 6, next: 8 });
    assert!(matches!(Schedule::ZeroBubbleV.plan(0, 6), Err(ScheduleError::Zero { what: "ranks", .. })));
    assert!(matches!(Schedule::ZeroBubbleV.plan(2, 0), Err(ScheduleError::Zero { what: "micro-batches", .. })));
    assert!(matches!(Schedule::Interleaved { stages_per_rank: 0 }.plan(2, 2), Err(ScheduleError::Zero { .. })));
    assert!(cut(&[1.0; 3], 4).is_err() && cut(&[1.0; 3], 0).is_err() && cut(&[1.0, f64::NAN], 1).is_err());
}

#[test]
fn stages_are_cut_by_cost() {
    // A head that costs as much as four blocks.
    assert_eq!(cut(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0], 3).unwrap(), [0..4, 4..8, 8..9]);
}

#[test]
fn pictures_have_a_box_for_each_thing_computed() {
    let plan = Schedule::ZeroBubbleV.plan(2, 4).unwrap();
    let svg = plan.simulate(&Costs::uniform(4)).unwrap().svg("ZB-V <1>", 400.0);
    assert_eq!(svg.matches("<rect ").count(), 1 + 3 * 4 * 4);
    assert!(svg.contains("ZB-V &lt;1>") && svg.ends_with("</svg>\n"));
}
