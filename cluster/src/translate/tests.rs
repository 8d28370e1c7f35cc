//! Whole configurations: what is said about faulty ones, to the letter, and what valid ones become.

use std::{collections::BTreeMap, fs, path::Path};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_dataplane::model::TunnelMode;
use weir_nat::TrafficPolicy;
use weir_packet::Protocol;
use weir_policy::{
    Selector,
    model::{Peer, PortMatch},
};

use super::*;
use crate::text::Source;

mod announced;
mod assume;
mod host;
mod host_ports;
mod lints;
mod live;
mod local_pods;
mod policy;
mod ranges;
mod review;
mod services;
mod start;

const WEIR: &str = "nodeName: node-a\nmanifests: [cluster.yaml]\n";

/// Loads texts without a disk, as [`load`] does files.
fn load_texts(weir: &str, cluster: &str) -> Result<Loaded, Problems> {
    read_texts(weir, cluster, false)
}

/// The same, with pods that the CNI plugin has made.
fn load_with_pods(cluster: &str, pods: &[LocalPod]) -> Result<Loaded, Problems> {
    let mut all = LocalPods::default();
    pods.iter().for_each(|pod| all.insert(Arc::new(pod.clone())));
    read_all(WEIR, cluster, &Arc::new(all), false)
}

/// The same, perhaps as `weir check` does.
fn read_texts(weir: &str, cluster: &str, reviews: bool) -> Result<Loaded, Problems> {
    read_all(weir, cluster, &Arc::default(), reviews)
}

fn read_all(weir: &str, cluster: &str, pods: &Arc<LocalPods>, reviews: bool) -> Result<Loaded, Problems> {
    let mut problems = Problems::default();
    let file = problems.add_source(Source::new("weir.yaml", weir.to_owned()));
    let Some((config, _)) = RouterConfig::from_source(file, Path::new(""), &mut problems) else {
        problems.sort();
        return Err(problems);
    };
    let mut texts = Texts::default();
    Library::default().add_text("cluster.yaml", cluster.to_owned(), &mut texts, &mut problems);
    let (config, is_sound) = (Arc::new(config), !problems.has_errors());
    let manifests = Manifests::of(texts.pieces(), &BTreeMap::new(), &mut Chunks::default(), &mut problems);
    let outcome = translate(Arc::clone(&config), &Arc::new(manifests), pods, &mut Kept::default(), reviews, problems);
    if is_sound {
        live::compare(&config, cluster, pods, &outcome);
    }
    outcome
}

/// "place: severity: message [help]" of everything that is said.
fn said(weir: &str, cluster: &str) -> Vec<String> {
    lines_of(&load_texts(weir, cluster))
}

fn lines_of(outcome: &Result<Loaded, Problems>) -> Vec<String> {
    let problems = match outcome {
        Ok(loaded) => &loaded.notes,
        Err(problems) => problems,
    };
    // Whatever is found can be printed.
    let _ = problems.render(true);
    let line = |json: crate::text::problem::JsonDiagnostic| {
        let severity = format!("{:?}", json.severity).to_lowercase();
        let help = json.help.map_or(String::new(), |help| format!(" [{help}]"));
        format!("{}:{}:{}: {severity}: {}{help}", json.file, json.line, json.column, json.message)
    };
    problems.to_json().into_iter().map(line).collect()
}

fn loaded(weir: &str, cluster: &str) -> Loaded {
    load_texts(weir, cluster).unwrap_or_else(|problems| panic!("{problems}"))
}

#[track_caller]
fn assert_said(weir: &str, cluster: &str, expected: &[&str]) {
    let said = said(weir, cluster);
    assert!(said == expected, "said:\n{}\nexpected:\n{}", said.join("\n"), expected.join("\n"));
}

/// A policy whose spec is given, from line 5 on, indented by two.
fn policy(spec: &str) -> String {
    let head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: x}\nspec:\n";
    head.to_owned() + &indent(spec)
}

