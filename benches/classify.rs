//! Verdicts at 10 to 100,000 rules, beside a linear scan of the same rules.
//!
//! The rules are those of one pod's ingress, all to allow: a fifth of them CIDRs, the others pods by label (ten of
//! each label), each to a port out of 50. Packets come from pods and CIDRs of the rules at random; half of them go to
//! a port that their rule does not allow. The ten pods have neighbouring addresses, and so are one range, or
//! scattered ones; or each label is in thirty rules.

use std::{
    hint::black_box,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use weir_benches::figures::{Spread, tell};
use weir_packet::{FlowKey, Ports, Protocol};
use weir_policy::{Classifier, PolicyDirection, Selector, model::*};

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(limit)) as u32
    }
}

/// Whether pods of one label have neighbouring addresses.
#[derive(Clone, Copy)]
enum Pods {
    Blocks,
    Scattered,
}

impl Pods {
    fn address(self, number: u32) -> u32 {
        let place = match self {
            Self::Blocks => number,
            // Odd, so that all have different ones.
            Self::Scattered => number.wrapping_mul(0x9e37_79b1) % (1 << 24),
        };
        0x0a00_0000 + place
    }
}

fn pod(number: u32, address: u32, local: bool, app: &str) -> Arc<Endpoint> {
    Arc::new(Endpoint {
        name: format!("ns/pod{number}"),
        local,
        labels: [("app".to_owned(), app.to_owned())].into(),
        nets: vec![IpNet::new(Ipv4Addr::from(address).into(), 32).unwrap()],
        ..Endpoint::default()
    })
}

fn equals(app: &str) -> Selector {
    Selector::Equals("app".to_owned(), app.to_owned())
}

fn cidr(number: u32) -> IpNet {
    IpNet::new(Ipv4Addr::from(0xc000_0000 + (number << 8)).into(), 24).unwrap()
}

/// How many rules there are, and how many labels.
#[derive(Clone, Copy)]
struct Shape {
    rules: u32,
    labels: u32,
}

impl Shape {
    fn port(self, rule: u32) -> u16 {
        8000 + ((rule + rule / self.labels) % 50) as u16
    }

    /// The number of the first pod that a rule names.
    fn first_pod(self, rule: u32) -> u32 {
        1 + 10 * (rule % self.labels)
    }
}

/// A pod with such rules, and the pods that they name.
fn model(shape: Shape, pods: Pods) -> Model {
    let mut endpoints = vec![pod(0, pods.address(0), true, "target")];
    for label in 0..shape.labels {
        let numbers = shape.first_pod(label)..shape.first_pod(label) + 10;
        endpoints.extend(numbers.map(|number| pod(number, pods.address(number), false, &format!("app{label}"))));
    }
    let list = (0..shape.rules)
        .map(|number| {
            let peer = if number.is_multiple_of(5) {
                Peer::Block { cidr: cidr(number), except: vec![] }
            } else {
                Peer::Selector(equals(&format!("app{}", number % shape.labels)))
            };
            let port = shape.port(number);
            Rule {
                number,
                protocol: Some(Protocol::TCP),
                source: EntityMatch { any_of: vec![peer], ..EntityMatch::default() },
                destination: EntityMatch { ports: Some(vec![PortMatch::Range(port, port)]), ..EntityMatch::default() },
                ..Rule::default()
            }
        })
        .collect();
    let policy = Policy { selector: equals("target"), ingress: Some(list), ..Policy::default() };
    Model { endpoints, tiers: vec![Tier { policies: vec![Arc::new(policy)], ..Tier::default() }], ..Model::default() }
}

fn packets(shape: Shape, pods: Pods) -> Vec<FlowKey<Ipv4Addr>> {
    let mut numbers = Numbers(7);
    (0..4096)
        .map(|index| {
            let number = numbers.below(shape.rules);
            let source = if number.is_multiple_of(5) {
                0xc000_0000 + (number << 8) + numbers.below(256)
            } else {
                pods.address(shape.first_pod(number) + numbers.below(10))
            };
            let port = if index % 2 == 0 { shape.port(number) } else { 8000 + ((shape.port(number) - 7999) % 50) };
            FlowKey {
                src: Ipv4Addr::from(source),
                dst: Ipv4Addr::from(pods.address(0)),
                ports: Ports::new(40000, port),
                protocol: Protocol::TCP,
            }
        })
        .collect()
}

