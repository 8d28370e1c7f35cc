//! Flow offload: established flows in the kernel, decided by the workers.
//!
//! # What
//! Workers decide every flow. One that is settled, TCP when it is established and UDP when it was answered or goes on, is handed over to
//! the tc programs (`bpf/offload.h`), which rewrite its packets and give them to where they go without a visit to this process. The
//! connection in the table stays the only truth: what the programs have is a repetition of it, which ends with it.
//!
//! # Who does what
//! A *worker* asks for a flow to be handed over, once ([`Offload::consider`]), and takes its packets back when one comes that is not plain.
//! The *keeper* ([`keeper`]), a thread of its own, writes what the programs read, tells the table what they have carried, and cleans up. Whom it
//! refuses for want of slots may ask again when some are free.
//! *Control* lets the keeper prepare each publication ([`keeper::Keeper::prepare`]).
//!
//! # Layout
//! A slot ([`flow::Flow`]) for each flow, in an array that the programs and this process share; two keys for each, one a direction, in
//! hash maps that lead to the slot. A key has the device that the packet came by, so that who forges a source does not find it. A
//! connection that was handed over is marked so ([`weir_conntrack::OFFLOADED`]) and knows its slot.
//!
//! # When a program carries a packet
//! 1. *The flow is the one that was meant.* A key's value has the serial number of the slot's use; the slot's state has the same and says
//!    that it is live. Taking a flow back is one store to the state, whoever does it: [`weir_conntrack::Table`] before it removes a
//!    connection, the keeper before it uses the slot otherwise. The keys may come before it is live, and go later.
//! 2. *Nothing was published that might change the verdict.* The slot's epoch is not before the one in force. Before control publishes,
//!    it works out for every flow by the new tables what the programs are to do ([`recipe::of_connection`], which judges it as a worker
//!    would). Where that is what they do already, the slot gets the new epoch. Then the new epoch is put in force, then the tables
//!    are published. So what the new tables deny, send elsewhere, or translate otherwise passes no more from that moment on: its next
//!    packet comes to a worker, which judges it. And what they do not change does not notice. A publication waits for this work no
//!    longer than [`keeper::PATIENCE`]; flows for which there was no time visit workers until the keeper has come to them.
//! 3. *The packet is plain*, so that nothing else than what the programs do is to be done with it. TTL and MTU, so that ICMP errors come
//!    from a worker; flags and windows of TCP.
//!
//! # TCP
//! The slot has both sides' windows, and the programs hold every segment against them, and move them, as
//! [`weir_conntrack::tcp`] does, but for SACK: what only fits with its help goes to a worker, and a block beyond what was sent, for which a
//! worker drops a segment, is not seen. Of a packet of several segments, merged by the kernel or to be cut by a device, each must fit: a worker
//! gets them one by one. A segment with FIN, SYN, RST or URG, or outside of a window, goes to a worker, which first takes the windows over from
//! the slot ([`ConnRef::absorb`]), so that it knows what has passed, and afterwards gives back what it has moved. All move forward only, so that
//! it does not matter who comes first. A RST is thus judged by the windows of this moment. Where both ends begin anew, with other numbers, the
//! slot's are taken over no more.
//!
//! # Reuse of a slot
//! A slot is written while its state is not live. A program may have found it live a moment before, and still be reading: so it is
//! written again only after all programs that ran at that time have ended, an RCU grace period, which `membarrier(2)` waits for
//! (`MEMBARRIER_CMD_GLOBAL` is `synchronize_rcu()`). Where that fails, no slot is written that ever was live: who would need it stays with the
//! workers, until it succeeds again. A worker may have found the connection marked, and read its slot: so
//! a slot that is freed is used again only when all turns of that time are over ([`weir_sync::domain`]).
//!
//! # Memory order
//! Whoever writes a slot stores its state last, with release; programs load the state first, and nothing else of the slot but by an address that depends on
//! what was loaded (`find` in dataplane/bpf/offload.h), which arm64 keeps in order without a barrier; older kernels' BPF has no acquire load. Workers
//! load it with acquire. What is stored of a slot that is live (windows, counters, the epoch) stands alone: each word is right by itself, whenever it is seen. The epoch in
//! force is stored after the slots', so who sees an old one of both takes the flow's packet for one of before the publication, and who sees the
//! newer of the two only, for a stale one.
//!
//! # Ageing
//! The programs read no clock. The keeper looks at their counters several times a second: a flow that was carried since keeps its connection alive.
//!
//! # Thread safety
//! Workers and the table share an [`Offload`]; everything in it is atomic, or a bounded channel. The [`keeper::Keeper`] is behind a
//! mutex that the keeper's thread and control take.

pub mod flow;
pub mod keeper;
pub mod recipe;

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use weir_conntrack::{ConnRef, Identity, OFFLOADED, Offloader, TcpState};
use weir_packet::{Address, Direction, Protocol};

use self::flow::{Flow, Mapped, Phase};

/// A connection's flag: it may be handed over.
pub const CANDIDATE: u8 = 1;
/// It was asked for.
const ASKED: u8 = 1 << 1;
/// Packets that were seen, of TCP since the connection has proved itself; up to [`MAX_UDP_PACKETS`].
const COUNTED: u8 = MAX_UDP_PACKETS << COUNTED_SHIFT;
const COUNTED_SHIFT: u32 = 2;

/// The most packets after which an unanswered UDP flow may be handed over.
pub const MAX_UDP_PACKETS: u8 = 15;

