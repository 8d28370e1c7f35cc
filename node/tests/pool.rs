//! The pool beside a dull twin: a list of all addresses in which it looks for the one that the rules say.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use proptest::prelude::*;
use weir_node::ipam::{Given, Pool};

const COOL_DOWN_MS: u64 = 60_000;

/// What the twin knows of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    New,
    Used { freed: Option<u64> },
    Freed(u64),
}

/// All addresses that can be given, range by range.
#[derive(Clone, Debug)]
struct Twin(Vec<(IpAddr, Slot)>);

impl Twin {
    fn new(ranges: &[IpNet], left_out: &[IpAddr]) -> Self {
        let mut all = Vec::new();
        for range in ranges {
            let whole = range.max_prefix_len() - range.prefix_len() <= 1;
            let hosts: Vec<IpAddr> = match range {
                IpNet::V4(net) => {
                    let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                    (first..=last).map(|number| IpAddr::V4(number.into())).collect()
                }
                IpNet::V6(net) => {
                    let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
                    (first..=last).map(|number| IpAddr::V6(number.into())).collect()
                }
            };
            for (index, address) in hosts.iter().enumerate() {
                let network = index == 0 && !whole;
                let broadcast = index == hosts.len() - 1 && !whole && address.is_ipv4();
                if !network && !broadcast && !left_out.contains(address) {
                    all.push((*address, Slot::New));
                }
            }
        }
        Self(all)
    }

    fn choose(&self, v6: bool, now: u64) -> Option<IpAddr> {
        let family = || self.0.iter().filter(|(address, _)| address.is_ipv6() == v6);
        if let Some((address, _)) = family().find(|(_, slot)| *slot == Slot::New) {
            return Some(*address);
        }
        let freed = family().filter_map(|(address, slot)| match slot {
            Slot::Freed(at) => Some((*at, *address)),
            _ => None,
        });
        freed.min().filter(|(at, _)| at + COOL_DOWN_MS <= now).map(|(_, address)| address)
    }

    fn slot(&mut self, address: IpAddr) -> &mut Slot {
        &mut self.0.iter_mut().find(|(a, _)| *a == address).expect("a known address").1
    }

