//! What `weir policy list` says of the demo's pods, read off its policies by hand, and that a hit shows at the rule that decided.

use std::{path::Path, process::Command};

use proptest::prelude::*;
use serde_json::{Value, json};
use weir::policy::page;
use weir_cluster::{
    policy::listing::{self, Hits, Listed, Lister, Listing, Side},
    translate::{self, Loaded},
};
use weir_packet::{FlowKey, Ports, Protocol};
use weir_policy::{Classifier, PolicyDirection, RuleOrigin};

use crate::random;

/// What `weir policy list` prints for the demo, where no router runs.
fn weir(arguments: &[&str]) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo");
    for file in ["cluster.yaml", "policies.yaml"] {
        std::fs::copy(demo.join(file), folder.path().join(file)).unwrap();
    }
    // The demo's node under a name that no router of this machine has.
    let config = std::fs::read_to_string(demo.join("node-a.yaml")).unwrap();
    let cluster = std::fs::read_to_string(demo.join("cluster.yaml")).unwrap();
    let name = "node-of-policy-list";
    std::fs::write(folder.path().join("weir.yaml"), config.replace("node-a", name)).unwrap();
    std::fs::write(folder.path().join("cluster.yaml"), cluster.replace("node-a", name)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .current_dir(folder.path())
        .args(["policy", "list"])
        .args(arguments)
        .output()
        .unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{err}");
    (out.replace(name, "node-a"), err)
}

#[test]
fn the_endpoints_of_the_demos_node() {
    let expected = "\
ENDPOINT          ADDRESS     INGRESS                EGRESS
db/db-server-0    10.1.1.30   1 policy, shared by 2  1 policy, shared by 2
db/db-test-pod    10.1.1.35   1 policy, shared by 2  1 policy, shared by 2
default/client    10.1.1.194  profiles only          profiles only
web/web-server-0  10.1.1.10   1 policy, shared by 2  1 policy, shared by 2
web/web-test-pod  10.1.1.15   1 policy, shared by 2  1 policy, shared by 2

5 endpoints of this node share 3 programs for ingress and 3 for egress.
";
    assert_eq!(weir(&[]), (expected.to_owned(), String::new()));
}

#[test]
fn what_applies_to_a_pod_of_the_demo() {
    let expected = "\
web/web-test-pod, 10.1.1.15, on node-a, which is this node

ingress: what arrives
  tier default, order 1000000
    NetworkPolicy/web/web-policy, order 1000, policies.yaml:1
      1  allow tcp port 80 from pods of namespaces with name == 'was'
    end: deny what none of these decided
  profiles: not reached

egress: what it sends
  tier default, order 1000000
    NetworkPolicy/web/web-policy, order 1000, policies.yaml:1
      1  allow tcp port 8080 to pods of namespaces with name == 'was'
      2  allow udp port 53, tcp port 53 to pods of any namespace
    end: deny what none of these decided
  profiles: not reached
";
    let (out, err) = weir(&["web/web-test-pod"]);
    assert_eq!(out, expected);
    assert!(err.contains("hits are not shown: no router answers"), "{err}");

    // A pod of another node, and one without any policy, as JSON.
    let (out, _) = weir(&["was/was-test-pod", "--output", "json"]);
    let value: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&value["node"], &value["local"]), (&json!("node-b"), &json!(false)));
    let policies = &value["ingress"]["tiers"][0]["policies"];
    assert_eq!(
        policies,
        &json!([{
            "name": "NetworkPolicy/was/was-policy", "order": 1000.0, "at": "policies.yaml:37", "staged": false,
            "selects": "pods of namespace was",
            "rules": [
                {"rule": 1, "words": "allow tcp port 8080 from pods of namespaces with name == 'web'"},
                {"rule": 2, "words": "allow tcp port 8080 from pods of namespaces with name == 'db'"},
            ],
        }])
    );
    let (out, _) = weir(&["default/client", "--output", "json"]);
    let value: Value = serde_json::from_str(&out).unwrap();
    let open = json!({
        "tiers": [], "profilesReached": true,
        "profiles": [
            {"name": "kns.default", "staged": false, "rules": [{"rule": 1, "words": "allow everything"}]},
            {"name": "ksa.default.default", "staged": false, "rules": []},
        ],
    });
    assert_eq!((&value["ingress"], &value["egress"]), (&open, &open));
}

