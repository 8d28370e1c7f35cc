//! `weir policy matrix`: who can reach whom, pods by pods.
//!
//! Every pod of the manifests is judged as the router of its own node would: the policy is compiled once with each workload taken for a
//! local one, and each pair is asked for what the source's egress and the destination's ingress policy say of the first packet of a
//! connection to the destination's own address ([`weir_policy::Classifier::judge`], as `decide` asks in the running router). Both are
//! asked, also where the first denies, so that whoever wants to open a way sees all that bars it.
//!
//! What host endpoints rule for what their node forwards is no part of it: that depends on the way, not on the pair.
//!
//! A destination has a probe for each port that is asked about, and for each address family that it has. The answers are kept in rows of
//! all destinations' probes, so a pair costs two judgements per probe and 16 bytes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    sync::Arc,
};

use serde_json::{Value, json};
use weir_dataplane::model::Workload;
use weir_packet::{Address, FlowKey, Ports, Protocol};
use weir_policy::{
    Classifier, CompileError, EndpointId, Judgement, PolicyDirection, RuleId,
    model::{EndpointKind, Model},
};

use super::places::{Authority, Places};
use crate::translate::Loaded;

/// The most judgements of a matrix: what some seconds and some 100 MB allow.
pub const MAX_PROBES: usize = 1 << 23;
/// What a destination is asked at that publishes no port.
pub(crate) const ASSUMED_PORT: Port = Port { protocol: Protocol::TCP, number: 80 };
/// Any source port: that of `weir trace`.
const SOURCE_PORT: u16 = 40_000;

/// Where a connection is opened to: a protocol and its port, or a protocol without ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Port {
    /// The protocol; ICMP stands for that of either family.
    pub protocol: Protocol,
    /// The port; 0 where the protocol has none.
    pub number: u16,
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let help = || format!("{text:?} is no port: write tcp/80, udp/53, sctp/5060, or icmp for an echo request");
        let (protocol, number) = match text.split_once('/') {
            Some((protocol, number)) => (protocol, Some(number.parse().map_err(|_| help())?)),
            None => (text, None),
        };
        // A number alone would be a protocol's, and is more likely to be meant as a port's.
        let named = Protocol::from_name(protocol).filter(|_| protocol.parse::<u16>().is_err());
        let protocol = named.ok_or_else(help)?;
        let protocol = if protocol.is_icmp() { Protocol::ICMP } else { protocol };
        match number {
            Some(number) if protocol.has_ports() && number > 0 => Ok(Self { protocol, number }),
            None if !protocol.has_ports() => Ok(Self { protocol, number: 0 }),
            _ => Err(help()),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.protocol.has_ports() { write!(f, "{}/{}", self.protocol, self.number) } else { self.protocol.fmt(f) }
    }
}

/// Pods by name: a namespace, or one pod of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pods {
    namespace: String,
    pod: Option<String>,
}

impl FromStr for Pods {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, pod) = match text.split_once('/') {
            Some((namespace, pod)) => (namespace, Some(pod)),
            None => (text, None),
        };
        if namespace.is_empty() || pod.is_some_and(str::is_empty) {
            return Err("expected a namespace, or namespace/pod".into());
        }
        Ok(Self { namespace: namespace.to_owned(), pod: pod.map(str::to_owned) })
    }
}

impl Pods {
    fn has(&self, pod: &Pod) -> bool {
        self.has_name(&pod.name)
    }

    /// Whether a pod, "namespace/name", is one of these.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        let (namespace, pod) = name.split_once('/').unwrap_or(("", name));
        self.namespace == namespace && self.pod.as_deref().is_none_or(|wanted| wanted == pod)
    }
}

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// On these ports; none: on those that each destination publishes.
    pub ports: Vec<Port>,
    /// Sources; none: all pods.
    pub from: Vec<Pods>,
    /// Destinations; none: all pods.
    pub to: Vec<Pods>,
}

