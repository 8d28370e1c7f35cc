//! A router of one worker over memory: the same dataplane without devices, for replay, the demo without privileges, and tests.

use std::{sync::Arc, time::Duration};

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::Value;
use weir_cluster::{
    compile::{self, CompileError, Compilers},
    sockets::Listening,
    translate::Loaded,
};
use weir_dataplane::{
    counters::Totals,
    driver::Driver,
    forwarding::Forwarding,
    frame::{LinkType, MAX_MTU, frames_of_mtu},
    memory::InjectError,
    memory_worker::{MemoryWorker, Room, Shared},
    model::{Cluster, Device, Links, Neighbor, Role},
    pipeline::{Context, Event, process_burst},
    snapshot::{Rules, Snapshot},
};
use weir_nat::{Affinity, SnatPorts};
use weir_packet::{Mac, Tick};
use weir_sync::Domain;

use crate::report::connection;

/// Frames of the memory driver: more than may be held of the longest packets of any MTU, plus what one packet can make.
const FRAMES: u32 = 1024 * frames_of_mtu(MAX_MTU);
/// Connections of each table that are looked at after each packet, to remove the expired.
const SWEEP_SHARE: u32 = 64;

/// Why a router cannot be made, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MemoryRouterError {
    /// Something is too large to compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

/// A dataplane of one worker over memory.
pub struct MemoryRouter {
    links: Links,
    cluster: Arc<Cluster>,
    compilers: Compilers,
    rules: Arc<Rules>,
    snat: Arc<SnatPorts>,
    generation: u32,
    shared: Shared,
    worker: MemoryWorker,
    tcp_loose: bool,
    now: Tick,
}

impl MemoryRouter {
    /// A router for `loaded` with the devices, routes and neighbours of `links`.
    ///
    /// # Errors
    /// Where something is too large to compile.
    pub fn new(loaded: Loaded, links: Links, seed: u64) -> Result<Self, MemoryRouterError> {
        let mut compilers = Compilers::default();
        let rules = Arc::new(compilers.rules(&loaded)?);
        let snat = Arc::new(compile::snat_ports(&loaded, &rules, &Listening::default())?);
        let forwarding = Arc::new(Forwarding::compile(&loaded.cluster, &links).map_err(CompileError::from)?);
        let domain = Domain::new();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let tables = compile::tables(&loaded.config.conntrack, &domain, &mut random);
        let ports = 1 + links.devices.iter().filter(|d| d.role == Role::Uplink).count();
        let first = Snapshot { generation: 1, rules: rules.clone(), snat: snat.clone(), forwarding };
        let affinity = Affinity::new(Affinity::DEFAULT_CLIENTS, [seed, !seed]);
        let shared = Shared::new(domain, first, tables, affinity);
        let mut worker = MemoryWorker::new(&shared, random, Room { burst: 1, ports, frames: FRAMES, events: 1024 });
        let lifetimes = compile::fragment_lifetimes(&loaded.config.conntrack);
        worker.pipeline = worker.pipeline.with_fragment_lifetimes(lifetimes);
        Ok(Self {
            shared,
            worker,
            links,
            cluster: loaded.cluster,
            compilers,
            rules,
            snat,
            generation: 1,
            tcp_loose: loaded.config.conntrack.tcp_loose,
            now: Tick::default(),
        })
    }

    /// Takes over another configuration; what pods' MAC addresses were learned is kept.
    ///
    /// # Errors
    /// Where something is too large to compile.
    pub fn reload(&mut self, loaded: Loaded) -> Result<(), MemoryRouterError> {
        let learned = std::mem::take(&mut self.links.neighbors);
        self.links = compile::links_of(&loaded.config);
        for neighbor in learned {
            self.learn(neighbor);
        }
        self.rules = Arc::new(self.compilers.rules(&loaded)?);
        self.snat = Arc::new(compile::snat_ports(&loaded, &self.rules, &Listening::default())?);
        self.cluster = loaded.cluster;
        self.publish()?;
        self.shared.affinity.forget_gone(&self.rules.services);
        Ok(())
    }

    fn learn(&mut self, neighbor: Neighbor) -> bool {
        let known = self.links.neighbors.iter().any(|n| (n.address, n.device) == (neighbor.address, neighbor.device));
        if !known {
            self.links.neighbors.push(neighbor);
        }
        !known
    }

