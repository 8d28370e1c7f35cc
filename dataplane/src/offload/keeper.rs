//! The keeper: writes what the programs read, and tells the table what they have carried.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use weir_conntrack::{ConnRef, Identity, OFFLOADED, Observed, Offloader as _, Table};
use weir_packet::{Direction, Protocol, Tick};
use weir_sync::{Domain, Epoch, Mutex, Participant, Turn, atomic::Ordering, lock};

use super::{
    ASKED, CANDIDATE, Offload, REQUESTS, Request,
    flow::{Flow, Phase},
    recipe::{self, Key, Recipe, Stays},
};
use crate::{
    clock::now,
    snapshot::Snapshot,
    tables::{Family, Tables},
};

/// How long a publication waits for flows to be confirmed. Those for which there was no time visit a worker.
pub const PATIENCE: Duration = Duration::from_millis(20);
/// How often is looked what the programs have carried.
pub const LOOK: Duration = Duration::from_millis(250);
/// So many bytes, and the largest window, are half of sequence space: windows that are farther ahead look as if they were behind.
const FAR: u64 = 1 << 30;
/// Requests that are answered together: so many keep control from the keeper for less than a millisecond.
const BATCH: usize = 256;
/// Slots that are looked at in one turn.
const CHUNK: usize = 256;
/// And chunks, for publications that had no time for all.
const CHUNKS_AT_ONCE: usize = 8;
/// A flow that is idle for so long makes way for another where all slots are used.
const IDLE: u32 = (1_000_000_000 / Tick::NS) as u32;
/// Slots among which the longest idle is chosen to make way.
const SAMPLE: usize = 64;

/// The programs' keys.
pub trait Keys: Send {
    /// Lets a key lead to a way of a slot: the number twice the slot's, plus one for replies; and the serial number of the slot's use.
    ///
    /// # Errors
    /// Where there is no room, or the kernel refuses.
    fn insert(&mut self, key: &Key, way: u32, serial: u32) -> io::Result<()>;
    /// Does so for many.
    ///
    /// # Errors
    /// As for one; some of them may have been inserted.
    fn insert_all(&mut self, keys: &[(Key, u32, u32)]) -> io::Result<()> {
        keys.iter().try_for_each(|(key, way, serial)| self.insert(key, *way, *serial))
    }
    /// Takes a key away, if it is there and leads to that way and use of it: it may be another flow's by now.
    fn remove(&mut self, key: &Key, way: u32, serial: u32);
    /// All keys, with what they lead to.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn all(&self) -> io::Result<Vec<(Key, u32, u32)>>;
}

/// Keys in memory of this process, for tests.
impl Keys for HashMap<Key, (u32, u32)> {
    fn insert(&mut self, key: &Key, way: u32, serial: u32) -> io::Result<()> {
        self.insert(*key, (way, serial));
        Ok(())
    }
    fn remove(&mut self, key: &Key, way: u32, serial: u32) {
        if self.get(key) == Some(&(way, serial)) {
            self.remove(key);
        }
    }
    fn all(&self) -> io::Result<Vec<(Key, u32, u32)>> {
        Ok(self.iter().map(|(key, (way, serial))| (*key, *way, *serial)).collect())
    }
}

/// What became of flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Flows that the programs have now.
    pub flows: usize,
    /// Flows that there is room for.
    pub capacity: usize,
    /// Flows handed over.
    pub handed_over: u64,
    /// Flows handed over again, after a change that concerned them.
    pub renewed: u64,
    /// Flows taken back because they ended, or for what has become of them.
    pub taken_back: u64,
    /// Flows taken back because they were idle and others needed their slot.
    pub evicted: u64,
    /// Flows for which publications had no time: until the keeper comes to them, their packets visit workers.
    pub unconfirmed: u64,
    /// Requests refused: all slots are used. Most ask again when there is room.
    pub full: u64,
    /// Requests refused: an end is not where the programs can send to.
    pub elsewhere: u64,
    /// Requests refused: the connection is to be judged again, its backend drains, or a next hop is not known at the moment.
    pub unsettled: u64,
    /// Requests refused: the kernel did not take the keys.
    pub failed: u64,
    /// Requests that the keeper had no time to hear.
    pub unheard: u64,
    /// Packets that the programs carried, of flows that are over too.
    pub packets: u64,
    /// And their bytes.
    pub bytes: u64,
}

