//! Rule 26: ClientIP affinity, row by row, against a dull twin, and between threads.

mod common;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Barrier,
};

use common::*;
use proptest::{collection::vec, prelude::*};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_nat::{Affinity, Decision, Endpoint, Model, ServicePort, ServiceTable, TrafficPolicy};
use weir_packet::{FlowKey, Protocol, Tick};

const SECOND: u32 = 100;
const TIMEOUT_SECONDS: u32 = 10;

/// A node's clients and tables, and a random source that no pick repeats by chance: with it, a kept backend was remembered.
struct World<A: Carried> {
    table: ServiceTable,
    affinity: Affinity,
    now: Tick,
    turn: u64,
    family: std::marker::PhantomData<A>,
}

impl<A: Carried> World<A> {
    fn new(model: &Model) -> Self {
        Self {
            table: compile::<A>(model),
            affinity: Affinity::new(1000, [3, 4]),
            now: Tick(u32::MAX - 100),
            turn: 0,
            family: std::marker::PhantomData,
        }
    }

    fn reload(&mut self, model: &Model) {
        self.table = compile::<A>(model);
        self.affinity.forget_gone(&self.table);
    }

    /// The last octet of the backend that a connection goes to. Each pick is the next of the list.
    fn connect(&mut self, protocol: Protocol, src: &str, dst: (&str, u16)) -> u8 {
        let key = key::<A>(protocol, src, dst.0, dst.1);
        let clients = self.affinity.clients::<A>();
        let turn = &mut self.turn;
        let Decision::Translate { backend, choice, candidates, .. } =
            self.table.services::<A>().decide(&key, clients, self.now, &mut || {
                *turn += 1;
                (*turn % 4) << 62 | 1 << 61
            })
        else {
            panic!("{key:?} has no backend");
        };
        assert!(candidates.contains(&backend), "a remembered backend is one of those that may be picked");
        if let Some(choice) = choice {
            assert!(clients.remember(&choice, self.now), "nobody else chooses");
        }
        backend.address.to_bits128() as u8
    }

    fn wait(&mut self, ticks: u32) {
        self.now = Tick(self.now.0.wrapping_add(ticks));
    }
}

fn compile<A: Carried>(model: &Model) -> ServiceTable {
    ServiceTable::compile(&carried::<A>(model)).expect("the model compiles")
}

/// Four backends, the last two on this node: lists have them in this order.
fn four() -> Vec<Endpoint> {
    let node = |number: u8| if number > 2 { "node-a" } else { "node-b" };
    (1..=4).map(|number| on(node(number), &format!("10.1.0.{number}"))).collect()
}

fn sticky(endpoints: Vec<Endpoint>) -> Model {
    let mut model = world(endpoints);
    port(&mut model, 0).affinity = Some(TIMEOUT_SECONDS);
    model
}

