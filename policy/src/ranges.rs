//! Sets of numbers as sorted ranges, for compile time: addresses, ports and protocols all become these.

use ipnet::IpNet;

use crate::fingerprint::Fingerprint;

/// A set of numbers of at most 128 bits.
///
/// Invariant: inclusive ranges, ascending, with a gap of at least one number between two of them; so equal sets are
/// equal values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ranges(Vec<(u128, u128)>);

impl Ranges {
    /// The union of inclusive ranges in any order; a range that ends before it starts is empty.
    pub(crate) fn new(mut ranges: Vec<(u128, u128)>) -> Self {
        ranges.retain(|(low, high)| low <= high);
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (low, high) in ranges {
            match merged.last_mut() {
                Some(last) if low <= last.1.saturating_add(1) => last.1 = last.1.max(high),
                _ => merged.push((low, high)),
            }
        }
        merged.shrink_to_fit();
        Self(merged)
    }

    /// Every number up to `max`.
    pub(crate) fn all(max: u128) -> Self {
        Self(vec![(0, max)])
    }

    /// The addresses of the CIDRs of `family`.
    pub(crate) fn of_nets<'net>(nets: impl IntoIterator<Item = &'net IpNet>, family: Family) -> Self {
        Self::new(nets.into_iter().filter_map(|net| family.range(net)).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is every number up to `max`.
    pub(crate) fn is_all(&self, max: u128) -> bool {
        self.0 == [(0, max)]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u128, u128)> {
        self.0.iter().copied()
    }

    /// How many ranges it has.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The numbers that are in both.
    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let (mut mine, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut both = Vec::new();
        while let (Some(a), Some(b)) = (mine.peek(), theirs.peek()) {
            let (low, high) = (a.0.max(b.0), a.1.min(b.1));
            if low <= high {
                both.push((low, high));
            }
            if a.1 < b.1 {
                mine.next();
            } else {
                theirs.next();
            }
        }
        Self(both)
    }

    /// The numbers that are in this and not in `other`.
    pub(crate) fn difference(&self, other: &Self) -> Self {
        match self.0.last() {
            Some((_, max)) => self.intersection(&other.complement(*max)),
            None => Self::default(),
        }
    }

    /// The numbers up to `max` that are not in this.
    pub(crate) fn complement(&self, max: u128) -> Self {
        let mut gaps = Vec::with_capacity(self.0.len() + 1);
        let mut next = Some(0);
        for (low, high) in self.iter().take_while(|(low, _)| *low <= max) {
            if let Some(from) = next
                && from < low
            {
                gaps.push((from, low - 1));
            }
            next = high.checked_add(1).filter(|from| *from <= max);
        }
        if let Some(from) = next {
            gaps.push((from, max));
        }
        Self(gaps)
    }

    /// A number that equal sets share, in every process.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut fingerprint = Fingerprint::new(self.0.len() as u64);
        for (low, high) in self.iter() {
            for word in [low as u64, (low >> 64) as u64, high as u64, (high >> 64) as u64] {
                fingerprint.add(word);
            }
        }
        fingerprint.value()
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

impl Family {
    /// Both, in the order of their numbers.
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The highest address as a number.
    pub(crate) const fn max(self) -> u128 {
        match self {
            Self::V4 => u32::MAX as u128,
            Self::V6 => u128::MAX,
        }
    }

    /// As rules write it.
    pub(crate) const fn version(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }

    /// The addresses of `net`, if it is of this family.
    pub(crate) fn range(self, net: &IpNet) -> Option<(u128, u128)> {
        match (self, net) {
            (Self::V4, IpNet::V4(net)) => {
                Some((u128::from(net.network().to_bits()), u128::from(net.broadcast().to_bits())))
            }
            (Self::V6, IpNet::V6(net)) => Some((net.network().to_bits(), net.broadcast().to_bits())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_and_overlaps_merge() {
        assert_eq!(Ranges::new(vec![(5, 9), (0, 1), (2, 3), (8, 12), (20, 19)]).0, [(0, 3), (5, 12)]);
    }

    #[test]
    fn the_ends_of_the_domain_are_no_special_case() {
        let all = Ranges::all(u128::MAX);
        assert!(all.complement(u128::MAX).is_empty());
        assert_eq!(Ranges::default().complement(u128::MAX), all);
        let last = Ranges::new(vec![(u128::MAX, u128::MAX)]);
        assert_eq!(last.complement(u128::MAX).0, [(0, u128::MAX - 1)]);
        assert_eq!(all.difference(&last).0, [(0, u128::MAX - 1)]);
    }

    #[test]
    fn host_bits_are_masked_off() {
        let net: IpNet = "10.1.2.3/24".parse().unwrap();
        assert_eq!(Family::V4.range(&net), Some((0x0a01_0200, 0x0a01_02ff)));
        assert_eq!(Family::V6.range(&net), None);
    }

    proptest! {
        #[test]
        fn set_operations_agree_with_membership(
            a in proptest::collection::vec((0u128..40, 0u128..40), 0..6),
            b in proptest::collection::vec((0u128..40, 0u128..40), 0..6),
        ) {
            let (a, b) = (Ranges::new(a), Ranges::new(b));
            let has = |set: &Ranges, number: u128| set.iter().any(|(low, high)| (low..=high).contains(&number));
            let (both, only, outside) = (a.intersection(&b), a.difference(&b), a.complement(50));
            for number in 0..=50 {
                prop_assert_eq!(has(&both, number), has(&a, number) && has(&b, number));
                prop_assert_eq!(has(&only, number), has(&a, number) && !has(&b, number));
                prop_assert_eq!(has(&outside, number), !has(&a, number));
            }
            for set in [both, only, outside] {
                prop_assert_eq!(&Ranges::new(set.0.clone()), &set, "canonical");
            }
        }
    }
}
