//! Which backend each client had last: ClientIP affinity.
//!
//! # What
//! A [`Clients`] remembers, by service port and client address, the backend of the client's last connection and when to forget it.
//! All frontends of a service port share the memory, and so do all workers. It outlives snapshots: a service port is named by a hash of
//! its name and protocol, a backend by its address and port, so that no index of a table is kept.
//!
//! # Layout
//! Buckets of [`WAYS`] places, each bucket with a lock of its own on cache lines of its own. A client may be in one bucket only, which a
//! keyed hash chooses, so that nobody outside can choose it. All memory is allocated at the start.
//!
//! # Eviction
//! A full bucket loses the place that would be forgotten first; those that are overdue come first by that. A client that lost its place
//! gets a backend at random, as at its first connection. But nobody loses its place to whom less [`Evidence`] is for: senders of first packets under
//! made-up addresses have among them what others leave.
//!
//! A TCP client has shaken hands, which it cannot in another's name. UDP has no such proof: nothing that a client sends shows that it
//! got an answer. So who comes back after a backend has answered, by another flow, or by the same one once that is a stream (two seconds),
//! stands above whoever sends one packet under each address, and below who has shaken hands: that costs a sender of made-up ones a second packet for
//! each, which the answered one has no cause to send, and gives it no more than other clients' of UDP.
//!
//! # Invariants, thread safety
//! A lock is held for a look at one bucket, and only by the first packet of a connection to a service with affinity; workers wait for each
//! other where they serve the same client at the same time. Deciding and remembering are two steps, as a packet that turns out to open no
//! connection must not be remembered. Between them another worker may have chosen for the same client: then
//! [`Clients::remember`] says no, changes nothing, and who asks decides again, with the other's choice. So two connections that a
//! client opens at once come to one backend.
//!
//! What is remembered is a wish: a backend is only used while it is in the list that the connection may pick from. Backends that
//! no list has any more are forgotten when a table is published ([`Affinity::forget_gone`]), so that one that comes back
//! later is a new one.

use std::net::{Ipv4Addr, Ipv6Addr};

use hashbrown::HashMap;
use weir_packet::{Address, Tick};
use weir_sync::{
    CachePadded, Mutex,
    atomic::{AtomicU64, Ordering},
    lock,
};

use crate::{Family, ServiceTable, table::Record};

/// Places of a bucket: as many as fill whole pairs of cache lines in both families.
const WAYS: usize = 10;
/// Kubernetes's longest timeout, in seconds.
pub const MAX_AFFINITY_SECONDS: u32 = 86_400;
const TICKS_PER_SECOND: u32 = (1_000_000_000 / Tick::NS) as u32;

/// A backend that was picked for a client: what [`Clients::remember`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice<A> {
    service: u64,
    client: A,
    backend: A,
    port: u16,
    timeout_seconds: u32,
    /// What was remembered when this was chosen.
    before: Option<(A, u16)>,
}

impl<A: PartialEq + Copy> Choice<A> {
    /// Whether it is what the client had before.
    pub fn is_kept(&self) -> bool {
        self.before == Some((self.backend, self.port))
    }

    pub(crate) fn new(
        record: &Record,
        timeout_seconds: u32,
        client: A,
        (backend, port): (A, u16),
        before: Option<(A, u16)>,
    ) -> Self {
        Self { service: record.identity, client, backend, port, timeout_seconds, before }
    }
}

/// A client's last backend. The port is 0 where the place is free.
#[derive(Clone, Copy, Debug)]
struct Place<A> {
    service: u64,
    client: A,
    backend: A,
    forget_at: Tick,
    port: u16,
    evidence: Evidence,
}

/// What was seen of a client, by what it takes to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Evidence {
    /// A first packet, whose source anybody may have made up.
    Unknown,
    /// A backend has answered it by a datagram, to whoever has that address.
    Answered,
    /// It came back after such an answer.
    Returned,
    /// It has shaken hands: it has that address.
    Proven,
}

impl<A: Address> Place<A> {
    /// Ticks until it is to be forgotten; 0 where it is free or overdue.
    fn remaining(&self, now: Tick) -> u32 {
        let ticks = self.forget_at.since(now);
        // More than any timeout: it is overdue for so long that the clock came round.
        if self.port == 0 || ticks > MAX_AFFINITY_SECONDS * TICKS_PER_SECOND { 0 } else { ticks }
    }

