//! Compilation of a cluster's policies, from nothing and after a change.
//!
//! Changes go back and forth, so each iteration is one change after which the model is one of two.

mod cluster;

use std::{hint::black_box, sync::Arc, time::Duration};

use cluster::{Numbers, cluster};
use criterion::{Criterion, criterion_group, criterion_main};
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

fn compilation(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cluster");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));
    let model = cluster(NAMESPACES, PODS, POLICIES);
    let classifier = Classifier::compile(&model).expect("within the limits");
    println!(
        "{POLICIES} policies over {} local of {PODS} pods: {} programs, {} rules, {} KiB",
        classifier.endpoints().len(),
        classifier.program_count(),
        classifier.rule_count(),
        classifier.memory_bytes() / 1024
    );
    group.bench_function("from nothing", |bencher| {
        bencher.iter(|| Classifier::compile(black_box(&model)).expect("within the limits"));
    });
    for (name, change) in changes() {
        let mut changed = model.clone();
        change(&mut changed);
        let mut compiler = Compiler::default();
        let mut states = [&changed, &model].into_iter().cycle();
        compiler.compile(&model).expect("within the limits");
        group.bench_function(name, |bencher| {
            bencher.iter(|| compiler.compile(black_box(states.next().expect("endless"))).expect("within the limits"));
        });
    }
    group.finish();
}

criterion_group!(benches, compilation);
criterion_main!(benches);