/// Runs each generic function as a test of IPv4 and of IPv6.
macro_rules! in_both_families {
    ($($name:ident),+ $(,)?) => {
        mod ipv4 { $(#[test] fn $name() { super::$name::<std::net::Ipv4Addr>(); })+ }
        mod ipv6 { $(#[test] fn $name() { super::$name::<std::net::Ipv6Addr>(); })+ }
    };
}

in_both_families! {
    without_affinity_nothing_is_remembered,
    every_address_of_a_service_port_shares_it,
    other_sources_ports_and_services_do_not_share_it,
    each_connection_restarts_the_timeout,
    what_opens_nothing_is_not_remembered,
    a_backend_that_is_gone_is_forgotten,
    a_reload_that_keeps_the_backend_keeps_the_choice,
    local_policy_overrides_a_remote_choice,
    hairpin_is_decided_after_a_remembered_pick,
    the_first_to_be_forgotten_makes_room,
}

fn without_affinity_nothing_is_remembered<A: Carried>() {
    let mut world = World::<A>::new(&common::world(four()));
    let picks: Vec<u8> = (0..4).map(|_| world.connect(Protocol::TCP, OUTSIDE, (CLUSTER_IP, 80))).collect();
    assert_eq!(picks, [2, 3, 4, 1], "each is the next");
    assert_eq!(world.affinity.clients::<A>().count(world.now), 0);
}

fn every_address_of_a_service_port_shares_it<A: Carried>() {
    let mut world = World::<A>::new(&sticky(four()));
    let first = world.connect(Protocol::TCP, OUTSIDE, (CLUSTER_IP, 80));
    for dst in EXTERNALS {
        assert_eq!(world.connect(Protocol::TCP, OUTSIDE, dst), first, "{dst:?}");
    }
    assert_eq!(world.affinity.clients::<A>().count(world.now), 1);
}

fn other_sources_ports_and_services_do_not_share_it<A: Carried>() {
    let mut model = sticky(four());
    let web = model.services[0].clone();
    let same_numbers = |name: &str, protocol, port, cluster_ip: &str| ServicePort {
        name: name.into(),
        protocol,
        port,
        cluster_ips: ips(&[cluster_ip]),
        node_port: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ..ServicePort::clone(&web)
    };
    model.services.push(same_numbers("alpha/web:https", Protocol::TCP, 443, CLUSTER_IP).into());
    model.services.push(same_numbers("alpha/web:http", Protocol::UDP, 80, CLUSTER_IP).into());
    model.services.push(same_numbers("beta/web:http", Protocol::TCP, 80, "172.30.0.42").into());
    let mut world = World::<A>::new(&model);
    let mut picks = Vec::new();
    for (protocol, src, dst) in [
        (Protocol::TCP, OUTSIDE, (CLUSTER_IP, 80)),
        (Protocol::TCP, POD, (CLUSTER_IP, 80)),
        (Protocol::TCP, OUTSIDE, (CLUSTER_IP, 443)),
        (Protocol::UDP, OUTSIDE, (CLUSTER_IP, 80)),
        (Protocol::TCP, OUTSIDE, ("172.30.0.42", 80)),
    ] {
        let first = world.connect(protocol, src, dst);
        assert_eq!(world.connect(protocol, src, dst), first);
        picks.push(first);
    }
    assert_eq!(picks, [2, 3, 4, 1, 2], "each picked for itself");
}

fn each_connection_restarts_the_timeout<A: Carried>() {
    let mut world = World::<A>::new(&sticky(four()));
    let dst = (CLUSTER_IP, 80);
    let first = world.connect(Protocol::TCP, POD, dst);
    for _ in 0..3 {
        world.wait(TIMEOUT_SECONDS * SECOND - 1);
        assert_eq!(world.connect(Protocol::TCP, POD, dst), first, "a tick before it is over");
    }
    world.wait(TIMEOUT_SECONDS * SECOND);
    assert_ne!(world.connect(Protocol::TCP, POD, dst), first, "over");
}

/// A decision alone, whose packet turned out to open no connection.
fn what_opens_nothing_is_not_remembered<A: Carried>() {
    let mut world = World::<A>::new(&sticky(four()));
    let key = key::<A>(Protocol::TCP, POD, CLUSTER_IP, 80);
    let ask = |world: &World<A>, number: u64| match world.table.services::<A>().decide(
        &key,
        world.affinity.clients(),
        world.now,
        &mut || number << 62 | 1,
    ) {
        Decision::Translate { backend, .. } => backend.address.to_bits128() as u8,
        other => panic!("{other:?}"),
    };
    assert_eq!([ask(&world, 0), ask(&world, 1), ask(&world, 3)], [1, 2, 4]);
    let first = world.connect(Protocol::TCP, POD, (CLUSTER_IP, 80));
    world.wait(TIMEOUT_SECONDS * SECOND - 1);
    assert_eq!(ask(&world, 0), first);
    world.wait(1);
    assert_eq!([ask(&world, 0), ask(&world, 3)], [1, 4], "asking restarts nothing");
}

fn a_backend_that_is_gone_is_forgotten<A: Carried>() {
    let leave_out = |left_out: u8| -> Vec<Endpoint> {
        four().into_iter().filter(|one| one.address != ips(&[&format!("10.1.0.{left_out}")])[0]).collect()
    };
    let not_ready = |number: u8| {
        let mut all = four();
        all[usize::from(number) - 1] = unready(all[usize::from(number) - 1].clone());
        all
    };
    type Change = fn(&mut Model);
    let turned_off: Change = |model| port(model, 0).affinity = None;
    let deleted: Change = |model| model.services.clear();
    for (name, change) in [
        ("out of every slice", None),
        ("not ready", None),
        ("affinity turned off", Some(turned_off)),
        ("service deleted", Some(deleted)),
    ] {
        let mut world = World::<A>::new(&sticky(four()));
        let first = world.connect(Protocol::TCP, POD, (CLUSTER_IP, 80));
        let mut without = sticky(match name {
            "out of every slice" => leave_out(first),
            "not ready" => not_ready(first),
            _ => four(),
        });
        if let Some(change) = change {
            change(&mut without);
        }
        world.reload(&without);
        assert_eq!(world.affinity.clients::<A>().count(world.now), 0, "{name}");
        world.reload(&sticky(four()));
        assert_ne!(world.connect(Protocol::TCP, POD, (CLUSTER_IP, 80)), first, "{name}: it comes back as another");
    }
}

fn a_reload_that_keeps_the_backend_keeps_the_choice<A: Carried>() {
    let mut world = World::<A>::new(&sticky(four()));
    let first = world.connect(Protocol::TCP, POD, (CLUSTER_IP, 80));
    // Other services, other backends around it, another order, another cluster IP, another timeout: all indices change.
    let mut model = sticky(four().into_iter().rev().chain([on("", "10.1.0.0")]).collect());
    let other = ServicePort {
        name: "a/first".into(),
        cluster_ips: ips(&["172.30.0.1"]),
        ..ServicePort::clone(&model.services[0])
    };
    port(&mut model, 0).cluster_ips = ips(&["172.30.0.77"]);
    port(&mut model, 0).affinity = Some(TIMEOUT_SECONDS * 2);
    model
        .services
        .insert(0, ServicePort { node_port: None, external_ips: vec![], load_balancer_ips: vec![], ..other }.into());
    world.reload(&model);
    for dst in [("172.30.0.77", 80), EXTERNALS[0]] {
        assert_eq!(world.connect(Protocol::TCP, POD, dst), first);
    }
    world.wait(TIMEOUT_SECONDS * SECOND * 2 - 1);
    assert_eq!(world.connect(Protocol::TCP, POD, ("172.30.0.77", 80)), first, "the new timeout counts");
}

/// With externalTrafficPolicy Local, what a client had by the cluster IP may not be here.
fn local_policy_overrides_a_remote_choice<A: Carried>() {
    let model = policies(sticky(four()), TrafficPolicy::Cluster, TrafficPolicy::Local);
    let mut world = World::<A>::new(&model);
    assert_eq!(world.connect(Protocol::TCP, OUTSIDE, (CLUSTER_IP, 80)), 2);
    let here = world.connect(Protocol::TCP, OUTSIDE, (LOAD_BALANCER_IP, 80));
    assert!(here > 2, "{here} is not on this node");
    assert_eq!(world.connect(Protocol::TCP, OUTSIDE, (NODE, 3001)), here);
    assert_eq!(world.connect(Protocol::TCP, OUTSIDE, (CLUSTER_IP, 80)), here, "the last choice counts everywhere");
    // A pod is short-cut to the whole list, and so keeps its remote backend there.
    world.turn = 0;
    assert_eq!(world.connect(Protocol::TCP, POD, (CLUSTER_IP, 80)), 2);
    assert_eq!(world.connect(Protocol::TCP, POD, (LOAD_BALANCER_IP, 80)), 2);
}

fn hairpin_is_decided_after_a_remembered_pick<A: Carried>() {
    let table = compile::<A>(&sticky(four()));
    let affinity = Affinity::new(10, [1, 2]);
    let key = key::<A>(Protocol::TCP, "10.1.0.2", CLUSTER_IP, 80);
    for number in [1_u64 << 62 | 1, 3 << 62 | 1] {
        let decision = table.services::<A>().decide(&key, affinity.clients(), Tick(7), &mut || number);
        let Decision::Translate { backend, masquerade, choice: Some(choice), .. } = decision else {
            panic!("{decision:?}");
        };
        assert_eq!((backend.address, masquerade), (key.src, true));
        assert!(affinity.clients::<A>().remember(&choice, Tick(7)));
    }
}

fn the_first_to_be_forgotten_makes_room<A: Carried>() {
    let table = compile::<A>(&sticky(four()));
    // One bucket of ten.
    let affinity = Affinity::new(10, [1, 2]);
    let clients = affinity.clients::<A>();
    assert_eq!(clients.capacity(), 10);
    let memory = affinity.memory_bytes();
    let connect = |client: u8, now: u32, number: u64| -> u8 {
        let key = key::<A>(Protocol::TCP, &format!("10.9.0.{client}"), CLUSTER_IP, 80);
        match table.services::<A>().decide(&key, clients, Tick(now), &mut || number << 62 | 1) {
            Decision::Translate { backend, choice: Some(choice), .. } => {
                assert!(clients.remember(&choice, Tick(now)));
                backend.address.to_bits128() as u8
            }
            other => panic!("{other:?}"),
        }
    };
    for client in 0..10 {
        assert_eq!(connect(client, u32::from(client), 0), 1);
    }
    // The oldest comes again, so the second is the one that would be forgotten first.
    assert_eq!(connect(0, 20, 3), 1);
    assert_eq!(connect(10, 21, 0), 1);
    assert_eq!((clients.count(Tick(21)), clients.evicted(), affinity.memory_bytes()), (10, 1, memory));
    assert_eq!(connect(0, 22, 3), 1, "kept");
    assert_eq!(connect(1, 23, 3), 4, "evicted, and picked anew in place of the third");
    assert_eq!(connect(2, 24, 3), 4, "evicted");
    // Long after, all are overdue: nobody is evicted before their time.
    let later = 24 + TIMEOUT_SECONDS * SECOND;
    assert_eq!(clients.count(Tick(later)), 0);
    let evicted = clients.evicted();
    for client in 20..30 {
        connect(client, later, 0);
    }
    assert_eq!((clients.count(Tick(later)), clients.evicted()), (10, evicted));
}

/// Two workers get the first two connections of each client at the same time: whoever remembers second takes over the first's choice.
#[test]
fn workers_that_choose_for_one_client_at_once_agree() {
    const ROUNDS: u32 = if cfg!(miri) { 20 } else { 2000 };
    let table = compile::<Ipv4Addr>(&sticky(four()));
    // Small, so that clients push each other out, too.
    let affinity = Affinity::new(100, [5, 6]);
    let barrier = Barrier::new(2);
    let worker = |seed: u64| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let clients = affinity.clients::<Ipv4Addr>();
        let mut had = Vec::new();
        for round in 0..ROUNDS {
            let mut key: FlowKey<Ipv4Addr> = key(Protocol::TCP, POD, CLUSTER_IP, 80);
            key.src = Ipv4Addr::from_bits(0x0b00_0000 + round);
            barrier.wait();
            loop {
                let now = Tick(round);
                let decision = table.services().decide(&key, clients, now, &mut || random.next_u64());
                let Decision::Translate { backend, choice: Some(choice), .. } = decision else { panic!() };
                if clients.remember(&choice, now) {
                    had.push(backend.address);
                    break;
                }
            }
        }
        had
    };
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(|| worker(1));
        (worker(2), one.join().expect("no panic"))
    });
    assert_eq!(one, other);
    assert!(one.iter().any(|backend| *backend != one[0]), "several were picked");
}

/// One step of the twin's story.
#[derive(Clone, Debug)]
enum Step {
    /// A client connects to a frontend, and the random source says so.
    Connect { client: u8, frontend: u8, number: u64 },
    /// Ticks pass.
    Wait(u32),
    /// Another configuration: which of the four backends are ready, and whether the service has affinity.
    Reload { ready: [bool; 4], affinity: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..6_u8, 0..4_u8, any::<u64>())
            .prop_map(|(client, frontend, number)| Step::Connect { client, frontend, number }),
        2 => (1..TIMEOUT_SECONDS * SECOND * 3 / 2).prop_map(Step::Wait),
        1 => (any::<[bool; 4]>(), prop::bool::weighted(0.9))
            .prop_map(|(ready, affinity)| Step::Reload { ready, affinity }),
    ]
}

