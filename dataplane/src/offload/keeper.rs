//! The keeper: writes what the programs read, and tells the table what they have carried.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use weir_conntrack::{ConnRef, OFFLOADED, Observed, Offloader as _, Table};
use weir_packet::{Direction, Protocol, Tick};
use weir_sync::{Domain, Epoch, Mutex, Participant, Turn, atomic::Ordering, lock};

use super::{
    ASKED, CANDIDATE, Offload, Request,
    flow::{Phase, wait_for_programs},
    recipe::{self, Key, Recipe, Stays},
};
use crate::{
    pipeline::{Family, Tables},
    snapshot::Snapshot,
    worker::now,
};

/// How long a publication waits for flows to be confirmed. Those for which there was no time visit a worker.
pub const PATIENCE: Duration = Duration::from_millis(20);
/// How often is looked what the programs have carried.
pub const LOOK: Duration = Duration::from_millis(250);
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
    /// Requests refused: all slots are used.
    pub full: u64,
    /// Requests refused: an end is not where the programs can send to.
    pub elsewhere: u64,
    /// Requests refused for the moment: the connection is to be judged again, or a next hop is not known.
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
    fn remove_keys(&self, slot: u32, keys: &mut dyn Keys) {
        for (way, key) in (2 * slot..).zip(&self.recipe.keys) {
            keys.remove(key, way, self.serial);
        }
    }
}

/// All that is known of the flows that were handed over.
pub struct Keeper {
    offload: Arc<Offload>,
    keys: Box<dyn Keys>,
    domain: Arc<Domain>,
    participant: Participant,
    current: Arc<Snapshot>,
    near: BTreeSet<u32>,
    held: Vec<Option<Held>>,
    serials: Vec<u32>,
    /// Slots that were freed: when all turns of that time are over, and so many grace periods have passed.
    resting: VecDeque<(Epoch, u64, u32)>,
    graces: u64,
    counts: Counts,
    /// Slots below this one were compared with the tables in force.
    confirmed: usize,
    cursor: usize,
}

impl Keeper {
    /// A keeper of flows of these tables' connections, by the tables of `current`.
    pub fn new(
        offload: Arc<Offload>,
        capacity: u32,
        keys: Box<dyn Keys>,
        domain: &Arc<Domain>,
        current: Arc<Snapshot>,
    ) -> Self {
        Self {
            offload,
            keys,
            participant: domain.join(),
            domain: Arc::clone(domain),
            current,
            near: BTreeSet::new(),
            held: Vec::new(),
            serials: vec![0; capacity as usize],
            resting: VecDeque::new(),
            graces: 0,
            counts: Counts { capacity: capacity as usize, ..Counts::default() },
            confirmed: 0,
            cursor: 0,
        }
    }

    /// What became of flows so far.
    pub fn counts(&self) -> Counts {
        Counts { unheard: self.offload.unheard.load(std::sync::atomic::Ordering::Relaxed), ..self.counts }
    }

    /// Devices whose other end is in this network namespace: `bpf_redirect_peer` does not serve them.
    pub fn set_near(&mut self, near: BTreeSet<u32>) {
        self.near = near;
    }

    /// What an earlier process has handed over goes on, as far as the connections were taken over and the first tables agree; the rest is
    /// taken back. To be called once, before workers run.
    ///
    /// # Errors
    /// Where the kernel does not tell the keys.
    pub fn adopt(&mut self, tables: &Tables) -> io::Result<usize> {
        let mut by_slot: HashMap<u32, [Option<(Key, u32)>; 2]> = HashMap::new();
        for (key, way, serial) in self.keys.all()? {
            by_slot.entry(way >> 1).or_default()[way as usize & 1] = Some((key, serial));
        }
        self.adopt_family(&tables.v4, &mut by_slot);
        self.adopt_family(&tables.v6, &mut by_slot);
        for slot in (0..self.held.len()).filter(|slot| self.held[*slot].is_none()) {
            self.resting.push_back((self.domain.retire_epoch(), self.graces, slot as u32));
        }
        // Nobody's.
        for (slot, keys) in by_slot {
            self.offload.take_back(slot);
            for (way, key) in (2 * slot..).zip(keys) {
                key.iter().for_each(|(key, serial)| self.keys.remove(key, way, *serial));
            }
        }
        Ok(self.counts.flows)
    }

