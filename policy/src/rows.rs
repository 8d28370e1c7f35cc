//! Bit vectors over the rules of one program, and the first bit that several of them share.
//!
//! The aggregated bit vectors of Baboescu and Varghese ("Scalable Packet Classification", SIGCOMM 2001; after Lakshman
//! and Stiliadis, SIGCOMM 1998), stored sparsely. A program of at most 64 rules has one word per row. A larger one has
//! rows of three levels of 64 each: a bit of the top word says that a word of the middle level is not zero, a bit of
//! that that a leaf is not zero. A row's number says in which of three forms it is:
//!
//! ```text
//! one    | no words: its only bit is in the number
//! list   | how many bits, and which, ascending: two in a word
//! sparse | top | (middle, first leaf) for each bit of top, ascending | leaves that are not zero, ascending
//! full   | top | every middle | every leaf
//! ```
//!
//! The place of a word among the stored ones of a sparse row is the population count below its bit. So a row takes memory
//! by the rules in it, not by the rules of the program; where most leaves are not zero anyway, they are all stored and found
//! without counting. The usual row of an address, one rule, takes none, and one look into each other row decides; where the row
//! is a list of up to 64, one for each of them.
//!
//! Of more rows, a sparse one's leaves are looked at one after another, and full ones' several together. What may be looked at
//! in vain are words without a common bit: those of a sparse row in the groups of 64 words in which every row has some, so no
//! more than 64 for each word of the most specific field's row; or where all rows are full, at most 4096, four at a time.

use hashbrown::HashMap;

/// The most rules that a row can hold: three levels of 64.
pub(crate) const MAX_BITS: usize = 64 * 64 * 64;

/// The most rows that one search may name.
pub(crate) const MAX_FIELDS: usize = 6;

/// The form of a row, in the lowest bits of its number; above them is where it starts, or its only bit.
const FORM: u32 = 0b11;
const FORM_BITS: u32 = 2;
const ONE: u32 = 0;
const SPARSE: u32 = 1;
const FULL: u32 = 2;
const LIST: u32 = 3;

/// The most bits in a list.
const MAX_LISTED: usize = 64;

/// Leaves of full rows that are looked at together; a full row has a multiple of that.
const TOGETHER: usize = 4;

/// The rows of one program one after another.
#[derive(Debug)]
pub(crate) enum Rows {
    /// At most 64 rules: a word per row, whose number is its place.
    Words(Box<[u64]>),
    /// More.
    Large(LargeRows),
}

#[derive(Debug)]
pub(crate) struct LargeRows {
    data: Box<[u64]>,
    /// How many words the middle level of a full row has.
    groups: u32,
}

impl Rows {
    /// The first number from `from` on that is in every one of `rows` (at most [`MAX_FIELDS`]).
    #[inline]
    pub(crate) fn first_common(&self, rows: &[u32], from: u32) -> Option<u32> {
        match self {
            Self::Words(words) => {
                let from_on = u64::MAX.checked_shl(from).unwrap_or(0);
                let common = rows.iter().fold(from_on, |common, row| common & words[*row as usize]);
                (common != 0).then(|| common.trailing_zeros())
            }
            Self::Large(large) => large.first_common(rows, from),
        }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        match self {
            Self::Words(words) => size_of_val(&**words),
            Self::Large(large) => size_of_val(&*large.data),
        }
    }
}

/// All ones from bit `from` on if `index` is the word in which the search starts.
#[inline]
fn start_mask(index: u32, start: u32, from: u32) -> u64 {
    if index == start { u64::MAX << (from % 64) } else { u64::MAX }
}

impl LargeRows {
    fn first_common(&self, rows: &[u32], from: u32) -> Option<u32> {
        match rows.iter().find(|row| **row & FORM == ONE) {
            Some(one) => {
                let bit = one >> FORM_BITS;
                (bit >= from && rows.iter().all(|row| self.contains(*row, bit))).then_some(bit)
            }
            None => match rows.iter().find(|row| **row & FORM == LIST) {
                Some(list) => self.first_listed(*list, rows, from),
                None => self.first_common_of_many(rows, from),
            },
        }
    }

    /// A bit of a row of the form [`LIST`]; `None` behind the last.
    #[inline]
    fn listed(&self, start: usize, index: usize) -> Option<u32> {
        let half = |place: usize| (self.data[start + place / 2] >> (32 * (place % 2))) as u32;
        (index < half(0) as usize).then(|| half(index + 1))
    }

