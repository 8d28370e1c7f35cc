//! `weir conntrack`: the connections of a running router, listed, counted, deleted, watched.
//!
//! The router answers on a thread of its own, one line of JSON for each connection, as it reads the table; workers are not
//! disturbed, whatever the table's size and however slow the reader. Filters are applied there.
//!
//! Events are found by comparing the table with what it was a moment before: nothing is asked of the workers. Since a
//! connection stays for its timeout after its last packet, what is missed is only what came and was evicted or deleted
//! within [`WATCH_INTERVAL`].

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::{self, BufWriter, Write},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::{Value, json};
use weir_conntrack::{Entry, Handle, Identity, Lifecycle, Table, TcpState};
use weir_dataplane::{clock::now, offload::Offload, tables::Tables, worker::Shared};
use weir_packet::{Address, Direction, FlowKey, Protocol};
use weir_sync::{Arc, Domain};

use crate::{
    control::{self, AskError, Request},
    report::connection,
};

/// How often a watched table is looked at.
pub const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// Connections that are looked at in one turn, for deletions.
const TURN_CONNECTIONS: u32 = 256;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Print them.
    List,
    /// Print their number.
    Count,
    /// Remove them; the next packet of each opens a new one, or is refused.
    Delete,
    /// Print a line whenever one appears, changes its state, or goes, until interrupted.
    Watch,
}

/// A connection's life, as a filter names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// No packet has come back.
    Unreplied,
    /// Packets in both directions.
    Established,
    /// One side has ended it.
    Closing,
    /// Over.
    Closed,
}

impl From<Lifecycle> for State {
    fn from(lifecycle: Lifecycle) -> Self {
        match lifecycle {
            Lifecycle::Unreplied => Self::Unreplied,
            Lifecycle::Established => Self::Established,
            Lifecycle::Closing => Self::Closing,
            Lifecycle::Closed => Self::Closed,
        }
    }
}

fn protocol(text: &str) -> Result<u8, String> {
    let number = Protocol::from_name(text).map(|protocol| protocol.0);
    number.ok_or_else(|| "expected tcp, udp, sctp, icmp, icmpv6 or a protocol number".into())
}

fn tcp_state(text: &str) -> Result<String, String> {
    let names = TcpState::ALL.map(TcpState::name);
    let known = names.iter().find(|name| name.eq_ignore_ascii_case(text));
    known.map(|name| (*name).to_owned()).ok_or_else(|| format!("expected one of {}", names.join(", ")))
}

fn family(text: &str) -> Result<u8, String> {
    text.parse().ok().filter(|family| [4, 6].contains(family)).ok_or_else(|| "expected 4 or 6".into())
}

fn known_family<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u8>, D::Error> {
    match Option::deserialize(deserializer)? {
        None => Ok(None),
        Some(family @ (4 | 6)) => Ok(Some(family)),
        Some(other) => Err(D::Error::custom(format_args!("family: {other} is neither 4 nor 6"))),
    }
}

fn network(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| address()).map_err(|_| "expected an address, or a prefix like 10.1.0.0/16".into())
}

/// Which connections: all conditions hold. Each is about the packets of the original direction as they arrive, those with `reply` about
/// the packets that answer them.
// A condition that is not known is refused: without it, a deletion would be one of all.
#[derive(Clone, Debug, Default, Args, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Filter {
    /// Protocol: tcp, udp, sctp, icmp, icmpv6, or a number.
    #[arg(short, long, value_parser = protocol)]
    pub proto: Option<u8>,
    /// Original source address or prefix.
    #[arg(short, long, value_name = "NET", value_parser = network)]
    pub src: Option<IpNet>,
    /// Original destination address or prefix: what the client wanted, such as a service's address.
    #[arg(short, long, value_name = "NET", value_parser = network)]
    pub dst: Option<IpNet>,
    /// Original source port.
    #[arg(long, value_name = "PORT")]
    pub sport: Option<u16>,
    /// Original destination port.
    #[arg(long, value_name = "PORT")]
    pub dport: Option<u16>,
    /// Source of replies: the backend, where there is one.
    #[arg(short = 'r', long, value_name = "NET", value_parser = network)]
    pub reply_src: Option<IpNet>,
    /// Destination of replies: the masquerade address, where there is one.
    #[arg(short = 'q', long, value_name = "NET", value_parser = network)]
    pub reply_dst: Option<IpNet>,
    /// Any of the four addresses.
    #[arg(short, long, value_name = "NET", value_parser = network)]
    pub address: Option<IpNet>,
    /// How far its life is.
    #[arg(long, value_enum)]
    pub state: Option<State>,
    /// TCP state under netfilter's name: SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE or SYN_SENT2.
    #[arg(long, value_name = "STATE", value_parser = tcp_state)]
    pub tcp_state: Option<String>,
    /// Only those whose destination is translated.
    #[arg(long)]
    pub dnat: bool,
    /// Only those whose source is translated.
    #[arg(long)]
    pub snat: bool,
    /// Only those that were handed over to the kernel's programs.
    #[arg(long)]
    pub offload: bool,
    /// Only IPv4 or only IPv6.
    #[arg(short, long, value_name = "4|6", value_parser = family)]
    #[serde(deserialize_with = "known_family")]
    pub family: Option<u8>,
}

