//! Random small clusters as manifests: two nodes, two namespaces, pods of few labels, and network policies of all kinds.

use std::{fmt::Write as _, fs, path::Path};

use proptest::{collection::vec, option, prelude::*, sample::select};
use weir_cluster::{
    policy::matrix::Port,
    translate::{self, Loaded},
};

pub const NODES: [&str; 2] = ["n1", "n2"];

/// Manifests.
#[derive(Clone, Debug)]
pub struct Cluster {
    manifests: String,
}

impl Cluster {
    pub const PODS: usize = 8;

    /// Loads it as each node does.
    pub fn write(&self, folder: &Path) -> Vec<(&'static str, Loaded)> {
        fs::write(folder.join("cluster.yaml"), &self.manifests).unwrap();
        let load = |node: &'static str| {
            let config = folder.join(format!("{node}.yaml"));
            fs::write(&config, format!("nodeName: {node}\nmanifests: [cluster.yaml]\n")).unwrap();
            let loaded = translate::load_strictly(&config);
            (node, loaded.unwrap_or_else(|problems| panic!("{}\n{}", problems.render(false), self.manifests)))
        };
        NODES.map(load).into()
    }
}

fn app() -> impl Strategy<Value = &'static str> {
    select(vec!["x", "y"])
}

/// Pod `number`: its manifest.
fn pod(number: usize) -> impl Strategy<Value = String> {
    let port =
        select(vec!["", "{containerPort: 80, name: web}", "{containerPort: 53, protocol: UDP}, {containerPort: 80}"]);
    (app(), select(vec!["a", "b"]), select(NODES.to_vec()), port, 1..4_u8).prop_map(
        move |(app, namespace, node, ports, families)| {
            let v4 = (families & 1 != 0).then(|| format!("{{ip: 10.0.0.{}}}", number + 1));
            let v6 = (families & 2 != 0).then(|| format!("{{ip: \"fd00::{}\"}}", number + 1));
            let addresses: Vec<String> = [v4, v6].into_iter().flatten().collect();
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{number}, namespace: {namespace}, labels: {{app: {app}}}}}\n\
                 spec: {{nodeName: {node}, containers: [{{name: c, ports: [{ports}]}}]}}\n\
                 status: {{podIPs: [{}]}}\n---\n",
                addresses.join(", ")
            )
        },
    )
}

fn peer() -> impl Strategy<Value = String> {
    let block = select(vec![
        "{ipBlock: {cidr: 10.0.0.0/29}}",
        "{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.4/30]}}",
        "{ipBlock: {cidr: \"fd00::/126\"}}",
    ]);
    let selector = || app().prop_map(|app| format!("{{matchLabels: {{app: {app}}}}}"));
    let namespace =
        select(vec!["{}", "{matchLabels: {team: b}}", "{matchExpressions: [{key: team, operator: DoesNotExist}]}"]);
    prop_oneof![
        block.prop_map(str::to_owned),
        selector().prop_map(|pods| format!("{{podSelector: {pods}}}")),
        (option::of(selector()), namespace).prop_map(|(pods, namespaces)| match pods {
            Some(pods) => format!("{{namespaceSelector: {namespaces}, podSelector: {pods}}}"),
            None => format!("{{namespaceSelector: {namespaces}}}"),
        }),
    ]
}

fn rule(peers: &'static str) -> impl Strategy<Value = String> {
    let port =
        select(vec!["{port: 80}", "{port: web}", "{protocol: UDP}", "{port: 50, endPort: 90}", "{protocol: SCTP}"]);
    (vec(peer(), 0..3), vec(port, 0..3))
        .prop_map(move |(list, ports)| format!("{{{peers}: [{}], ports: [{}]}}", list.join(", "), ports.join(", ")))
}

