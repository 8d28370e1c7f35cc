//! Texts of the files that were read, and places in them.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
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

impl Span {
    /// Its bytes in the text.
    pub fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// Only the beginning of each so many lines is written down: a cluster has millions of lines, and few are ever asked for.
const STRIDE: usize = 64;
/// Bytes of text that are compressed together: whoever asks for a line unpacks one or two of them.
const BLOCK_BYTES: usize = 64 << 10;
/// Shorter texts are not worth it.
const WORTH_BYTES: usize = 4 << 10;

/// What is in objects that have no text, as they come from a running API server.
///
/// A place of such a source has the object's position as its first byte; as far behind that as the number of a field's path is its end.
pub trait Untexted: std::fmt::Debug + Send + Sync {
    /// What an object is called, with its version.
    fn object(&self, position: u32) -> String;
    /// The path of a field by its number; empty for the object itself.
    fn path(&self, number: u32) -> String;
    /// The number of a field's path.
    fn number(&self, path: &str) -> u32;
}

/// A file's name as it is shown, and its text.
#[derive(Debug)]
pub struct Source {
    name: String,
    /// What it has instead of a text.
    objects: Option<Arc<dyn Untexted>>,
    text: Mutex<Kept>,
    /// The text's bytes.
    length: usize,
    /// Byte offset of the first character of every [`STRIDE`]th line.
    marks: Box<[u32]>,
    line_count: usize,
    /// The tree of a part that holds many objects, for as long as messages about them are made.
    tree: Mutex<Option<(Span, Arc<Node>)>>,
}

/// A text, as it is held.
#[derive(Debug)]
enum Kept {
    Plain(Arc<String>),
    /// Compressed, with the whole for as long as somebody has it. (A `Weak<str>` would keep all of its bytes.)
    Packed(Box<[Block]>, Weak<String>),
}

/// A part of a text.
#[derive(Debug)]
struct Block {
    /// Its first byte in the text, and the one after its last.
    range: Range<usize>,
    /// As LZ4 blocks are.
    packed: Box<[u8]>,
}

impl Block {
    fn of(text: &str, range: Range<usize>) -> Self {
        let packed = lz4_flex::block::compress(&text.as_bytes()[range.clone()]).into();
        Self { range, packed }
    }

    fn unpack(&self, into: &mut Vec<u8>) {
        let bytes = lz4_flex::block::decompress(&self.packed, self.range.len());
        into.extend(bytes.expect("what was packed is whole"));
    }
}

/// What blocks hold.
fn unpacked<'b>(blocks: impl Iterator<Item = &'b Block>) -> String {
    let mut bytes = Vec::new();
    blocks.for_each(|block| block.unpack(&mut bytes));
    String::from_utf8(bytes).expect("blocks end where characters do")
}

impl Source {
    /// A text under the name that diagnostics give it.
    pub fn new(name: impl Into<String>, text: String) -> Self {
        let mut line_count = 0;
        let starts = std::iter::once(0)
            .chain(text.bytes().zip(1..).filter(|(byte, _)| *byte == b'\n').map(|(_, next)| next))
            .inspect(|_| line_count += 1);
        let marks = starts.step_by(STRIDE).collect();
        let length = text.len();
        let text = Mutex::new(Kept::Plain(Arc::new(text)));
        Self { name: name.into(), objects: None, text, length, marks, line_count, tree: Mutex::default() }
    }

    /// Objects without a text.
    pub fn of_objects(name: impl Into<String>, objects: Arc<dyn Untexted>) -> Self {
        Self { objects: Some(objects), ..Self::new(name, String::new()) }
    }

    /// What it has instead of a text.
    pub fn objects(&self) -> Option<&Arc<dyn Untexted>> {
        self.objects.as_ref()
    }

    /// "file:line:column" of a place, or the object and the path of its field.
    pub fn place(&self, span: Span) -> String {
        match &self.objects {
            Some(objects) => {
                let (object, path) = (objects.object(span.start), objects.path(span.end.saturating_sub(span.start)));
                if path.is_empty() { object } else { format!("{object} {path}") }
            }
            None => {
                let (line, column) = self.line_column(span.start);
                format!("{}:{line}:{column}", self.name)
            }
        }
    }

    /// The name that diagnostics show.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole text.
    pub fn text(&self) -> Arc<String> {
        match &mut *self.kept() {
            Kept::Plain(text) => Arc::clone(text),
            Kept::Packed(blocks, whole) => whole.upgrade().unwrap_or_else(|| {
                let text = Arc::new(unpacked(blocks.iter()));
                *whole = Arc::downgrade(&text);
                text
            }),
        }
    }

    /// Compresses the text, which nearly nobody asks for any more: LZ4 leaves a sixth of what kubectl writes, and takes 2 ns a byte. A text with
    /// a very long line stays as it is, as any question about that line would unpack all of it.
    pub fn pack(&self) {
        let text = match &*self.kept() {
            Kept::Plain(text) => Arc::clone(text),
            Kept::Packed(..) => return,
        };
        let longest = (0..self.marks.len()).map(|mark| self.region(mark).len()).max();
        if text.len() < WORTH_BYTES || longest.is_none_or(|longest| longest > BLOCK_BYTES) {
            return;
        }
        let mut blocks = Vec::with_capacity(text.len().div_ceil(BLOCK_BYTES));
        let mut start = 0;
        while start < text.len() {
            let end = text.floor_char_boundary(start + BLOCK_BYTES);
            blocks.push(Block::of(&text, start..end));
            start = end;
        }
        // Whoever has the whole now goes on with it.
        *self.kept() = Kept::Packed(blocks.into(), Arc::downgrade(&text));
    }

