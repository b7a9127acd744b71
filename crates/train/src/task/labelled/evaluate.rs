//! What a model says of held-out rows, and what that is worth.

use burn::tensor::Tensor;
use firebox_models::transformer::Transformer;

use super::{Inner, Kind, Row, Target};
use crate::metrics::{
    Confusion, EntityCounts, are_entities, mean_reciprocal_rank, mean_squared_error, pearson, ranks_of, recall_at,
    spearman,
};
use crate::model_io::to_host;

/// Classes of which each has its own line of metrics.
const FEW: usize = 8;

type Metrics = Vec<(String, f64)>;

fn named(metrics: &[(&str, f64)]) -> Metrics {
    metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

/// The number of the largest value of each `n`.
pub(in crate::task) fn largest(logits: &[f32], n: usize) -> Vec<usize> {
    let at = |row: &[f32]| (0..n).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    logits.chunks_exact(n).map(at).collect()
}

impl Inner {
    /// Over `limit` batches of held-out rows.
    pub fn metrics(&self, model: &Transformer, limit: usize) -> Metrics {
        let batches = self.held_out_rows(self.micro_rows).take(limit);
        match &self.kind {
            Kind::Classes(names) => self.of_classes(model, names.all(), batches),
            Kind::TokenClasses(names) => self.of_token_classes(model, names.all(), batches),
            Kind::Values(n) => self.of_values(model, *n, batches),
            Kind::Embedding => self.of_embeddings(model, batches),
        }
    }

    fn of_classes<'a>(
        &self,
        model: &Transformer,
        names: &[String],
        batches: impl Iterator<Item = Vec<&'a Row>>,
    ) -> Metrics {
        let mut all = Confusion::new(names.len());
        for rows in batches {
            let logits = to_host(model.row_logits(&self.batch(&rows, rows.len())));
            for (row, said) in rows.iter().zip(largest(&logits, names.len())) {
                if let Target::Class(class) = row.target {
                    all.add(class as usize, said);
                }
            }
        }
        let mut metrics = named(&[
            ("accuracy", all.accuracy()),
            ("macro_f1", all.macro_f1()),
            ("micro_f1", all.micro_f1(None)),
            ("matthews", all.matthews()),
        ]);
        metrics.extend(f1_of_each(&all, names));
        metrics
    }

    fn of_token_classes<'a>(
        &self,
        model: &Transformer,
        names: &[String],
        batches: impl Iterator<Item = Vec<&'a Row>>,
    ) -> Metrics {
        let (mut all, mut entities) = (Confusion::new(names.len()), EntityCounts::default());
        for rows in batches {
            let batch = self.batch(&rows, 1);
            let (said, tokens) = (largest(&to_host(model.token_logits(&batch)), names.len()), batch.sequence.tokens());
            for (row, said) in rows.iter().zip(said.chunks_exact(tokens)) {
                let Target::Classes(classes) = &row.target else { continue };
                let pairs = classes.iter().zip(said).filter(|(class, _)| **class >= 0);
                let pairs: Vec<(usize, usize)> = pairs.map(|(&class, &said)| (class as usize, said)).collect();
                pairs.iter().for_each(|&(class, said)| all.add(class, said));
                let tags = |at: fn(&(usize, usize)) -> usize| {
                    pairs.iter().map(|pair| names[at(pair)].as_str()).collect::<Vec<_>>()
                };
                entities.add(&tags(|pair| pair.0), &tags(|pair| pair.1));
            }
        }
        let outside = names.iter().position(|name| name == super::names::OUTSIDE);
        let mut metrics = named(&[
            ("accuracy", all.accuracy()),
            ("macro_f1", all.macro_f1()),
            ("micro_f1", all.micro_f1(outside)),
            ("matthews", all.matthews()),
        ]);
        if are_entities(names) {
            let [precision, recall, f1] = entities.scores();
            metrics.extend(named(&[("entity_precision", precision), ("entity_recall", recall), ("entity_f1", f1)]));
        }
        metrics.extend(f1_of_each(&all, names));
        metrics
    }

    fn of_values<'a>(&self, model: &Transformer, n: usize, batches: impl Iterator<Item = Vec<&'a Row>>) -> Metrics {
        let mut columns = vec![(vec![], vec![]); n];
        for rows in batches {
            let said = to_host(model.row_logits(&self.batch(&rows, rows.len())));
            for (row, said) in rows.iter().zip(said.chunks_exact(n)) {
                let Target::Values(values) = &row.target else { continue };
                for ((truth, said), (of_truth, of_said)) in values.iter().zip(said).zip(&mut columns) {
                    if !truth.is_nan() {
                        of_truth.push(f64::from(*truth));
                        of_said.push(f64::from(*said));
                    }
                }
            }
        }
        let mean =
            |of: fn(&[f64], &[f64]) -> f64| columns.iter().map(|(truth, said)| of(truth, said)).sum::<f64>() / n as f64;
        named(&[("mse", mean(mean_squared_error)), ("pearson", mean(pearson)), ("spearman", mean(spearman))])
    }

    /// Each anchor among all held-out candidates.
    fn of_embeddings<'a>(&self, model: &Transformer, batches: impl Iterator<Item = Vec<&'a Row>>) -> Metrics {
        let (mut anchors, mut candidates): (Vec<Tensor<2>>, Vec<Tensor<2>>) = (vec![], vec![]);
        let mut texts = 2;
        for rows in batches {
            let vectors = model.embed(&self.batch(&rows, rows.len()));
            let [_, d] = vectors.dims();
            texts = rows[0].texts.len();
            let vectors = vectors.reshape([rows.len(), texts, d]);
            anchors.push(vectors.clone().narrow(1, 0, 1).reshape([rows.len(), d]));
            candidates.push(vectors.narrow(1, 1, texts - 1).reshape([rows.len() * (texts - 1), d]));
        }
        if anchors.is_empty() {
            return vec![];
        }
        let candidates = Tensor::cat(candidates, 0).transpose();
        let mut ranks = vec![];
        for anchors in anchors {
            let [n, _] = anchors.dims();
            let own: Vec<usize> = (ranks.len()..ranks.len() + n).map(|i| i * (texts - 1)).collect();
            ranks.extend(ranks_of(&to_host(anchors.matmul(candidates.clone())), &own));
        }
        named(&[
            ("recall_at_1", recall_at(&ranks, 1)),
            ("recall_at_5", recall_at(&ranks, 5)),
            ("mrr", mean_reciprocal_rank(&ranks)),
        ])
    }
}

fn f1_of_each(all: &Confusion, names: &[String]) -> Metrics {
    let few = names.iter().enumerate().filter(|_| names.len() <= FEW);
    few.map(|(i, name)| (format!("f1 {name}"), all.class(i).f1)).collect()
}
