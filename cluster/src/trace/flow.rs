//! A flow as `weir trace` is asked about it: one line of JSON.

use serde_json::{Map, Value, error::Category};
use weir_packet::Protocol;

use crate::text::problem::nearest;

/// Keys that a flow may have. What is expected of it is none of the router's, but flows are often kept with it.
const KEYS: [&str; 10] = ["id", "src", "dst", "proto", "sport", "dport", "icmpType", "icmpCode", "device", "expect"];

/// A line of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Comes back with the answer.
    pub id: Value,
    /// An address, "namespace/pod", or a workload: "deploy/namespace/name", "namespace/name".
    pub src: String,
    /// The same, or "svc/namespace/name".
    pub dst: String,
    /// The protocol.
    pub protocol: Protocol,
    /// Source port; of ICMP echoes the identifier.
    pub sport: Option<u16>,
    /// Destination port; protocols with ports have one, but a service with one port need not be asked for it.
    pub dport: Option<Port>,
    /// ICMP type.
    pub icmp_type: Option<u8>,
    /// ICMP code.
    pub icmp_code: Option<u8>,
    /// The device that it comes by.
    pub device: Option<String>,
}

/// A destination port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port {
    /// By its number.
    Number(u16),
    /// By the name that the service or the pod has for it.
    Name(String),
}

/// The name of a service that is called "svc/name", "svc/namespace/name", or with "service".
pub(super) fn service_of(text: &str) -> Option<&str> {
    let (kind, name) = text.split_once('/')?;
    let is_service = ["svc", "service", "services"].contains(&kind.to_ascii_lowercase().as_str());
    is_service.then_some(name)
}

impl Flow {
    /// Reads a line.
    ///
    /// # Errors
    /// What is wrong with it, and its `id` if it has one.
    pub fn read(line: &str) -> Result<Self, (Value, String)> {
        let value: Value = serde_json::from_str(line).map_err(|error| {
            let message = match error.classify() {
                Category::Eof => "the line ends in the middle of its JSON object".to_owned(),
                _ => format!("this is not JSON from column {} on", error.column()),
            };
            (Value::Null, message)
        })?;
        let id = value.get("id").cloned().unwrap_or(Value::Null);
        let Value::Object(object) = value else {
            let example = r#"{"src": "10.0.0.1", "dst": "10.96.0.10", "proto": "tcp", "dport": 80}"#;
            return Err((id, format!("a flow is a JSON object like {example}")));
        };
        Self::of_object(&object, id.clone()).map_err(|message| (id, message))
    }

    /// The destination port's number; 0 where there is none, or only a name.
    pub fn dport_number(&self) -> u16 {
        match self.dport {
            Some(Port::Number(number)) => number,
            Some(Port::Name(_)) | None => 0,
        }
    }

    fn of_object(object: &Map<String, Value>, id: Value) -> Result<Self, String> {
        if let Some(unknown) = object.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let help = match nearest(unknown, KEYS) {
                Some(known) => format!("did you mean {known}?"),
                None => format!("known are {}", KEYS.join(", ")),
            };
            return Err(format!("unknown key {unknown}; {help}"));
        }
        // A key with null is one that is left out.
        let given = |key: &str| object.get(key).filter(|value| !value.is_null());
        let text = |key: &str| match given(key) {
            None => Err(format!("{key} is missing: an address or \"namespace/pod\"")),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(format!("{key}: {other} is no text; write an address or \"namespace/pod\" in quotes")),
        };
        let number = |key: &str, most: u64, what: &str| match given(key) {
            None => Ok(None),
            Some(value) => match value.as_u64().filter(|number| *number <= most) {
                Some(number) => Ok(Some(number)),
                None => Err(format!("{key}: {value} is not {what} (a number from 0 to {most})")),
            },
        };
        let port = |key: &str| number(key, u16::MAX.into(), "a port").map(|port| port.map(|port| port as u16));
        let byte = |key: &str, what: &str| number(key, u8::MAX.into(), what).map(|byte| byte.map(|byte| byte as u8));
        let protocol = given("proto").ok_or("proto is missing: tcp, udp, sctp, icmp, icmpv6 or a number")?;
        let protocol = match protocol {
            Value::String(name) => Protocol::from_name(name),
            other => other.as_u64().and_then(|number| u8::try_from(number).ok()).map(Protocol),
        }
        .ok_or_else(|| {
            format!("proto: {protocol} is neither tcp, udp, sctp, icmp, icmpv6 nor a number from 0 to 255")
        })?;
        let flow = Self {
            id,
            src: text("src")?,
            dst: text("dst")?,
            protocol,
            sport: port("sport")?,
            dport: match given("dport").and_then(Value::as_str).filter(|name| is_port_name(name)) {
                Some(name) => Some(Port::Name(name.to_owned())),
                None => port("dport")?.map(Port::Number),
            },
            icmp_type: byte("icmpType", "an ICMP type")?,
            icmp_code: byte("icmpCode", "an ICMP code")?,
            device: given("device").map(|_| text("device")).transpose()?,
        };
        if protocol.has_ports() && flow.dport.is_none() && service_of(&flow.dst).is_none() {
            return Err(format!("dport is missing: {protocol} packets go to a port"));
        }
        Ok(flow)
    }
}

