//! The pairs of workloads whose verdict is another.
//!
//! # Theory
//! A cluster of 50,000 pods has 2.5 billion pairs. But a verdict depends on four numbers only: which program judges the source's egress, which the
//! destination's ingress, and which class each address is of ([`Classifier::address_class`]). So workloads are put into classes by
//! these, before and after, and one pair of each two classes is asked. One compiler makes both classifiers, and what a
//! change does not reach keeps its number there, so two classes of which neither has another number than before are not asked at all.
//!
//! Beyond the workloads there are networks that rules name, each an address of it that no workload has, and an address that nobody names. They
//! have no policy of their own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use weir_packet::Address;
use weir_policy::{
    Classifier, CompileError, Compiler, EndpointId, Judgement, PolicyDirection, RuleId,
    model::{EndpointKind, Model, Peer, Policy, PortMatch, Rule},
};

use crate::{
    policy::{
        matrix::{self, Answer, Pods, Port, Probe, Side, Verdict},
        places::{Authority, Places},
    },
    translate::Loaded,
};

/// The most questions: what some ten seconds allow.
pub const MAX_QUESTIONS: usize = 1 << 26;
/// Ports of rules that destinations outside are asked at.
const MAX_PORTS: usize = 32;

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// On these ports; none: on those that each destination publishes, and outside on those that changed rules name.
    pub ports: Vec<Port>,
    /// Pairs with one of these at an end; none: all.
    pub only: Vec<Pods>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A policy is too large.
    #[error("policy, with all pods of the cluster taken for this node's: {0}")]
    Compile(#[from] CompileError),
    /// There are too many pairs of classes.
    #[error(
        "the change reaches {changed} of {all} kinds of pods, which are {questions} questions, and there are {MAX_QUESTIONS} at most; ask \
         about a part of the cluster with --namespace"
    )]
    TooLarge {
        /// Kinds of sources and destinations that it reaches.
        changed: usize,
        /// All kinds.
        all: usize,
        /// Questions.
        questions: usize,
    },
}

/// What two loads say otherwise about connections.
#[derive(Clone, Debug, Default)]
pub struct PolicyDiff {
    /// What changes, what reaches most pairs first.
    pub changes: Vec<Change>,
    /// Pairs in all, each once.
    pub pairs: usize,
    /// Workloads that there are after the change only.
    pub added: Vec<String>,
    /// Workloads that there are before only.
    pub removed: Vec<String>,
}

/// One change, of the pairs of some sources with some destinations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Names of the sources.
    pub from: Vec<String>,
    /// Names of the destinations.
    pub to: Vec<String>,
    /// On which ports.
    pub ports: Vec<Port>,
    /// Pairs, without those of a workload and itself.
    pub pairs: usize,
    /// What is said before.
    pub before: Said,
    /// What is said after.
    pub after: Said,
}

/// A verdict and what it comes from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Said {
    /// The verdict of both ends.
    pub verdict: Verdict,
    /// What decided at the source; `None`: it is outside, or lets through as before.
    pub egress: Option<Authority>,
    /// What decided at the destination; `None`: it is outside, or lets through as before.
    pub ingress: Option<Authority>,
}

/// A workload or a network, before and after.
#[derive(Clone, Debug)]
struct End {
    name: String,
    sides: [Side; 2],
    probes: Vec<Probe>,
    is_asked: bool,
}

/// What its verdicts depend on, in a family, on one side: a program and a class.
type Standing = Option<(usize, u32)>;
/// By family, by side.
type Key = [[Standing; 2]; 2];

/// Ends that fare alike.
struct Class {
    members: Vec<usize>,
    is_changed: bool,
}