impl Filter {
    /// Whether it says anything at all.
    pub fn is_empty(&self) -> bool {
        let said = serde_json::to_value(self).unwrap_or(Value::Null);
        said.as_object().is_none_or(|fields| fields.values().all(|value| value.is_null() || value == false))
    }

    /// Whether a connection meets all conditions.
    pub fn matches<A: Address>(&self, entry: &Entry<A>) -> bool {
        let Entry { original, reply, .. } = entry;
        let within = |net: &Option<IpNet>, address: A| net.as_ref().is_none_or(|net| net.contains(&address.to_ip()));
        let any = |net: &IpNet| {
            [original.src, original.dst, reply.src, reply.dst].map(A::to_ip).iter().any(|ip| net.contains(ip))
        };
        let [dnat, snat] = translated(original, reply);
        self.proto.is_none_or(|proto| original.protocol.0 == proto)
            && within(&self.src, original.src)
            && within(&self.dst, original.dst)
            && within(&self.reply_src, reply.src)
            && within(&self.reply_dst, reply.dst)
            && self.address.as_ref().is_none_or(any)
            && self.sport.is_none_or(|port| original.ports.source() == port)
            && self.dport.is_none_or(|port| original.ports.destination() == port)
            && self.state.is_none_or(|state| State::from(entry.lifecycle) == state)
            && self
                .tcp_state
                .as_ref()
                .is_none_or(|name| entry.tcp_state.is_some_and(|state| state.name().eq_ignore_ascii_case(name)))
            && (!self.dnat || dnat)
            && (!self.snat || snat)
            && (!self.offload || entry.offload_slot.is_some())
            && self.family.is_none_or(|family| (family == 6) == original.src.to_ip().is_ipv6())
    }
}

/// Whether the destination, and the source, are translated.
fn translated<A: Address>(original: &FlowKey<A>, reply: &FlowKey<A>) -> [bool; 2] {
    let to = reply.invert();
    [
        (to.dst, to.ports.destination()) != (original.dst, original.ports.destination()),
        (to.src, to.ports.source()) != (original.src, original.ports.source()),
    ]
}

/// What is asked of the router.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Query {
    /// What to do.
    pub action: Action,
    /// With which connections.
    #[serde(default)]
    pub filter: Filter,
}

fn entry_json<A: Address>(entry: &Entry<A>, offload: Option<&Offload>) -> Value {
    let mut value = connection(entry);
    let [dnat, snat] = translated(&entry.original, &entry.reply);
    value["assured"] = entry.assured.into();
    value["expiresSeconds"] = (entry.remaining_ticks / 100).into();
    value["device"] = entry.attributes.device.into();
    value["dnat"] = dnat.into();
    value["snat"] = snat.into();
    // What the kernel's programs carried: workers do not count by connection.
    if let Some(flow) = offload.zip(entry.offload_slot).and_then(|(offload, slot)| offload.flow(slot)) {
        for (name, direction) in [("original", Direction::Original), ("reply", Direction::Reply)] {
            let (packets, bytes) = flow.carried(direction);
            value["offload"][name] = json!({"packets": packets, "bytes": bytes});
        }
    }
    value
}

/// Answers a query, on a thread that this blocks as long as it takes.
///
/// # Errors
/// Where the reader has gone.
pub fn answer(stream: UnixStream, shared: &Shared, domain: &Arc<Domain>, query: &Query) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 * 1024, stream);
    let (Tables { v4, v6 }, offload) = (&shared.tables, shared.offload.as_deref());
    match query.action {
        Action::List => {
            list(v4, offload, &query.filter, &mut out)?;
            list(v6, offload, &query.filter, &mut out)?;
            writeln!(out, "{}", json!({"end": true}))?;
        }
        Action::Count => {
            let count = count(v4, &query.filter) + count(v6, &query.filter);
            writeln!(out, "{}", json!({"count": count}))?;
        }
        Action::Delete => {
            let deleted = delete(v4, domain, &query.filter) + delete(v6, domain, &query.filter);
            writeln!(out, "{}", json!({"deleted": deleted}))?;
        }
        Action::Watch => {
            let (mut of_v4, mut of_v6) = (Watched::new(v4), Watched::new(v6));
            // So that the reader knows from when on it sees all.
            writeln!(out, "{}", json!({"watching": true}))?;
            out.flush()?;
            while !shared.stop.load(std::sync::atomic::Ordering::Relaxed) {
                thread::sleep(WATCH_INTERVAL);
                of_v4.compare(v4, offload, &query.filter, &mut out)?;
                of_v6.compare(v6, offload, &query.filter, &mut out)?;
                // An empty line finds out whether anybody still reads.
                writeln!(out)?;
                out.flush()?;
            }
        }
    }
    out.flush()
}

fn entries<'t, A: Address>(table: &'t Table<A>, filter: &'t Filter) -> impl Iterator<Item = Entry<A>> + 't {
    let now = now();
    (0..table.used()).filter_map(move |index| table.entry(index, now)).filter(|entry| filter.matches(entry))
}