fn demo() -> Loaded {
    translate::load_strictly(&Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo/node-a.yaml")).unwrap()
}

fn workload(lister: &Lister<'_>, name: &str) -> Listing {
    match lister.endpoint(name).unwrap() {
        Listed::Workload(listing) => listing,
        Listed::HostEndpoint(_) => panic!("{name} is a host endpoint"),
    }
}

/// With one hit at everything that can decide, each rule has as many as it has parts.
#[test]
fn hits_stand_beside_their_rules() {
    let loaded = demo();
    let classifier = Classifier::compile(&loaded.policy).unwrap();
    let identities = classifier.rules().map(|rule| classifier.describe(rule).identity());
    let hits: Hits = identities.map(|identity| (identity, 1)).collect();
    let text = page::text(&Lister::new(&loaded, Some(&hits)).endpoint("web/web-test-pod").unwrap());
    let egress = text.split("egress: what it sends\n").nth(1).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo/policies.yaml");
    let expected = format!(
        "             tier default, order 1000000
               NetworkPolicy/web/web-policy, order 1000, {}:1
        1        1  allow tcp port 8080 to pods of namespaces with name == 'was'
        2        2  allow udp port 53, tcp port 53 to pods of any namespace
        1      end: deny what none of these decided
             profiles: not reached
",
        file.display()
    );
    assert_eq!(egress, expected);
    // This node decides nothing about another node's pod.
    let elsewhere = workload(&Lister::new(&loaded, Some(&hits)), "was/was-server-0");
    assert_eq!(hits_of(&elsewhere.ingress), []);
}

/// Tiers by order, policies by order within them (staged ones where they would stand), then the profiles that a pass leads to.
#[test]
fn calicos_kinds_in_the_order_of_evaluation() {
    const MANIFESTS: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {nodeName: n1, containers: [{name: c, ports: [{containerPort: 80}]}]}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: own, namespace: shop}
spec: {selector: app == 'api', order: 20, types: [Egress], egress: [{action: Allow, protocol: UDP, destination: {ports: [53]}}]}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: security}
spec: {order: 100}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: security.gate}
spec:
  tier: security
  order: 10
  selector: has(app)
  types: [Ingress]
  ingress:
  - {action: Deny, protocol: TCP, destination: {ports: [22, 8000:8010]}}
  - {action: Pass, source: {selector: trusted == 'yes', notNets: [10.9.0.0/16]}}
---
apiVersion: projectcalico.org/v3
kind: StagedGlobalNetworkPolicy
metadata: {name: security.tomorrow}
spec: {tier: security, order: 5, types: [Ingress], ingress: [{action: Deny}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: before-dnat}
spec: {preDNAT: true, applyOnForward: true, order: 1, types: [Ingress], ingress: [{action: Deny, source: {nets: [192.0.2.0/24]}}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: gateway}
spec: {applyOnForward: true, order: 2, selector: role == 'gateway', types: [Egress], egress: [{action: Allow}]}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: uplink, labels: {role: gateway}}
spec: {node: n1, interfaceName: eth0, expectedIPs: [192.168.10.1]}
";
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("all.yaml"), MANIFESTS).unwrap();
    std::fs::write(folder.path().join("weir.yaml"), "nodeName: n1\nmanifests: [all.yaml]\n").unwrap();
    let loaded =
        translate::load_strictly(&folder.path().join("weir.yaml")).unwrap_or_else(|p| panic!("{}", p.render(false)));
    let lister = Lister::new(&loaded, None);
    let file = folder.path().join("all.yaml").display().to_string();
    let expected = "\
shop/api, 10.0.0.1, on n1, which is this node

ingress: what arrives
  tier security, order 100
    StagedGlobalNetworkPolicy/security.tomorrow, order 5, staged: not enforced, FILE:29
      1  deny everything
    GlobalNetworkPolicy/security.gate, order 10, FILE:17
      1  deny tcp ports 22, 8000-8010
      2  pass to the next tier everything from endpoints with trusted == 'yes', but not 10.9.0.0/16
    end: deny what none of these decided
  profiles
    kns.shop
      1  allow everything
    ksa.shop.default
      no rules
    end: deny

egress: what it sends
  tier default, order 1000000
    NetworkPolicy/shop/own, order 20, FILE:7
      1  allow udp port 53
    end: deny what none of these decided
  profiles: not reached
";
    let text = page::text(&lister.endpoint("shop/api").unwrap()).replace(&file, "FILE");
    assert_eq!(text, expected);
    let overview = lister.overview();
    let counts = |counted: &listing::Counted| (counted.policies, counted.staged, counted.shared_by);
    let [line] = &overview.endpoints[..] else { panic!("one endpoint") };
    assert_eq!(overview.host_endpoints, ["uplink"]);
    assert_eq!((counts(&line.ingress), counts(&line.egress)), ((1, 1, 1), (1, 0, 1)));

    // Policy before DNAT ends no tier, the gateway's does for what is forwarded; the staged one selects the host endpoint too.
    let expected = "\
host endpoint uplink, 192.168.10.1, of this node
failsafe ports come first: FelixConfiguration names them, or Calico's defaults hold

