//! The kernel followed and set up, against the real kernel: each test in network namespaces of its own, which live on
//! threads of its own and end with them. Needs root; skipped only with WEIR_SKIP_E2E=1.

use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    io::{ErrorKind, Write},
    net::{IpAddr, UdpSocket},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::{Pid, gettid},
};
use weir_cluster::{
    sockets::PortSet,
    sources::{
        revisit::Awaited,
        watch::{Trigger, Watch},
    },
};
use weir_dataplane::{
    frame::IfIndex,
    model::{Links, Refusal, Refused, Role, Route},
};
use weir_node::kernel::{
    Changed, DeviceTracker, FollowSettings, HostPlumbing, HostReport, HostSettings, KernelState, ROUTE_TABLE,
    RULE_PRIORITY, RoleRules, Wanted,
};
use weir_packet::Mac;

/// Generous: a loaded machine is no failure.
const DEADLINE: Duration = Duration::from_secs(20);

fn skipped() -> bool {
    let skip = std::env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1");
    if skip {
        eprintln!("SKIPPED (WEIR_SKIP_E2E=1)");
    }
    skip
}

/// Runs a test in a network namespace of its own, with loopback up.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if skipped() {
        return;
    }
    let outcome = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
        run("ip link set lo up");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A second network namespace, as a pod's; it lives as long as this.
struct Namespace {
    thread: Pid,
    jobs: mpsc::Sender<Job>,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            sender.send(gettid()).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        Self { thread: receiver.recv().unwrap(), jobs }
    }

    fn run(&self, command: &str) -> String {
        let (sender, receiver) = mpsc::channel();
        let command = command.to_owned();
        self.jobs.send(Box::new(move || sender.send(run(&command)).unwrap())).unwrap();
        receiver.recv().expect("the command failed in the other namespace")
    }
}

/// Runs a command in the calling thread's namespace.
fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn ip_batch(lines: &str) {
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(ip.wait().unwrap().success());
}

/// Follows until `holds`.
async fn until(state: &mut KernelState, what: &str, mut holds: impl FnMut(&KernelState) -> bool) {
    let end = Instant::now() + DEADLINE;
    while !holds(state) {
        let left = end.saturating_duration_since(Instant::now());
        let changed = tokio::time::timeout(left, state.changed()).await;
        let changed = changed.unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}")).unwrap();
        assert_ne!(changed, Changed::default(), "changed() answers only when something changed");
    }
}

/// A state that cannot be right by a chance re-reading: the audit is off.
async fn follow() -> KernelState {
    KernelState::follow(FollowSettings { audit: Duration::from_secs(3600), ..FollowSettings::default() }).await.unwrap()
}