/// Why there is no matrix.
#[derive(Debug, thiserror::Error)]
pub enum MatrixError {
    /// The policy is too large.
    #[error("policy, with all pods of the cluster taken for this node's: {0}")]
    Compile(#[from] CompileError),
    /// A filter names no pod.
    #[error("no pod of the manifests has an address and is in {0}")]
    NoSuchPods(String),
    /// There are too many pairs.
    #[error(
        "{sources} sources by {destinations} destinations and their ports are {probes} judgements, and a matrix has at most \
         {MAX_PROBES}; ask about a part of it with --namespace, --from, --to or --ports"
    )]
    TooLarge {
        /// Sources.
        sources: usize,
        /// Destinations.
        destinations: usize,
        /// Judgements.
        probes: usize,
    },
}

/// A pod, or another workload.
#[derive(Clone, Debug)]
pub struct Pod {
    /// "namespace/name".
    pub name: String,
    /// The node that it runs on.
    pub node: Option<String>,
    /// Its first address of each family.
    pub v4: Option<Ipv4Addr>,
    /// Its first address of each family.
    pub v6: Option<Ipv6Addr>,
    endpoint: EndpointId,
}

impl Pod {
    /// The part of its name before the slash.
    pub fn namespace(&self) -> &str {
        self.name.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    fn side(&self) -> Side {
        Side { v4: self.v4, v6: self.v6, endpoint: Some(self.endpoint) }
    }

    /// The part of its name after the slash.
    pub fn short_name(&self) -> &str {
        self.name.split_once('/').map_or(&self.name, |(_, name)| name)
    }
}

/// One question about a destination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Probe {
    /// The port.
    pub port: Port,
    /// The address family: 4 or 6.
    pub version: u8,
}

impl Probe {
    /// The protocol of its family, and the ports, of the first packet: as a flow's key has them.
    pub(crate) fn on_the_wire(self) -> (Protocol, Ports) {
        const ECHO: [u16; 2] = [8, 128];
        let Port { protocol, number } = self.port;
        let is_ipv6 = self.version == 6;
        match protocol {
            Protocol::ICMP if is_ipv6 => (Protocol::ICMPV6, Ports::new(0, ECHO[1])),
            Protocol::ICMP => (protocol, Ports::new(0, ECHO[0])),
            _ if protocol.has_ports() => (protocol, Ports::new(SOURCE_PORT, number)),
            _ => (protocol, Ports::default()),
        }
    }
}

/// What both ends' policies say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The source's.
    pub egress: Judgement,
    /// The destination's.
    pub ingress: Judgement,
}

/// Whether a connection can be opened, and what bars it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Verdict {
    /// It can.
    Allowed,
    /// The source's policy denies it.
    DeniedByEgress,
    /// The destination's policy denies it.
    DeniedByIngress,
    /// Both do.
    DeniedByBoth,
}

impl Verdict {
    /// For programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::DeniedByEgress => "deniedByEgress",
            Self::DeniedByIngress => "deniedByIngress",
            Self::DeniedByBoth => "deniedByBoth",
        }
    }

    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::DeniedByEgress => "denied by egress",
            Self::DeniedByIngress => "denied by ingress",
            Self::DeniedByBoth => "denied by both",
        }
    }
}

impl Answer {
    /// The verdict of both together.
    pub fn verdict(&self) -> Verdict {
        match (self.egress.allow, self.ingress.allow) {
            (true, true) => Verdict::Allowed,
            (false, true) => Verdict::DeniedByEgress,
            (true, false) => Verdict::DeniedByIngress,
            (false, false) => Verdict::DeniedByBoth,
        }
    }
}

/// All probes of one pair together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cell {
    /// A pod and itself: never denied.
    Itself,
    /// The pods have no address family in common.
    NoWay,
    /// Every port.
    Allowed,
    /// Some ports, or one family only.
    Some,
    /// None; all that bars the way.
    Denied(Verdict),
}

