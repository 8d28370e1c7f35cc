//! Sets of L4 ports in the text form of net.ipv4.ip_local_reserved_ports ("8080,9000-9100"), and the ports that the node
//! listens on.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use weir_packet::Protocol;

/// A set of ports: inclusive ranges, sorted, neither overlapping nor adjacent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortSet(Vec<(u16, u16)>);

impl PortSet {
    /// The ports from `first` to `last`, both included; empty if `last` is less.
    pub fn range(first: u16, last: u16) -> Self {
        Self(if first <= last { vec![(first, last)] } else { Vec::new() })
    }

    /// These ports.
    pub fn of(ports: impl IntoIterator<Item = u16>) -> Self {
        let mut ranges: Vec<(u16, u16)> = ports.into_iter().map(|port| (port, port)).collect();
        ranges.sort_unstable();
        Self::default().union(&Self(ranges))
    }

    /// Whether no port is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ports in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut ranges: Vec<(u16, u16)> = self.0.iter().chain(&other.0).copied().collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => *end = (*end).max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// The ports of this that are not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let mut left = self.0.clone();
        for &(cut_first, cut_last) in &other.0 {
            left = left
                .into_iter()
                .flat_map(|(first, last)| {
                    let before = (first < cut_first).then(|| (first, last.min(cut_first.saturating_sub(1))));
                    let after = (last > cut_last).then(|| (first.max(cut_last.saturating_add(1)), last));
                    [before, after]
                })
                .flatten()
                .collect();
        }
        Self(left)
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (first, last)) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(",")?;
            }
            write!(f, "{first}")?;
            if first != last {
                write!(f, "-{last}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for PortSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| format!("{text:?} is no port"));
        let mut set = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (port(first)?, port(last)?),
                None => (port(part)?, port(part)?),
            };
            if first > last {
                return Err(format!("the range {part:?} runs backwards"));
            }
            set = set.union(&Self::range(first, last));
        }
        Ok(set)
    }
}

/// Ports at which sockets of the node wait for anybody: TCP's listeners, and UDP sockets that are not connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listening {
    /// TCP's.
    pub tcp: BTreeSet<u16>,
    /// UDP's.
    pub udp: BTreeSet<u16>,
}

impl Listening {
    /// As /proc/net lists them for this network namespace. What cannot be read is taken for empty.
    pub fn read() -> Self {
        let of = |tables: [&str; 2]| {
            // Of this thread: the process may have entered a namespace after it began.
            let files =
                tables.into_iter().filter_map(|table| File::open(format!("/proc/thread-self/net/{table}")).ok());
            let lines = files.flat_map(|file| BufReader::new(file).lines().map_while(Result::ok));
            lines.filter_map(|line| listening_port(&line)).collect()
        };
        Self { tcp: of(["tcp", "tcp6"]), udp: of(["udp", "udp6"]) }
    }

    /// What somebody asks about: source ports of `range` may not be among them, and host endpoints' policy asks about each of TCP's.
    #[must_use]
    pub fn relevant(mut self, range: (u16, u16), has_host_endpoints: bool) -> Self {
        let within = |port: &u16| (range.0..=range.1).contains(port);
        self.udp.retain(within);
        self.tcp.retain(|port| has_host_endpoints || within(port));
        self
    }

    /// All, of both protocols.
    pub fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.tcp.iter().chain(&self.udp).copied()
    }
}

/// What connected UDP sockets of the node have: what comes to their ports are answers that they wait for. TCP's are told by their segments, and
/// one that waits for anybody yields to a pod's host port, as to the rules of a portmap plugin. Some runtimes hold host ports by such sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets(BTreeSet<(Protocol, u16, IpAddr)>);

impl Sockets {
    /// As /proc/net lists them for this network namespace. What cannot be read is taken for empty.
    pub fn read() -> Self {
        let of = |table: &str| {
            // Of this thread: the process may have entered a namespace after it began.
            let file = File::open(format!("/proc/thread-self/net/{table}")).ok();
            let lines = file.into_iter().flat_map(|file| BufReader::new(file).lines().map_while(Result::ok));
            lines.filter_map(|line| connected(&line)).collect::<Vec<_>>()
        };
        Self(["udp", "udp6"].into_iter().flat_map(of).map(|(port, address)| (Protocol::UDP, port, address)).collect())
    }

    /// These, for tests.
    #[cfg(test)]
    pub fn of(sockets: impl IntoIterator<Item = (Protocol, u16, IpAddr)>) -> Self {
        Self(sockets.into_iter().collect())
    }

    /// Whether one has that port at an address of which `is_there` says yes.
    pub fn any(&self, protocol: Protocol, port: u16, is_there: impl Fn(IpAddr) -> bool) -> bool {
        let (least, most) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)));
        self.0.range((protocol, port, least)..=(protocol, port, most)).any(|(.., address)| is_there(*address))
    }
}