fn net(text: &str) -> ipnet::IpNet {
    text.parse().unwrap()
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_link_that_appears_is_seen_whole_and_its_end_too() {
    in_namespace(|| async {
        let pod = Namespace::new();
        let mut state = follow().await;
        let rules = RoleRules::new(["eth0"], ["cali0123456789a"]);
        let mut tracker = DeviceTracker::new(Role::Workload);
        assert!(tracker.update(&state.view().all(), &rules).is_empty());

        run(&format!(
            "ip link add cali0123456789a mtu 1400 address 02:00:00:00:00:07 numrxqueues 3 numtxqueues 2 \
             type veth peer name eth0 netns {}",
            pod.thread
        ));
        until(&mut state, "the veth is there", |state| state.view().link("cali0123456789a").is_some()).await;
        let link = state.view().link("cali0123456789a").unwrap().clone();
        assert_eq!(link.mac, Some("02:00:00:00:00:07".parse().unwrap()));
        assert_eq!((link.mtu, link.rx_queues, link.tx_queues), (1400, 3, 2));
        assert_eq!((link.kind.as_deref(), link.peer_elsewhere, link.up), (Some("veth"), true, false));
        assert!(link.peer.is_some());
        let changes = tracker.update(&state.view().all(), &rules);
        assert_eq!(
            (changes.appeared.as_slice(), changes.gone.len(), changes.altered.len()),
            (&[link.clone()][..], 0, 0)
        );
        let devices = state.view().links(&rules).devices;
        assert_eq!(devices.len(), 1, "lo has no role: {devices:?}");
        assert_eq!((devices[0].role, devices[0].index, devices[0].mtu), (Role::Workload, link.index, 1400));

        run("ip link set cali0123456789a up");
        until(&mut state, "it is up", |state| state.view().link("cali0123456789a").is_some_and(|link| link.up)).await;
        assert_eq!(tracker.update(&state.view().all(), &rules).altered.len(), 1);

        run("ip link del cali0123456789a");
        until(&mut state, "it is gone", |state| state.view().link("cali0123456789a").is_none()).await;
        let changes = tracker.update(&state.view().all(), &rules);
        assert_eq!((changes.appeared.len(), changes.gone.len()), (0, 1));
        assert!(state.view().links(&rules).devices.is_empty());
    });
}

#[test]
fn a_veth_whose_peer_moves_into_a_pod_is_noticed() {
    in_namespace(|| async {
        let pod = Namespace::new();
        let mut state = follow().await;
        run("ip link add calia type veth peer name tmp0");
        until(&mut state, "the pair is there", |state| state.view().link("calia").is_some()).await;
        assert!(!state.view().link("calia").unwrap().peer_elsewhere);
        run(&format!("ip link set tmp0 netns {}", pod.thread));
        until(&mut state, "the peer is elsewhere", |state| state.view().link("calia").unwrap().peer_elsewhere).await;
        assert!(state.view().link("tmp0").is_none());
    });
}

#[test]
fn a_device_that_leaves_and_comes_back_with_its_index_counts_as_new() {
    in_namespace(|| async {
        let elsewhere = Namespace::new();
        run("ip link add calia type veth peer name far0");
        let mut state = follow().await;
        let rules = RoleRules::new([""; 0], ["calia"]);
        let mut tracker = DeviceTracker::new(Role::Workload);
        let first = tracker.update(&state.view().all(), &rules).appeared.remove(0);
        run(&format!("ip link set calia netns {}", elsewhere.thread));
        let home = gettid();
        elsewhere.run(&format!("ip link set calia netns {home}"));
        let mut changes = tracker.update(&state.view().all(), &rules);
        until(&mut state, "it went and came", |state| {
            changes = tracker.update(&state.view().all(), &rules);
            !changes.appeared.is_empty()
        })
        .await;
        assert_eq!(changes.appeared[0].index, first.index);
        assert_eq!(changes.gone, [first]);
    });
}

#[test]
fn addresses_routes_and_neighbours_are_followed_both_ways() {
    in_namespace(|| async {
        ip_batch(
            "link add eth0 type veth peer name far0\nlink set eth0 addrgenmode none\nlink set eth0 up\n\
             link set far0 up\nlink add other type veth peer name far1\nlink set other up\nlink set far1 up\n",
        );
        let mut state = follow().await;
        let rules = RoleRules::new(["eth0"], [""; 0]);
        let [eth0, other] = ["eth0", "other"].map(|name| state.view().link(name).unwrap().index);

        ip_batch(
            "addr add 192.168.7.1/24 dev eth0\naddr add 192.168.7.2/24 dev eth0\naddr add fd00:7::1/64 dev eth0 nodad\n\
             route add 10.1.0.0/16 via 192.168.7.9\nroute add default via 192.168.7.254 metric 50\n\
             route add fd00:8::/64 via fd00:7::9\nroute add 10.9.0.0/16 dev other\n\
             neigh add 192.168.7.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent\n\
             neigh add fd00:7::9 lladdr 02:00:00:00:00:0a dev eth0 nud reachable\n\
             neigh add 192.168.8.9 lladdr 02:00:00:00:00:0b dev other nud permanent\n",
        );
        let via = |to: &str, via: Option<&str>, metric| Route { to: net(to), via: via.map(addr), device: eth0, metric };
        let wanted = [
            via("0.0.0.0/0", Some("192.168.7.254"), 50),
            via("10.1.0.0/16", Some("192.168.7.9"), 0),
            Route { device: other.forwarded(), ..via("10.9.0.0/16", None, 0) },
            via("192.168.7.0/24", None, 0),
            via("fd00:7::/64", None, 256),
            via("fd00:8::/64", Some("fd00:7::9"), 1024),
        ];
        until(&mut state, "all is there", |state| {
            let links = state.view().links(&rules);
            links.routes == wanted && links.neighbors.len() == 2 && links.devices[0].addresses.len() == 3
        })
        .await;
        let links = state.view().links(&rules);
        let own: Vec<_> = links.devices[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(own, ["192.168.7.1/24", "fd00:7::1/64", "192.168.7.2/24"], "the secondary one comes last");
        let macs: BTreeSet<(IpAddr, Mac, IfIndex)> =
            links.neighbors.iter().map(|n| (n.address, n.mac, n.device)).collect();
        assert_eq!(
            macs,
            BTreeSet::from([
                (addr("192.168.7.9"), "02:00:00:00:00:09".parse().unwrap(), eth0),
                (addr("fd00:7::9"), "02:00:00:00:00:0a".parse().unwrap(), eth0),
            ])
        );
        assert_eq!(state.view().node_addresses(&rules), [addr("192.168.7.1"), addr("192.168.7.2"), addr("fd00:7::1")]);

        // A route that is replaced, one that is a black hole, one with two hops.
        ip_batch(
            "route replace 10.1.0.0/16 via 192.168.7.8\nroute add blackhole 10.2.0.0/16\n\
             route add 10.3.0.0/16 nexthop via 192.168.7.5 dev eth0 nexthop via 192.168.7.6 dev eth0\n\
             route append fd00:8::/64 via fd00:7::8\n\
             neigh replace 192.168.7.9 lladdr 02:00:00:00:00:0c dev eth0 nud stale\n",
        );
        until(&mut state, "replaced and added", |state| {
            let links = state.view().links(&rules);
            links.routes.contains(&via("10.1.0.0/16", Some("192.168.7.8"), 0))
                && links.refused == [Refused { to: net("10.2.0.0/16"), refusal: Refusal::Blackhole, metric: 0 }]
                && links.multipaths.len() == 2
                && links.neighbors.iter().any(|n| n.mac == Mac([2, 0, 0, 0, 0, 0xc]))
        })
        .await;
        let multipaths = state.view().links(&rules).multipaths;
        let hops = |to: &str| -> Vec<_> {
            let route = multipaths.iter().find(|route| route.to == net(to)).expect("a route");
            route.hops.iter().map(|hop| (hop.via, hop.device, hop.weight)).collect()
        };
        let both = |a: &str, b: &str| [a, b].map(|via| (Some(addr(via)), eth0, 1)).to_vec();
        assert_eq!(hops("10.3.0.0/16"), both("192.168.7.5", "192.168.7.6"));
        assert_eq!(hops("fd00:8::/64"), both("fd00:7::9", "fd00:7::8"));

        // What is not followed as the kernel does is said.
        assert_eq!(state.view().notes(&rules), [""; 0]);
        ip_batch("rule add from 10.7.0.0/16 table 7 priority 70\nroute add 10.6.0.0/16 via 192.168.7.9 tos 0x10\n");
        run("ip addr add 192.168.77.1/32 dev eth0");
        run("ip addr del 192.168.77.1/32 dev eth0");
        until(&mut state, "two notes", |state| state.view().notes(&rules).len() == 2).await;
        let notes = state.view().notes(&rules).join("\n");
        for part in ["rule 70 of IPv4, to table 7", "10.6.0.0/16: routes with a TOS (0x10)"] {
            assert!(notes.contains(part), "{part} in {notes}");
        }
        ip_batch("rule del priority 70\nroute del 10.6.0.0/16 tos 0x10\n");
        run("ip addr add 192.168.77.1/32 dev eth0");
        run("ip addr del 192.168.77.1/32 dev eth0");

        ip_batch(
            "route del 10.3.0.0/16\nroute del blackhole 10.2.0.0/16\nneigh del 192.168.7.9 dev eth0\n\
             neigh del fd00:7::9 dev eth0\nroute del fd00:8::/64 via fd00:7::9\n",
        );
        until(&mut state, "removed", |state| {
            let links = state.view().links(&rules);
            links.neighbors.is_empty()
                && links.routes.len() == 6
                && links.routes.contains(&via("fd00:8::/64", Some("fd00:7::8"), 1024))
                && state.view().notes(&rules).is_empty()
        })
        .await;

        // The kernel flushes the IPv4 routes of an address and of a device that goes down without a word.
        run("ip addr flush dev eth0 to 192.168.7.0/24");
        until(&mut state, "no IPv4 route is left", |state| {
            let links = state.view().links(&rules);
            links.routes.iter().all(|route| route.to.addr().is_ipv6() || route.device == other.forwarded())
        })
        .await;
        ip_batch("addr add 192.168.7.1/24 dev eth0\nroute add 10.1.0.0/16 via 192.168.7.9\n");
        until(&mut state, "routes are back", |state| {
            state.view().links(&rules).routes.contains(&via("10.1.0.0/16", Some("192.168.7.9"), 0))
        })
        .await;
        run("ip link set eth0 down");
        until(&mut state, "the device is down and has no route", |state| {
            let links = state.view().links(&rules);
            !state.view().link("eth0").unwrap().up && links.routes.iter().all(|route| route.device == other.forwarded())
        })
        .await;
    });
}

#[test]
fn three_hundred_veths_at_once_are_all_seen() {
    in_namespace(|| async {
        let pods = Namespace::new();
        let mut state = follow().await;
        let names: Vec<String> = (0..300).map(|i| format!("cali{i}")).collect();
        let rules = RoleRules::new([""; 0], names.clone());
        let mut tracker = DeviceTracker::new(Role::Workload);
        let batch: String = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                format!("link add {name} type veth peer name p{i} netns {}\nlink set {name} up\n", pods.thread)
            })
            .collect();
        ip_batch(&batch);
        until(&mut state, "all are up", |state| {
            state.view().links(&rules).devices.len() == 300
                && names.iter().all(|name| state.view().link(name).is_some_and(|l| l.up))
        })
        .await;
        let changes = tracker.update(&state.view().all(), &rules);
        assert_eq!((changes.appeared.len(), changes.gone.len(), changes.altered.len()), (300, 0, 0));
        assert!(state.view().all().iter().filter(|link| link.name.starts_with("cali")).all(|link| link.peer_elsewhere));

        ip_batch(&names.iter().map(|name| format!("link del {name}\n")).collect::<String>());
        until(&mut state, "all are gone", |state| state.view().links(&rules).devices.is_empty()).await;
        assert_eq!(tracker.update(&state.view().all(), &rules).gone.len(), 300);
    });
}

