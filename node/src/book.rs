//! The pods that weir itself makes on this node, as control keeps them: what weir-cni's side asks for, and who waits for it to be in force.
//!
//! A pod is a local workload from the moment it is put here: [`Pods::all`] is an input of each preparation of a configuration, beside the
//! files. Nothing here waits. Who asked for a pod is answered by [`Book::settle`] once what is in force knows it, after whatever
//! publication that comes to be; whoever has waited as long as they wanted to for the pod's object is answered without it.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use weir_cluster::{
    config::RouterConfig,
    translate::{Loaded, LocalPod, LocalPods, workload_device},
};
use weir_dataplane::{
    forwarding::local_workloads,
    model::{Links, Role, TunnelMode},
};

use crate::pods::{Ask, InForce, LocalPod as Made, NodeRanges, Pods as Server, PodsError, Settings};

/// Asks that may wait for control.
const ASKS: usize = 1024;
/// What IPIP puts before a packet: an IPv4 header (RFC 2003).
const TUNNEL_BYTES: u32 = 20;

/// The pods of this node, and their maker.
pub struct Pods {
    book: Book,
    server: Arc<Server>,
    /// What the server was told last that it may give.
    told: NodeRanges,
}

/// The pods, and who waits for what about them.
#[derive(Default)]
pub struct Book {
    puts: Vec<Put>,
    gones: Vec<Gone>,
    all: Arc<LocalPods>,
    /// Pods that were answered for before their object was there.
    denied: BTreeSet<String>,
}

/// A pod whose maker waits.
struct Put {
    pod: Arc<LocalPod>,
    since: Instant,
    /// `None`: it has passed.
    deadline: Option<Instant>,
    answer: oneshot::Sender<InForce>,
}

/// A pod whose remover waits.
struct Gone {
    pod: Arc<LocalPod>,
    since: Instant,
    answer: oneshot::Sender<()>,
}

/// What is in force of a pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    /// It is not known yet.
    Unknown,
    /// It is known, but its device is not.
    NoDevice,
    /// It is known with its device, and closed for want of its object.
    Undescribed,
    /// All of it.
    Whole,
}

impl Pods {
    /// Starts the server, where weir.yaml has a section `cni`. What it asks is for control; who drops this must have dropped that before, as the
    /// server's end waits for what is under way.
    ///
    /// # Errors
    /// Where the state cannot be read or the socket cannot be had.
    pub fn start(config: &RouterConfig) -> Result<Option<(Self, mpsc::Receiver<Ask>)>, PodsError> {
        let Some(cni) = &config.cni else { return Ok(None) };
        let (sender, asks) = mpsc::channel(ASKS);
        let settings = Settings {
            node_name: config.node_name.clone(),
            socket: cni.socket.clone(),
            state: cni.state.clone(),
            cool_down: cni.cool_down,
            patience: cni.patience,
        };
        let server = Server::start(settings, sender)?;
        let mut all = LocalPods::default();
        for made in server.kept() {
            all.insert(Arc::new(local_pod(&made)));
        }
        let book = Book { all: Arc::new(all), ..Book::default() };
        Ok(Some((Self { book, server: Arc::new(server), told: NodeRanges::default() }, asks)))
    }

    /// The pods, and who waits.
    pub fn book(&mut self) -> &mut Book {
        &mut self.book
    }

    /// All that there are, in force or about to be.
    pub fn all(&self) -> &Arc<LocalPods> {
        &self.book.all
    }

    /// Whether this is the device of one of them.
    pub fn own_device(&self, name: &str) -> bool {
        self.book.all.iter().any(|pod| pod.device == name)
    }

    /// Tells the server what it may give to pods, where that is not as before.
    pub fn configure(&mut self, ranges: NodeRanges) {
        if self.server.configure(ranges.clone()) {
            let NodeRanges { pod_cidrs, mtu, .. } = &ranges;
            if (pod_cidrs, mtu) != (&self.told.pod_cidrs, &self.told.mtu) {
                info!(?pod_cidrs, mtu, "what new pods get");
            }
            self.told = ranges;
        }
    }

