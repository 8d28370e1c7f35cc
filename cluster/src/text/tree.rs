//! YAML documents as trees whose nodes know where they stand in the file.
//!
//! A file is cut at its document markers first (YAML 1.2.2, 9.1.2: "---" and "..." at the start of a line cannot be
//! content), so that a syntax error in one document leaves the others readable.

use std::{fmt, io, ops::Range, sync::OnceLock, thread};

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{
    Error, Location, Options, Spanned,
    budget::BudgetBreach,
    options::{DuplicateKeyPolicy, NonFiniteFloatPolicy},
};

use super::{
    plain,
    problem::Problems,
    source::{Source, Span},
};

/// Levels of nesting that are read; deeper documents are refused, since reading them would exhaust the stack.
const MAX_DEPTH: usize = 100;
/// Stack of the thread that reads a file: an unoptimised build takes more than 20 KiB for each level.
const READER_STACK_BYTES: usize = 16 << 20;

/// A value and its place.
#[derive(Debug)]
pub struct Node {
    /// Where it stands; for block lists and objects, from their first character.
    pub span: Span,
    /// What it is.
    pub value: Value,
    /// Set where typed reading found it faulty and went on without it.
    pub(super) dropped: OnceLock<()>,
}

/// A copy has nothing dropped.
impl Clone for Node {
    fn clone(&self) -> Self {
        Self { span: self.span, value: self.value.clone(), dropped: OnceLock::new() }
    }
}

/// A value of YAML's core schema, with YAML 1.1's booleans as kubectl reads them.
#[derive(Clone, Debug)]
pub enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// A boolean.
    Bool(bool),
    /// An integer.
    Integer(i128),
    /// Another number.
    Float(f64),
    /// A text.
    String(String),
    /// A list.
    List(Vec<Node>),
    /// An object; keys are unique.
    Map(Vec<(Key, Node)>),
}

/// A key of an object and its place.
#[derive(Clone, Debug)]
pub struct Key {
    /// Its text.
    pub text: String,
    /// Where it stands.
    pub span: Span,
}

impl Node {
    /// Nothing, from nowhere.
    pub fn null() -> Self {
        Self { span: Span::default(), value: Value::Null, dropped: OnceLock::new() }
    }

    /// A value of JSON, whose nodes have their numbers in the order of reading for places: see [`Node::path_to`].
    pub fn of_json(value: serde_json::Value) -> Self {
        fn node(value: serde_json::Value, next: &mut u32) -> Node {
            use serde_json::Value as Json;
            let span = Span { file: 0, start: *next, end: *next + 1 };
            *next += 1;
            let value = match value {
                Json::Null => Value::Null,
                Json::Bool(value) => Value::Bool(value),
                Json::Number(number) => match number.as_i128() {
                    Some(number) => Value::Integer(number),
                    None => Value::Float(number.as_f64().unwrap_or(f64::INFINITY)),
                },
                Json::String(text) => Value::String(text),
                Json::Array(items) => Value::List(items.into_iter().map(|item| node(item, next)).collect()),
                Json::Object(entries) => {
                    let entry = |(text, value)| {
                        let value = node(value, next);
                        (Key { text, span: value.span }, value)
                    };
                    Value::Map(entries.into_iter().map(entry).collect())
                }
            };
            Node { span, value, dropped: OnceLock::new() }
        }
        node(value, &mut 0)
    }

    /// The way to the node with a number that [`Node::of_json`] gave: "spec.ingress[0].from"; empty where there is none.
    pub fn path_to(&self, number: u32) -> String {
        let (mut node, mut path) = (self, String::new());
        while node.span.start < number {
            // The last that begins before or with it holds it.
            match &node.value {
                Value::Map(entries) => {
                    let before = entries.partition_point(|(_, value)| value.span.start <= number);
                    let Some((key, value)) = entries[..before].last() else { break };
                    push_key(&mut path, &key.text);
                    node = value;
                }
                Value::List(items) => {
                    let before = items.partition_point(|item| item.span.start <= number);
                    let Some(item) = items[..before].last() else { break };
                    push_index(&mut path, before - 1);
                    node = item;
                }
                _ => break,
            }
        }
        path
    }