/// Where the socket of a line of /proc/net/udp is bound, if it is connected.
fn connected(line: &str) -> Option<(u16, IpAddr)> {
    let mut words = line.split_whitespace();
    let (local, _remote, state) = (words.nth(1)?, words.next()?, words.next()?);
    let (address, port) = local.rsplit_once(':')?;
    // Words of the address in the machine's order (net/ipv4/tcp_ipv4.c, get_tcp4_sock).
    let word = |at: usize| u32::from_str_radix(address.get(8 * at..8 * at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let address: IpAddr = match address.len() {
        8 => word(0)?.into(),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let address = Ipv6Addr::from(<[u8; 16]>::try_from(words.as_flattened()).ok()?);
            address.to_ipv4_mapped().map_or(address.into(), IpAddr::V4)
        }
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    (state == ESTABLISHED).then_some((port, address))
}

/// net.ipv4.ip_local_port_range, of both families: the first and the last. The kernel's default where it cannot be read.
pub fn ephemeral_ports() -> (u16, u16) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().map(|port| port.parse().ok());
    match (ports.next().flatten(), ports.next().flatten()) {
        (Some(first), Some(last)) => (first, last),
        _ => (32_768, 60_999),
    }
}

/// include/net/tcp_states.h
const LISTEN: &str = "0A";
/// The same, for UDP too.
const ESTABLISHED: &str = "01";

/// The local port of a line of /proc/net/tcp or udp, if its socket waits for anybody.
fn listening_port(line: &str) -> Option<u16> {
    const UDP_UNCONNECTED: &str = "07";
    let mut words = line.split_whitespace();
    let (local, _remote, state) = (words.nth(1)?, words.next()?, words.next()?);
    let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
    [LISTEN, UDP_UNCONNECTED].contains(&state).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_found_by_their_state() {
        let line = |local: &str, state: &str| {
            listening_port(&format!(
                "   0: {local} 0100007F:D431 {state} 00000000:00000000 00:00000000 00000000     0 0 1"
            ))
        };
        assert_eq!(line("0100007F:280A", "0A"), Some(10250));
        assert_eq!(line("00000000000000000000000000000000:280A", "07"), Some(10250));
        assert_eq!(
            (line("0100007F:280A", "01"), line("0100007F:280A", "06"), line("garbage", "0A")),
            (None, None, None)
        );
        assert_eq!(listening_port("  sl  local_address rem_address   st tx_queue rx_queue tr"), None);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("[::1]:0").unwrap();
        let [tcp, udp] = [listener.local_addr().unwrap().port(), udp.local_addr().unwrap().port()];
        let of = |range, has_host_endpoints| Listening::read().relevant(range, has_host_endpoints);
        let only = |ports: &[u16]| ports.iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(of((tcp, tcp), false).tcp, only(&[tcp]));
        assert_eq!(of((udp, udp), false).udp, only(&[udp]));
        assert!(!of((0, 0), false).tcp.contains(&tcp) && of((0, 0), true).tcp.contains(&tcp));
        assert_eq!(of((0, 0), true).udp, only(&[]));
    }

    #[test]
    fn connected_sockets_are_found_with_their_addresses() {
        let bound = || std::net::UdpSocket::bind("[::1]:0").unwrap();
        let (waits, asks) = (bound(), bound());
        asks.connect("[::1]:9").unwrap();
        let sockets = Sockets::read();
        for (socket, expected) in [(&waits, false), (&asks, true)] {
            let at = socket.local_addr().unwrap();
            assert_eq!(sockets.any(Protocol::UDP, at.port(), |address| address == at.ip()), expected, "{at}");
        }
        let line = |local: &str| connected(&format!("0: {local} 0:0 01 0"));
        assert_eq!(line("00000000000000000000000000000000:0035"), Some((53, Ipv6Addr::UNSPECIFIED.into())));
        assert_eq!(line("0000000000000000FFFF00000100007F:0035"), Some((53, Ipv4Addr::LOCALHOST.into())));
        assert_eq!((line("0100007:0035"), line("local_address"), line("")), (None, None, None));
    }

    fn set(text: &str) -> PortSet {
        text.parse().unwrap()
    }

    #[test]
    fn text_is_read_and_written_as_the_kernel_does() {
        assert_eq!(PortSet::of([7, 65535, 5, 6, 7, 0]).to_string(), "0,5-7,65535");
        for (text, written) in [
            ("", ""),
            ("\n", ""),
            ("8080\n", "8080"),
            ("1-3,5", "1-3,5"),
            ("5,1-3,4", "1-5"),
            ("0,65535", "0,65535"),
            ("10-20,15-30", "10-30"),
        ] {
            assert_eq!(set(text).to_string(), written, "{text:?}");
        }
        for bad in ["x", "70000", "5-3", "1-2-3", "-1"] {
            assert!(bad.parse::<PortSet>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn taking_away_leaves_what_others_reserved() {
        assert_eq!(set("8080,10000-29999").minus(&set("10000-29999")), set("8080"));
        assert_eq!(set("1-10").minus(&set("3-4,7")), set("1-2,5-6,8-10"));
        assert_eq!(set("0-65535").minus(&set("0,65535")), set("1-65534"));
        assert_eq!(set("5").minus(&set("0-65535")), set(""));
    }

    /// The dull twin: a flag per port.
    #[test]
    fn union_and_minus_agree_with_flags() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: u64| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let flags = |set: &PortSet| {
            let mut flags = vec![false; 65536];
            for &(first, last) in &set.0 {
                flags[usize::from(first)..=usize::from(last)].fill(true);
            }
            flags
        };
        for round in 0..300 {
            // Crowded at both ends, where the arithmetic could wrap.
            let base = [0, 30_000, 65_336][round % 3];
            let mut build = || {
                (0..random(8)).fold(PortSet::default(), |set, _| {
                    let first = base + random(200) as u32;
                    set.union(&PortSet::range(first as u16, (first + random(20) as u32).min(65_535) as u16))
                })
            };
            let (a, b) = (build(), build());
            let (flags_a, flags_b) = (flags(&a), flags(&b));
            let either: Vec<bool> = flags_a.iter().zip(&flags_b).map(|(a, b)| *a || *b).collect();
            let only: Vec<bool> = flags_a.iter().zip(&flags_b).map(|(a, b)| *a && !*b).collect();
            assert_eq!(flags(&a.union(&b)), either, "{a} and {b}");
            assert_eq!(flags(&a.minus(&b)), only, "{a} without {b}");
            assert_eq!(set(&a.to_string()), a);
        }
    }
}
