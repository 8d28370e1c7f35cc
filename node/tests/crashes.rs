//! Pods added and deleted at random, on a disk and a kernel that fail or end at any step, beside a list of what a runtime was told.

mod sim;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use sim::{Fault, Told, World};

#[derive(Clone, Debug)]
enum Step {
    /// A new sandbox of a pod.
    Add(u8, Fault),
    /// The same ADD again.
    AddAgain(prop::sample::Index, Fault),
    Del(prop::sample::Index, Fault),
    /// A DEL of a sandbox that is gone.
    DelAgain(prop::sample::Index, Fault),
    Gc(prop::sample::Index, Fault),
    Tend(Fault),
    Restart,
    Reboot,
    PowerCut,
    NamespaceEnds(prop::sample::Index),
    /// A record is lost, or holds nonsense, while no router runs.
    LoseRecord(prop::sample::Index, bool),
    Wait(u64),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => Just(Fault::None),
        3 => (0..40u32).prop_map(Fault::EndAt),
        2 => (0..40u32).prop_map(Fault::FailAt),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = any::<prop::sample::Index>;
    let step = prop_oneof![
        8 => (0..4u8, fault()).prop_map(|(pod, fault)| Step::Add(pod, fault)),
        2 => (index(), fault()).prop_map(|(index, fault)| Step::AddAgain(index, fault)),
        6 => (index(), fault()).prop_map(|(index, fault)| Step::Del(index, fault)),
        1 => (index(), fault()).prop_map(|(index, fault)| Step::DelAgain(index, fault)),
        1 => (index(), fault()).prop_map(|(index, fault)| Step::Gc(index, fault)),
        1 => fault().prop_map(Step::Tend),
        1 => Just(Step::Restart),
        1 => Just(Step::Reboot),
        1 => Just(Step::PowerCut),
        1 => index().prop_map(Step::NamespaceEnds),
        1 => (index(), any::<bool>()).prop_map(|(index, nonsense)| Step::LoseRecord(index, nonsense)),
        4 => (1..40_000u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn records_devices_addresses_and_control_agree_after_every_step(steps in steps()) {
        let mut world = World::new(&["10.244.7.0/28", "fd00:7::/124"]);
        // What the runtime believes to be there: sandbox to pod and addresses; what it deleted.
        let mut living: BTreeMap<String, Told> = BTreeMap::new();
        let mut dead: Vec<String> = Vec::new();
        // When addresses of pods that lived were given back.
        let mut cooling: BTreeMap<std::net::IpAddr, u64> = BTreeMap::new();
        for step in steps {
            let free = |cooling: &mut BTreeMap<_, _>, told: &Told, at: u64| {
                cooling.extend(told.addresses.iter().map(|address| (*address, at)));
            };
            let pick = |living: &BTreeMap<String, Told>, index: prop::sample::Index| {
                (!living.is_empty()).then(|| living.keys().nth(index.index(living.len())).unwrap().clone())
            };
            match step {
                Step::Add(pod, fault) => {
                    let sandbox = world.new_sandbox();
                    let before: Vec<_> =
                        living.iter().filter(|(_, told)| told.pod == pod).map(|(sandbox, _)| sandbox.clone()).collect();
                    match world.with(fault, |world| world.add(&sandbox, pod)) {
                        Ok(addresses) => {
                            // Those that the new one took the place of are gone, whatever becomes of their DELs.
                            for old in before {
                                let told = living.remove(&old).unwrap();
                                // What a full disk kept from being written down is forgotten by a restart.
                                if fault.is_none() {
                                    free(&mut cooling, &told, world.now());
                                }
                                dead.push(old);
                            }
                            for address in &addresses {
                                let at = cooling.remove(address);
                                prop_assert!(at.is_none_or(|at| at + sim::COOL_DOWN_MS <= world.now()), "{} is given too early", address);
                                prop_assert!(living.values().all(|told| !told.addresses.contains(address)), "{} twice", address);
                            }
                            prop_assert_eq!(addresses.len(), 2);
                            living.insert(sandbox, Told { pod, addresses });
                        }
                        Err(_) => {
                            // What runtimes do then, for the sandbox that failed and for the older one, which may be half gone.
                            prop_assert_eq!(world.del(&sandbox), Ok(()));
                            for old in before {
                                prop_assert_eq!(world.del(&old), Ok(()));
                                let told = living.remove(&old).unwrap();
                                if fault.is_none() {
                                    free(&mut cooling, &told, world.now());
                                }
                                dead.push(old);
                            }
                            dead.push(sandbox);
                        }
                    }
                }
                Step::AddAgain(index, fault) => {
                    let Some(sandbox) = pick(&living, index) else { continue };
                    let told = living[&sandbox].clone();
                    match world.with(fault, |world| world.add(&sandbox, told.pod)) {
                        Ok(addresses) if fault.is_none() => prop_assert_eq!(addresses, told.addresses),
                        // A kernel that did not say how the pod is: it is made anew.
                        Ok(addresses) => drop(living.insert(sandbox, Told { pod: told.pod, addresses })),
                        Err(_) => {
                            prop_assert_eq!(world.del(&sandbox), Ok(()));
                            living.remove(&sandbox);
                            dead.push(sandbox);
                        }
                    }
                }
                Step::Del(index, fault) => {
                    let Some(sandbox) = pick(&living, index) else { continue };
                    if world.with(fault, |world| world.del(&sandbox)).is_err() {
                        // A runtime tries until it works.
                        prop_assert_eq!(world.del(&sandbox), Ok(()));
                    }
                    let told = living.remove(&sandbox).unwrap();
                    if fault.is_none() {
                        free(&mut cooling, &told, world.now());
                    }
                    dead.push(sandbox);
                }
                Step::DelAgain(index, fault) => {
                    if dead.is_empty() { continue }
                    let sandbox = dead[index.index(dead.len())].clone();
                    let _ = world.with(fault, |world| world.del(&sandbox));
                }
                Step::Gc(index, fault) => {
                    let Some(kept) = pick(&living, index) else { continue };
                    let valid = BTreeSet::from([kept.clone()]);
                    if world.with(fault, |world| world.gc(&valid)).is_err() {
                        prop_assert_eq!(world.gc(&valid), Ok(()));
                    }
                    for sandbox in living.keys().filter(|sandbox| **sandbox != kept).cloned().collect::<Vec<_>>() {
                        let told = living.remove(&sandbox).unwrap();
                        if fault.is_none() {
                            free(&mut cooling, &told, world.now());
                        }
                        dead.push(sandbox);
                    }
                }
                Step::Tend(fault) => {
                    let _ = world.with(fault, |world| { world.keeper().tend(); Ok(()) });
                }
                Step::Restart => world.restart(),
                Step::Reboot | Step::PowerCut => {
                    world.reboot(matches!(step, Step::PowerCut));
                    // It takes a minute: what the pods had has cooled down.
                    dead.extend(living.keys().cloned());
                    living.clear();
                    cooling.clear();
                }
                Step::NamespaceEnds(index) => {
                    let Some(sandbox) = pick(&living, index) else { continue };
                    world.end_namespace(&sandbox);
                    world.keeper().tend();
                    let told = living.remove(&sandbox).unwrap();
                    free(&mut cooling, &told, world.now());
                    dead.push(sandbox);
                }
                Step::LoseRecord(index, nonsense) => {
                    let Some(sandbox) = pick(&living, index) else { continue };
                    world.lose_record(&sandbox, nonsense);
                }
                Step::Wait(time) => world.wait(time),
            }
            let problems = world.compare(&living);
            prop_assert!(problems.is_empty(), "{:#?}", problems);
        }
        // Nothing has leaked: all that can be given is given.
        for sandbox in living.keys() {
            prop_assert_eq!(world.del(sandbox), Ok(()));
        }
        world.wait(sim::COOL_DOWN_MS);
        let mut addresses = BTreeSet::new();
        for pod in 0..14u8 {
            let sandbox = world.new_sandbox();
            let given = world.add(&sandbox, pod);
            prop_assert!(given.is_ok(), "{:?}", given);
            addresses.extend(given.unwrap());
        }
        prop_assert_eq!(addresses.len(), 28);
        let sandbox = world.new_sandbox();
        let none = world.add(&sandbox, 99).unwrap_err();
        prop_assert!(none.contains("14 in use, 0 cooling"), "{}", none);
    }
}

/// Requests at once, of which many are of one pod: whoever comes first, what is left agrees, and in the end nothing is.
#[test]
fn requests_at_once_leave_what_agrees() {
    for round in 0..40u64 {
        let mut world = World::new(&["10.244.7.0/26", "fd00:7::/122"]);
        let sandboxes: Vec<_> = (0..12u8).map(|index| (world.new_sandbox(), index % 4)).collect();
        std::thread::scope(|scope| {
            for (index, (sandbox, pod)) in sandboxes.iter().enumerate() {
                let world = &world;
                scope.spawn(move || {
                    // Each in its own order; what an ADD says is only what was then.
                    let mut random = (round << 8 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for _ in 0..8 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        match random >> 61 {
                            0..3 => drop(world.add(sandbox, *pod)),
                            3..6 => assert_eq!(world.del(sandbox), Ok(())),
                            6 => world.keeper().tend(),
                            _ => world.keeper().drain(),
                        }
                    }
                });
            }
        });
        let left = |world: &World| -> BTreeMap<String, Told> {
            let told = |pod: weir_node::pods::LocalPod| {
                let number = pod.name.strip_prefix("pod-").unwrap().parse().unwrap();
                (pod.sandbox, Told { pod: number, addresses: pod.addresses })
            };
            world.keeper().pods().into_iter().map(told).collect()
        };
        let living = left(&world);
        assert!(living.values().map(|told| told.pod).collect::<BTreeSet<_>>().len() == living.len(), "{living:?}");
        assert_eq!(world.compare(&living), [""; 0]);
        for (sandbox, _) in &sandboxes {
            assert_eq!(world.del(sandbox), Ok(()));
        }
        assert_eq!(world.compare(&BTreeMap::new()), [""; 0]);
    }
}

/// What a start works off it does not ask control about, which does not run yet.
#[test]
fn a_start_asks_nothing_of_control() {
    let mut world = World::new(&["10.244.7.0/24"]);
    for pod in 0..3 {
        let sandbox = world.new_sandbox();
        world.add(&sandbox, pod).unwrap();
        if pod > 0 {
            world.queue(&sandbox);
        }
    }
    let begin = Instant::now();
    world.restart();
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    let kept: Vec<_> = world.keeper().pods().into_iter().map(|pod| pod.name).collect();
    assert_eq!((kept, world.queued()), (vec!["pod-0".to_owned()], 0));
}

/// A pod that control was never told goes must stay in the books: control would go on refusing its address to others.
#[test]
fn a_pod_of_which_control_hears_nothing_does_not_go_yet() {
    let mut world = World::new(&["10.244.7.0/24"]);
    let pods: Vec<_> = (0..8u8).map(|pod| (pod, world.new_sandbox())).collect();
    for (pod, sandbox) in &pods {
        world.add(sandbox, *pod).unwrap();
    }
    world.deaf.store(true, Ordering::Relaxed);
    // One ask is taken, four wait, so some find no room.
    let outcomes: Vec<_> = thread::scope(|scope| {
        let dels: Vec<_> = pods.iter().map(|(_, sandbox)| scope.spawn(|| world.del(sandbox))).collect();
        dels.into_iter().map(|del| del.join().unwrap()).collect()
    });
    let failed: Vec<_> = outcomes.iter().filter(|outcome| outcome.is_err()).collect();
    assert!(!failed.is_empty(), "{outcomes:?}");
    assert_eq!(world.keeper().pods().len(), failed.len());
    world.deaf.store(false, Ordering::Relaxed);
    for (_, sandbox) in &pods {
        assert_eq!(world.del(sandbox), Ok(()));
    }
    assert_eq!(world.compare(&BTreeMap::new()), [""; 0]);
}

#[test]
fn a_del_that_waits_is_not_of_the_next_life_of_its_sandbox() {
    let mut world = World::new(&["10.244.7.0/24"]);
    let sandbox = world.new_sandbox();
    world.add(&sandbox, 0).unwrap();
    world.queue(&sandbox);
    let addresses = world.add(&sandbox, 0).unwrap();
    world.keeper().tend();
    let living = BTreeMap::from([(sandbox, Told { pod: 0, addresses })]);
    assert_eq!((world.compare(&living), world.queued()), (vec![], 0));
}

#[test]
fn a_pod_whose_device_has_another_name_keeps_its_address() {
    let mut world = World::new(&["10.244.7.0/24"]);
    let sandbox = world.new_sandbox();
    let addresses = world.add(&sandbox, 0).unwrap();
    world.rename_device(0, "renamed0");
    world.keeper().tend();
    world.restart();
    let kept: Vec<_> = world.keeper().pods().into_iter().map(|pod| (pod.name, pod.addresses)).collect();
    assert_eq!(kept, [("pod-0".to_owned(), addresses)]);
    assert_eq!(world.del(&sandbox), Ok(()));
    assert_eq!((world.devices(), world.keeper().pods()), (vec![], vec![]));
}

#[test]
fn a_device_that_weir_did_not_make_stays_at_a_start() {
    let mut world = World::new(&["10.244.7.0/24"]);
    let sandbox = world.new_sandbox();
    world.add(&sandbox, 0).unwrap();
    // The node starts again, by now with another plugin, which has made the StatefulSet's pod.
    world.reboot_with(|world| world.foreign_device(0));
    assert_eq!((world.devices().len(), world.keeper().pods()), (1, vec![]));
}

#[test]
fn an_address_that_control_knew_cools_down() {
    let mut world = World::new(&["10.244.7.0/24"]);
    world.refuses.store(true, Ordering::Relaxed);
    let sandbox = world.new_sandbox();
    world.add(&sandbox, 0).unwrap_err();
    world.refuses.store(false, Ordering::Relaxed);
    let (next, after) = (world.new_sandbox(), world.new_sandbox());
    let address = |text: &str| vec![text.parse::<std::net::IpAddr>().unwrap()];
    assert_eq!(world.add(&next, 1), Ok(address("10.244.7.2")));
    // One that control never heard of is as it was.
    world.with(Fault::FailAt(0), |world| world.add(&after, 2)).unwrap_err();
    assert_eq!(world.add(&after, 2), Ok(address("10.244.7.3")));
}

#[test]
fn ipv6_has_a_least_mtu() {
    let mut world = World::new(&["10.244.7.0/24"]);
    let ranges = |nets: &[&str], mtu| weir_node::pods::NodeRanges {
        pod_cidrs: nets.iter().map(|net| net.parse().unwrap()).collect(),
        mtu,
        left_out: Vec::new(),
    };
    let sandboxes = [world.new_sandbox(), world.new_sandbox()];
    let both = ["10.244.7.0/24", "fd00:7::/64"];
    let why = world.add_with(ranges(&both, 1279), &sandboxes[0], 0).unwrap_err();
    assert!(why.contains("MTU of 1279") && why.contains("cni.mtu"), "{why}");
    assert_eq!(world.add_with(ranges(&both, 1280), &sandboxes[0], 0).map(|addresses| addresses.len()), Ok(2));
    assert_eq!(world.add_with(ranges(&both[..1], 576), &sandboxes[1], 1).map(|addresses| addresses.len()), Ok(1));
}
