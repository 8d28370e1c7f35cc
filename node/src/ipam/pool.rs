//! Which address a pod gets.
//!
//! A pod gets one address of each family that the node has ranges for, or none at all. First come those that nobody has had (or nobody
//! that is remembered), lowest first; then the one that was given back first, once it has cooled down: packets of flows with the old pod
//! may be under way for a while, and must not reach the new one. An address that is still cooling is never given, also if there
//! is no other: runtimes try again, so a pod starts later, but never with another's flows.
//!
//! Left out are the first and last address of an IPv4 range (RFC 1122, 3.2.1.3), unless it has two or one (RFC 3021), the first of an
//! IPv6 range (the routers' anycast address, RFC 4291, 2.6.1; not of a /127, RFC 6164), and what the owner says (tunnels' addresses).
//!
//! The clock is a parameter: milliseconds since 1970.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;

/// Addresses per family of which is remembered when they were given back. Beyond it, those that have cooled down are as good as new.
pub const REMEMBERED: usize = 1024;

/// No address can be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no {family} address is free in {ranges}: {in_use} in use, {cooling} cooling down after another pod{next}",
    next = .next_in.map_or(String::new(), |next| format!(", the next is free in {} s", next.as_secs_f64().ceil()))
)]
pub struct Exhausted {
    /// "IPv4" or "IPv6".
    pub family: &'static str,
    /// The ranges of that family.
    pub ranges: String,
    /// Addresses that pods have.
    pub in_use: usize,
    /// Addresses that will be free.
    pub cooling: usize,
    /// When the first of those is.
    pub next_in: Option<Duration>,
}

/// An address that was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// The address.
    pub address: IpAddr,
    /// When the pod that had it last gave it back, if that is remembered.
    pub freed: Option<u64>,
}

/// Addresses of one range that can be given, as numbers.
#[derive(Clone, Debug)]
struct Range {
    net: IpNet,
    first: u128,
    last: u128,
    /// All below it are used, remembered or left out.
    next: u128,
}

/// The addresses of a node.
#[derive(Clone, Debug)]
pub struct Pool {
    ranges: Vec<Range>,
    left_out: BTreeSet<IpAddr>,
    used: BTreeSet<IpAddr>,
    /// When each was given back.
    freed: BTreeMap<IpAddr, u64>,
    cool_down_ms: u64,
}