/// Compares who reaches whom.
///
/// # Errors
/// Where a policy cannot be compiled, or there is too much to ask.
pub fn policy(before: &Loaded, after: &Loaded, question: &Question) -> Result<PolicyDiff, DiffError> {
    let mut compiler = Compiler::default();
    let models = [before, after].map(|loaded| matrix::with_all_local(&loaded.policy));
    let classifiers = [compiler.compile(&models[0])?, compiler.compile(&models[1])?];
    let classifiers = [&classifiers[0], &classifiers[1]];
    let mut diff = PolicyDiff::default();
    let mut ends = workloads([before, after], classifiers, question, &mut diff);
    ends.extend(outside(&models, question));

    let (sources, destinations) =
        (classes(&ends, classifiers, PolicyDirection::Egress), classes(&ends, classifiers, PolicyDirection::Ingress));
    let changed = |classes: &[Class]| classes.iter().filter(|class| class.is_changed).count();
    let (changed_sources, changed_destinations) = (changed(&sources), changed(&destinations));
    let unchanged = destinations.len() - changed_destinations;
    let pairs = sources.len() * changed_destinations + changed_sources * unchanged;
    let most_probes = ends.iter().map(|end| end.probes.len()).max().unwrap_or(0).max(1);
    if pairs.saturating_mul(most_probes) > MAX_QUESTIONS {
        return Err(DiffError::TooLarge {
            changed: changed_sources + changed_destinations,
            all: sources.len() + destinations.len(),
            questions: pairs.saturating_mul(most_probes),
        });
    }
    let places = [Places::new(before), Places::new(after)];
    let mut found = Found { classifiers, places, authorities: Default::default(), by_cause: BTreeMap::new() };
    let mut in_any = BTreeSet::new();
    for (from, source) in sources.iter().enumerate() {
        for (to, destination) in destinations.iter().enumerate() {
            if !source.is_changed && !destination.is_changed {
                continue;
            }
            let Some((s, d)) = representatives(source, destination) else { continue };
            let (s, d) = (&ends[s], &ends[d]);
            if s.sides[0].endpoint.is_none() && d.sides[0].endpoint.is_none() || !(s.is_asked || d.is_asked) {
                continue;
            }
            for probe in &d.probes {
                let answers = [0, 1].map(|side| matrix::ask(classifiers[side], s.sides[side], d.sides[side], *probe));
                let [Some(was), Some(is)] = answers else { continue };
                if (was.verdict() == Verdict::Allowed) != (is.verdict() == Verdict::Allowed) {
                    found.add(from, to, probe.port, [was, is]);
                    in_any.insert((from, to));
                }
            }
        }
    }
    diff.pairs = in_any.iter().map(|(from, to)| count_pairs(&sources[*from], &destinations[*to])).sum();
    diff.changes = found.changes(&ends, &sources, &destinations);
    Ok(diff)
}

/// The workloads that are there on both sides; the others are put into `diff`.
fn workloads(
    loaded: [&Loaded; 2],
    classifiers: [&Classifier; 2],
    question: &Question,
    diff: &mut PolicyDiff,
) -> Vec<End> {
    let sides = [0, 1].map(|side| {
        let (classifier, loaded): (&Classifier, &Loaded) = (classifiers[side], loaded[side]);
        let all = loaded.cluster.workloads.iter().filter_map(|workload| {
            let (v4, v6) = matrix::first_addresses(workload);
            let endpoint = Some(classifier.endpoint(&workload.name)?);
            Some((workload.name.as_str(), Side { v4, v6, endpoint }))
        });
        all.collect::<BTreeMap<&str, Side>>()
    });
    let names = |side: usize, other: usize| {
        let missing = sides[side].keys().filter(|name| !sides[other].contains_key(*name));
        missing.map(|name| (*name).to_owned()).collect::<Vec<_>>()
    };
    (diff.removed, diff.added) = (names(0, 1), names(1, 0));
    let published = [loaded[0].published_ports(), loaded[1].published_ports()];
    let both = sides[0].iter().filter_map(|(name, before)| Some((name, *before, *sides[1].get(name)?)));
    both.map(|(name, before, after)| {
        let ports: BTreeSet<Port> =
            published.iter().flat_map(|published| matrix::ports_of(name, published, &question.ports)).collect();
        let is_asked = question.only.is_empty() || question.only.iter().any(|pods| pods.has_name(name));
        let probes = probes(&ports, [before, after]);
        End { name: (*name).to_owned(), sides: [before, after], probes, is_asked }
    })
    .collect()
}