/// A service whose spec is given, from line 5 on, indented by two.
fn service(spec: &str) -> String {
    "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: x}\nspec:\n".to_owned() + &indent(spec)
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[test]
fn faults_of_weir_yaml() {
    let cases: &[(&str, &[&str])] = &[
        ("", &["weir.yaml:1:1: error: weir.yaml is empty [the least is:\nnodeName: NAME\nmanifests: [cluster.yaml]]"]),
        (
            "nodename: a\nmanifest: []\n",
            &[
                "weir.yaml:1:1: error: unknown field nodename [did you mean nodeName?]",
                "weir.yaml:1:1: error: nodeName is missing [add: nodeName: NAME, this node's name in the manifests]",
                "weir.yaml:1:1: error: manifests is missing [add: manifests: [cluster.yaml], the files that describe \
                 the cluster]",
                "weir.yaml:2:1: error: unknown field manifest [did you mean manifests?]",
            ],
        ),
        (
            "nodeName: ../a\nmanifests: []\n",
            &["weir.yaml:1:11: error: \"../a\" is no node's name [write the name that `kubectl get nodes` shows]"],
        ),
        (
            "nodeName: a\nmanifests: cluster.yaml\n",
            &["weir.yaml:2:12: error: manifests: expected a list, found the string \"cluster.yaml\""],
        ),
        (
            "nodeName: 7\nmanifests: []\nworkers: {cores: [1, 1], burst: 65, mode: lazy}\n",
            &[
                "weir.yaml:1:11: error: nodeName: expected a string, found the number 7 [put the value in quotes]",
                "weir.yaml:3:22: error: core 1 is given twice [two workers on one core would only take turns]",
                "weir.yaml:3:33: error: workers.burst is 65: a burst is 1 to 64 packets",
                "weir.yaml:3:43: error: workers.mode: \"lazy\" is none of: busy, adaptive",
            ],
        ),
        (
            "nodeName: a\nmanifests: []\npodCIDRs: [10.0.0.0/33, 10.0.0.1, x/8]\nsnat: {portRange: 9-8}\n",
            &[
                "weir.yaml:3:12: error: podCIDRs[0]: \"10.0.0.0/33\" has a prefix length that is not between 0 and 32 \
                 [write a CIDR like 192.0.2.0/24 or 2001:db8::/64]",
                "weir.yaml:3:25: error: podCIDRs[1]: \"10.0.0.1\" is an address, not a CIDR [write 10.0.0.1/32 for \
                 this one address]",
                "weir.yaml:3:35: error: podCIDRs[2]: \"x\" is not an IP address [write an address like 192.0.2.1 or \
                 2001:db8::1]",
                "weir.yaml:4:19: error: snat.portRange: \"9-8\" is not a range of ports [write FIRST-LAST, like \
                 10000-29999, with FIRST from 1 and at most LAST]",
            ],
        ),
        (
            "nodeName: a\nmanifests: []\ndevices:\n- {name: eth0, role: uplnk, mtu: 1500}\n- {name: eth1, role: \
             uplink, mtu: 9217}\n- {name: eth1, role: uplink, mac: x, mut: 2}\n",
            &[
                "weir.yaml:4:22: error: devices[0].role: \"uplnk\" is none of: uplink, workload, host [did you mean \
                 uplink?]",
                "weir.yaml:5:35: error: device eth1 has an MTU of 9217: weir carries at most 9216 [lower it: \
                 ip link set eth1 mtu 9216]",
                "weir.yaml:6:10: error: device eth1 is given twice [keep one]",
                "weir.yaml:6:35: error: devices[2].mac: \"x\" is not a MAC address [a MAC address is six pairs of hex \
                 digits, like 02:00:00:00:00:01]",
                "weir.yaml:6:38: error: unknown field devices[2].mut [did you mean mtu?]",
            ],
        ),
        (
            "nodeName: a\nmanifests: []\nroutes:\n- {to: 0.0.0.0/0, via: '::1', device: eth0}\n- {via: 10.0.0.1}\n\
             conntrack: {maxEntries: 0, tcp_loose: 2, udp_timout: 3}\n",
            &[
                "weir.yaml:4:24: error: ::1 cannot be the next hop to 0.0.0.0/0 [the next hop must be of the \
                 destination's family]",
                "weir.yaml:5:3: error: routes[1]: to is missing",
                "weir.yaml:6:25: error: conntrack.maxEntries is 0: nothing could connect",
                "weir.yaml:6:39: error: conntrack.tcp_loose: invalid value: integer `2`, expected 0, 1, false or true",
                "weir.yaml:6:42: error: unknown field conntrack.udp_timout [did you mean udp_timeout?]",
            ],
        ),
        (
            "nodeName: a\nmanifests: []\nconntrack: {ipfrag_time: 0, nf_conntrack_frag6_timeout: 31}\n",
            &[
                "weir.yaml:3:26: error: conntrack.ipfrag_time: invalid value: integer `0`, expected 1 to 30 seconds",
                "weir.yaml:3:57: error: conntrack.nf_conntrack_frag6_timeout: invalid value: integer `31`, expected 1 to 30 \
                 seconds",
            ],
        ),
        (
            "nodeName: a\nmanifests: []\nmanifests: [x]\nkind: Router\napiVersion: v1\n---\na: 1\n",
            &[
                "weir.yaml:3:1: error: the key \"manifests\" is given twice [remove one of them: which one would count \
                 depends on the reader]",
                "weir.yaml:4:7: error: kind \"Router\" is not a router's configuration [write RouterConfig]",
                "weir.yaml:5:13: error: apiVersion \"v1\" is not known [write weir.dev/v1alpha1]",
                "weir.yaml:7:1: error: weir.yaml holds more than one document [keep the first one only]",
            ],
        ),
    ];
    for (weir, expected) in cases {
        assert_said(weir, "", expected);
    }
}

#[test]
fn a_cni_section_is_given_also_where_it_is_empty() {
    use std::{path::PathBuf, time::Duration};

    use crate::config::{Cni, Ipam};
    assert_eq!(loaded(WEIR, "").config.cni, None);
    let defaults = Cni {
        socket: PathBuf::from("/run/weir/cni.sock"),
        state: PathBuf::from("/var/lib/weir/cni"),
        ipam: Ipam::PodCidr,
        mtu: None,
        patience: Duration::from_secs(5),
        cool_down: Duration::from_secs(60),
    };
    for text in ["cni:\n", "cni: {}\n", "cni: {ipam: podCIDR}\n"] {
        assert_eq!(loaded(&format!("{WEIR}{text}"), "").config.cni.as_ref(), Some(&defaults), "{text}");
    }
    let text = format!("{WEIR}cni: {{socket: s, state: /x, mtu: 1440, patience: 0, coolDown: 86400}}\n");
    let given = loaded(&text, "").config.cni;
    let (socket, state) = (PathBuf::from("s"), PathBuf::from("/x"));
    let (patience, cool_down) = (Duration::ZERO, Duration::from_secs(86_400));
    assert_eq!(given, Some(Cni { socket, state, mtu: Some(1440), patience, cool_down, ..defaults }));
    assert_said(
        &format!(
            "{WEIR}cni:\n  scoket: x\n  ipam: pool\n  mtu: 10000\n  patience: 21\n  socket: ''\n  state: /{}\n  coolDown: 86401\n",
            "x".repeat(200)
        ),
        "",
        &[
            "weir.yaml:4:3: error: unknown field cni.scoket [did you mean socket?]",
            "weir.yaml:5:9: error: cni.ipam: \"pool\" is none of: podCIDR",
            "weir.yaml:6:8: error: cni.mtu is 10000: pods may have 68 to 9216 [leave it out for what fits through the \
             uplinks]",
            "weir.yaml:7:13: error: cni.patience: 21 seconds are longer than a runtime waits [write 0 to 20]",
            "weir.yaml:8:11: error: cni.socket is empty [leave it out for the default]",
            "weir.yaml:10:13: error: cni.coolDown: 86401 seconds are more than a day [write 0 to 86400]",
        ],
    );
    let long = format!("{WEIR}cni: {{socket: /{}}}\n", "x".repeat(107));
    assert_said(
        &long,
        "",
        &["weir.yaml:3:15: error: cni.socket is longer than the 107 bytes of a socket's path [choose a shorter one]"],
    );
}

#[test]
fn an_off_needs_no_quotes() {
    use crate::config::OffloadMode;
    for (text, mode) in [("off", OffloadMode::Off), ("\"off\"", OffloadMode::Off), ("auto", OffloadMode::Auto)] {
        assert_eq!(loaded(&format!("{WEIR}offload: {text}\n"), "").config.offload, mode, "{text}");
    }
    let said = said(&format!("{WEIR}offload: on\n"), "");
    assert_eq!(said, ["weir.yaml:3:10: error: offload: expected one of: off, auto, found the boolean true"]);
}

#[test]
fn faults_of_documents() {
    assert_said(
        WEIR,
        "kind: Pod\n---\n- 1\n---\napiVersion: v1\nkind: Pod\nmetadata: {}\n---\napiVersion: v1\nkind: [Pod]\n",
        &[
            "cluster.yaml:1:1: error: apiVersion is missing [every object begins with apiVersion and kind]",
            "cluster.yaml:3:3: error: expected a Kubernetes object, found the number 1",
            "cluster.yaml:7:1: error: Pod: metadata.name is missing [every object needs a name of its own]",
            "cluster.yaml:10:7: error: kind: expected a string, found a list",
        ],
    );
}

#[test]
fn a_syntax_error_hides_its_own_document_only() {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a\n---\napiVersion: v1\nkind: Namespace\nmetadata: \
                {name: 5}\n---\na:\n\tb: 1\n";
    let said = said(WEIR, text);
    assert_eq!(said.len(), 3, "{said:#?}");
    assert!(said[0].starts_with("cluster.yaml:3:") || said[0].starts_with("cluster.yaml:4:"), "{said:#?}");
    assert!(said[0].contains("this is not valid YAML"), "{said:#?}");
    assert_eq!(
        said[1],
        "cluster.yaml:7:18: error: Namespace: metadata.name: expected a name, found the number 5 [every object \
         needs a name of its own]"
    );
    assert!(said[2].contains("this line begins with a tab"), "{said:#?}");
}

#[test]
fn kinds_outside_the_contract_are_skipped() {
    assert_said(
        WEIR,
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n---\napiVersion: networking.k8s.io/v1\nkind: \
         NetwrkPolicy\n---\napiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy\n---\napiVersion: \
         serving.knative.dev/v1\nkind: Service\n---\napiVersion: extensions/v1beta1\nkind: NetworkPolicy\n",
        &[
            "cluster.yaml:2:7: note: Deployment of apps/v1 is skipped",
            "cluster.yaml:6:7: error: NetwrkPolicy of networking.k8s.io/v1 is not read [write kind: NetworkPolicy]",
            "cluster.yaml:8:13: error: NetworkPolicy of networking.k8s.io/v1beta1 is not read [write apiVersion: \
             networking.k8s.io/v1]",
            "cluster.yaml:12:7: note: Service of serving.knative.dev/v1 is skipped",
            "cluster.yaml:14:13: error: NetworkPolicy of extensions/v1beta1 is not read [write apiVersion: \
             networking.k8s.io/v1]",
        ],
    );
}

#[test]
fn policies_of_other_systems_are_warnings() {
    assert_said(
        WEIR,
        "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {name: a}\n---\napiVersion: \
         cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a}\n",
        &[
            "cluster.yaml:2:7: warning: AdminNetworkPolicy of policy.networking.k8s.io/v1alpha1 is skipped: weir does not \
             enforce this policy [it became ClusterNetworkPolicy of policy.networking.k8s.io/v1beta1: write that]",
            "cluster.yaml:6:7: warning: CiliumNetworkPolicy of cilium.io/v2 is skipped: weir does not enforce this policy \
             [what it denies is not denied here: write it as a NetworkPolicy or a ClusterNetworkPolicy too]",
        ],
    );
}

#[test]
fn duplicates_say_where_the_other_is() {
    let pod = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n---\n";
    assert_said(
        WEIR,
        &pod.repeat(2),
        &["cluster.yaml:9:9: error: Namespace a is defined twice [the other is at cluster.yaml:4:9; keep one]"],
    );
}

#[test]
fn typed_faults_have_places_and_unknown_fields_are_warnings() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels: {version: 1, on: true}\nspec:\n  nodeNme: \
                node-a\n  containers:\n  - name: c\n    ports:\n    - {containerPort: http}\n    - containerPort: \
                \"80\"\n  hostNetwork: \"true\"\n";
    assert_said(
        WEIR,
        text,
        &[
            "cluster.yaml:4:9: note: Pod default/a: it has no address yet and is left out",
            "cluster.yaml:5:21: error: Pod default/a: metadata.labels.version: expected a string, found the number 1 \
             [put the value in quotes]",
            "cluster.yaml:5:28: error: Pod default/a: metadata.labels.on: expected a string, found the boolean true \
             [put the value in quotes]",
            "cluster.yaml:7:3: warning: Pod default/a: unknown field spec.nodeNme [did you mean nodeName?]",
            "cluster.yaml:11:23: error: Pod default/a: spec.containers[0].ports[0].containerPort: expected a number, \
             found the string \"http\"",
            "cluster.yaml:12:22: error: Pod default/a: spec.containers[0].ports[1].containerPort: expected a number, \
             found the string \"80\" [remove the quotes: 80]",
            "cluster.yaml:13:16: error: Pod default/a: spec.hostNetwork: expected true or false, found the string \
             \"true\" [remove the quotes: true]",
        ],
    );
}