    /// For rows of which `list` is of the form [`LIST`], and none of the form [`ONE`].
    fn first_listed(&self, list: u32, rows: &[u32], from: u32) -> Option<u32> {
        // How many bits of each other list are below the one that is looked at.
        let mut below = [0; MAX_FIELDS];
        let is_in = |row: u32, below: &mut usize, bit: u32| {
            if row & FORM != LIST {
                return self.contains(row, bit);
            }
            let start = (row >> FORM_BITS) as usize;
            while self.listed(start, *below).is_some_and(|other| other < bit) {
                *below += 1;
            }
            self.listed(start, *below) == Some(bit)
        };
        let mut bits = (0..).map_while(|index| self.listed((list >> FORM_BITS) as usize, index));
        bits.find(|bit| {
            *bit >= from && rows.iter().zip(&mut below).all(|(row, below)| *row == list || is_in(*row, below, *bit))
        })
    }

    #[inline]
    fn contains(&self, row: u32, bit: u32) -> bool {
        let (start, high, low) = ((row >> FORM_BITS) as usize, bit >> 12, bit >> 6 & 63);
        let leaf = match row & FORM {
            ONE => return row >> FORM_BITS == bit,
            LIST => return (0..).map_while(|index| self.listed(start, index)).any(|listed| listed == bit),
            FULL => self.data[self.full_leaf(start, bit >> 6)],
            _ => {
                if self.data[start] >> high & 1 == 0 {
                    return false;
                }
                let (middle, first) = self.group(start, high);
                if middle >> low & 1 == 0 {
                    return false;
                }
                self.data[first + rank(middle, low)]
            }
        };
        leaf >> (bit % 64) & 1 != 0
    }

    /// A word of a sparse row's middle level that is not zero, and where its first leaf is.
    #[inline]
    fn group(&self, start: usize, high: u32) -> (u64, usize) {
        let pair = start + 1 + 2 * rank(self.data[start], high);
        (self.data[pair], start + self.data[pair + 1] as usize)
    }

