//! The worker: a pinned thread that turns.
//!
//! A turn: receive a burst from each port, process it, transmit what it made, do a share of the upkeep. A worker with nothing to do spins
//! for a while and then sleeps until a socket has a packet (adaptive mode), or spins for ever (busy mode).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use weir_nat::Affinity;
use weir_sync::{Participant, Published};

use crate::{
    afxdp::AfXdp,
    clock::now,
    driver::{Driver, PortId},
    frame::Packet,
    offload::Offload,
    pipeline::{Context, Pipeline, process_burst},
    snapshot::Snapshot,
    tables::Tables,
};

/// Connections of each table that one turn looks at, to remove the expired.
const SWEEP_SHARE: u32 = 32;
/// Empty turns before a worker in adaptive mode sleeps. A turn without packets takes about a microsecond.
const IDLE_TURNS: u32 = 200;
/// Longest sleep: held packets and expired connections are looked after that often without traffic.
const MAX_SLEEP: Duration = Duration::from_millis(100);

/// What the workers of one process share.
#[derive(Debug)]
pub struct Shared {
    /// Services, policy, forwarding.
    pub snapshot: Published<Snapshot>,
    /// Connections.
    pub tables: Tables,
    /// Which backends clients had.
    pub affinity: Affinity,
    /// Whether a TCP connection may be picked up mid-stream.
    pub tcp_loose: bool,
    /// To whom settled flows are handed over.
    pub offload: Option<Arc<Offload>>,
    /// Set to end all workers.
    pub stop: AtomicBool,
}

/// Whether an idle worker sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It spins.
    Busy,
    /// It spins a while, then sleeps.
    Adaptive,
}

/// A driver that can wait for packets and that can fail.
pub trait Device: Driver {
    /// Waits until a port may have received something, or `limit` has passed. With a limit of zero it only looks after the devices.
    ///
    /// # Errors
    /// Where a device failed for good.
    fn sleep(&mut self, limit: Duration) -> std::io::Result<()>;
}

impl Device for AfXdp {
    fn sleep(&mut self, limit: Duration) -> std::io::Result<()> {
        AfXdp::sleep(self, limit);
        self.fault().map_or(Ok(()), |fault| Err(std::io::Error::other(fault)))
    }
}

/// One worker.
pub struct Worker<D> {
    driver: D,
    pipeline: Pipeline,
    participant: Participant,
    shared: Arc<Shared>,
    burst: Vec<Packet>,
    burst_limit: usize,
    mode: Mode,
}

impl<D: Device> Worker<D> {
    /// A worker over `driver`; `burst_limit` packets are handled in one turn.
    pub fn new(
        driver: D,
        pipeline: Pipeline,
        participant: Participant,
        shared: Arc<Shared>,
        burst_limit: usize,
        mode: Mode,
    ) -> Self {
        Self { driver, pipeline, participant, shared, burst: Vec::with_capacity(burst_limit), burst_limit, mode }
    }

    /// Turns until `stop` is set.
    ///
    /// # Errors
    /// Where a device fails for good.
    pub fn run(&mut self) -> std::io::Result<()> {
        let mut idle_turns = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.turn() > 0 {
                idle_turns = 0;
                continue;
            }
            idle_turns += 1;
            if idle_turns <= IDLE_TURNS {
                std::hint::spin_loop();
                continue;
            }
            // Outside a turn: nobody waits for a sleeping worker. A busy one only looks whether its devices still live.
            self.driver.sleep(if self.mode == Mode::Adaptive { MAX_SLEEP } else { Duration::ZERO })?;
            idle_turns = if self.mode == Mode::Adaptive { IDLE_TURNS / 2 } else { 0 };
        }
        self.pipeline.give_up_held(&mut self.driver);
        Ok(())
    }

    /// One turn; the number of packets handled.
    fn turn(&mut self) -> usize {
        let Self { driver, pipeline, participant, shared, burst, burst_limit, .. } = self;
        let turn = participant.enter();
        let context = Context {
            tcp_loose: shared.tcp_loose,
            offload: shared.offload.as_deref(),
            ..Context::new(shared.snapshot.load(&turn), &shared.tables, &shared.affinity, &turn, now())
        };
        let mut handled = 0;
        for port in 0..driver.ports() {
            driver.receive(PortId(port as u8), burst, *burst_limit);
            handled += burst.len();
            process_burst(pipeline, driver, burst, &context);
        }
        pipeline.maintain(driver, &context, SWEEP_SHARE);
        pipeline.flush(driver);
        handled
    }
}
