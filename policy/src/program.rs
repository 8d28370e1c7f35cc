//! The compiled rules of one set of endpoints in one direction and one address family.
//!
//! Tiers, policies, rules and profiles are one list of slots in the order in which they are evaluated; a slot decides,
//! or continues at a later slot (Pass, Log). Each field of a packet that any slot looks at gives a row: the slots that this
//! field's value satisfies. The first slot that is in every row is the first rule that matches.
//!
//! Fields: the application (protocol with destination port, or with ICMP type and code), the classes of the source and
//! of the destination address, the source port, and, for named ports, (class, protocol, port) of either end. A field
//! that no slot looks at has no row.
//!
//! Invariant: the last slot matches every packet. It is in no row, and is what a search that finds nothing comes to.

use hashbrown::HashMap;
use weir_packet::{Address, FlowKey, Protocol};

use crate::{
    LoggedRules, RuleId,
    addresses::AddressClasses,
    classes::Classes,
    partition::{Partition, TooManyMemberships},
    ranges::Ranges,
    rows::{DenseRow, MAX_FIELDS, Rows, RowsBuilder, ones},
    steps::StepMap,
    trie::Key,
};

/// Bits of an application number: protocol, then a 16-bit selector.
pub(crate) const APPLICATION_BITS: u32 = 24;
/// Bits of a source port number; [`NO_PORT`] needs one more than a port.
pub(crate) const SOURCE_PORT_BITS: u32 = 17;
/// The source port number of a packet without ports.
pub(crate) const NO_PORT: u32 = 1 << 16;

/// What rules see of a packet besides its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Protocol, then destination port, or ICMP type and code, or 0.
    pub(crate) application: u32,
    /// Source port or [`NO_PORT`].
    pub(crate) source_port: u32,
}

impl Facts {
    #[inline]
    pub(crate) fn new<A: Address>(key: &FlowKey<A>) -> Self {
        let (source, destination) = (key.ports.source(), key.ports.destination());
        let (selector, source_port) = if key.protocol.has_ports() {
            (destination, u32::from(source))
        } else if key.protocol.is_icmp() {
            let (icmp_type, code) = key.ports.icmp(key.protocol);
            (icmp_selector(icmp_type, code), NO_PORT)
        } else {
            (0, NO_PORT)
        };
        Self { application: application(key.protocol, selector), source_port }
    }

    /// The packet's point at its destination: protocol and port.
    #[inline]
    fn destination_point(self) -> u32 {
        self.application
    }

    /// The packet's point at its source; nobody's for a packet without ports.
    #[inline]
    fn source_point(self) -> u32 {
        if self.source_port == NO_PORT { 0 } else { self.application & 0xff_0000 | self.source_port }
    }
}

/// The number of a protocol and a selector.
#[inline]
pub(crate) const fn application(protocol: Protocol, selector: u16) -> u32 {
    (protocol.0 as u32) << 16 | selector as u32
}

/// The selector of an ICMP type and code.
#[inline]
pub(crate) const fn icmp_selector(icmp_type: u8, code: u8) -> u16 {
    (icmp_type as u16) << 8 | code as u16
}

/// Programs with more rows than this are made anew where classes changed: rows that are not used any more stay in what is patched.
const MAX_PATCHED_ROWS: usize = 256;

/// What a slot does with a packet that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// The packet may go.
    Allow,
    /// The packet is dropped.
    Deny,
    /// The search goes on at this slot, which is a later one.
    Continue(u32),
    /// The same, and the rule is one that logs.
    Log(u32),
}

/// A rule in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) outcome: Outcome,
    pub(crate) rule: RuleId,
}

/// Rows by class, as runs of classes with the same row: a bit marks the class where a run starts, and the population
/// count up to a class numbers its run. Numbers of classes follow addresses, as long as little was changed, so runs are few
/// even where a rule's peers are many. Where they are not, there is a row for each class, found without counting.
#[derive(Clone, Debug)]
struct ClassRows {
    /// For 64 classes each: where runs start, and how many start in the words before. Empty: rows are by class.
    words: Box<[(u64, u32)]>,
    /// By run or by class.
    rows: Box<[u32]>,
    /// For classes beyond: those that are in none of the sets.
    common: u32,
}