/// A slot's flow.
#[derive(Clone, Copy, Debug)]
struct Held {
    request: Request,
    serial: u32,
    recipe: Recipe,
    /// Packets and bytes carried, as of the last look, by direction.
    carried: [(u64, u64); 2],
    since: Tick,
    /// Whether it was found to be over: a program may then still have had a packet of it, so that the last numbers come with the next look.
    is_over: bool,
}

impl Held {
    /// The keys, with what they lead to.
    fn keys(&self, slot: u32) -> [(Key, u32, u32); 2] {
        let [forth, back] = self.recipe.keys;
        [(forth, 2 * slot, self.serial), (back, 2 * slot + 1, self.serial)]
    }

    fn remove_keys(&self, slot: u32, keys: &mut dyn Keys) {
        self.keys(slot).iter().for_each(|(key, way, serial)| keys.remove(key, *way, *serial));
    }
}

/// All that is known of the flows that were handed over.
pub struct Keeper {
    participant: Participant,
    /// All but the participant, which each turn borrows.
    slots: Slots,
}

/// What is in the slots, and what is to be.
struct Slots {
    offload: Arc<Offload>,
    keys: Box<dyn Keys>,
    domain: Arc<Domain>,
    current: Arc<Snapshot>,
    near: BTreeSet<u32>,
    held: Vec<Option<Held>>,
    serials: Vec<u32>,
    /// Slots that were freed: when all turns of that time are over, and so many grace periods have passed.
    resting: VecDeque<(Epoch, u64, u32)>,
    graces: u64,
    /// Whether one has passed since the requests were made that are being answered.
    has_passed: bool,
    /// Who was refused because all slots are used, the longest waiting first; no more than there are slots.
    waiting: VecDeque<Request>,
    counts: Counts,
    /// Slots below this one were compared with the tables in force.
    confirmed: usize,
    cursor: usize,
}

/// Keys that an earlier process has left, with their serial numbers: by slot, and by direction.
type Left = HashMap<u32, [Option<(Key, u32)>; 2]>;

impl Keeper {
    /// A keeper of flows of these tables' connections, by the tables of `current`.
    pub fn new(
        offload: Arc<Offload>,
        capacity: u32,
        keys: Box<dyn Keys>,
        domain: &Arc<Domain>,
        current: Arc<Snapshot>,
    ) -> Self {
        let slots = Slots {
            offload,
            keys,
            domain: Arc::clone(domain),
            current,
            near: BTreeSet::new(),
            held: Vec::new(),
            serials: vec![0; capacity as usize],
            resting: VecDeque::new(),
            graces: 0,
            has_passed: false,
            waiting: VecDeque::new(),
            counts: Counts { capacity: capacity as usize, ..Counts::default() },
            confirmed: 0,
            cursor: 0,
        };
        Self { participant: domain.join(), slots }
    }

    /// What became of flows so far.
    pub fn counts(&self) -> Counts {
        let Slots { offload, counts, .. } = &self.slots;
        Counts { unheard: offload.unheard.load(std::sync::atomic::Ordering::Relaxed), ..*counts }
    }

    /// Devices whose other end is in this network namespace: `bpf_redirect_peer` does not serve them.
    pub fn set_near(&mut self, near: BTreeSet<u32>) {
        self.slots.near = near;
    }

    /// What an earlier process has handed over goes on, as far as the connections were taken over and the first tables agree; the rest is
    /// taken back. `keys`: all that the process has left ([`Keys::all`]). To be called once, before workers run; how many flows go on.
    pub fn adopt(&mut self, keys: Vec<(Key, u32, u32)>, tables: &Tables) -> usize {
        let Self { participant, slots } = self;
        let mut left = Left::new();
        for (key, way, serial) in keys {
            left.entry(way >> 1).or_default()[way as usize & 1] = Some((key, serial));
        }
        slots.adopt_family(&tables.v4, &mut left, participant);
        slots.adopt_family(&tables.v6, &mut left, participant);
        for slot in (0..slots.held.len()).filter(|slot| slots.held[*slot].is_none()) {
            slots.resting.push_back((slots.domain.retire_epoch(), slots.graces, slot as u32));
        }
        // Nobody's.
        for (slot, keys) in left {
            slots.offload.take_back(slot);
            for (way, key) in (2 * slot..).zip(keys) {
                key.iter().for_each(|(key, serial)| slots.keys.remove(key, way, *serial));
            }
        }
        slots.counts.flows
    }