/// Policy `number`: its manifest.
fn policy(number: usize) -> impl Strategy<Value = String> {
    let types = select(vec!["", "policyTypes: [Ingress]", "policyTypes: [Egress]", "policyTypes: [Ingress, Egress]"]);
    let selector = prop_oneof![
        Just("{}".to_owned()),
        app().prop_map(|app| format!("{{matchLabels: {{app: {app}}}}}")),
        app().prop_map(|app| format!("{{matchExpressions: [{{key: app, operator: NotIn, values: [{app}]}}]}}")),
    ];
    (select(vec!["a", "b"]), selector, types, vec(rule("from"), 0..3), vec(rule("to"), 0..3)).prop_map(
        move |(namespace, selector, types, ingress, egress)| {
            let mut spec = format!("  podSelector: {selector}\n  {types}\n");
            for (name, rules) in [("ingress", ingress), ("egress", egress)] {
                if !rules.is_empty() {
                    let _ = writeln!(spec, "  {name}: [{}]", rules.join(", "));
                }
            }
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                 metadata: {{name: q{number}, namespace: {namespace}}}\nspec:\n{spec}---\n"
            )
        },
    )
}

fn calico_entity() -> impl Strategy<Value = String> {
    let selector = select(vec!["", "selector: app == 'x'", "notSelector: app == 'y'", "selector: all()"]);
    let nets = select(vec!["", "nets: [10.0.0.0/29]", "notNets: [10.0.0.4/30]", "namespaceSelector: team == 'b'"]);
    (selector, nets).prop_map(|(selector, nets)| {
        let parts = [selector, nets].into_iter().filter(|part| !part.is_empty());
        parts.collect::<Vec<_>>().join(", ")
    })
}

fn calico_rule() -> impl Strategy<Value = String> {
    let action = select(vec!["Allow", "Deny", "Pass", "Log"]);
    let what = select(vec!["", "protocol: TCP, ", "protocol: UDP, ", "notProtocol: TCP, ", "ipVersion: 4, "]);
    (action, what, calico_entity(), calico_entity()).prop_map(|(action, what, source, destination)| {
        format!("{{action: {action}, {what}source: {{{source}}}, destination: {{{destination}}}}}")
    })
}

/// Calico's policy `number`, in the default tier or one before it, staged or not: its manifest.
fn calico_policy(number: usize) -> impl Strategy<Value = String> {
    let kind = select(vec!["GlobalNetworkPolicy", "StagedGlobalNetworkPolicy"]);
    let types = select(vec!["[Ingress]", "[Egress]", "[Ingress, Egress]"]);
    let selector = select(vec!["all()", "app == 'x'", "has(team) || app == 'y'"]);
    let tier = select(vec!["default", "first"]);
    (kind, tier, selector, types, 0..4_u8, vec(calico_rule(), 0..3)).prop_map(
        move |(kind, tier, selector, types, order, rules)| {
            let lists = ["Ingress", "Egress"].iter().filter(|direction| types.contains(*direction));
            let lists: String =
                lists.map(|direction| format!(", {}: [{}]", direction.to_lowercase(), rules.join(", "))).collect();
            format!(
                "apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: {tier}.g{number}}}\n\
                 spec: {{tier: {tier}, order: {order}, selector: \"{selector}\", types: {types}{lists}}}\n---\n"
            )
        },
    )
}

pub fn cluster() -> impl Strategy<Value = Cluster> {
    let fixed = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\n\
                 apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n---\n\
                 apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n\
                 apiVersion: v1\nkind: Namespace\nmetadata: {name: b, labels: {team: b}}\n---\n\
                 apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: first}\nspec: {order: 1}\n---\n";
    let pods = (0..Cluster::PODS).map(pod).collect::<Vec<_>>();
    let policies = (0..4).map(|number| option::of(policy(number))).collect::<Vec<_>>();
    let calico = (0..4).map(|number| option::of(calico_policy(number))).collect::<Vec<_>>();
    (pods, policies, calico).prop_map(move |(pods, policies, calico)| {
        let policies: String = policies.into_iter().chain(calico).flatten().collect();
        Cluster { manifests: format!("{fixed}{}{policies}", pods.concat()) }
    })
}

/// Ports to ask about; none: the destinations' own.
pub fn ports() -> impl Strategy<Value = Vec<Port>> {
    let port = select(vec!["tcp/80", "udp/53", "sctp/9", "tcp/91", "icmp"]);
    vec(port.prop_map(|port| port.parse().unwrap()), 0..3)
}