    /// For rows of which none is of the form [`ONE`] or [`LIST`].
    fn first_common_of_many(&self, rows: &[u32], from: u32) -> Option<u32> {
        let mut top = u64::MAX << (from >> 12);
        for row in rows {
            top &= self.data[(row >> FORM_BITS) as usize];
        }
        let sparse = rows.iter().copied().find(|row| row & FORM == SPARSE);
        while top != 0 {
            let high = top.trailing_zeros();
            top &= top - 1;
            let found = match sparse {
                Some(sparse) => self.in_sparse_group(sparse, rows, high, from),
                None => self.in_full_group(rows, high, from),
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The first common bit in one group, for rows of which one is sparse: its leaves are looked at one after another.
    fn in_sparse_group(&self, sparse: u32, rows: &[u32], high: u32, from: u32) -> Option<u32> {
        let (stored, first) = self.group((sparse >> FORM_BITS) as usize, high);
        let mut rest = stored & start_mask(high, from >> 12, from >> 6);
        if rest == 0 {
            return None;
        }
        let mut place = first + rank(stored, rest.trailing_zeros());
        // Of each other row, where the group's leaves are, and of a sparse one, which.
        let mut others = [(None, 0); MAX_FIELDS];
        let mut count = 0;
        for row in rows.iter().filter(|row| **row != sparse) {
            let start = (row >> FORM_BITS) as usize;
            others[count] = if row & FORM == FULL {
                (None, self.full_leaf(start, high << 6))
            } else {
                let (stored, first) = self.group(start, high);
                (Some(stored), first)
            };
            count += 1;
        }
        while rest != 0 {
            let low = rest.trailing_zeros();
            rest &= rest - 1;
            let word = high << 6 | low;
            let mut leaf = self.data[place] & start_mask(word, from >> 6, from);
            place += 1;
            for (stored, first) in &others[..count] {
                leaf &= match stored {
                    None => self.data[first + low as usize],
                    Some(stored) if stored >> low & 1 != 0 => self.data[first + rank(*stored, low)],
                    Some(_) => 0,
                };
            }
            if leaf != 0 {
                return Some(word << 6 | leaf.trailing_zeros());
            }
        }
        None
    }

    /// The first common bit in one group, for full rows: several leaves are looked at together.
    fn in_full_group(&self, rows: &[u32], high: u32, from: u32) -> Option<u32> {
        let mut middle = start_mask(high, from >> 12, from >> 6);
        for row in rows {
            middle &= self.data[(row >> FORM_BITS) as usize + 1 + high as usize];
        }
        while middle != 0 {
            let low = middle.trailing_zeros() / TOGETHER as u32 * TOGETHER as u32;
            middle &= !(((1 << TOGETHER) - 1) << low);
            let first = high << 6 | low;
            let mut leaves = [u64::MAX; TOGETHER];
            for row in rows {
                let place = self.full_leaf((row >> FORM_BITS) as usize, first);
                leaves.iter_mut().zip(&self.data[place..place + TOGETHER]).for_each(|(leaf, of_row)| *leaf &= of_row);
            }
            if leaves.iter().fold(0, |any, leaf| any | leaf) == 0 {
                continue;
            }
            for (leaf, word) in leaves.iter().zip(first..).filter(|(_, word)| *word >= from >> 6) {
                let leaf = leaf & start_mask(word, from >> 6, from);
                if leaf != 0 {
                    return Some(word << 6 | leaf.trailing_zeros());
                }
            }
        }
        None
    }

    /// Where a leaf of a full row is.
    #[inline]
    fn full_leaf(&self, start: usize, word: u32) -> usize {
        start + 1 + self.groups as usize + word as usize
    }
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

    /// Its bit, where it has one only.
    fn only_bit(&self) -> Option<u32> {
        let mut filled = ones(self.filled.iter().copied());
        match (filled.next(), filled.next()) {
            (Some(word), None) if self.words[word].is_power_of_two() => {
                Some(64 * word as u32 + self.words[word].trailing_zeros())
            }
            _ => None,
        }
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        for word in ones(self.filled.iter().copied()) {
            self.words[word] = 0;
        }
        self.filled.copy_from_slice(&other.filled);
        for word in ones(other.filled.iter().copied()) {
            self.words[word] = other.words[word];
        }
    }

    /// Flips every bit that `other` has, and says how many words that took.
    pub(crate) fn flip_all(&mut self, other: &Self) -> usize {
        ones(other.filled.iter().copied()).map(|word| self.flip_word(word, other.words[word])).count()
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
pub(crate) fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = usize> {
    words.enumerate().flat_map(|(index, word)| {
        let mut rest = word;
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
    groups: u32,
    scratch: Vec<u64>,
}

impl RowsBuilder {
    /// For rows of `bits` bits, at most [`MAX_BITS`].
    pub(crate) fn new(bits: usize) -> Self {
        assert!(bits <= MAX_BITS, "{bits} rules in a row of {MAX_BITS}");
        Self {
            numbers: HashMap::new(),
            data: Vec::new(),
            single_word: bits <= 64,
            groups: bits.div_ceil(64 * 64) as u32,
            scratch: Vec::new(),
        }
    }

    /// The number of the row.
    pub(crate) fn add(&mut self, row: &DenseRow) -> u32 {
        self.scratch.clear();
        if self.single_word {
            self.scratch.push(row.words.first().copied().unwrap_or(0));
            self.number()
        } else if let Some(bit) = row.only_bit() {
            bit << FORM_BITS | ONE
        } else {
            let form = encode(row, &mut self.scratch);
            self.number() << FORM_BITS | form
        }
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

    /// How many words the rows take; more than a quarter of `u32::MAX` cannot be finished.
    pub(crate) fn words(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn finish(self) -> Rows {
        let data = self.data.into();
        if self.single_word { Rows::Words(data) } else { Rows::Large(LargeRows { data, groups: self.groups }) }
    }
}

/// A row of a program of more than 64 rules in the form that is returned: [`FULL`] where that takes at most twice the words
/// of [`SPARSE`], else [`LIST`] where that takes fewer. Places are relative to its start. The row's own marks are the
/// middle level.
fn encode(row: &DenseRow, out: &mut Vec<u64>) -> u32 {
    let top = row.filled.iter().enumerate().fold(0, |top, (index, middle)| top | u64::from(*middle != 0) << index);
    let groups = u64::from(top.count_ones());
    let leaves: u32 = row.filled.iter().map(|middle| middle.count_ones()).sum();
    if row.filled.len() + row.words.len() <= 2 * (2 * groups as usize + leaves as usize) {
        out.push(top);
        out.extend_from_slice(&row.filled);
        out.extend_from_slice(&row.words);
        out.resize(out.len() + row.words.len().next_multiple_of(TOGETHER) - row.words.len(), 0);
        return FULL;
    }
    let bits: usize = ones(row.filled.iter().copied()).map(|word| row.words[word].count_ones() as usize).sum();
    if bits <= MAX_LISTED && bits / 2 < 2 * groups as usize + leaves as usize {
        let mut half = bits as u64;
        let listed = ones(row.filled.iter().copied());
        let listed =
            listed.flat_map(|word| ones([row.words[word]].into_iter()).map(move |bit| (64 * word + bit) as u64));
        for (place, bit) in (1..).zip(listed) {
            half |= bit << (32 * (place % 2));
            if place % 2 == 1 {
                out.push(std::mem::take(&mut half));
            }
        }
        if bits.is_multiple_of(2) {
            out.push(half);
        }
        return LIST;
    }
    out.push(top);
    let mut leaf = 1 + 2 * groups;
    for middle in row.filled.iter().filter(|middle| **middle != 0) {
        out.extend([*middle, leaf]);
        leaf += u64::from(middle.count_ones());
    }
    out.extend(ones(row.filled.iter().copied()).map(|word| row.words[word]));
    SPARSE
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn check(bits: usize, rows: &[Vec<u32>]) {
        let mut builder = RowsBuilder::new(bits);
        let numbers: Vec<u32> = rows
            .iter()
            .map(|row| {
                let (mut dense, mut seen) = (DenseRow::zeros(bits), HashSet::new());
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
        let sets: Vec<HashSet<u32>> = rows.iter().map(|row| row.iter().copied().collect()).collect();
        let mut common: Vec<u32> =
            rows[0].iter().copied().filter(|bit| sets.iter().all(|set| set.contains(bit))).collect();
        common.sort_unstable();
        for from in (0..bits as u32)
            .step_by(1 + bits / 97)
            .chain(common.iter().copied().take(100))
            .chain([bits.min(MAX_BITS - 1) as u32])
        {
            let expected = common.iter().copied().find(|bit| *bit >= from);
            assert_eq!(rows_of.first_common(&numbers, from), expected, "from {from}");
        }
    }

    /// Some bits, and every one of a step.
    fn row() -> impl Strategy<Value = (Vec<u32>, Option<u32>)> {
        let few_or_more = (0usize..60, any::<bool>())
            .prop_flat_map(|(more, few)| proptest::collection::vec(any::<u32>(), if few { more % 3 } else { more }));
        (few_or_more, proptest::option::of(1u32..500))
    }

    proptest! {
        #[test]
        fn first_common_agrees_with_a_scan(
            bits in prop_oneof![1usize..=64, 65usize..=300, 3_000usize..9_000, 60_000usize..=MAX_BITS],
            seeds in proptest::collection::vec(row(), 1..=MAX_FIELDS),
            shared in proptest::collection::vec(any::<u32>(), 0..5),
        ) {
            let rows: Vec<Vec<u32>> = seeds
                .iter()
                .map(|(seed, step)| {
                    let some = seed.iter().chain(&shared).map(|number| number % bits as u32);
                    some.chain(step.iter().flat_map(|step| (0..bits as u32).step_by(*step as usize))).collect()
                })
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
    fn every_form_takes_few_words() {
        let mut builder = RowsBuilder::new(100_000);
        let mut row = DenseRow::zeros(100_000);
        assert_eq!((builder.add(&row) & FORM, builder.words()), (SPARSE, 1));
        row.flip(99_999);
        row.flip(7_000);
        row.flip(7_000);
        assert_eq!((builder.add(&row) & FORM, builder.words()), (ONE, 1));
        row.flip(5);
        assert_eq!((builder.add(&row) & FORM, builder.words()), (LIST, 1 + 2));
        (64..192).for_each(|bit| row.flip(bit));
        assert_eq!((builder.add(&row) & FORM, builder.words()), (SPARSE, 3 + 1 + 2 * 2 + 4));
        (0..100_000).step_by(100).for_each(|bit| row.flip(bit));
        assert_eq!((builder.add(&row) & FORM, builder.words()), (FULL, 12 + 1 + 25 + 1564));
    }
}
