//! Publications: links, routes, neighbours and rules become a snapshot, and the programs and the kernel are told.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use tracing::info;
use weir_cluster::{compile::CompileError, sockets::PortSet};
use weir_dataplane::{
    forwarding::Forwarding,
    model::{Device, Role},
    snapshot::Snapshot,
};
use weir_packet::Mac;

use super::{
    Router,
    assemble::{assemble_links, check_running, owned},
    configuration::Pending,
};
use crate::{kernel::Wanted, prefixes::Prefixes, prepare::Times, run::RunError};

impl Router {
    /// Compiles and publishes what anything changed of, and has the kernel told. What fails is owed still.
    ///
    /// # Errors
    /// What could not be done; what was in force is, whole. Or all was done, but an uplink is not as it should be.
    pub(super) fn publish(&mut self) -> Result<(), RunError> {
        self.tell_of_routes();
        let known: Vec<Device> = self.links.devices.iter().filter(|d| d.role == Role::Uplink).cloned().collect();
        let links = assemble_links(
            &self.view,
            &self.devices.roles,
            &self.loaded,
            &self.listening,
            self.trunk_mac(),
            &self.learned,
            self.devices.max_mtu,
            &known,
        );
        // A neighbour or an endpoint more changes nothing of what the programs and the kernel are told, and that takes a look at all services.
        let tells = self.pending.as_ref().is_some_and(|pending| !pending.is_of_endpoints)
            || links.devices != self.links.devices
            || self.plumbed.is_none();
        if links != self.links || self.pending.is_some() {
            let forwarding = Forwarding::compile(&self.loaded.cluster, &links).map_err(CompileError::from)?;
            if tells {
                // The programs first: what they take reaches workers that do not know it yet, and waits or is dropped, and is never let past.
                let owned = owned(&self.loaded, &self.rules, &self.snat, &forwarding);
                if self.owned.as_ref() != Some(&owned) {
                    self.hands.own(&owned)?;
                    self.owned = Some(owned);
                }
            }
            self.links = links;
            self.generation = self.generation.wrapping_add(1).max(1);
            let next = Arc::new(Snapshot {
                generation: self.generation,
                rules: Arc::clone(&self.rules),
                snat: Arc::clone(&self.snat),
                forwarding: Arc::new(forwarding),
            });
            let near = self.near_devices();
            self.hands.publish(next, near);
            self.published = Some(self.now);
            self.hits.follow(&self.rules);
            if let Some(pending) = self.pending.take() {
                self.is_in_force(pending);
                self.programming.in_force(SystemTime::now());
            }
        }
        self.follow_kernel_devices();
        if tells {
            let wanted = self.wanted();
            if self.plumbed.as_ref() != Some(&wanted) {
                self.plumbing = true;
                self.hands.plumb(wanted.clone());
                self.plumbed = Some(wanted);
            }
        }
        self.tell_of_too_large();
        check_running(&self.view, &self.devices.roles, self.devices.max_mtu)
    }

    /// Tells what of the kernel's routing is not followed, once.
    fn tell_of_routes(&mut self) {
        const MOST_NOTES: usize = 100;
        for note in self.view.notes(&self.devices.roles) {
            if self.notes.len() < MOST_NOTES {
                self.warn_once(note);
            }
        }
    }

    /// What was taken over is in force from now on.
    fn is_in_force(&mut self, pending: Pending) {
        let Pending { times: Some((files, times)), begun, .. } = pending else { return };
        let times = Times { publish: begun.map_or(Duration::ZERO, |begun| begun.elapsed()), ..times };
        if files {
            self.hands.keep(&self.loaded);
        }
        if !self.serves {
            info!(took_ms = %times.to_json(), "configuration in force");
            self.reloads.start(times);
        } else if files {
            self.shared.affinity.forget_gone(&self.rules.services);
            info!(generation = self.generation, took_ms = %times.to_json(), "reloaded");
            self.reloads.taken_over(times);
        } else {
            self.reloads.pods(times);
        }
    }

    fn trunk_mac(&self) -> Mac {
        let host = self.links.devices.iter().find(|device| device.role == Role::Host);
        host.map_or(weir_dataplane::attach::KERNEL_END_MAC, |device| device.mac)
    }

    /// What the node's kernel shall reach through weir.
    fn wanted(&self) -> Wanted {
        let cluster = &self.loaded.cluster;
        let mut through: Vec<IpNet> = cluster.nodes.iter().flat_map(|n| n.pod_cidrs.iter().copied()).collect();
        through.extend(cluster.pools.iter().map(|p| p.cidr));
        // Blocks are cut out of pools, but a pool may be taken away before them.
        let blocks = cluster.nodes.iter().flat_map(|n| &n.blocks);
        through.extend(blocks.filter(|net| !cluster.pools.iter().any(|pool| pool.cidr.contains(*net))));
        let ranges: Prefixes = through.iter().copied().collect();
        through.extend(&cluster.service_cidrs);
        through.extend(self.rules.services.owned_addresses().map(IpNet::from));
        let own = cluster.nodes.iter().find(|n| n.name == cluster.node_name);
        let internal = own.map(|n| n.internal_ips.as_slice()).unwrap_or_default();
        let mut wanted = Wanted::new(&self.links, through, internal);
        // Other nodes are reached as ever, also where a prefix of pods covers them.
        wanted.except.extend(cluster.nodes.iter().flat_map(|n| n.internal_ips.iter().map(|ip| IpNet::from(*ip))));
        // What a range of pods holds needs no route of its own, but where an exception comes between.
        let except: Prefixes = wanted.except.iter().copied().collect();
        let pods = cluster.workloads.iter().flat_map(|w| &w.addresses);
        let pods = pods.filter(|ip| !ranges.hold(**ip) || except.hold(**ip));
        wanted.through.extend(pods.map(|ip| IpNet::from(*ip)));
        // Loopback's too, and those that wait for a socket to go: nobody else is to get one by chance meanwhile.
        let node_ports = self.rules.services.node_ports().map(|(_, port)| port);
        let own = self.rules.services.own_frontends().iter().map(|(.., port)| *port);
        wanted.ports = PortSet::of(node_ports.chain(own).chain(self.loaded.host_ports_in_use()));
        wanted
    }
}
