//! The plain part of YAML, read in one pass over its lines: what kubectl and most people write.
//!
//! # Theory
//! A reader of all of YAML spends most of its time on what nearly no manifest has: anchors, tags, texts over several lines. This one knows block
//! lists and objects, texts in one line, literal texts, and empty flow collections. Whatever it is not certain about, it leaves to that reader,
//! which alone decides what is valid and says what is wrong. So it must never read a text otherwise, which a property test holds it to.
//!
//! A plain text is certain if its first letters rule out that it is a number, a boolean or nothing, in YAML 1.1 or 1.2.

use std::{collections::HashSet, sync::OnceLock};

use super::{
    source::Span,
    tree::{Key, Node, Value},
};

/// Levels that are read here; the other reader judges deeper ones.
const MAX_DEPTH: usize = 60;
/// Objects with more keys than this look for a key that is given twice by hash.
const FEW_KEYS: usize = 16;

/// The one document in a text, if it is plain. Places are counted from `base` on.
pub(super) fn read(text: &str, file: u32, base: u32) -> Option<Node> {
    if !text.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\n')) {
        return None;
    }
    let mut reader = Reader { text, bytes: text.as_bytes(), at: 0, file, base, depth: 0 };
    let indent = reader.next_line()?;
    let node = reader.block(indent)?;
    (reader.at == text.len()).then_some(node)
}

struct Reader<'t> {
    text: &'t str,
    bytes: &'t [u8],
    /// Between two nodes: at the first character of a line that is neither blank nor a comment.
    at: usize,
    file: u32,
    base: u32,
    depth: usize,
}