#[test]
fn faults_of_network_policies() {
    let cases: &[(&str, &[&str])] = &[
        (
            "podSelector: {matchExpressions: [{key: a, operator: In, values: []}, {key: b, operator: Exist}]}\n\
             policyTypes: [Ingres, Egress]\n",
            &[
                "cluster.yaml:5:59: error: NetworkPolicy x/p: spec.podSelector.matchExpressions[0]: In needs values \
                 [write the values, or use Exists or DoesNotExist]",
                "cluster.yaml:5:91: error: NetworkPolicy x/p: spec.podSelector.matchExpressions[1].operator: \"Exist\" \
                 is not known [did you mean Exists?]",
                "cluster.yaml:6:17: error: NetworkPolicy x/p: spec.policyTypes[0]: \"Ingres\" is not known [did you \
                 mean Ingress?]",
            ],
        ),
        (
            "podSelector: {}\ningress:\n- from:\n  - ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16, \
             10.0.0.0/8]}\n  - {}\n  - ipBlock: {cidr: 10.0.0.0}\n    podSelector: {}\n  - ipBlock: {cidr: \
             10.0.0.300/8}\n",
            &[
                "cluster.yaml:8:44: error: NetworkPolicy x/p: spec.ingress[0].from[0].ipBlock.except[0]: \
                 11.0.0.0/16 is not inside 10.0.0.0/8 [an exception is a part of the block]",
                "cluster.yaml:8:57: error: NetworkPolicy x/p: spec.ingress[0].from[0].ipBlock.except[1]: 10.0.0.0/8 is \
                 not inside 10.0.0.0/8 [an exception is a part of the block]",
                "cluster.yaml:9:7: error: NetworkPolicy x/p: spec.ingress[0].from[1] names no peer [name podSelector, \
                 namespaceSelector or ipBlock; leave the list out to allow any peer]",
                "cluster.yaml:10:7: error: NetworkPolicy x/p: spec.ingress[0].from[2]: ipBlock stands beside a \
                 selector [a peer is an ipBlock or selectors; make two peers of it to allow either]",
                "cluster.yaml:12:23: error: NetworkPolicy x/p: spec.ingress[0].from[3].ipBlock.cidr: \"10.0.0.300\" is \
                 not an IP address [write an address like 192.0.2.1 or 2001:db8::1]",
            ],
        ),
        (
            "podSelector: {}\negress:\n- ports:\n  - {port: 80, endPort: 79}\n  - {port: http, endPort: 81}\n  \
             - {endPort: 9}\n  - {port: 65536}\n  - {port: 53, protocol: udp}\n  - {port: \"80\"}\n  - \n",
            &[
                "cluster.yaml:8:27: error: NetworkPolicy x/p: spec.egress[0].ports[0].endPort 79 is less than \
                 port 80 [a range goes up: port is its first, endPort its last]",
                "cluster.yaml:9:29: error: NetworkPolicy x/p: spec.egress[0].ports[1].endPort after the named port \
                 \"http\" [write the number of the range's first port]",
                "cluster.yaml:10:17: error: NetworkPolicy x/p: spec.egress[0].ports[2].endPort stands without port \
                 [write port: FIRST, the first port of the range]",
                "cluster.yaml:11:14: error: NetworkPolicy x/p: spec.egress[0].ports[3].port: 65536 is not a \
                 port [a port is a number from 1 to 65535]",
                "cluster.yaml:12:28: error: NetworkPolicy x/p: spec.egress[0].ports[4].protocol: \"udp\" is not known \
                 [did you mean UDP?]",
                "cluster.yaml:13:14: error: NetworkPolicy x/p: spec.egress[0].ports[5].port: \"80\" cannot be a port's \
                 name [remove the quotes: 80]",
                "cluster.yaml:14:7: error: NetworkPolicy x/p: spec.egress[0].ports[6]: expected an object, \
                 found nothing [write {} for an empty one]",
            ],
        ),
        (
            "podSelectr: {}\ningress:\n  from: []\n",
            &[
                "cluster.yaml:5:3: error: NetworkPolicy x/p: unknown field spec.podSelectr [did you mean \
                 podSelector?]",
                "cluster.yaml:7:5: error: NetworkPolicy x/p: spec.ingress: expected a list, found an object",
            ],
        ),
    ];
    for (spec, expected) in cases {
        assert_said(WEIR, &policy(spec), expected);
    }
}

#[test]
fn faults_of_services() {
    let cases: &[(&str, &[&str])] = &[
        (
            "clusterIP: 10.96.0.300\nports:\n- {port: 0}\n- {port: 80, protocol: TPC, nodePort: 99999}\ntype: \
             NodePrt\nexternalTrafficPolicy: local\n",
            &[
                "cluster.yaml:3:18: note: Service x/web: it has no cluster IP and is not served",
                "cluster.yaml:5:14: error: Service x/web: spec.clusterIP: \"10.96.0.300\" is not an IP address [write \
                 an address like 192.0.2.1 or 2001:db8::1]",
                "cluster.yaml:7:5: error: Service x/web: spec.ports[0].name is missing [the ports of a service with \
                 several have names]",
                "cluster.yaml:7:12: error: Service x/web: spec.ports[0].port: 0 is not a port [a port is a number from \
                 1 to 65535]",
                "cluster.yaml:8:5: error: Service x/web: spec.ports[1].name is missing [the ports of a service with \
                 several have names]",
                "cluster.yaml:8:26: error: Service x/web: spec.ports[1].protocol: \"TPC\" is not known [did you mean \
                 TCP?]",
                "cluster.yaml:8:41: error: Service x/web: spec.ports[1].nodePort: 99999 is not a port [a port is a \
                 number from 1 to 65535]",
                "cluster.yaml:9:9: error: Service x/web: spec.type: \"NodePrt\" is not known [did you mean NodePort?]",
                "cluster.yaml:10:26: error: Service x/web: spec.externalTrafficPolicy: \"local\" is not known [did you \
                 mean Local?]",
            ],
        ),
        (
            "clusterIP: 10.96.0.1\nsessionAffinity: ClientIp\nports: [{port: 80}]\n",
            &[
                "cluster.yaml:6:20: error: Service x/web: spec.sessionAffinity: \"ClientIp\" is not known [did you mean \
               ClientIP?]",
            ],
        ),
        (
            "clusterIP: 10.96.0.1\nsessionAffinity: ClientIP\nsessionAffinityConfig: {clientIP: {timeoutSeconds: \
             86401}}\nports: [{port: 80}]\n",
            &["cluster.yaml:7:54: error: Service x/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is \
               out of range [write 1 to 86400, or leave it out for 10800]"],
        ),
        (
            "clusterIP: 10.96.0.1\nloadBalancerSourceRanges: [10.0.0.0/8, ' 10.1.0.0 ']\nports: [{prt: 80}]\n",
            &[
                "cluster.yaml:6:42: error: Service x/web: spec.loadBalancerSourceRanges[1]: \"10.1.0.0\" is an \
                 address, not a CIDR [write 10.1.0.0/32 for this one address]",
                "cluster.yaml:7:11: error: Service x/web: spec.ports[0].port: 0 is not a port [a port is a \
                 number from 1 to 65535]",
                "cluster.yaml:7:12: warning: Service x/web: unknown field spec.ports[0].prt [did you mean port?]",
            ],
        ),
    ];
    for (spec, expected) in cases {
        assert_said(WEIR, &service(spec), expected);
    }
    let two = service("type: NodePort\nclusterIP: 10.96.0.1\nports: [{port: 80, nodePort: 30000}]\n");
    let two = format!("{two}---\n{}", two.replace("name: web", "name: other"));
    assert_said(
        WEIR,
        &two,
        &[
            "cluster.yaml:14:14: error: Service x/other: its cluster IP 10.96.0.1 is Service x/web's too [it is at \
             cluster.yaml:6:14]",
            "cluster.yaml:15:32: error: Service x/other: node port 30000 (tcp) is Service x/web's too [it is at \
             cluster.yaml:7:32]",
        ],
    );
}