#[test]
fn more_changes_than_the_socket_holds_are_read_anew() {
    in_namespace(|| async {
        ip_batch(
            "link add eth0 type veth peer name far0\nlink set eth0 addrgenmode none\n\
             link set eth0 up\nlink set far0 up\n\
             addr add 192.168.7.1/24 dev eth0\n",
        );
        let mut state = follow().await;
        let rules = RoleRules::new(["eth0"], [""; 0]);
        // Nobody reads the socket meanwhile: this blocks the only thread.
        let routes: String =
            (0..40_000u32).map(|i| format!("route add 10.{}.{}.0/24 via 192.168.7.9\n", i >> 8, i & 255)).collect();
        ip_batch(&routes);
        until(&mut state, "every route is there", |state| state.view().links(&rules).routes.len() == 40_001).await;
        assert!(state.readings() > 1, "the socket's queue ran over");
    });
}

#[test]
fn a_neighbour_is_resolved_on_request_and_a_missing_one_reported() {
    in_namespace(|| async {
        let far = Namespace::new();
        run(&format!("ip link add eth0 type veth peer name eth0 netns {}", far.thread));
        ip_batch("link set eth0 up\naddr add 192.168.7.1/24 dev eth0\naddr add fd00:7::1/64 dev eth0 nodad\n");
        far.run("ip link set eth0 address 02:00:00:00:00:09");
        far.run("ip link set eth0 up");
        far.run("ip addr add 192.168.7.9/24 dev eth0");
        far.run("ip addr add fd00:7::9/64 dev eth0 nodad");
        // The tries for a missing neighbour, 100 ms apart instead of 1 s.
        fs::write("/proc/sys/net/ipv4/neigh/eth0/retrans_time_ms", "100").unwrap();
        let mut state = follow().await;
        let rules = RoleRules::new(["eth0"], [""; 0]);
        let eth0 = state.view().link("eth0").unwrap().index;
        let resolver = state.resolver();
        for address in ["192.168.7.9", "fd00:7::9"] {
            assert!(state.view().links(&rules).neighbors.iter().all(|n| n.address != addr(address)));
            resolver.resolve(addr(address), eth0).await.unwrap();
            until(&mut state, "it is resolved", |state| {
                let mac = Mac([2, 0, 0, 0, 0, 9]);
                state.view().links(&rules).neighbors.iter().any(|n| (n.address, n.mac) == (addr(address), mac))
            })
            .await;
            // Of one that is known already too.
            resolver.resolve(addr(address), eth0).await.unwrap();
        }

        let missing = addr("192.168.7.77");
        for _ in 0..2 {
            resolver.resolve(missing, eth0).await.unwrap();
            let failed = async { while !state.changed().await.unwrap().failed.contains(&(eth0, missing)) {} };
            tokio::time::timeout(DEADLINE, failed).await.expect("the failure is reported, again at the second try");
        }

        let refused = resolver.resolve(missing, IfIndex(9999)).await.unwrap_err().to_string();
        assert!(refused.contains("192.168.7.77") && refused.contains("9999"), "{refused}");
    });
}