impl Reader<'_> {
    fn node(&self, start: usize, end: usize, value: Value) -> Node {
        Node { span: self.span(start, end), value, dropped: OnceLock::new() }
    }

    fn span(&self, start: usize, end: usize) -> Span {
        Span { file: self.file, start: self.base + start as u32, end: self.base + end as u32 }
    }

    fn line_end(&self) -> usize {
        self.bytes[self.at..].iter().position(|byte| *byte == b'\n').map_or(self.bytes.len(), |length| self.at + length)
    }

    /// From the beginning of a line to the first character of the first one that says something; its indentation. `None` at the end.
    fn next_line(&mut self) -> Option<usize> {
        while self.at < self.bytes.len() {
            let indent = self.bytes[self.at..].iter().take_while(|byte| **byte == b' ').count();
            self.at += indent;
            match self.bytes.get(self.at) {
                None => return None,
                Some(b'\n') => self.at += 1,
                Some(b'#') => self.at = (self.line_end() + 1).min(self.bytes.len()),
                Some(_) => return Some(indent),
            }
        }
        None
    }

    /// Goes on to the next line, after a value that the line ends with. `None` where that may go on there.
    fn end_line(&mut self, end: usize, parent_indent: usize) -> Option<Option<usize>> {
        self.at = (end + 1).min(self.bytes.len());
        let indent = self.next_line();
        indent.is_none_or(|indent| indent <= parent_indent).then_some(indent)
    }

    fn is_item(&self) -> bool {
        self.bytes[self.at] == b'-' && matches!(self.bytes.get(self.at + 1), Some(b' ' | b'\n') | None)
    }

    /// A list or an object whose first item or key is here, in this column.
    fn block(&mut self, indent: usize) -> Option<Node> {
        self.depth += 1;
        let start = self.at;
        let value = match self.depth {
            ..MAX_DEPTH if self.is_item() => Value::List(self.list(indent)?),
            ..MAX_DEPTH => Value::Map(self.map(indent)?),
            _ => return None,
        };
        self.depth -= 1;
        Some(self.node(start, start, value))
    }

    fn list(&mut self, indent: usize) -> Option<Vec<Node>> {
        let mut items = Vec::new();
        loop {
            let mark = self.at;
            let end = self.line_end();
            let blanks = self.bytes[mark + 1..end].iter().take_while(|byte| **byte == b' ').count();
            let start = mark + 1 + blanks;
            let next = if start == end {
                // An item on the next line; one that is nothing is left to the other reader.
                self.at = (end + 1).min(self.bytes.len());
                let deeper = self.next_line().filter(|deeper| *deeper > indent)?;
                items.push(self.block(deeper)?);
                self.column()
            } else {
                self.at = start;
                let column = indent + 1 + blanks;
                if self.is_item() || self.key_end(end).is_some() {
                    items.push(self.block(column)?);
                    self.column()
                } else {
                    let (item, next) = self.inline(start, end, indent)?;
                    items.push(item);
                    next
                }
            };
            match next {
                Some(next) if next == indent && self.is_item() => {}
                Some(next) if next > indent => return None,
                _ => return Some(items),
            }
        }
    }

    fn map(&mut self, indent: usize) -> Option<Vec<(Key, Node)>> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut many: HashSet<String> = HashSet::new();
        loop {
            let (start, end) = (self.at, self.line_end());
            let key_end = self.key_end(end)?;
            let text = &self.text[start..key_end];
            let is_new = if entries.len() < FEW_KEYS {
                entries.iter().all(|(known, _)| known.text != text)
            } else {
                if many.is_empty() {
                    many.extend(entries.iter().map(|(known, _)| known.text.clone()));
                }
                many.insert(text.to_owned())
            };
            if !is_new {
                return None;
            }
            let key = Key { text: text.to_owned(), span: self.span(start, key_end) };
            let blanks = self.bytes[key_end + 1..end].iter().take_while(|byte| **byte == b' ').count();
            let value_start = key_end + 1 + blanks;
            let next = if value_start < end {
                let (value, next) = self.inline(value_start, end, indent)?;
                entries.push((key, value));
                next
            } else if blanks > 0 {
                return None;
            } else {
                self.at = (end + 1).min(self.bytes.len());
                match self.next_line() {
                    Some(deeper) if deeper > indent || (deeper == indent && self.is_item()) => {
                        let mut value = self.block(deeper)?;
                        if let (true, Value::List(items)) = (deeper == indent, &value.value) {
                            // The other reader has such a list begin with what its first item holds.
                            let first = items.first()?;
                            if first.as_str().is_some_and(|text| text.contains('\n')) {
                                return None;
                            }
                            value.span = Span { end: first.span.start, ..first.span };
                        }
                        entries.push((key, value));
                        self.column()
                    }
                    next => {
                        entries.push((key, self.node(key_end, key_end, Value::Null)));
                        next
                    }
                }
            };
            match next {
                Some(next) if next == indent && !self.is_item() => {}
                Some(next) if next > indent => return None,
                _ => return Some(entries),
            }
        }
    }

    /// The column of the line that reading has come to.
    fn column(&self) -> Option<usize> {
        if self.at == self.bytes.len() {
            return None;
        }
        Some(self.bytes[..self.at].iter().rev().take_while(|byte| **byte == b' ').count())
    }

    /// Where the key ends that is here; `None` where none is, or none that is plain.
    fn key_end(&self, line_end: usize) -> Option<usize> {
        let line = &self.bytes[self.at..line_end];
        if !matches!(line.first(), Some(b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'/')) {
            return None;
        }
        let mut previous = b' ';
        for (offset, byte) in line.iter().enumerate() {
            match byte {
                b':' if matches!(line.get(offset + 1), Some(b' ') | None) => {
                    let key = &self.text[self.at..self.at + offset];
                    return (previous != b' ' && !is_special(key)).then_some(self.at + offset);
                }
                b'#' if previous == b' ' => return None,
                _ => previous = *byte,
            }
        }
        None
    }

    /// A value that is on one line, or begins there as a literal text, and the next line's indentation.
    fn inline(&mut self, start: usize, line_end: usize, parent_indent: usize) -> Option<(Node, Option<usize>)> {
        let text = self.text[start..line_end].trim_end_matches(' ');
        let end = start + text.len();
        let (end, value) = match text.as_bytes()[0] {
            b'|' => return self.literal(text, line_end, parent_indent),
            b'{' if text == "{}" => (start + 1, Value::Map(Vec::new())),
            b'[' if text == "[]" => (start + 1, Value::List(Vec::new())),
            quote @ (b'"' | b'\'') => {
                let inner = text.get(1..text.len() - 1).filter(|_| text.ends_with(char::from(quote)))?;
                let has_other = inner.bytes().any(|byte| byte == quote || byte == b'\\');
                (end, Value::String((!has_other).then(|| inner.to_owned())?))
            }
            _ => (end, plain(text)?),
        };
        let next = self.end_line(line_end, parent_indent)?;
        Some((self.node(start, end, value), next))
    }

    /// A literal text (YAML 1.2.2, 8.1.2) whose first line is not blank.
    fn literal(&mut self, head: &str, line_end: usize, parent_indent: usize) -> Option<(Node, Option<usize>)> {
        let keeps_break = match head {
            "|" => true,
            "|-" => false,
            _ => return None,
        };
        self.at = (line_end + 1).min(self.bytes.len());
        let indent = self.bytes[self.at..].iter().take_while(|byte| **byte == b' ').count();
        let start = self.at + indent;
        if indent <= parent_indent || matches!(self.bytes.get(start), Some(b'\n') | None) {
            return None;
        }
        let mut text = String::new();
        // Blank lines count once another line follows.
        let mut blank_lines = 0;
        while self.at < self.bytes.len() {
            let end = self.line_end();
            let line = &self.text[self.at..end];
            let own = line.bytes().take_while(|byte| *byte == b' ').count();
            if own == line.len() {
                if own > indent || end == self.bytes.len() {
                    return None;
                }
                blank_lines += 1;
            } else if own >= indent {
                text.extend(std::iter::repeat_n('\n', blank_lines));
                blank_lines = 0;
                text.push_str(&line[indent..]);
                text.push('\n');
            } else {
                break;
            }
            self.at = (end + 1).min(self.bytes.len());
        }
        if !keeps_break {
            text.pop();
        }
        // A comment here, or blank lines at the end, leave the place of the text's end to the other reader.
        let is_at_end = self.at == self.bytes.len();
        if is_at_end && (blank_lines > 0 || !self.text.ends_with('\n')) {
            return None;
        }
        let next = if is_at_end {
            None
        } else {
            let own = self.bytes[self.at..].iter().take_while(|byte| **byte == b' ').count();
            self.at += own;
            if self.bytes[self.at] == b'#' || own > parent_indent {
                return None;
            }
            Some(own)
        };
        Some((self.node(start, self.at, Value::String(text)), next))
    }
}