    fn publish(&mut self) -> Result<(), MemoryRouterError> {
        let forwarding = Forwarding::compile(&self.cluster, &self.links).map_err(CompileError::from)?;
        self.generation += 1;
        self.shared.published.publish(Snapshot {
            generation: self.generation,
            rules: self.rules.clone(),
            snat: self.snat.clone(),
            forwarding: Arc::new(forwarding),
        });
        Ok(())
    }

    /// Handles one packet that `device` (by its place in [`MemoryRouter::devices`]) receives, `at` after the clock's start.
    ///
    /// # Errors
    /// Where what was learned from it is too large to compile.
    pub fn packet(&mut self, device: usize, bytes: &[u8], at: Duration) -> Result<(), MemoryRouterError> {
        self.now = Tick::from_ns(at.as_nanos() as u64);
        let device = &self.links.devices[device];
        let (index, link) = (device.index, link_type(device, bytes));
        let port = {
            let turn = self.worker.participant.enter();
            let forwarding = &self.shared.published.load(&turn).forwarding;
            let id = forwarding.device_by_index(index).expect("compiled from the same devices");
            forwarding.device(id).port
        };
        match self.worker.driver.inject(port, index, link, bytes) {
            Ok(()) => {}
            Err(InjectError::TooLong(_)) => self.worker.pipeline.count_oversized(),
            Err(InjectError::NoFrame) => unreachable!("frames outnumber what can be held"),
        }
        self.worker.driver.receive(port, &mut self.worker.burst, 1);
        self.turn();
        if self.take_events() {
            self.publish()?;
            // Packets may have waited for what was just learned.
            self.turn();
        }
        Ok(())
    }

    fn turn(&mut self) {
        let tcp_loose = self.tcp_loose;
        self.worker.turn(&self.shared, self.now, |pipeline, driver, burst, context| {
            let context = Context { tcp_loose, ..*context };
            process_burst(pipeline, driver, burst, &context);
            pipeline.maintain(driver, &context, SWEEP_SHARE);
        });
    }

    /// Learns what workloads told of themselves. Nobody is there to resolve others.
    fn take_events(&mut self) -> bool {
        let mut learned = false;
        for event in self.worker.events.clone().try_iter() {
            match event {
                Event::Learned { device, address, mac } => learned |= self.learn(Neighbor { address, mac, device }),
                Event::Resolve { .. } | Event::Logged(_) => {}
            }
        }
        learned
    }

    /// Hands every packet that was sent since the last call to `look`: the name of the device that it left by, and its bytes.
    pub fn drain_sent(&mut self, mut look: impl FnMut(&str, &[u8])) {
        let names = &self.links.devices;
        self.worker.driver.drain_sent(|device, bytes| {
            look(names.iter().find(|d| d.index == device).map_or("host", |d| d.name.as_str()), bytes);
        });
    }

    /// The devices.
    pub fn devices(&self) -> &[Device] {
        &self.links.devices
    }

    /// Gives up what still waits; the counters at the end.
    pub fn finish(&mut self) -> Totals {
        self.worker.pipeline.give_up_held(&mut self.worker.driver);
        debug_assert_eq!(self.worker.driver.outstanding(), 0, "every frame is back");
        self.worker.pipeline.totals()
    }

    /// Live connections, in a stable order.
    pub fn connections(&self) -> Vec<Value> {
        let mut all = Vec::new();
        self.shared.tables.v4.for_each(self.now, |entry| all.push(connection(entry)));
        self.shared.tables.v6.for_each(self.now, |entry| all.push(connection(entry)));
        all.sort_by_cached_key(Value::to_string);
        all
    }
}

/// How the kernel would see the frame's destination.
fn link_type(device: &Device, bytes: &[u8]) -> LinkType {
    let Some(destination) = bytes.first_chunk().map(|b| Mac(*b)) else { return LinkType::Host };
    if destination == Mac::BROADCAST {
        LinkType::Broadcast
    } else if destination.is_group() {
        LinkType::Multicast
    } else if device.mac == Mac::default() || destination == device.mac {
        LinkType::Host
    } else {
        LinkType::Other
    }
}
