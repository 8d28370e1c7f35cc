//! Following the kernel: subscriptions, dumps, and what changed.

use std::{
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt, StreamExt, channel::mpsc::UnboundedReceiver};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE, NetlinkMessage},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::AddressMessage,
        link::{LinkAttribute, LinkExtentMask, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAttribute, RouteMessage},
        rule::RuleMessage,
    },
    sys::{AsyncSocket, SocketAddr},
};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};
use weir_dataplane::{frame::IfIndex, model::Links};

use super::{
    KernelError,
    netlink::Requests,
    picture::{Link, Picture, RoleRules, TABLE_DEFAULT, TABLE_MAIN, link_of},
};

/// Bytes of the multicast socket's receive buffer: a message about a link costs it some 4 KiB, and 250 pods may come at
/// once.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;
/// How long after a refused dump the next one is asked for.
const DUMP_PAUSE: Duration = Duration::from_secs(1);

/// How the kernel is followed.
#[derive(Clone, Debug)]
pub struct FollowSettings {
    /// How long [`KernelState::changed`] gathers further changes after the first.
    pub gather: Duration,
    /// How often everything is read anew, for what the kernel does not tell (a deleted next-hop object takes its IPv4
    /// routes along silently).
    pub audit: Duration,
}

impl Default for FollowSettings {
    fn default() -> Self {
        Self { gather: Duration::from_millis(3), audit: Duration::from_secs(60) }
    }
}

/// What changed, as far as weir uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Devices or addresses.
    pub links: bool,
    /// Routes of the main or default table.
    pub routes: bool,
    /// Usable neighbours.
    pub neighbors: bool,
    /// Neighbours that the kernel could not resolve: what waits for them is to be dropped.
    pub failed: Vec<(IfIndex, IpAddr)>,
}

impl Changed {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        !self.links && !self.routes && !self.neighbors && self.failed.is_empty()
    }
}

type Dump = Pin<Box<dyn Future<Output = Result<Picture, KernelError>> + Send>>;

/// What is known of the kernel's links, addresses, routes and neighbours, for whoever asks: clones see the same. Nobody holds it while waiting.
#[derive(Clone, Debug, Default)]
pub struct View(Arc<Mutex<Picture>>);

impl View {
    pub(super) fn picture(&self) -> MutexGuard<'_, Picture> {
        // A panic while it was changed leaves at worst something out, which the next dump tells.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the dataplane is compiled from: devices with a role (up or not), routes over uplinks, neighbours on devices
    /// with a role. The node's own kernel is among the devices once the trunk is there.
    pub fn links(&self, rules: &RoleRules) -> Links {
        self.picture().links(rules)
    }

    /// All devices of the namespace, by index.
    pub fn all(&self) -> Vec<Link> {
        self.picture().all().collect()
    }

    /// The device of that name.
    pub fn link(&self, name: &str) -> Option<Link> {
        self.picture().all().find(|link| link.name == name)
    }

    /// Every address of this node that others could use: no loopback, no link-local IPv6, none of the trunk's.
    pub fn node_addresses(&self, rules: &RoleRules) -> Vec<IpAddr> {
        self.picture().node_addresses(rules)
    }

    /// What of the kernel's routes weir does not follow as the kernel does, one line each.
    pub fn notes(&self, rules: &RoleRules) -> Vec<String> {
        self.picture().notes(rules)
    }

    /// Has these devices from now on, and no others.
    #[cfg(test)]
    pub(crate) fn set_links(&self, links: impl IntoIterator<Item = Link>) {
        self.picture().set_links(links);
    }

    /// Has this address on the device of that index, whenever there is one.
    #[cfg(test)]
    pub(crate) fn set_address(&self, index: u32, net: ipnet::IpNet) {
        self.picture().set_address(index, net);
    }
}

