//! The shared cases: flows through `weir trace`, packets through `weir replay`, judged by the upstream projects' verdicts.
//! The runners (Python) build and read every packet themselves.

use std::process::{Command, Output};

/// Debian's own Python, which has Debian's python3-yaml.
const PYTHON: &str = "/usr/bin/python3";

fn run(script: &str, arguments: &[&str]) -> Output {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
    Command::new(PYTHON)
        .arg(format!("{folder}/{script}"))
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{PYTHON}: {error}; run scripts/setup.sh"))
}

fn all_agree(script: &str, arguments: &[&str]) {
    let output = run(script, arguments);
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{script} {arguments:?}: {}\n{said}\n{complained}", output.status);
}

const WEIR: &str = env!("CARGO_BIN_EXE_weir");

#[test]
fn services_as_kube_proxy() {
    all_agree("conform.py", &["kubeproxy", WEIR]);
}

#[test]
fn kubernetes_network_policy() {
    all_agree("conform.py", &["netpol", WEIR]);
}

#[test]
fn calico_policy() {
    all_agree("conform.py", &["calicopol", WEIR]);
}

#[test]
fn cluster_network_policy() {
    all_agree("conform.py", &["cnp", WEIR]);
}

#[test]
fn calicos_selector_language() {
    all_agree("conform.py", &["selector", WEIR]);
}

#[test]
fn packets_through_replay() {
    all_agree("packets.py", &[WEIR]);
}

#[test]
fn golden_replay_cases() {
    all_agree("packets.py", &[WEIR, "--cases", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")]);
}

#[test]
fn packet_cases_written_from_the_rules() {
    all_agree("../data/packet-cases/run.py", &[WEIR]);
}
