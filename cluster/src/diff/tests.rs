//! The comparison beside a dull twin that asks every pair, with classifiers that know nothing of each other.

use std::{collections::BTreeSet, fs, net::IpAddr};

use proptest::prelude::*;
use weir_packet::{Address, FlowKey};
use weir_policy::{Classifier, PolicyDirection};

use super::{policy::Question, services::What};
use crate::{
    policy::matrix::{self, Port, Probe},
    translate::{Loaded, Loader},
};

const NODES: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDR: 10.1.0.0/24}\n";
const OUTSIDE: &str = "anywhere else (IPv4)";
const UNNAMED: &str = "203.0.113.7";

/// A load of a cluster, and one with changes over it.
fn both(cluster: &str, changed: &str, deletes: bool) -> (Loaded, Loaded) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("weir.yaml"), "nodeName: node-a\nmanifests: [cluster.yaml]\n").unwrap();
    fs::write(path("cluster.yaml"), format!("{NODES}{cluster}")).unwrap();
    fs::write(path("changed.yaml"), changed).unwrap();
    let mut loader = Loader::new(&path("weir.yaml"));
    let (before, wrong) = loader.load().unwrap_or_else(|problems| panic!("{problems}"));
    assert!(wrong.is_none(), "{wrong:?}");
    loader.lay_over(vec![path("changed.yaml")], deletes);
    let (after, _) = loader.reload(&before.objects).unwrap_or_else(|problems| panic!("{problems}"));
    (before, after)
}

/// "FROM > TO PORT" of each connection that could be opened on one side only, by asking all.
fn asked_all(before: &Loaded, after: &Loaded) -> BTreeSet<String> {
    let classifiers =
        [before, after].map(|loaded| Classifier::compile(&matrix::with_all_local(&loaded.policy)).unwrap());
    let allowed = |side: usize, from: (&str, IpAddr), to: (&str, IpAddr), port: Port| {
        let classifier = &classifiers[side];
        let (protocol, ports) = Probe { port, version: 4 }.on_the_wire();
        let [IpAddr::V4(src), IpAddr::V4(dst)] = [from.1, to.1] else { unreachable!("IPv4 alone") };
        let key = FlowKey { src, dst, ports, protocol };
        let end = |name: &str, direction| {
            classifier.endpoint(name).is_none_or(|endpoint| judge(classifier, endpoint, direction, &key))
        };
        end(from.0, PolicyDirection::Egress) && end(to.0, PolicyDirection::Ingress)
    };
    fn judge<A: Address>(
        classifier: &Classifier,
        endpoint: weir_policy::EndpointId,
        direction: PolicyDirection,
        key: &FlowKey<A>,
    ) -> bool {
        classifier.judge(endpoint, direction, key).allow
    }
    let pods: Vec<(&str, IpAddr)> =
        before.cluster.workloads.iter().map(|pod| (pod.name.as_str(), pod.addresses[0])).collect();
    let outside = (OUTSIDE, UNNAMED.parse().unwrap());
    let ends: Vec<_> = pods.iter().copied().chain([outside]).collect();
    let published = before.published_ports();
    let mut found = BTreeSet::new();
    for from in &ends {
        for to in pods.iter().filter(|to| *to != from) {
            for port in matrix::ports_of(to.0, &published, &[]) {
                if allowed(0, *from, *to, port) != allowed(1, *from, *to, port) {
                    found.insert(format!("{} > {} {port}", from.0, to.0));
                }
            }
        }
    }
    found
}

/// The same of the comparison.
fn compared(before: &Loaded, after: &Loaded) -> BTreeSet<String> {
    let diff = super::policy::policy(before, after, &Question::default()).unwrap();
    let mut found = BTreeSet::new();
    for change in &diff.changes {
        for from in change.from.iter().filter(|name| name.contains('/') && !name.contains('.') || *name == OUTSIDE) {
            for to in change.to.iter().filter(|to| *to != from && to.starts_with('n')) {
                found.extend(change.ports.iter().map(|port| format!("{from} > {to} {port}")));
            }
        }
    }
    found
}

/// Pods of two namespaces with few labels, on ports of their own.
fn pods() -> impl Strategy<Value = String> {
    prop::collection::vec((0..2_u8, 0..3_u8, 0..2_u8, 0..3_u16), 3..9).prop_map(|pods| {
        let pod = |(number, (namespace, app, tier, port)): (usize, (u8, u8, u8, u16))| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{number}, namespace: n{namespace}, labels: {{app: a{app}, tier: t{tier}}}}}\nspec: \
                 {{nodeName: node-{}, containers: [{{ports: [{{name: web, containerPort: {}}}]}}]}}\nstatus: {{podIP: 10.1.0.{}}}\n",
                if number % 2 == 0 { "a" } else { "b" },
                8080 + port,
                10 + number
            )
        };
        pods.into_iter().enumerate().map(pod).collect()
    })
}