/// Keeps a [`View`] current.
pub struct KernelState {
    view: View,
    events: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    requests: Requests,
    dump: Option<Dump>,
    /// Until when no new dump is asked for after one that was refused.
    rests: Option<Instant>,
    gather: Duration,
    audit: tokio::time::Interval,
    due: Option<Instant>,
    readings: u64,
    // Ends the sockets' tasks with this.
    _tasks: JoinSet<()>,
}

impl KernelState {
    /// Subscribes, then reads everything: nothing that happens in between is missed.
    ///
    /// Needs a tokio runtime; follows the network namespace of the thread that calls.
    ///
    /// # Errors
    /// Where there is no rtnetlink socket or the kernel refuses a list.
    pub async fn follow(settings: FollowSettings) -> Result<Self, KernelError> {
        let state = Self::follow_on(settings, View::default()).await?;
        state.view.picture().take_changed();
        Ok(state)
    }

    /// The same, where a view was kept before: what differs from it is the first change.
    ///
    /// # Errors
    /// As [`KernelState::follow`].
    pub async fn follow_on(settings: FollowSettings, view: View) -> Result<Self, KernelError> {
        let mut tasks = JoinSet::new();
        let (mut connection, _, events) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Neigh,
        ])
        .map_err(KernelError::Open)?;
        let socket = connection.socket_mut().socket_mut();
        // Without CAP_NET_ADMIN in the first user namespace the forced size is refused; a smaller buffer only means
        // more dumps.
        if setsockopt(&*socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).is_err() {
            socket.set_rx_buf_sz(RECEIVE_BUFFER_BYTES as libc::c_int).map_err(KernelError::Open)?;
        }
        tasks.spawn(connection);
        let requests = Requests::open(&mut tasks)?;
        let fresh = read_all(requests.clone()).await?;
        view.picture().replace(fresh);
        let mut audit = interval_at(Instant::now() + settings.audit, settings.audit);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            view,
            events,
            requests,
            dump: None,
            rests: None,
            gather: settings.gather,
            audit,
            due: None,
            readings: 1,
            _tasks: tasks,
        })
    }

    /// Waits until something changed that weir uses. Further changes of the next few milliseconds are gathered into the
    /// answer.
    ///
    /// Cancel-safe: a call that is given up loses nothing.
    ///
    /// # Errors
    /// [`KernelError::Closed`] where the connection to the kernel ended: following on is then pointless. Else a new dump was refused, and is asked
    /// for again after a pause.
    pub async fn changed(&mut self) -> Result<Changed, KernelError> {
        loop {
            // What is there already comes first, so that a burst of messages costs one dump and not one each.
            while self.dump.is_none()
                && let Some(event) = self.events.next().now_or_never()
            {
                self.view.picture().apply(event.ok_or(KernelError::Closed)?.0);
            }
            if self.dump.is_none() && self.rests.is_none() && self.view.picture().wants_dump() {
                self.dump = Some(Box::pin(read_all(self.requests.clone())));
            }
            if self.due.is_none() && !self.view.picture().changed().is_empty() {
                self.due = Some(Instant::now() + self.gather);
            }
            let due = self.due;
            let rests = self.rests;
            let dumping = self.dump.is_some();
            tokio::select! {
                biased;
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    self.due = None;
                    return Ok(self.view.picture().take_changed());
                }
                fresh = async { self.dump.as_mut().expect("guarded by the branch's condition").await }, if dumping => {
                    self.dump = None;
                    match fresh {
                        Ok(fresh) => self.view.picture().replace(fresh),
                        Err(error) => {
                            self.rests = Some(Instant::now() + DUMP_PAUSE);
                            return Err(error);
                        }
                    }
                    self.readings += 1;
                }
                () = async { sleep_until(rests.unwrap_or_else(Instant::now)).await }, if rests.is_some() => {
                    self.rests = None;
                }
                // While a dump is read, events wait: they belong on top of it.
                event = self.events.next(), if !dumping => {
                    self.view.picture().apply(event.ok_or(KernelError::Closed)?.0);
                }
                _ = self.audit.tick() => self.view.picture().distrust(),
            }
        }
    }

    /// What is known.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// How often everything was read, the first time included. A number that grows faster than the audit says that the
    /// kernel's messages come faster than they are read, or are of the kinds that leave something open.
    pub fn readings(&self) -> u64 {
        self.readings
    }

    /// A handle that asks the kernel. It works as long as this is there.
    pub fn resolver(&self) -> Resolver {
        Resolver { requests: self.requests.clone() }
    }
}