impl ClassRows {
    #[inline]
    fn get(&self, class: u32) -> u32 {
        if self.words.is_empty() {
            return self.rows.get(class as usize).copied().unwrap_or(self.common);
        }
        match self.words.get(class as usize / 64) {
            Some((starts, before)) => {
                let up_to = starts & (u64::MAX >> (63 - class % 64));
                self.rows[(before + up_to.count_ones()) as usize - 1]
            }
            None => self.common,
        }
    }

    /// With these rows for these classes, ascending.
    fn with(&self, changes: &[(u32, u32)]) -> Self {
        if self.words.is_empty() {
            let mut rows = self.rows.to_vec();
            let end = changes.last().map_or(0, |(class, _)| *class as usize + 1);
            rows.resize(rows.len().max(end), self.common);
            changes.iter().for_each(|(class, row)| rows[*class as usize] = *row);
            return Self { words: Box::default(), rows: rows.into(), common: self.common };
        }
        let starts: Vec<u32> = ones(self.words.iter().map(|(starts, _)| *starts)).map(|start| start as u32).collect();
        let mut builder = ClassRowsBuilder::new(self.common);
        let mut changes = changes.iter().peekable();
        for (run, (start, row)) in starts.iter().zip(&self.rows).enumerate() {
            let end = starts.get(run + 1).copied().unwrap_or(u32::MAX);
            let mut rest = *start;
            while let Some((class, changed)) = changes.next_if(|(class, _)| *class < end) {
                if rest < *class {
                    builder.run(rest, *row);
                }
                builder.run(*class, *changed);
                rest = class + 1;
            }
            if rest < end {
                builder.run(rest, *row);
                builder.next = rest;
            }
        }
        builder.finish()
    }

    fn memory_bytes(&self) -> usize {
        size_of_val(&*self.words) + size_of_val(&*self.rows)
    }
}

/// Makes [`ClassRows`].
struct ClassRowsBuilder {
    words: Vec<(u64, u32)>,
    rows: Vec<u32>,
    common: u32,
    /// The first class without a row.
    next: u32,
}

impl ClassRowsBuilder {
    fn new(common: u32) -> Self {
        Self { words: Vec::new(), rows: Vec::new(), common, next: 0 }
    }

    /// Gives rows to classes, ascending; those left out have the common row.
    fn push(&mut self, class: u32, row: u32) {
        if self.next < class {
            self.run(self.next, self.common);
        }
        self.run(class, row);
        self.next = class + 1;
    }

    fn run(&mut self, class: u32, row: u32) {
        if self.rows.last() == Some(&row) {
            return;
        }
        while self.words.len() <= class as usize / 64 {
            self.words.push((0, self.rows.len() as u32));
        }
        self.words[class as usize / 64].0 |= 1 << (class % 64);
        self.rows.push(row);
    }

