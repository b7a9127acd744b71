//! What predictions are worth: of classes, of numbers, of rankings, of spans of tokens. As scikit-learn, SciPy and seqeval count.

use std::collections::HashSet;

/// How often which class was said of which: rows are true classes, columns those that were said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    n: usize,
    counts: Vec<u64>,
}

/// What is known of one class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScores {
    /// Of those of which it was said, the share that has it; 0 where it was never said.
    pub precision: f64,
    /// Of those that have it, the share of which it was said; 0 where none has.
    pub recall: f64,
    /// The harmonic mean of the two; 0 where both are.
    pub f1: f64,
    /// How many have it.
    pub support: u64,
}

impl Confusion {
    /// Of `n` classes, nothing yet.
    pub fn new(n: usize) -> Self {
        Self { n, counts: vec![0; n * n] }
    }

    /// Of true classes and those that were said.
    ///
    /// # Panics
    /// If there are not as many of both, or one is not below `n`.
    pub fn of(n: usize, truth: &[usize], said: &[usize]) -> Self {
        assert_eq!(truth.len(), said.len(), "confusion: as many classes as predictions");
        let mut all = Self::new(n);
        truth.iter().zip(said).for_each(|(&truth, &said)| all.add(truth, said));
        all
    }

    /// One more.
    ///
    /// # Panics
    /// If a class is not below `n`.
    pub fn add(&mut self, truth: usize, said: usize) {
        assert!(truth < self.n && said < self.n, "confusion: classes {truth} and {said} of {}", self.n);
        self.counts[truth * self.n + said] += 1;
    }

    /// How often `said` was said of `truth`.
    pub fn count(&self, truth: usize, said: usize) -> u64 {
        self.counts[truth * self.n + said]
    }

    /// How many there are.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn truths(&self, class: usize) -> u64 {
        (0..self.n).map(|said| self.count(class, said)).sum()
    }

    fn predictions(&self, class: usize) -> u64 {
        (0..self.n).map(|truth| self.count(truth, class)).sum()
    }

    fn right(&self) -> u64 {
        (0..self.n).map(|class| self.count(class, class)).sum()
    }

    /// The share that is right.
    pub fn accuracy(&self) -> f64 {
        ratio(self.right() as f64, self.total() as f64)
    }

    /// Precision, recall and F1 of a class.
    pub fn class(&self, class: usize) -> ClassScores {
        let (right, support) = (self.count(class, class) as f64, self.truths(class));
        let [precision, recall] = [self.predictions(class), support].map(|of| ratio(right, of as f64));
        ClassScores { precision, recall, f1: ratio(2.0 * precision * recall, precision + recall), support }
    }

    /// The mean of the F1 of all classes that are there or were said.
    pub fn macro_f1(&self) -> f64 {
        let seen = |&class: &usize| self.truths(class) + self.predictions(class) > 0;
        let scores: Vec<f64> = (0..self.n).filter(seen).map(|class| self.class(class).f1).collect();
        ratio(scores.iter().sum(), scores.len() as f64)
    }

    /// F1 of all but one class together, such as that of tokens outside every entity. Of all classes it is the accuracy.
    pub fn micro_f1(&self, without: Option<usize>) -> f64 {
        let classes = || (0..self.n).filter(|&class| Some(class) != without);
        let right: u64 = classes().map(|class| self.count(class, class)).sum();
        let all: u64 = classes().map(|class| self.truths(class) + self.predictions(class)).sum();
        ratio(2.0 * right as f64, all as f64)
    }

    /// Matthews' correlation coefficient, of any number of classes (Gorodkin, 2004): 0 where all or none is said of everything.
    pub fn matthews(&self) -> f64 {
        let (total, right) = (self.total() as f64, self.right() as f64);
        let [mut products, mut truths, mut said] = [0.0; 3];
        for class in 0..self.n {
            let (t, p) = (self.truths(class) as f64, self.predictions(class) as f64);
            products += t * p;
            truths += t * t;
            said += p * p;
        }
        let total_squared = total * total;
        ratio(right * total - products, ((total_squared - said) * (total_squared - truths)).sqrt())
    }
}

fn ratio(a: f64, b: f64) -> f64 {
    if b == 0.0 { 0.0 } else { a / b }
}

/// The mean of the squared differences; 0 of nothing.
pub fn mean_squared_error(truth: &[f64], said: &[f64]) -> f64 {
    ratio(truth.iter().zip(said).map(|(t, s)| (t - s) * (t - s)).sum(), truth.len() as f64)
}

/// Pearson's correlation; 0 where one side is constant.
pub fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let [mean_a, mean_b] = [a, b].map(|x| ratio(x.iter().sum(), n));
    let [mut ab, mut aa, mut bb] = [0.0; 3];
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    ratio(ab, (aa * bb).sqrt())
}

/// Spearman's correlation: Pearson's of the ranks, where what is equal has the mean of its ranks.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let [a, b] = [a, b].map(mean_ranks);
    pearson(&a, &b)
}

fn mean_ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equal in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let mean = first as f64 + (equal.len() - 1) as f64 / 2.0;
        equal.iter().for_each(|&i| ranks[i] = mean);
        first += equal.len();
    }
    ranks
}

/// Of each row of scores `[N, M]` the rank (from 0) of the column that belongs to it: how many columns score higher, or as high and stand before it.
///
/// # Panics
/// If there are not M scores for each of the columns that belong.
pub fn ranks_of(scores: &[f32], belongs: &[usize]) -> Vec<usize> {
    let columns = scores.len() / belongs.len().max(1);
    assert_eq!(scores.len(), columns * belongs.len(), "ranks: as many scores in each row");
    let rows = scores.chunks_exact(columns.max(1)).zip(belongs);
    let better = |row: &[f32], at: usize| {
        row.iter().enumerate().filter(|(i, score)| **score > row[at] || **score == row[at] && *i < at).count()
    };
    rows.map(|(row, &at)| better(row, at)).collect()
}