    fn adopt_family<A: Family>(&mut self, table: &Table<A>, by_slot: &mut HashMap<u32, [Option<(Key, u32)>; 2]>) {
        let mut marked = Vec::new();
        table.for_each(now(), |entry| {
            if entry.attributes.flags & (OFFLOADED | ASKED) != 0 {
                marked.push(entry.identity);
            }
        });
        for identity in marked {
            let Self { offload, participant, current, near, held: places, serials, counts, .. } = &mut *self;
            let turn = participant.enter();
            let Some(conn) = table.identified(identity, &turn) else { continue };
            let slot = conn.offload_slot();
            let kept =
                (conn.flags() & OFFLOADED != 0).then(|| by_slot.get(&slot).copied()).flatten().and_then(|keys| {
                    let [Some((original, serial)), Some((reply, again))] = keys else { return None };
                    let flow = offload.flow(slot)?;
                    let recipe = recipe::of_connection(&conn, current, near).ok()?;
                    let is_same = recipe.keys == [original, reply]
                        && serial == again
                        && flow.state() == (serial, Phase::Live)
                        && recipe.is_written(flow);
                    is_same.then(|| {
                        let request = Request { is_v6: A::BITS == 128, identity };
                        let carried = [Direction::Original, Direction::Reply].map(|direction| flow.carried(direction));
                        Held { request, serial, recipe, carried, since: conn.last_seen(), is_over: false }
                    })
                });
            match kept {
                Some(held) if (slot as usize) < serials.len() => {
                    conn.change_flags(0, ASKED);
                    by_slot.remove(&slot);
                    places.resize(places.len().max(slot as usize + 1), None);
                    serials[slot as usize] = held.serial;
                    places[slot as usize] = Some(held);
                    counts.flows += 1;
                }
                _ => {
                    // What has passed there in vain is known at least.
                    let keys =
                        by_slot.get(&slot).and_then(|[original, reply]| Some([original.as_ref()?, reply.as_ref()?]));
                    let is_its = keys.is_some_and(|[(original, _), (reply, _)]| {
                        original.is_of(&conn.original()) && reply.is_of(&conn.reply())
                    });
                    if conn.flags() & OFFLOADED != 0
                        && is_its
                        && let Some(flow) = offload.flow(slot)
                    {
                        flow.close();
                        if flow.has_windows() {
                            conn.absorb(&flow.windows(), Direction::Reply);
                        }
                    }
                    conn.change_flags(0, ASKED | OFFLOADED);
                }
            }
        }
    }

    /// Before `next` is published: flows that it does not change get its epoch, all others are stopped when this returns. Those for which
    /// there is no time are looked at by [`Self::confirm_more`].
    pub fn prepare(&mut self, next: &Arc<Snapshot>, tables: &Tables) {
        let begin = Instant::now();
        self.current = Arc::clone(next);
        self.confirmed = 0;
        while self.confirmed < self.held.len() && begin.elapsed() <= PATIENCE {
            self.confirm(tables);
        }
        self.counts.unconfirmed += (self.held.len() - self.confirmed) as u64;
        self.offload.epoch[0].store(u64::from(next.generation), Ordering::Release);
    }

    /// Goes on with the flows for which the last publication had no time; whether there are more.
    pub fn confirm_more(&mut self, tables: &Tables) -> bool {
        for _ in 0..CHUNKS_AT_ONCE {
            if self.confirmed >= self.held.len() {
                return false;
            }
            self.confirm(tables);
        }
        true
    }

    /// Compares what the programs do in some slots with what they are to do now.
    fn confirm(&mut self, tables: &Tables) {
        let Self { offload, participant, current, near, held, confirmed, .. } = self;
        let turn = participant.enter();
        let chunk = *confirmed..(*confirmed + CHUNK).min(held.len());
        *confirmed = chunk.end;
        for (slot, held) in chunk.clone().zip(&held[chunk]) {
            let (Some(held), Some(flow)) = (held, offload.flow(slot as u32)) else { continue };
            let is_live = flow.state() == (held.serial, Phase::Live);
            if is_live
                && flow.epoch.load(Ordering::Relaxed) != current.generation
                && still_same(held, current, tables, near, &turn)
            {
                flow.epoch.store(current.generation, Ordering::Release);
            }
        }
    }