fn probes(ports: &BTreeSet<Port>, sides: [Side; 2]) -> Vec<Probe> {
    let versions = [sides.iter().any(|side| side.v4.is_some()), sides.iter().any(|side| side.v6.is_some())];
    matrix::probes_of(versions, &ports.iter().copied().collect::<Vec<_>>())
}

/// The networks that rules name and sets have, and what nobody names.
fn outside(models: &[Model; 2], question: &Question) -> Vec<End> {
    let mut nets: BTreeSet<IpNet> = BTreeSet::new();
    for model in models {
        let rules = model.tiers.iter().flat_map(|tier| &tier.policies).flat_map(|policy| rules_of(policy));
        let of_profiles = model.profiles.iter().flat_map(|profile| {
            [PolicyDirection::Ingress, PolicyDirection::Egress]
                .into_iter()
                .flat_map(|direction| profile.rules(direction))
        });
        for entity in rules.chain(of_profiles).flat_map(|rule| [&rule.source, &rule.destination]) {
            nets.extend(entity.nets.iter().flatten().chain(&entity.not_nets));
            for peer in &entity.any_of {
                if let Peer::Block { cidr, except } = peer {
                    nets.extend(std::iter::once(cidr).chain(except));
                }
            }
        }
        let sets = model.endpoints.iter().filter(|endpoint| endpoint.kind == EndpointKind::NetworkSet);
        nets.extend(sets.flat_map(|set| &set.nets).map(IpNet::trunc));
    }
    let workloads: BTreeSet<IpAddr> = models
        .iter()
        .flat_map(|model| &model.endpoints)
        .filter(|endpoint| endpoint.kind != EndpointKind::NetworkSet)
        .flat_map(|endpoint| &endpoint.nets)
        .map(IpNet::addr)
        .collect();
    let ports = outside_ports(models, question);
    let end = |name: String, address: IpAddr| {
        let (v4, v6) = match address {
            IpAddr::V4(address) => (Some(address), None),
            IpAddr::V6(address) => (None, Some(address)),
        };
        let side = Side { v4, v6, endpoint: None };
        End { name, sides: [side; 2], probes: probes(&ports, [side; 2]), is_asked: question.only.is_empty() }
    };
    let mut ends: Vec<End> = Vec::new();
    for net in &nets {
        // One that no narrower network has, where there is one among those that are easily found.
        let within =
            |address: &IpAddr| nets.iter().any(|other| other != net && net.contains(other) && other.contains(address));
        let near = |address: IpAddr, step: u128| match address {
            IpAddr::V4(address) => IpAddr::from(Ipv4Addr::from(u32::from(address).wrapping_add(step as u32))),
            IpAddr::V6(address) => IpAddr::from(Ipv6Addr::from(u128::from(address).wrapping_add(step))),
        };
        let (first, last) = (net.network(), net.broadcast());
        let candidates = (0..64).flat_map(|step: u128| [near(first, step), near(last, step.wrapping_neg())]);
        let mut free = candidates.filter(|address| net.contains(address) && !workloads.contains(address));
        let chosen = free.clone().find(|address| !within(address)).or_else(|| free.next());
        ends.extend(chosen.map(|address| end(net.to_string(), address)));
    }
    // Of the blocks for documentation (RFC 5737, RFC 3849), and if somebody has named those, of any.
    let unnamed_v4 =
        [(203, 113), (198, 100), (192, 2)].map(|(a, c)| Ipv4Addr::new(a, if a == 198 { 51 } else { 0 }, c, 7));
    let unnamed_v4 = unnamed_v4.into_iter().chain((1..=223).map(|first| Ipv4Addr::new(first, 77, 77, 77)));
    let unnamed_v6 = (0..64).map(|block| Ipv6Addr::new(0x2001, 0xdb8, block, 0, 0, 0, 0, 7));
    let is_unnamed = |address: &IpAddr| {
        !nets.iter().any(|net| net.prefix_len() > 0 && net.contains(address)) && !workloads.contains(address)
    };
    ends.extend(unnamed_v4.map(IpAddr::from).find(is_unnamed).map(|address| end(OUTSIDE_V4.to_owned(), address)));
    ends.extend(unnamed_v6.map(IpAddr::from).find(is_unnamed).map(|address| end(OUTSIDE_V6.to_owned(), address)));
    ends
}

