//! Pods added and deleted at random, on a disk and a kernel that fail or end at any step, beside a list of what a runtime was told.

mod sim;

use std::collections::{BTreeMap, BTreeSet};

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
