//! The kernel's own connection tracking, to compare with: a network namespace that forwards between two TUN devices and
//! drops what its conntrack calls invalid.
//!
//! The namespace has no name: it is a thread's, and gone with it, whatever happens. A packet that is written to one device
//! is forwarded, or not, before one that is written after it: a probe follows each packet, so that no test waits for what
//! does not come.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket},
};
use weir_packet::{Direction, Protocol, checksum::Sum};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
const PROBE_PORT: u16 = 9;

/// A connection as the kernel shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// The number of its TCP or SCTP state; 0 for protocols without states.
    pub state: u8,
    pub seen_reply: bool,
    pub assured: bool,
    /// Seconds until it expires.
    pub remaining: u32,
}

/// The forwarding kernel. Belongs to the thread that made it.
pub struct Kernel {
    devices: [File; 2],
    netlink: OwnedFd,
    probes: u16,
    buffer: Vec<u8>,
}

/// Runs a test against a kernel of its own.
pub fn with_kernel(sysctls: &[(&str, u32)], test: impl FnOnce(&mut Kernel) + Send) {
    if std::env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1") {
        eprintln!("skipped: WEIR_SKIP_E2E=1");
        return;
    }
    assert!(nix::unistd::geteuid().is_root(), "needs root (WEIR_SKIP_E2E=1 skips it)");
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("root may make a namespace");
                test(&mut Kernel::new(sysctls));
            })
            .join()
    });
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn run(command: &str) {
    let output = Command::new("sh").args(["-ec", command]).output().expect("sh starts");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn open_tun(name: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("the kernel has TUN devices");
    let mut request = [0u8; size_of::<libc::ifreq>()];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as u16;
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is as long as; ifreq is bytes to the kernel.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{name}: {}", std::io::Error::last_os_error());
    file
}

impl Kernel {
    fn new(sysctls: &[(&str, u32)]) -> Self {
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
            .or_else(ignore_missing)
            .expect("no IPv6 chatter");
        let devices = ["client", "server"].map(open_tun);
        run("ip link set lo up
             ip link set client mtu 65535 up
             ip link set server mtu 65535 up
             ip addr add 10.1.0.254/24 dev client
             ip addr add 10.2.0.254/24 dev server
             nft 'add table ip weir
                  add chain ip weir forward { type filter hook forward priority 0 ; }
                  add rule ip weir forward ct state invalid drop'");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("the kernel forwards");
        let shared = [("nf_conntrack_checksum", 0), ("nf_conntrack_log_invalid", 0)];
        for (name, value) in shared.iter().chain(sysctls) {
            fs::write(format!("/proc/sys/net/netfilter/{name}"), value.to_string())
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let netlink =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
                .expect("netlink");
        Self { devices, netlink, probes: 0, buffer: vec![0; 1 << 17] }
    }

    /// Sends a layer-4 packet from client to server, or back; whether it was forwarded.
    pub fn forwards(&mut self, direction: Direction, protocol: Protocol, packet: &[u8]) -> bool {
        self.probes = self.probes.wrapping_add(1);
        let id = self.probes;
        let [from, to] = match direction {
            Direction::Original => [0, 1],
            Direction::Reply => [1, 0],
        };
        let mut probe = [0; 10];
        probe[..2].copy_from_slice(&PROBE_PORT.to_be_bytes());
        probe[2..4].copy_from_slice(&PROBE_PORT.to_be_bytes());
        probe[5] = 10;
        probe[8..].copy_from_slice(&id.to_be_bytes());
        for (protocol, l4) in [(protocol, packet), (Protocol::UDP, &probe[..])] {
            let datagram = ipv4(direction, protocol, l4);
            self.devices[from].write_all(&datagram).expect("the device takes it");
        }
        let mut arrived = false;
        loop {
            let length = self.devices[to].read(&mut self.buffer).expect("the probe comes");
            let datagram = &self.buffer[..length];
            if datagram[0] != 0x45 {
                continue;
            }
            match Protocol(datagram[9]) {
                Protocol::UDP
                    if datagram[20..22] == PROBE_PORT.to_be_bytes() && datagram[28..30] == id.to_be_bytes() =>
                {
                    return arrived;
                }
                _ if datagram[20..] == *packet => arrived = true,
                other => panic!("nobody has sent this: {other} {datagram:?}"),
            }
        }
    }

    /// The connection between those ports, by either direction; of ICMP: the identifier and the request's type.
    pub fn connection(&mut self, protocol: Protocol, [client, server]: [u16; 2]) -> Option<Shown> {
        const CTA_TUPLE_ORIG: u16 = 1;
        const CTA_STATUS: u16 = 3;
        const CTA_PROTOINFO: u16 = 4;
        const CTA_TIMEOUT: u16 = 7;
        const NESTED: u16 = 1 << 15;
        let addresses = [attribute(1, &CLIENT.octets()), attribute(2, &SERVER.octets())].concat();
        let ports = match protocol {
            Protocol::ICMP => vec![
                attribute(1, &[protocol.0]),
                attribute(4, &client.to_be_bytes()),
                attribute(5, &[server as u8]),
                attribute(6, &[0]),
            ],
            _ => {
                vec![
                    attribute(1, &[protocol.0]),
                    attribute(2, &client.to_be_bytes()),
                    attribute(3, &server.to_be_bytes()),
                ]
            }
        };
        let tuple = [attribute(1 | NESTED, &addresses), attribute(2 | NESTED, &ports.concat())].concat();
        let question = [&[2u8, 0, 0, 0][..], &attribute(CTA_TUPLE_ORIG | NESTED, &tuple)].concat();
        let mut message = Vec::new();
        message.extend(((16 + question.len()) as u32).to_ne_bytes());
        // Subsystem ctnetlink, IPCTNL_MSG_CT_GET; NLM_F_REQUEST.
        message.extend((1u16 << 8 | 1).to_ne_bytes());
        message.extend(1u16.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(question);
        let fd = self.netlink.as_raw_fd();
        sendto(fd, &message, &NetlinkAddr::new(0, 0), MsgFlags::empty()).expect("ctnetlink is asked");
        let length = recv(fd, &mut self.buffer, MsgFlags::empty()).expect("ctnetlink answers");
        let answer = &self.buffer[..length];
        if u16::from_ne_bytes([answer[4], answer[5]]) == libc::NLMSG_ERROR as u16 {
            let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
            assert_eq!(error, -libc::ENOENT, "ctnetlink: {}", std::io::Error::from_raw_os_error(-error));
            return None;
        }
        let attributes = &answer[20..];
        let number = |kind| u32::from_be_bytes(find(attributes, kind)?.try_into().ok()?).into();
        let number = |kind| -> Option<u32> { number(kind) };
        let status = number(CTA_STATUS).expect("a status");
        // CTA_PROTOINFO_TCP or CTA_PROTOINFO_SCTP, the state is the first of both.
        let details = find(attributes, CTA_PROTOINFO).and_then(|details| find(details, 1).or_else(|| find(details, 3)));
        let has_states = matches!(protocol, Protocol::TCP | Protocol::SCTP);
        assert_eq!(details.is_some(), has_states, "{protocol}: states are shown of TCP and SCTP");
        let state = details.map_or(0, |details| find(details, 1).expect("a state")[0]);
        Some(Shown {
            state,
            seen_reply: status & 2 != 0,
            assured: status & 4 != 0,
            remaining: number(CTA_TIMEOUT).expect("a timeout"),
        })
    }
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// An IPv4 packet between client and server.
fn ipv4(direction: Direction, protocol: Protocol, l4: &[u8]) -> Vec<u8> {
    let [src, dst] = match direction {
        Direction::Original => [CLIENT, SERVER],
        Direction::Reply => [SERVER, CLIENT],
    };
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&((20 + l4.len()) as u16).to_be_bytes());
    header[6] = 0x40;
    header[8] = 64;
    header[9] = protocol.0;
    header[12..16].copy_from_slice(&src.octets());
    header[16..20].copy_from_slice(&dst.octets());
    let checksum = Sum::ZERO.bytes(&header).finish();
    header[10..12].copy_from_slice(&checksum);
    [&header[..], l4].concat()
}

/// A netlink attribute, padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = [((4 + value.len()) as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The value of the first attribute of that kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(&[low, high, kind_low, kind_high]) = attributes.first_chunk() {
        let length = usize::from(u16::from_ne_bytes([low, high]));
        if u16::from_ne_bytes([kind_low, kind_high]) & 0x3fff == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}