    fn is_of(&self, service: u64, client: A) -> bool {
        self.port != 0 && self.service == service && self.client == client
    }
}

type Bucket<A> = CachePadded<Mutex<[Place<A>; WAYS]>>;

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket<Ipv4Addr>>() == 256 && size_of::<Bucket<Ipv6Addr>>() == 512);

/// The clients of one family.
pub struct Clients<A> {
    buckets: Box<[Bucket<A>]>,
    seed: [u64; 2],
    evicted: AtomicU64,
}

impl<A: Address> Clients<A> {
    /// With room for at least so many.
    fn new(clients: usize, seed: [u64; 2], nobody: A) -> Self {
        let free = Place {
            service: 0,
            client: nobody,
            backend: nobody,
            forget_at: Tick(0),
            port: 0,
            evidence: Evidence::Unknown,
        };
        let buckets = clients.div_ceil(WAYS).next_power_of_two();
        Self {
            buckets: (0..buckets).map(|_| CachePadded::new(Mutex::new([free; WAYS]))).collect(),
            seed,
            evicted: AtomicU64::new(0),
        }
    }

    fn bucket(&self, service: u64, client: A) -> &Mutex<[Place<A>; WAYS]> {
        let bits = client.to_bits128();
        let mut hash = self.seed[0];
        // Two rounds of folded multiplication for each word, as wyhash has them.
        for word in [service, (bits >> 64) as u64, bits as u64] {
            let product = u128::from(hash ^ word) * u128::from(self.seed[1] | 1);
            hash = (product >> 64) as u64 ^ product as u64;
        }
        let product = u128::from(hash ^ self.seed[1]) * 0x9e37_79b9_7f4a_7c15;
        hash = (product >> 64) as u64 ^ product as u64;
        &self.buckets[hash as usize & (self.buckets.len() - 1)]
    }

    /// The backend that a client had last, if it is not to be forgotten yet.
    pub(crate) fn find(&self, record: &Record, client: A, now: Tick) -> Option<(A, u16)> {
        let bucket = lock(self.bucket(record.identity, client));
        let place = bucket.iter().find(|place| place.is_of(record.identity, client))?;
        (place.remaining(now) > 0).then_some((place.backend, place.port))
    }

    /// Remembers `choice` for its timeout from now. False: another worker has chosen for this client meanwhile; decide again.
    pub fn remember(&self, choice: &Choice<A>, now: Tick) -> bool {
        let Choice { service, client, backend, port, timeout_seconds, before } = *choice;
        let mut bucket = lock(self.bucket(service, client));
        let known = bucket.iter().position(|place| place.is_of(service, client));
        let index = match known {
            Some(index) => {
                let place = &bucket[index];
                let chosen = (place.remaining(now) > 0).then_some((place.backend, place.port));
                if chosen.is_some() && chosen != Some((backend, port)) && chosen != before {
                    return false;
                }
                index
            }
            // Where there is none, it is remembered when its connection comes about.
            None => match self.place_for_another(&bucket, now, Evidence::Answered) {
                Some(index) => index,
                None => return true,
            },
        };
        let evidence = match known.map(|index| bucket[index].evidence) {
            None => Evidence::Unknown,
            Some(Evidence::Answered) => Evidence::Returned,
            Some(evidence) => evidence,
        };
        let forget_at = forget_at(timeout_seconds, now);
        bucket[index] = Place { service, client, backend, forget_at, port, evidence };
        true
    }

    /// The place that is free, or overdue, or of those with the least evidence, `most` at most, would be forgotten first; that one is counted as evicted.
    fn place_for_another(&self, bucket: &[Place<A>; WAYS], now: Tick, most: Evidence) -> Option<usize> {
        // An answer went to whoever has the address: it says nothing.
        let rank = |place: &Place<A>| match place.remaining(now) {
            0 => (Evidence::Unknown, 0),
            remaining => (place.evidence.max(Evidence::Answered), remaining),
        };
        let places = bucket.iter().map(rank).enumerate();
        let (index, (_, remaining)) =
            places.filter(|(_, (evidence, _))| *evidence <= most).min_by_key(|(_, rank)| *rank)?;
        if remaining > 0 {
            self.evicted.fetch_add(1, Ordering::Relaxed);
        }
        Some(index)
    }