    /// Before `next` is published: flows that it does not change get its epoch, all others are stopped when this returns. Those for which
    /// there is no time are looked at by [`Self::confirm_more`].
    pub fn prepare(&mut self, next: &Arc<Snapshot>, tables: &Tables) {
        let Self { participant, slots } = self;
        let begin = Instant::now();
        slots.current = Arc::clone(next);
        slots.confirmed = 0;
        while slots.confirmed < slots.held.len() && begin.elapsed() <= PATIENCE {
            slots.confirm(tables, &participant.enter());
        }
        slots.counts.unconfirmed += (slots.held.len() - slots.confirmed) as u64;
        slots.offload.epoch[0].store(u64::from(next.generation), Ordering::Release);
    }

    /// Goes on with the flows for which the last publication had no time; whether there are more.
    pub fn confirm_more(&mut self, tables: &Tables) -> bool {
        let Self { participant, slots } = self;
        for _ in 0..CHUNKS_AT_ONCE {
            if slots.confirmed >= slots.held.len() {
                return false;
            }
            slots.confirm(tables, &participant.enter());
        }
        true
    }

    /// Answers requests. `graces`: how many grace periods have passed by now ([`wait_for_programs`](super::flow::wait_for_programs)). Where that is one more than before, it must have passed
    /// since the requests were made; where it is none, the kernel did not say so, and no slot is written that any program may have read.
    pub fn answer(&mut self, requests: &[Request], graces: u64, tables: &Tables) {
        let Self { participant, slots } = self;
        slots.has_passed = graces > slots.graces;
        slots.graces = slots.graces.max(graces);
        let (turn, mut seen, mut written) = (participant.enter(), HashSet::new(), Vec::new());
        for request in requests.iter().filter(|request| seen.insert(**request)) {
            written.extend(match request.is_v6 {
                false => slots.answer(&tables.v4, *request, &turn),
                true => slots.answer(&tables.v6, *request, &turn),
            });
        }
        let keys: Vec<_> = written.iter().flat_map(|(slot, held): &(u32, Held)| held.keys(*slot)).collect();
        // What the keys lead to says no until it is released. Where there is not room for all of them, there may be for some.
        let are_inserted = slots.keys.insert_all(&keys).is_ok();
        for (slot, held) in written {
            let is_inserted = are_inserted || slots.keys.insert_all(&held.keys(slot)).is_ok();
            match held.request.is_v6 {
                false => slots.release(&tables.v4, slot, &held, is_inserted, &turn),
                true => slots.release(&tables.v6, slot, &held, is_inserted, &turn),
            }
        }
    }

    /// Tells the tables what was carried, and frees the slots of flows that are over.
    pub fn look(&mut self, tables: &Tables) {
        let Self { participant, slots } = self;
        let now = now();
        let (mut freed, mut leaving) = (Vec::new(), 0);
        for start in (0..slots.held.len()).step_by(CHUNK) {
            let Slots { offload, held, counts, .. } = &mut *slots;
            let turn = participant.enter();
            let chunk = start..(start + CHUNK).min(held.len());
            for (slot, place) in chunk.clone().zip(&mut held[chunk]) {
                let (Some(held), Some(flow)) = (place.as_mut(), offload.flow(slot as u32)) else { continue };
                let carried = carried(flow);
                let moved = [0, 1].map(|way| carried[way].0 != held.carried[way].0);
                for (new, old) in carried.iter().zip(&held.carried) {
                    counts.packets += new.0 - old.0;
                    counts.bytes += new.1 - old.1;
                }
                // While programs carry a flow, workers know nothing that its slot does not.
                let is_far = carried.iter().zip(&held.carried).any(|(new, old)| new.1 - old.1 >= FAR);
                let are_ahead = is_far && flow.state().1 == Phase::Live;
                held.carried = carried;
                let was_over = held.is_over;
                held.is_over = flow.state().1 == Phase::Closed;
                let windows = flow.has_windows().then(|| (flow.windows(), are_ahead));
                let lives = match held.request.is_v6 {
                    false => told(&tables.v4, held, moved, windows.as_ref(), was_over, now, &turn),
                    true => told(&tables.v6, held, moved, windows.as_ref(), was_over, now, &turn),
                };
                if moved != [false; 2] {
                    held.since = now;
                }
                if !lives {
                    flow.close();
                }
                if was_over && held.is_over || !lives {
                    freed.push((slot as u32, *held));
                    *place = None;
                    counts.taken_back += 1;
                    counts.flows -= 1;
                } else if held.is_over {
                    leaving += 1;
                }
            }
        }
        for (slot, held) in freed {
            held.remove_keys(slot, &mut *slots.keys);
            slots.resting.push_back((slots.domain.retire_epoch(), slots.graces, slot));
        }
        slots.let_ask(leaving, tables, now, &participant.enter());
    }
}