/// The share of ranks (from 0) below `k`.
pub fn recall_at(ranks: &[usize], k: usize) -> f64 {
    ratio(ranks.iter().filter(|&&rank| rank < k).count() as f64, ranks.len() as f64)
}

/// The mean of 1, 1/2, 1/3, ... of ranks 0, 1, 2, ...
pub fn mean_reciprocal_rank(ranks: &[usize]) -> f64 {
    ratio(ranks.iter().map(|&rank| 1.0 / (rank + 1) as f64).sum(), ranks.len() as f64)
}

/// The entities of a row of tags such as `O`, `B-place`, `I-place`: first token, the one behind the last, and the kind. An `I-` after another kind begins one, as in CoNLL's script.
pub fn entities<'a>(tags: &[&'a str]) -> Vec<(usize, usize, &'a str)> {
    let mut found: Vec<(usize, usize, &str)> = vec![];
    let mut open: Option<(usize, &str)> = None;
    for (i, tag) in tags.iter().copied().chain(["O"]).enumerate() {
        let (prefix, kind) = tag.split_once('-').unwrap_or((tag, ""));
        let goes_on = prefix == "I" && open.is_some_and(|(_, opened)| opened == kind);
        if !goes_on {
            if let Some((first, kind)) = open.take() {
                found.push((first, i, kind));
            }
            open = (prefix == "B" || prefix == "I").then_some((i, kind));
        }
    }
    found
}

/// Whether tags are those of entities: `O`, and others that begin with `B-` or `I-`.
pub fn are_entities<S: AsRef<str>>(tags: &[S]) -> bool {
    let prefixed = |tag: &str| tag.starts_with("B-") || tag.starts_with("I-");
    tags.iter().any(|tag| prefixed(tag.as_ref()))
        && tags.iter().all(|tag| tag.as_ref() == "O" || prefixed(tag.as_ref()))
}

/// Precision, recall and F1 of whole entities: one counts where first and last token and kind are right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EntityCounts {
    right: u64,
    said: u64,
    there: u64,
}

impl EntityCounts {
    /// One more row.
    pub fn add(&mut self, truth: &[&str], said: &[&str]) {
        let (truth, said) = (entities(truth), entities(said));
        let truth: HashSet<_> = truth.into_iter().collect();
        self.right += said.iter().filter(|entity| truth.contains(entity)).count() as u64;
        self.said += said.len() as u64;
        self.there += truth.len() as u64;
    }

    /// Precision, recall, F1.
    pub fn scores(&self) -> [f64; 3] {
        let [precision, recall] = [self.said, self.there].map(|of| ratio(self.right as f64, of as f64));
        [precision, recall, ratio(2.0 * precision * recall, precision + recall)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-12, "{got}, expected {want}");
    }

    /// Values of scikit-learn 1.9 (`f1_score`, `matthews_corrcoef`) and SciPy 1.17 (`pearsonr`, `spearmanr`).
    #[test]
    fn classes_and_numbers_are_scikit_learns() {
        let truth = [0, 1, 2, 2, 1, 0, 2, 2, 0, 1];
        let said = [0, 2, 2, 2, 1, 0, 1, 2, 1, 1];
        let all = Confusion::of(4, &truth, &said);
        close(all.accuracy(), 0.7);
        close(all.micro_f1(None), 0.7);
        close(all.macro_f1(), 0.707_142_857_142_857_1);
        close(all.micro_f1(Some(0)), 2.0 * 5.0 / 15.0);
        close(all.matthews(), 0.553_911_709_406_997_3);
        let two = all.class(2);
        assert_eq!((two.precision, two.recall, two.support), (0.75, 0.75, 4));
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 4.0, 7.0]);
        close(mean_squared_error(&a, &b), 7.0 / 5.0);
        close(pearson(&a, &b), 0.892_843_665_666_478_7);
        close(spearman(&a, &b), 0.872_081_599_272_380_9);
        assert_eq!(pearson(&a, &[1.0; 5]), 0.0);
        assert_eq!(Confusion::of(2, &[0, 0], &[0, 0]).matthews(), 0.0);
    }

    #[test]
    fn ranks_count_what_scores_higher() {
        let ranks = ranks_of(&[0.1, 0.9, 0.5, 0.5, 0.5, 0.7], &[0, 1]);
        assert_eq!(ranks, [2, 2]);
        close(mean_reciprocal_rank(&[0, 1, 3]), (1.0 + 0.5 + 0.25) / 3.0);
        close(recall_at(&[0, 1, 3], 1), 1.0 / 3.0);
        assert_eq!(recall_at(&[], 1), 0.0);
    }

    /// What seqeval 1.2 finds in its default mode.
    #[test]
    fn entities_are_seqevals() {
        let truth = ["O", "B-a", "I-a", "O", "I-b", "B-b", "I-a"];
        assert_eq!(entities(&truth), [(1, 3, "a"), (4, 5, "b"), (5, 6, "b"), (6, 7, "a")]);
        let mut counts = EntityCounts::default();
        counts.add(&truth, &["O", "B-a", "O", "O", "B-b", "B-b", "O"]);
        let [precision, recall, f1] = counts.scores();
        close(precision, 2.0 / 3.0);
        close(recall, 0.5);
        close(f1, 4.0 / 7.0);
        assert!(are_entities(&["O", "B-a"]) && !are_entities(&["O", "a"]) && !are_entities(&["O"]));
    }
}
