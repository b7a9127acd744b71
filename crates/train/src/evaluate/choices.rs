//! Questions with several answers of which one is right, chosen by likelihood, as lm-evaluation-harness asks them.
//!
//! The texts that a model sees, how they are divided into tokens, and both scores are those of the harness (<https://github.com/EleutherAI/lm-evaluation-harness>, 0.4.13: its tasks `hellaswag`,
//! `arc_easy` and `arc_challenge`, and any other of output type `multiple_choice`), so that figures can be compared.

use firebox_data::{DataError, Record};
use serde::Serialize;
use serde_json::{Map, Value};

use super::likelihood::{Scorer, is_space};
use crate::TrainError;

/// How rows write down a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// HellaSwag's (Zellers et al., arXiv:1905.07830): `ctx_a`, `ctx_b` (or `ctx`), `activity_label`, `endings`, `label`.
    Hellaswag,
    /// ARC's (Clark et al., arXiv:1803.05457): `question`, `choices` of texts and labels, `answerKey`.
    Arc,
    /// Any other: `context` or `query`, a list of `choices`, and `gold`, `answer` or `label`, which is a number from 0 on, or the right choice itself.
    Choices,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What comes before the answer.
    pub context: String,
    /// The answers to choose from. A space stands between context and answer.
    pub choices: Vec<String>,
    /// The number of the right one.
    pub gold: usize,
}

impl Form {
    /// The form of a row with these fields, if it has one.
    pub fn of(fields: &Map<String, Value>) -> Option<Self> {
        let has = |name: &str| fields.contains_key(name);
        if has("endings") {
            Some(Self::Hellaswag)
        } else if has("answerKey") {
            Some(Self::Arc)
        } else if has("choices") && (has("context") || has("query")) {
            Some(Self::Choices)
        } else {
            None
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hellaswag => "hellaswag",
            Self::Arc => "arc",
            Self::Choices => "choices",
        }
    }

    /// The question of a row.
    ///
    /// # Errors
    /// [`DataError::BadRow`]: a field that is missing or of another kind, fewer than two choices, an empty one, a label that names none.
    pub fn question(self, record: &Record) -> Result<Question, DataError> {
        let question = match self {
            Self::Hellaswag => hellaswag(record)?,
            Self::Arc => arc(record)?,
            Self::Choices => plain(record)?,
        };
        match question.choices.len() {
            0 | 1 => Err(record.bad(format!("expected two choices or more, got {}", question.choices.len()))),
            // Their likelihood is divided by their length.
            _ if question.choices.iter().any(String::is_empty) => {
                Err(record.bad("expected choices with text, got an empty one"))
            }
            _ => Ok(question),
        }
    }
}

fn hellaswag(record: &Record) -> Result<Question, DataError> {
    let activity = record.text("activity_label")?;
    let context = if record.fields.contains_key("ctx_a") {
        format!("{} {}", record.text("ctx_a")?, capitalized(record.text("ctx_b")?))
    } else {
        record.text("ctx")?.to_owned()
    };
    let choices: Vec<String> = texts(record, "endings")?.iter().map(|ending| cleaned(ending)).collect();
    let gold = number(record, "label", &choices)?;
    Ok(Question { context: cleaned(&format!("{activity}: {context}")), choices, gold })
}

/// Without what WikiHow's pages left in HellaSwag's texts.
fn cleaned(text: &str) -> String {
    let text = text.trim_matches(is_space).replace(" [title]", ". ");
    // What is in brackets on one line.
    let (mut out, mut rest) = (String::with_capacity(text.len()), text.as_str());
    while let Some(open) = rest.find('[') {
        let (before, from) = rest.split_at(open);
        out.push_str(before);
        match from.find([']', '\n']) {
            Some(end) if from[end..].starts_with(']') => rest = &from[end + 1..],
            _ => {
                out.push('[');
                rest = &from[1..];
            }
        }
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

/// The first letter large and all others small, as Python's `capitalize` makes them.
fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return String::new() };
    let mut large = first.to_uppercase();
    let head: String = large.next().into_iter().chain(large.flat_map(char::to_lowercase)).collect();
    head + &chars.as_str().to_lowercase()
}

