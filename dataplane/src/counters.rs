//! What a worker counts. The law (the design, "Life of a packet", 11):
//! `rx + generated = tx + drops + punted + consumed + held`.

use weir_packet::DropReason;

/// Indices into a worker's counters; the drop reasons follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Counter {
    /// Packets received.
    Rx,
    /// Packets that weir made: answers, resets, ICMP errors, fragments.
    Generated,
    /// Packets sent, those to the node's kernel excepted.
    Tx,
    /// Packets handed to the node's kernel.
    Punted,
    /// Packets that were answered or merged.
    Consumed,
    /// Connections opened.
    Opened,
    /// Connections that were given a source port of weir's.
    SnatAllocated,
    /// Source ports that were tried for a connection and found taken towards its destination.
    SnatTaken,
    /// Connections that had not proved themselves, or were over, and lost their source port to a new one.
    SnatDisplaced,
    /// Datagrams that an ICMP error brought back from where a backend that drained is no more, and that were sent on as first packets.
    SentAgain,
}

/// Number of counters that are no drop reason.
pub const PLAIN_COUNTERS: usize = 10;
/// Number of counters of a worker.
pub const COUNTERS: usize = PLAIN_COUNTERS + DropReason::COUNT;

/// Index of a drop reason's counter.
#[inline]
pub const fn drop_index(reason: DropReason) -> usize {
    PLAIN_COUNTERS + reason as usize
}

/// The sums of all workers at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Packets received.
    pub rx: u64,
    /// Packets made.
    pub generated: u64,
    /// Packets sent.
    pub tx: u64,
    /// Packets handed to the node's kernel.
    pub punted: u64,
    /// Packets answered or merged.
    pub consumed: u64,
    /// Packets that wait for a neighbour.
    pub held: u64,
    /// Connections opened.
    pub opened: u64,
    /// Connections that were given a source port of weir's.
    pub snat_allocated: u64,
    /// Source ports that were tried and found taken. With a share `s` of the ports taken towards a destination, each further connection
    /// there costs `s / (1 - s)` of them: exhaustion shows long before the first [`DropReason::SnatExhausted`].
    pub snat_taken: u64,
    /// Connections that had not proved themselves, or were over, and lost their source port to a new one.
    pub snat_displaced: u64,
    /// Datagrams that an ICMP error brought back from where a backend that drained is no more, and that were sent on as first packets.
    pub sent_again: u64,
    /// Packets dropped, by reason; reasons that never occurred are left out.
    pub drops: Vec<(DropReason, u64)>,
}

impl Totals {
    /// From a worker's (or the summed) counters and the number of packets held.
    pub fn new(counters: &[u64; COUNTERS], held: u64) -> Self {
        let of = |c: Counter| counters[c as usize];
        Self {
            rx: of(Counter::Rx),
            generated: of(Counter::Generated),
            tx: of(Counter::Tx),
            punted: of(Counter::Punted),
            consumed: of(Counter::Consumed),
            held,
            opened: of(Counter::Opened),
            snat_allocated: of(Counter::SnatAllocated),
            snat_taken: of(Counter::SnatTaken),
            snat_displaced: of(Counter::SnatDisplaced),
            sent_again: of(Counter::SentAgain),
            drops: DropReason::ALL.iter().map(|r| (*r, counters[drop_index(*r)])).filter(|(_, n)| *n > 0).collect(),
        }
    }

    /// All drops.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().map(|(_, n)| n).sum()
    }

    /// Whether the law holds.
    pub fn balance(&self) -> bool {
        self.rx + self.generated == self.tx + self.dropped() + self.punted + self.consumed + self.held
    }
}