    /// When somebody has waited long enough, if anybody waits.
    pub fn deadline(&self) -> Option<Instant> {
        self.book.puts.iter().filter_map(|put| put.deadline).min()
    }

    /// Ends the patience of those who have waited long enough: [`Book::settle`] answers them then.
    pub fn expire(&mut self, now: Instant) {
        for put in &mut self.book.puts {
            put.deadline = put.deadline.filter(|deadline| *deadline > now);
        }
    }

    /// Who knows all about addresses.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// For `weir status`.
    pub fn status(&self, loaded: &Loaded) -> Value {
        let waiting = self.book.puts.iter().map(|put| {
            let is_known = loaded.local_pods.get(&put.pod.name).is_some_and(|pod| Arc::ptr_eq(pod, &put.pod));
            json!({
                "pod": put.pod.name, "waitedMs": ms(put.since),
                "waitsFor": if is_known { "its object or its device" } else { "its rules" },
            })
        });
        json!({
            "known": loaded.local_pods.iter().count(), "closedUntilObject": loaded.undescribed,
            "waiting": waiting.collect::<Vec<_>>(), "maker": self.server.status(),
        })
    }
}

impl Book {
    /// Notes a pod that was made. `false`: nothing is to be prepared for it.
    pub fn put(&mut self, made: &Made, patience: Duration, answer: oneshot::Sender<InForce>) -> bool {
        let mut pod = Arc::new(local_pod(made));
        if let Err(why) = self.check(&pod) {
            warn!(pod = pod.name, why, "a pod is refused");
            let _ = answer.send(InForce::Refused(why));
            return false;
        }
        let known = self.all.get(&pod.name).filter(|known| **known == pod);
        let is_new = known.is_none();
        match known {
            Some(known) => pod = Arc::clone(known),
            None => Arc::make_mut(&mut self.all).insert(Arc::clone(&pod)),
        }
        let since = Instant::now();
        self.puts.push(Put { pod, since, deadline: Some(since + patience), answer });
        is_new
    }

    /// What keeps a pod from being one of this node's.
    fn check(&self, pod: &LocalPod) -> Result<(), String> {
        let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
        let device = workload_device(namespace, name);
        if pod.device != device {
            return Err(format!("the device of pod {} is {device}, not {}", pod.name, pod.device));
        }
        if pod.addresses.is_empty() {
            return Err(format!("pod {} has no address", pod.name));
        }
        let others = self.all.iter().filter(|other| other.name != pod.name);
        let mut taken = others.flat_map(|other| other.addresses.iter().map(move |address| (address, &other.name)));
        match taken.find(|(address, _)| pod.addresses.contains(address)) {
            Some((address, other)) => Err(format!("{address} is the address of pod {other}")),
            None => Ok(()),
        }
    }

    /// Forgets a pod that is taken away; nothing where its name has another sandbox by now. `false`: nothing is to be prepared for it.
    pub fn gone(&mut self, name: &str, sandbox: &str, answer: oneshot::Sender<()>) -> bool {
        let Some(pod) = self.all.get(name).filter(|pod| pod.sandbox == sandbox).cloned() else {
            let _ = answer.send(());
            return false;
        };
        Arc::make_mut(&mut self.all).remove(name);
        self.denied.remove(name);
        self.gones.push(Gone { pod, since: Instant::now(), answer });
        true
    }

