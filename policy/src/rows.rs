//! Bit vectors over the rules of one program, and the first bit that several of them share.
//!
//! The aggregated bit vectors of Baboescu and Varghese ("Scalable Packet Classification", SIGCOMM 2001; after Lakshman
//! and Stiliadis, SIGCOMM 1998), stored sparsely. A program of at most 64 rules has one word per row. A larger one has
//! rows of three levels of 64 each: a bit of the top word says that a word of the middle level is not zero, a bit of
//! that that a leaf is not zero, and only words that are not zero are stored:
//!
//! ```text
//! top | (middle, first leaf) for each bit of top, ascending | leaves, ascending
//! ```
//!
//! The place of a word among the stored ones is the population count below its bit. So a row takes memory by the rules
//! in it, not by the rules of the program, and the search visits only words that are not zero in every row. What it may
//! visit in vain are words in which all rows have a bit but none in common; their number is bounded by the words of the
//! sparsest row, which is that of the most specific field.

use hashbrown::HashMap;

/// The most rules that a row can hold: three levels of 64.
pub(crate) const MAX_BITS: usize = 64 * 64 * 64;

/// The most rows that one search may name.
pub(crate) const MAX_FIELDS: usize = 6;

/// The rows of one program one after another. A row's number is the place where it starts.
#[derive(Debug)]
pub(crate) enum Rows {
    /// At most 64 rules: a word per row.
    Words(Box<[u64]>),
    /// More: encoded rows.
    Sparse(Box<[u64]>),
}

impl Rows {
    /// The first number from `from` on that is in every one of `rows` (at most [`MAX_FIELDS`]).
    #[inline]
    pub(crate) fn first_common(&self, rows: &[u32], from: u32) -> Option<u32> {
        match self {
            Self::Words(words) => {
                let common = rows.iter().fold(u64::MAX << from, |common, row| common & words[*row as usize]);
                (common != 0).then(|| common.trailing_zeros())
            }
            Self::Sparse(data) => first_common_sparse(data, rows, from),
        }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        match self {
            Self::Words(words) | Self::Sparse(words) => size_of_val(&**words),
        }
    }
}

/// All ones from bit `from` on if `index` is the word in which the search starts.
#[inline]
fn start_mask(index: u32, start: u32, from: u32) -> u64 {
    if index == start { u64::MAX << (from % 64) } else { u64::MAX }
}

fn first_common_sparse(data: &[u64], rows: &[u32], from: u32) -> Option<u32> {
    let mut top = u64::MAX << (from >> 12);
    for row in rows {
        top &= data[*row as usize];
    }
    while top != 0 {
        let high = top.trailing_zeros();
        top &= top - 1;
        let mut middle = start_mask(high, from >> 12, from >> 6);
        let mut views = [(0u64, 0usize); MAX_FIELDS];
        for (view, row) in views.iter_mut().zip(rows) {
            let row = *row as usize;
            let pair = row + 1 + 2 * rank(data[row], high);
            *view = (data[pair], row + data[pair + 1] as usize);
            middle &= view.0;
        }
        while middle != 0 {
            let low = middle.trailing_zeros();
            middle &= middle - 1;
            let word = high << 6 | low;
            let mut leaf = start_mask(word, from >> 6, from);
            for (bits, first) in &views[..rows.len()] {
                leaf &= data[first + rank(*bits, low)];
            }
            if leaf != 0 {
                return Some(word << 6 | leaf.trailing_zeros());
            }
        }
    }
    None
}

/// How many bits of `bits` are set below `bit`.
#[inline]
fn rank(bits: u64, bit: u32) -> usize {
    (bits & ((1u64 << bit) - 1)).count_ones() as usize
}

/// A row as plain words, to build with; what is done with it takes time by the words that are not zero.
#[derive(Clone, Debug)]
pub(crate) struct DenseRow {
    words: Vec<u64>,
    /// Invariant: a bit for each word that is not zero.
    filled: Vec<u64>,
}

impl DenseRow {
    /// A row of `bits` zeros.
    pub(crate) fn zeros(bits: usize) -> Self {
        let words = bits.div_ceil(64);
        Self { words: vec![0; words], filled: vec![0; words.div_ceil(64)] }
    }

    pub(crate) fn flip(&mut self, bit: u32) {
        self.flip_word(bit as usize / 64, 1 << (bit % 64));
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        for word in ones(&self.filled) {
            self.words[word] = 0;
        }
        self.filled.copy_from_slice(&other.filled);
        for word in ones(&other.filled) {
            self.words[word] = other.words[word];
        }
    }

    /// Flips every bit that `other` has, and says how many words that took.
    pub(crate) fn flip_all(&mut self, other: &Self) -> usize {
        ones(&other.filled).map(|word| self.flip_word(word, other.words[word])).count()
    }

    fn flip_word(&mut self, word: usize, bits: u64) {
        let flipped = self.words[word] ^ bits;
        self.words[word] = flipped;
        let place = 1 << (word % 64);
        let filled = &mut self.filled[word / 64];
        *filled = if flipped == 0 { *filled & !place } else { *filled | place };
    }
}

