//! What the loader promises, on streams in which every token is another number.
#![allow(clippy::unwrap_used, missing_docs)]

use firebox_data::{Batch, DataError, IGNORE_INDEX, Loader, LoaderConfig, TokenStream, ValBatches};
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;

/// Documents of the given lengths, tokens numbered through from `first`.
fn stream(lengths: &[usize], first: u32) -> (Arc<TokenStream>, HashSet<i32>) {
    let mut next = first;
    let mut starts = HashSet::new();
    let documents: Vec<Vec<u32>> = lengths
        .iter()
        .map(|&n| {
            starts.insert(next as i32);
            next += n as u32;
            (next - n as u32..next).collect()
        })
        .collect();
    (Arc::new(TokenStream::from_documents(&documents)), starts)
}

/// Inputs, targets, segments and positions of a row.
type Row<'a> = (&'a [i32], &'a [i32], &'a [i32], &'a [i32]);

fn rows(batch: &Batch) -> Vec<Row<'_>> {
    let c = batch.context;
    let cut = |v: &'_ [i32], r: usize| -> std::ops::Range<usize> {
        assert_eq!(v.len(), batch.rows * c);
        r * c..(r + 1) * c
    };
    (0..batch.rows)
        .map(|r| {
            let range = cut(&batch.inputs, r);
            cut(&batch.targets, r);
            cut(&batch.segments, r);
            cut(&batch.positions, r);
            (
                &batch.inputs[range.clone()],
                &batch.targets[range.clone()],
                &batch.segments[range.clone()],
                &batch.positions[range],
            )
        })
        .collect()
}

/// Checks every row against the definition, and returns the targets.
#[track_caller]
fn check_rows(batch: &Batch, starts: &HashSet<i32>, isolate: bool) -> Vec<i32> {
    let mut seen = Vec::new();
    for (inputs, targets, segments, positions) in rows(batch) {
        let count = targets.iter().take_while(|&&t| t != IGNORE_INDEX).count();
        assert!(count > 0, "a row without a target");
        assert!(targets[count..].iter().all(|&t| t == IGNORE_INDEX), "padding inside a row");
        let (mut segment, mut position) = (0, 0);
        for i in 0..inputs.len() {
            let opens = if i < count { i > 0 && starts.contains(&inputs[i]) } else { i == count };
            if isolate && opens {
                segment += 1;
                position = 0;
            }
            assert_eq!((segments[i], positions[i]), (segment, position), "at {i} of {inputs:?}");
            position += 1;
            if i < count {
                assert_eq!(targets[i], inputs[i] + 1, "the target is not the next token");
                assert!(i == 0 || inputs[i] == inputs[i - 1] + 1, "the row is not a window");
            }
        }
        seen.extend(&targets[..count]);
    }
    seen
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1usize..8, 1usize..60], 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_token_is_a_target_once_per_epoch(lengths in lengths(), context in 1usize..24, seed: u64, isolate: bool) {
        let (tokens, starts) = stream(&lengths, 0);
        let n = tokens.len();
        prop_assume!(n > context as u64);
        let loader = Loader::new(vec![(tokens, 1.0)], LoaderConfig { context, seed, isolate_documents: isolate }).unwrap();
        let epoch = loader.samples_per_epoch();
        prop_assert_eq!(loader.targets_per_epoch(), n - 1);
        for e in 0..3 {
            let mut seen = check_rows(&loader.batch(e * epoch, epoch as usize), &starts, isolate);
            seen.sort_unstable();
            prop_assert_eq!(seen, (1..n as i32).collect::<Vec<_>>(), "epoch {}", e);
        }
    }

    #[test]
    fn ranks_and_resuming_change_nothing(
        lengths in lengths(), context in 1usize..24, seed: u64, first in 0u64..1 << 40, ranks in 1usize..5, per_rank in 1usize..4,
        weight in 0.1f64..10.0,
    ) {
        let (a, _) = stream(&lengths, 0);
        let (b, _) = stream(&[context + 1, 30], 1_000_000);
        prop_assume!(a.len() > context as u64);
        let config = LoaderConfig { context, seed, isolate_documents: true };
        let loader = || Loader::new(vec![(a.clone(), weight), (b.clone(), 1.0)], config).unwrap();
        let whole = loader().batch(first, ranks * per_rank);
        let (mut inputs, mut targets, mut segments, mut positions) = (vec![], vec![], vec![], vec![]);
        for rank in 0..ranks {
            // A loader of its own for each: nothing but the numbers is shared.
            let part = loader().batch(first + (rank * per_rank) as u64, per_rank);
            inputs.extend(part.inputs);
            targets.extend(part.targets);
            segments.extend(part.segments);
            positions.extend(part.positions);
        }
        prop_assert_eq!(whole, Batch { rows: ranks * per_rank, context, inputs, targets, segments, positions });
    }

    #[test]
    fn validation_passes_over_every_token_in_order(lengths in lengths(), context in 1usize..24, at_once in 1usize..5, isolate: bool) {
        let (tokens, starts) = stream(&lengths, 0);
        let n = tokens.len();
        prop_assume!(n > 1);
        let batches = ValBatches::new(tokens, context, at_once, isolate);
        prop_assert_eq!(batches.targets(), n - 1);
        let bytes: Vec<u32> = (0..n as u32).collect();
        let (mut seen, mut sum) = (Vec::new(), 0);
        for batch in batches {
            prop_assert!(batch.rows <= at_once);
            sum += batch.target_bytes(&bytes);
            seen.extend(check_rows(&batch, &starts, isolate));
        }
        prop_assert_eq!(sum, (1..n).sum::<u64>());
        prop_assert_eq!(seen, (1..n as i32).collect::<Vec<_>>());
    }
}