untracked: each packet, before connections are looked up
  no policy applies: all go on

before DNAT: first packets, as they arrive, before services are translated
ingress: what arrives
  tier default, order 1000000
    GlobalNetworkPolicy/before-dnat, order 1, FILE:34
      1  deny everything from 192.0.2.0/24
    end: pass to the next tier
  what no tier decided goes on

forwarded: first packets that go on to another endpoint
egress: what it sends
  tier default, order 1000000
    GlobalNetworkPolicy/gateway, order 2, FILE:39
      1  allow everything
    end: deny what none of these decided
  what no tier decided goes on

local: first packets to or from the node itself
ingress: what arrives
  tier security, order 100
    StagedGlobalNetworkPolicy/security.tomorrow, order 5, staged: not enforced, FILE:29
      1  deny everything
    end: nothing is enforced here
  profiles
    end: deny
egress: what it sends
  tier default, order 1000000
    GlobalNetworkPolicy/gateway, order 2, FILE:39
      1  allow everything
    end: deny what none of these decided
  profiles: not reached
";
    let text = page::text(&lister.endpoint("uplink").unwrap()).replace(&file, "FILE");
    assert_eq!(text, expected);
}

/// Where hits stand that are not zero: who has them, and how many.
fn hits_of(side: &Side) -> Vec<(String, u64)> {
    let of_policy = |policy: &listing::ListedPolicy, kind: &str| {
        let name = format!("{kind}{}", policy.name);
        policy.rules.iter().map(|rule| (format!("{name} rule {}", rule.rule), rule.hits)).collect::<Vec<_>>()
    };
    let mut hits = Vec::new();
    for tier in &side.tiers {
        hits.extend(tier.policies.iter().flat_map(|policy| of_policy(policy, "")));
        hits.push((format!("end of {}", tier.tier), tier.end_hits));
    }
    hits.extend(side.profiles.iter().flat_map(|profile| of_policy(profile, "profile ")));
    hits.push(("no profile".to_owned(), side.no_profile_hits));
    hits.into_iter().filter_map(|(name, hits)| Some((name, hits.filter(|hits| *hits > 0)?))).collect()
}

fn name(origin: &RuleOrigin<'_>) -> String {
    match origin {
        RuleOrigin::Policy { name, rule, .. } => format!("{name} rule {rule}"),
        RuleOrigin::TierEnd { tier, .. } => format!("end of {tier}"),
        RuleOrigin::Profile { name, definition, .. } => format!("profile {name} rule {}", definition.number),
        RuleOrigin::NoProfile => "no profile".to_owned(),
        RuleOrigin::Undecided => unreachable!("what host endpoints leave undecided is never a verdict"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_hit_shows_at_the_rule_that_decided(cluster in random::cluster(), dport in proptest::sample::select(vec![53, 80, 91])) {
        let folder = tempfile::tempdir().unwrap();
        let loaded = cluster.write(folder.path()).swap_remove(0).1;
        let classifier = Classifier::compile(&loaded.policy).unwrap();
        for (endpoint, endpoint_name) in classifier.endpoints() {
            for direction in PolicyDirection::ALL {
                for other in 1..=random::Cluster::PODS as u8 {
                    let own = loaded.policy.endpoints.iter().find(|e| e.name == endpoint_name).unwrap();
                    let Some(std::net::IpAddr::V4(own)) = own.nets.first().map(|net| net.addr()) else { continue };
                    let other = std::net::Ipv4Addr::new(10, 0, 0, other);
                    let [src, dst] = if direction == PolicyDirection::Egress { [own, other] } else { [other, own] };
                    let key = FlowKey { src, dst, ports: Ports::new(1, dport), protocol: Protocol::TCP };
                    let origin = classifier.describe(classifier.judge(endpoint, direction, &key).rule);
                    let hits: Hits = [(origin.identity(), 1)].into();
                    let listing = workload(&Lister::new(&loaded, Some(&hits)), endpoint_name);
                    let sides = [(PolicyDirection::Ingress, &listing.ingress), (PolicyDirection::Egress, &listing.egress)];
                    for (listed, side) in sides {
                        // Ends and the lack of a profile are alike for both directions where the same policies apply.
                        let is_rule = matches!(origin, RuleOrigin::Policy { .. } | RuleOrigin::Profile { .. });
                        if listed == direction {
                            prop_assert_eq!(hits_of(side), [(name(&origin), 1)]);
                        } else if is_rule {
                            prop_assert_eq!(hits_of(side), []);
                        }
                    }
                }
            }
        }
    }
}
