//! Jinja as `transformers` sets it up for chat templates (`transformers/utils/chat_template_utils.py`).

use chrono::DateTime;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::fmt::Write as _;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Steps after which a template that does not end is stopped: a long conversation takes a hundred thousand.
const FUEL: u64 = 10_000_000;

/// The filter that a `generation` block becomes.
pub(super) const MARK: &str = "filter firebox_generation";

/// An environment without templates.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // PANIC: the standard delimiters are a syntax.
    #[allow(clippy::expect_used)]
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("a syntax");
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", to_json);
    let [start, end] = super::MARKS;
    environment.add_filter("firebox_generation", move |text: String| format!("{start}{text}{end}"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    set_clock(&mut environment, now);
    environment
}

/// What time it is for templates.
pub(super) fn set_clock(environment: &mut Environment<'static>, seconds: i64) {
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let wrong = || Error::new(ErrorKind::InvalidOperation, format!("strftime_now: no such format: {format}"));
        let time = DateTime::from_timestamp(seconds, 0).ok_or_else(wrong)?;
        let mut text = String::new();
        write!(text, "{}", time.format(&format)).map_err(|_| wrong())?;
        Ok(text)
    });
}

/// Blocks of `generation` as blocks of a filter that marks them: Jinja's extension, for which minijinja has no place. Both capture what is inside and have a scope.
pub(super) fn with_marks(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let inner = &rest[start + 2..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..start + 2]);
        match word {
            "generation" => out.push_str(&inner.replace(word, MARK)),
            "endgeneration" => out.push_str(&inner.replace(word, "endfilter")),
            _ => out.push_str(inner),
        }
        rest = &rest[end..];
    }
    out + rest
}

/// JSON as Python's `json.dumps` writes it with `ensure_ascii=False`.
fn to_json(value: &Value, args: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    // What templates pass and what makes no difference: texts are never escaped, keys stay in order.
    let (_, _): (Option<bool>, Option<bool>) = (args.get("ensure_ascii")?, args.get("sort_keys")?);
    args.assert_all_used()?;
    let mut out = vec![];
    let written = match (indent, separators.as_deref()) {
        (Some(indent), _) => {
            let indent = " ".repeat(indent.min(16));
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
        (None, Some([item, key])) => value.serialize(&mut Serializer::with_formatter(&mut out, Python { item, key })),
        (None, _) => value.serialize(&mut Serializer::with_formatter(&mut out, Python { item: ", ", key: ": " })),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

/// Separators between items, and between keys and values.
struct Python<'a> {
    item: &'a str,
    key: &'a str,
}

impl Python<'_> {
    fn separate<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }
}

impl Formatter for Python<'_> {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first)
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.separate(writer, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}