    fn finish(mut self) -> ClassRows {
        let Self { next, common, .. } = self;
        self.run(next, common);
        // The last run has the common row, as have all classes beyond the last word.
        let by_run = ClassRows { words: self.words.into(), rows: self.rows.into(), common };
        if size_of::<u32>() * next as usize > 2 * by_run.memory_bytes() {
            return by_run;
        }
        ClassRows { words: Box::default(), rows: (0..next).map(|class| by_run.get(class)).collect(), common }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Program {
    application: Option<StepMap>,
    source: Option<ClassRows>,
    destination: Option<ClassRows>,
    source_port: Option<StepMap>,
    /// By point class.
    source_point: Option<ClassRows>,
    destination_point: Option<ClassRows>,
    rows: Rows,
    slots: Box<[Slot]>,
}

impl Program {
    /// The slot that decides: never one that continues.
    ///
    /// Addresses are looked up only where a slot needs them.
    #[inline]
    pub(crate) fn judge<K: Key>(&self, facts: Facts, classes: &AddressClasses<K>, source: K, destination: K) -> Slot {
        if let [only] = &*self.slots {
            return *only;
        }
        let mut rows = [0; MAX_FIELDS];
        let fields = self.rows_of(facts, classes, source, destination, &mut rows);
        let mut from = 0;
        loop {
            let slot = self.first_slot(&rows[..fields], from);
            match slot.outcome {
                Outcome::Continue(next) | Outcome::Log(next) => from = next,
                Outcome::Allow | Outcome::Deny => return slot,
            }
        }
    }

    /// The Log rules that match before the slot that decides.
    pub(crate) fn logged<K: Key>(
        &self,
        facts: Facts,
        classes: &AddressClasses<K>,
        source: K,
        destination: K,
    ) -> LoggedRules {
        let mut rows = [0; MAX_FIELDS];
        let fields = self.rows_of(facts, classes, source, destination, &mut rows);
        let mut logged = LoggedRules::NONE;
        let mut from = 0;
        loop {
            let slot = self.first_slot(&rows[..fields], from);
            match slot.outcome {
                Outcome::Log(next) if logged.add(slot.rule) => from = next,
                Outcome::Continue(next) => from = next,
                Outcome::Log(_) | Outcome::Allow | Outcome::Deny => return logged,
            }
        }
    }

    /// The first slot from `from` on that is in all of these rows.
    #[inline]
    fn first_slot(&self, rows: &[u32], from: u32) -> Slot {
        let last = self.slots.len() - 1;
        self.slots[self.rows.first_common(rows, from).map_or(last, |first| first as usize)]
    }

    /// Puts the rows that a packet's fields give into `rows`, and says how many. They are not returned: what has just been
    /// written in small pieces is slow to be copied in large ones.
    #[inline]
    fn rows_of<K: Key>(
        &self,
        facts: Facts,
        classes: &AddressClasses<K>,
        source: K,
        destination: K,
        rows: &mut [u32; MAX_FIELDS],
    ) -> usize {
        let mut fields = 0;
        let mut push = |row: u32| {
            rows[fields] = row;
            fields += 1;
        };
        if self.source.is_some() || self.source_point.is_some() {
            let class = classes.class(source);
            if let Some(field) = &self.source {
                push(field.get(class));
            }
            if let Some(field) = &self.source_point {
                push(field.get(classes.point_class(class, facts.source_point())));
            }
        }
        if self.destination.is_some() || self.destination_point.is_some() {
            let class = classes.class(destination);
            if let Some(field) = &self.destination {
                push(field.get(class));
            }
            if let Some(field) = &self.destination_point {
                push(field.get(classes.point_class(class, facts.destination_point())));
            }
        }
        if let Some(field) = &self.application {
            push(field.get(facts.application));
        }
        if let Some(field) = &self.source_port {
            push(field.get(facts.source_port));
        }
        fields
    }

    /// The program with the rows of these classes made again, where it is one of rows of a word. `fields` has the tests of all
    /// slots, the classes and those that changed, of source and destination, and of their points.
    pub(crate) fn reclassed(&self, fields: [(Vec<Test>, &Classes, &[u32]); 4]) -> Option<(Self, usize)> {
        let Rows::Words(words) = &self.rows else { return None };
        if words.len() > MAX_PATCHED_ROWS {
            return None;
        }
        let mut words = words.to_vec();
        let [source, destination, source_point, destination_point] = &fields;
        let mut patch = |rows: &Option<ClassRows>, (tests, classes, changed): &(Vec<Test>, &Classes, &[u32])| {
            let rows = rows.as_ref()?;
            let mut row_of = |class: &u32| {
                let signature = classes.signature(*class);
                let of_rows = &tests[..tests.len() - 1];
                let word = of_rows.iter().rev().fold(0, |word, test| word << 1 | u64::from(test.holds(signature)));
                let known = words.iter().position(|known| *known == word);
                let row = known.unwrap_or_else(|| {
                    words.push(word);
                    words.len() - 1
                });
                (*class, row as u32)
            };
            Some(rows.with(&changed.iter().map(&mut row_of).collect::<Vec<_>>()))
        };
        let program = Self {
            application: self.application.clone(),
            source: patch(&self.source, source),
            destination: patch(&self.destination, destination),
            source_port: self.source_port.clone(),
            source_point: patch(&self.source_point, source_point),
            destination_point: patch(&self.destination_point, destination_point),
            rows: Rows::Words(Box::default()),
            slots: self.slots.clone(),
        };
        let count = words.len();
        Some((Self { rows: Rows::Words(words.into()), ..program }, count))
    }

    /// The only slot, if all packets are judged alike.
    pub(crate) fn only(&self) -> Option<Slot> {
        match &*self.slots {
            [only] => Some(*only),
            _ => None,
        }
    }

    /// Memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        let steps = |field: &Option<StepMap>| field.as_ref().map_or(0, StepMap::memory_bytes);
        let classes = |field: &Option<ClassRows>| field.as_ref().map_or(0, ClassRows::memory_bytes);
        size_of::<Self>()
            + steps(&self.application)
            + steps(&self.source_port)
            + classes(&self.source)
            + classes(&self.destination)
            + classes(&self.source_point)
            + classes(&self.destination_point)
            + self.rows.memory_bytes()
            + size_of_val(&*self.slots)
    }
}

/// What one slot asks of a field that is tested by membership in a set of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Test {
    /// Nothing.
    Any,
    /// The value is in this set.
    In(u32),
    /// The value is not in this set.
    NotIn(u32),
}