/// A TCP connection is handed over after so many packets: most connections that carry one request and a short answer are over before, and
/// to hand over costs some microseconds.
const TCP_PACKETS: u8 = 8;
/// An answered UDP flow is handed over after so many packets: two questions of a resolver (A and AAAA) and their answers are fewer.
const ANSWERED_PACKETS: u8 = 5;

/// Flows that may wait for the keeper.
const REQUESTS: usize = 4096;

/// A connection of either family.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    /// Whether it is of IPv6.
    pub is_v6: bool,
    /// Which it is.
    pub identity: Identity,
}

impl Request {
    /// That a connection be handed over.
    fn of<A: Address>(conn: &ConnRef<'_, A>) -> Self {
        Self { is_v6: A::BITS == 128, identity: conn.identity() }
    }
}

/// What workers and tables know of the offload.
#[derive(Debug)]
pub struct Offload {
    flows: Mapped<Flow>,
    /// One word, of which the lower half is the publication in force.
    epoch: Mapped<AtomicU64>,
    requests: Sender<Request>,
    udp_packets: u8,
    /// Requests that found the channel full.
    unheard: AtomicU64,
}

impl Offload {
    /// Over the programs' memory, or private one. `udp_packets`: so many after its first an unanswered UDP flow is handed over. The receiver is the
    /// keeper's.
    pub fn new(flows: Mapped<Flow>, epoch: Mapped<AtomicU64>, udp_packets: u8) -> (Self, Receiver<Request>) {
        let (requests, receiver) = bounded(REQUESTS);
        let udp_packets = udp_packets.clamp(1, MAX_UDP_PACKETS);
        (Self { flows, epoch, requests, udp_packets, unheard: AtomicU64::new(0) }, receiver)
    }

    /// The publication in force.
    #[inline]
    pub fn epoch(&self) -> u32 {
        self.epoch[0].load(Ordering::Acquire) as u32
    }

    /// A slot.
    #[inline]
    pub fn flow(&self, slot: u32) -> Option<&Flow> {
        self.flows.get(slot as usize)
    }

    /// Before a worker follows a packet of a connection: what the programs have moved meanwhile.
    #[inline]
    pub fn take_windows<A: Address>(&self, conn: &ConnRef<'_, A>, direction: Direction) {
        if conn.flags() & OFFLOADED != 0
            && let Some(flow) = self.flow(conn.offload_slot())
            && flow.has_windows()
        {
            conn.absorb(&flow.windows(), direction, false);
        }
    }

    /// After a worker has followed a packet of a connection: asks for it to be handed over, where it is time for that.
    #[inline]
    pub fn consider<A: Address>(&self, conn: &ConnRef<'_, A>, direction: Direction) {
        let flags = conn.flags();
        if flags & CANDIDATE == 0 || flags & ASKED != 0 {
            return;
        }
        if flags & OFFLOADED != 0 {
            return self.give_back(conn, direction);
        }
        let enough = match conn.protocol() {
            Protocol::TCP if conn.assured() => TCP_PACKETS,
            Protocol::UDP if conn.seen_reply() => ANSWERED_PACKETS.min(self.udp_packets),
            Protocol::UDP => self.udp_packets,
            _ => return,
        };
        let counted = ((flags & COUNTED) >> COUNTED_SHIFT) + 1;
        if counted < enough {
            conn.change_flags(counted << COUNTED_SHIFT, COUNTED);
            return;
        }
        self.ask(conn);
    }

    #[cold]
    fn ask<A: Address>(&self, conn: &ConnRef<'_, A>) {
        if conn.protocol() == Protocol::TCP && conn.windows().is_none() || !conn.change_flags(ASKED, 0) {
            return;
        }
        if !self.send(conn) {
            conn.change_flags(0, ASKED);
        }
    }

    fn send<A: Address>(&self, conn: &ConnRef<'_, A>) -> bool {
        match self.requests.try_send(Request::of(conn)) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.unheard.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    /// A packet of a flow that was handed over came to a worker all the same.
    #[cold]
    fn give_back<A: Address>(&self, conn: &ConnRef<'_, A>, direction: Direction) {
        let Some(flow) = self.flow(conn.offload_slot()) else { return };
        let (serial, phase) = flow.state();
        if conn.protocol() == Protocol::TCP {
            match conn.windows() {
                Some(windows) => flow.advance(&windows.sides),
                None => {
                    // A new handshake, or it is ending. What the programs know is of the connection before, and ahead of this one perhaps.
                    if matches!(conn.tcp_state(), Some(TcpState::SynSent | TcpState::SynSent2 | TcpState::SynRecv)) {
                        flow.forget_windows();
                    }
                    return flow.close();
                }
            }
        }
        let is_stale = (flow.epoch.load(Ordering::Relaxed).wrapping_sub(self.epoch()) as i32) < 0;
        let is_closed = flow.ways[direction as usize].exit.load(Ordering::Relaxed) == recipe::Exit::Closed as u8;
        // Whoever changes the phase asks.
        if phase == Phase::Live
            && (is_stale || is_closed && conn.seen_reply())
            && flow.change(serial, Phase::Live, Phase::Pending)
            && !self.send(conn)
        {
            flow.close();
        }
    }
}

impl Offloader for Offload {
    fn take_back(&self, slot: u32) {
        if let Some(flow) = self.flow(slot) {
            flow.close();
        }
    }
}