impl Pool {
    /// A pool without ranges.
    pub fn new(cool_down: Duration) -> Self {
        Self {
            ranges: Vec::new(),
            left_out: BTreeSet::new(),
            used: BTreeSet::new(),
            freed: BTreeMap::new(),
            cool_down_ms: u64::try_from(cool_down.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// From which ranges addresses come from now on, in this order within a family; the family of the first range is the pods' first one.
    /// What was given stays given, and what cools down cools down.
    pub fn set_ranges(&mut self, ranges: &[IpNet], left_out: impl IntoIterator<Item = IpAddr>) {
        self.ranges.clear();
        self.left_out = left_out.into_iter().collect();
        for net in ranges.iter().map(IpNet::trunc) {
            if !self.ranges.iter().any(|range| range.net.contains(&net)) {
                let (first, last) = usable(&net);
                self.ranges.push(Range { net, first, last, next: first });
            }
        }
    }

    /// The ranges.
    pub fn ranges(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.ranges.iter().map(|range| range.net)
    }

    /// One address of each family.
    ///
    /// # Errors
    /// Where a family has none; then nothing is given. Without any range there are no families: the list is empty.
    pub fn allocate(&mut self, now: u64) -> Result<Vec<Given>, Exhausted> {
        let mut families: Vec<bool> = Vec::new();
        for range in &self.ranges {
            if !families.contains(&range.net.addr().is_ipv6()) {
                families.push(range.net.addr().is_ipv6());
            }
        }
        let chosen: Vec<_> = families.iter().map(|v6| self.choose(*v6, now)).collect::<Result<_, _>>()?;
        self.used.extend(&chosen);
        Ok(chosen.into_iter().map(|address| Given { address, freed: self.freed.remove(&address) }).collect())
    }

    fn choose(&mut self, v6: bool, now: u64) -> Result<IpAddr, Exhausted> {
        for range in self.ranges.iter_mut().filter(|range| range.net.addr().is_ipv6() == v6) {
            while range.next <= range.last {
                let address = address(range.next, v6);
                if !(self.used.contains(&address)
                    || self.freed.contains_key(&address)
                    || self.left_out.contains(&address))
                {
                    return Ok(address);
                }
                // Behind the very last address of all there is none.
                let Some(next) = range.next.checked_add(1) else { break };
                range.next = next;
            }
        }
        let oldest = self.freed_in(v6).min_by_key(|(address, at)| (*at, *address));
        match oldest {
            Some((address, at)) if at.saturating_add(self.cool_down_ms) <= now => Ok(address),
            _ => Err(Exhausted {
                family: if v6 { "IPv6" } else { "IPv4" },
                ranges: self
                    .ranges()
                    .filter(|net| net.addr().is_ipv6() == v6)
                    .map(|net| net.to_string())
                    .collect::<Vec<_>>()
                    .join(", "),
                in_use: self.used.iter().filter(|address| address.is_ipv6() == v6).count(),
                cooling: self.freed_in(v6).count(),
                next_in: oldest
                    .map(|(_, at)| Duration::from_millis(at.saturating_add(self.cool_down_ms).saturating_sub(now))),
            }),
        }
    }

    /// Remembered addresses that could be given.
    fn freed_in(&self, v6: bool) -> impl Iterator<Item = (IpAddr, u64)> + '_ {
        self.freed
            .iter()
            .map(|(address, at)| (*address, *at))
            .filter(move |(address, _)| address.is_ipv6() == v6 && self.can_be_given(address))
    }

    /// Whether an address lies in a range and is not left out.
    pub fn can_be_given(&self, address: &IpAddr) -> bool {
        let number = number(address);
        let inside = |range: &Range| range.net.contains(address) && (range.first..=range.last).contains(&number);
        !self.left_out.contains(address) && self.ranges.iter().any(inside)
    }

    /// Marks an address as given, as a record says. Whether it was not already.
    pub fn take(&mut self, address: IpAddr) -> bool {
        self.freed.remove(&address);
        self.used.insert(address)
    }

    /// A pod that had the address is gone.
    pub fn free(&mut self, address: IpAddr, now: u64) {
        self.used.remove(&address);
        self.freed.insert(address, now);
    }

    /// An address that was given, and that no pod ever had: it is as it was before.
    pub fn give_back(&mut self, given: Given) {
        if !self.used.remove(&given.address) {
            return;
        }
        match given.freed {
            Some(at) => {
                self.freed.insert(given.address, at);
            }
            None => self.look_again_from(&given.address),
        }
    }

    /// What was given back, as far as that is remembered, and when.
    pub fn freed(&self) -> impl Iterator<Item = (IpAddr, u64)> + '_ {
        self.freed.iter().map(|(address, at)| (*address, *at))
    }

    /// Forgets what is remembered in excess of [`REMEMBERED`] and has cooled down: the oldest, which are returned.
    pub fn forget(&mut self, now: u64) -> Vec<IpAddr> {
        let mut forgotten = Vec::new();
        for v6 in [false, true] {
            let mut all: Vec<_> = self.freed.iter().filter(|(address, _)| address.is_ipv6() == v6).collect();
            if all.len() <= REMEMBERED {
                continue;
            }
            all.sort_by_key(|(address, at)| (**at, **address));
            let surplus = all.len() - REMEMBERED;
            let cold = all.iter().take(surplus).filter(|(_, at)| at.saturating_add(self.cool_down_ms) <= now);
            forgotten.extend(cold.map(|(address, _)| **address));
        }
        for address in &forgotten {
            self.freed.remove(address);
            self.look_again_from(address);
        }
        forgotten
    }

    fn look_again_from(&mut self, address: &IpAddr) {
        for range in self.ranges.iter_mut().filter(|range| range.net.contains(address)) {
            range.next = range.next.min(number(address).max(range.first));
        }
    }

    /// Addresses of a range that can be given at all.
    pub fn size_of(net: &IpNet) -> u128 {
        let (first, last) = usable(net);
        (last - first).saturating_add(1)
    }
}

/// The first and the last address of a range that can be given.
fn usable(net: &IpNet) -> (u128, u128) {
    let (first, last) = (number(&net.network()), number(&net.broadcast()));
    match (net, net.max_prefix_len() - net.prefix_len()) {
        (_, 0 | 1) => (first, last),
        (IpNet::V4(_), _) => (first + 1, last - 1),
        (IpNet::V6(_), _) => (first + 1, last),
    }
}

fn number(address: &IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(*address).into(),
        IpAddr::V6(address) => (*address).into(),
    }
}

fn address(number: u128, v6: bool) -> IpAddr {
    if v6 {
        return Ipv6Addr::from(number).into();
    }
    // Numbers of IPv4 ranges have 32 bits.
    Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into()
}
