//! The same flows through weir, and through the kernel with nftables rules like kube-proxy's for the same objects: same outcome.
//!
//! One node with local pods, another host that stands for a node with a pod, a client outside. What a socket can see is compared: which
//! backends answer, whom they see, what is refused, what gets no answer.

mod cluster;
pub mod family;
pub mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use weir_cluster::translate;

use self::{
    cluster::{BACKEND, NODE, OTHER, OUTSIDE, POD},
    family::Family,
    rules::{kernel_rules, ruleset},
};
use crate::site::{DEADLINE, NO_ANSWER_SECONDS, Site};

/// Connections of one flow: enough that every flow meets each of three backends but once in five billion runs.
const TRIES: u32 = 70;

/// What a flow comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Answered,
    /// Always by the same backend, whichever that is.
    Sticky,
    Refused,
    Dropped,
}

use Kind::{Answered, Dropped, Refused, Sticky};

/// What was seen of a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Outcome {
    /// Who answered, and whom they saw.
    Answered(BTreeSet<(String, String)>),
    Refused,
    Dropped,
}

/// How a flow is asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Protocol {
    Tcp,
    Udp,
}

/// From where, to which address and port, and what the rules say.
type Flow = (&'static str, &'static str, Kind);

/// The flows, each asked by TCP and by UDP.
const FLOWS: [Flow; 68] = [
    // All kinds of addresses, policy Cluster.
    (POD, "10.96.0.1:80", Answered),
    (OUTSIDE, "10.96.0.1:80", Answered),
    (NODE, "10.96.0.1:80", Answered),
    (POD, "198.51.100.1:80", Answered),
    (OUTSIDE, "198.51.100.1:80", Answered),
    (NODE, "198.51.100.1:80", Answered),
    (POD, "203.0.113.1:80", Dropped),
    (OUTSIDE, "203.0.113.1:80", Answered),
    (NODE, "203.0.113.1:80", Answered),
    (POD, "192.168.10.1:31501", Answered),
    (OUTSIDE, "192.168.10.1:31501", Answered),
    (BACKEND, "10.96.0.1:80", Answered),
    (BACKEND, "198.51.100.1:80", Answered),
    (BACKEND, "192.168.10.1:31501", Answered),
    // externalTrafficPolicy Local.
    (POD, "10.96.0.2:80", Answered),
    (OUTSIDE, "10.96.0.2:80", Answered),
    (NODE, "10.96.0.2:80", Answered),
    (POD, "198.51.100.2:80", Answered),
    (OUTSIDE, "198.51.100.2:80", Answered),
    (NODE, "198.51.100.2:80", Answered),
    (POD, "203.0.113.2:80", Dropped),
    (OUTSIDE, "203.0.113.2:80", Dropped),
    (POD, "192.168.10.1:31502", Answered),
    (OUTSIDE, "192.168.10.1:31502", Answered),
    (BACKEND, "192.168.10.1:31502", Answered),
    (OTHER, "10.96.0.2:80", Answered),
    (OTHER, "192.168.10.1:31502", Answered),
    // internalTrafficPolicy Local.
    (POD, "10.96.0.3:80", Answered),
    (OUTSIDE, "10.96.0.3:80", Answered),
    (NODE, "10.96.0.3:80", Answered),
    // Both Local, and no backend here.
    (POD, "10.96.0.4:80", Dropped),
    (OUTSIDE, "10.96.0.4:80", Dropped),
    (POD, "192.168.10.1:31504", Answered),
    (OUTSIDE, "192.168.10.1:31504", Dropped),
    (OUTSIDE, "198.51.100.4:80", Dropped),
    (NODE, "198.51.100.4:80", Answered),
    // No backend at all.
    (POD, "10.96.0.5:80", Refused),
    (OUTSIDE, "10.96.0.5:80", Refused),
    (NODE, "10.96.0.5:80", Refused),
    (POD, "198.51.100.5:80", Refused),
    (OUTSIDE, "198.51.100.5:80", Refused),
    (OUTSIDE, "192.168.10.1:31505", Refused),
    // ClientIP affinity, also across kinds of addresses.
    (POD, "10.96.0.7:80", Sticky),
    (OUTSIDE, "10.96.0.7:80", Sticky),
    (OUTSIDE, "192.168.10.1:31507", Sticky),
    (POD, "198.51.100.7:80", Sticky),
    (NODE, "10.96.0.7:80", Sticky),
    // Hints of zones, of zones where one backend has none, of nodes; they are nothing to a node's own list.
    (POD, "10.96.0.8:80", Answered),
    (OUTSIDE, "192.168.10.1:31508", Answered),
    (POD, "10.96.0.9:80", Answered),
    (OUTSIDE, "192.168.10.1:31509", Answered),
    (POD, "10.96.0.10:80", Answered),
    (NODE, "10.96.0.10:80", Answered),
    // Backends that are not ready, or only still serve.
    (POD, "10.96.0.11:80", Answered),
    (OUTSIDE, "192.168.10.1:31511", Answered),
    (POD, "10.96.0.12:80", Answered),
    (OUTSIDE, "10.96.0.12:80", Answered),
    (POD, "10.96.0.13:80", Refused),
    (OUTSIDE, "192.168.10.1:31513", Refused),
    (POD, "10.96.0.14:80", Answered),
    (OUTSIDE, "192.168.10.1:31514", Answered),
    (POD, "192.168.10.1:31515", Answered),
    (OUTSIDE, "192.168.10.1:31515", Dropped),
    // Hairpin, unpublished ports, addresses that no service has.
    (BACKEND, "10.96.0.6:80", Answered),
    (POD, "10.96.0.1:81", Refused),
    (OUTSIDE, "10.96.0.1:81", Refused),
    (POD, "10.96.0.99:80", Dropped),
    (OUTSIDE, "10.96.0.99:80", Dropped),
];

