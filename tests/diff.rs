//! `weir diff`: what it prints of the demonstration's cluster, and how it ends.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

const DENY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny-all, namespace: default}\nspec: {podSelector: \
                    {}, policyTypes: [Ingress]}\n";
/// As in the demonstration's cluster.yaml, but for its port and policy.
const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: db-service, namespace: db}\nspec: {clusterIP: 10.152.183.88, \
                       internalTrafficPolicy: Local, ports: [{name: p, port: 3307}]}\n";

fn configuration() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo/node-a.yaml")
}

/// Runs it with a changed text as standard input, and more arguments.
fn diff(changed: &str, more: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.args(["diff", "-f", "-", "-c"]).arg(configuration()).args(more);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(changed.as_bytes()).unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Without the folder of standard input, which has another name each time.
fn without_folder(text: &str) -> String {
    text.lines()
        .map(|line| match (line.rfind(" (/"), line.find("standard-input.yaml")) {
            (Some(begin), Some(end)) => format!("{} ({}\n", &line[..begin], &line[end..]),
            _ => format!("{line}\n"),
        })
        .collect()
}

#[test]
fn a_policy_that_denies_is_told_with_what_decided_before_and_after() {
    let (code, text, errors) = diff(DENY, &[]);
    let expected = "\
Connections: 9 pairs fare otherwise.
  anywhere else (IPv4), default/client, default/webapp-1, default/webapp-2 > default/client, default/webapp-1, default/webapp-2 tcp/80
    before: allowed: ingress by profile kns.default
    after:  denied by ingress: ingress by default-deny NetworkPolicy/default/deny-all (standard-input.yaml:1)
";
    assert_eq!((code, without_folder(&text).as_str(), errors.as_str()), (1, expected, ""));
    let (code, text, _) = diff(DENY, &["--output", "json", "--namespace", "default/client"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &json["pairs"], &json["services"]), (1, &Value::from(5), &Value::Array(Vec::new())), "{text}");
    assert_eq!(json["connections"][0]["after"]["verdict"], "deniedByIngress");
}

#[test]
fn a_service_is_told_with_what_it_answers_otherwise() {
    let (code, text, _) = diff(SERVICE, &["--output", "json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    let service = &json["services"][0];
    assert_eq!((code, &service["what"]), (1, &Value::from("changed")), "{text}");
    assert!(service["name"].as_str().unwrap().starts_with("db/db-service"), "{text}");
    let fields: Vec<_> =
        service["fields"].as_array().unwrap().iter().map(|field| field["field"].as_str().unwrap()).collect();
    assert_eq!(fields, ["port", "internalTrafficPolicy"]);
}

#[test]
fn nothing_an_error_and_a_faulty_change_are_told_apart() {
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: nobody}\n";
    assert_eq!(diff(namespace, &[]), (0, "Nothing changes.\n".to_owned(), String::new()));
    let (code, text, errors) = diff("kind: ConfigMap\napiVersion: v1\nmetadata: {name: x}\n", &[]);
    assert_eq!((code, text.as_str()), (2, ""));
    assert!(errors.contains("no object that weir reads"), "{errors}");
    let output =
        Command::new(env!("CARGO_BIN_EXE_weir")).args(["diff", "-c", "nowhere.yaml", "-f", "x.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere.yaml"));
    // A policy that cannot be read denies what it selects, as it would in a running router.
    let (code, text, _) = diff(&DENY.replace("policyTypes: [Ingress]", "policyTypes: [Ingres]"), &[]);
    assert!(
        code == 1 && text.contains("New problems:") && text.contains("Ingres") && text.contains("denied by"),
        "{text}"
    );
}