/// A trunk as weir makes it, and an uplink.
fn trunk_and_uplink() {
    ip_batch(
        "link add weir0 type veth peer name weir1\nlink set weir0 addrgenmode none\nlink set weir1 addrgenmode none\n\
         link set weir0 arp off\nlink set weir1 arp off\nlink set weir0 up\nlink set weir1 up\n\
         link add eth0 type veth peer name far0\nlink set eth0 up\nlink set far0 up\n\
         addr add 10.0.0.5/24 dev eth0\naddr add fd00:7::5/64 dev eth0 nodad\nroute add default via 10.0.0.1\n",
    );
}

fn plumbing(folder: &Path) -> (HostPlumbing, PathBuf) {
    let record = folder.join("run/host.json");
    let settings = HostSettings {
        device: "weir0".to_owned(),
        gateway_mac: Mac([2, 0, 0, 0, 0, 1]),
        uplinks: vec!["eth0".to_owned()],
        snat_ports: (10_000, 29_999),
        record: record.clone(),
    };
    (HostPlumbing::new(settings).unwrap(), record)
}

async fn links(rules: &RoleRules) -> Links {
    follow().await.view().links(rules)
}

fn device_of(target: &str) -> String {
    let found = run(&format!("ip route get {target}"));
    let mut words = found.split_whitespace();
    words.find(|word| *word == "dev").unwrap_or_else(|| panic!("{found}"));
    words.next().unwrap().to_owned()
}

