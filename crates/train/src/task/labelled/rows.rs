//! Records to rows: tokens, and what a model is to say of them.

use std::collections::BTreeSet;

use firebox_data::{DataError, Encoded, IGNORE_INDEX, Record, Tokenizer};
use rayon::prelude::*;
use serde_json::Value;

use super::names::{Names, OUTSIDE};
use super::recipe::{ClassesRecipe, EmbeddingRecipe, TokenClassesRecipe, ValuesRecipe};
use super::{Kind, Records};

/// A sample: one row of tokens, or those of an anchor and what it is compared with.
#[derive(Debug)]
pub(super) struct Row {
    pub texts: Vec<Text>,
    pub target: Target,
}

/// Tokens.
#[derive(Debug, Default)]
pub(super) struct Text {
    pub ids: Vec<i32>,
    /// Type of each.
    pub types: Vec<i32>,
}

/// What a model is to say.
#[derive(Debug)]
pub(super) enum Target {
    Class(i32),
    /// One per token.
    Classes(Vec<i32>),
    /// NaN where unknown.
    Values(Vec<f32>),
    /// The second text belongs to the first.
    Own,
}

impl Row {
    /// Tokens of the longest text.
    pub fn tokens(&self) -> usize {
        self.texts.iter().map(|text| text.ids.len()).max().unwrap_or(0)
    }

    /// What its loss is a mean over.
    pub fn count(&self) -> usize {
        match &self.target {
            Target::Classes(classes) => classes.iter().filter(|&&class| class >= 0).count(),
            _ => 1,
        }
    }
}

/// What makes rows of one kind.
pub(super) struct Reader<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Tokens of a row at most.
    pub most: usize,
    /// Token types that the model knows.
    pub types: usize,
}

type Rows = Result<[Vec<Row>; 2], DataError>;

impl Reader<'_> {
    pub fn classes(&self, recipe: &ClassesRecipe, records: &Records) -> Result<(Kind, [Vec<Row>; 2]), DataError> {
        let labels: Result<Vec<_>, _> =
            records.all().map(|record| Ok((record, record.field(&recipe.label)?))).collect();
        let names = Names::new(&recipe.labels, &labels?)?;
        let rows = both(records, |record| {
            let class = names.class(record, record.field(&recipe.label)?)?;
            Ok(Row {
                texts: vec![self.text(record, &recipe.text, recipe.second.as_deref())?],
                target: Target::Class(class),
            })
        })?;
        Ok((Kind::Classes(names), rows))
    }

    pub fn values(&self, recipe: &ValuesRecipe, records: &Records) -> Result<(Kind, [Vec<Row>; 2]), DataError> {
        let n = match records.train.first() {
            Some(first) => numbers(first, &recipe.label)?.len(),
            None => 0,
        };
        let rows = both(records, |record| {
            let values = numbers(record, &recipe.label)?;
            if values.len() != n {
                return Err(record.bad(format!(
                    "`{}`: expected {n} numbers as in the first row, got {}",
                    recipe.label,
                    values.len()
                )));
            }
            Ok(Row {
                texts: vec![self.text(record, &recipe.text, recipe.second.as_deref())?],
                target: Target::Values(values),
            })
        })?;
        Ok((Kind::Values(n), rows))
    }

    pub fn embedding(&self, recipe: &EmbeddingRecipe, records: &Records) -> Result<(Kind, [Vec<Row>; 2]), DataError> {
        let fields: Vec<&str> =
            [&recipe.anchor, &recipe.positive].into_iter().chain(&recipe.negative).map(String::as_str).collect();
        let rows = both(records, |record| {
            let texts: Result<_, _> = fields.iter().map(|field| self.text(record, field, None)).collect();
            Ok(Row { texts: texts?, target: Target::Own })
        })?;
        Ok((Kind::Embedding, rows))
    }

    pub fn token_classes(
        &self,
        recipe: &TokenClassesRecipe,
        records: &Records,
    ) -> Result<(Kind, [Vec<Row>; 2]), DataError> {
        match &recipe.spans {
            Some(spans) => self.spans(recipe, spans, records),
            None => self.words(recipe, records),
        }
    }

    /// Words with labels.
    fn words(&self, recipe: &TokenClassesRecipe, records: &Records) -> Result<(Kind, [Vec<Row>; 2]), DataError> {
        let mut labels = vec![];
        for record in records.all() {
            labels.extend(record.list(&recipe.label)?.iter().map(|label| (record, label)));
        }
        let names = Names::new(&recipe.labels, &labels)?;
        let rows = both(records, |record| {
            let words = record.list(&recipe.tokens)?.iter().map(|word| {
                word.as_str()
                    .map(String::from)
                    .ok_or_else(|| record.bad(format!("`{}`: expected words, got {word}", recipe.tokens)))
            });
            let words: Vec<String> = words.collect::<Result<_, _>>()?;
            let labels = record.list(&recipe.label)?;
            if words.len() != labels.len() {
                return Err(record.bad(format!(
                    "{} words and {} labels: expected as many of both",
                    words.len(),
                    labels.len()
                )));
            }
            let classes: Vec<i32> = labels.iter().map(|label| names.class(record, label)).collect::<Result<_, _>>()?;
            let encoded = self.encoded(record, |tokenizer| tokenizer.encode_words(&words))?;
            // The label of a word is that of its first piece.
            let mut before = None;
            let piece = |word: &Option<u32>| {
                let first = word.filter(|_| *word != before);
                before = *word;
                first.and_then(|word| classes.get(word as usize).copied()).unwrap_or(IGNORE_INDEX)
            };
            let classes = encoded.words.iter().map(piece).collect();
            Ok(Row { texts: vec![self.taken(encoded)], target: Target::Classes(classes) })
        })?;
        Ok((Kind::TokenClasses(names), rows))
    }

    /// Text with spans.
    fn spans(
        &self,
        recipe: &TokenClassesRecipe,
        field: &str,
        records: &Records,
    ) -> Result<(Kind, [Vec<Row>; 2]), DataError> {
        let names = if recipe.labels.is_empty() {
            let mut kinds = BTreeSet::new();
            for record in records.all() {
                for span in record.list(field)? {
                    kinds.insert(Span::read(record, field, span)?.label);
                }
            }
            Names::of_entities(kinds)
        } else {
            Names::new(&recipe.labels, &[])?
        };
        let rows = both(records, |record| {
            let text = record.text(&recipe.text)?;
            let spans: Vec<Span<'_>> =
                record.list(field)?.iter().map(|span| Span::read(record, field, span)).collect::<Result<_, _>>()?;
            let outside = names.class(record, &OUTSIDE.into())?;
            let mut classes = Vec::with_capacity(spans.len());
            for span in &spans {
                let [begin, inside] =
                    ["B", "I"].map(|prefix| names.class(record, &format!("{prefix}-{}", span.label).into()));
                classes.push((span.bytes(record, text)?, begin?, inside?));
            }
            let encoded = self.encoded(record, |tokenizer| tokenizer.encode_whole(text, None))?;
            let mut begun: Option<usize> = None;
            let mut before = None;
            let mut piece = |i: usize| {
                let (word, at) = (encoded.words[i], encoded.offsets[i].clone());
                let first = word.is_some() && word != before;
                before = word;
                if !first {
                    return IGNORE_INDEX;
                }
                let found = classes.iter().position(|(span, ..)| span.start < at.end && at.start < span.end);
                let class = match found {
                    None => outside,
                    Some(span) if begun == Some(span) => classes[span].2,
                    Some(span) => classes[span].1,
                };
                begun = found;
                class
            };
            let classes = (0..encoded.ids.len()).map(&mut piece).collect();
            Ok(Row { texts: vec![self.taken(encoded)], target: Target::Classes(classes) })
        })?;
        Ok((Kind::TokenClasses(names), rows))
    }

    fn text(&self, record: &Record, field: &str, second: Option<&str>) -> Result<Text, DataError> {
        let (text, second) = (record.text(field)?, second.map(|field| record.text(field)).transpose()?);
        Ok(self.taken(self.encoded(record, |tokenizer| tokenizer.encode_whole(text, second))?))
    }

    fn encoded(
        &self,
        record: &Record,
        encode: impl Fn(&Tokenizer) -> Result<Encoded, DataError>,
    ) -> Result<Encoded, DataError> {
        let encoded = encode(self.tokenizer)?.truncated(self.most);
        if encoded.ids.is_empty() {
            return Err(record.bad("expected text, got a row without a single token"));
        }
        Ok(encoded)
    }

    fn taken(&self, encoded: Encoded) -> Text {
        let numbers = |values: Vec<u32>| values.into_iter().map(|value| value as i32).collect();
        let types = if self.types < 2 { vec![] } else { encoded.types };
        Text {
            ids: numbers(encoded.ids),
            types: numbers(types.into_iter().map(|t| t.min(self.types as u32 - 1)).collect()),
        }
    }
}