/// Whether a text can be a port's name: one without a letter cannot (IANA service names, RFC 6335 section 5.1).
fn is_port_name(text: &str) -> bool {
    text.len() <= 63
        && text.bytes().any(|byte| byte.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_flow_is_told_in_words() {
        for (line, message) in [
            ("{\"src\": \"10.0.0.1\"", "the line ends in the middle of its JSON object"),
            ("{src: 1}", "this is not JSON from column 2 on"),
            (
                "[1]",
                "a flow is a JSON object like {\"src\": \"10.0.0.1\", \"dst\": \"10.96.0.10\", \"proto\": \"tcp\", \"dport\": 80}",
            ),
            ("{\"src\": \"a\", \"dst\": \"b\"}", "proto is missing: tcp, udp, sctp, icmp, icmpv6 or a number"),
            ("{\"dst\": \"b\", \"proto\": \"icmp\"}", "src is missing: an address or \"namespace/pod\""),
            (
                "{\"src\": 1, \"dst\": \"b\", \"proto\": 1}",
                "src: 1 is no text; write an address or \"namespace/pod\" in quotes",
            ),
            (
                "{\"src\": \"a\", \"dst\": \"b\", \"proto\": \"tpc\"}",
                "proto: \"tpc\" is neither tcp, udp, sctp, icmp, icmpv6 nor a number from 0 to 255",
            ),
            (
                "{\"src\": \"a\", \"dst\": \"b\", \"proto\": 256}",
                "proto: 256 is neither tcp, udp, sctp, icmp, icmpv6 nor a number from 0 to 255",
            ),
            ("{\"src\": \"a\", \"dst\": \"b\", \"proto\": \"tcp\"}", "dport is missing: tcp packets go to a port"),
            (
                "{\"src\": \"a\", \"dst\": \"b\", \"proto\": 17, \"dport\": null}",
                "dport is missing: udp packets go to a port",
            ),
            (
                "{\"src\": \"a\", \"dst\": \"b\", \"proto\": 6, \"dport\": 65536}",
                "dport: 65536 is not a port (a number from 0 to 65535)",
            ),
            (
                "{\"src\": \"a\", \"dst\": \"b\", \"proto\": 6, \"dport\": \"80\"}",
                "dport: \"80\" is not a port (a number from 0 to 65535)",
            ),
            (
                "{\"src\": \"a\", \"dst\": \"b\", \"proto\": 1, \"icmpType\": 256}",
                "icmpType: 256 is not an ICMP type (a number from 0 to 255)",
            ),
            ("{\"src\": \"a\", \"dst\": \"b\", \"proto\": 6, \"dprt\": 1}", "unknown key dprt; did you mean dport?"),
        ] {
            assert_eq!(Flow::read(line), Err((Value::Null, message.to_owned())), "{line}");
        }
        assert_eq!(Flow::read("{\"id\": 7, \"src\": \"a\"}").unwrap_err().0, 7);
    }

    #[test]
    fn what_may_be_left_out() {
        let flow = Flow::read(
            "{\"src\": \"a/b\", \"dst\": \"10.0.0.1\", \"proto\": \"ICMP\", \"device\": null, \"expect\": {}}",
        )
        .unwrap();
        assert_eq!((flow.protocol, flow.dport, flow.device), (Protocol::ICMP, None, None));
    }
}