impl Test {
    /// Whether what is in these sets, ascending, passes.
    fn holds(self, signature: &[u32]) -> bool {
        match self {
            Self::Any => true,
            Self::In(set) => signature.binary_search(&set).is_ok(),
            Self::NotIn(set) => signature.binary_search(&set).is_err(),
        }
    }
}

/// More work than is allowed for one program.
#[derive(Debug)]
pub(crate) struct ProgramTooLarge;

/// Makes the parts of a [`Program`] and keeps count of their size.
pub(crate) struct ProgramBuilder<'scratch> {
    slots: Vec<Slot>,
    rows: RowsBuilder,
    /// Row words and row edits that may still be made.
    budget: usize,
    program: Program,
    /// A word for each class, lent from program to program.
    words: &'scratch mut Vec<u64>,
}

impl<'scratch> ProgramBuilder<'scratch> {
    /// For these slots, at least one and at most [`crate::rows::MAX_BITS`]; `budget` bounds rows (in words) and time.
    pub(crate) fn new(slots: Vec<Slot>, budget: usize, words: &'scratch mut Vec<u64>) -> Self {
        let rows = RowsBuilder::new(slots.len() - 1);
        let program = Program {
            application: None,
            source: None,
            destination: None,
            source_port: None,
            source_point: None,
            destination_point: None,
            rows: Rows::Words(Box::default()),
            slots: Box::default(),
        };
        Self { slots, rows, budget, program, words }
    }

    /// Sets the rows by source class: `tests` by slot.
    pub(crate) fn source_classes(&mut self, tests: &[Test], classes: &Classes) -> Result<(), ProgramTooLarge> {
        self.program.source = self.by_class(tests, classes)?;
        Ok(())
    }

    /// Sets the rows by destination class, like [`ProgramBuilder::source_classes`].
    pub(crate) fn destination_classes(&mut self, tests: &[Test], classes: &Classes) -> Result<(), ProgramTooLarge> {
        self.program.destination = self.by_class(tests, classes)?;
        Ok(())
    }

    /// Sets the rows by point class of the source, like [`ProgramBuilder::source_classes`].
    pub(crate) fn source_points(&mut self, tests: &[Test], classes: &Classes) -> Result<(), ProgramTooLarge> {
        self.program.source_point = self.by_class(tests, classes)?;
        Ok(())
    }

    /// Sets the rows by point class of the destination, like [`ProgramBuilder::source_classes`].
    pub(crate) fn destination_points(&mut self, tests: &[Test], classes: &Classes) -> Result<(), ProgramTooLarge> {
        self.program.destination_point = self.by_class(tests, classes)?;
        Ok(())
    }