#[test]
fn faults_of_slices_nodes_pods_and_pools() {
    assert_said(
        WEIR,
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s}\naddressType: IPv4\nendpoints:\n- \
         addresses: ['2001:db8::1']\n- addresses: [10.0.0.x]\n- {}\nports: [{port: 70000}]\n",
        &[
            "cluster.yaml:3:18: note: EndpointSlice default/s: it has no label kubernetes.io/service-name and \
             belongs to no service",
            "cluster.yaml:6:15: error: EndpointSlice default/s: endpoints[0].addresses[0]: 2001:db8::1 is not an IPv4 \
             address as addressType says [a slice holds addresses of one family; put the others in a slice of \
             their own]",
            "cluster.yaml:7:15: error: EndpointSlice default/s: endpoints[1].addresses[0]: \"10.0.0.x\" is not an IP \
             address [write an address like 192.0.2.1 or 2001:db8::1]",
            "cluster.yaml:8:3: error: EndpointSlice default/s: endpoints[2].addresses is missing [an endpoint has at \
             least one address]",
            "cluster.yaml:9:16: error: EndpointSlice default/s: ports[0].port: 70000 is not a port [a port is a number \
             from 1 to 65535]",
        ],
    );
    assert_said(
        WEIR,
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-b\n  annotations: {projectcalico.org/IPv4Address: \
         'x'}\nspec: {podCIDRs: [10.0.0.0/8, 10.0.0.0/99]}\nstatus: {addresses: [{type: InternalIP, address: 1.2.3}]}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.2}, {ip: \
         z}]}\n---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\nspec: {cidr: 2001:db8::/32, \
         ipipMode: Always, vxlanMode: CrossSubnet}\n---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: \
         {name: q}\nspec: {cidr: '2001:db8:1::/48', ipipMode: always}\n---\napiVersion: projectcalico.org/v3\nkind: \
         IPPool\nmetadata: {name: r}\nspec: {cidr: '2001:db8:1::/48'}\n",
        &[
            "weir.yaml:1:11: warning: the manifests have no Node node-a [did you mean node-b?]",
            "cluster.yaml:5:48: error: Node node-b: annotation projectcalico.org/IPv4Address: \"x\" is not an IPv4 \
             address with its subnet [write it like 192.0.2.1/24]",
            "cluster.yaml:6:31: error: Node node-b: spec.podCIDRs[1]: \"10.0.0.0/99\" has a prefix length that is not \
             between 0 and 32 [write a CIDR like 192.0.2.0/24 or 2001:db8::/64]",
            "cluster.yaml:7:50: error: Node node-b: status.addresses[0].address: \"1.2.3\" is not an IP address [write \
             an address like 192.0.2.1 or 2001:db8::1]",
            "cluster.yaml:12:17: error: Pod default/a: status.podIP 10.0.0.1 is not status.podIPs[0] [make it \
             the first of podIPs]",
            "cluster.yaml:12:57: error: Pod default/a: status.podIPs[1].ip: \"z\" is not an IP address [write \
             an address like 192.0.2.1 or 2001:db8::1]",
            "cluster.yaml:17:39: error: IPPool p: spec.ipipMode Always of an IPv6 pool [IPIP carries IPv4 only: write \
             ipipMode: Never]",
            "cluster.yaml:17:58: error: IPPool p: spec.vxlanMode CrossSubnet is not implemented yet [not implemented \
             yet: weir would not enforce it]",
            "cluster.yaml:22:14: error: IPPool q: spec.cidr: 2001:db8:1::/48 overlaps 2001:db8::/32 of another \
             pool [an address must belong to one pool]",
            "cluster.yaml:22:43: error: IPPool q: spec.ipipMode: \"always\" is none of: Never, Always, \
             CrossSubnet [did you mean Always?]",
            "cluster.yaml:27:14: error: IPPool r: spec.cidr: 2001:db8:1::/48 overlaps 2001:db8::/32 of another \
             pool [an address must belong to one pool]",
        ],
    );
}

#[test]
fn no_range_is_every_address() {
    assert_said(
        &format!("{WEIR}serviceCIDRs: [10.96.0.0/16, '::/0']\n"),
        "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDR: 10.1.2.3/0, podCIDRs: [0.0.0.0/0, fd00::/64]}\n\
         ---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\nspec: {cidr: '::/0'}\n",
        &[
            "weir.yaml:3:30: error: serviceCIDRs: ::/0 is every address, the node's own too [write the range that \
             services have addresses of]",
            "cluster.yaml:4:17: error: Node node-a: spec.podCIDR: 0.0.0.0/0 is every address, the nodes' own too [write \
             the range that pods have addresses of]",
            "cluster.yaml:4:40: error: Node node-a: spec.podCIDRs[0]: 0.0.0.0/0 is every address, the nodes' own too \
             [write the range that pods have addresses of]",
            "cluster.yaml:9:14: error: IPPool p: spec.cidr: ::/0 is every address, the nodes' own too [write the \
             range that pods have addresses of]",
        ],
    );
}

#[test]
fn lists_and_json_are_read_as_their_items() {
    let list = r#"{"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": [
	{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}},
	{"apiVersion": "v1", "kind": "NamespaceList", "items": [
		{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "b\u00e9"}}]}]}"#;
    let loaded = loaded(WEIR, list);
    let names: Vec<String> = loaded.objects.iter().map(|origin| origin.to_string()).collect();
    assert_eq!(names, ["Namespace/a", "Namespace/bé"]);
    assert_eq!(loaded.objects.get(1).map(|origin| origin.line), Some(4));
}

/// The objects of a text, by kind, name and line.
fn objects_of(text: &str) -> Vec<String> {
    let loaded = loaded(WEIR, text);
    assert_eq!(loaded.notes.of(Severity::Warning).count(), 0, "{}", loaded.notes);
    loaded.objects.iter().map(|origin| format!("{origin}:{}", origin.line)).collect()
}

#[test]
fn a_list_may_be_the_whole_document_and_say_the_kind_of_its_items() {
    let bare = "- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- apiVersion: v1\n  kind: NamespaceList\n  items: \
                []\n- apiVersion: v1\n  kind: List\n  items:\n  - apiVersion: v1\n    kind: Namespace\n    metadata: {name: b}\n";
    assert_eq!(objects_of(bare), ["Namespace/a:1", "Namespace/b:10"]);
    for item in ["", "  apiVersion: v1\n"] {
        let typed = format!(
            "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata:\n    name: a\n{item}- metadata:\n    name: b\n{item}- \
             apiVersion: v1\n  kind: Namespace\n  metadata:\n    name: c\n"
        );
        assert_eq!(objects_of(&typed).len(), 3, "{typed}");
    }
    let policies = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicyList\nitems:\n- metadata: {name: a}\n  spec: {types: \
                    [Ingress]}\n";
    assert_eq!(objects_of(policies), ["GlobalNetworkPolicy/a:4"]);
    // Places inside such an item are found again, and a fault in it is the object's own.
    let faulty = policies.replace("[Ingress]", "[Ingress], ingress: [{action: Allow, protocol: nope}]");
    assert_eq!(
        said(WEIR, &faulty),
        [
            "cluster.yaml:5:64: error: GlobalNetworkPolicy a: spec.ingress[0].protocol is not known [write TCP, UDP, SCTP, \
             ICMP, ICMPv6, UDPLite, or a number up to 255]"
        ]
    );
    // What has no kind and no list that says it is at fault.
    assert_eq!(
        said(WEIR, "apiVersion: v1\nkind: List\nitems:\n- metadata: {name: a}\n  apiVersion: v1\n"),
        ["cluster.yaml:4:3: error: kind is missing [every object begins with apiVersion and kind]"]
    );
}