#[test]
fn the_node_reaches_pods_and_services_through_the_trunk_and_undo_leaves_nothing() {
    in_namespace(|| async {
        trunk_and_uplink();
        let before = (run("ip rule show"), run("ip -6 rule show"), run("ip route show"), run("ip addr show weir0"));
        let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        fs::write(reserved, "8080,15000-15010").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (mut host, record) = plumbing(folder.path());
        let rules = RoleRules::new(["eth0"], [""; 0]);
        let internal = [addr("10.0.0.5"), addr("fd00:7::5")];
        // The pods' range covers the uplink's subnet, as a careless podCIDRs does.
        let through = ["10.0.0.0/8", "10.0.0.200/32", "fd00:244::/48", "fd00::/16"].map(net);
        let wanted = Wanted::new(&links(&rules).await, through, &internal);

        let report = host.apply(&wanted).await.unwrap();
        assert!(!report.changed.is_empty());
        assert_eq!(report.warnings, [""; 0]);
        for (target, device) in [
            ("10.244.1.5", "weir0"),
            ("10.96.0.1", "weir0"),
            ("10.0.0.1", "eth0"),
            ("10.0.0.77", "eth0"),
            ("10.0.0.200", "weir0"),
            ("10.0.0.5", "lo"),
            ("8.8.8.8", "eth0"),
            ("fd00:244::5", "weir0"),
            ("fd00:7::77", "eth0"),
        ] {
            assert_eq!(device_of(target), device, "to {target}");
        }
        assert!(run("ip route get 10.96.0.1").contains("src 10.0.0.5"));
        assert!(run("ip route get fd00:244::5").contains("src fd00:7::5"));
        assert!(run("ip neigh show dev weir0").contains("169.254.119.1 lladdr 02:00:00:00:00:01 PERMANENT"));
        let rule = format!("{RULE_PRIORITY}:\tnot from all iif weir0 lookup {ROUTE_TABLE}");
        assert!(run("ip rule show").contains(&rule) && run("ip -6 rule show").contains(&rule));
        let ports = || fs::read_to_string(reserved).unwrap().trim().to_owned();
        assert_eq!(ports(), "8080,10000-29999");

        // Again, by a process that knows nothing of the first: no change.
        let (mut again, _) = plumbing(folder.path());
        assert_eq!(again.apply(&wanted).await.unwrap(), HostReport::default());

        // Less and other is wanted.
        let fewer = Wanted::new(&links(&rules).await, [net("10.244.0.0/16"), net("fd00:244::/48")], &internal[..1]);
        let report = host.reconcile(&fewer).await.unwrap();
        assert_eq!(report.changed.len(), 2, "{report:?}");
        let table = run(&format!("ip route show table {ROUTE_TABLE}"));
        // And what the node's kernel answers itself by.
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(table.starts_with("10.244.0.0/16 via 169.254.119.1 dev weir0"), "{table}");
        assert!(table.contains("\n169.254.119.1 via 169.254.119.1 dev weir0"), "{table}");
        let table = run(&format!("ip -6 route show table {ROUTE_TABLE}"));
        assert!(table.lines().count() == 2 && !table.contains("src"), "{table}");
        assert_eq!(host.reconcile(&fewer).await.unwrap(), HostReport::default());

        // Somebody removes and adds things.
        run(&format!("ip route flush table {ROUTE_TABLE}"));
        run(&format!("ip route add 1.2.3.0/24 dev weir0 table {ROUTE_TABLE}"));
        run(&format!("ip rule del priority {RULE_PRIORITY}"));
        run(&format!("ip rule add priority 500 lookup {ROUTE_TABLE}"));
        host.reconcile(&fewer).await.unwrap();
        assert_eq!(device_of("10.244.1.5"), "weir0");
        assert_eq!(device_of("1.2.3.4"), "eth0");
        let rules_now = run("ip rule show");
        assert!(rules_now.contains(&rule) && !rules_now.contains("500:"), "{rules_now}");

        // No IPv6 any more.
        let only_v4 = Wanted::new(&links(&rules).await, [net("10.244.0.0/16")], &internal);
        host.reconcile(&only_v4).await.unwrap();
        assert!(!run("ip -6 rule show").contains(&ROUTE_TABLE.to_string()));

        let report = HostPlumbing::undo("weir0", &record).await.unwrap();
        assert_eq!(report.changed.len(), 3, "rule, route, ports: {report:?}");
        assert_eq!(
            (run("ip rule show"), run("ip -6 rule show"), run("ip route show"), run("ip addr show weir0")),
            before
        );
        assert_eq!(run("ip neigh show dev weir0"), "");
        assert_eq!(ports(), "8080,15000-15010");
        assert_eq!(HostPlumbing::undo("weir0", &record).await.unwrap(), HostReport::default());
        run("ip link del weir0");
        assert_eq!(HostPlumbing::undo("weir0", &record).await.unwrap(), HostReport::default());
    });
}