fn arc(record: &Record) -> Result<Question, DataError> {
    let question = record.text("question")?;
    let (choices, labels) = match record.field("choices")? {
        Value::Object(lists) => {
            let list = |name: &str| lists.get(name).and_then(strings);
            match (list("text"), list("label")) {
                (Some(texts), Some(labels)) if texts.len() == labels.len() => (texts, labels),
                _ => return Err(record.bad("`choices`: expected as many `label`s as `text`s, both lists of texts")),
            }
        }
        _ => return Err(record.bad("`choices`: expected an object with the lists `text` and `label`")),
    };
    let key = record.text("answerKey")?;
    let Some(gold) = labels.iter().position(|label| label == key) else {
        return Err(record.bad(format!("`answerKey`: expected one of {}, got {key:?}", labels.join(", "))));
    };
    Ok(Question { context: format!("Question: {question}\nAnswer:"), choices, gold })
}

fn plain(record: &Record) -> Result<Question, DataError> {
    let has = |name: &&str| record.fields.contains_key(*name);
    let context = ["context", "query"].into_iter().find(has).unwrap_or("context");
    let label = ["gold", "answer", "label"].into_iter().find(has).unwrap_or("gold");
    let choices = texts(record, "choices")?;
    let gold = number(record, label, &choices)?;
    Ok(Question { context: record.text(context)?.to_owned(), choices, gold })
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|text| Some(text.as_str()?.to_owned())).collect()
}

fn texts(record: &Record, name: &str) -> Result<Vec<String>, DataError> {
    strings(record.field(name)?).ok_or_else(|| record.bad(format!("`{name}`: expected a list of texts")))
}

/// The choice that a label names: by its number, as a number or as text, or by itself.
fn number(record: &Record, name: &str, choices: &[String]) -> Result<usize, DataError> {
    let label = record.field(name)?;
    let named = label.as_str().and_then(|text| choices.iter().position(|choice| choice == text));
    let number = named.or_else(|| match label {
        Value::String(text) => text.trim().parse().ok(),
        other => usize::try_from(other.as_u64()?).ok(),
    });
    number.filter(|&number| number < choices.len()).ok_or_else(|| {
        record.bad(format!("`{name}`: expected a choice, 0 to {}, got {label}", choices.len().saturating_sub(1)))
    })
}

/// Puts the first `shots` of `examples` before each question, each with its right answer, and never the question itself: as the harness's sampler `first_n` does.
///
/// # Errors
/// [`TrainError::Input`]: fewer examples.
pub fn with_shots(questions: &[Question], examples: &[Question], shots: usize) -> Result<Vec<Question>, TrainError> {
    let one = |question: &Question| {
        let others: Vec<&Question> = examples.iter().filter(|example| *example != question).take(shots).collect();
        if others.len() < shots {
            let expected = format!("at most the {} examples that there are", others.len());
            return Err(TrainError::Input { what: "shots", expected, got: shots.to_string() });
        }
        let example = |example: &&Question| format!("{} {}\n\n", example.context, example.choices[example.gold]);
        let before: String = others.iter().map(example).collect();
        Ok(Question { context: before + &question.context, ..question.clone() })
    };
    questions.iter().map(one).collect()
}

/// What a model thinks of the choices of each question, in nats: the logarithms of the probabilities of all tokens of a choice, added up.
///
/// # Errors
/// [`TrainError::Input`]: a choice without tokens, or with more than the model's context.
pub fn log_likelihoods(scorer: &Scorer, questions: &[Question]) -> Result<Vec<Vec<f64>>, TrainError> {
    let pairs: Vec<(&str, String)> = questions
        .iter()
        .flat_map(|question| question.choices.iter().map(|choice| (question.context.as_str(), format!(" {choice}"))))
        .collect();
    let found = scorer.log_likelihoods(&pairs)?;
    let mut found = found.into_iter();
    Ok(questions.iter().map(|question| found.by_ref().take(question.choices.len()).collect()).collect())
}

