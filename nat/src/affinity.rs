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
//! gets a backend at random, as at its first connection. A client whose TCP connection came about ([`Clients::prove`]) loses its place to
//! another such client only: senders of SYNs under made-up addresses have among them what those leave.
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
    /// Whether the client was seen to have that address.
    is_proven: bool,
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
        let free = Place { service: 0, client: nobody, backend: nobody, forget_at: Tick(0), port: 0, is_proven: false };
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
            None => match self.place_for_another(&bucket, now, |place| !place.is_proven) {
                Some(index) => index,
                None => return true,
            },
        };
        let is_proven = known.is_some() && bucket[index].is_proven;
        let forget_at = forget_at(timeout_seconds, now);
        bucket[index] = Place { service, client, backend, forget_at, port, is_proven };
        true
    }

    /// The place that is free, or overdue, or would be forgotten first of those that may be taken; that one is counted as evicted.
    fn place_for_another(
        &self,
        bucket: &[Place<A>; WAYS],
        now: Tick,
        may_take: impl Fn(&Place<A>) -> bool,
    ) -> Option<usize> {
        let places = bucket.iter().enumerate().map(|(index, place)| (index, place.remaining(now), place));
        let (index, remaining, _) = places
            .filter(|(_, remaining, place)| *remaining == 0 || may_take(place))
            .min_by_key(|(_, remaining, _)| *remaining)?;
        if remaining > 0 {
            self.evicted.fetch_add(1, Ordering::Relaxed);
        }
        Some(index)
    }

    /// Notes that a connection of a client to a backend came about, so that nobody has made the client up.
    pub(crate) fn prove(
        &self,
        (service, timeout_seconds): (u64, u32),
        client: A,
        (backend, port): (A, u16),
        now: Tick,
    ) {
        let mut bucket = lock(self.bucket(service, client));
        if let Some(place) = bucket.iter_mut().find(|place| place.is_of(service, client) && place.remaining(now) > 0) {
            place.is_proven = true;
            return;
        }
        let place = self.place_for_another(&bucket, now, |place| !place.is_proven);
        if let Some(index) = place.or_else(|| self.place_for_another(&bucket, now, |_| true)) {
            let forget_at = forget_at(timeout_seconds, now);
            bucket[index] = Place { service, client, backend, forget_at, port, is_proven: true };
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

    fn prove(clients: &Clients<Ipv4Addr>, client: u32, now: Tick) {
        clients.prove((SERVICE, SECONDS), Ipv4Addr::from_bits(client), (Ipv4Addr::LOCALHOST, 80), now);
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