    fn allocate(&mut self, families: &[bool], now: u64) -> Option<Vec<IpAddr>> {
        let chosen: Vec<_> = families.iter().map(|v6| self.choose(*v6, now)).collect::<Option<_>>()?;
        for address in &chosen {
            let slot = self.slot(*address);
            let freed = if let Slot::Freed(at) = slot { Some(*at) } else { None };
            *slot = Slot::Used { freed };
        }
        Some(chosen)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate,
    Free(prop::sample::Index),
    GiveBack(prop::sample::Index),
    Wait(u64),
    /// A new pool that is told what is known, as at a start.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Allocate),
        3 => any::<prop::sample::Index>().prop_map(Step::Free),
        1 => any::<prop::sample::Index>().prop_map(Step::GiveBack),
        2 => (1..70_000u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..120)
}

fn ranges() -> impl Strategy<Value = (Vec<IpNet>, Vec<IpAddr>)> {
    let sets = [
        "10.0.0.0/29",
        "10.0.0.0/30 10.0.1.0/31",
        "10.0.0.4/32",
        "fd00::/126",
        "fd00::10/127 10.0.0.0/29",
        "10.0.0.0/28 fd00::/124",
        "255.255.255.248/29 255.255.255.252/30",
    ];
    let left_out = prop::collection::vec(
        prop::sample::select(vec!["10.0.0.1", "10.0.0.3", "fd00::1", "fd00::2", "255.255.255.250", "192.0.2.1"]),
        0..3,
    );
    (prop::sample::select(sets.to_vec()), left_out).prop_map(|(set, left_out)| {
        let nets = set.split(' ').map(|net| net.parse().unwrap()).collect();
        (nets, left_out.into_iter().map(|address| address.parse().unwrap()).collect())
    })
}

proptest! {
    #[test]
    fn the_pool_gives_what_the_rules_say((ranges, left_out) in ranges(), steps in steps()) {
        // A range within another is no range of its own.
        let mut distinct: Vec<IpNet> = Vec::new();
        for net in &ranges {
            if !distinct.iter().any(|other| other.contains(net)) {
                distinct.push(*net);
            }
        }
        let mut twin = Twin::new(&distinct, &left_out);
        let mut families: Vec<bool> = distinct.iter().map(|net| net.addr().is_ipv6()).collect();
        families.dedup();
        let fresh = || {
            let mut pool = Pool::new(Duration::from_millis(COOL_DOWN_MS));
            pool.set_ranges(&ranges, left_out.iter().copied());
            pool
        };
        let mut pool = fresh();
        let mut now = 1_000_000;
        let mut given: Vec<Vec<Given>> = Vec::new();
        for step in steps {
            match step {
                Step::Allocate => {
                    let expected = twin.allocate(&families, now);
                    match pool.allocate(now) {
                        Ok(got) => {
                            let addresses: Vec<_> = got.iter().map(|given| given.address).collect();
                            prop_assert_eq!(Some(addresses), expected);
                            given.push(got);
                        }
                        Err(exhausted) => {
                            prop_assert_eq!(expected, None, "{}", exhausted);
                            let v6 = exhausted.family == "IPv6";
                            let of = twin.0.iter().filter(|(address, _)| address.is_ipv6() == v6);
                            let used = of.clone().filter(|(_, slot)| matches!(slot, Slot::Used { .. })).count();
                            let cooling: Vec<_> = of
                                .filter_map(|(_, slot)| if let Slot::Freed(at) = slot { Some(*at) } else { None })
                                .collect();
                            prop_assert_eq!((exhausted.in_use, exhausted.cooling), (used, cooling.len()));
                            let next = cooling.iter().min().map(|at| Duration::from_millis(at + COOL_DOWN_MS - now));
                            prop_assert_eq!(exhausted.next_in, next);
                        }
                    }
                }
                Step::Free(index) if !given.is_empty() => {
                    for given in given.swap_remove(index.index(given.len())) {
                        pool.free(given.address, now);
                        *twin.slot(given.address) = Slot::Freed(now);
                    }
                }
                Step::GiveBack(index) if !given.is_empty() => {
                    for given in given.swap_remove(index.index(given.len())) {
                        pool.give_back(given);
                        let slot = twin.slot(given.address);
                        let Slot::Used { freed } = *slot else { panic!("it was used") };
                        *slot = freed.map_or(Slot::New, Slot::Freed);
                    }
                }
                Step::Wait(time) => now += time,
                Step::Restart => {
                    pool = fresh();
                    for (address, slot) in &twin.0 {
                        match slot {
                            Slot::Freed(at) => pool.free(*address, *at),
                            Slot::Used { .. } => prop_assert!(pool.take(*address)),
                            Slot::New => {}
                        }
                    }
                    // A restart remembers that an address is used, and not what it was before.
                    for (_, slot) in &mut twin.0 {
                        if let Slot::Used { freed } = slot {
                            *freed = None;
                        }
                    }
                    for given in given.iter_mut().flatten() {
                        given.freed = None;
                    }
                }
                Step::Free(_) | Step::GiveBack(_) => {}
            }
        }
    }
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut pool = Pool::new(Duration::from_millis(COOL_DOWN_MS));
    pool.set_ranges(&["fd00::/64".parse().unwrap()], []);
    for round in 0..3000 {
        let given = pool.allocate(round).unwrap();
        pool.free(given[0].address, round);
        assert_eq!(pool.forget(round), [] as [IpAddr; 0], "nothing that cools down is forgotten");
    }
    assert_eq!(pool.freed().count(), 3000);
    let forgotten = pool.forget(COOL_DOWN_MS + 3000);
    assert_eq!((forgotten.len(), pool.freed().count()), (3000 - 1024, 1024));
    assert_eq!(forgotten[0], "fd00::1".parse::<IpAddr>().unwrap(), "the oldest go");
    // What is forgotten is as good as new.
    assert_eq!(pool.allocate(COOL_DOWN_MS + 3000).unwrap()[0].address, "fd00::1".parse::<IpAddr>().unwrap());
}

#[test]
fn new_ranges_leave_what_was_given() {
    let mut pool = Pool::new(Duration::from_millis(COOL_DOWN_MS));
    assert_eq!(pool.allocate(0), Ok(vec![]), "no families, no addresses");
    pool.set_ranges(&["10.0.0.0/30".parse().unwrap()], []);
    let first = pool.allocate(0).unwrap();
    pool.set_ranges(&["10.0.0.0/29".parse().unwrap()], []);
    let second = pool.allocate(0).unwrap();
    assert_ne!(first, second);
    pool.set_ranges(&["10.1.0.0/30".parse().unwrap()], []);
    pool.free(first[0].address, 0);
    let third = pool.allocate(COOL_DOWN_MS).unwrap();
    assert_eq!(third[0].address, "10.1.0.1".parse::<IpAddr>().unwrap(), "not one that is in no range any more");
    assert!(!pool.can_be_given(&first[0].address));
}

#[test]
fn the_very_last_addresses_are_given_once() {
    for (range, expected) in [
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", 1),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127", 2),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126", 3),
        ("255.255.255.254/31", 2),
    ] {
        let mut pool = Pool::new(Duration::ZERO);
        pool.set_ranges(&[range.parse().unwrap()], []);
        let given: Vec<_> = std::iter::from_fn(|| pool.allocate(0).ok()).take(10).flatten().collect();
        assert_eq!(given.len(), expected, "{range}: {given:?}");
        assert_eq!(Pool::size_of(&range.parse().unwrap()), expected as u128);
    }
}