impl Slots {
    fn flow(&self, slot: u32) -> &Flow {
        self.offload.flow(slot).expect("slots are the programs'")
    }

    fn adopt_family<A: Family>(&mut self, table: &Table<A>, left: &mut Left, participant: &mut Participant) {
        let mut marked = Vec::new();
        table.for_each(now(), |entry| {
            if entry.attributes.flags & (OFFLOADED | ASKED) != 0 {
                marked.push(entry.identity);
            }
        });
        for identity in marked {
            let turn = participant.enter();
            let Some(conn) = table.identified(identity, &turn) else { continue };
            let slot = (conn.flags() & OFFLOADED != 0).then(|| conn.offload_slot());
            let found = slot.and_then(|slot| match left.get(&slot)? {
                [Some(original), Some(reply)] => Some((slot, [*original, *reply])),
                _ => None,
            });
            match found {
                Some((slot, keys)) if self.adopt(&conn, slot, &keys) => drop(left.remove(&slot)),
                _ => self.give_up(&conn, found),
            }
        }
    }

    /// Takes over what a connection's slot has, if the keys that lead there are its own and it is what the slot is to have; whether it is.
    fn adopt<A: Family>(&mut self, conn: &ConnRef<'_, A>, slot: u32, keys: &[(Key, u32); 2]) -> bool {
        let [(original, serial), (reply, again)] = *keys;
        let Some(flow) = self.offload.flow(slot).filter(|_| (slot as usize) < self.serials.len()) else { return false };
        let Ok(recipe) = recipe::of_connection(conn, &self.current, &self.near) else { return false };
        if recipe.keys != [original, reply]
            || serial != again
            || flow.state() != (serial, Phase::Live)
            || !recipe.is_written(flow)
        {
            return false;
        }
        let (request, since) = (Request::of(conn), conn.last_seen());
        let held = Held { request, serial, recipe, carried: carried(flow), since, is_over: false };
        let at = slot as usize;
        self.held.resize(self.held.len().max(at + 1), None);
        self.held[at] = Some(held);
        self.serials[at] = serial;
        self.counts.flows += 1;
        conn.change_flags(0, ASKED);
        if flow.has_windows() {
            // However much has passed since the last process ended.
            conn.absorb(&flow.windows(), Direction::Reply, true);
        }
        true
    }

    /// A connection's flow does not go on. What has passed there in vain is known at least, if the keys that lead there are its own.
    fn give_up<A: Family>(&self, conn: &ConnRef<'_, A>, found: Option<(u32, [(Key, u32); 2])>) {
        if let Some((slot, [(original, _), (reply, _)])) = found
            && original.is_of(&conn.original())
            && reply.is_of(&conn.reply())
            && let Some(flow) = self.offload.flow(slot)
        {
            // Of one that was stopped before, workers may know more.
            let is_live = flow.state().1 == Phase::Live;
            flow.close();
            if flow.has_windows() {
                conn.absorb(&flow.windows(), Direction::Reply, is_live);
            }
        }
        conn.change_flags(0, ASKED | OFFLOADED);
    }