fn tell<A: Carried>(steps: &[Step], external: TrafficPolicy) -> Result<(), TestCaseError> {
    let build = |ready: [bool; 4], affinity: bool| {
        let endpoints = four().into_iter().zip(ready).map(|(one, ready)| if ready { one } else { unready(one) });
        let mut model = policies(sticky(endpoints.collect()), TrafficPolicy::Cluster, external);
        port(&mut model, 0).affinity = affinity.then_some(TIMEOUT_SECONDS);
        model
    };
    let (mut ready, mut has_affinity) = ([true; 4], true);
    let mut table = compile::<A>(&build(ready, has_affinity));
    let affinity = Affinity::new(1000, [1, 2]);
    let mut now = Tick(u32::MAX - 5 * SECOND);
    // The twin: each client's last backend and when it came.
    let mut twin: HashMap<u8, (u8, u64)> = HashMap::new();
    let mut time = 0_u64;
    for step in steps {
        match step {
            Step::Wait(ticks) => {
                now = Tick(now.0.wrapping_add(*ticks));
                time += u64::from(*ticks);
            }
            Step::Reload { ready: next, affinity: next_affinity } => {
                (ready, has_affinity) = (*next, *next_affinity);
                table = compile::<A>(&build(ready, has_affinity));
                affinity.forget_gone(&table);
                twin.retain(|_, (backend, _)| has_affinity && ready[usize::from(*backend) - 1]);
            }
            Step::Connect { client, frontend, number } => {
                let dst = [(CLUSTER_IP, 80)].into_iter().chain(EXTERNALS).nth(usize::from(*frontend)).expect("four");
                let client_address = format!("203.0.113.{client}");
                let key = key::<A>(Protocol::TCP, &client_address, dst.0, dst.1);
                let clients = affinity.clients::<A>();
                let decision = table.services::<A>().decide(&key, clients, now, &mut || number | 1 << 40);
                let is_local = dst.0 != CLUSTER_IP && external == TrafficPolicy::Local;
                let list: Vec<u8> =
                    (1..=4).filter(|one| ready[usize::from(*one) - 1] && (!is_local || *one > 2)).collect();
                let Decision::Translate { backend, choice, .. } = decision else {
                    prop_assert!(list.is_empty(), "{decision:?}");
                    continue;
                };
                let backend = backend.address.to_bits128() as u8;
                prop_assert!(list.contains(&backend));
                prop_assert_eq!(choice.is_some(), has_affinity);
                let Some(choice) = choice else { continue };
                let timeout = u64::from(TIMEOUT_SECONDS * SECOND);
                match twin.get(client).filter(|(last, at)| time - at < timeout && list.contains(last)) {
                    Some((last, _)) => prop_assert_eq!(backend, *last),
                    None => {
                        let place = ((u128::from(number | 1 << 40) * list.len() as u128) >> 64) as usize;
                        prop_assert_eq!(backend, list[place], "a free pick");
                    }
                }
                prop_assert!(clients.remember(&choice, now));
                twin.insert(*client, (backend, time));
                prop_assert_eq!(clients.count(now), twin.values().filter(|(_, at)| time - at < timeout).count());
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, ..ProptestConfig::default() })]

    #[test]
    fn clients_are_remembered_as_the_rules_say(steps in vec(step(), 1..60), local in any::<bool>()) {
        let external = if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        tell::<Ipv4Addr>(&steps, external)?;
        tell::<Ipv6Addr>(&steps, external)?;
    }
}