    /// Sets the rows by application: the set of each slot (`None`: any), and what is in a set.
    pub(crate) fn applications<'set>(
        &mut self,
        sets: &[Option<u32>],
        ranges_of: impl Fn(u32) -> &'set Ranges,
    ) -> Result<(), ProgramTooLarge> {
        self.program.application = self.by_range(sets, ranges_of, APPLICATION_BITS)?;
        Ok(())
    }

    /// Sets the rows by source port, like [`ProgramBuilder::applications`].
    pub(crate) fn source_ports<'set>(
        &mut self,
        sets: &[Option<u32>],
        ranges_of: impl Fn(u32) -> &'set Ranges,
    ) -> Result<(), ProgramTooLarge> {
        self.program.source_port = self.by_range(sets, ranges_of, SOURCE_PORT_BITS)?;
        Ok(())
    }

    /// The program, and the words that its rows take.
    pub(crate) fn finish(self) -> (Program, usize) {
        let words = self.rows.words();
        (Program { rows: self.rows.finish(), slots: self.slots.into(), ..self.program }, words)
    }

    /// Of what is told of each slot, that of those that are in rows.
    fn without_last<'all, T>(&self, of_slots: &'all [T]) -> &'all [T] {
        &of_slots[..self.slots.len() - 1]
    }

    fn spend(&mut self, amount: usize) -> Result<(), ProgramTooLarge> {
        self.budget = self.budget.checked_sub(amount).ok_or(ProgramTooLarge)?;
        Ok(())
    }

    fn add_row(&mut self, row: &DenseRow) -> Result<u32, ProgramTooLarge> {
        let number = self.rows.add(row);
        self.spend(self.rows.last_words())?;
        Ok(number)
    }

    /// Rows of a field whose values are told apart by membership in sets.
    ///
    /// The common row holds for classes in no set; each other class's row differs from it exactly in the slots that
    /// name one of the class's sets.
    fn by_class(&mut self, tests: &[Test], classes: &Classes) -> Result<Option<ClassRows>, ProgramTooLarge> {
        let tests = self.without_last(tests);
        if tests.iter().all(|test| *test == Test::Any) {
            return Ok(None);
        }
        if tests.len() <= 64 { self.by_class_in_words(tests, classes) } else { self.by_class_in_rows(tests, classes) }
            .map(Some)
    }

    /// For rows of one word: a word for each class, flipped set by set.
    fn by_class_in_words(&mut self, tests: &[Test], classes: &Classes) -> Result<ClassRows, ProgramTooLarge> {
        let mut common = 0u64;
        let mut slots_of: Vec<(u32, u64)> = Vec::with_capacity(tests.len());
        for (slot, test) in tests.iter().enumerate() {
            if !matches!(test, Test::In(_)) {
                common |= 1 << slot;
            }
            if let Test::In(set) | Test::NotIn(set) = test {
                slots_of.push((*set, 1 << slot));
            }
        }
        slots_of.sort_unstable();
        let mut words = std::mem::take(self.words);
        words.clear();
        words.resize(classes.len(), common);
        for slots in slots_of.chunk_by(|a, b| a.0 == b.0) {
            let flipped = slots.iter().fold(0, |all, (_, slot)| all | slot);
            let classes = classes.of_set(slots[0].0);
            self.spend(classes.len())?;
            classes.iter().for_each(|class| words[*class as usize] ^= flipped);
        }
        self.spend(words.len())?;
        let common_row = self.rows.add_word(common);
        let mut builder = ClassRowsBuilder::new(common_row);
        let (mut last, mut row) = (common, common_row);
        for (class, word) in words.iter().enumerate() {
            if *word != last {
                (last, row) = (*word, self.rows.add_word(*word));
            }
            if *word != common {
                builder.push(class as u32, row);
            }
        }
        *self.words = words;
        Ok(builder.finish())
    }

    /// For rows of any length.
    fn by_class_in_rows(&mut self, tests: &[Test], classes: &Classes) -> Result<ClassRows, ProgramTooLarge> {
        let mut common = DenseRow::zeros(tests.len());
        let mut slots_of: HashMap<u32, SlotsOfSet> = HashMap::new();
        for (slot, test) in tests.iter().enumerate() {
            if !matches!(test, Test::In(_)) {
                common.flip(slot as u32);
            }
            if let Test::In(set) | Test::NotIn(set) = test {
                slots_of.entry(*set).or_default().list.push(slot as u32);
            }
        }
        let mut memberships: Vec<(u32, u32)> = Vec::new();
        for (set, slots) in &mut slots_of {
            slots.finish(tests.len());
            let classes = classes.of_set(*set);
            self.spend(classes.len())?;
            memberships.extend(classes.iter().map(|class| (*class, *set)));
        }
        memberships.sort_unstable();

        let common_row = self.add_row(&common)?;
        let mut builder = ClassRowsBuilder::new(common_row);
        let mut row = common.clone();
        for of_class in memberships.chunk_by(|a, b| a.0 == b.0) {
            row.copy_from(&common);
            for (_, set) in of_class {
                self.spend(slots_of[set].flip_in(&mut row))?;
            }
            builder.push(of_class[0].0, self.add_row(&row)?);
        }
        Ok(builder.finish())
    }

    /// Rows of a field whose values are told apart by ranges.
    fn by_range<'set>(
        &mut self,
        sets: &[Option<u32>],
        ranges_of: impl Fn(u32) -> &'set Ranges,
        bits: u32,
    ) -> Result<Option<StepMap>, ProgramTooLarge> {
        let sets = self.without_last(sets);
        if sets.iter().all(Option::is_none) {
            return Ok(None);
        }
        let starts = if sets.len() <= 64 {
            self.by_range_in_words(sets, ranges_of, bits)?
        } else {
            self.by_range_in_rows(sets, ranges_of, bits)?
        };
        Ok(Some(StepMap::new(&starts)))
    }

    /// For rows of one word: where each row starts to hold.
    fn by_range_in_words<'set>(
        &mut self,
        sets: &[Option<u32>],
        ranges_of: impl Fn(u32) -> &'set Ranges,
        bits: u32,
    ) -> Result<Vec<(u32, u32)>, ProgramTooLarge> {
        let mut word = 0u64;
        let mut slots_of: Vec<(u32, u64)> = Vec::with_capacity(sets.len());
        for (slot, set) in sets.iter().enumerate() {
            match set {
                None => word |= 1 << slot,
                Some(set) => slots_of.push((*set, 1 << slot)),
            }
        }
        slots_of.sort_unstable();
        // A set's slots have a bit from where it begins to where it ends.
        let mut flips: Vec<(u128, u64)> = vec![(0, 0)];
        for slots in slots_of.chunk_by(|a, b| a.0 == b.0) {
            let of_set = slots.iter().fold(0, |all, (_, slot)| all | slot);
            for (low, high) in ranges_of(slots[0].0).iter() {
                flips.push((low, of_set));
                if high < (1 << bits) - 1 {
                    flips.push((high + 1, of_set));
                }
            }
        }
        self.spend(flips.len())?;
        flips.sort_unstable();
        let mut starts: Vec<(u32, u32)> = Vec::with_capacity(flips.len());
        for flips in flips.chunk_by(|a, b| a.0 == b.0) {
            word = flips.iter().fold(word, |word, (_, flip)| word ^ flip);
            let row = self.rows.add_word(word);
            if starts.last().is_none_or(|(_, last)| *last != row) {
                starts.push((flips[0].0 as u32, row));
            }
        }
        Ok(starts)
    }

    /// For rows of any length.
    fn by_range_in_rows<'set>(
        &mut self,
        sets: &[Option<u32>],
        ranges_of: impl Fn(u32) -> &'set Ranges,
        bits: u32,
    ) -> Result<Vec<(u32, u32)>, ProgramTooLarge> {
        let mut common = DenseRow::zeros(sets.len());
        let mut local: HashMap<u32, usize> = HashMap::new();
        let mut ranges: Vec<&Ranges> = Vec::new();
        let mut slots_of: Vec<SlotsOfSet> = Vec::new();
        for (slot, set) in sets.iter().enumerate() {
            match set {
                None => common.flip(slot as u32),
                Some(set) => {
                    let number = *local.entry(*set).or_insert_with(|| {
                        ranges.push(ranges_of(*set));
                        slots_of.push(SlotsOfSet::default());
                        ranges.len() - 1
                    });
                    slots_of[number].list.push(slot as u32);
                }
            }
        }
        slots_of.iter_mut().for_each(|slots| slots.finish(sets.len()));
        let partition =
            Partition::new(&ranges, (1 << bits) - 1, self.budget).map_err(|TooManyMemberships| ProgramTooLarge)?;
        let mut row = common.clone();
        let mut rows = Vec::with_capacity(partition.classes.len());
        for class in 0..partition.classes.len() as u32 {
            row.copy_from(&common);
            for set in partition.classes.signature(class) {
                self.spend(slots_of[*set as usize].flip_in(&mut row))?;
            }
            rows.push(self.add_row(&row)?);
        }
        let mut starts: Vec<(u32, u32)> = Vec::with_capacity(partition.intervals.len());
        for (start, class) in &partition.intervals {
            let row = rows[*class as usize];
            if starts.last().is_none_or(|(_, last)| *last != row) {
                starts.push((*start as u32, row));
            }
        }
        Ok(starts)
    }
}