    /// What the programs are to do with a connection's packets by the tables in force; `None`: what they do already, by its slot.
    fn changed<A: Family>(&self, conn: &ConnRef<'_, A>, slot: Option<u32>) -> Result<Option<Recipe>, Stays> {
        let recipe = recipe::of_connection(conn, &self.current, &self.near)?;
        let held = slot.and_then(|slot| self.held[slot as usize].as_ref());
        Ok(held.is_none_or(|held| held.recipe != recipe).then_some(recipe))
    }

    /// Compares what the programs do in some slots with what they are to do now.
    fn confirm(&mut self, tables: &Tables, turn: &Turn<'_>) {
        let chunk = self.confirmed..(self.confirmed + CHUNK).min(self.held.len());
        self.confirmed = chunk.end;
        for slot in chunk {
            let Some(held) = &self.held[slot] else { continue };
            let (slot, generation) = (slot as u32, self.current.generation);
            let flow = self.flow(slot);
            let is_live = flow.state() == (held.serial, Phase::Live);
            if is_live
                && flow.epoch.load(Ordering::Relaxed) != generation
                && match held.request.is_v6 {
                    false => self.is_unchanged(&tables.v4, held, slot, turn),
                    true => self.is_unchanged(&tables.v6, held, slot, turn),
                }
            {
                flow.epoch.store(generation, Ordering::Release);
            }
        }
    }

    fn is_unchanged<A: Family>(&self, table: &Table<A>, held: &Held, slot: u32, turn: &Turn<'_>) -> bool {
        let conn = table.identified(held.request.identity, turn);
        conn.is_some_and(|conn| self.changed(&conn, Some(slot)) == Ok(None))
    }

    /// Refuses or renews what is asked for, or writes it into a slot, which [`Self::release`] is to let go then.
    fn answer<A: Family>(&mut self, table: &Table<A>, request: Request, turn: &Turn<'_>) -> Option<(u32, Held)> {
        let conn = table.identified(request.identity, turn)?;
        let before = (conn.flags() & OFFLOADED != 0).then(|| conn.offload_slot());
        match (self.changed(&conn, before), before.or_else(|| self.free_slot())) {
            (Err(stays), _) => self.refuse(&conn, before, stays),
            (Ok(_), None) => self.refuse_for_room(request),
            (Ok(None), Some(slot)) => self.renew(&conn, slot),
            // A program may be reading it yet.
            (Ok(Some(_)), Some(_)) if before.is_some() && !self.has_passed => {
                self.refuse(&conn, before, Stays::Unsettled);
            }
            (Ok(Some(recipe)), Some(slot)) => {
                return Some((slot, self.write(&conn, slot, recipe, before.is_some())?));
            }
        }
        None
    }

    fn refuse<A: Family>(&mut self, conn: &ConnRef<'_, A>, before: Option<u32>, stays: Stays) {
        // Its packets ask again, where that may help.
        let gives_up = match stays {
            Stays::Elsewhere => {
                self.counts.elsewhere += 1;
                CANDIDATE
            }
            // What terminates does not come back.
            Stays::Drains => {
                self.counts.unsettled += 1;
                CANDIDATE
            }
            Stays::Unsettled | Stays::Unresolved => {
                self.counts.unsettled += 1;
                0
            }
        };
        conn.change_flags(0, ASKED | gives_up);
        if let Some(slot) = before {
            self.offload.take_back(slot);
        }
    }

    /// It stays marked as asking, until [`Self::let_ask`] has room for it.
    fn refuse_for_room(&mut self, request: Request) {
        self.counts.full += 1;
        // Who has waited longest is over, most likely; if not, it stays with the workers.
        if self.waiting.len() == self.serials.len() {
            self.waiting.pop_front();
        }
        self.waiting.push_back(request);
        if self.resting.is_empty() {
            self.evict(now());
        }
    }