#[test]
fn a_node_without_the_trunk_or_with_an_odd_address_is_told_so() {
    in_namespace(|| async {
        let folder = tempfile::tempdir().unwrap();
        let (mut host, _) = plumbing(folder.path());
        let error = host.apply(&Wanted::default()).await.unwrap_err().to_string();
        assert!(error.contains("no device weir0"), "{error}");

        trunk_and_uplink();
        let mut wanted = Wanted { through: BTreeSet::from([net("10.244.0.0/16")]), ..Wanted::default() };
        wanted.source_v4 = Some("10.0.0.6".parse().unwrap());
        let report = host.apply(&wanted).await.unwrap();
        assert!(report.warnings.len() == 1 && report.warnings[0].contains("10.0.0.6"), "{report:?}");
        assert_eq!(device_of("10.244.1.5"), "weir0");

        wanted.through.insert(net("0.0.0.0/0"));
        assert!(host.reconcile(&wanted).await.unwrap_err().to_string().contains("0.0.0.0/0"));
        assert_eq!(device_of("8.8.8.8"), "eth0");
    });
}

#[test]
fn a_changed_port_range_keeps_what_others_reserved() {
    in_namespace(|| async {
        trunk_and_uplink();
        let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        let ports = || fs::read_to_string(reserved).unwrap().trim().to_owned();
        let folder = tempfile::tempdir().unwrap();
        let (mut host, record) = plumbing(folder.path());
        host.apply(&Wanted::default()).await.unwrap();
        assert_eq!(ports(), "10000-29999");
        fs::write(reserved, "30000,10000-29999").unwrap();
        let settings = HostSettings {
            device: "weir0".to_owned(),
            gateway_mac: Mac([2, 0, 0, 0, 0, 1]),
            uplinks: Vec::new(),
            snat_ports: (20_000, 30_010),
            record: record.clone(),
        };
        HostPlumbing::new(settings).unwrap().apply(&Wanted::default()).await.unwrap();
        assert_eq!(ports(), "20000-30010");
        HostPlumbing::undo("weir0", &record).await.unwrap();
        assert_eq!(ports(), "30000");
        assert!(!record.exists());
    });
}

#[test]
fn a_long_list_of_reserved_ports_is_kept_whole_beside_weirs_own() {
    in_namespace(|| async {
        trunk_and_uplink();
        let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        // The kernel has nothing for a second read.
        let ports = || run(&format!("cat {reserved}")).trim().to_owned();
        let others: Vec<String> = (0..1000).map(|number| (40_000 + 2 * number).to_string()).collect();
        fs::write(reserved, others.join(",")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (mut host, record) = plumbing(folder.path());
        let wanted = Wanted { ports: PortSet::of([8080, 30_080, 30_081, 40_000]), ..Wanted::default() };
        host.apply(&wanted).await.unwrap();
        let [first, rest] = [&others[..1], &others[1..]].map(|some| some.join(","));
        assert_eq!(ports(), format!("8080,10000-29999,30080-30081,{first},{rest}"));
        host.apply(&Wanted { ports: PortSet::of([8081]), ..Wanted::default() }).await.unwrap();
        assert_eq!(ports(), format!("8081,10000-29999,{first},{rest}"), "what is not wanted any more goes");
        HostPlumbing::undo("weir0", &record).await.unwrap();
        assert_eq!(ports(), format!("{first},{rest}"));
    });
}

/// Sends a UDP packet into the trunk from weir's end, as a worker that punts does.
fn punt(source: &str, port: u16) {
    let script = format!(
        "import socket, struct, sys\n\
         def sum16(b):\n\
         \x20s = sum(struct.unpack('!%dH' % (len(b)//2), b))\n\
         \x20s = (s & 65535) + (s >> 16)\n\
         \x20return ~((s & 65535) + (s >> 16)) & 65535\n\
         udp = struct.pack('!HHHH', 40000, {port}, 12, 0) + b'ping'\n\
         head = struct.pack('!BBHHHBB', 0x45, 0, 20 + len(udp), 1, 0x4000, 64, 17)\n\
         ends = socket.inet_aton('{source}') + socket.inet_aton('10.0.0.5')\n\
         ip = head + struct.pack('!H', sum16(head + bytes(2) + ends)) + ends\n\
         mac = bytes.fromhex(sys.argv[1].replace(':', ''))\n\
         s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('weir1', 0))\n\
         s.send(mac + bytes([2,0,0,0,0,1]) + b'\\x08\\x00' + ip + udp)\n"
    );
    let shown = run("ip -o link show weir0");
    let mac = shown.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let status = Command::new("python3").args(["-c", &script, mac]).status().unwrap();
    assert!(status.success());
}

#[test]
fn what_weir_punts_passes_the_kernels_source_checks() {
    in_namespace(|| async {
        trunk_and_uplink();
        let folder = tempfile::tempdir().unwrap();
        let (mut host, _) = plumbing(folder.path());
        let wanted = Wanted {
            through: BTreeSet::from([net("10.244.0.0/16")]),
            source_v4: Some("10.0.0.5".parse().unwrap()),
            ..Wanted::default()
        };
        let socket = UdpSocket::bind("10.0.0.5:7777").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut buffer = [0; 16];
        punt("10.0.0.5", 7777);
        let refused = socket.recv_from(&mut buffer).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::WouldBlock, "without the plumbing the kernel drops its own address");
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        for all in ["0", "1", "2"] {
            fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", all).unwrap();
            let report = host.apply(&wanted).await.unwrap();
            let told = report.warnings.iter().any(|line| line.contains("eth0.rp_filter=2"));
            assert_eq!(told, all == "1", "{report:?}");
            // A pod, somebody outside, and the node itself.
            for source in ["10.244.1.5", "203.0.113.9", "10.0.0.5"] {
                punt(source, 7777);
                let (_, from) = socket.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{source}, all={all}: {e}"));
                assert_eq!(from.ip(), addr(source));
            }
        }
    });
}

