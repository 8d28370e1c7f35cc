//! What a pod's network looks like, and what the runtime is told about it.

use std::{net::UdpSocket, path::Path};

use serde_json::{Value, json};
use weir_node::pods::LocalPod;

use crate::node::{Asked, Cni, MTU, Namespace, Node, Sandbox, V4, V6, addresses};

/// The addresses, routes and neighbours of a namespace, without what a kernel adds by itself (lo, link-local, multicast).
fn picture(namespace: &Namespace) -> Value {
    let link = &namespace.ip_json("link show dev eth0")[0];
    let addresses = namespace.ip_json("address show dev eth0");
    let addresses: Vec<_> = addresses[0]["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|address| address["scope"] == "global")
        .map(|address| {
            assert_ne!(address["tentative"], true, "usable at once");
            format!("{}/{}", address["local"].as_str().unwrap(), address["prefixlen"])
        })
        .collect();
    let routes = |family: &str| -> Vec<String> {
        let list = namespace.ip_json(&format!("{family} route show dev eth0"));
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let own = list.as_array().unwrap().iter().filter(|route| route["protocol"] != "kernel");
        own.map(|route| format!("{} via {}", text(&route["dst"]), text(&route["gateway"]))).collect()
    };
    let neighbours = namespace.ip_json("neighbour show dev eth0 nud permanent");
    let neighbours: Vec<_> = neighbours
        .as_array()
        .unwrap()
        .iter()
        .map(|n| format!("{} {}", n["dst"].as_str().unwrap(), n["lladdr"].as_str().unwrap()))
        .collect();
    json!({
        "mtu": link["mtu"], "state": link["operstate"], "kind": link["linkinfo"]["info_kind"],
        "addresses": addresses, "routes": routes("-4"), "routes6": routes("-6"), "neighbours": neighbours,
    })
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_looks_as_calico_makes_it() {
    let both = [
        (vec![V4], vec!["10.244.7.1/32"]),
        (vec![V6], vec!["fd00:244:0:7::1/128"]),
        (vec![V4, V6], vec!["10.244.7.1/32", "fd00:244:0:7::1/128"]),
    ];
    for (ranges, expected) in both {
        let node = Node::new(&ranges);
        let pod = Sandbox::new("web-0");
        let mut config = node.config();
        config["runtimeConfig"] = json!({"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
            {"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "localhost"},
        ]});
        config["dns"] = json!({"nameservers": ["10.96.0.10"]});
        let answer = pod.command("ADD").run(&config);
        assert!(answer.success, "{}", answer.output);

        let (v4, v6) = (ranges.contains(&V4), ranges.contains(&V6));
        let mut neighbours = Vec::new();
        if v4 {
            neighbours.push("169.254.1.1 ee:ee:ee:ee:ee:ee");
        }
        if v6 {
            neighbours.push("fe80::ecee:eeff:feee:eeee ee:ee:ee:ee:ee:ee");
        }
        let mut picture = picture(&pod.namespace);
        picture["neighbours"].as_array_mut().unwrap().sort_by_key(|n| n.as_str().unwrap().contains("::"));
        assert_eq!(
            picture,
            json!({
                "mtu": MTU, "state": "UP", "kind": "veth", "addresses": expected,
                "routes": if v4 { json!(["default via 169.254.1.1", "169.254.1.1 via -"]) } else { json!([]) },
                "routes6": if v6 { json!(["default via fe80::ecee:eeff:feee:eeee"]) } else { json!([]) },
                "neighbours": neighbours,
            })
        );
        let device = pod.device();
        let end = &node.namespace.ip_json(&format!("link show dev {device}"))[0];
        assert_eq!(end["address"], "ee:ee:ee:ee:ee:ee");
        assert_eq!(end["mtu"], MTU);
        assert_eq!(end["operstate"], "UP");
        assert!(end["ifalias"].as_str().unwrap().ends_with(" default/web-0"), "{end}");
        if v6 {
            let addresses = node.namespace.ip_json(&format!("-6 address show dev {device}"));
            assert_eq!(addresses[0]["addr_info"][0]["local"], "fe80::ecee:eeff:feee:eeee", "the gateway is there");
            assert_ne!(addresses[0]["addr_info"][0]["tentative"], true);
            for (of, name, value) in
                [("eth0", "accept_ra", "0"), ("eth0", "disable_ipv6", "0"), ("lo", "disable_ipv6", "0")]
            {
                assert_eq!(sysctl(&pod.namespace, of, name), value, "{of} {name}");
            }
        }

        let mac = pod.namespace.ip_json("link show dev eth0")[0]["address"].as_str().unwrap().to_owned();
        let mut ips = Vec::new();
        let mut routes = Vec::new();
        for address in &expected {
            ips.push(json!({"interface": 1, "address": address}));
            routes.push(match address.contains(':') {
                false => json!({"dst": "0.0.0.0/0", "gw": "169.254.1.1"}),
                true => json!({"dst": "::/0", "gw": "fe80::ecee:eeff:feee:eeee"}),
            });
        }
        assert_eq!(
            answer.output,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": device, "mac": "ee:ee:ee:ee:ee:ee", "mtu": MTU},
                    {"name": "eth0", "mac": mac, "mtu": MTU, "sandbox": pod.namespace.path()},
                ],
                "ips": ips, "routes": routes, "dns": {"nameservers": ["10.96.0.10"]},
            })
        );

        let netns = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(pod.namespace.path()).unwrap());
        let expected = LocalPod {
            namespace: "default".into(),
            name: "web-0".into(),
            uid: Some("u-web-0".into()),
            sandbox: pod.id.clone(),
            netns: Some(netns),
            device: device.clone(),
            mac: mac.parse().unwrap(),
            addresses: addresses(&answer.output),
        };
        // Closed while it was down, and put when it was up, in this order.
        let asked = [Asked::Close(device.clone(), true), Asked::Put(expected.clone(), true)];
        assert_eq!(node.control().take_asked(), asked);
        assert_eq!(node.pods().kept(), [expected]);

        pod.del(&node);
        assert_eq!(node.control().take_asked(), [Asked::Gone("web-0".into(), pod.id.clone())]);
        node.assert_empty();
        assert!(!pod.namespace.has("eth0"));
    }
}