/// What nobody names.
const OUTSIDE_V4: &str = "anywhere else (IPv4)";
const OUTSIDE_V6: &str = "anywhere else (IPv6)";

fn rules_of(policy: &Policy) -> impl Iterator<Item = &Rule> {
    policy.ingress.iter().chain(&policy.egress).flatten()
}

/// The ports that rules name of policies that are not on both sides the same.
fn outside_ports(models: &[Model; 2], question: &Question) -> BTreeSet<Port> {
    if !question.ports.is_empty() {
        return question.ports.iter().copied().collect();
    }
    let policies = models.each_ref().map(|model| {
        let all = model.tiers.iter().flat_map(|tier| &tier.policies);
        all.map(|policy| (policy.name.as_str(), policy)).collect::<BTreeMap<_, _>>()
    });
    let differs = |(name, policy): &(&&str, &&std::sync::Arc<Policy>), other: usize| {
        policies[other].get(**name).is_none_or(|other| ***other != ****policy)
    };
    let changed = [(0, 1), (1, 0)].into_iter().flat_map(|(side, other)| {
        policies[side].iter().filter(move |entry| differs(entry, other)).map(|(_, policy)| *policy)
    });
    let mut ports = BTreeSet::from([matrix::ASSUMED_PORT]);
    for rule in changed.flat_map(|policy| policy.egress.iter().flatten()) {
        for port in rule.destination.ports.iter().flatten().chain(&rule.destination.not_ports) {
            if let PortMatch::Range(first, _) = port
                && *first > 0
                && ports.len() < MAX_PORTS
            {
                let protocol = rule.protocol.filter(|protocol| protocol.has_ports());
                ports.insert(Port { protocol: protocol.unwrap_or(matrix::ASSUMED_PORT.protocol), number: *first });
            }
        }
    }
    ports
}

/// Ends by what their verdicts depend on in a direction.
fn classes(ends: &[End], classifiers: [&Classifier; 2], direction: PolicyDirection) -> Vec<Class> {
    fn standing<A: Address>(
        classifier: &Classifier,
        endpoint: Option<EndpointId>,
        address: Option<A>,
        direction: PolicyDirection,
    ) -> Standing {
        let program = endpoint.map_or(0, |endpoint| classifier.program_number::<A>(endpoint, direction));
        address.map(|address| (program, classifier.address_class(address)))
    }
    let mut numbers: HashMap<(Key, &[Probe], bool), usize> = HashMap::new();
    let mut classes: Vec<Class> = Vec::new();
    for (number, end) in ends.iter().enumerate() {
        let by_side = [0, 1].map(|side| {
            let Side { v4, v6, endpoint } = end.sides[side];
            let classifier = classifiers[side];
            [standing(classifier, endpoint, v4, direction), standing(classifier, endpoint, v6, direction)]
        });
        let probes: &[Probe] = if direction == PolicyDirection::Ingress { &end.probes } else { &[] };
        let class = *numbers.entry((by_side, probes, end.is_asked)).or_insert_with(|| {
            classes.push(Class { members: Vec::new(), is_changed: by_side[0] != by_side[1] });
            classes.len() - 1
        });
        classes[class].members.push(number);
    }
    classes
}