fn list<A: Address>(
    table: &Table<A>,
    offload: Option<&Offload>,
    filter: &Filter,
    out: &mut impl Write,
) -> io::Result<()> {
    entries(table, filter).try_for_each(|entry| writeln!(out, "{}", entry_json(&entry, offload)))
}

fn count<A: Address>(table: &Table<A>, filter: &Filter) -> usize {
    if filter.is_empty() { table.len() } else { entries(table, filter).count() }
}

fn delete<A: Address>(table: &Table<A>, domain: &Arc<Domain>, filter: &Filter) -> usize {
    let mut participant = domain.join();
    let mut handle: Handle = table.handle();
    let (now, used) = (now(), table.used());
    let mut deleted = 0;
    for start in (0..used).step_by(TURN_CONNECTIONS as usize) {
        // Short turns: what workers free waits for them.
        let turn = participant.enter();
        for index in start..(start + TURN_CONNECTIONS).min(used) {
            let entry = table.entry(index, now).filter(|entry| filter.matches(entry));
            deleted += usize::from(entry.is_some_and(|e| table.remove_listed(&mut handle, e.identity, &turn)));
        }
    }
    deleted
}

/// A table as it was at the last look.
struct Watched<A: Address> {
    known: HashMap<u32, Entry<A>>,
}

impl<A: Address> Watched<A> {
    fn new(table: &Table<A>) -> Self {
        let all = Filter::default();
        Self { known: entries(table, &all).map(|entry| (entry.identity.index, entry)).collect() }
    }

    /// Tells what happened since the last look, and looks anew.
    fn compare(
        &mut self,
        table: &Table<A>,
        offload: Option<&Offload>,
        filter: &Filter,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let mut tell = |event: &str, entry: &Entry<A>| {
            if !filter.matches(entry) {
                return Ok(());
            }
            let mut value = json!({"event": event});
            let fields = entry_json(entry, offload);
            for (key, field) in fields.as_object().into_iter().flatten() {
                value[key] = field.clone();
            }
            writeln!(out, "{value}")
        };
        let now = now();
        for index in 0..table.used() {
            let before = self.known.get(&index);
            let after = table.entry(index, now);
            let identity = |entry: &Entry<A>| -> Identity { entry.identity };
            if before.map(identity) != after.as_ref().map(identity) {
                before.map_or(Ok(()), |before| tell("destroy", before))?;
                after.as_ref().map_or(Ok(()), |after| tell("new", after))?;
            } else if let (Some(before), Some(after)) = (before, &after) {
                let facts = |entry: &Entry<A>| (entry.lifecycle, entry.tcp_state, entry.assured);
                if facts(before) == facts(after) {
                    continue;
                }
                tell("update", after)?;
            }
            match after {
                Some(after) => drop(self.known.insert(index, after)),
                None => drop(self.known.remove(&index)),
            }
        }
        Ok(())
    }
}

/// Asks the router that runs with `config`, and gives each line of its answer to `show` until that returns an error.
///
/// # Errors
/// Where no router answers, or its answer cannot be read or shown.
pub fn ask(config: &Path, query: &Query, show: impl FnMut(&Value) -> io::Result<()>) -> Result<(), AskError> {
    let ended = control::ask_lines(config, &Request::Conntrack(query.clone()), show)?;
    match query.action {
        Action::List if !ended => Err(AskError::Broken(io::ErrorKind::UnexpectedEof.into())),
        _ => Ok(()),
    }
}

/// A connection in one line, as `conntrack -L` prints it.
pub fn text_line(entry: &Value) -> String {
    let mut line = String::new();
    if let Some(event) = entry["event"].as_str() {
        let event = format!("[{}]", event.to_uppercase());
        let _ = write!(line, "{event:>9} ");
    }
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let proto = word(&entry["proto"]);
    let number = protocol(&proto).unwrap_or(0);
    let _ = write!(line, "{proto:<8} {number} {}", word(&entry["expiresSeconds"]));
    if let Some(state) = entry["tcpState"].as_str() {
        let _ = write!(line, " {state}");
    }
    let is_icmp = proto.starts_with("icmp");
    for direction in ["original", "reply"] {
        let key = &entry[direction];
        let _ = write!(line, " src={} dst={}", word(&key["src"]), word(&key["dst"]));
        if is_icmp {
            let _ = write!(line, " id={}", key["sport"]);
        } else if matches!(proto.as_str(), "tcp" | "udp" | "sctp") {
            let _ = write!(line, " sport={} dport={}", key["sport"], key["dport"]);
        }
        if let Some(carried) = entry["offload"].get(direction) {
            let _ = write!(line, " packets={} bytes={}", carried["packets"], carried["bytes"]);
        }
        if direction == "original" && entry["state"] == "unreplied" {
            line.push_str(" [UNREPLIED]");
        }
    }
    if entry["assured"] == true {
        line.push_str(" [ASSURED]");
    }
    if entry["offload"].is_object() {
        line.push_str(" [OFFLOAD]");
    }
    line
}