    /// The place of the node with all that is in it.
    pub fn extent(&self) -> Span {
        let mut extent = self.span;
        let mut add = |span: Span| extent.end = extent.end.max(span.end).max(span.start + 1);
        add(self.span);
        match &self.value {
            Value::List(items) => items.iter().for_each(|item| add(item.extent())),
            Value::Map(entries) => entries.iter().for_each(|(key, value)| {
                add(key.span);
                add(value.extent());
            }),
            _ => {}
        }
        extent
    }

    /// The value under a key of an object, unless typed reading dropped it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|(_, node)| node)
    }

    /// A key of an object with its value, unless typed reading dropped it.
    pub fn entry(&self, key: &str) -> Option<(&Key, &Node)> {
        let (key, node) = self.entries().iter().find(|(candidate, _)| candidate.text == key)?;
        (!node.is_dropped()).then_some((key, node))
    }

    /// The entries of an object; none for anything else.
    pub fn entries(&self) -> &[(Key, Node)] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The items of a list that typed reading did not drop; none for anything else.
    pub fn items(&self) -> impl Iterator<Item = &Node> {
        let items: &[Node] = match &self.value {
            Value::List(items) => items,
            _ => &[],
        };
        items.iter().filter(|item| !item.is_dropped())
    }

    /// The text, where it is one.
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether typed reading found it faulty.
    pub fn is_dropped(&self) -> bool {
        self.dropped.get().is_some()
    }

    /// Marks it as faulty, so that typed reading goes on without it.
    pub fn drop_from_reading(&self) {
        let _ = self.dropped.set(());
    }

    /// Whether something directly inside it was dropped.
    pub fn has_dropped(&self) -> bool {
        match &self.value {
            Value::Map(entries) => entries.iter().any(|(_, node)| node.is_dropped()),
            Value::List(items) => items.iter().any(Node::is_dropped),
            _ => false,
        }
    }

    /// What it is, in words: "the string "x"", "a list".
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::Integer(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::String(text) if text.len() > 60 => "a long string".to_owned(),
            Value::String(text) => format!("the string {text:?}"),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "an object".to_owned(),
        }
    }
}

/// Adds a key to the path of a field.
pub fn push_key(path: &mut String, key: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(key);
}

/// Adds an item of a list to the path of a field.
pub fn push_index(path: &mut String, index: usize) {
    path.push_str(&format!("[{index}]"));
}

/// Reads all documents of a text that [`Problems::add_source`] made known. Faulty ones are reported and left out;
/// empty ones are left out.
pub fn read_documents(file: u32, problems: &mut Problems) -> Vec<Node> {
    let source = problems.source(file).clone();
    let read = || {
        let ranges = document_ranges(&source.text());
        ranges.into_iter().filter_map(|range| read_document(file, range, problems)).collect()
    };
    match on_reader_thread(read) {
        Ok(documents) => documents,
        Err(error) => {
            let message = format!("there is no thread to read this file with: {error}");
            problems.error(Span { file, ..Span::default() }, message, None);
            Vec::new()
        }
    }
}

/// Runs `read` with a stack that [`read_document`] cannot exhaust.
///
/// # Errors
/// Where the system has no thread for it.
pub fn on_reader_thread<T: Send>(read: impl FnOnce() -> T + Send) -> io::Result<T> {
    let outcome = thread::scope(|scope| spawn_reader(scope, read).map(|reader| reader.join()));
    outcome.map(|joined| joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// As [`on_reader_thread`], beside what the caller does meanwhile.
///
/// # Errors
/// As there.
pub fn spawn_reader<'s, T: Send + 's>(
    scope: &'s thread::Scope<'s, '_>,
    read: impl FnOnce() -> T + Send + 's,
) -> io::Result<thread::ScopedJoinHandle<'s, T>> {
    let thread = thread::Builder::new().name("read-yaml".to_owned()).stack_size(READER_STACK_BYTES);
    thread.spawn_scoped(scope, read)
}

/// Byte ranges of the documents of a stream, without those that hold only directives, comments and blanks. JSON texts one behind the other
/// are documents too, as kubectl reads them.
pub fn document_ranges(text: &str) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
    let mut offset = start;
    for line in text[start..].split_inclusive('\n') {
        let bare = line.trim_end();
        let marker = ["---", "..."].iter().any(|marker| {
            bare.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
        });
        if marker {
            ranges.push(start..offset);
            // What follows "---" on its line belongs to the document: "--- {a: 1}".
            start = offset + if bare.len() == 3 { line.len() } else { 3 };
        }
        offset += line.len();
    }
    ranges.push(start..text.len());
    let has_content = |range: &Range<usize>| {
        text[range.clone()].lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with(['#', '%']))
    };
    ranges.retain(has_content);
    ranges.into_iter().flat_map(|range| json_ranges(text, range)).collect()
}