/// The numbers of the bits that are set, ascending.
fn ones(words: &[u64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().flat_map(|(index, word)| {
        let mut rest = *word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
            rest &= rest - 1;
            Some(64 * index + bit)
        })
    })
}

/// Collects the rows of a program; equal rows get one number.
pub(crate) struct RowsBuilder {
    numbers: HashMap<Vec<u64>, u32>,
    data: Vec<u64>,
    single_word: bool,
    scratch: Vec<u64>,
}

impl RowsBuilder {
    /// For rows of `bits` bits, at most [`MAX_BITS`].
    pub(crate) fn new(bits: usize) -> Self {
        assert!(bits <= MAX_BITS, "{bits} rules in a row of {MAX_BITS}");
        Self { numbers: HashMap::new(), data: Vec::new(), single_word: bits <= 64, scratch: Vec::new() }
    }

    /// The number of the row.
    pub(crate) fn add(&mut self, row: &DenseRow) -> u32 {
        self.scratch.clear();
        if self.single_word {
            self.scratch.push(row.words.first().copied().unwrap_or(0));
        } else {
            encode(row, &mut self.scratch);
        }
        self.number()
    }

    /// The number of a row of at most 64 bits.
    pub(crate) fn add_word(&mut self, word: u64) -> u32 {
        assert!(self.single_word, "a word in the place of a row");
        self.scratch.clear();
        self.scratch.push(word);
        self.number()
    }

    fn number(&mut self) -> u32 {
        *self.numbers.entry_ref(self.scratch.as_slice()).or_insert_with(|| {
            let start = self.data.len() as u32;
            self.data.extend_from_slice(&self.scratch);
            start
        })
    }

    /// How many words the row takes that was added last, whether it was new or not.
    pub(crate) fn last_words(&self) -> usize {
        self.scratch.len()
    }

    /// How many words the rows take; more than `u32::MAX` cannot be finished.
    pub(crate) fn words(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn finish(self) -> Rows {
        if self.single_word { Rows::Words(self.data.into()) } else { Rows::Sparse(self.data.into()) }
    }
}

/// The sparse form of a row; places are relative to its start. The row's own marks are the middle level.
fn encode(row: &DenseRow, out: &mut Vec<u64>) {
    let start = out.len();
    out.push(0);
    let groups = row.filled.iter().filter(|middle| **middle != 0).count() as u64;
    let mut leaf = 1 + 2 * groups;
    for (index, middle) in row.filled.iter().enumerate().filter(|(_, middle)| **middle != 0) {
        out[start] |= 1 << index;
        out.extend([*middle, leaf]);
        leaf += u64::from(middle.count_ones());
    }
    out.extend(ones(&row.filled).map(|word| row.words[word]));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bits: usize, rows: &[Vec<u32>]) {
        let mut builder = RowsBuilder::new(bits);
        let numbers: Vec<u32> = rows
            .iter()
            .map(|row| {
                let (mut dense, mut seen) = (DenseRow::zeros(bits), std::collections::HashSet::new());
                row.iter().for_each(|bit| {
                    if seen.insert(*bit) {
                        dense.flip(*bit);
                    }
                });
                let number = builder.add(&dense);
                assert_eq!(builder.add(&dense), number);
                number
            })
            .collect();
        let rows_of = builder.finish();
        let mut common = rows[0].clone();
        common.retain(|bit| rows.iter().all(|row| row.contains(bit)));
        common.sort_unstable();
        for from in (0..bits as u32).step_by(1 + bits / 97).chain(common.iter().copied()) {
            let expected = common.iter().copied().find(|bit| *bit >= from);
            assert_eq!(rows_of.first_common(&numbers, from), expected, "from {from}");
        }
    }

    proptest! {
        #[test]
        fn first_common_agrees_with_a_scan(
            bits in prop_oneof![1usize..=64, 65usize..=300, 60_000usize..=MAX_BITS],
            seeds in proptest::collection::vec(proptest::collection::vec(any::<u32>(), 0..60), 1..=MAX_FIELDS),
            shared in proptest::collection::vec(any::<u32>(), 0..5),
        ) {
            let rows: Vec<Vec<u32>> = seeds
                .iter()
                .map(|seed| seed.iter().chain(&shared).map(|number| number % bits as u32).collect())
                .collect();
            check(bits, &rows);
        }
    }

    #[test]
    fn the_last_bit_of_the_largest_row_counts() {
        let last = (MAX_BITS - 1) as u32;
        check(MAX_BITS, &[vec![0, last], vec![1, last]]);
    }

    #[test]
    fn a_sparse_row_takes_few_words() {
        let mut builder = RowsBuilder::new(100_000);
        let mut row = DenseRow::zeros(100_000);
        row.flip(5);
        row.flip(99_999);
        row.flip(7_000);
        row.flip(7_000);
        builder.add(&row);
        assert_eq!(builder.words(), 1 + 2 * 2 + 2);
    }
}
