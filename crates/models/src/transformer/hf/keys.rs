//! Values of a `config.json`.

use serde_json::{Map, Value};

use super::HfError;

/// The object of a `config.json`, or one inside it. What is null counts as absent.
pub(super) struct Keys<'a>(pub &'a Map<String, Value>);

impl Keys<'_> {
    pub fn get<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, HfError> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(v) => Ok(Some(v)),
                None => Err(HfError::Key { key: key.into(), expected, got: value.to_string() }),
            },
        }
    }

    pub fn count_or(&self, key: &str) -> Result<Option<usize>, HfError> {
        self.get(key, "a count", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    pub fn count(&self, key: &str) -> Result<usize, HfError> {
        self.count_or(key)?.ok_or_else(|| HfError::Key { key: key.into(), expected: "a count", got: "nothing".into() })
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, HfError> {
        Ok(self.get(key, "a number", Value::as_f64)?.unwrap_or(default))
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, HfError> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn only(&self, key: &'static str, supported: &[&str]) -> Result<(), HfError> {
        match self.0.get(key) {
            Some(Value::String(s)) if !supported.contains(&s.as_str()) => {
                Err(HfError::Unsupported { key, got: s.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// What a value is, for an error.
pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a flag",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
    .into()
}
