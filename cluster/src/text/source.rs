//! Texts of the files that were read, and places in them.

use std::ops::Range;

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

/// A file's name as it is shown, and its text.
#[derive(Debug)]
pub struct Source {
    name: String,
    text: String,
    /// Byte offset of the first character of each line.
    line_starts: Vec<u32>,
}

impl Source {
    /// A text under the name that diagnostics give it.
    pub fn new(name: impl Into<String>, text: String) -> Self {
        let line_starts = std::iter::once(0)
            .chain(text.bytes().zip(1..).filter(|(byte, _)| *byte == b'\n').map(|(_, next)| next))
            .collect();
        Self { name: name.into(), text, line_starts }
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

    /// Index of the line that holds the byte at `offset`.
    pub fn line_index(&self, offset: u32) -> usize {
        self.line_starts.partition_point(|start| *start <= offset).saturating_sub(1)
    }

    /// Bytes of the line with this index, without its line break; the last line's where there is no such line.
    pub fn line_range(&self, index: usize) -> Range<usize> {
        let index = index.min(self.line_starts.len() - 1);
        let start = self.line_starts[index] as usize;
        let end = self.line_starts.get(index + 1).map_or(self.text.len(), |next| *next as usize);
        start..start + self.text[start..end].trim_end_matches(['\n', '\r']).len()
    }

    /// Number of lines.
    pub fn line_count(&self) -> usize {
        self.line_starts.len()
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    pub fn line_column(&self, offset: u32) -> (usize, usize) {
        let index = self.line_index(offset);
        let start = self.line_starts[index] as usize;
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
}