    /// Lets those who were refused ask again with their next packet, as many as there are free slots for. Where there are none, and there will
    /// be none soon, somebody makes way.
    fn let_ask(&mut self, leaving: usize, tables: &Tables, now: Tick, turn: &Turn<'_>) {
        let mut free = self.resting.len() + self.serials.len() - self.held.len();
        if free + leaving == 0 && !self.waiting.is_empty() {
            self.evict(now);
        }
        for _ in 0..REQUESTS.min(self.waiting.len()) {
            if free == 0 {
                break;
            }
            let Some(Request { is_v6, identity }) = self.waiting.pop_front() else { break };
            let goes_on = match is_v6 {
                false => may_ask(&tables.v4, identity, now, turn),
                true => may_ask(&tables.v6, identity, now, turn),
            };
            free -= usize::from(goes_on);
        }
    }

    /// There was no time to confirm a flow, and it is as it was.
    fn renew<A: Family>(&mut self, conn: &ConnRef<'_, A>, slot: u32) {
        let flow = self.flow(slot);
        flow.epoch.store(self.current.generation, Ordering::Relaxed);
        match conn.windows() {
            Some(windows) => flow.advance(&windows.sides),
            None if conn.protocol() == Protocol::TCP => flow.close(),
            None => {}
        }
        if flow.change(self.serials[slot as usize], Phase::Pending, Phase::Live) {
            self.counts.renewed += 1;
        }
        conn.change_flags(0, ASKED);
    }

    /// Writes what the programs are to do with a connection's packets into a slot. `is_again`: it is the connection's already.
    fn write<A: Family>(&mut self, conn: &ConnRef<'_, A>, slot: u32, recipe: Recipe, is_again: bool) -> Option<Held> {
        let at = slot as usize;
        let serial = self.serials[at].wrapping_add(1) & (u32::MAX >> 2);
        if !is_again {
            self.claim(slot);
            self.flow(slot).set_state(serial, Phase::Pending);
        } else if !self.flow(slot).begin_anew(self.serials[at], serial) {
            // It asked twice, and programs read the slot; or it was taken back since.
            conn.change_flags(0, ASKED);
            return None;
        }
        self.serials[at] = serial;
        let earlier = self.held[at];
        if let Some(earlier) = &earlier {
            earlier.remove_keys(slot, &mut *self.keys);
            self.counts.renewed += 1;
        } else {
            self.flow(slot).ways.iter().for_each(|way| {
                way.packets.store(0, Ordering::Relaxed);
                way.bytes.store(0, Ordering::Relaxed);
            });
            self.counts.flows += 1;
            self.counts.handed_over += 1;
        }
        recipe.write(self.flow(slot));
        self.flow(slot).epoch.store(self.current.generation, Ordering::Relaxed);
        let carried = earlier.map_or([(0, 0); 2], |earlier| earlier.carried);
        let held = Held { request: Request::of(conn), serial, recipe, carried, since: now(), is_over: false };
        self.held[at] = Some(held);
        Some(held)
    }

    /// Lets the programs have a flow that is written, if its keys are.
    fn release<A: Family>(&mut self, table: &Table<A>, slot: u32, held: &Held, is_inserted: bool, turn: &Turn<'_>) {
        let flow = self.flow(slot);
        let Some(conn) = table.identified(held.request.identity, turn) else { return flow.close() };
        // A worker that finds the connection marked takes the windows over, so they are there before. Whoever removes it from then on
        // takes the flow back; only then it is live.
        let windows = conn.windows();
        match &windows {
            Some(windows) if conn.flags() & OFFLOADED != 0 => flow.advance(&windows.sides),
            Some(windows) => flow.set_windows(windows),
            None => {}
        }
        conn.set_offload_slot(slot);
        let is_marked = is_inserted && conn.change_flags(OFFLOADED, ASKED);
        if is_marked && windows.is_some() == (conn.protocol() == Protocol::TCP) {
            flow.change(held.serial, Phase::Pending, Phase::Live);
        }
        // What a worker has seen meanwhile, who did not find it marked: more of the same, or its end.
        match conn.windows() {
            Some(windows) if is_marked => flow.advance(&windows.sides),
            None if is_marked && conn.protocol() != Protocol::TCP => {}
            _ => {
                flow.forget_windows();
                flow.close();
            }
        }
        if !is_inserted {
            self.counts.failed += 1;
            conn.change_flags(0, ASKED | CANDIDATE);
        }
    }