/// Cuts JSON objects that stand one behind the other. What is no JSON stays in one piece.
fn json_ranges(text: &str, range: Range<usize>) -> Vec<Range<usize>> {
    let part = &text[range.clone()];
    let mut ranges = Vec::new();
    let mut start = 0;
    if part.trim_start().starts_with('{') {
        let mut values = serde_json::Deserializer::from_str(part).into_iter::<de::IgnoredAny>();
        while let Some(Ok(_)) = values.next() {
            let end = values.byte_offset();
            ranges.push(range.start + start..range.start + end);
            start = end;
        }
    }
    match ranges.last_mut() {
        // Comments and line breaks behind the last one are its own.
        Some(last) if part[start..].lines().all(|line| matches!(line.trim().as_bytes(), [] | [b'#', ..])) => {
            last.end = range.end;
        }
        _ => ranges.push(range.start + start..range.end),
    }
    ranges
}

/// Reads the one document in a range of a text that [`Problems::add_source`] made known. `None` where it is empty or cannot
/// be read, which is reported. Call it within [`on_reader_thread`].
pub fn read_document(file: u32, range: Range<usize>, problems: &mut Problems) -> Option<Node> {
    match plain::read(&problems.source(file).text()[range.clone()], file, range.start as u32) {
        Some(node) => Some(node),
        None => read_any(file, range, problems),
    }
}

/// As [`read_document`], for all of YAML.
pub(super) fn read_any(file: u32, range: Range<usize>, problems: &mut Problems) -> Option<Node> {
    let source = problems.source(file).clone();
    let whole = source.text();
    let text = &whole[range.clone()];
    let base = range.start as u32;
    let parse = |duplicate_keys| serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options(duplicate_keys));
    let mut parsed = parse(DuplicateKeyPolicy::Error);
    if let Err(error) = &parsed {
        let duplicate = matches!(error.without_snippet(), Error::DuplicateMappingKey { .. });
        report(error, file, range, problems);
        if duplicate {
            // The rest of the document is still worth reading for further problems.
            parsed = parse(DuplicateKeyPolicy::FirstWins);
        }
    }
    let node = Node::new(parsed.ok()?, &source, &whole, file, base);
    (!matches!(node.value, Value::Null)).then_some(node)
}

/// The tree of a text that was read before; what there is to say about it was said then. It may be called on any thread.
pub fn reread(text: &str) -> Option<Node> {
    plain::read(text, 0, 0).or_else(|| {
        let read = || {
            let mut problems = Problems::default();
            let file = problems.add_source(Source::new("", text.to_owned()));
            read_any(file, 0..text.len(), &mut problems)
        };
        on_reader_thread(read).ok().flatten()
    })
}

fn options(duplicate_keys: DuplicateKeyPolicy) -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            // The text is in memory already and bounds these; the limits on aliases stay.
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
            max_total_comment_bytes: usize::MAX,
            max_buffered_comment_events: usize::MAX,
        },
        duplicate_keys: duplicate_keys,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        emit_comments: false,
        with_snippet: false,
    }
}

fn report(error: &Error, file: u32, range: Range<usize>, problems: &mut Problems) {
    let error = error.without_snippet();
    let source = problems.source(file).clone();
    let whole = source.text();
    let end = range.start + whole[range.clone()].trim_end().len();
    let span = match error.location().filter(|location| *location != Location::UNKNOWN) {
        Some(location) => span_of(location, &source, file, range.start as u32, range.end as u32),
        None => Span { file, start: end as u32, end: end as u32 },
    };
    let error = match error {
        Error::AliasError { error, .. } => error.without_snippet(),
        other => other,
    };
    let tab = {
        let line = &whole[source.line_range(source.line_index(span.start))];
        line.chars().take_while(|character| character.is_whitespace()).any(|character| character == '\t')
    };
    let too_deep = || format!("this is nested more than {MAX_DEPTH} levels deep");
    match error {
        Error::Budget { breach: BudgetBreach::Depth { .. }, .. } => problems.error(span, too_deep(), None),
        Error::Budget { .. } | Error::AliasReplayLimitExceeded { .. } => {
            let help = "write the repeated parts out".to_owned();
            problems.error(span, "the aliases of this document stand for too much", help);
        }
        Error::DuplicateMappingKey { key, .. } => problems.error(
            span,
            format!("the key {:?} is given twice", key.as_deref().or(whole.get(span.range())).unwrap_or_default()),
            "remove one of them: which one would count depends on the reader".to_owned(),
        ),
        _ => {
            let message = error.render_with_formatter(&PlainMessages);
            if message.contains("recursion limit") {
                return problems.error(span, too_deep(), None);
            }
            let help = tab.then(|| "YAML must be indented with blanks; this line begins with a tab".to_owned());
            problems.error(span, format!("this is not valid YAML: {message}"), help);
        }
    }
}