/// Runs a test of [`Watch`] in a folder of its own, one after the other: a SIGHUP goes to all that watch.
fn watching<F: Future<Output = ()>>(test: impl FnOnce(PathBuf) -> F) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test(path));
}

async fn fires(watch: &mut Watch, why: &str) {
    let trigger = tokio::time::timeout(DEADLINE, watch.changed()).await;
    assert_eq!(trigger.unwrap_or_else(|_| panic!("no event: {why}")).unwrap(), Trigger::Files, "{why}");
}

async fn keeps_still(watch: &mut Watch, why: &str) {
    let trigger = tokio::time::timeout(Duration::from_millis(200), watch.changed()).await;
    assert!(trigger.is_err(), "an event: {why}");
}

#[test]
fn files_are_seen_however_they_change() {
    watching(|folder| async move {
        let file = folder.join("weir.yaml");
        fs::write(&file, "a").unwrap();
        let mut watch = Watch::new([&file]).unwrap();
        keeps_still(&mut watch, "nothing happened").await;

        fs::write(&file, "b").unwrap();
        fires(&mut watch, "written in place").await;
        fs::write(folder.join(".weir.yaml.swp"), "x").unwrap();
        fs::write(folder.join("weir.log"), "x").unwrap();
        fs::read(&file).unwrap();
        keeps_still(&mut watch, "other files, and reading").await;

        fs::write(folder.join("new"), "c").unwrap();
        fs::rename(folder.join("new"), &file).unwrap();
        fires(&mut watch, "replaced by rename").await;
        fs::write(&file, "d").unwrap();
        fires(&mut watch, "written in place after that").await;

        fs::remove_file(&file).unwrap();
        fires(&mut watch, "removed").await;
        fs::write(&file, "e").unwrap();
        fires(&mut watch, "made again").await;
    });
}

#[test]
fn folders_are_seen_with_what_comes_into_them() {
    watching(|folder| async move {
        let policies = folder.join("policies");
        let mut watch = Watch::new([&policies]).unwrap();
        fs::create_dir(&policies).unwrap();
        fs::write(policies.join("a.yaml"), "a").unwrap();
        fires(&mut watch, "the folder and a file in it appeared").await;
        fs::create_dir(policies.join("team")).unwrap();
        fs::write(policies.join("team/b.yaml"), "b").unwrap();
        fires(&mut watch, "a file in a new subfolder").await;
        fs::write(policies.join("team/b.yaml"), "bb").unwrap();
        fires(&mut watch, "a change in the subfolder").await;
        fs::remove_file(policies.join("a.yaml")).unwrap();
        fires(&mut watch, "a file removed").await;

        // The folder is replaced as a whole.
        fs::create_dir(folder.join("next")).unwrap();
        fs::write(folder.join("next/c.yaml"), "c").unwrap();
        fs::rename(&policies, folder.join("old")).unwrap();
        fs::rename(folder.join("next"), &policies).unwrap();
        fires(&mut watch, "the folder replaced").await;
        fs::write(policies.join("c.yaml"), "cc").unwrap();
        fires(&mut watch, "a change in the new folder").await;
        fs::write(folder.join("old/d.yaml"), "d").unwrap();
        keeps_still(&mut watch, "the old folder is nobody's").await;
    });
}

#[test]
fn a_config_map_volume_that_is_swapped_is_one_event() {
    watching(|folder| async move {
        // As the kubelet's atomic writer lays it out: visible links into ..data, which links to a folder per version.
        let version = |name: &str, text: &str| {
            fs::create_dir(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("cluster.yaml"), text).unwrap();
            symlink(name, folder.join("..data_tmp")).unwrap();
            fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
        };
        version("..2024_1", "one");
        symlink("..data/cluster.yaml", folder.join("cluster.yaml")).unwrap();
        for path in [folder.join("cluster.yaml"), folder.clone()] {
            let name = |n: u32| format!("..2024_{}_{n}", path.file_name().unwrap().to_str().unwrap().len());
            let mut watch = Watch::new([&path]).unwrap();
            for n in 0..3 {
                version(&name(n), "next");
                fires(&mut watch, "swapped").await;
                if n > 0 {
                    fs::remove_dir_all(folder.join(name(n - 1))).unwrap();
                    keeps_still(&mut watch, "the old version is cleaned away").await;
                }
            }
        }
    });
}