    /// What `look` sees in a part of the text; all of it that is there.
    fn in_part<R>(&self, range: Range<usize>, look: impl FnOnce(&str) -> R) -> R {
        let (text, base) = match &*self.kept() {
            Kept::Plain(text) => (Arc::clone(text), 0),
            Kept::Packed(blocks, whole) => match whole.upgrade() {
                Some(text) => (text, 0),
                None => {
                    let first = blocks.partition_point(|block| block.range.end <= range.start);
                    let meets = blocks[first..].iter().take_while(|block| block.range.start < range.end);
                    (Arc::new(unpacked(meets)), blocks.get(first).map_or(0, |block| block.range.start))
                }
            },
        };
        look(text.get(range.start - base..range.end - base).unwrap_or_default())
    }

    /// The tree of a part: the one that is kept, or that `read` reads.
    pub(crate) fn tree(&self, part: Span, read: impl FnOnce(&str) -> Option<Node>) -> Option<Arc<Node>> {
        let mut kept = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tree)) = kept.as_ref().filter(|(of, _)| *of == part) {
            return Some(Arc::clone(tree));
        }
        let tree = Arc::new(self.in_part(part.range(), read)?);
        if tree.get("items").is_some() || matches!(tree.value, Value::List(_)) {
            *kept = Some((part, Arc::clone(&tree)));
        }
        Some(tree)
    }

    /// Lets go of a tree that is kept.
    pub(crate) fn forget_tree(&self) {
        *self.tree.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The text from a mark to the next.
    fn region(&self, mark: usize) -> Range<usize> {
        let end = self.marks.get(mark + 1).map_or(self.length, |next| *next as usize);
        self.marks[mark] as usize..end
    }

    /// What `look` sees of the text before a byte, from the last mark on, whose line has that index. Bytes, as it may be one of a character.
    fn since_mark<R>(&self, offset: u32, look: impl FnOnce(usize, &[u8]) -> R) -> R {
        let mark = self.marks.partition_point(|start| *start <= offset).saturating_sub(1);
        let region = self.region(mark);
        let length = (offset as usize).min(self.length) - region.start;
        self.in_part(region, |text| look(mark * STRIDE, &text.as_bytes()[..length]))
    }

    /// Index of the line that holds the byte at `offset`.
    pub fn line_index(&self, offset: u32) -> usize {
        self.since_mark(offset, |first, before| first + count_lines(before))
    }

    /// Bytes of the line with this index, without its line break; the last line's where there is no such line.
    pub fn line_range(&self, index: usize) -> Range<usize> {
        let index = index.min(self.line_count - 1);
        let region = self.region(index / STRIDE);
        self.in_part(region.clone(), |text| {
            // Behind the last line break is an empty line.
            let mut lines = text.split_inclusive('\n').chain(std::iter::once(""));
            let start = region.start + lines.by_ref().take(index % STRIDE).map(str::len).sum::<usize>();
            let line = lines.next().unwrap_or_default();
            start..start + line.trim_end_matches(['\n', '\r']).len()
        })
    }

    /// Number of lines.
    pub fn line_count(&self) -> usize {
        self.line_count
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    pub fn line_column(&self, offset: u32) -> (usize, usize) {
        self.since_mark(offset, |first, before| {
            let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
            let column = str::from_utf8(&before[start..]).map_or(0, |line| line.chars().count());
            (first + count_lines(before) + 1, column + 1)
        })
    }
}

fn count_lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
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
    fn a_packed_text_takes_less_than_half() {
        let text: String = (0..40_000).map(|line| format!("{}ü{line}\n", "é".repeat(line % 5))).collect();
        let packed = Source::new("f", text.clone());
        packed.pack();
        let Kept::Packed(blocks, _) = &*packed.kept() else { panic!("that is worth it") };
        let bytes: usize = blocks.iter().map(|block| block.packed.len()).sum();
        assert!(blocks.len() > 5 && bytes * 2 < text.len(), "{} blocks, {bytes} of {}", blocks.len(), text.len());
    }

    #[test]
    fn a_packed_text_tells_the_same_places() {
        let text: String = (0..20_000).map(|line| format!("{}ü{line}\n", "é".repeat(line % 5))).collect();
        let [plain, packed] = [(); 2].map(|()| Source::new("f", text.clone()));
        packed.pack();
        for offset in (0..=text.len() as u32).step_by(97) {
            assert_eq!(packed.line_index(offset), plain.line_index(offset), "{offset}");
            assert_eq!(packed.line_column(offset), plain.line_column(offset), "{offset}");
        }
        for index in (0..=20_001).step_by(61) {
            assert_eq!(packed.line_range(index), plain.line_range(index), "line {index}");
        }
        let whole = packed.text();
        assert_eq!(*whole, text);
        assert!(Arc::ptr_eq(&whole, &packed.text()), "it is unpacked once for all who have it");
    }

    #[test]
    fn what_has_one_long_line_stays_plain() {
        let source = Source::new("f", format!("[{}]\n", "1, ".repeat(100_000)));
        source.pack();
        assert!(matches!(&*source.kept(), Kept::Plain(_)));
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
