//! Services whose slices disagree or lose what they had, and pods that have one address.

use super::{policy::cluster, *};

fn api(slices: &str) -> String {
    "apiVersion: v1\nkind: Service\nmetadata: {name: kubernetes, namespace: default}\nspec: {clusterIP: 10.96.0.1, ports: [{name: https, port: \
     443}]}\n"
        .to_owned()
        + slices
}

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: default, labels: \
         {{kubernetes.io/service-name: kubernetes}}}}\naddressType: IPv4\nendpoints: [{endpoints}]\nports: [{{name: https, port: 6443}}]\n"
    )
}

/// "ADDRESS ready serving terminating" of the endpoints of the first service.
fn endpoints(loaded: &Loaded) -> Vec<String> {
    let of = |one: &weir_nat::Endpoint| format!("{} {} {} {}", one.address, one.ready, one.serving, one.terminating);
    loaded.services.services[0].endpoints.iter().map(of).collect()
}

#[test]
fn an_address_that_is_listed_twice_has_its_most_usable_listing() {
    let ghost =
        "{addresses: [192.0.2.1], nodeName: node-a, conditions: {ready: false, serving: false, terminating: true}}";
    let ready = "{addresses: [192.0.2.1], nodeName: node-b}";
    let ready_here = "{addresses: [192.0.2.1], nodeName: node-a, conditions: {ready: true}}";
    let leaving = "{addresses: [192.0.2.1], nodeName: node-b, conditions: {ready: false, terminating: true}}";
    for (listings, expected, node) in [
        (vec![ghost, ready], "192.0.2.1 true true false", "node-b"),
        (vec![ready, ghost], "192.0.2.1 true true false", "node-b"),
        (vec![ghost, leaving], "192.0.2.1 false true true", "node-b"),
        (vec![ghost, leaving, ready, ready_here], "192.0.2.1 true true false", "node-a"),
        (vec![ready_here, ready], "192.0.2.1 true true false", "node-a"),
        (vec![ghost], "192.0.2.1 false false true", "node-a"),
    ] {
        let one = loaded(WEIR, &api(&slice("a", &listings.join(", "))));
        let several: Vec<String> =
            listings.iter().enumerate().map(|(at, listing)| slice(&format!("s{at}"), listing)).collect();
        for loaded in [one, loaded(WEIR, &api(&several.concat()))] {
            assert_eq!(endpoints(&loaded), [expected], "{listings:?}");
            assert_eq!(loaded.services.services[0].endpoints[0].node_name(), Some(node), "{listings:?}");
        }
    }
}

#[test]
fn the_api_keeps_its_last_backends() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("weir.yaml"), WEIR).unwrap();
    let mut loader = Loader::new(&folder.path().join("weir.yaml"));
    let mut load = |cluster: &str| {
        fs::write(folder.path().join("cluster.yaml"), cluster).unwrap();
        loader.load_strictly().unwrap_or_else(|problems| panic!("{problems}"))
    };
    let keeps = |loaded: &Loaded| loaded.notes.to_string().contains("its last ones stay");
    // Who never had one has none.
    let first = load(&api(""));
    assert_eq!((endpoints(&first).len(), keeps(&first)), (0, false));
    let two = load(&api(&slice("a", "{addresses: [192.0.2.1]}, {addresses: [192.0.2.2]}")));
    let both = ["192.0.2.1 true true false", "192.0.2.2 true true false"];
    assert_eq!((endpoints(&two), keeps(&two)), (both.map(str::to_owned).into(), false));
    for lost in [
        "".to_owned(),
        slice("a", ""),
        slice("a", "{addresses: [192.0.2.2], conditions: {ready: false}}"),
        slice("b", "{addresses: [192.0.2.3], conditions: {ready: false, serving: false, terminating: true}}"),
    ] {
        for _ in 0..2 {
            let loaded = load(&api(&lost));
            assert_eq!((endpoints(&loaded), keeps(&loaded)), (both.map(str::to_owned).into(), true), "{lost}");
        }
    }
    // What is usable counts at once, and another service keeps nothing.
    let one = load(&api(&slice("a", "{addresses: [192.0.2.9]}")));
    assert_eq!((endpoints(&one), keeps(&one)), (vec!["192.0.2.9 true true false".to_owned()], false));
    let other = |slices: &str| {
        api(slices).replace("kubernetes,", "web,").replace("service-name: kubernetes", "service-name: web")
    };
    assert_eq!(endpoints(&load(&other(&slice("a", "{addresses: [192.0.2.1]}")))).len(), 1);
    assert_eq!(endpoints(&load(&other(""))).len(), 0);
}

#[test]
fn a_pod_that_terminates_or_has_ended_owns_no_address_of_a_living_one() {
    let pod = |name: &str, rest: &str, status: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: red{rest}}}\nspec: {{nodeName: node-a, containers: [{{name: \
             c}}]}}\nstatus: {{{status}}}\n"
        )
    };
    let address = "podIP: 10.0.0.9";
    let endpoint = |pod: &str| {
        format!(
            "---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {{name: {pod}, namespace: red}}\nspec: {{node: node-a, \
             orchestrator: k8s, pod: {pod}, ipNetworks: [10.0.0.9/32], interfaceName: cali{pod}}}\n"
        )
    };
    let leaving = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    let living = pod("living", "", address);
    for ghost in [
        pod("ghost", leaving, address),
        pod("ghost", "", "podIP: 10.0.0.9, phase: Succeeded"),
        pod("ghost", "", "podIP: 10.0.0.9, phase: Failed"),
        pod("ghost", leaving, "") + &endpoint("ghost"),
        pod("ghost", leaving, address) + &endpoint("living"),
    ] {
        for objects in [ghost.clone() + &living, living.clone() + &ghost] {
            let loaded = loaded(WEIR, &(cluster() + &objects));
            let owners: Vec<&str> = loaded
                .cluster
                .workloads
                .iter()
                .filter(|workload| workload.addresses.contains(&"10.0.0.9".parse().unwrap()))
                .map(|workload| workload.name.as_str())
                .collect();
            assert_eq!(owners, ["red/living"], "{objects}");
        }
    }
    // The living one's address may be told by its WorkloadEndpoint alone.
    let objects = pod("ghost", leaving, address) + &pod("living", "", "phase: Running") + &endpoint("living");
    let loaded = loaded(WEIR, &(cluster() + &objects));
    assert!(
        loaded.cluster.workloads.iter().all(|workload| workload.name != "red/ghost"),
        "{:?}",
        loaded.cluster.workloads
    );
}