#[test]
fn json_texts_one_behind_the_other_are_documents() {
    let object = |name: &str| {
        format!("{{\"apiVersion\": \"v1\", \"kind\": \"Namespace\",\n \"metadata\": {{\"name\": \"{name}\"}}}}")
    };
    for between in ["", "\n", "\n\n  ", "\n---\n"] {
        let text = format!("{}{between}{}{between}{}\n# end\n", object("a"), object("b"), object("c"));
        let names: Vec<String> = objects_of(&text).iter().map(|name| name[..11].to_owned()).collect();
        assert_eq!(names, ["Namespace/a", "Namespace/b", "Namespace/c"], "{text}");
    }
    // What is no JSON behind one costs that alone.
    let said = said(WEIR, &format!("{}\n{{\"apiVersion\": ", object("a")));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("not valid YAML"), "{said:?}");
}

#[test]
fn octal_numbers_are_read_as_kubectl_reads_them() {
    let port = |port: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: x}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
        );
        loaded(WEIR, &text).services.services[0].port
    };
    assert_eq!(
        [port("0644"), port("+0644"), port("0100"), port("644"), port("0x1f"), port("0o17")],
        [420, 420, 64, 644, 31, 15]
    );
    let modes = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  nodeName: node-a\n  containers: []\n  volumes:\n  - {name: s, \
                 secret: {secretName: s, defaultMode: 0400}}\nstatus: {podIP: 10.0.0.1}\n";
    assert_eq!(objects_of(modes), ["Pod/default/a:1"]);
}

#[test]
fn a_dump_of_a_healthy_cluster_is_read_without_a_warning() {
    let dump = "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: \"\"}\nitems:\n- apiVersion: networking.k8s.io/v1\n  kind: \
                NetworkPolicy\n  metadata: {name: p, namespace: x, generation: 1}\n  spec: {podSelector: {}, policyTypes: \
                [Ingress]}\n  status: {}\n- apiVersion: projectcalico.org/v3\n  kind: BGPConfiguration\n  metadata: {name: \
                default}\n- apiVersion: crd.projectcalico.org/v1\n  kind: IPAMBlock\n  metadata: {name: b}\n- apiVersion: \
                crd.projectcalico.org/v1\n  kind: IPAMConfig\n  metadata: {name: default}\n- apiVersion: \
                projectcalico.org/v3\n  kind: KubeControllersConfiguration\n  metadata: {name: default}\n";
    assert_eq!(objects_of(dump), ["NetworkPolicy/x/p:5", "IPAMBlock/b:13"]);
}

#[test]
fn anchors_and_merge_keys_are_followed() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: &l {x: y, z: 'no'}}\nspec: {nodeName: node-a, \
                containers: []}\nstatus: {podIP: 10.0.0.1}\n---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: \
                n\n  labels: &base {a: b}\n  annotations: {<<: *base, c: d}\n";
    let loaded = loaded(WEIR, text);
    assert_eq!(loaded.policy.endpoints[0].labels["z"], "no");
}

#[test]
fn default_and_given_settings() {
    let config = loaded(WEIR, "").config;
    assert_eq!(config.snat.port_range, (10_000, 29_999));
    assert_eq!((config.workers.cores, config.workers.burst), (vec![1], 64));
    assert_eq!((config.conntrack.max_entries, config.conntrack.tcp_loose), (262_144, true));
    assert_eq!(config.manifests, [Path::new("cluster.yaml")]);
    let config = loaded(
        "apiVersion: weir.dev/v1alpha1\nkind: RouterConfig\nnodeName: a\nmanifests: []\npodCIDRs: \
         []\nserviceCIDRs: [010.96.0.1/12]\nlocalAddresses: [010.0.0.01]\nconntrack: {nf_conntrack_udp_timeout: 5, \
         icmp_timeout: 6, tcp_loose: 0, nf_conntrack_tcp_be_liberal: 1, tcp_max_retrans: 5}\nworkers: {mode: busy, cores: [2, 3]}\n",
        "",
    )
    .config;
    assert_eq!(config.pod_cidrs, Some(vec![]));
    assert_eq!(config.service_cidrs[0].to_string(), "10.96.0.0/12");
    assert_eq!(config.local_addresses.unwrap()[0].to_string(), "10.0.0.1");
    assert_eq!((config.conntrack.udp_timeout, config.conntrack.icmp_timeout), (Some(5), Some(6)));
    assert_eq!((config.conntrack.tcp_loose, config.conntrack.tcp_be_liberal), (false, true));
    assert_eq!((config.conntrack.tcp_ignore_invalid_rst, config.conntrack.tcp_max_retrans), (false, Some(5)));
    assert_eq!(config.workers.cores, [2, 3]);
    let weir = format!("{WEIR}conntrack: {{ipfrag_time: 1, nf_conntrack_frag6_timeout: 30}}\n");
    assert_eq!(crate::compile::fragment_lifetimes(&loaded(&weir, "").config.conntrack), [100, 3000]);
}

#[test]
fn every_timeout_of_the_table_can_be_given() {
    for name in weir_conntrack::Timeouts::NAMES {
        for name in [name, name.trim_start_matches("nf_conntrack_")] {
            let conntrack = loaded(&format!("{WEIR}conntrack: {{{name}: 7}}\n"), "").config.conntrack;
            let mut random = ChaCha8Rng::seed_from_u64(1);
            let timeouts = crate::compile::table_config(&conntrack, &mut random).timeouts;
            let full_name = format!("nf_conntrack_{}", name.trim_start_matches("nf_conntrack_"));
            assert_eq!(timeouts.get(&full_name), Ok(7), "{name}");
        }
    }
}

#[test]
fn pod_cidrs_come_from_weir_yaml_then_pools_then_nodes() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDR: 10.9.0.0/24}\n---\n";
    let pool = "apiVersion: crd.projectcalico.org/v1\nkind: IPPool\nmetadata: {name: p}\nspec: {cidr: 10.1.0.0/16, \
                ipipMode: CrossSubnet, natOutgoing: true}\n";
    let cidrs = |weir: &str, text: &str| -> Vec<String> {
        loaded(weir, text).services.pod_cidrs.iter().map(ToString::to_string).collect()
    };
    assert_eq!(cidrs(WEIR, node), ["10.9.0.0/24"]);
    assert_eq!(cidrs(WEIR, &format!("{node}{pool}")), ["10.1.0.0/16"]);
    assert_eq!(cidrs(&format!("{WEIR}podCIDRs: [10.5.5.5/8]\n"), &format!("{node}{pool}")), ["10.0.0.0/8"]);
    assert!(cidrs(&format!("{WEIR}podCIDRs: []\n"), &format!("{node}{pool}")).is_empty());
    let cluster = loaded(WEIR, pool).cluster;
    assert_eq!((cluster.pools[0].ipip, cluster.pools[0].nat_outgoing), (TunnelMode::CrossSubnet, true));
}