fn peer() -> impl Strategy<Value = String> {
    prop_oneof![
        (0..3_u8).prop_map(|app| format!("{{podSelector: {{matchLabels: {{app: a{app}}}}}}}")),
        (0..2_u8)
            .prop_map(|tier| format!("{{namespaceSelector: {{}}, podSelector: {{matchLabels: {{tier: t{tier}}}}}}}")),
        (0..3_u8).prop_map(|block| format!("{{ipBlock: {{cidr: 10.1.0.{}/30}}}}", 8 + 4 * block)),
        Just("{ipBlock: {cidr: 0.0.0.0/0, except: [10.1.0.8/30]}}".to_owned()),
    ]
}

fn rules() -> impl Strategy<Value = String> {
    let port = prop_oneof![
        Just(String::new()),
        (0..3_u16).prop_map(|port| format!("{{port: {}}}", 8080 + port)),
        Just("{port: web}".to_owned())
    ];
    let rule = |side: &'static str| {
        (prop::collection::vec(peer(), 0..3), port.clone()).prop_map(move |(peers, port)| {
            let peers = if peers.is_empty() { String::new() } else { format!("{side}: [{}], ", peers.join(", ")) };
            format!("{{{peers}ports: [{port}]}}")
        })
    };
    (prop::collection::vec(rule("from"), 0..3), prop::collection::vec(rule("to"), 0..3), 1..4_u8).prop_map(
        |(ingress, egress, types)| {
            let types = [("Ingress", 1), ("Egress", 2)].into_iter().filter(|(_, bit)| types & bit != 0);
            let types: Vec<_> = types.map(|(name, _)| name).collect();
            let all = format!(
                "policyTypes: [{}], ingress: [{}], egress: [{}]",
                types.join(", "),
                ingress.join(", "),
                egress.join(", ")
            );
            if types.contains(&"Egress") { all } else { all.replace(&format!(", egress: [{}]", egress.join(", ")), "") }
        },
    )
}

/// Policies by a few names, so that changes meet what is there.
fn policies(count: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    prop::collection::vec(((0..2_u8, 0..3_u8), prop::option::of(0..3_u8), rules()), count).prop_map(|policies| {
        let mut seen = BTreeSet::new();
        let policy = |((namespace, name), app, rules): ((u8, u8), Option<u8>, String)| {
            let selector = app.map_or(String::new(), |app| format!("matchLabels: {{app: a{app}}}"));
            seen.insert((namespace, name)).then(|| {
                format!(
                    "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: q{name}, namespace: n{namespace}}}\nspec: \
                     {{podSelector: {{{selector}}}, {rules}}}\n"
                )
            })
        };
        policies.into_iter().filter_map(policy).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn classes_find_what_asking_every_pair_finds(
        (pods, before, changed, deletes) in (pods(), policies(0..5), policies(1..4), any::<bool>())
    ) {
        let changed = changed.replace("ports: [], ", "");
        let (before, after) = both(&format!("{pods}{before}"), &changed, deletes);
        prop_assert_eq!(compared(&before, &after), asked_all(&before, &after));
    }
}

#[test]
fn an_object_takes_the_place_of_the_one_with_its_name_or_goes() {
    let service = |port: u16| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: n0}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
        )
    };
    let slice = |address: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-1, namespace: n0, labels: \
             {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nendpoints: [{{addresses: [{address}]}}]\nports: [{{port: 8080}}]\n"
        )
    };
    let cluster = service(80) + &slice("10.1.0.10");
    let (before, after) = both(&cluster, &(service(81) + &slice("10.1.0.11")), false);
    let changes = super::services::services(&before.services, &after.services);
    let What::Changed { fields, backends_added, backends_removed, backends } = &changes[0].what else {
        panic!("{changes:?}")
    };
    assert_eq!(fields, &[("port", "80".to_owned(), "81".to_owned())]);
    assert_eq!(
        (backends_added.concat(), backends_removed.concat(), *backends),
        ("10.1.0.11:8080".into(), "10.1.0.10:8080".into(), 1)
    );
    let (before, after) = both(&cluster, &service(99), true);
    let changes = super::services::services(&before.services, &after.services);
    assert_eq!((changes.len(), &changes[0].what), (1, &What::Removed));
    let (before, after) = both(&cluster, &cluster, false);
    assert_eq!(super::services::services(&before.services, &after.services), []);
    // A change that cannot be read leaves what is there, and is told.
    let (before, after) = both(&cluster, &service(80).replace("10.96.0.1", "nonsense"), false);
    assert_eq!(super::services::services(&before.services, &after.services), []);
    assert_eq!(after.faulty.len(), 1);
    drop(before);
}