/// Who can reach whom.
pub struct Matrix {
    /// All pods that are a source or a destination, by name.
    pub pods: Vec<Pod>,
    /// Rows: numbers of pods, ascending.
    pub sources: Vec<usize>,
    /// Columns: numbers of pods, ascending.
    pub destinations: Vec<usize>,
    /// Whether the ports were asked for, or are each destination's own.
    pub ports: Vec<Port>,
    /// By pod: what a destination is asked.
    probes: Vec<Vec<Probe>>,
    /// By pod: where a destination's answers begin in a row.
    first: Vec<usize>,
    /// By source, in its row.
    answers: Vec<Vec<Option<Answer>>>,
    /// By pod: its row.
    row: Vec<Option<usize>>,
    authorities: BTreeMap<RuleId, Authority>,
}

impl Matrix {
    /// Judges all pairs.
    ///
    /// # Errors
    /// Where the policy cannot be compiled, or the question names no pod or too many.
    pub fn new(loaded: &Loaded, question: &Question) -> Result<Self, MatrixError> {
        let classifier = Classifier::compile(&with_all_local(&loaded.policy))?;
        let mut pods: Vec<Pod> = loaded
            .cluster
            .workloads
            .iter()
            .filter_map(|workload| {
                let (v4, v6) = first_addresses(workload);
                let endpoint = classifier.endpoint(&workload.name)?;
                Some(Pod { name: workload.name.clone(), node: workload.node.clone(), v4, v6, endpoint })
            })
            .collect();
        for filter in question.from.iter().chain(&question.to) {
            if !pods.iter().any(|pod| filter.has(pod)) {
                let Pods { namespace, pod } = filter;
                let name = pod.as_ref().map_or(namespace.clone(), |pod| format!("{namespace}/{pod}"));
                return Err(MatrixError::NoSuchPods(name));
            }
        }
        let is_source = |pod: &Pod| question.from.is_empty() || question.from.iter().any(|pods| pods.has(pod));
        let is_destination = |pod: &Pod| question.to.is_empty() || question.to.iter().any(|pods| pods.has(pod));
        pods.retain(|pod| is_source(pod) || is_destination(pod));
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        let numbers = |wanted: &dyn Fn(&Pod) -> bool| (0..pods.len()).filter(|n| wanted(&pods[*n])).collect::<Vec<_>>();
        let (sources, destinations) = (numbers(&is_source), numbers(&is_destination));

        let published = loaded.published_ports();
        let probes: Vec<Vec<Probe>> = pods
            .iter()
            .map(|pod| match is_destination(pod) {
                true => {
                    probes_of([pod.v4.is_some(), pod.v6.is_some()], &ports_of(&pod.name, &published, &question.ports))
                }
                false => Vec::new(),
            })
            .collect();
        let mut width = 0;
        let mut first = Vec::with_capacity(probes.len());
        for probes in &probes {
            first.push(width);
            width += probes.len();
        }
        let judgements = 2 * width * sources.len();
        if judgements > MAX_PROBES {
            let (sources, destinations) = (sources.len(), destinations.len());
            return Err(MatrixError::TooLarge { sources, destinations, probes: judgements });
        }

        let mut row = vec![None; pods.len()];
        let answers: Vec<Vec<Option<Answer>>> = sources
            .iter()
            .enumerate()
            .map(|(number, source)| {
                row[*source] = Some(number);
                let to = |destination: &usize| {
                    let (source, destination, probes) = (&pods[*source], &pods[*destination], &probes[*destination]);
                    let classifier = &classifier;
                    probes.iter().map(move |probe| ask(classifier, source.side(), destination.side(), *probe))
                };
                destinations.iter().flat_map(to).collect()
            })
            .collect();
        let places = Places::new(loaded);
        let rules: BTreeSet<RuleId> =
            answers.iter().flatten().flatten().flat_map(|answer| [answer.egress.rule, answer.ingress.rule]).collect();
        let authorities = rules.into_iter().map(|rule| (rule, places.authority(&classifier.describe(rule)))).collect();
        let ports = question.ports.clone();
        Ok(Self { pods, sources, destinations, ports, probes, first, answers, row, authorities })
    }