#[test]
fn sources_have_their_share_and_their_epochs() {
    let context = 8;
    let (a, _) = stream(&[500, 400], 0);
    let (b, _) = stream(&[333], 10_000);
    let (c, _) = stream(&[50], 20_000);
    let config = LoaderConfig { context, seed: 3, isolate_documents: false };
    let loader = Loader::new(vec![(a, 6.0), (b, 3.0), (c, 1.0)], config).unwrap();
    let batch = loader.batch(0, 2 * 4096);
    let source = |row: &[i32]| (row[0] / 10_000) as usize;
    let mut rows_of = [Vec::new(), Vec::new(), Vec::new()];
    for (inputs, targets, ..) in rows(&batch) {
        rows_of[source(inputs)].push(targets.to_vec());
    }
    // 0.6, 0.3 and 0.1 of 4,096 are 2,457.6, 1,228.8 and 409.6: by largest remainders 2,457, 1,229 and 410.
    assert_eq!(rows_of.each_ref().map(Vec::len), [2 * 2457, 2 * 1229, 2 * 410]);
    for (rows, targets) in rows_of.iter().zip([899, 332, 49]) {
        let per_epoch = Loader::new(vec![(Arc::new(TokenStream::from_documents(&[vec![0; targets + 1]])), 1.0)], config)
            .unwrap()
            .samples_per_epoch() as usize;
        // Blocks permute the places of a source's samples, so that only whole blocks hold whole ranges of samples; the
        // targets of all of them are then seen equally often but for one epoch that is under way.
        let mut counts = std::collections::HashMap::new();
        rows.iter().flatten().filter(|&&t| t != IGNORE_INDEX).for_each(|t| *counts.entry(*t).or_insert(0usize) += 1);
        assert_eq!(counts.len(), targets);
        let full = rows.len() / per_epoch;
        assert!(counts.values().all(|&n| n == full || n == full + 1), "{full} epochs: {counts:?}");
    }
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let (tokens, _) = stream(&[5000], 0);
    let config = |seed| LoaderConfig { context: 10, seed, isolate_documents: false };
    let loader = |seed| Loader::new(vec![(tokens.clone(), 1.0)], config(seed)).unwrap();
    let epoch = loader(1).samples_per_epoch();
    let firsts =
        |seed, e: u64| -> Vec<i32> { rows(&loader(seed).batch(e * epoch, 200)).iter().map(|r| r.0[0]).collect() };
    assert_eq!(firsts(1, 0), firsts(1, 0));
    assert_ne!(firsts(1, 0), firsts(1, 1));
    assert_ne!(firsts(1, 0), firsts(2, 0));
    let offsets: HashSet<i32> = (0..20).map(|e| firsts(1, e).into_iter().find(|f| *f > 0).unwrap() % 10).collect();
    assert!(offsets.len() > 2, "rows begin at the same places in every epoch: {offsets:?}");
}

#[test]
fn what_cannot_work_is_refused() {
    let (tokens, _) = stream(&[10], 0);
    let new = |context, weight| {
        Loader::new(vec![(tokens.clone(), weight)], LoaderConfig { context, seed: 0, isolate_documents: false })
    };
    assert!(new(9, 1.0).is_ok());
    let error = new(10, 1.0).unwrap_err();
    assert!(matches!(error, DataError::TooShort { tokens: 10, context: 10, .. }));
    assert!(error.to_string().contains("needs 11"), "{error}");
    assert!(new(0, 1.0).is_err());
    assert!(new(4, -1.0).is_err());
}
