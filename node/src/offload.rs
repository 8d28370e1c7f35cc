//! Flows in the kernel: the control's side of [`weir_dataplane::offload`].

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, atomic::Ordering},
    thread,
};

use crossbeam::channel::Receiver;
use serde_json::{Value, json};
use tracing::{info, warn};
use weir_dataplane::{
    attach::OffloadMaps,
    offload::{
        Offload, Request,
        flow::wait_for_programs,
        keeper::{Keeper, Keys, keep},
        recipe::Key,
    },
    snapshot::Snapshot,
    tables::Tables,
    worker::Shared,
};
use weir_sync::{Domain, Mutex, lock};

/// Maps, before there are tables.
pub struct Offloading {
    shared: Arc<Offload>,
    requests: Receiver<Request>,
    keys: Box<dyn Keys>,
    /// The keys that the process before has left.
    left: Vec<(Key, u32, u32)>,
    capacity: u32,
}

/// Flows in the kernel, looked after.
pub struct Offloader {
    shared: Arc<Offload>,
    requests: Receiver<Request>,
    keeper: Arc<Mutex<Keeper>>,
}

impl Offloading {
    /// Over these maps, if there are to be flows in the kernel, and the kernel can tell when its programs have ended. `left`: all keys that
    /// they have.
    pub fn prepare(maps: Option<OffloadMaps>, left: Vec<(Key, u32, u32)>, udp_packets: u8) -> Option<Self> {
        let OffloadMaps { flows, epoch, keys } = maps?;
        if let Err(error) = wait_for_programs() {
            warn!(%error, "no flow is handed over to the kernel: it does not tell when its programs have ended (membarrier(2); nohz_full?)");
            return None;
        }
        let capacity = flows.len() as u32;
        let (offload, requests) = Offload::new(flows, epoch, udp_packets);
        Some(Self { shared: Arc::new(offload), requests, keys: Box::new(keys), left, capacity })
    }

    /// The number of the first publication: after those of the process before.
    pub fn next_generation(&self) -> u32 {
        self.shared.epoch().wrapping_add(1).max(1)
    }

    /// Takes over what the process before has handed over, as far as `first` agrees. Before workers run.
    pub fn begin(self, tables: &Tables, domain: &Arc<Domain>, first: &Arc<Snapshot>, near: BTreeSet<u32>) -> Offloader {
        let Self { shared, requests, keys, left, capacity } = self;
        tables.v4.offload_to(shared.clone());
        tables.v6.offload_to(shared.clone());
        let mut keeper = Keeper::new(shared.clone(), capacity, keys, domain, first.clone());
        keeper.set_near(near);
        let flows = keeper.adopt(left, tables);
        if flows > 0 {
            info!(flows, "flows in the kernel go on");
        }
        keeper.prepare(first, tables);
        Offloader { shared, requests, keeper: Arc::new(Mutex::new(keeper)) }
    }
}

impl Offloader {
    /// What workers know of it.
    pub fn shared(&self) -> Arc<Offload> {
        self.shared.clone()
    }

    /// Starts the thread that hands flows over, until the workers stop.
    ///
    /// # Errors
    /// Where there can be no thread.
    pub fn spawn(&self, workers: Arc<Shared>) -> io::Result<()> {
        let (keeper, requests) = (self.keeper.clone(), self.requests.clone());
        thread::Builder::new().name("weir-offload".into()).spawn(move || {
            let is_over = || workers.stop.load(Ordering::Relaxed);
            keep(&keeper, &requests, &workers.tables, is_over, wait_for_programs);
        })?;
        Ok(())
    }

    /// Before `next` is published: see [`Keeper::prepare`].
    pub fn prepare(&self, next: &Arc<Snapshot>, tables: &Tables, near: BTreeSet<u32>) {
        let mut keeper = lock(&self.keeper);
        keeper.set_near(near);
        keeper.prepare(next, tables);
    }

    /// What became of flows.
    pub fn to_json(&self) -> Value {
        let counts = lock(&self.keeper).counts();
        json!({
            "flows": counts.flows, "capacity": counts.capacity, "handedOver": counts.handed_over, "renewed": counts.renewed,
            "takenBack": counts.taken_back, "evicted": counts.evicted, "unconfirmed": counts.unconfirmed,
            "packets": counts.packets, "bytes": counts.bytes,
            "stay": {
                "full": counts.full, "elsewhere": counts.elsewhere, "unsettled": counts.unsettled,
                "refusedByKernel": counts.failed, "unheard": counts.unheard,
            },
        })
    }
}
