//! What several commands print alike: connections and counters as JSON.

use serde_json::{Map, Value, json};
use weir_conntrack::Entry;
use weir_dataplane::counters::Totals;
use weir_packet::{Address, FlowKey};

/// A connection as `weir replay` and `weir conntrack` print it.
pub fn connection<A: Address>(entry: &Entry<A>) -> Value {
    let direction = |key: FlowKey<A>| {
        json!({
            "src": key.src.to_ip(), "sport": key.ports.source(),
            "dst": key.dst.to_ip(), "dport": key.ports.destination(),
        })
    };
    json!({
        "proto": entry.original.protocol.to_string(),
        "original": direction(entry.original),
        "reply": direction(entry.reply),
        "state": entry.lifecycle.name(),
        "tcpState": entry.tcp_state.map(|state| state.name()),
    })
}

/// Counters as JSON, as the contract names them.
pub fn counters_json(totals: &Totals) -> Value {
    let drops: Map<String, Value> =
        totals.drops.iter().map(|(reason, n)| (reason.name().into(), (*n).into())).collect();
    json!({
        "rx": totals.rx, "generated": totals.generated, "tx": totals.tx, "punted": totals.punted,
        "consumed": totals.consumed, "held": totals.held, "drops": drops,
    })
}

/// Counters in a line, for a person.
pub fn counters_text(totals: &Totals) -> String {
    let mut drops = totals.drops.clone();
    drops.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let reasons: Vec<String> = drops.iter().map(|(reason, n)| format!("{} {n}", reason.name())).collect();
    let dropped: u64 = drops.iter().map(|(_, n)| n).sum();
    let named = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    format!(
        "{} packets in, {} made here: {} sent, {} to the node, {} used up, {dropped} dropped{named}",
        totals.rx, totals.generated, totals.tx, totals.punted, totals.consumed
    )
}
