//! Manifests from before they are applied.

use super::*;

const MANIFESTS: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 3
  template:
    metadata: {labels: {app: web}}
    spec:
      serviceAccountName: web
      containers:
      - {name: web, image: x, ports: [{name: http, containerPort: 8080}], env: [{name: A, value: b}]}
---
apiVersion: v1
kind: List
items:
- apiVersion: batch/v1
  kind: CronJob
  metadata: {name: tidy}
  spec: {jobTemplate: {spec: {template: {spec: {containers: [{name: tidy}]}}}}}
- apiVersion: apps/v1
  kind: DaemonSet
  metadata: {name: agent, namespace: shop}
  spec: {template: {metadata: {labels: {app: agent}}, spec: {hostNetwork: true, containers: [{name: agent}]}}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web, namespace: shop}
spec: {template: {metadata: {labels: {app: db}}, spec: {containers: [{name: db, ports: [{containerPort: 5432}]}]}}}
---
apiVersion: v1
kind: Pod
metadata: {name: alone, namespace: shop, labels: {app: web}}
spec: {containers: [{name: x, ports: [{name: http, containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: web, port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.10, selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: x}
";

fn assumed(files: &[(&str, &str)], path: &str, namespace: Option<&str>) -> Loaded {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let assumptions = Assumptions { pods: true, namespace: namespace.map(str::to_owned) };
    let loaded = Loader::assuming(&folder.path().join(path), &assumptions).load_strictly();
    loaded.unwrap_or_else(|problems| panic!("{problems}"))
}

fn pods(loaded: &Loaded) -> Vec<String> {
    let pod = |pod: &weir_dataplane::model::Workload| {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        format!("{} {} {}", pod.name, pod.node.as_deref().unwrap_or("-"), addresses.join(","))
    };
    loaded.cluster.workloads.iter().map(pod).collect()
}

fn backends(loaded: &Loaded) -> Vec<String> {
    let service = |service: &Arc<weir_nat::ServicePort>| {
        let endpoints: Vec<String> = service.endpoints.iter().map(|e| format!("{}:{}", e.address, e.port)).collect();
        format!("{} {}:{} > {}", service.name, service.cluster_ips[0], service.port, endpoints.join(" "))
    };
    loaded.services.services.iter().map(service).collect()
}

#[test]
fn workloads_stand_for_pods_on_two_nodes() {
    let loaded = assumed(&[("all.yaml", MANIFESTS)], ".", None);
    assert_eq!(
        pods(&loaded),
        [
            "shop/alone this-node 10.244.0.13",
            "shop/web-0 this-node 10.244.0.10",
            "shop/web-1 another-node 10.244.128.10",
            "default/tidy-0 this-node 10.244.0.11",
            "default/tidy-1 another-node 10.244.128.11",
            "shop/web-0-statefulset this-node 10.244.0.12",
            "shop/web-1-statefulset another-node 10.244.128.12",
        ]
    );
    assert_eq!(
        backends(&loaded),
        [
            "shop/web:web 10.96.0.11:80 > 10.244.0.10:8080 10.244.128.10:8080 10.244.0.13:80",
            "shop/db 10.96.0.10:5432 > 10.244.0.12:5432 10.244.128.12:5432",
        ]
    );
    let assumed = loaded.assumed.as_ref().unwrap();
    assert_eq!((assumed.workloads.len(), assumed.pods, assumed.services, assumed.slices), (4, 1, 1, 2));
    assert_eq!(assumed.workloads[&("Deployment".into(), "shop/web".into())], ["shop/web-0", "shop/web-1"]);
    // What pods are made of is not skipped.
    let notes: Vec<String> = loaded.notes.topics().keys().map(ToString::to_string).collect();
    assert_eq!(notes, ["ConfigMap of v1: skipped"]);
    let labels = &loaded.policy.endpoints.iter().find(|pod| pod.name == "shop/web-1").unwrap().labels;
    assert_eq!((labels["app"].as_str(), labels["projectcalico.org/serviceaccount"].as_str()), ("web", "web"));
}

#[test]
fn what_weir_yaml_and_manifests_say_goes_before() {
    let node = |name: &str, net: &str, ip: &str| {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{net}]}}\n\
             status: {{addresses: [{{type: InternalIP, address: {ip}}}]}}\n"
        )
    };
    let manifests = MANIFESTS.to_owned()
        + &node("node-b", "10.1.2.0/24", "192.0.2.2")
        + &node("node-a", "10.1.1.0/24", "192.0.2.1")
        + "---\napiVersion: v1\nkind: Pod\nmetadata: {name: there, namespace: shop}\nspec: {nodeName: node-b}\n\
           status: {podIP: 10.1.1.10}\n";
    let weir = "nodeName: node-a\nmanifests: [cluster.yaml]\nserviceCIDRs: [10.5.0.0/16]\n";
    let loaded = assumed(&[("weir.yaml", weir), ("cluster.yaml", &manifests)], "weir.yaml", Some("jobs"));
    let pods = pods(&loaded);
    assert!(pods.contains(&"shop/there node-b 10.1.1.10".to_owned()), "{pods:?}");
    assert!(pods.contains(&"shop/web-0 node-a 10.1.1.11".to_owned()), "10.1.1.10 is taken: {pods:?}");
    assert!(pods.contains(&"jobs/tidy-1 node-b 10.1.2.11".to_owned()), "{pods:?}");
    assert!(backends(&loaded)[0].starts_with("shop/web:web 10.5.0.10:80 >"), "{:?}", backends(&loaded));
    assert_eq!(loaded.cluster.nodes.len(), 2);
}