    /// A slot that neither a program nor a worker can be reading: the first that rests, or one that was never used.
    fn free_slot(&self) -> Option<u32> {
        match self.resting.front() {
            Some((epoch, graces, slot)) if *graces < self.graces && self.domain.passed(*epoch) => Some(*slot),
            _ => (self.held.len() < self.serials.len()).then_some(self.held.len() as u32),
        }
    }

    /// Takes a slot that is free.
    fn claim(&mut self, slot: u32) {
        match self.resting.front() {
            Some((.., first)) if *first == slot => drop(self.resting.pop_front()),
            _ => self.held.push(None),
        }
    }

    /// Takes the flow back that is idle for longest among some, for others to have its slot soon.
    fn evict(&mut self, now: Tick) {
        let candidates = (0..SAMPLE.min(self.held.len())).filter_map(|step| {
            let slot = (self.cursor + step) % self.held.len();
            let is_live = self.offload.flow(slot as u32).is_some_and(|flow| flow.state().1 == Phase::Live);
            self.held[slot].as_ref().filter(|_| is_live).map(|held| (now.since(held.since), slot))
        });
        let Some((idle, slot)) = candidates.max() else { return };
        self.cursor = (self.cursor + SAMPLE) % self.held.len();
        if idle >= IDLE {
            self.offload.take_back(slot as u32);
            self.counts.evicted += 1;
        }
    }
}

fn carried(flow: &Flow) -> [(u64, u64); 2] {
    [Direction::Original, Direction::Reply].map(|direction| flow.carried(direction))
}

/// Lets a connection ask again to be handed over; whether it has a packet now and then to do so with.
fn may_ask<A: Family>(table: &Table<A>, identity: Identity, now: Tick, turn: &Turn<'_>) -> bool {
    let Some(conn) = table.identified(identity, turn) else { return false };
    conn.change_flags(0, ASKED) && now.since(conn.last_seen()) < IDLE
}

/// Tells a connection which of its directions were carried; whether it still is one. `windows`: and whether they are known to be ahead.
fn told<A: Family>(
    table: &Table<A>,
    held: &Held,
    moved: [bool; 2],
    windows: Option<&([[u32; 4]; 2], bool)>,
    is_over: bool,
    now: Tick,
    turn: &Turn<'_>,
) -> bool {
    let Some(conn) = table.identified(held.request.identity, turn) else { return false };
    for direction in [Direction::Original, Direction::Reply].into_iter().filter(|way| moved[*way as usize]) {
        heard(&conn, direction, windows, now);
    }
    if is_over {
        // Its next packets may ask again.
        conn.change_flags(0, OFFLOADED | ASKED);
    }
    true
}

fn heard<A: Family>(conn: &ConnRef<'_, A>, direction: Direction, windows: Option<&([[u32; 4]; 2], bool)>, now: Tick) {
    if conn.protocol() == Protocol::TCP {
        if let Some((windows, are_ahead)) = windows {
            conn.absorb(windows, direction, *are_ahead);
        }
        conn.touch(now);
    } else {
        conn.track(direction, &Observed::NOTHING, now);
    }
}

/// The keeper's thread: answers requests as they come and looks after flows, until `is_over` says so. `wait`: [`wait_for_programs`](super::flow::wait_for_programs).
pub fn keep(
    keeper: &Mutex<Keeper>,
    requests: &Receiver<Request>,
    tables: &Tables,
    is_over: impl Fn() -> bool,
    wait: impl Fn() -> io::Result<()>,
) {
    let mut batch = Vec::with_capacity(BATCH);
    let (mut graces, mut looked, mut is_behind) = (0, Instant::now(), false);
    while !is_over() {
        let patience = if is_behind { Duration::ZERO } else { LOOK.saturating_sub(looked.elapsed()) };
        match requests.recv_timeout(patience) {
            Ok(request) => {
                batch.push(request);
                batch.extend(requests.try_iter().take(BATCH - 1));
                // Without it, what programs may have read is not written again.
                if wait().is_ok() {
                    graces += 1;
                }
                lock(keeper).answer(&batch, graces, tables);
                batch.clear();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        is_behind = lock(keeper).confirm_more(tables);
        if looked.elapsed() >= LOOK {
            lock(keeper).look(tables);
            looked = Instant::now();
        }
    }
}