/// Asks the kernel one thing; clones share one socket.
#[derive(Clone)]
pub struct Resolver {
    requests: Requests,
}

impl Resolver {
    /// The device of that name as the kernel describes it now, which may be ahead of what was followed.
    ///
    /// # Errors
    /// Where the kernel refuses or the connection to it ended.
    pub async fn device(&self, name: &str) -> Result<Option<Link>, KernelError> {
        Ok(self.requests.link(name).await?.and_then(|message| link_of(message, 0)))
    }

    /// Makes the kernel send an ARP request or a neighbour solicitation for `address` on `device`, as its own traffic
    /// would (NTF_USE). Returns when it has begun: the result comes as a neighbour of [`View::links`], or after
    /// the kernel's own tries (three, one second each) in [`Changed::failed`]. Asking again while it resolves costs
    /// nothing on the wire.
    ///
    /// # Errors
    /// Where the kernel refuses, as for a device that is gone or down.
    pub async fn resolve(&self, address: IpAddr, device: IfIndex) -> Result<(), KernelError> {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = device.0;
        message.header.state = NeighbourState::None;
        message.header.flags = NeighbourFlags::Use;
        let (family, destination) = match address {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        message.header.family = family;
        message.attributes.push(NeighbourAttribute::Destination(destination));
        self.requests
            .change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE, || {
                format!("resolve {address} on device {}", device.0)
            })
            .await
    }
}

/// Reads links, addresses, routes and neighbours into a new picture.
async fn read_all(requests: Requests) -> Result<Picture, KernelError> {
    let mut picture = Picture::default();
    let mut links = LinkMessage::default();
    links.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    for message in requests.dump(RouteNetlinkMessage::GetLink(links), "links", &[]).await? {
        picture.apply_inner(message, false);
    }
    let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    for message in requests.dump(addresses, "addresses", &[]).await? {
        picture.apply_inner(message, false);
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for table in [TABLE_MAIN, TABLE_DEFAULT] {
            for message in routes_of_table(&requests, family, table).await? {
                picture.dumped_route(message);
            }
        }
        let mut rules = RuleMessage::default();
        rules.header.family = family;
        for message in requests.dump(RouteNetlinkMessage::GetRule(rules), "rules", &NO_FAMILY).await? {
            picture.dumped_rule(message);
        }
        let mut neighbors = NeighbourMessage::default();
        neighbors.header.family = family;
        let neighbors = RouteNetlinkMessage::GetNeighbour(neighbors);
        for message in requests.dump(neighbors, "neighbours", &NO_FAMILY).await? {
            picture.apply_inner(message, false);
        }
    }
    Ok(picture)
}

/// How the kernel says that it was built or started without IPv6.
const NO_FAMILY: [i32; 2] = [libc::EOPNOTSUPP, libc::EAFNOSUPPORT];

/// The routes of one table; a table that was never used is an empty one.
pub(super) async fn routes_of_table(
    requests: &Requests,
    family: AddressFamily,
    table: u32,
) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
    let mut routes = RouteMessage::default();
    routes.header.address_family = family;
    routes.attributes.push(RouteAttribute::Table(table));
    let empty = [libc::ENOENT, NO_FAMILY[0], NO_FAMILY[1]];
    requests.dump(RouteNetlinkMessage::GetRoute(routes), "routes", &empty).await
}