    /// Notes what was seen of a client of that backend. One that has no place gets one by it, if others have it of whom no more was seen.
    pub(crate) fn note(
        &self,
        (service, timeout_seconds): (u64, u32),
        client: A,
        (backend, port): (A, u16),
        evidence: Evidence,
        now: Tick,
    ) {
        let mut bucket = lock(self.bucket(service, client));
        if let Some(place) = bucket.iter_mut().find(|place| place.is_of(service, client) && place.remaining(now) > 0) {
            place.evidence = place.evidence.max(evidence);
        } else if evidence > Evidence::Answered
            && let Some(index) = self.place_for_another(&bucket, now, evidence)
        {
            let forget_at = forget_at(timeout_seconds, now);
            bucket[index] = Place { service, client, backend, forget_at, port, evidence };
        }
    }

    /// Frees the places that `keep` does not want: it gets the service port's identity and the backend.
    fn retain(&self, keep: impl Fn(u64, A, u16) -> bool) {
        for bucket in &self.buckets {
            for place in lock(bucket).iter_mut().filter(|place| place.port != 0) {
                if !keep(place.service, place.backend, place.port) {
                    place.port = 0;
                }
            }
        }
    }

    /// Clients that are remembered now. Looks at every place.
    pub fn count(&self, now: Tick) -> usize {
        let of_bucket = |bucket: &Bucket<A>| lock(bucket).iter().filter(|place| place.remaining(now) > 0).count();
        self.buckets.iter().map(of_bucket).sum()
    }

    /// Clients that can be remembered at once.
    pub fn capacity(&self) -> usize {
        self.buckets.len() * WAYS
    }

    /// Clients that lost their place to another before their time.
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}

impl<A> std::fmt::Debug for Clients<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").field("buckets", &self.buckets.len()).finish_non_exhaustive()
    }
}

/// When what happens now is forgotten.
fn forget_at(timeout_seconds: u32, now: Tick) -> Tick {
    Tick(now.0.wrapping_add(timeout_seconds.clamp(1, MAX_AFFINITY_SECONDS) * TICKS_PER_SECOND))
}

/// The clients of both families; shared by all workers, for as long as they run.
#[derive(Debug)]
pub struct Affinity {
    pub(crate) v4: Clients<Ipv4Addr>,
    pub(crate) v6: Clients<Ipv6Addr>,
}

impl Affinity {
    /// Clients of each family that are remembered at once, unless more are asked for.
    pub const DEFAULT_CLIENTS: usize = 65_536;

    /// With room for at least so many clients of each family. `seed` should not be known outside.
    pub fn new(clients: usize, seed: [u64; 2]) -> Self {
        Self {
            v4: Clients::new(clients, seed, Ipv4Addr::UNSPECIFIED),
            v6: Clients::new(clients, seed, Ipv6Addr::UNSPECIFIED),
        }
    }

    /// The clients of family `A`.
    #[inline]
    pub fn clients<A: Family>(&self) -> &Clients<A> {
        A::clients(self)
    }

    /// Forgets every backend that no list of its service port has in `table`, and all of a service port that has no affinity
    /// any more. To be called when `table` is published.
    pub fn forget_gone(&self, table: &ServiceTable) {
        forget_gone::<Ipv4Addr>(self, table);
        forget_gone::<Ipv6Addr>(self, table);
    }

    /// Memory that is held, in bytes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.v4.buckets) + size_of_val(&*self.v6.buckets)
    }
}

