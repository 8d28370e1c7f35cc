//! The cost of the service table: a decision, and compilation, at 10 to 50,000 services with ten endpoints each. Destinations and ports are visited in an order that no prefetcher follows.

use std::{hint::black_box, net::Ipv4Addr, sync::Arc, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_nat::{Affinity, Attempt, Endpoint, Model, ServicePort, ServiceTable, SnatPorts};
use weir_packet::{FlowKey, Ports, Protocol, Tick};

const ENDPOINTS_PER_SERVICE: u32 = 10;
const NODE_PORTS: u32 = 2768;

fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0000 + 1 + service)
}

fn model(services: u32) -> Model {
    let endpoint = |number: u32| Endpoint {
        address: Ipv4Addr::from_bits(0x0a00_0000 + number).into(),
        port: 8080,
        ready: true,
        serving: true,
        terminating: false,
        topology: Some(Arc::new(weir_nat::Topology::on(format!("node-{}", number % 100)))),
    };
    let service = |number: u32| ServicePort {
        name: format!("namespace-{}/service-{number}:http", number % 50),
        protocol: Protocol::TCP,
        port: 80,
        cluster_ips: vec![cluster_ip(number).into()],
        // There are no more node ports than these.
        node_port: (number.is_multiple_of(4) && number < 4 * NODE_PORTS).then_some(30000 + (number / 4) as u16),
        endpoints: (0..ENDPOINTS_PER_SERVICE).map(|i| endpoint(number * ENDPOINTS_PER_SERVICE + i)).collect(),
        origin: number,
        ..ServicePort::default()
    };
    Model {
        node_name: "node-1".into(),
        pod_cidrs: vec!["10.0.0.0/11".parse().expect("a prefix")],
        local_addresses: (1..=4).map(|last| Ipv4Addr::new(192, 168, 0, last).into()).collect(),
        service_cidrs: vec!["10.96.0.0/12".parse().expect("a prefix")],
        services: (0..services).map(service).map(Arc::new).collect(),
        ..Model::default()
    }
}

/// 4096 keys towards `destination(random)`.
fn keys(mut destination: impl FnMut(u32) -> (Ipv4Addr, u16)) -> Vec<FlowKey<Ipv4Addr>> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    (0..4096)
        .map(|_| {
            let (dst, port) = destination(random.next_u32());
            let ports = Ports::new(random.next_u32() as u16 | 1024, port);
            FlowKey { src: Ipv4Addr::new(10, 9, 9, 9), dst, ports, protocol: Protocol::TCP }
        })
        .collect()
}

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    group.throughput(Throughput::Elements(1));
    let affinity = Affinity::new(1, [0; 2]);
    for services in [10, 1000, 10_000, 50_000] {
        let table = ServiceTable::compile(&model(services)).expect("the model compiles");
        println!("{services} services: {} bytes", table.memory_bytes());
        let node_ports = services.div_ceil(4).min(NODE_PORTS);
        for (name, keys) in [
            ("cluster_ip", keys(|random| (cluster_ip(random % services), 80))),
            ("node_port", keys(|random| (Ipv4Addr::new(192, 168, 0, 1), 30000 + (random % node_ports) as u16))),
            ("miss", keys(|random| (Ipv4Addr::from_bits(0x0a00_0000 + random % 1_000_000), 8080))),
            ("unpublished", keys(|random| (cluster_ip(random % services), 81))),
        ] {
            let table = table.services::<Ipv4Addr>();
            let mut state = 1_u64;
            let mut random = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            let mut turn = keys.iter().cycle();
            group.bench_function(BenchmarkId::new(name, services), |bencher| {
                bencher.iter(|| {
                    let key = turn.next().expect("keys never end");
                    black_box(table.decide(black_box(key), affinity.clients(), Tick(0), &mut random));
                });
            });
        }
    }
}

fn compile(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compile");
    group.sample_size(20).measurement_time(Duration::from_secs(4));
    for services in [10, 1000, 10_000, 50_000] {
        let model = model(services);
        group.throughput(Throughput::Elements(u64::from(services)));
        group.bench_function(BenchmarkId::from_parameter(services), |bencher| {
            bencher.iter(|| ServiceTable::compile(black_box(&model)).expect("the model compiles"));
        });
    }
}

fn snat(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snat");
    for taken_percent in [0_u64, 50, 90] {
        let ports = SnatPorts::new(10000..=29999, 20000..=20099).expect("ports are left");
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let taken: Vec<bool> = (0..=u16::MAX).map(|_| random.next_u64() % 100 < taken_percent).collect();
        let mut random = || random.next_u64();
        group.bench_function(BenchmarkId::new("percent_taken", taken_percent), |bencher| {
            bencher.iter(|| {
                ports.allocate(None, &mut random, |port| {
                    if taken[usize::from(port)] { Attempt::<(), ()>::Taken } else { Attempt::Free(()) }
                })
            });
        });
    }
}

criterion_group!(services, decide, compile, snat);
criterion_main!(services);