/// Messages of the YAML reader without its own "at line ..." (which counts from the document's start).
struct PlainMessages;

impl serde_saphyr::MessageFormatter for PlainMessages {
    fn localizer(&self) -> &dyn serde_saphyr::localizer::Localizer {
        self
    }

    fn format_message<'a>(&self, error: &'a Error) -> std::borrow::Cow<'a, str> {
        serde_saphyr::UserMessageFormatter.format_message(error)
    }
}

impl serde_saphyr::localizer::Localizer for PlainMessages {
    fn attach_location<'a>(&self, base: std::borrow::Cow<'a, str>, _: Location) -> std::borrow::Cow<'a, str> {
        base
    }
}

fn span_of(location: Location, source: &Source, file: u32, base: u32, end: u32) -> Span {
    let (start, length) = match (location.span().byte_offset(), location.span().byte_len()) {
        (Some(start), Some(length)) => (start as u32, length as u32),
        _ => {
            // Only a line and a column of the document: counted from the document's first line.
            let line = source.line_index(base) + location.line().saturating_sub(1) as usize;
            let range = source.line_range(line);
            let from = if location.line() <= 1 { base as usize } else { range.start };
            let skipped = location.column().saturating_sub(1) as usize;
            let at = source.text()[from.min(range.end)..range.end]
                .char_indices()
                .nth(skipped)
                .map_or(range.end, |(offset, _)| from + offset);
            ((at as u32).saturating_sub(base), 0)
        }
    };
    let start = base.saturating_add(start).min(end);
    Span { file, start, end: start.saturating_add(length).min(end) }
}

/// A number that YAML 1.1, and kubectl with it, takes for octal, as the modes of files are written: 0644.
fn octal(text: &str) -> Option<i128> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let digits = digits.strip_prefix('0').filter(|digits| digits.bytes().all(|byte| matches!(byte, b'0'..=b'7')))?;
    i128::from_str_radix(digits, 8).ok().map(|value| sign * value)
}

/// What serde gives, before places are counted from the file's start.
enum Raw {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    String(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Integer(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Integer(value.into()))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Raw, E> {
        Ok(Raw::Integer(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::String(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Raw, E> {
        Ok(Raw::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Raw::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Raw::Map(entries))
    }
}

impl Node {
    fn new(raw: Spanned<Raw>, source: &Source, whole: &str, file: u32, base: u32) -> Self {
        let place = |location| span_of(location, source, file, base, whole.len() as u32);
        let text_at = |location| whole.get(place(location).range()).unwrap_or_default();
        let span = place(raw.referenced);
        let value = match raw.value {
            Raw::Null => Value::Null,
            Raw::Bool(value) => match text_at(raw.defined) {
                // The two that kubectl's reader, unlike YAML 1.1, leaves as they are.
                text @ ("y" | "Y" | "n" | "N") => Value::String(text.to_owned()),
                _ => Value::Bool(value),
            },
            Raw::Integer(value) => Value::Integer(octal(text_at(raw.defined)).unwrap_or(value)),
            Raw::Float(value) => match octal(text_at(raw.defined)) {
                Some(value) => Value::Integer(value),
                None => Value::Float(value),
            },
            Raw::String(text) => Value::String(text),
            Raw::List(items) => {
                Value::List(items.into_iter().map(|item| Self::new(item, source, whole, file, base)).collect())
            }
            Raw::Map(entries) => Value::Map(
                entries
                    .into_iter()
                    .map(|(key, value)| {
                        let key = Key { span: place(key.referenced), text: key.value };
                        (key, Self::new(value, source, whole, file, base))
                    })
                    .collect(),
            ),
        };
        Self { span, value, dropped: OnceLock::new() }
    }
}
