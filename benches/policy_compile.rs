//! Compilation of a cluster's policies, from nothing and after a change.
//!
//! Changes go back and forth, so each iteration is one change after which the model is one of two.

mod cluster;

use std::{fs, hint::black_box, sync::Arc, time::Duration};

use cluster::{Numbers, cluster};
use weir_policy::{Classifier, Compiler, Model, model::Endpoint};

const NAMESPACES: u32 = 200;
const PODS: u32 = 11_000;
const POLICIES: u32 = 10_000;

/// A name, and what it does to a model.
type Change = (&'static str, fn(&mut Model));

fn changes() -> Vec<Change> {
    fn endpoint(model: &mut Model, number: usize, change: impl FnOnce(&mut Endpoint)) {
        change(Arc::make_mut(&mut model.endpoints[number]));
    }
    vec![
        ("nothing", |_| {}),
        ("everything made anew, and equal", |model| {
            model.endpoints.iter_mut().for_each(|endpoint| *endpoint = Arc::new((**endpoint).clone()));
            let policies = model.tiers.iter_mut().flat_map(|tier| &mut tier.policies);
            policies.for_each(|policy| *policy = Arc::new((**policy).clone()));
        }),
        ("one policy replaced", |model| {
            let other = cluster::policy(&mut Numbers(99), 77, 12);
            let policies = &mut model.tiers[1].policies;
            let place = policies.iter().position(|policy| policy.name == other.name).expect("a policy of this name");
            policies[place] = other;
        }),
        ("one policy gone", |model| drop(model.tiers[1].policies.remove(5000))),
        ("a pod's application", |model| {
            endpoint(model, 5000, |pod| drop(pod.labels.insert("app".to_owned(), "app9".to_owned())));
        }),
        ("a pod's labels, to some that no other has", |model| {
            endpoint(model, 5000, |pod| drop(pod.labels.insert("app".to_owned(), "new".to_owned())));
        }),
        ("a pod more, as others", |model| model.endpoints.push(cluster::pod(PODS + 5, 77, 7))),
        ("a pod more on this node", |model| model.endpoints.push(cluster::pod(PODS, 77, 7))),
        ("a pod more that monitors all", |model| model.endpoints.push(cluster::pod(PODS + 5, 0, 0))),
        ("a namespace's labels", |model| {
            for number in (77..PODS as usize).step_by(NAMESPACES as usize) {
                endpoint(model, number, |pod| drop(pod.labels.insert("pcns.team".to_owned(), "team3".to_owned())));
            }
        }),
    ]
}

/// Time on the processor, so that other work on the machine counts less than in time that passes.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("Linux with scheduler statistics");
    Duration::from_nanos(text.split(' ').next().and_then(|first| first.parse().ok()).expect("time on the processor"))
}

/// Milliseconds on the processor: the fastest and the median of `times`.
fn measure(times: usize, mut work: impl FnMut()) -> (f64, f64) {
    let mut all: Vec<f64> = (0..times)
        .map(|_| {
            let begin = processor_time();
            work();
            (processor_time() - begin).as_secs_f64() * 1e3
        })
        .collect();
    all.sort_by(f64::total_cmp);
    (all[0], all[times / 2])
}

fn main() {
    let model = cluster(NAMESPACES, PODS, POLICIES);
    let classifier = Classifier::compile(&model).expect("within the limits");
    println!(
        "{POLICIES} policies over {} local of {PODS} pods: {} programs, {} rules, {} KiB; ms on the processor, fastest (median):",
        classifier.endpoints().len(),
        classifier.program_count(),
        classifier.rule_count(),
        classifier.memory_bytes() / 1024
    );
    let (fastest, median) = measure(10, || drop(black_box(Classifier::compile(black_box(&model)))));
    println!("{fastest:8.1} ({median:6.1})  from nothing");
    for (name, change) in changes() {
        let mut changed = model.clone();
        change(&mut changed);
        let mut compiler = Compiler::default();
        let mut states = [&changed, &model].into_iter().cycle();
        compiler.compile(&model).expect("within the limits");
        let (fastest, median) = measure(20, || {
            let state = black_box(states.next().expect("endless"));
            drop(black_box(compiler.compile(state).expect("within the limits")));
        });
        println!("{fastest:8.1} ({median:6.1})  {name}");
    }
}