/// The slots that name one set; as a row too where that is the shorter form.
#[derive(Default)]
struct SlotsOfSet {
    list: Vec<u32>,
    row: Option<DenseRow>,
}

impl SlotsOfSet {
    fn finish(&mut self, slots: usize) {
        if self.list.len() > slots / 64 {
            let mut row = DenseRow::zeros(slots);
            self.list.iter().for_each(|slot| row.flip(*slot));
            self.row = Some(row);
        }
    }

    /// Flips the slots in `row` and says how much work that was.
    fn flip_in(&self, row: &mut DenseRow) -> usize {
        match &self.row {
            Some(flips) => row.flip_all(flips),
            None => {
                self.list.iter().for_each(|slot| row.flip(*slot));
                self.list.len()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;
    use weir_packet::Ports;

    use super::*;

    fn facts(protocol: Protocol, source: u16, destination: u16) -> Facts {
        let any = Ipv4Addr::UNSPECIFIED;
        Facts::new(&FlowKey { src: any, dst: any, ports: Ports::new(source, destination), protocol })
    }

    #[test]
    fn echo_identifiers_are_no_codes() {
        assert_eq!(facts(Protocol::ICMP, 77, 8), Facts { application: 0x01_0800, source_port: NO_PORT });
        assert_eq!(facts(Protocol::ICMP, 77, 5 << 8 | 8), Facts { application: 0x01_0805, source_port: NO_PORT });
        assert_eq!(facts(Protocol::ICMP, 4, 3), Facts { application: 0x01_0304, source_port: NO_PORT });
        assert_eq!(facts(Protocol::ICMPV6, 77, 129), Facts { application: 0x3a_8100, source_port: NO_PORT });
        let any = Ipv6Addr::UNSPECIFIED;
        let key = FlowKey { src: any, dst: any, ports: Ports::new(1, 1), protocol: Protocol::ICMPV6 };
        assert_eq!(Facts::new(&key).application, 0x3a_0101);
    }

    #[test]
    fn only_tcp_udp_and_sctp_have_ports() {
        assert_eq!(facts(Protocol::TCP, 1, 2), Facts { application: 0x06_0002, source_port: 1 });
        assert_eq!(facts(Protocol::SCTP, 0, 2), Facts { application: 0x84_0002, source_port: 0 });
        assert_eq!(facts(Protocol(47), 1, 2), Facts { application: 0x2f_0000, source_port: NO_PORT });
        assert_eq!(facts(Protocol(47), 1, 2).source_point(), 0);
    }

    #[test]
    fn class_rows_count_across_words() {
        let mut builder = ClassRowsBuilder::new(9);
        for (class, row) in [(1, 10), (63, 11), (64, 12), (65, 12), (200, 13)] {
            builder.push(class, row);
        }
        let rows = builder.finish();
        assert!(!rows.words.is_empty(), "few runs");
        for (class, row) in [
            (0, 9),
            (1, 10),
            (2, 9),
            (62, 9),
            (63, 11),
            (64, 12),
            (65, 12),
            (66, 9),
            (200, 13),
            (201, 9),
            (u32::MAX, 9),
        ] {
            assert_eq!(rows.get(class), row, "class {class}");
        }
        assert_eq!(ClassRowsBuilder::new(4).finish().get(0), 4);
    }

    proptest! {
        #[test]
        fn changed_class_rows_are_as_if_made_so(
            rows in proptest::collection::btree_map(0u32..300, 0u32..4, 0..100),
            changes in proptest::collection::btree_map(0u32..400, 0u32..4, 0..20),
        ) {
            let mut builder = ClassRowsBuilder::new(0);
            rows.iter().for_each(|(class, row)| builder.push(*class, *row));
            let changed = builder.finish().with(&changes.iter().map(|(class, row)| (*class, *row)).collect::<Vec<_>>());
            for class in (0..500).chain([u32::MAX]) {
                let expected = changes.get(&class).or(rows.get(&class)).copied().unwrap_or(0);
                prop_assert_eq!(changed.get(class), expected, "class {}", class);
            }
        }
    }

    #[test]
    fn class_rows_of_many_runs_are_by_class() {
        let mut builder = ClassRowsBuilder::new(9);
        (1..200).step_by(2).for_each(|class| builder.push(class, 1000 + class));
        let rows = builder.finish();
        assert!(rows.words.is_empty(), "many runs");
        for class in (0..202).chain([u32::MAX]) {
            let expected = if class % 2 == 1 && class < 200 { 1000 + class } else { 9 };
            assert_eq!(rows.get(class), expected, "class {class}");
        }
    }
}