#[test]
fn a_link_from_elsewhere_is_followed_all_the_way() {
    watching(|folder| async move {
        for sub in ["etc", "opt", "data"] {
            fs::create_dir(folder.join(sub)).unwrap();
        }
        fs::write(folder.join("data/real.yaml"), "a").unwrap();
        symlink("../data", folder.join("opt/current")).unwrap();
        symlink(folder.join("opt/current/real.yaml"), folder.join("etc/weir.yaml")).unwrap();
        let mut watch = Watch::new([folder.join("etc/weir.yaml")]).unwrap();
        fs::write(folder.join("data/real.yaml"), "b").unwrap();
        fires(&mut watch, "the file at the end of two links").await;
        fs::create_dir(folder.join("data2")).unwrap();
        fs::write(folder.join("data2/real.yaml"), "c").unwrap();
        symlink("../data2", folder.join("opt/next")).unwrap();
        fs::rename(folder.join("opt/next"), folder.join("opt/current")).unwrap();
        fires(&mut watch, "the link in the middle").await;
        fs::write(folder.join("data/real.yaml"), "d").unwrap();
        keeps_still(&mut watch, "the old end").await;
        fs::write(folder.join("data2/real.yaml"), "e").unwrap();
        fires(&mut watch, "the new end").await;
    });
}

#[test]
fn other_paths_can_be_watched_and_a_hangup_always_counts() {
    watching(|folder| async move {
        let [one, two] = ["one.yaml", "two.yaml"].map(|name| folder.join(name));
        fs::write(&one, "1").unwrap();
        fs::write(&two, "2").unwrap();
        let mut watch = Watch::new([&one]).unwrap();
        fs::write(&two, "22").unwrap();
        keeps_still(&mut watch, "not watched yet").await;
        fs::write(&one, "11").unwrap();
        watch.set_paths([&one, &two]).unwrap();
        fires(&mut watch, "a change just before new paths were set").await;
        fs::write(&two, "222").unwrap();
        fires(&mut watch, "the new path").await;
        watch.set_paths([&two]).unwrap();
        fs::write(&one, "111").unwrap();
        keeps_still(&mut watch, "no more watched").await;

        kill(Pid::this(), Signal::SIGHUP).unwrap();
        let trigger = tokio::time::timeout(DEADLINE, watch.changed()).await.unwrap().unwrap();
        assert_eq!(trigger, Trigger::Signal);
    });
}

#[test]
fn a_file_counts_when_it_is_closed() {
    watching(|folder| async move {
        let [file, new] = ["a.yaml", "new.yaml"].map(|name| folder.join(name));
        fs::write(&file, "a").unwrap();
        let mut watch = Watch::new([&folder]).unwrap();
        let mut writer = fs::File::create(&file).unwrap();
        keeps_still(&mut watch, "truncated, and open").await;
        writer.write_all(b"half").unwrap();
        keeps_still(&mut watch, "half of it is written").await;
        let created = fs::File::create(&new).unwrap();
        keeps_still(&mut watch, "a new one, not finished").await;
        drop(writer);
        fires(&mut watch, "closed").await;
        keeps_still(&mut watch, "the other one is still open").await;
        drop(created);
        fires(&mut watch, "the other one closed").await;
        nix::unistd::truncate(&file, 1).unwrap();
        fires(&mut watch, "truncated by name, which opens and closes nothing").await;
    });
}

#[test]
fn what_the_loader_awaits_is_looked_at_again() {
    watching(|folder| async move {
        let file = folder.join("a.yaml");
        fs::write(&file, "a").unwrap();
        let mut watch = Watch::new([&file]).unwrap();
        let revisit = watch.revisit();
        // Opened before it was to be read, and closed unchanged.
        let writer = fs::OpenOptions::new().write(true).open(&file).unwrap();
        revisit.set(Awaited { written: vec![file.clone()], at: None });
        keeps_still(&mut watch, "it is open").await;
        drop(writer);
        fires(&mut watch, "closed as it was").await;
        keeps_still(&mut watch, "which is one event").await;

        let at = tokio::time::Instant::now() + Duration::from_millis(300);
        let waiting = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            revisit.set(Awaited { written: Vec::new(), at: Some(at) });
        };
        tokio::join!(waiting, fires(&mut watch, "the time has come"));
        assert!(tokio::time::Instant::now() >= at);
        keeps_still(&mut watch, "which is one event, too").await;
        assert!(!revisit.takes_belief());
        kill(Pid::this(), Signal::SIGHUP).unwrap();
        tokio::time::timeout(DEADLINE, watch.changed()).await.unwrap().unwrap();
        assert!(revisit.takes_belief() && !revisit.takes_belief(), "an operator is believed, once");
    });
}