#[test]
fn a_service_becomes_its_ports() {
    let model = loaded(
        WEIR,
        &(service(
            "type: LoadBalancer\nclusterIP: 010.96.0.1\nclusterIPs: [10.96.0.1]\nexternalIPs: [8.8.8.8, \
             '2001:db8::1']\n\
             loadBalancerIP: 9.9.9.9\nloadBalancerSourceRanges: [' 10.0.0.0/8 ', '2001:db8::/32']\n\
             externalTrafficPolicy: Local\nports:\n- {name: http, port: 80, nodePort: 30080}\n- {name: dns, port: 53, \
             protocol: UDP}\n",
        ) + "status: {loadBalancer: {ingress: [{ip: 8.8.4.4}, {ip: 8.8.4.5, ipMode: Proxy}, {hostname: x}]}}\n---\n\
            apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a, namespace: x, labels: \
            {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints:\n- {addresses: [10.1.0.1, 10.1.0.2], \
            nodeName: node-b}\n- {addresses: [10.1.0.3], conditions: {ready: false}}\n- {addresses: [10.1.0.4], \
            conditions: {ready: false, serving: true, terminating: true}, hints: {forZones: [{name: z}], forNodes: \
            [{name: n}]}}\nports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}, {name: http, \
            protocol: UDP, port: 1}, {name: nothing}]\n---\napiVersion: discovery.k8s.io/v1\nkind: \
            EndpointSlice\nmetadata: {name: b, namespace: x, labels: {kubernetes.io/service-name: web}}\naddressType: \
            IPv4\nendpoints:\n- {addresses: [10.1.0.1], nodeName: node-a}\n- {addresses: [10.1.0.3], conditions: {ready: false, serving: false}}\nports: [{name: \
            http, port: 8080}]\n"),
    )
    .services;
    assert_eq!(model.services.len(), 2);
    // The port that the service does not have; of an endpoint's addresses the first counts.
    let unserved = [1, 3, 4].into_iter().map(|last| (Protocol::UDP, IpAddr::from([10, 1, 0, last]), 1));
    assert_eq!(model.unserved, unserved.collect::<Vec<_>>());
    let http = &model.services[0];
    assert_eq!(
        (http.name.as_str(), http.protocol, http.port, http.node_port),
        ("x/web:http", Protocol::TCP, 80, Some(30080))
    );
    assert_eq!(http.cluster_ips, ["10.96.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(http.external_ips, ["8.8.8.8".parse::<IpAddr>().unwrap()]);
    assert_eq!(http.load_balancer_ips, ["8.8.4.4".parse::<IpAddr>().unwrap()]);
    assert_eq!(http.source_ranges, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!((http.internal_policy, http.external_policy), (TrafficPolicy::Cluster, TrafficPolicy::Local));
    let facts = |port: &weir_nat::ServicePort| -> Vec<String> {
        let fact = |e: &weir_nat::Endpoint| {
            let flags = (e.ready, e.serving, e.terminating);
            let [zones, nodes] = [e.zone_hints(), e.node_hints()];
            format!("{}:{} {:?} {flags:?} {zones:?}{nodes:?}", e.address, e.port, e.node_name())
        };
        port.endpoints.iter().map(fact).collect()
    };
    assert_eq!(
        facts(http),
        [
            "10.1.0.1:8080 Some(\"node-a\") (true, true, false) [][]",
            "10.1.0.3:8080 None (false, true, false) [][]",
            "10.1.0.4:8080 None (false, true, true) [\"z\"][\"n\"]",
        ]
    );
    assert_eq!(model.services[1].endpoints.len(), 3);
    assert_eq!(facts(&model.services[1])[0], "10.1.0.1:5353 Some(\"node-b\") (true, true, false) [][]");

    for spec in ["clusterIP: None\nports: [{port: 80}]\n", "type: ExternalName\nexternalName: x.y\n"] {
        let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a, namespace: x, labels: \
            {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints:\n- {addresses: [10.1.0.9]}\n- {addresses: \
            [10.1.0.8]}\nports: [{port: 80}]\n";
        // Without its service too: connections to what slices have may go on.
        for text in [service(spec) + slice, slice.to_owned()] {
            let model = loaded(WEIR, &text).services;
            assert!(model.services.is_empty());
            let unserved = [8, 9].map(|last| (Protocol::TCP, IpAddr::from([10, 1, 0, last]), 80));
            assert_eq!(model.unserved, unserved);
        }
    }
    let unnamed = loaded(WEIR, &service("clusterIP: 10.96.0.1\nports: [{port: 80}]\n")).services;
    assert_eq!(unnamed.services[0].name, "x/web");
}

#[test]
fn local_addresses_are_the_nodes_and_later_the_devices() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a, labels: {topology.kubernetes.io/zone: \
    z}}\nstatus: {addresses: [{type: Hostname, address: h}, {type: InternalIP, address: 10.0.0.1}, {type: ExternalIP, \
                address: 10.0.0.2}]}\n";
    let texts = |loaded: &Loaded| loaded.services.local_addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    let devices = ["10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap()];
    let mut by_node = loaded(WEIR, node);
    assert_eq!(
        (texts(&by_node), by_node.services.zone.as_deref()),
        (vec!["10.0.0.1".into(), "10.0.0.2".into()], Some("z"))
    );
    by_node.add_local_addresses(&devices);
    assert_eq!(texts(&by_node), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    let mut given = loaded(&format!("{WEIR}localAddresses: [10.7.7.7]\n"), node);
    given.add_local_addresses(&devices);
    assert_eq!(texts(&given), ["10.7.7.7"]);
}

#[test]
fn pods_become_workloads_with_inherited_labels() {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {team: red}}\n---\napiVersion: \
                v1\nkind: ServiceAccount\nmetadata: {name: sa, labels: {role: r}}\n---\napiVersion: v1\nkind: \
                Pod\nmetadata: {name: a1, labels: {app: a}}\nspec: {nodeName: node-a, serviceAccountName: sa, \
                containers: [{name: c, ports: [{name: http, containerPort: 80}, {containerPort: 81}, {name: \
                dns, containerPort: 53, protocol: UDP}]}]}\nstatus: {phase: Running, podIP: 10.0.0.1, podIPs: \
                [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: \
                done}\nspec: {containers: []}\nstatus: {phase: Succeeded, podIP: 10.0.0.1}\n---\napiVersion: \
                v1\nkind: Pod\nmetadata: {name: host}\nspec: {hostNetwork: true, containers: []}\nstatus: \
                {podIP: 192.168.0.1}\n---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: \
                {name: w, namespace: default}\nspec: {orchestrator: k8s, node: node-a, pod: a1, interfaceName: \
                calinamed, mac: '0a:00:00:00:00:01', ipNetworks: [10.0.0.1/32, 'fd00::1/128'], profiles: \
                [kns.default]}\n---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {name: \
                vm, namespace: default, labels: {app: v}}\nspec: {orchestrator: openstack, node: node-b, \
                interfaceName: tap0, ipNetworks: [10.0.0.9]}\n";
    let loaded = loaded(WEIR, text);
    let workloads: Vec<String> = loaded
        .cluster
        .workloads
        .iter()
        .map(|w| format!("{} {:?} {:?} {} {:?}", w.name, w.node, w.addresses, w.device, w.mac))
        .collect();
    assert_eq!(
        workloads,
        [
            "default/a1 Some(\"node-a\") [10.0.0.1, fd00::1] calinamed Some(0a:00:00:00:00:01)",
            "default/vm Some(\"node-b\") [10.0.0.9] tap0 None",
        ]
    );
    let pod = &loaded.policy.endpoints[0];
    let expected: BTreeMap<String, String> = [
        ("app", "a"),
        ("pcns.kubernetes.io/metadata.name", "default"),
        ("pcns.projectcalico.org/name", "default"),
        ("pcns.team", "red"),
        ("pcsa.projectcalico.org/name", "sa"),
        ("pcsa.role", "r"),
        ("projectcalico.org/namespace", "default"),
        ("projectcalico.org/orchestrator", "k8s"),
        ("projectcalico.org/serviceaccount", "sa"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    assert_eq!(pod.labels, expected);
    assert!(pod.local && !loaded.policy.endpoints[1].local);
    assert_eq!(pod.profiles, ["kns.default"]);
    let ports: Vec<_> = pod.ports.iter().map(|port| (port.name.as_str(), port.protocol, port.port)).collect();
    assert_eq!(ports, [("http", Protocol::TCP, 80), ("dns", Protocol::UDP, 53)]);
    assert_eq!(loaded.policy.profiles.len(), 1);
}

#[test]
fn a_network_policy_becomes_rules() {
    let model = loaded(
        WEIR,
        &policy(
            "podSelector: {matchLabels: {app: a}}\ningress:\n- from:\n  - podSelector: {matchLabels: {b: c}}\n  - \
             namespaceSelector: {}\n  - namespaceSelector: {matchExpressions: [{key: t, operator: NotIn, \
             values: [v]}]}\n    podSelector: {}\n  - ipBlock: {cidr: 10.0.0.7/8, except: [10.1.0.0/16]}\n  \
             ports:\n  - {port: 80, endPort: 90}\n  - {protocol: UDP}\n  - {port: http}\n- {}\n",
        ),
    )
    .policy;
    let policy = &model.tiers[0].policies[0];
    assert_eq!(policy.name, "NetworkPolicy/x/p");
    assert!(policy.egress.is_none());
    let equals = |key: &str, value: &str| Selector::Equals(key.into(), value.into());
    let namespace = || equals("projectcalico.org/namespace", "x");
    let pods = || equals("projectcalico.org/orchestrator", "k8s");
    let matches = |selector: &Selector, pairs: &[(&str, &str)]| {
        selector.matches(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    };
    let in_x = ("projectcalico.org/namespace", "x");
    let in_y = ("projectcalico.org/namespace", "y");
    let k8s = ("projectcalico.org/orchestrator", "k8s");
    assert!(matches(&policy.selector, &[in_x, k8s, ("app", "a")]));
    assert!(!matches(&policy.selector, &[in_y, k8s, ("app", "a")]));
    assert!(!matches(&policy.selector, &[in_x, k8s]));
    assert!(!matches(&Selector::all_of([namespace(), pods()]), &[in_x]), "a network set is no pod");

    let rules = policy.ingress.as_ref().unwrap();
    assert_eq!(rules.iter().map(|rule| rule.number).collect::<Vec<_>>(), [1, 1, 1, 2]);
    let ports: Vec<_> = rules.iter().map(|rule| (rule.protocol, rule.destination.ports.clone())).collect();
    assert_eq!(
        ports,
        [
            (Some(Protocol::TCP), Some(vec![PortMatch::Range(80, 90)])),
            (Some(Protocol::UDP), None),
            (Some(Protocol::TCP), Some(vec![PortMatch::Named("http".into())])),
            (None, None),
        ]
    );
    assert!(rules[3].source.any_of.is_empty() && rules[3].destination.any_of.is_empty());
    let [Peer::Selector(own), Peer::Selector(every), Peer::Selector(not_v), Peer::Block { cidr, except }] =
        rules[0].source.any_of.as_slice()
    else {
        panic!("{:?}", rules[0].source.any_of);
    };
    assert!(matches(own, &[in_x, k8s, ("b", "c")]) && !matches(own, &[in_y, k8s, ("b", "c")]));
    assert!(matches(every, &[in_y, k8s]) && !matches(every, &[k8s]));
    assert!(matches(not_v, &[in_y, k8s]) && !matches(not_v, &[in_y, k8s, ("pcns.t", "v")]));
    assert_eq!((cidr.to_string().as_str(), except[0].to_string().as_str()), ("10.0.0.0/8", "10.1.0.0/16"));
}

#[test]
fn policy_types_are_filled_in_as_the_api_server_does() {
    let directions = |spec: &str| {
        let model = loaded(WEIR, &policy(spec)).policy;
        let policy = &model.tiers[0].policies[0];
        (policy.ingress.as_ref().map(Vec::len), policy.egress.as_ref().map(Vec::len))
    };
    assert_eq!(directions("podSelector: {}\n"), (Some(0), None));
    assert_eq!(directions("podSelector: {}\negress: []\n"), (Some(0), None));
    assert_eq!(directions("podSelector: {}\negress: [{}]\n"), (Some(0), Some(1)));
    assert_eq!(directions("podSelector: {}\npolicyTypes: [Egress]\n"), (None, Some(0)));
    assert_eq!(directions("podSelector: {}\ningress: [{}]\npolicyTypes: [Egress]\n"), (None, Some(0)));
}

/// Configurations of the upstream projects' cases and of the demo.
const FIXTURES: &[(&str, &str, &str)] = &[
    ("packets", include_str!("../../testdata/packets-weir.yaml"), include_str!("../../testdata/packets-cluster.yaml")),
    ("services-hints", WEIR, include_str!("../../testdata/services-hints.yaml")),
    ("services-families", WEIR, include_str!("../../testdata/services-families.yaml")),
    ("netpol", WEIR, include_str!("../../testdata/netpol-cluster.yaml")),
    ("netpol-policies", WEIR, include_str!("../../testdata/netpol-policies.yaml")),
    ("demo", WEIR, include_str!("../../testdata/demo-cluster.yaml")),
    ("demo-policies", WEIR, include_str!("../../testdata/demo-policies.yaml")),
];

#[test]
fn fixtures_load_without_a_word() {
    for (name, weir, cluster) in FIXTURES {
        let said = said(weir, cluster);
        assert!(said.is_empty(), "{name}: {said:#?}");
    }
    let packets = loaded(FIXTURES[0].1, FIXTURES[0].2);
    assert_eq!(packets.config.devices.len(), 4);
    assert!(!packets.cluster.workloads.is_empty() && !packets.policy.tiers[0].policies.is_empty());
    assert!(packets.cluster.workloads.iter().any(|workload| workload.device == "cali5cce677186e"));
}

#[test]
fn files_cut_at_any_byte_and_damaged_files_never_panic() {
    let (_, weir, cluster) = FIXTURES[0];
    let policy = FIXTURES[4].2;
    for (weir, cluster) in [(weir, ""), (WEIR, &cluster[..700]), (WEIR, policy), (WEIR, FIXTURES[2].2)] {
        let cut_weir = cluster.is_empty();
        let whole = if cut_weir { weir } else { cluster };
        for end in (0..=whole.len()).filter(|end| whole.is_char_boundary(*end)) {
            let part = &whole[..end];
            let _ = if cut_weir { said(part, "") } else { said(weir, part) };
        }
    }
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let text = format!("{policy}---\n{}", &cluster[..1200]);
    for _ in 0..500 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..=random.next_u32() % 3 {
            let at = random.next_u32() as usize % bytes.len();
            bytes[at] = b"\n\t :-[]{}\"'&*!|>%@`#,?0a\\\x00"[random.next_u32() as usize % 28 % 26];
        }
        let _ = said(WEIR, &String::from_utf8(bytes).unwrap());
    }
    let deep = "[".repeat(10_000);
    assert_eq!(said(WEIR, &deep), ["cluster.yaml:1:101: error: this is nested more than 100 levels deep"]);
    let deep: String = (0..3000).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
    assert_eq!(said(WEIR, &deep), ["cluster.yaml:101:101: error: this is nested more than 100 levels deep"]);
    let deep = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, managedFields: [{{fieldsV1: {}x{}}}]}}\n",
        "{f: ".repeat(90),
        "}".repeat(90)
    );
    assert!(said(WEIR, &deep).is_empty());
    let bomb = format!(
        "a0: &a0 [x, x, x, x, x, x, x, x]\n{}",
        (1..12).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 8].join(", "))).collect::<String>()
    );
    assert_eq!(
        said(WEIR, &bomb),
        ["cluster.yaml:7:15: error: the aliases of this document stand for too much [write the repeated parts out]"]
    );
}