/// How often a model chose right.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    /// Questions.
    pub rows: usize,
    /// Share of the questions whose right choice is the most likely one.
    pub acc: f64,
    /// Its standard error; none of a single question.
    pub acc_stderr: Option<f64>,
    /// The same with the logarithm of each choice's probability divided by its characters.
    pub acc_norm: f64,
    /// Its standard error.
    pub acc_norm_stderr: Option<f64>,
}

/// The choices that a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The most likely one; the first of several.
    pub likely: usize,
    /// The most likely one per character.
    pub likely_norm: usize,
}

impl Choice {
    /// What these log-likelihoods say.
    pub fn of(question: &Question, log_likelihoods: &[f64]) -> Self {
        let per_char = |(ll, choice): (&f64, &String)| ll / choice.chars().count().max(1) as f64;
        let normalized: Vec<f64> = log_likelihoods.iter().zip(&question.choices).map(per_char).collect();
        Self { likely: largest(log_likelihoods), likely_norm: largest(&normalized) }
    }
}

/// The place of the largest value; the first of several.
fn largest(values: &[f64]) -> usize {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best }).unwrap_or(0)
}

/// The scores of what [`log_likelihoods`] found.
pub fn score(questions: &[Question], log_likelihoods: &[Vec<f64>]) -> Scores {
    let choices: Vec<(usize, Choice)> =
        questions.iter().zip(log_likelihoods).map(|(question, ll)| (question.gold, Choice::of(question, ll))).collect();
    let (acc, acc_stderr) = share(choices.iter().map(|(gold, choice)| *gold == choice.likely));
    let (acc_norm, acc_norm_stderr) = share(choices.iter().map(|(gold, choice)| *gold == choice.likely_norm));
    Scores { rows: questions.len(), acc, acc_stderr, acc_norm, acc_norm_stderr }
}

/// The share of what is true, and its standard error: the deviation of the sample over the root of its size.
fn share(hits: impl ExactSizeIterator<Item = bool>) -> (f64, Option<f64>) {
    let n = hits.len() as f64;
    let mean = hits.filter(|hit| *hit).count() as f64 / n.max(1.0);
    (mean, (n > 1.0).then(|| (mean * (1.0 - mean) / (n - 1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn wikihow_leaves_nothing() {
        assert_eq!(cleaned(" How to [title] Bake [step] bread.  Now \u{1c}"), "How to. Bake bread. Now");
        assert_eq!(cleaned("a [b\nc] [d] e [f"), "a [b\nc] e [f");
        assert_eq!(cleaned("a ] b [] c"), "a ] b c");
        assert_eq!(cleaned("[[a] b]"), " b]");
        assert_eq!(cleaned("x [header]"), "x ");
    }

    #[test]
    fn letters_are_large_and_small_as_in_python() {
        for (text, want) in [("aBC dE", "Abc de"), ("", ""), ("ßX", "Ssx"), ("ÉCOLE", "École"), ("1A", "1a")] {
            assert_eq!(capitalized(text), want);
        }
    }

    #[test]
    fn a_share_has_its_error() {
        let (mean, error) = share([true, false, true, true].into_iter());
        // statistics.stdev([1, 0, 1, 1]) / 2
        assert!(mean == 0.75 && (error.unwrap() - 0.25).abs() < 1e-12);
        assert_eq!(share([true].into_iter()), (1.0, None));
    }

    #[test]
    fn the_first_examples_are_put_before_the_others() {
        let question =
            |n: usize| Question { context: format!("q{n}"), choices: vec!["a".into(), "b".into()], gold: n % 2 };
        let all: Vec<Question> = (0..3).map(question).collect();
        let shown = with_shots(&all, &all, 2).unwrap();
        assert_eq!(shown[0].context, "q1 b\n\nq2 a\n\nq0");
        assert_eq!(shown[2].context, "q0 a\n\nq1 b\n\nq2");
        assert_eq!(with_shots(&all, &[], 0).unwrap(), all);
        assert!(with_shots(&all, &all, 3).unwrap_err().to_string().contains("the 2 examples"));
    }
}