/// A plain text, or what it stands for, where that is certain.
fn plain(text: &str) -> Option<Value> {
    let bytes = text.as_bytes();
    let ends = bytes.windows(2).any(|pair| pair == b": " || pair == b" #") || bytes.last() == Some(&b':');
    if ends {
        return None;
    }
    let string = || Some(Value::String(text.to_owned()));
    match bytes[0] {
        b'a'..=b'z' | b'A'..=b'Z' => match text {
            "true" => Some(Value::Bool(true)),
            "false" => Some(Value::Bool(false)),
            _ if is_special(text) => None,
            _ => string(),
        },
        b'/' | b'_' => string(),
        b'0'..=b'9' => {
            let is_of_numbers = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' | b'o' | b'O' | b'x' | b'X' | b'.' | b'_' | b'+' | b'-' | b':' | b',' | b'i' | b'n' | b'I' | b'N' | b' ');
            if bytes.iter().all(u8::is_ascii_digit) {
                let is_certain = bytes.len() < 18 && (bytes[0] != b'0' || bytes.len() == 1);
                return is_certain.then(|| text.parse().ok().map(Value::Integer))?;
            }
            let is_address = bytes.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.')
                && bytes.iter().filter(|byte| **byte == b'.').count() > 1;
            if is_address || !bytes.iter().all(is_of_numbers) { string() } else { None }
        }
        _ => None,
    }
}

