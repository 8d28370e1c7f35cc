//! Many pods at once. Times are printed and never asserted: this is a test of what is made, not of the machine.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use crate::node::{Node, Sandbox, V4, V6, addresses};

const PODS: usize = 100;

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e3;
    format!("p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms", at(50), at(99), at(100))
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_hundred_pods_at_once() {
    let node = Node::new(&[V4, V6]);
    node.control().set(|control| control.blind = true);
    let pods: Vec<_> = (0..PODS).map(|index| Sandbox::new(&format!("web-{index}"))).collect();
    let alone: Vec<_> = pods[..20]
        .iter()
        .map(|pod| {
            let begin = Instant::now();
            pod.add(&node);
            begin.elapsed()
        })
        .collect();
    println!("ADD alone, dual stack, the plugin's process included: {}", percentiles(alone));
    for pod in &pods[..20] {
        pod.del(&node);
    }

    let begin = Instant::now();
    let results = thread::scope(|scope| {
        let adding: Vec<_> = pods
            .iter()
            .map(|pod| {
                scope.spawn(|| {
                    let begin = Instant::now();
                    (pod.add(&node), begin.elapsed())
                })
            })
            .collect();
        adding.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    println!("{PODS} ADDs at once: {:.2} s in all", begin.elapsed().as_secs_f64());
    let (results, times): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    println!("each of them: {}", percentiles(times));

    let distinct: BTreeSet<_> = results.iter().flat_map(addresses).collect();
    assert_eq!(distinct.len(), 2 * PODS, "no address twice");
    assert_eq!(node.pods().kept().len(), PODS);
    for (pod, result) in pods.iter().zip(&results) {
        let check = pod.check(&node, result);
        assert!(check.success, "{}", check.output);
    }
    let begin = Instant::now();
    thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| pod.del(&node));
        }
    });
    println!("{PODS} DELs at once: {:.2} s in all", begin.elapsed().as_secs_f64());
    node.assert_empty();
}