/// Asks by HTTP, so many times by connections of their own; the answers.
fn ask_tcp(site: &Site, from: &str, to: SocketAddr, tries: u32, limit: Duration) -> Result<String, Outcome> {
    let (limit, url) = (limit.as_secs_f32().to_string(), format!("http://{to}/?[1-{tries}]"));
    let output = site.lab.output_in(from, &["curl", "-sS", "--fail", "--max-time", &limit, &url]).unwrap();
    match output.status.code() {
        Some(0) => Ok(String::from_utf8(output.stdout).expect("text")),
        Some(7) => Err(Outcome::Refused),
        Some(28) => Err(Outcome::Dropped),
        code => panic!("{from} to {to}: {code:?} {}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// Asks by datagrams, each from a socket of its own, which takes answers from whom it asked only.
fn ask_udp(site: &Site, from: &str, to: SocketAddr, tries: u32, limit: Duration) -> Result<String, Outcome> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let ask = || {
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(limit))?;
        socket.connect(to)?;
        match socket.send(b"who?") {
            // What the kernel says where its own rules drop what is sent, also if an ICMP error follows.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
            sent => drop(sent?),
        }
        let mut answer = [0; 256];
        socket.recv(&mut answer).map(|length| String::from_utf8_lossy(&answer[..length]).into_owned())
    };
    site.inside(from, || (0..tries).map(|_| ask()).collect::<Result<String, _>>()).map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused => Outcome::Refused,
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Outcome::Dropped,
        _ => panic!("{from} to {to}: {error}"),
    })
}

/// A flow, by one of the protocols.
type Asked = (Protocol, &'static Flow);

/// What every flow comes to. A flow that is not to be answered is waited for a second only.
fn outcomes(site: &Site, family: Family) -> Vec<(Asked, Outcome)> {
    let outcome = |(protocol, (from, to, kind)): Asked| {
        let limit = if *kind == Dropped { Duration::from_secs_f32(NO_ANSWER_SECONDS) } else { DEADLINE };
        let tries = if matches!(kind, Answered | Sticky) { TRIES } else { 1 };
        let (address, port) = to.split_once(':').expect("address and port");
        let to = SocketAddr::new(family.address(address).parse().unwrap(), port.parse().unwrap());
        let answers = match protocol {
            Protocol::Tcp => ask_tcp(site, from, to, tries, limit),
            Protocol::Udp => ask_udp(site, from, to, tries, limit),
        };
        let split = |line: &str| line.split_once(' ').map(|(pod, seen)| (pod.to_owned(), seen.trim().to_owned()));
        answers.map_or_else(
            |outcome| outcome,
            |text| Outcome::Answered(text.lines().map(|line| split(line).expect("who, and whom it saw")).collect()),
        )
    };
    let all = || {
        [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|protocol| FLOWS.iter().map(move |flow| (protocol, flow)))
    };
    // What waits in vain waits together.
    thread::scope(|scope| {
        let waiting: Vec<_> =
            all().map(|one| (one.1.2 == Dropped).then(|| scope.spawn(move || outcome(one)))).collect();
        let each = all().zip(waiting).map(|(one, waiting)| match waiting {
            Some(waiting) => (one, waiting.join().expect("it is asked to its end")),
            None => (one, outcome(one)),
        });
        each.collect()
    })
}

/// Makes answers of sticky flows comparable: which backend it was is chance, but for all of a client's flows of a protocol it is one.
fn without_chance(outcomes: Vec<(Asked, Outcome)>) -> Vec<(Asked, Outcome)> {
    let mut chosen = BTreeMap::new();
    let one = |((protocol, flow), outcome): (Asked, Outcome)| {
        let outcome = match outcome {
            Outcome::Answered(seen) if flow.2 == Sticky => {
                let named = seen.into_iter().map(|(pod, seen)| {
                    let first = chosen.entry((protocol, flow.0)).or_insert_with(|| pod.clone());
                    (if *first == pod { "the first" } else { "another" }.to_owned(), seen)
                });
                Outcome::Answered(named.collect())
            }
            outcome => outcome,
        };
        ((protocol, flow), outcome)
    };
    outcomes.into_iter().map(one).collect()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn flows_over_ipv4_come_to_the_same_as_with_the_kernel_and_kube_proxys_rules() {
    compare(Family::V4);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn flows_over_ipv6_come_to_the_same_as_with_the_kernel_and_kube_proxys_rules() {
    compare(Family::V6);
}

fn compare(family: Family) {
    let (mut site, _echoes) = cluster::site(family);
    let loaded =
        translate::load_strictly(site.config(NODE)).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    kernel_rules(&site, family, Some(&ruleset(&loaded.services, family)));
    let kernel = without_chance(outcomes(&site, family));
    kernel_rules(&site, family, None);
    site.start_all();
    let weir = without_chance(outcomes(&site, family));
    let mut differences = String::new();
    for ((asked, kernel), (_, weir)) in kernel.iter().zip(&weir) {
        let is_expected = match (asked.1.2, kernel) {
            (Answered, Outcome::Answered(_)) | (Refused, Outcome::Refused) | (Dropped, Outcome::Dropped) => true,
            (Sticky, Outcome::Answered(seen)) => seen.len() == 1 && seen.iter().all(|(pod, _)| pod == "the first"),
            _ => false,
        };
        if kernel != weir || !is_expected {
            writeln!(differences, "{asked:?}\n  kernel {kernel:?}\n  weir   {weir:?}").unwrap();
        }
    }
    assert!(differences.is_empty(), "{differences}");
    site.finish();
}