/// The same rules, pods in blocks, as a list of what to compare, resolved beforehand.
fn linear(shape: Shape) -> Vec<(u32, u32, u16)> {
    (0..shape.rules)
        .map(|number| {
            let port = shape.port(number);
            if number.is_multiple_of(5) {
                (0xc000_0000 + (number << 8), 0xc000_00ff + (number << 8), port)
            } else {
                let first = Pods::Blocks.address(shape.first_pod(number));
                (first, first + 9, port)
            }
        })
        .collect()
}

fn scan(rules: &[(u32, u32, u16)], key: &FlowKey<Ipv4Addr>) -> Option<usize> {
    let (source, port) = (key.src.to_bits(), key.ports.destination());
    let tcp = key.protocol == Protocol::TCP;
    rules.iter().position(|(low, high, of_rule)| tcp && (*low..=*high).contains(&source) && *of_rule == port)
}

/// Nanoseconds per call of `judge` over all packets, in many short passes: they are told, and their fastest and median come back. On a machine
/// with other work the fastest is the one that was not interrupted.
fn passes(
    row: &str,
    column: &str,
    packets: &[FlowKey<Ipv4Addr>],
    mut judge: impl FnMut(&FlowKey<Ipv4Addr>),
) -> (f64, f64) {
    let begin = Instant::now();
    let mut passes = Vec::new();
    while passes.len() < 20 || begin.elapsed() < Duration::from_secs(2) {
        let pass = Instant::now();
        packets.iter().for_each(|key| judge(black_box(key)));
        passes.push(pass.elapsed().as_nanos() as f64 / packets.len() as f64);
    }
    let spread = Spread::of(&mut passes);
    tell("policy", row, column, "ns", spread);
    (passes[0], spread.median)
}

fn main() {
    println!("ns per verdict, fastest (median) of passes over 4096 packets; compilation fastest of 5");
    for rules in [10, 100, 1_000, 10_000, 100_000] {
        let own = Shape { rules, labels: rules };
        let list = linear(own);
        let (fastest, median) = passes(&format!("{rules} rules"), "linear scan", &packets(own, Pods::Blocks), |key| {
            black_box(scan(&list, key));
        });
        println!("{rules:>7} rules: linear scan    {fastest:8.1} ({median:8.1})");
        compiled("pods in blocks", own, Pods::Blocks);
        compiled("pods scattered", own, Pods::Scattered);
        if rules >= 1_000 {
            compiled("in 30 rules each", Shape { rules, labels: rules / 30 }, Pods::Scattered);
        }
    }
}

/// Measures the compiled rules, and compares every verdict with a scan of them.
fn compiled(name: &str, shape: Shape, pods: Pods) {
    let model = model(shape, pods);
    let compile = || {
        let begin = Instant::now();
        let classifier = Classifier::compile(black_box(&model)).expect("within the limits");
        (begin.elapsed(), classifier)
    };
    let (mut compiled_in, classifier) = compile();
    for _ in 1..5 {
        compiled_in = compiled_in.min(compile().0);
    }
    let endpoint = classifier.endpoint("ns/pod0").expect("local");
    let (packets, list) = (packets(shape, pods), linear(shape));
    for (key, in_block) in packets.iter().zip(self::packets(shape, Pods::Blocks)) {
        let judgement = classifier.judge(endpoint, PolicyDirection::Ingress, key);
        assert_eq!(judgement.allow, scan(&list, &in_block).is_some(), "{key:?}");
    }
    let row = format!("{} rules", shape.rules);
    let (fastest, median) = passes(&row, &format!("weir, {name}"), &packets, |key| {
        black_box(classifier.judge(endpoint, PolicyDirection::Ingress, key));
    });
    let memory = classifier.memory_bytes() / 1024;
    println!("{:>14} {name:16} {fastest:8.1} ({median:8.1}), {memory:>6} KiB, compiled in {compiled_in:?}", "");
}