    /// Answers those for whom what is in force is enough: after each publication, of the pods `in_force`, of which some
    /// have no object. `has_device` tells whether what was published,
    /// and the programs, know the device that has that name now. `true`: something is to be prepared again.
    pub fn settle(
        &mut self,
        in_force: &LocalPods,
        undescribed: &BTreeSet<String>,
        has_device: impl Fn(&str) -> bool,
    ) -> bool {
        let mut changed = false;
        let is = |pod: &Arc<LocalPod>, pods: &LocalPods| pods.get(&pod.name).is_some_and(|one| Arc::ptr_eq(one, pod));
        let is_over = |gone: &mut Gone| {
            let in_force = in_force.get(&gone.pod.name).filter(|pod| pod.sandbox == gone.pod.sandbox);
            in_force.is_none() || gone.answer.is_closed()
        };
        for gone in self.gones.extract_if(.., is_over) {
            let LocalPod { name, addresses, device, .. } = &*gone.pod;
            info!(pod = name, ?addresses, device, took_ms = ms(gone.since), "pod deleted");
            let _ = gone.answer.send(());
        }
        self.denied.retain(|name| {
            let is_denied = undescribed.contains(name);
            if !is_denied && in_force.get(name).is_some() {
                info!(pod = name, "the pod's object has come: its policy is in force");
            }
            is_denied
        });
        for put in std::mem::take(&mut self.puts) {
            if put.answer.is_closed() {
                continue;
            }
            if !is(&put.pod, &self.all) {
                let why = format!("pod {} was taken away or made again meanwhile", put.pod.name);
                let _ = put.answer.send(InForce::Refused(why));
                continue;
            }
            let standing = match () {
                () if !is(&put.pod, in_force) => Standing::Unknown,
                () if !has_device(&put.pod.device) => Standing::NoDevice,
                () if undescribed.contains(&put.pod.name) => Standing::Undescribed,
                () => Standing::Whole,
            };
            let LocalPod { name, addresses, device, .. } = &*put.pod;
            let took_ms = ms(put.since);
            let answer = match (standing, put.deadline) {
                (Standing::Whole, _) => {
                    info!(pod = name, ?addresses, device, took_ms, "pod added");
                    InForce::WithObject
                }
                (Standing::Undescribed, None) => {
                    warn!(pod = name, ?addresses, device, took_ms, "pod added; it is closed until its object comes");
                    self.denied.insert(name.clone());
                    InForce::DeniedUntilObject
                }
                (Standing::NoDevice, None) => {
                    warn!(pod = name, ?addresses, device, took_ms, "a pod is refused: its device is not served");
                    Arc::make_mut(&mut self.all).remove(name);
                    changed = true;
                    InForce::Refused(format!(
                        "the router does not serve the device {device}: it is not there, or its MTU is more than there is room for"
                    ))
                }
                _ => {
                    self.puts.push(put);
                    continue;
                }
            };
            let _ = put.answer.send(answer);
        }
        changed
    }

    /// The pods that are known cannot be put in force.
    pub fn refuse(&mut self, in_force: &LocalPods, why: &str) {
        for put in self.puts.extract_if(.., |put| in_force.get(&put.pod.name) != Some(&put.pod)) {
            if self.all.get(&put.pod.name).is_some_and(|known| Arc::ptr_eq(known, &put.pod)) {
                Arc::make_mut(&mut self.all).remove(&put.pod.name);
            }
            let _ = put.answer.send(InForce::Refused(why.to_owned()));
        }
        // What was made of them goes with the next configuration that can be in force.
        for gone in self.gones.drain(..) {
            let _ = gone.answer.send(());
        }
    }
}

/// What this node's pods may have. `own_addresses` are the node's.
pub fn ranges(loaded: &Loaded, links: &Links, own_addresses: &[IpAddr]) -> NodeRanges {
    let cluster = &loaded.cluster;
    let own = cluster.nodes.iter().find(|node| node.name == cluster.node_name);
    let pod_cidrs: Vec<IpNet> = own.map_or(Vec::new(), |node| node.pod_cidrs.clone());
    let mut left_out: BTreeSet<IpAddr> = own_addresses.iter().copied().collect();
    if let Some(own) = own {
        left_out.extend(own.internal_ips.iter().chain(&own.other_ips));
        left_out.extend(own.tunnel_address.map(IpAddr::V4));
        left_out.extend(own.ipv4_address.map(|net| IpAddr::V4(net.addr())));
    }
    // Pods that another plugin made here live on with theirs.
    let others = local_workloads(cluster).filter(|(_, workload)| loaded.local_pods.get(&workload.name).is_none());
    left_out.extend(others.flat_map(|(_, workload)| &workload.addresses));
    // What is no pod's address in any case is not worth telling of.
    left_out.retain(|address| pod_cidrs.iter().any(|net| net.contains(address)));
    let smallest = links.devices.iter().filter(|device| device.role == Role::Uplink).map(|device| device.mtu).min();
    let tunnels = cluster.pools.iter().any(|pool| pool.ipip != TunnelMode::Never);
    let fits = smallest.unwrap_or(1500).saturating_sub(if tunnels { TUNNEL_BYTES } else { 0 });
    let given = loaded.config.cni.as_ref().and_then(|cni| cni.mtu);
    NodeRanges { pod_cidrs, mtu: given.unwrap_or(fits), left_out: left_out.into_iter().collect() }
}