/// Whether a text that begins with a letter may be something else than a text to some reader of YAML, however its letters are written.
fn is_special(text: &str) -> bool {
    const SPECIAL: [&str; 12] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf", "infinity"];
    text.len() <= 8 && SPECIAL.iter().any(|special| text.eq_ignore_ascii_case(special))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Problems, Source, tree};
    use super::*;

    /// What the other reader reads, as its whole tree with all places, and whether it had something to say.
    fn by_the_other(text: &str) -> (Option<Node>, bool) {
        let mut problems = Problems::default();
        let file = problems.add_source(Source::new("", text.to_owned()));
        let node = tree::read_any(file, 0..text.len(), &mut problems);
        (node, !problems.diagnostics().is_empty())
    }

    /// Whether both read the same; false where this one leaves it.
    fn is_read_alike(text: &str) -> bool {
        let Some(own) = read(text, 0, 0) else { return false };
        let (other, has_problems) = by_the_other(text);
        assert!(!has_problems, "{text:?} is faulty");
        assert_eq!(format!("{:?}", Some(own)), format!("{other:?}"), "{text:?}");
        true
    }

    #[test]
    fn what_kubectl_writes_is_plain() {
        for text in [
            "a: 1\nb:\n- x: 'q'\n  w: \"z\"\n-   - 1.2.3\n-\n  k: v\nc:\nd:\n  e: {}\n  f: []\n",
            "g: |\n  lit\n   more\n\n  # more\nh: 2024-01-01T00:00:00Z\ni:\n  j: |-\n    x\nl: text of words  \nm: true\no: \"\"\n",
            "- a: b\n  c: d\n- e\n- - f\n  - g\n# h\n\n- i/j: 10.0.0.0/8\n",
            "labels:\n  app.kubernetes.io/name: web\n  f:x: 5m\n  k: 1Gi\n",
        ] {
            assert!(is_read_alike(text), "{text:?} is left");
        }
    }

    #[test]
    fn what_may_mean_something_else_is_left() {
        for text in [
            "a: yes",
            "a: No",
            "a: 1e3",
            "a: 0x1f",
            "a: 012",
            "a: .inf",
            "a: ~",
            "a: &b c",
            "a: !!str 1",
            "a: b\n c",
            "a: \"b\n  c\"",
            "a: 'it''s'",
            "a: \"\\n\"",
            "a: {b: c}",
            "a: >\n  x",
            "a: |2\n  x",
            "a: 1\na: 2",
            "a:\tb",
            "y: 1",
            "? a\n: b",
            "a: b: c",
            "a: b #c",
            "- ",
            "a: 12:30:45",
            "a: 1_000",
            "a: null",
            "<<: 1",
            "a: b\n  c: d",
            "a",
            "a: |\n  x\n # y\nb: c",
            "a: \"",
            "a: '",
        ] {
            assert!(read(text, 0, 0).is_none(), "{text:?}");
        }
    }

    fn fragment() -> impl Strategy<Value = String> {
        let words = [
            "a",
            "b: ",
            "c:",
            "- ",
            "-",
            "\n",
            "\n",
            "\n",
            "  ",
            "  ",
            " ",
            ":",
            "#",
            "|",
            "|-",
            "'",
            "\"",
            "{}",
            "[]",
            "{",
            "]",
            "true",
            "no",
            "null",
            "~",
            "1",
            "0",
            "1.2.3",
            "1.5",
            "10.0.0.0/8",
            "1e3",
            "0x",
            "fd00::1",
            "12:30",
            "&a",
            "*a",
            "!",
            "?",
            "%",
            "<<",
            "5m",
            "x y",
            "_",
            "/",
            ".",
            ",",
            "a: b",
            "k: v\n",
            "- x\n",
            "- k: v\n",
            "--",
            "=",
            "+1",
            "- - ",
            "\\",
        ];
        proptest::collection::vec(proptest::sample::select(words.to_vec()), 1..24).prop_map(|words| words.concat())
    }

    /// Texts that are plain but for what an edit did to them.
    fn document() -> impl Strategy<Value = String> {
        let scalar = proptest::sample::select(vec![
            "web",
            "10.0.0.1",
            "8080",
            "true",
            "\"quoted\"",
            "'q'",
            "{}",
            "[]",
            "|\n      lit\n       more",
            "1Gi",
            "no",
            "",
            "x y",
            "0",
            "a:b",
        ]);
        let line = (0_usize..4, any::<bool>(), proptest::sample::select(vec!["a", "b", "c", "d/e"]), scalar);
        let line = line.prop_map(|(depth, is_item, key, value)| {
            let mark = if is_item { "- " } else { "" };
            let blank = if value.is_empty() { "" } else { " " };
            format!("{}{mark}{key}:{blank}{value}\n", "  ".repeat(depth))
        });
        proptest::collection::vec(line, 1..12).prop_map(|lines| lines.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn nothing_is_read_otherwise(text in prop_oneof![fragment(), document()]) {
            is_read_alike(&text);
        }
    }
}