    /// Answers requests. A grace period must have passed since they were made ([`wait_for_programs`]), and since `graces` of them.
    pub fn answer(&mut self, requests: &[Request], graces: u64, tables: &Tables) {
        self.graces = self.graces.max(graces);
        for request in requests {
            match request.is_v6 {
                false => self.answer_one(&tables.v4, *request),
                true => self.answer_one(&tables.v6, *request),
            }
        }
    }

    fn answer_one<A: Family>(&mut self, table: &Table<A>, request: Request) {
        let free = self.free_slot();
        let Self { offload, keys, participant, current, near, held, serials, counts, resting, .. } = &mut *self;
        let turn = participant.enter();
        let mut found_none = false;
        if let Some(conn) = table.identified(request.identity, &turn) {
            let before = (conn.flags() & OFFLOADED != 0).then(|| conn.offload_slot());
            match recipe::of_connection(&conn, current, near) {
                Err(stays) => {
                    match stays {
                        Stays::Elsewhere => counts.elsewhere += 1,
                        Stays::Unsettled | Stays::Unresolved => counts.unsettled += 1,
                    }
                    // Its packets ask again, where that may help.
                    let gives_up = if stays == Stays::Elsewhere { CANDIDATE } else { 0 };
                    conn.change_flags(0, ASKED | gives_up);
                    if let Some(flow) = before.and_then(|slot| offload.flow(slot)) {
                        flow.close();
                    }
                }
                Ok(recipe) => match before.or(free) {
                    None => {
                        counts.full += 1;
                        found_none = true;
                        conn.change_flags(0, ASKED | CANDIDATE);
                    }
                    Some(slot) if before.is_some() && held[slot as usize].is_some_and(|held| held.recipe == recipe) => {
                        // There was no time to confirm it, and it is as it was.
                        let flow = offload.flow(slot).expect("slots are the programs'");
                        flow.epoch.store(current.generation, Ordering::Relaxed);
                        match conn.windows() {
                            Some(windows) => flow.advance(&windows.sides),
                            None if conn.protocol() == Protocol::TCP => flow.close(),
                            None => {}
                        }
                        if flow.change(serials[slot as usize], Phase::Pending, Phase::Live) {
                            counts.renewed += 1;
                        }
                        conn.change_flags(0, ASKED);
                    }
                    Some(slot) => {
                        let flow = offload.flow(slot).expect("slots are the programs'");
                        let serial = serials[slot as usize].wrapping_add(1) & (u32::MAX >> 2);
                        if before.is_none() {
                            match resting.front() {
                                Some((.., first)) if *first == slot => drop(resting.pop_front()),
                                _ => held.push(None),
                            }
                            flow.set_state(serial, Phase::Pending);
                        } else if !flow.begin_anew(serials[slot as usize], serial) {
                            // It asked twice, and programs read the slot; or it was taken back since.
                            conn.change_flags(0, ASKED);
                            return;
                        }
                        serials[slot as usize] = serial;
                        let earlier = held[slot as usize];
                        if let Some(earlier) = &earlier {
                            earlier.remove_keys(slot, &mut **keys);
                            counts.renewed += 1;
                        } else {
                            flow.ways.iter().for_each(|way| {
                                way.packets.store(0, Ordering::Relaxed);
                                way.bytes.store(0, Ordering::Relaxed);
                            });
                            counts.flows += 1;
                            counts.handed_over += 1;
                        }
                        recipe.write(flow);
                        flow.epoch.store(current.generation, Ordering::Relaxed);
                        let carried = earlier.map_or([(0, 0); 2], |earlier| earlier.carried);
                        let since = now();
                        held[slot as usize] = Some(Held { request, serial, recipe, carried, since, is_over: false });
                        let inserted = recipe
                            .keys
                            .iter()
                            .zip([2 * slot, 2 * slot + 1])
                            .try_for_each(|(key, way)| keys.insert(key, way, serial));
                        // A worker that finds the connection marked takes the windows over, so they are there before. Whoever removes it
                        // from then on takes the flow back; only then it is live.
                        let windows = conn.windows();
                        match &windows {
                            Some(windows) if earlier.is_some() => flow.advance(&windows.sides),
                            Some(windows) => flow.set_windows(windows),
                            None => {}
                        }
                        conn.set_offload_slot(slot);
                        let is_marked = inserted.is_ok() && conn.change_flags(OFFLOADED, ASKED);
                        if is_marked && windows.is_some() == (conn.protocol() == Protocol::TCP) {
                            flow.change(serial, Phase::Pending, Phase::Live);
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
                        if inserted.is_err() {
                            counts.failed += 1;
                            conn.change_flags(0, ASKED | CANDIDATE);
                        }
                    }
                },
            }
        }
        drop(turn);
        if found_none && self.resting.is_empty() {
            self.evict(now());
        }
    }

    /// A slot that neither a program nor a worker can be reading: the first that rests, or one that was never used.
    fn free_slot(&self) -> Option<u32> {
        match self.resting.front() {
            Some((epoch, graces, slot)) if *graces < self.graces && self.domain.passed(*epoch) => Some(*slot),
            _ => (self.held.len() < self.serials.len()).then_some(self.held.len() as u32),
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

    /// Tells the tables what was carried, and frees the slots of flows that are over.
    pub fn look(&mut self, tables: &Tables) {
        let now = now();
        let mut freed = Vec::new();
        for start in (0..self.held.len()).step_by(CHUNK) {
            let Self { offload, participant, held, counts, .. } = &mut *self;
            let turn = participant.enter();
            let chunk = start..(start + CHUNK).min(held.len());
            for (slot, place) in chunk.clone().zip(&mut held[chunk]) {
                let (Some(held), Some(flow)) = (place.as_mut(), offload.flow(slot as u32)) else { continue };
                let carried = [Direction::Original, Direction::Reply].map(|direction| flow.carried(direction));
                let moved = [0, 1].map(|way| carried[way].0 != held.carried[way].0);
                for (new, old) in carried.iter().zip(&held.carried) {
                    counts.packets += new.0 - old.0;
                    counts.bytes += new.1 - old.1;
                }
                held.carried = carried;
                let was_over = held.is_over;
                held.is_over = flow.state().1 == Phase::Closed;
                let windows = flow.has_windows().then(|| flow.windows());
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
                }
            }
        }
        for (slot, held) in freed {
            held.remove_keys(slot, &mut *self.keys);
            self.resting.push_back((self.domain.retire_epoch(), self.graces, slot));
        }
    }
}

/// Whether the programs are to do by `next` what they do already.
fn still_same(held: &Held, next: &Snapshot, tables: &Tables, near: &BTreeSet<u32>, turn: &Turn<'_>) -> bool {
    fn of<A: Family>(held: &Held, next: &Snapshot, table: &Table<A>, near: &BTreeSet<u32>, turn: &Turn<'_>) -> bool {
        let conn = table.identified(held.request.identity, turn);
        conn.is_some_and(|conn| recipe::of_connection(&conn, next, near).as_ref() == Ok(&held.recipe))
    }
    match held.request.is_v6 {
        false => of(held, next, &tables.v4, near, turn),
        true => of(held, next, &tables.v6, near, turn),
    }
}

/// Tells a connection which of its directions were carried; whether it still is one.
fn told<A: Family>(
    table: &Table<A>,
    held: &Held,
    moved: [bool; 2],
    windows: Option<&[[u32; 4]; 2]>,
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

fn heard<A: Family>(conn: &ConnRef<'_, A>, direction: Direction, windows: Option<&[[u32; 4]; 2]>, now: Tick) {
    if conn.protocol() == Protocol::TCP {
        if let Some(windows) = windows {
            conn.absorb(windows, direction);
        }
        conn.touch(now);
    } else {
        conn.track(direction, &Observed::NOTHING, now);
    }
}

/// The keeper's thread: answers requests as they come and looks after flows, until `is_over` says so.
pub fn keep(keeper: &Mutex<Keeper>, requests: &Receiver<Request>, tables: &Tables, is_over: impl Fn() -> bool) {
    let mut batch = Vec::with_capacity(BATCH);
    let (mut graces, mut looked, mut is_behind) = (0, Instant::now(), false);
    while !is_over() {
        let patience = if is_behind { Duration::ZERO } else { LOOK.saturating_sub(looked.elapsed()) };
        match requests.recv_timeout(patience) {
            Ok(request) => {
                batch.push(request);
                batch.extend(requests.try_iter().take(BATCH - 1));
                // What it does not write again is never reused.
                if wait_for_programs().is_ok() {
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