#[test]
fn folders_are_read_with_their_subfolders_and_missing_paths_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let namespace = |name: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n");
    fs::create_dir_all(path("m/sub")).unwrap();
    fs::create_dir_all(path("m/..data")).unwrap();
    for (file, name) in [("m/b.yml", "b"), ("m/a.json", "a"), ("m/sub/c.yaml", "c"), ("m/..data/x.yaml", "hidden")] {
        fs::write(path(file), namespace(name)).unwrap();
    }
    fs::write(path("m/README.md"), "no manifest").unwrap();
    fs::write(path("weir.yaml"), "nodeName: a\nmanifests: [m/, m/b.yml]\n").unwrap();
    let loaded = load_strictly(&path("weir.yaml")).unwrap();
    let names: Vec<String> = loaded.objects.iter().map(|origin| origin.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let files: Vec<&Path> = loaded.files.iter().map(|file| file.strip_prefix(folder.path()).unwrap()).collect();
    assert_eq!(files, ["weir.yaml", "m", "m/a.json", "m/b.yml", "m/sub", "m/sub/c.yaml"].map(Path::new));

    fs::write(path("weir.yaml"), "nodeName: a\nmanifests: [m/, none.yaml, latin.yaml]\n").unwrap();
    fs::write(path("latin.yaml"), b"a: 1\nb: \xe9\n").unwrap();
    let problems = load_strictly(&path("weir.yaml")).unwrap_err().to_json();
    let facts: Vec<_> = problems.iter().map(|p| (p.line, p.column, p.message.split(':').next().unwrap())).collect();
    let missing = format!("cannot read {}", path("none.yaml").display());
    assert_eq!(facts, [(2, 17, missing.as_str()), (2, 4, "this file is not UTF-8")]);
    let problems = load_strictly(&path("nowhere.yaml")).unwrap_err();
    assert!(problems.diagnostics()[0].message.starts_with("cannot read the configuration"));
}