fn sysctl(namespace: &Namespace, of: &str, name: &str) -> String {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(of).join(name);
    namespace.within(|| std::fs::read_to_string(path).unwrap().trim().to_owned())
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn ipv6_works_where_the_runtime_turned_it_off() {
    let node = Node::new(&[V4, V6]);
    let pod = Sandbox::new("web-0");
    pod.namespace.within(|| {
        for of in ["all", "default", "lo"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{of}/disable_ipv6"), "1").unwrap();
        }
    });
    let result = pod.add(&node);
    assert!(pod.check(&node, &result).success);
    assert_eq!(sysctl(&pod.namespace, "lo", "disable_ipv6"), "0");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn the_first_packet_of_a_pod_leaves_it() {
    let node = Node::new(&[V4, V6]);
    for round in 0..10 {
        let pod = Sandbox::new(&format!("job-{round}"));
        pod.add(&node);
        pod.namespace.within(|| {
            for target in ["203.0.113.1:9", "[2001:db8::1]:9"] {
                let any = if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
                UdpSocket::bind(any).unwrap().send_to(b"weir", target).unwrap();
            }
        });
        // A queue that is not there yet would have dropped it, and count it so.
        let stats = &pod.namespace.ip_json("-s link show dev eth0")[0]["stats64"]["tx"];
        assert_eq!(stats["dropped"], 0, "{stats}");
        assert!(stats["packets"].as_u64().unwrap() >= 2, "{stats}");
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn results_have_the_form_of_the_version_asked_for() {
    let node = Node::new(&[V4, V6]);
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Sandbox::new("web-0");
        let mut config = node.config();
        config["cniVersion"] = version.into();
        let answer = pod.command("ADD").run(&config);
        assert!(answer.success, "{}", answer.output);
        let result = answer.output;
        assert_eq!(result["cniVersion"], version);
        let old = version.starts_with('0');
        for (ip, family) in [(&result["ips"][0], "4"), (&result["ips"][1], "6")] {
            assert_eq!(ip["version"], if old { json!(family) } else { Value::Null }, "{version}: {ip}");
            assert_eq!(ip["interface"], 1);
        }
        let mtu = if version == "1.1.0" { json!(MTU) } else { Value::Null };
        assert_eq!(result["interfaces"][1]["mtu"], mtu);
        // CHECK came with 0.4.0.
        config["prevResult"] = result;
        let check = pod.command("CHECK").run(&config);
        if version.starts_with("0.3") {
            assert_eq!(check.code(), 1);
            assert_eq!(check.output["cniVersion"], version);
        } else {
            assert!(check.success, "{}", check.output);
            assert_eq!(check.output, Value::Null);
        }
        // STATUS and GC came with 1.1.0.
        config["cni.dev/valid-attachments"] = json!([{"containerID": pod.id, "ifname": "eth0"}]);
        for command in ["STATUS", "GC"] {
            let answer = Cni::new(command).run(&config);
            if version == "1.1.0" {
                assert!(answer.success, "{}", answer.output);
            } else {
                assert_eq!(answer.code(), 1);
            }
        }
        config.as_object_mut().unwrap().remove("prevResult");
        assert!(pod.command("DEL").run(&config).success);
    }
    let versions = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    let asked = Cni::new("VERSION").run(&json!({"cniVersion": "1.0.0"}));
    assert_eq!(asked.output, json!({"cniVersion": "1.0.0", "supportedVersions": versions}));
    let nothing = Cni::new("VERSION").run_bytes(b"");
    assert_eq!(nothing.output, json!({"cniVersion": "1.1.0", "supportedVersions": versions}));
}

/// Changes something of a pod.
type Spoil<'f> = &'f dyn Fn(&Sandbox, &Node);

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn check_finds_what_was_changed() {
    let node = Node::new(&[V4, V6]);
    let spoil: [(&str, Spoil<'_>); 8] = [
        ("MTU of eth0", &|pod, _| drop(pod.namespace.ip("link set eth0 mtu 1300"))),
        ("does not have 10.244.7.", &|pod, _| drop(pod.namespace.ip("-4 address flush dev eth0"))),
        ("does not have fd00:", &|pod, _| drop(pod.namespace.ip("-6 address flush dev eth0 scope global"))),
        ("default route by 169.254.1.1", &|pod, _| drop(pod.namespace.ip("route del default"))),
        ("default route by fe80::", &|pod, _| drop(pod.namespace.ip("-6 route del default"))),
        ("MAC address", &|pod, _| drop(pod.namespace.ip("link set eth0 address 02:00:00:00:00:01"))),
        ("is down", &|pod, node| drop(node.namespace.ip(&format!("link set {} down", pod.device())))),
        ("is not there", &|pod, node| drop(node.namespace.ip(&format!("link del {}", pod.device())))),
    ];
    for (index, (expected, spoil)) in spoil.iter().enumerate() {
        let pod = Sandbox::new(&format!("web-{index}"));
        let result = pod.add(&node);
        let good = pod.check(&node, &result);
        assert!(good.success, "{}", good.output);
        spoil(&pod, &node);
        let bad = pod.check(&node, &result);
        // A pod without its device may have been given up meanwhile, by a look after all pods.
        if expected == &"is not there" && bad.code() == 3 {
            continue;
        }
        assert_eq!(bad.code(), 100, "{expected}");
        assert!(bad.message().contains(expected), "{expected}: {}", bad.message());
        pod.del(&node);
    }
    let pod = Sandbox::new("web-9");
    let result = pod.add(&node);
    assert_eq!(pod.command("CHECK").run(&node.config()).code(), 7, "prevResult is missing");
    node.control().set(|control| control.serves_nothing = true);
    let answer = pod.check(&node, &result);
    assert_eq!(answer.code(), 100);
    assert!(answer.message().contains("does not serve"), "{}", answer.message());
    node.control().set(|control| control.serves_nothing = false);
    for (path, value) in [("ips", json!([])), ("interfaces", json!([]))] {
        let mut other = result.clone();
        other[path] = value;
        assert_eq!(pod.check(&node, &other).code(), 100);
    }
    for nonsense in [json!(7), json!({"ips": 7}), json!({"ips": [7]}), json!({"ips": [{"address": "x/y"}]})] {
        assert_eq!(pod.check(&node, &nonsense).code(), 7, "{nonsense}");
    }
    pod.del(&node);
    assert_eq!(pod.check(&node, &result).code(), 3, "weir has made no such thing");
}