    /// What a destination is asked.
    pub fn probes(&self, destination: usize) -> &[Probe] {
        &self.probes[destination]
    }

    /// The answers of a pair, one for each of the destination's probes; `None` where the source has no address of that family. Of a pod and
    /// itself: as if another had its labels and address.
    ///
    /// # Panics
    /// Where `source` is none.
    pub fn answers(&self, source: usize, destination: usize) -> &[Option<Answer>] {
        let row = self.row[source].expect("a source");
        &self.answers[row][self.first[destination]..][..self.probes[destination].len()]
    }

    /// What decided.
    ///
    /// # Panics
    /// Where the judgement is of another matrix.
    pub fn authority(&self, judgement: &Judgement) -> &Authority {
        &self.authorities[&judgement.rule]
    }

    /// All probes of a pair together.
    ///
    /// # Panics
    /// As [`Self::answers`].
    pub fn cell(&self, source: usize, destination: usize) -> Cell {
        if source == destination {
            return Cell::Itself;
        }
        let (mut ways, mut allowed, mut egress, mut ingress) = (0, 0, false, false);
        for answer in self.answers(source, destination).iter().flatten() {
            ways += 1;
            allowed += usize::from(answer.verdict() == Verdict::Allowed);
            egress |= !answer.egress.allow;
            ingress |= !answer.ingress.allow;
        }
        match (egress, ingress) {
            _ if ways == 0 => Cell::NoWay,
            _ if allowed == ways => Cell::Allowed,
            _ if allowed > 0 => Cell::Some,
            (true, true) => Cell::Denied(Verdict::DeniedByBoth),
            (true, false) => Cell::Denied(Verdict::DeniedByEgress),
            (false, _) => Cell::Denied(Verdict::DeniedByIngress),
        }
    }

    /// A probe's name within its destination: the family only where the destination has both.
    pub fn probe_name(&self, destination: usize, probe: Probe) -> String {
        let pod = &self.pods[destination];
        match (pod.v4, pod.v6) {
            (Some(_), Some(_)) => format!("{} over IPv{}", probe.port, probe.version),
            _ => probe.port.to_string(),
        }
    }

    /// Which ports were asked about, in words.
    pub fn ports_in_words(&self) -> String {
        if self.ports.is_empty() {
            return format!("on the ports that each destination publishes ({ASSUMED_PORT} where it publishes none)");
        }
        let names: Vec<String> = self.ports.iter().map(Port::to_string).collect();
        format!("on {}", names.join(", "))
    }

    /// The whole as JSON: `pods`, and `flows`, one for each pair and probe, a line each.
    ///
    /// # Errors
    /// Where writing fails.
    pub fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{{\n\"pods\": [")?;
        for (number, pod) in self.pods.iter().enumerate() {
            let addresses = [pod.v4.map(IpAddr::from), pod.v6.map(IpAddr::from)];
            let addresses: Vec<IpAddr> = addresses.into_iter().flatten().collect();
            let ports: BTreeSet<Port> = self.probes[number].iter().map(|probe| probe.port).collect();
            let ports: Vec<String> = ports.iter().map(Port::to_string).collect();
            let line = json!({"name": pod.name, "node": pod.node, "addresses": addresses, "ports": ports});
            writeln!(out, "{line}{}", if number + 1 < self.pods.len() { "," } else { "" })?;
        }
        write!(out, "],\n\"flows\": [")?;
        let mut separator = "\n";
        for source in &self.sources {
            for destination in &self.destinations {
                for (probe, answer) in self.probes(*destination).iter().zip(self.answers(*source, *destination)) {
                    let Some(answer) = answer else { continue };
                    write!(out, "{separator}{}", self.flow_json(*source, *destination, *probe, answer))?;
                    separator = ",\n";
                }
            }
        }
        writeln!(out, "\n]\n}}")
    }

