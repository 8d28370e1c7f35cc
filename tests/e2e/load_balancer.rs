//! What a load balancer in front of the node relies on: ClientIP affinity, and the health-check node port.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    manifests::Manifests,
    site::{Site, one_node},
};

const VIP: [&str; 2] = ["10.96.0.20", "fd00:96::20"];
const PODS: [[&str; 2]; 3] =
    [["10.1.1.21", "fd00:1:1::21"], ["10.1.1.22", "fd00:1:1::22"], ["10.1.1.23", "fd00:1:1::23"]];
const NODE_PORT: u16 = 31400;
const HEALTH_PORT: u16 = 31499;
const NODE: [&str; 2] = ["192.168.10.1", "[fd00:10::1]"];

fn pod(number: usize) -> String {
    format!("default/web-{number}")
}

/// One node, two workers, and the service's three pods.
fn site(ready: [bool; 3]) -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    for (number, addresses) in PODS.iter().enumerate() {
        manifests.pod("node-a", &pod(number), "web", addresses);
    }
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    for number in 0..PODS.len() {
        site.serve(&pod(number), &[8080]);
    }
    let text = service(&site, ready);
    site.write("policies.yaml", &text);
    site.start_all();
    site
}

/// The service, with which of its pods are ready.
fn service(site: &Site, ready: [bool; 3]) -> String {
    let mut manifests = Manifests::default();
    manifests.add(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": VIP[0], "clusterIPs": VIP, "externalTrafficPolicy": "Local",
            "healthCheckNodePort": HEALTH_PORT, "sessionAffinity": "ClientIP",
            "ports": [{"port": 80, "targetPort": 8080, "nodePort": NODE_PORT}],
        },
    }));
    for (family, address_type) in ["IPv4", "IPv6"].into_iter().enumerate() {
        let endpoints: Vec<Value> = PODS
            .iter()
            .zip(ready)
            .map(|(pod, ready)| json!({"addresses": [pod[family]], "nodeName": "node-a", "conditions": {"ready": ready}}))
            .collect();
        manifests.add(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": address_type,
            "metadata": {
                "namespace": "default", "name": format!("web-{family}"), "labels": {"kubernetes.io/service-name": "web"},
            },
            "endpoints": endpoints, "ports": [{"port": 8080}],
        }));
    }
    site.with_node_names(&manifests.text(), &["node-a"])
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_client_keeps_its_backend_over_workers_addresses_and_reloads() {
    let site = site([true; 3]);
    site.lab.ip("client", "route add 10.96.0.0/16 via 192.168.10.1").unwrap();
    for (from, family) in [("client", 0), ("default/client", 0), ("client", 1), ("default/client", 1)] {
        let vip = [VIP[0].to_owned(), format!("[{}]", VIP[1])];
        let mut urls = vec![format!("http://{}:{NODE_PORT}/", NODE[family])];
        // Outside there is no route to the IPv6 one.
        if (from, family) != ("client", 1) {
            urls.push(format!("http://{}/", vip[family]));
        }
        // A new connection, and so a new source port and perhaps another worker, each time.
        let ask = || -> BTreeSet<String> { (0..8).flat_map(|_| &urls).map(|url| site.answered(from, url).0).collect() };
        let first = ask();
        assert_eq!(first.len(), 1, "{from}: {first:?}");
        let pods = [0, 1, 2].map(pod);
        let chosen = pods.iter().position(|pod| first.contains(pod)).expect("one of them");
        // Another backend goes and comes back: nothing changes. Then its own one does.
        let without = |gone: usize| service(&site, [0, 1, 2].map(|number| number != gone));
        site.set_policies(&without((chosen + 1) % 3));
        assert_eq!(ask(), first, "{from}");
        site.set_policies(&without(chosen));
        let second = ask();
        assert!(second.len() == 1 && second != first, "{from}: {second:?}");
        site.set_policies(&service(&site, [true; 3]));
        assert_eq!(ask(), second, "{from}: the one that came back is another");
    }
    // The others' backends went for the sake of those after them.
    let clients = &site.status("node-a")["affinity"];
    assert!(clients["ipv6"]["clients"].as_u64().is_some_and(|count| count >= 1), "{clients}");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn the_health_check_node_port_follows_the_endpoints() {
    let site = site([true, true, false]);
    let ask = |from: &str, family: usize| {
        site.lab.http(from, &format!("http://{}:{HEALTH_PORT}/healthz", NODE[family]), 20.0).unwrap()
    };
    let expected = |count: u32| {
        let code = if count > 0 { 200 } else { 503 };
        let service = json!({"namespace": "default", "name": "web"});
        (code, json!({"service": service, "localEndpoints": count, "serviceProxyHealthy": true}))
    };
    // The health checks' own thread may be a moment behind a reload.
    let until = |count: Option<u32>| {
        for (from, family) in [("client", 0), ("client", 1), ("default/client", 0), ("node-a", 0)] {
            let mut last = None;
            weir_lab::wait_until("the answer", crate::site::DEADLINE, || {
                last = ask(from, family).map(|(code, body)| (code, serde_json::from_str::<Value>(&body).unwrap()));
                (last == count.map(expected)).then_some(())
            })
            .unwrap_or_else(|_| panic!("{from}: {last:?} instead of {count:?}"));
        }
    };
    until(Some(2));
    site.set_policies(&service(&site, [false; 3]));
    until(Some(0));
    site.set_policies(&service(&site, [true; 3]));
    until(Some(3));
    let entries = site.status("node-a")["healthChecks"].clone();
    assert_eq!(entries.as_array().map(Vec::len), Some(2), "one for each family: {entries}");
    site.set_policies("");
    until(None);
    site.finish();
}