/// A source and a destination that are not one.
fn representatives(source: &Class, destination: &Class) -> Option<(usize, usize)> {
    let (s, d) = (source.members[0], destination.members[0]);
    if s != d {
        return Some((s, d));
    }
    let other = |members: &[usize]| members.get(1).copied();
    other(&destination.members).map(|d| (s, d)).or_else(|| other(&source.members).map(|s| (s, d)))
}

/// Both are ascending.
fn count_pairs(source: &Class, destination: &Class) -> usize {
    let in_both = source.members.iter().filter(|end| destination.members.binary_search(end).is_ok()).count();
    source.members.len() * destination.members.len() - in_both
}

/// Which classes of sources and destinations have a change.
type Pairs = BTreeMap<usize, BTreeSet<usize>>;

/// What was found, by what is said before and after, and the ports.
struct Found<'l> {
    classifiers: [&'l Classifier; 2],
    places: [Places<'l>; 2],
    authorities: [HashMap<RuleId, Authority>; 2],
    /// Destinations with their sources.
    by_cause: BTreeMap<(Said, Said), BTreeMap<Port, Pairs>>,
}

impl Found<'_> {
    fn add(&mut self, from: usize, to: usize, port: Port, answers: [Answer; 2]) {
        let [mut before, mut after] = [0, 1].map(|side| {
            let Answer { egress, ingress } = answers[side];
            let mut by = |judgement: Judgement| {
                let known = self.authorities[side].entry(judgement.rule);
                let (classifier, places) = (self.classifiers[side], &self.places[side]);
                let by = known.or_insert_with(|| places.authority(&classifier.describe(judgement.rule)));
                by.clone()
            };
            let mut of = |judgement: Judgement| (judgement.rule != matrix::NO_RULE).then(|| by(judgement));
            Said { verdict: answers[side].verdict(), egress: of(egress), ingress: of(ingress) }
        });
        // An end that lets through as before has no part in it, and would only tell apart what fares alike.
        let [was, is] = answers;
        if was.egress.allow && is.egress.allow && before.egress == after.egress {
            (before.egress, after.egress) = (None, None);
        }
        if was.ingress.allow && is.ingress.allow && before.ingress == after.ingress {
            (before.ingress, after.ingress) = (None, None);
        }
        let by_port = self.by_cause.entry((before, after)).or_default();
        by_port.entry(port).or_default().entry(to).or_default().insert(from);
    }

    /// Put together: ports with the same pairs, destinations with the same sources.
    fn changes(self, ends: &[End], sources: &[Class], destinations: &[Class]) -> Vec<Change> {
        let mut changes = Vec::new();
        for ((before, after), by_port) in self.by_cause {
            let mut by_pairs: BTreeMap<Pairs, Vec<Port>> = BTreeMap::new();
            for (port, pairs) in by_port {
                by_pairs.entry(pairs).or_default().push(port);
            }
            for (pairs, ports) in by_pairs {
                let mut by_sources: BTreeMap<BTreeSet<usize>, Vec<usize>> = BTreeMap::new();
                for (to, from) in pairs {
                    by_sources.entry(from).or_default().push(to);
                }
                for (from, to) in by_sources {
                    let count = from.iter().flat_map(|from| to.iter().map(move |to| (from, to)));
                    let pairs = count.map(|(from, to)| count_pairs(&sources[*from], &destinations[*to])).sum();
                    let names = |classes: &mut dyn Iterator<Item = &Class>| {
                        let mut names: Vec<String> =
                            classes.flat_map(|class| &class.members).map(|end| ends[*end].name.clone()).collect();
                        names.sort();
                        names
                    };
                    changes.push(Change {
                        from: names(&mut from.iter().map(|class| &sources[*class])),
                        to: names(&mut to.iter().map(|class| &destinations[*class])),
                        ports: ports.clone(),
                        pairs,
                        before: before.clone(),
                        after: after.clone(),
                    });
                }
            }
        }
        changes.sort_by(|a, b| b.pairs.cmp(&a.pairs).then_with(|| (&a.to, &a.from).cmp(&(&b.to, &b.from))));
        changes
    }
}