    fn flow_json(&self, source: usize, destination: usize, probe: Probe, answer: &Answer) -> Value {
        let judged = |judgement: &Judgement| {
            let Authority { name, at } = self.authority(judgement);
            json!({"verdict": if judgement.allow { "allow" } else { "deny" }, "by": name, "at": at})
        };
        // A pod reaches itself, whatever policies say.
        let is_itself = source == destination;
        json!({
            "from": self.pods[source].name,
            "to": self.pods[destination].name,
            "port": probe.port.to_string(),
            "family": probe.version,
            "verdict": if is_itself { Verdict::Allowed } else { answer.verdict() }.name(),
            "egress": if is_itself { Value::Null } else { judged(&answer.egress) },
            "ingress": if is_itself { Value::Null } else { judged(&answer.ingress) },
        })
    }
}

/// The same policy, with a program for every workload of the cluster.
pub(crate) fn with_all_local(model: &Model) -> Model {
    let mut model = model.clone();
    for endpoint in &mut model.endpoints {
        if endpoint.kind == EndpointKind::Workload && !endpoint.local {
            Arc::make_mut(endpoint).local = true;
        }
    }
    model
}

pub(crate) fn ports_of(
    name: &str,
    published: &BTreeMap<String, BTreeSet<(Protocol, u16)>>,
    asked: &[Port],
) -> Vec<Port> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let published = published.get(name).into_iter().flatten();
    let mut ports: Vec<Port> =
        published.map(|(protocol, number)| Port { protocol: *protocol, number: *number }).collect();
    if ports.is_empty() {
        ports.push(ASSUMED_PORT);
    }
    ports
}

/// What a destination is asked that has, or has not, addresses of IPv4 and of IPv6.
pub(crate) fn probes_of([v4, v6]: [bool; 2], ports: &[Port]) -> Vec<Probe> {
    let versions = [v4.then_some(4), v6.then_some(6)];
    ports
        .iter()
        .flat_map(|port| versions.iter().flatten().map(|version| Probe { port: *port, version: *version }))
        .collect()
}

/// A workload's first addresses of each family.
pub(crate) fn first_addresses(workload: &Workload) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let v4 = workload.addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
    let v6 = workload.addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
    (v4, v6)
}

/// What lets through where there is no policy: there is no such rule.
pub(crate) const NO_RULE: RuleId = RuleId(u32::MAX);

/// An end of a connection, as a classifier has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side {
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
    /// `None`: it has no policy, as it is no workload.
    pub(crate) endpoint: Option<EndpointId>,
}

/// What both ends say; `None` where they have no address of the family.
pub(crate) fn ask(classifier: &Classifier, source: Side, destination: Side, probe: Probe) -> Option<Answer> {
    let ends = [source.endpoint, destination.endpoint];
    let (protocol, ports) = probe.on_the_wire();
    Some(match probe.version {
        4 => judge(classifier, ends, &FlowKey { src: source.v4?, dst: destination.v4?, ports, protocol }),
        _ => judge(classifier, ends, &FlowKey { src: source.v6?, dst: destination.v6?, ports, protocol }),
    })
}

fn judge<A: Address>(
    classifier: &Classifier,
    [source, destination]: [Option<EndpointId>; 2],
    key: &FlowKey<A>,
) -> Answer {
    let free = Judgement { allow: true, rule: NO_RULE };
    let of =
        |end: Option<EndpointId>, direction| end.map_or(free, |endpoint| classifier.judge(endpoint, direction, key));
    Answer { egress: of(source, PolicyDirection::Egress), ingress: of(destination, PolicyDirection::Ingress) }
}
