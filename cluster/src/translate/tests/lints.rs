//! Policies that name what is not there.

use super::*;

const CLUSTER: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: red}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node-a, containers: [{name: web, ports: [{name: http, containerPort: 80}]}]}
status: {podIP: 10.1.1.5}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: node-a, containers: [{name: db, ports: [{name: sql, containerPort: 5432}]}]}
status: {podIP: 10.1.1.6}
---
";

/// What a review says of a policy in namespace shop, without places.
#[track_caller]
fn warned(kind: &str, spec: &str, expected: &[&str]) {
    let version = if kind == "NetworkPolicy" { "networking.k8s.io/v1" } else { "projectcalico.org/v3" };
    let namespace = if kind == "GlobalNetworkPolicy" { "" } else { ", namespace: shop" };
    let policy = format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: p{namespace}}}\nspec: {spec}\n");
    let text = CLUSTER.to_owned() + &policy;
    let of_policy = |line: &String| line.contains("Policy");
    assert!(!said(WEIR, &text).iter().any(of_policy), "only a review says it");
    let said = lines_of(&read_texts(WEIR, &text, true));
    let said: Vec<&str> =
        said.iter().filter(|line| of_policy(line)).map(|line| line.split_once(": ").unwrap().1).collect();
    assert!(said == expected, "said:\n{}\nexpected:\n{}", said.join("\n"), expected.join("\n"));
}

const NOT_THERE: &str =
    "[a label or a namespace may be misspelt; or its pods are not in the manifests, as an operator makes them]";

#[test]
fn policies_that_select_no_pod() {
    warned("NetworkPolicy", "{podSelector: {matchLabels: {app: web}}}", &[]);
    warned(
        "NetworkPolicy",
        "{podSelector: {matchLabels: {app: wbe}}}",
        &[&format!("warning: NetworkPolicy/shop/p selects no pod {NOT_THERE}")],
    );
    warned("GlobalNetworkPolicy", "{selector: app == 'web'}", &[]);
    warned(
        "GlobalNetworkPolicy",
        "{selector: app == 'wbe'}",
        &[&format!("warning: GlobalNetworkPolicy/p selects no pod {NOT_THERE}")],
    );
}

#[test]
fn named_ports_that_nobody_has() {
    warned("NetworkPolicy", "{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: http}]}]}", &[]);
    // Another pod's port is none of those that the policy is for; where it is what pods connect to, any pod's will do.
    warned(
        "NetworkPolicy",
        "{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: sql}, {port: htpp}]}], egress: [{ports: [{port: sql}]}]}",
        &[
            "warning: NetworkPolicy/shop/p: ingress rule 1: no pod that it selects has a port called \"sql\"",
            "warning: NetworkPolicy/shop/p: ingress rule 1: no pod that it selects has a port called \"htpp\" [did you mean http?]",
        ],
    );
    warned(
        "NetworkPolicy",
        "{podSelector: {}, policyTypes: [Egress], egress: [{}, {ports: [{port: htttp}]}]}",
        &["warning: NetworkPolicy/shop/p: egress rule 2: no pod has a port called \"htttp\" [did you mean http?]"],
    );
}

#[test]
fn namespace_selectors_that_match_none() {
    let from =
        |selector: &str| format!("{{podSelector: {{}}, ingress: [{{from: [{{namespaceSelector: {selector}}}]}}]}}");
    for right in [
        "{}",
        "{matchLabels: {team: red}}",
        "{matchLabels: {kubernetes.io/metadata.name: shop}}",
        "{matchLabels: {kubernetes.io/metadata.name: kube-system}}",
    ] {
        warned("NetworkPolicy", &from(right), &[]);
    }
    let labels = "[a namespace's labels are those of its Namespace, and kubernetes.io/metadata.name]";
    warned(
        "NetworkPolicy",
        &from("{matchLabels: {team: blue}}"),
        &[&format!(
            "warning: NetworkPolicy shop/p: spec.ingress[0].from[0].namespaceSelector matches no namespace {labels}"
        )],
    );
    warned(
        "NetworkPolicy",
        &from("{matchLabels: {kubernetes.io/metadata.name: shpo}}"),
        &[
            "warning: NetworkPolicy shop/p: spec.ingress[0].from[0].namespaceSelector matches no namespace [did you mean shop?]",
        ],
    );
    warned(
        "GlobalNetworkPolicy",
        "{selector: all(), egress: [{action: Allow, destination: {namespaceSelector: \"team == 'blue'\"}}]}",
        &[&format!(
            "warning: GlobalNetworkPolicy p: spec.egress[0].destination.namespaceSelector matches no namespace {labels}"
        )],
    );
    warned(
        "GlobalNetworkPolicy",
        "{selector: all(), egress: [{action: Allow, destination: {namespaceSelector: global()}}]}",
        &[],
    );
}

#[test]
fn policies_without_any_pods_are_told_once() {
    let policy = |name: &str| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{podSelector: {{}}}}\n"
        )
    };
    let said = lines_of(&read_texts(WEIR, &(policy("p") + &policy("q")), true));
    assert_eq!(
        said,
        [
            "cluster.yaml:4:18: note: no pod is in the manifests, so nobody can tell what policies select and reach (--assume-pods makes \
          pods of workloads)"
        ]
    );
}

#[test]
fn ranges_of_pods_that_nodes_are_in() {
    let text = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.1.0.0/16]}\n\
                status: {addresses: [{type: InternalIP, address: 10.1.0.1}]}\n";
    assert_eq!(
        lines_of(&read_texts(WEIR, text, true)),
        [
            "cluster.yaml:4:19: warning: Node node-a: spec.podCIDRs[0]: 10.1.0.0/16 covers 10.1.0.1, the address of node node-a [give pods \
          a range of their own]"
        ]
    );
}

#[test]
fn templates_and_kustomizations_are_named_once() {
    let helm = "[let Helm fill it in: `helm template NAME CHART > chart.yaml`, and read that file]";
    let text =
        "a: {{ .x }}\n---\n{{- if .y }}\nb: 1\n{{- end }}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";
    assert_said(
        WEIR,
        text,
        &[&format!("cluster.yaml:1:4: error: this is a template, not YAML: nothing is read of it {helm}")],
    );
    // In a text that reads well they are text.
    assert_said(WEIR, "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, annotations: {x: '{{ .y }}'}}\n", &[]);
    let kustomize = "warning: this is a kustomization, and what it makes of its resources is not read [let kustomize write it out: \
                     `kubectl kustomize FOLDER > all.yaml`, and read that file]";
    for text in
        ["resources: [a.yaml]\n", "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\npatches: []\n"]
    {
        assert_said(WEIR, text, &[&format!("cluster.yaml:1:1: {kustomize}")]);
    }
    let folder = tempfile::tempdir().unwrap();
    let chart = folder.path().join("m/chart");
    fs::create_dir_all(chart.join("templates")).unwrap();
    fs::write(chart.join("Chart.yaml"), "name: x\n").unwrap();
    fs::write(chart.join("templates/a.yaml"), "{{").unwrap();
    fs::write(folder.path().join("weir.yaml"), "nodeName: a\nmanifests: [m]\n").unwrap();
    let problems = load_strictly(&folder.path().join("weir.yaml")).unwrap_err().to_json();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].message.ends_with("m/chart is a Helm chart: nothing is read of it"), "{}", problems[0].message);
    // The rest of the folder is read all the same.
    let (loaded, _) = load(&folder.path().join("weir.yaml")).unwrap();
    assert_eq!(loaded.faulty[0].kind, FaultyKind::Document);
}
