//! Texts of the files that were read, and places in them.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use super::tree::{Node, Value};

/// A place in a file: bytes `start..end` of file number `file` (see [`super::Problems::source`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, PartialOrd, Ord)]
pub struct Span {
    /// Number of the file, in the order of reading.
    pub file: u32,
    /// First byte.
    pub start: u32,
    /// The byte after the last one.
    pub end: u32,
}

/// Only the beginning of each so many lines is written down: a cluster has millions of lines, and few are ever asked for.
const STRIDE: usize = 64;

/// A file's name as it is shown, and its text.
#[derive(Debug)]
pub struct Source {
    name: String,
    text: String,
    /// Byte offset of the first character of every [`STRIDE`]th line.
    marks: Box<[u32]>,
    line_count: usize,
    /// The tree of a part that holds many objects, for as long as messages about them are made.
    tree: Mutex<Option<(Span, Arc<Node>)>>,
}

impl Source {
    /// A text under the name that diagnostics give it.
    pub fn new(name: impl Into<String>, text: String) -> Self {
        let mut line_count = 0;
        let starts = std::iter::once(0)
            .chain(text.bytes().zip(1..).filter(|(byte, _)| *byte == b'\n').map(|(_, next)| next))
            .inspect(|_| line_count += 1);
        let marks = starts.step_by(STRIDE).collect();
        Self { name: name.into(), text, marks, line_count, tree: Mutex::default() }
    }

    /// The name that diagnostics show.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text at a span, empty where the span is not of this text.
    pub fn slice(&self, span: Span) -> &str {
        self.text.get(span.start as usize..span.end as usize).unwrap_or("")
    }

    /// The tree of a part: the one that is kept, or that `read` reads.
    pub(crate) fn tree(&self, part: Span, read: impl FnOnce(&str) -> Option<Node>) -> Option<Arc<Node>> {
        let mut kept = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tree)) = kept.as_ref().filter(|(of, _)| *of == part) {
            return Some(Arc::clone(tree));
        }
        let tree = Arc::new(read(self.slice(part))?);
        if tree.get("items").is_some() || matches!(tree.value, Value::List(_)) {
            *kept = Some((part, Arc::clone(&tree)));
        }
        Some(tree)
    }

    /// Lets go of a tree that is kept.
    pub(crate) fn forget_tree(&self) {
        *self.tree.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The lines from a mark on: the first one's index, and where each begins.
    fn lines_from(&self, mark: usize) -> (usize, impl Iterator<Item = u32>) {
        let start = self.marks[mark];
        let rest = &self.text.as_bytes()[start as usize..];
        let next = rest.iter().zip(start + 1..).filter(|(byte, _)| **byte == b'\n').map(|(_, next)| next);
        (mark * STRIDE, std::iter::once(start).chain(next))
    }

    /// Index of the line that holds the byte at `offset`.
    pub fn line_index(&self, offset: u32) -> usize {
        let mark = self.marks.partition_point(|start| *start <= offset).saturating_sub(1);
        let (first, starts) = self.lines_from(mark);
        first + starts.take_while(|start| *start <= offset).count().saturating_sub(1)
    }

    /// Where the line with this index begins; `None` where there is none.
    fn line_start(&self, index: usize) -> Option<usize> {
        if index >= self.line_count {
            return None;
        }
        let (first, mut starts) = self.lines_from(index / STRIDE);
        starts.nth(index - first).map(|start| start as usize)
    }

    /// Bytes of the line with this index, without its line break; the last line's where there is no such line.
    pub fn line_range(&self, index: usize) -> Range<usize> {
        let index = index.min(self.line_count - 1);
        let start = self.line_start(index).unwrap_or_default();
        let end = self.line_start(index + 1).unwrap_or(self.text.len());
        start..start + self.text[start..end].trim_end_matches(['\n', '\r']).len()
    }

    /// Number of lines.
    pub fn line_count(&self) -> usize {
        self.line_count
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    pub fn line_column(&self, offset: u32) -> (usize, usize) {
        let index = self.line_index(offset);
        let start = self.line_start(index).unwrap_or_default();
        let column = self.text.get(start..offset as usize).map_or(0, |before| before.chars().count());
        (index + 1, column + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_lines_and_columns_of_characters() {
        let source = Source::new("f", "a: ü\r\nbé: x\n".into());
        assert_eq!(source.line_column(0), (1, 1));
        assert_eq!(source.line_column(3), (1, 4));
        let x = source.text().find('x').unwrap() as u32;
        assert_eq!(source.line_column(x), (2, 5));
        assert_eq!(source.line_column(source.text().len() as u32), (3, 1));
        assert_eq!(&source.text()[source.line_range(0)], "a: ü");
        assert_eq!(&source.text()[source.line_range(1)], "bé: x");
        assert_eq!(&source.text()[source.line_range(9)], "");
    }

    #[test]
    fn lines_behind_a_mark_are_found_as_those_at_one() {
        let text: String = (0..1000).map(|line| format!("{}\n", "x".repeat(line % 7))).collect();
        let source = Source::new("f", text.clone());
        assert_eq!(source.line_count(), 1001);
        let mut offset = 0;
        for (index, line) in text.split_inclusive('\n').enumerate() {
            assert_eq!(source.line_range(index), offset..offset + line.len() - 1, "line {index}");
            for at in offset..offset + line.len() {
                assert_eq!(source.line_column(at as u32), (index + 1, at - offset + 1));
            }
            offset += line.len();
        }
        assert_eq!(source.line_column(offset as u32), (1001, 1));
        assert_eq!(source.line_range(1000), offset..offset);
    }
}