fn forget_gone<A: Family>(affinity: &Affinity, table: &ServiceTable) {
    let services = table.services::<A>();
    let with_affinity: HashMap<u64, &Record> = services.records_with_affinity().collect();
    affinity.clients::<A>().retain(|service, backend, port| {
        with_affinity.get(&service).is_some_and(|record| services.is_usable(record, backend, port))
    });
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const SERVICE: u64 = 7;
    const SECONDS: u32 = 100;

    fn choice(client: u32) -> Choice<Ipv4Addr> {
        let (client, backend) = (Ipv4Addr::from_bits(client), Ipv4Addr::LOCALHOST);
        Choice { service: SERVICE, client, backend, port: 80, timeout_seconds: SECONDS, before: None }
    }

    fn known(clients: &Clients<Ipv4Addr>, client: u32, now: Tick) -> bool {
        let client = Ipv4Addr::from_bits(client);
        let bucket = lock(clients.bucket(SERVICE, client));
        bucket.iter().any(|place| place.is_of(SERVICE, client) && place.remaining(now) > 0)
    }

    fn note(clients: &Clients<Ipv4Addr>, client: u32, evidence: Evidence, now: Tick) {
        clients.note((SERVICE, SECONDS), Ipv4Addr::from_bits(client), (Ipv4Addr::LOCALHOST, 80), evidence, now);
    }

    fn prove(clients: &Clients<Ipv4Addr>, client: u32, now: Tick) {
        note(clients, client, Evidence::Proven, now);
    }

    #[test]
    fn who_came_back_after_an_answer_stands_between_the_unknown_and_the_proven() {
        let clients = Clients::new(1, [1, 2], Ipv4Addr::UNSPECIFIED);
        let (now, udp, tcp) = (Tick(1000), 1..7, 7..10);
        for client in udp.clone().chain(tcp.clone()) {
            assert!(clients.remember(&choice(client), now));
        }
        for client in udp.clone() {
            note(&clients, client, Evidence::Answered, now);
            assert!(clients.remember(&choice(client), now), "it comes back");
        }
        tcp.clone().for_each(|client| prove(&clients, client, now));
        // Made up, and answered all the same.
        for made_up in 100..1100 {
            assert!(clients.remember(&choice(made_up), Tick(1001)) && known(&clients, made_up, Tick(1001)));
            note(&clients, made_up, Evidence::Answered, Tick(1001));
        }
        let all = |clients: &Clients<_>, of: std::ops::Range<u32>| of.clone().all(|client| known(clients, client, now));
        assert!(all(&clients, udp.clone()) && all(&clients, tcp.clone()));
        // As many who come back, which costs them a packet more: they have the places of their like, and no others.
        for made_up in 2000..2100 {
            assert!(clients.remember(&choice(made_up), Tick(1002)));
            note(&clients, made_up, Evidence::Returned, Tick(1002));
        }
        assert!(all(&clients, tcp) && !all(&clients, udp));
        // One of no place gets none by an answer.
        note(&clients, 3000, Evidence::Answered, Tick(1003));
        assert!(!known(&clients, 3000, Tick(1003)));
        // One that has shaken hands takes one of theirs.
        prove(&clients, 3001, Tick(1003));
        assert!(known(&clients, 3001, Tick(1003)) && all(&clients, 7..10));
    }

    #[test]
    fn who_may_be_made_up_takes_no_place_from_who_is_not() {
        // One bucket.
        let clients = Clients::new(1, [1, 2], Ipv4Addr::UNSPECIFIED);
        let (now, real) = (Tick(1000), 1..WAYS as u32);
        for client in real.clone() {
            assert!(clients.remember(&choice(client), now));
            prove(&clients, client, now);
        }
        // They have the last place among them, however many they are.
        for made_up in 100..1100 {
            assert!(clients.remember(&choice(made_up), Tick(1001)));
            assert!(known(&clients, made_up, Tick(1001)));
        }
        assert!(real.clone().all(|client| known(&clients, client, Tick(1001))));
        assert_eq!(clients.evicted(), 999);
        // The next connection of a client that is there changes nothing of that.
        assert!(clients.remember(&choice(1), Tick(1002)));
        prove(&clients, 50, Tick(1003));
        assert!(clients.remember(&choice(2000), Tick(1003)) && !known(&clients, 2000, Tick(1003)), "no place is left");
        assert!(
            known(&clients, 1, Tick(1003)) && known(&clients, 50, Tick(1003)) && !known(&clients, 1099, Tick(1003))
        );
        // One that comes about displaces who would be forgotten first.
        prove(&clients, 2000, Tick(1004));
        assert!(known(&clients, 2000, Tick(1004)) && !known(&clients, 2, Tick(1004)) && known(&clients, 1, Tick(1004)));
        // What is overdue is anybody's.
        let later = Tick(1005 + SECONDS * TICKS_PER_SECOND);
        assert!(clients.remember(&choice(3000), later) && known(&clients, 3000, later));
    }
}
