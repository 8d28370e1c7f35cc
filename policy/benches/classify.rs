//! Verdicts at 10 to 100,000 rules, beside a linear scan of the same rules, and compilation.
//!
//! The rules are those of one pod's ingress, all to allow: a fifth of them CIDRs, the others pods by label (ten of
//! each label), each to a port out of 50. Packets come from pods and CIDRs of the rules at random; half of them go to
//! a port that no rule of their source allows.

use std::{hint::black_box, net::Ipv4Addr, sync::Arc, time::Duration};

use criterion::{Criterion, criterion_group, criterion_main};
use ipnet::IpNet;
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

fn pod(number: u32, local: bool, app: &str) -> Arc<Endpoint> {
    Arc::new(Endpoint {
        name: format!("ns/pod{number}"),
        local,
        labels: [("app".to_owned(), app.to_owned())].into(),
        nets: vec![IpNet::new(Ipv4Addr::from(0x0a00_0000 + number).into(), 32).unwrap()],
        ..Endpoint::default()
    })
}

fn equals(app: &str) -> Selector {
    Selector::Equals("app".to_owned(), app.to_owned())
}

fn cidr(number: u32) -> IpNet {
    IpNet::new(Ipv4Addr::from(0xc000_0000 + (number << 8)).into(), 24).unwrap()
}

/// A pod with this many rules, and the pods that they name.
fn model(rules: u32) -> Model {
    let mut endpoints = vec![pod(0, true, "target")];
    let list = (0..rules)
        .map(|number| {
            let peer = if number.is_multiple_of(5) {
                Peer::Block { cidr: cidr(number), except: vec![] }
            } else {
                let app = format!("app{number}");
                endpoints.extend((0..10).map(|replica| pod(1 + 10 * number + replica, false, &app)));
                Peer::Selector(equals(&app))
            };
            let port = 8000 + (number % 50) as u16;
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

fn packets(rules: u32) -> Vec<FlowKey<Ipv4Addr>> {
    let mut numbers = Numbers(7);
    (0..4096)
        .map(|index| {
            let number = numbers.below(rules);
            let source = if number.is_multiple_of(5) {
                0xc000_0000 + (number << 8) + numbers.below(256)
            } else {
                0x0a00_0000 + 1 + 10 * number + numbers.below(10)
            };
            let port = 8000 + ((number + index % 2) % 50) as u16;
            FlowKey {
                src: Ipv4Addr::from(source),
                dst: Ipv4Addr::from(0x0a00_0000),
                ports: Ports::new(40000, port),
                protocol: Protocol::TCP,
            }
        })
        .collect()
}

/// The same rules as a list of what to compare, resolved beforehand.
fn linear(rules: u32) -> Vec<(u32, u32, u16)> {
    (0..rules)
        .map(|number| {
            let port = 8000 + (number % 50) as u16;
            if number.is_multiple_of(5) {
                (0xc000_0000 + (number << 8), 0xc000_00ff + (number << 8), port)
            } else {
                (0x0a00_0000 + 1 + 10 * number, 0x0a00_0000 + 10 + 10 * number, port)
            }
        })
        .collect()
}

fn scan(rules: &[(u32, u32, u16)], key: &FlowKey<Ipv4Addr>) -> Option<usize> {
    let (source, port) = (key.src.to_bits(), key.ports.destination());
    let tcp = key.protocol == Protocol::TCP;
    rules.iter().position(|(low, high, of_rule)| tcp && (*low..=*high).contains(&source) && *of_rule == port)
}

fn verdicts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("verdict");
    for rules in [10, 1_000, 10_000, 100_000] {
        let classifier = Classifier::compile(&model(rules)).expect("within the limits");
        let endpoint = classifier.endpoint("ns/pod0").expect("local");
        let (packets, list) = (packets(rules), linear(rules));
        for key in &packets {
            let judgement = classifier.judge(endpoint, PolicyDirection::Ingress, key);
            assert_eq!(judgement.allow, scan(&list, key).is_some(), "{key:?}");
        }
        println!("{rules} rules: {} KiB", classifier.memory_bytes() / 1024);
        let mut next = packets.iter().cycle();
        group.bench_function(format!("compiled/{rules}"), |bencher| {
            bencher.iter(|| {
                let key = next.next().expect("endless");
                black_box(classifier.judge(endpoint, PolicyDirection::Ingress, black_box(key)))
            });
        });
        group.bench_function(format!("linear/{rules}"), |bencher| {
            bencher.iter(|| black_box(scan(&list, black_box(next.next().expect("endless")))));
        });
    }
    group.finish();
}

/// 10,000 policies of five rules over 1,000 local pods of 100 applications, and 9,000 other pods.
fn large_model() -> Model {
    let mut numbers = Numbers(11);
    let endpoints = (0..10_000).map(|number| pod(number, number < 1_000, &format!("app{}", number % 100))).collect();
    let policies = (0..10_000)
        .map(|policy| {
            let rules = (0..5u32)
                .map(|number| {
                    let port = 8000 + numbers.below(50) as u16;
                    let peer = if number == 0 {
                        Peer::Block { cidr: cidr(numbers.below(10_000)), except: vec![] }
                    } else {
                        Peer::Selector(equals(&format!("app{}", numbers.below(100))))
                    };
                    Rule {
                        number,
                        protocol: Some(Protocol::TCP),
                        source: EntityMatch { any_of: vec![peer], ..EntityMatch::default() },
                        destination: EntityMatch {
                            ports: Some(vec![PortMatch::Range(port, port)]),
                            ..EntityMatch::default()
                        },
                        ..Rule::default()
                    }
                })
                .collect();
            let name = format!("p{policy}");
            Arc::new(Policy {
                selector: equals(&format!("app{}", policy % 100)),
                ingress: Some(rules),
                sort_name: name.clone(),
                name,
                ..Policy::default()
            })
        })
        .collect();
    Model { endpoints, tiers: vec![Tier { policies, ..Tier::default() }], ..Model::default() }
}

fn compilation(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compile");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(2));
    for rules in [1_000, 10_000, 100_000] {
        let model = model(rules);
        group.bench_function(format!("one pod/{rules} rules"), |bencher| {
            bencher.iter(|| Classifier::compile(black_box(&model)).expect("within the limits"));
        });
    }
    let model = large_model();
    let classifier = Classifier::compile(&model).expect("within the limits");
    println!("10,000 policies over 1,000 pods: {} KiB", classifier.memory_bytes() / 1024);
    group.bench_function("10,000 policies over 1,000 pods", |bencher| {
        bencher.iter(|| Classifier::compile(black_box(&model)).expect("within the limits"));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots().warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    targets = verdicts, compilation
}
criterion_main!(benches);