fn local_pod(made: &Made) -> LocalPod {
    LocalPod {
        name: format!("{}/{}", made.namespace, made.name),
        uid: made.uid.clone().filter(|uid| !uid.is_empty()),
        sandbox: made.sandbox.clone(),
        device: made.device.clone(),
        mac: made.mac,
        addresses: made.addresses.clone(),
    }
}

/// Milliseconds since then, to a tenth.
fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e4).round() / 10.0
}

#[cfg(test)]
mod tests {
    use weir_cluster::translate::Loader;
    use weir_packet::Mac;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3600);

    fn made(name: &str, sandbox: &str, last: u8) -> Made {
        Made {
            namespace: "x".into(),
            name: name.into(),
            uid: None,
            sandbox: sandbox.into(),
            netns: None,
            device: workload_device("x", name),
            mac: Mac([2, 0, 0, 0, 0, last]),
            addresses: vec![[10, 0, 0, last].into()],
        }
    }

    /// A book, and what is in force beside it.
    #[derive(Default)]
    struct World {
        book: Book,
        in_force: Arc<LocalPods>,
        undescribed: BTreeSet<String>,
        has_no_device: bool,
    }

    impl World {
        fn put(&mut self, made: &Made) -> (bool, oneshot::Receiver<InForce>) {
            let (answer, answered) = oneshot::channel();
            (self.book.put(made, PATIENCE, answer), answered)
        }

        fn gone(&mut self, name: &str, sandbox: &str) -> (bool, oneshot::Receiver<()>) {
            let (answer, answered) = oneshot::channel();
            (self.book.gone(&format!("x/{name}"), sandbox, answer), answered)
        }

        /// What is in the book comes into force.
        fn publish(&mut self) {
            self.in_force = Arc::clone(&self.book.all);
            self.settle();
        }

        fn settle(&mut self) -> bool {
            self.book.settle(&self.in_force, &self.undescribed, |_| !self.has_no_device)
        }

        fn patience_ends(&mut self) -> bool {
            self.book.puts.iter_mut().for_each(|put| put.deadline = None);
            self.settle()
        }

        fn names(&self) -> Vec<&str> {
            self.book.all.iter().map(|pod| pod.name.as_str()).collect()
        }
    }

    #[test]
    fn a_pod_is_answered_for_once_all_of_it_is_in_force() {
        let mut world = World { undescribed: ["x/a".to_owned()].into(), has_no_device: true, ..World::default() };
        let (is_new, mut answered) = world.put(&made("a", "s1", 1));
        assert!(is_new);
        // A publication of something else, then its own, then its device's, then that of its object.
        world.settle();
        assert!(answered.try_recv().is_err());
        world.publish();
        assert!(answered.try_recv().is_err());
        world.has_no_device = false;
        world.settle();
        assert!(answered.try_recv().is_err());
        world.undescribed.clear();
        world.settle();
        assert_eq!(answered.try_recv(), Ok(InForce::WithObject));
        // Asked for once more, nothing is to be prepared.
        let (is_new, mut answered) = world.put(&made("a", "s1", 1));
        world.settle();
        assert_eq!((is_new, answered.try_recv()), (false, Ok(InForce::WithObject)));
    }

    #[test]
    fn patience_is_for_the_object_and_not_for_the_rules() {
        let mut world = World { undescribed: ["x/a".to_owned()].into(), ..World::default() };
        let (_, mut answered) = world.put(&made("a", "s1", 1));
        assert!(!world.patience_ends());
        assert!(answered.try_recv().is_err(), "its rules are not in force");
        world.publish();
        assert_eq!(answered.try_recv(), Ok(InForce::DeniedUntilObject));
        assert_eq!(world.book.denied.len(), 1);
        world.undescribed.clear();
        world.settle();
        assert!(world.book.denied.is_empty());

        world.has_no_device = true;
        let (_, mut answered) = world.put(&made("b", "s2", 2));
        world.publish();
        assert!(answered.try_recv().is_err());
        assert!(world.patience_ends(), "it is to be forgotten");
        assert!(matches!(answered.try_recv(), Ok(InForce::Refused(_))));
        assert_eq!(world.names(), ["x/a"]);
    }

    #[test]
    fn a_name_belongs_to_the_newest_sandbox() {
        let mut world = World::default();
        let (_, mut first) = world.put(&made("a", "s1", 1));
        let (_, mut second) = world.put(&made("a", "s2", 2));
        // The DEL of the first comes late and changes nothing.
        let (is_new, mut gone) = world.gone("a", "s1");
        assert_eq!((is_new, gone.try_recv()), (false, Ok(())));
        world.publish();
        assert!(matches!(first.try_recv(), Ok(InForce::Refused(_))));
        assert_eq!(second.try_recv(), Ok(InForce::WithObject));

        // That of the second is answered when it is no more in force; who waits for it then waits in vain.
        let (_, mut again) = world.put(&Made { uid: Some("u".into()), ..made("a", "s2", 2) });
        let (is_new, mut gone) = world.gone("a", "s2");
        world.settle();
        assert!(gone.try_recv().is_err(), "the one before its uid was told is still in force");
        assert!(is_new && matches!(again.try_recv(), Ok(InForce::Refused(_))));
        world.publish();
        assert_eq!((gone.try_recv(), world.names()), (Ok(()), vec![]));
        assert_eq!(world.gone("a", "s2").1.try_recv(), Ok(()), "twice");
    }

    #[test]
    fn what_cannot_be_this_nodes_is_refused() {
        let mut world = World::default();
        let (_, mut answered) = world.put(&made("a", "s1", 1));
        world.publish();
        assert_eq!(answered.try_recv(), Ok(InForce::WithObject));
        for bad in [
            made("b", "s2", 1),
            Made { device: "eth0".into(), ..made("b", "s2", 2) },
            Made { addresses: Vec::new(), ..made("b", "s2", 2) },
        ] {
            let (is_new, mut answered) = world.put(&bad);
            assert!(!is_new && matches!(answered.try_recv(), Ok(InForce::Refused(_))), "{bad:?}");
        }
        // What cannot be compiled leaves what is in force.
        let (_, mut answered) = world.put(&made("c", "s3", 3));
        world.book.refuse(&Arc::clone(&world.in_force), "too large");
        assert_eq!(answered.try_recv(), Ok(InForce::Refused("too large".into())));
        assert_eq!(world.names(), ["x/a"]);
    }

    #[test]
    fn new_pods_get_no_address_of_a_pod_that_others_made() {
        let pod = |name: &str, node: &str, status: &str| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x}}\nspec: {{nodeName: {node}}}\nstatus: {{{status}}}\n"
            )
        };
        let objects = [
            "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.1.0.0/24]}\n".to_owned(),
            pod("web-0", "node-a", ""),
            pod("older", "node-a", "podIP: 10.1.0.1"),
            pod("ended", "node-a", "phase: Failed, podIP: 10.1.0.2"),
            pod("outside", "node-a", "podIP: 10.9.0.1"),
            pod("elsewhere", "node-b", "podIP: 10.1.1.1"),
        ];
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("weir.yaml"), "nodeName: node-a\nmanifests: [m.yaml]\n").unwrap();
        std::fs::write(folder.path().join("m.yaml"), objects.concat()).unwrap();
        let mut loader = Loader::new(&folder.path().join("weir.yaml"));
        let mut own = LocalPods::default();
        own.insert(Arc::new(local_pod(&made("web-0", "s1", 5))));
        loader.set_local_pods(Arc::new(own));
        let loaded = loader.load_strictly().unwrap_or_else(|problems| panic!("{problems}"));
        let ranges = ranges(&loaded, &Links::default(), &[]);
        assert_eq!(ranges.left_out, ["10.1.0.1".parse::<IpAddr>().unwrap()]);
    }
}