#[test]
fn a_policy_with_a_slip_in_its_kind_denies_what_it_selects() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("weir.yaml"), WEIR).unwrap();
    let kubernetes = "{podSelector: {matchLabels: {a: b}}, policyTypes: [Ingress]}";
    for (api_version, kind, spec, name) in [
        ("networking.k8s.io", "NetworkPolicy", kubernetes, "NetworkPolicy/x/p"),
        ("v1", "NetworkPolicy", kubernetes, "NetworkPolicy/x/p"),
        ("extensions/v1beta1", "NetworkPolicy", kubernetes, "NetworkPolicy/x/p"),
        ("networking.k8s.io/v1", "NetworkPolcy", kubernetes, "NetworkPolicy/x/p"),
        ("projectcalico.org", "NetworkPolicy", "{selector: a == 'b'}", "NetworkPolicy/x/p"),
        ("projectcalico.org/v1", "GlobalNetworkPolicy", "{selector: a == 'b'}", "GlobalNetworkPolicy/p"),
    ] {
        let object =
            format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: p, namespace: x}}\nspec: {spec}\n");
        fs::write(folder.join("cluster.yaml"), object).unwrap();
        let (loaded, problems) = Loader::new(&folder.join("weir.yaml")).load().unwrap();
        assert_eq!(loaded.faulty.len(), 1, "{api_version} {kind}");
        assert_eq!(loaded.faulty[0].outcome(), "it denies what it selects", "{api_version} {kind}");
        assert!(problems.unwrap().to_string().contains("is not read"));
        let [tier] = &loaded.policy.tiers[..] else { panic!("{:?}", loaded.policy.tiers) };
        let [policy] = &tier.policies[..] else { panic!("{:?}", tier.policies) };
        assert_eq!(policy.name, name);
        let labels = |value: &str| {
            let of_x = [("projectcalico.org/namespace", "x"), ("projectcalico.org/orchestrator", "k8s"), ("a", value)];
            of_x.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
        };
        assert!(
            policy.selector.matches(&labels("b")) && !policy.selector.matches(&labels("c")),
            "{:?}",
            policy.selector
        );
        assert!(policy.ingress.is_some() && policy.egress.is_some());
    }
}

/// A reload of `cluster` after `previous`, with what stands for faulty objects: "object: substitute: problem".
fn reloaded(loader: &mut Loader, previous: &Loaded, cluster: &str) -> (Loaded, Vec<String>) {
    let folder = loader.path.parent().unwrap().to_owned();
    fs::write(folder.join("cluster.yaml"), cluster).unwrap();
    let (loaded, _) = loader.reload(&previous.objects).unwrap_or_else(|problems| panic!("{problems}"));
    let line = |faulty: &Faulty| {
        let problem = faulty.problem.strip_prefix(folder.to_str().unwrap()).unwrap_or(&faulty.problem);
        format!("{}: {:?}: {problem}", faulty.object, faulty.substitute)
    };
    let faulty = loaded.faulty.iter().map(line).collect();
    (loaded, faulty)
}

#[test]
fn a_faulty_object_keeps_its_last_good_version_and_the_rest_proceeds() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("weir.yaml"), WEIR).unwrap();
    let object = |kind: &str, name: &str, spec: &str| {
        let version = if kind == "Service" { "v1" } else { "networking.k8s.io/v1" };
        format!("---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}, namespace: x}}\nspec: {spec}\n")
    };
    let service = |ip: &str| object("Service", "web", &format!("{{clusterIP: {ip}, ports: [{{port: 80}}]}}"));
    let policy = |name: &str, spec: &str| object("NetworkPolicy", name, spec);
    let open = "{podSelector: {}, ingress: [{}]}";
    let typo = "{podSelector: {}, ingress: [{}], policyTipes: [Egress]}";
    let first = service("10.96.0.1") + &policy("p", open);
    fs::write(folder.join("cluster.yaml"), &first).unwrap();
    let mut loader = Loader::new(&folder.join("weir.yaml"));
    let good = loader.load_strictly().unwrap_or_else(|problems| panic!("{problems}"));
    let address = |loaded: &Loaded| loaded.services.services[0].cluster_ips[0].to_string();
    let rules = |loaded: &Loaded| -> Vec<(String, usize)> {
        let policies = loaded.policy.tiers[0].policies.iter();
        policies.map(|policy| (policy.name.clone(), policy.ingress.as_ref().map_or(0, Vec::len))).collect()
    };
    let p = ("NetworkPolicy/x/p".to_owned(), 1);

    // An unknown field of a policy is an error; the service's new address is taken all the same.
    let (loaded, faulty) = reloaded(&mut loader, &good, &(service("10.96.0.2") + &policy("p", typo)));
    assert_eq!((address(&loaded).as_str(), rules(&loaded)), ("10.96.0.2", vec![p.clone()]));
    let problem = "/cluster.yaml:10:40: NetworkPolicy x/p: unknown field spec.policyTipes";
    assert_eq!(faulty, [format!("NetworkPolicy x/p: LastGood: {problem}")]);

    // Once more: the last good version is still that of the first text. And the other way round.
    let (loaded, faulty) = reloaded(&mut loader, &loaded, &(service("10.96.0") + &policy("p", typo)));
    assert_eq!((address(&loaded).as_str(), rules(&loaded), faulty.len()), ("10.96.0.2", vec![p.clone()], 2));

    // A new policy that cannot be read denies what it selects: by its selector, or, without one, its whole namespace.
    let new = policy("q", "{podSelector: {matchLabels: {a: b}}, egress: [7]}") + &policy("r", "[]");
    let (loaded, faulty) = reloaded(&mut loader, &loaded, &(first.clone() + &new));
    assert_eq!(rules(&loaded), [p.clone(), ("NetworkPolicy/x/q".into(), 0), ("NetworkPolicy/x/r".into(), 0)]);
    let policies = &loaded.policy.tiers[0].policies;
    assert!(policies[1..].iter().all(|policy| policy.ingress.is_some() && policy.egress.is_some()));
    let selects = |policy: usize, labels: &[(&str, &str)]| {
        let labels: BTreeMap<String, String> = labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        policies[policy].selector.matches(&labels)
    };
    let of_x = [("projectcalico.org/namespace", "x"), ("projectcalico.org/orchestrator", "k8s")];
    let of_x_with_label = [of_x[0], of_x[1], ("a", "b")];
    assert_eq!(
        [1, 2].map(|policy| (selects(policy, &of_x), selects(policy, &of_x_with_label))),
        [(false, true), (true, true)]
    );
    assert_eq!(faulty.len(), 2, "{faulty:?}");

    // A text that is no YAML has lost what was in it, and loses nothing.
    let (loaded, faulty) = reloaded(&mut loader, &loaded, &(service("10.96.0.3") + "---\napiVersion: [\n"));
    assert_eq!((address(&loaded).as_str(), rules(&loaded)), ("10.96.0.3", vec![p.clone()]));
    assert!(faulty[0].starts_with("NetworkPolicy x/p: LastGood"), "{faulty:?}");

    // Two of one name; then all is well again, and what is gone is gone.
    let (loaded, faulty) = reloaded(&mut loader, &loaded, &(first.clone() + &policy("p", open)));
    assert_eq!((rules(&loaded), faulty.len()), (vec![p], 1));
    let (loaded, faulty) = reloaded(&mut loader, &loaded, &service("10.96.0.4"));
    assert_eq!((address(&loaded).as_str(), rules(&loaded), faulty.len()), ("10.96.0.4", vec![], 0));

    // weir.yaml itself is refused whole.
    fs::write(folder.join("weir.yaml"), "nodeName: [").unwrap();
    assert!(loader.reload(&loaded.objects).is_err());
}