/// Rows of both parts.
fn both(records: &Records, read: impl Fn(&Record) -> Result<Row, DataError> + Sync) -> Rows {
    let rows = |records: &[Record]| -> Result<Vec<Row>, DataError> {
        // Of several rows at fault the first one is named.
        let rows: Vec<_> = records.par_iter().map(&read).collect();
        rows.into_iter().collect()
    };
    Ok([rows(&records.train)?, rows(&records.held_out)?])
}

/// A number, or a list of numbers of which some may be unknown.
fn numbers(record: &Record, field: &str) -> Result<Vec<f32>, DataError> {
    let value = record.field(field)?;
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let number = |value: &Value| match value {
        Value::Null => Ok(f32::NAN),
        Value::Number(n) if n.as_f64().is_some_and(|n| (n as f32).is_finite()) => {
            Ok(n.as_f64().unwrap_or_default() as f32)
        }
        other => Err(record.bad(format!("`{field}`: expected a number, or a list of them, got {other}"))),
    };
    let values: Vec<f32> = list.iter().map(number).collect::<Result<_, _>>()?;
    if values.is_empty() {
        return Err(record.bad(format!("`{field}`: expected a number, or a list of them, got an empty list")));
    }
    Ok(values)
}

/// A part of a text with a label; places are counted in characters.
struct Span<'a> {
    start: usize,
    end: usize,
    label: &'a str,
}

impl<'a> Span<'a> {
    fn read(record: &Record, field: &str, value: &'a Value) -> Result<Self, DataError> {
        let number = |key: &str| value[key].as_u64().and_then(|n| usize::try_from(n).ok());
        match (number("start"), number("end"), value["label"].as_str()) {
            (Some(start), Some(end), Some(label)) if start < end => Ok(Self { start, end, label }),
            _ => Err(record.bad(format!(
                "`{field}`: expected {{ \"start\", \"end\", \"label\" }} with start below end, got {value}"
            ))),
        }
    }

    /// Where it is in bytes.
    fn bytes(&self, record: &Record, text: &str) -> Result<std::ops::Range<usize>, DataError> {
        let mut places = text.char_indices().map(|(at, _)| at).chain([text.len()]);
        let (start, end) = (places.nth(self.start), places.nth(self.end - self.start - 1));
        let behind = || {
            let characters = text.chars().count();
            record.bad(format!(
                "span {} to {}: expected places in a text of {characters} characters",
                self.start, self.end
            ))
        };
        Ok(start.ok_or_else(behind)?..end.ok_or_else(behind)?)
    }
}
