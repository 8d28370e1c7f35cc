//! What `weir trace` says of the table's cells, which must be what their sockets saw.

use std::{collections::BTreeMap, fs, io::Write, process::Stdio};

use serde_json::{Value, json};

use super::{
    Cell, FAMILIES, Outcome, Protocol,
    cluster::{GATEWAY, NODE_A, What, Who},
};
use crate::site::{Site, weir_binary};

/// The node that judges a cell's packets first; none where they leave their own node past weir.
fn judge(cell: &Cell) -> Option<&'static str> {
    match (cell.who, cell.what) {
        (Who::NodeThere, What::ExternalOwn) => None,
        // Its routes lead to the very node.
        (Who::Outside, What::NodePortThere) => Some("node-b"),
        (Who::Outside, What::HostPort | What::Pod) => Some(cell.backend.node()),
        _ => Some(cell.who.asks()),
    }
}

/// A cell as a flow. What the kernel forwards comes by the node's own device, with another source than its own.
fn flow(id: usize, cell: &Cell) -> Value {
    let device = match cell.who {
        Who::PodHere | Who::PodThere | Who::Itself => None,
        Who::Node | Who::NodeThere | Who::Behind => Some("host"),
        Who::Outside => Some("eth0"),
    };
    let to = cell.address();
    let mut flow = json!({
        "id": id, "src": cell.family.address(cell.who.address()), "dst": to.ip(),
        "proto": if cell.protocol == Protocol::Tcp { "tcp" } else { "udp" }, "sport": 40_000, "dport": to.port(),
    });
    if let Some(device) = device {
        flow["device"] = device.into();
    }
    flow
}

/// Answers of `weir trace` on a node, by id.
fn traces(site: &Site, node: &str, flows: &str) -> BTreeMap<u64, Value> {
    // A trace without a router does not know the node's other devices.
    let mut config = fs::read_to_string(site.config(node)).unwrap();
    if node == "node-a" {
        let own = [NODE_A, GATEWAY].iter().flat_map(|address| FAMILIES.map(|family| family.address(address)));
        config += &format!("localAddresses: {}\n", json!(own.collect::<Vec<_>>()));
    }
    let config = site.write(&format!("trace-{node}.yaml"), &config).display().to_string();
    let weir = weir_binary();
    let command = [weir.to_str().unwrap(), "trace", "-c", &config, "--flows", "-"];
    let trace = site.lab.command(node, &command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut trace = trace.unwrap();
    let mut stdin = trace.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(flows.as_bytes()).unwrap());
        trace.wait_with_output().unwrap()
    });
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| {
            let answer: Value = serde_json::from_str(line).unwrap();
            (answer["id"].as_u64().unwrap(), answer)
        })
        .collect()
}

/// Cells of which a trace says what their sockets did not see.
pub fn disagreements(site: &Site, seen: &BTreeMap<Cell, Outcome>) -> Vec<(Cell, Value)> {
    let mut wrong = Vec::new();
    for node in ["node-a", "node-b"] {
        let cells: Vec<&Cell> = seen.keys().filter(|cell| judge(cell) == Some(node)).collect();
        let flows: String = cells.iter().enumerate().map(|(id, cell)| format!("{}\n", flow(id, cell))).collect();
        let answers = traces(site, node, &flows);
        for (id, cell) in cells.into_iter().enumerate() {
            let answer = &answers[&(id as u64)];
            let agrees = match answer["verdict"].as_str().expect("a verdict") {
                "drop" => seen[cell] == Outcome::Dropped,
                "reject" => seen[cell] == Outcome::Refused,
                // What becomes of it on another node, this one cannot say.
                _ => {
                    let leaves = ["direct", "none"].iter().any(|kind| answer["route"]["kind"] == **kind);
                    leaves || matches!(seen[cell], Outcome::Answered(_))
                }
            };
            if !agrees {
                wrong.push((*cell, answer.clone()));
            }
        }
    }
    wrong
}