#[test]
fn a_file_of_manifests_does_for_weir_yaml_but_a_bad_one_does_not() {
    let loaded = assumed(&[("all.yaml", MANIFESTS), ("other.yaml", "a: [\n")], "all.yaml", None);
    assert_eq!(loaded.cluster.workloads.len(), 7);
    let folder = tempfile::tempdir().unwrap();
    let assumptions = Assumptions { pods: true, namespace: None };
    for text in ["nodename: a\n", "kind: RouterConfig\n", ""] {
        let path = folder.path().join("weir.yaml");
        fs::write(&path, text).unwrap();
        Loader::assuming(&path, &assumptions).load().unwrap_err();
    }
    let problems = Loader::assuming(&folder.path().join("none.yaml"), &assumptions).load().unwrap_err();
    assert!(problems.diagnostics()[0].message.starts_with("cannot read the configuration"), "{problems}");
    let problems = load(folder.path()).unwrap_err();
    assert!(problems.diagnostics()[0].message.starts_with("cannot read the configuration"), "{problems}");
}

#[test]
fn hostile_workloads_make_no_pods_and_end_nothing() {
    let cluster = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: [web]}
spec: 7
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: none}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ports}
spec: {template: {spec: {containers: [{name: a, ports: [{containerPort: 99999}, {containerPort: x}]}]}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: \"a\\n---\\nkind: Pod\"}
spec: {template: {spec: {containers: [{name: a}]}}}
---
apiVersion: v1
kind: Service
metadata: {name: s}
spec: {selector: {a: b}, ports: [{port: 0, targetPort: -1}]}
";
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), cluster).unwrap();
    let assumptions = Assumptions { pods: true, namespace: None };
    let (loaded, problems) = Loader::assuming(folder.path(), &assumptions).load().unwrap();
    assert!(problems.is_some(), "the ports are no ports");
    assert!(loaded.services.services.is_empty());
    assert!(loaded.cluster.workloads.iter().all(|pod| pod.addresses.len() == 1));
}

#[test]
fn an_operators_prometheus_has_its_labels_and_ports() {
    let text = "apiVersion: monitoring.coreos.com/v1\nkind: Prometheus\nmetadata: {name: k8s, namespace: monitoring}\n\
                spec: {podMetadata: {labels: {part-of: kp}}, serviceAccountName: p, replicas: 2}\n";
    let loaded = assumed(&[("a.yaml", text)], "a.yaml", None);
    let pod = &loaded.policy.endpoints[0];
    assert_eq!(pod.name, "monitoring/prometheus-k8s-0");
    let label = |key: &str| pod.labels.get(key).map(String::as_str);
    assert_eq!((label("app.kubernetes.io/name"), label("part-of")), (Some("prometheus"), Some("kp")));
    assert_eq!(label("app.kubernetes.io/instance"), Some("k8s"));
    assert_eq!((pod.ports[0].name.as_str(), pod.ports[0].port), ("web", 9090));
}
