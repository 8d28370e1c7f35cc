//! The kernel's side of weir on a real kernel: every test builds network namespaces and a pin folder of its own and
//! removes them again. They need root; WEIR_SKIP_E2E=1 skips them.

use std::{
    collections::HashSet,
    env, fs,
    io::ErrorKind,
    mem::zeroed,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::node::{
    Namespace, Node, index_of, info_of, mac_of, run_tc, run_xdp, shell, skipped, tc_program, xdp_program,
};
use aya::{TestRun as _, TestRunOptions, programs::loaded_links};
use etherparse::PacketBuilder;
use nix::net::if_::if_nametoindex;
use weir_dataplane::{
    afxdp::trunk::{origin, target},
    attach::{
        AttachError, Attachment, Counter, KERNEL_END, KERNEL_END_MAC, Owned, ROUTER_END, ROUTER_END_MAC, SocketDevice,
        TrunkSettings, UplinkHook, detach,
    },
    frame::{IfIndex, LinkType},
    offload::{keeper::Keys, recipe::Key},
};
use weir_packet::{Mac, Protocol};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

const OUTSIDER: [u8; 4] = [192, 0, 2, 200];
const NODE: [u8; 4] = [192, 0, 2, 1];
const POD: [u8; 4] = [10, 7, 0, 5];
const NODE_V6: [u8; 16] = [0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const POD_V6: [u8; 16] = [0xfd, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
const OUTSIDER_V6: [u8; 16] = [0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff];

/// A packet socket on one device of the calling thread's namespace.
struct Tap(OwnedFd);

impl Tap {
    fn open(device: &str) -> Self {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: socket() takes no pointers, and its result is checked before it is owned.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all.into());
            assert!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: all zeroes is a valid sockaddr_ll, and its true size is passed.
        let bound = unsafe {
            let mut address: libc::sockaddr_ll = zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all;
            address.sll_ifindex = index_of(device) as i32;
            let size = size_of::<libc::sockaddr_ll>() as u32;
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size)
        };
        assert_eq!(bound, 0, "bind: {}", std::io::Error::last_os_error());
        Self(socket)
    }

    fn send(&self, frame: &[u8]) {
        nix::unistd::write(&self.0, frame).expect("the frame is sent");
    }

    /// The first frame that `wanted` likes, within two seconds.
    fn find(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut buffer = vec![0; 65_536];
        while Instant::now() < deadline {
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(50u8)).expect("poll works") == 0 {
                continue;
            }
            let len = nix::unistd::read(&self.0, &mut buffer).expect("a frame is there");
            if wanted(&buffer[..len]) {
                return Some(buffer[..len].to_vec());
            }
        }
        None
    }
}

fn udp(macs: (Mac, Mac), from: [u8; 4], to: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let (destination, source) = macs;
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(source.0, destination.0).ipv4(from, to, 64).udp(4444, port);
    builder.write(&mut frame, payload).expect("a vector takes it");
    frame
}

/// What a pinned link's program returns for a frame that arrived on a queue.
fn test_run(link: &Path, frame: &[u8], device: u32, queue: u32) -> u32 {
    run_xdp(&xdp_program(link), frame, device, queue)
}

/// An AF_XDP socket. The kernel checks only at a packet whether it is bound.
fn xdp_socket() -> OwnedFd {
    // SAFETY: socket() takes no pointers, and its result is checked before it is owned.
    unsafe {
        let fd = libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "AF_XDP socket: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

fn node_owned() -> Owned {
    Owned {
        prefixes: ["10.7.0.0/24", "10.96.0.0/12", "fd07::/64", "192.0.2.1/32"]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        node_addresses: vec![Ipv4Addr::from(NODE).into(), Ipv6Addr::from(NODE_V6).into()],
        ports: vec![
            (Protocol::TCP, 30_000..=30_100),
            (Protocol::UDP, 30_053..=30_053),
            (Protocol::SCTP, 31_000..=31_000),
            (Protocol::TCP, 22..=22),
        ],
        failsafe_ports: vec![(Protocol::TCP, 22), (Protocol::UDP, 68)],
        own_ports: vec![
            (Ipv4Addr::from(NODE).into(), Protocol::TCP, 30_000),
            (Ipv4Addr::from(NODE).into(), Protocol::TCP, 22),
            (Ipv4Addr::LOCALHOST.into(), Protocol::UDP, 30_053),
            (Ipv6Addr::from(NODE_V6).into(), Protocol::SCTP, 31_000),
        ],
        governed: false,
    }
}

#[test]
fn what_the_node_sends_to_ports_of_its_own_that_are_weirs_leaves_lo_by_the_trunk() {
    const TC_ACT_UNSPEC: u32 = u32::MAX;
    const TC_ACT_REDIRECT: u32 = 7;
    if skipped() {
        return;
    }
    let node = Node::new();
    node.run(|| {
        let mut attachment = node.open();
        attachment.set_owned(&node_owned()).unwrap();
        let program = tc_program(&node.pins.join("trunk_loopback_send"));
        let loopback = [127, 0, 0, 1];
        let cut = |mut frame: Vec<u8>, bytes: usize| {
            frame.truncate(bytes);
            frame
        };
        let mut with_options = v4(NODE, 6, 0, &[&[1; 4][..], &to_port(30_000)].concat());
        with_options[14] = 0x46;
        for (name, frame, is_taken) in [
            ("TCP to its port", v4(NODE, 6, 0, &to_port(30_000)), true),
            ("with IP options", with_options, true),
            ("UDP to that of loopback", v4(loopback, 17, 0, &to_port(30_053)), true),
            ("SCTP by IPv6", v6(NODE_V6, 132, 64, &to_port(31_000)), true),
            ("a failsafe port", v4(NODE, 6, 0, &to_port(22)), false),
            ("another port", v4(NODE, 6, 0, &to_port(30_001)), false),
            ("another protocol", v4(NODE, 17, 0, &to_port(30_000)), false),
            ("another address", v4(loopback, 6, 0, &to_port(30_000)), false),
            ("another family", v6(NODE_V6, 6, 64, &to_port(30_000)), false),
            ("somebody else's address", v4(OUTSIDER, 6, 0, &to_port(30_000)), false),
            ("a later fragment", v4(NODE, 6, 1, &to_port(30_000)), false),
            ("a header without ports", cut(v4(NODE, 6, 0, &to_port(30_000)), 34), false),
            ("as long as the trunk carries", v4(NODE, 6, 0, &[&to_port(30_000)[..], &[0; 1460]].concat()), true),
            ("longer than that", v4(NODE, 6, 0, &[&to_port(30_000)[..], &[0; 1461]].concat()), false),
            ("ARP", [&MACS.0[..], &MACS.1, &[8, 6], &[0; 40]].concat(), false),
        ] {
            let before = attachment.counters().unwrap().get(Counter::LoopbackTaken);
            let action = run_tc(&program, &frame);
            assert_eq!(action, if is_taken { TC_ACT_REDIRECT } else { TC_ACT_UNSPEC }, "{name}");
            let after = attachment.counters().unwrap().get(Counter::LoopbackTaken);
            assert_eq!(after - before, u64::from(is_taken), "{name}");
        }
        // What is weir's no longer is the kernel's again.
        attachment.set_owned(&Owned { own_ports: Vec::new(), ..node_owned() }).unwrap();
        assert_eq!(run_tc(&program, &v4(NODE, 6, 0, &to_port(30_000))), TC_ACT_UNSPEC);
    });
}

#[test]
fn the_trunk_has_a_queue_per_worker_and_is_adopted_or_made_anew() {
    if skipped() {
        return;
    }
    let node = Node::new();
    node.run(|| {
        let attachment = node.open();
        let trunk = attachment.trunk();
        assert_eq!((trunk.queues, trunk.mtu), (2, 1500));
        assert_eq!((trunk.kernel_end, trunk.router_end), (index_of(KERNEL_END), index_of(ROUTER_END)));
        for device in [KERNEL_END, ROUTER_END] {
            let text = shell(&format!("ip -d link show dev {device}"));
            for part in ["numtxqueues 2", "numrxqueues 2", "mtu 1500", "NOARP", ",UP,LOWER_UP"] {
                assert!(text.contains(part), "{device} has no {part}: {text}");
            }
        }
        assert_eq!(mac_of(&node.namespace, KERNEL_END), KERNEL_END_MAC);
        assert_eq!(mac_of(&node.namespace, ROUTER_END), ROUTER_END_MAC);
        let features = shell("ethtool -k weir0");
        for feature in ["tx-checksumming", "tx-vlan-offload", "tx-tcp-segmentation", "tx-udp-segmentation"] {
            assert!(features.contains(&format!("{feature}: off")), "{features}");
        }
        let modes: Vec<_> =
            attachment.modes().into_iter().map(|report| (report.device, report.program, report.mode)).collect();
        assert_eq!(
            modes,
            [
                ("weir1".to_owned(), "trunk_receive", "native"),
                ("weir0".to_owned(), "trunk_deliver", "tcx"),
                ("weir0".to_owned(), "-", "no-offload"),
                ("lo".to_owned(), "loopback_send", "tcx")
            ]
        );
        drop(attachment);

        assert_eq!(node.open().trunk(), trunk, "the same trunk is adopted");
        let larger =
            Attachment::open(TrunkSettings { queues: 3, mtu: 1400, ..node.settings() }).expect("it is made anew");
        assert_ne!(larger.trunk().kernel_end, trunk.kernel_end);
        assert_eq!((larger.trunk().queues, larger.trunk().mtu), (3, 1400));
        assert!(shell("ip -d link show dev weir1").contains("numrxqueues 3"));
    });
}

#[test]
fn what_a_workload_sends_carries_its_device_and_arrives_whole() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pod = node.pod("caliaaaa");
    let mac = mac_of(&node.namespace, "caliaaaa");
    let pod_mac = mac_of(&pod, "eth0");
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("caliaaaa");
        attachment.adopt_workload(index, "caliaaaa", mac, true).unwrap();
        let tap = Tap::open(KERNEL_END);
        let from_pod = |frame: &[u8]| frame[6..12] == pod_mac.0;
        let source = |frame: &[u8]| origin(Mac(frame[..6].try_into().unwrap()));

        // Its checksum is left to the device, and the device has no such offload any more.
        pod.run(|| {
            let socket = UdpSocket::bind("10.7.0.5:4000").unwrap();
            socket.send_to(b"from the pod", "198.51.100.9:53").unwrap();
        });
        let frame = tap.find(|frame| from_pod(frame) && frame.ends_with(b"from the pod")).expect("the datagram");
        // ee:ee:ee:ee:ee:ee, which the pod takes for its gateway, is not the host end's address.
        assert_eq!(source(&frame), (IfIndex(index), LinkType::Other));
        let (ip, udp) = (etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap().0, &frame[34..]);
        let header = etherparse::UdpHeader::from_slice(udp).unwrap().0;
        assert_eq!(Ok(header.checksum), header.calc_checksum_ipv4(&ip, b"from the pod"), "a whole checksum");

        // How it was addressed at the link layer.
        let pod_tap = pod.run(|| Tap::open("eth0"));
        for (destination, link) in [
            (mac, LinkType::Host),
            (Mac::BROADCAST, LinkType::Broadcast),
            (Mac([1, 0, 0x5e, 0, 0, 1]), LinkType::Multicast),
            (Mac([2, 0, 0, 0, 0, 9]), LinkType::Other),
        ] {
            let payload = format!("to {destination}");
            pod_tap.send(&link_frame((destination, pod_mac)));
            let frame =
                tap.find(|frame| from_pod(frame) && frame.ends_with(b"link")).unwrap_or_else(|| panic!("{payload}"));
            assert_eq!(source(&frame), (IfIndex(index), link), "{payload}");
        }

        // A VLAN tag stays in the frame.
        let mut tagged = link_frame((mac, pod_mac));
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        pod_tap.send(&tagged);
        let frame = tap.find(|frame| from_pod(frame) && frame.ends_with(b"link")).expect("the tagged frame");
        assert_eq!(frame[12..18], [0x81, 0, 0, 5, 8, 0]);

        let counters = attachment.counters().unwrap();
        assert!(counters.get(Counter::WorkloadSent) >= 6, "{counters:?}");
        assert!(counters.get(Counter::TrunkUnclaimed) >= 6, "nobody has a socket: {counters:?}");
        assert_eq!(counters.get(Counter::TrunkTaken), 0);
    });
}

fn link_frame(macs: (Mac, Mac)) -> Vec<u8> {
    udp(macs, POD, OUTSIDER, 5, b"link")
}

#[test]
fn a_segmented_stream_of_a_workload_is_cut_before_it_enters_the_trunk() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pod = node.pod("calibbbb");
    // Nothing but the stream is to be counted: no router solicitation of the pod's kernel.
    pod.shell("sysctl -q -w net.ipv6.conf.all.disable_ipv6=1");
    let mac = mac_of(&node.namespace, "calibbbb");
    let pod_mac = mac_of(&pod, "eth0");
    node.run(|| {
        let mut attachment = node.open();
        attachment.adopt_workload(index_of("calibbbb"), "calibbbb", mac, true).unwrap();
        let tap = Tap::open(KERNEL_END);
        pod.run(|| {
            let socket = UdpSocket::bind("10.7.0.5:4001").unwrap();
            let segment: i32 = 1000;
            // SAFETY: the option's value is an integer, whose address and size are passed.
            let set = unsafe {
                let size = size_of_val(&segment) as u32;
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_UDP,
                    libc::UDP_SEGMENT,
                    (&raw const segment).cast(),
                    size,
                )
            };
            assert_eq!(set, 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
            socket.send_to(&[7; 10_000], "198.51.100.9:53").unwrap();
        });
        for nth in 0..10 {
            let frame = tap.find(|frame| frame[6..12] == pod_mac.0 && frame[12..14] == [8, 0]);
            let frame = frame.unwrap_or_else(|| panic!("segment {nth}"));
            assert_eq!(frame.len(), 14 + 20 + 8 + 1000, "segment {nth}");
            let ip = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap().0;
            let header = etherparse::UdpHeader::from_slice(&frame[34..]).unwrap().0;
            assert_eq!(Ok(header.checksum), header.calc_checksum_ipv4(&ip, &frame[42..]), "segment {nth}");
        }
        assert_eq!(attachment.counters().unwrap().get(Counter::WorkloadSent), 1);
    });
}

#[test]
fn what_weir_sends_reaches_workloads_and_the_host() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pod = node.pod("calicccc");
    let mac = mac_of(&node.namespace, "calicccc");
    let pod_mac = mac_of(&pod, "eth0");
    node.namespace.shell(
        "ip addr add 192.0.2.1/32 dev lo; ip link add near0 type veth peer name near1; \
         ip link set near0 up; ip link set near1 up",
    );
    let near_mac = mac_of(&node.namespace, "near0");
    let near_peer = mac_of(&node.namespace, "near1");
    node.run(|| {
        let mut attachment = node.open();
        let (index, near) = (index_of("calicccc"), index_of("near0"));
        attachment.adopt_workload(index, "calicccc", mac, true).unwrap();
        attachment.adopt_workload(near, "near0", near_mac, false).unwrap();
        let slow = attachment.modes().into_iter().filter(|report| report.mode == "redirect");
        assert_eq!(slow.map(|report| report.device).collect::<Vec<_>>(), ["near0"]);
        let router = Tap::open(ROUTER_END);
        let before = attachment.counters().unwrap();

        // To a pod: as if from the host end, and to its applications.
        let (pod_tap, pod_socket) = pod.run(|| (Tap::open("eth0"), UdpSocket::bind("10.7.0.5:53").unwrap()));
        pod_socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        router.send(&udp((pod_mac, target(IfIndex(index))), OUTSIDER, POD, 53, b"to the pod"));
        let frame = pod_tap.find(|frame| frame.ends_with(b"to the pod")).expect("the pod gets it");
        assert_eq!((&frame[..6], &frame[6..12]), (&pod_mac.0[..], &mac.0[..]));
        let mut buffer = [0; 64];
        let (len, from) = pod_socket.recv_from(&mut buffer).expect("the pod's socket gets it");
        assert_eq!((&buffer[..len], from.ip()), (&b"to the pod"[..], IpAddr::from(OUTSIDER)));

        // To a workload whose peer is in this namespace.
        let near_tap = Tap::open("near1");
        router.send(&udp((near_peer, target(IfIndex(near))), OUTSIDER, POD, 53, b"to the near one"));
        let frame = near_tap.find(|frame| frame.ends_with(b"to the near one")).expect("the near one gets it");
        assert_eq!((&frame[..6], &frame[6..12]), (&near_peer.0[..], &near_mac.0[..]));

        // To the node: index 0, or no index at all. Even from the node's own address.
        let host = UdpSocket::bind("192.0.2.1:9000").unwrap();
        host.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for (source, from, payload) in [
            (target(IfIndex::HOST), OUTSIDER, b"zero"),
            (ROUTER_END_MAC, OUTSIDER, b"none"),
            (ROUTER_END_MAC, NODE, b"self"),
        ] {
            router.send(&udp((KERNEL_END_MAC, source), from, NODE, 9000, payload));
            let (len, sender) = host.recv_from(&mut buffer).expect("the node's socket gets it");
            assert_eq!((&buffer[..len], sender.ip()), (&payload[..], IpAddr::from(from)));
        }

        // To nobody, and to one that was forgotten.
        attachment.forget_workload(near).unwrap();
        for gone in [0x00ff_0000, near] {
            router.send(&udp((near_peer, target(IfIndex(gone))), OUTSIDER, POD, 53, b"to nobody"));
        }
        assert!(near_tap.find(|frame| frame.ends_with(b"to nobody")).is_none());
        let after = attachment.counters().unwrap();
        let gained = |counter| after.get(counter) - before.get(counter);
        assert_eq!(gained(Counter::DeliveredWorkload), 2);
        assert_eq!(gained(Counter::DeliveredHost), 3);
        assert_eq!(gained(Counter::DeliveredNowhere), 2);
    });
}

#[test]
fn the_trunk_gives_frames_to_the_socket_of_their_queue_or_drops_them() {
    if skipped() {
        return;
    }
    let node = Node::new();
    node.run(|| {
        let mut attachment = node.open();
        let (link, device) = (node.pins.join("trunk_receive"), attachment.trunk().router_end);
        let frame = link_frame((KERNEL_END_MAC, Mac([2; 6])));
        assert_eq!(test_run(&link, &frame, device, 0), XDP_DROP);
        let socket = xdp_socket();
        attachment.register_socket(SocketDevice::Trunk, 1, socket.as_fd()).unwrap();
        assert_eq!(test_run(&link, &frame, device, 0), XDP_DROP, "another queue");
        assert_eq!(test_run(&link, &frame, device, 1), XDP_REDIRECT);
        drop(socket);
        assert_eq!(test_run(&link, &frame, device, 1), XDP_DROP, "the socket is gone");
        let counters = attachment.counters().unwrap();
        // More, where the kernel's own neighbour discovery came by.
        assert!(counters.get(Counter::TrunkTaken) >= 1, "{counters:?}");
        assert!(counters.get(Counter::TrunkUnclaimed) >= 3, "{counters:?}");

        let no_socket = fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            attachment.register_socket(SocketDevice::Trunk, 0, no_socket.as_fd()),
            Err(AttachError::Map { name: "sockets", .. })
        ));
        assert!(matches!(
            attachment.register_socket(SocketDevice::Uplink(77), 0, xdp_socket().as_fd()),
            Err(AttachError::NoUplink(77))
        ));
    });
}

/// What the uplink program should do with a frame: with a socket, without one, and what it counts.
#[derive(Clone, Copy)]
struct Expected(u32, u32, Counter);

const PASSED: Expected = Expected(XDP_PASS, XDP_PASS, Counter::UplinkPassed);
const FAILSAFE: Expected = Expected(XDP_PASS, XDP_PASS, Counter::UplinkPassedFailsafe);
const PREFIX: Expected = Expected(XDP_REDIRECT, XDP_DROP, Counter::UplinkTakenPrefix);
const PORT: Expected = Expected(XDP_REDIRECT, XDP_DROP, Counter::UplinkTakenPort);
const TUNNEL: Expected = Expected(XDP_REDIRECT, XDP_DROP, Counter::UplinkTakenTunnel);
const ICMP: Expected = Expected(XDP_REDIRECT, XDP_PASS, Counter::UplinkTakenIcmp);
const FRAGMENT: Expected = Expected(XDP_REDIRECT, XDP_PASS, Counter::UplinkTakenFragment);
const UNREAD: Expected = Expected(XDP_REDIRECT, XDP_DROP, Counter::UplinkTakenUnread);
const TAGS: Expected = Expected(XDP_DROP, XDP_DROP, Counter::UplinkTagsDropped);

const MACS: ([u8; 6], [u8; 6]) = ([0x0a, 0, 0, 0, 0, 1], [0x0a, 0, 0, 0, 0, 2]);

/// An Ethernet frame around an IPv4 packet with that protocol and payload. `fragment` is the field of flags and offset.
fn v4(to: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&MACS.0[..], &MACS.1, &[8, 0]].concat();
    let total = 20 + payload.len() as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 1]);
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, protocol, 0, 0]);
    frame.extend(OUTSIDER);
    frame.extend(to);
    frame.extend(payload);
    frame
}

fn v6(to: [u8; 16], next: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&MACS.0[..], &MACS.1, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend((payload.len() as u16).to_be_bytes());
    frame.extend([next, hop_limit]);
    frame.extend(OUTSIDER_V6);
    frame.extend(to);
    frame.extend(payload);
    frame
}

/// Source port 1000 and that destination port, with the rest of a header.
fn to_port(port: u16) -> Vec<u8> {
    [&1000u16.to_be_bytes()[..], &port.to_be_bytes(), &[0; 16]].concat()
}

/// An IPv6 extension header of `8 * (units + 1)` bytes before `payload`.
fn extension(next: u8, units: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 8 * (usize::from(units) + 1)];
    header[..2].copy_from_slice(&[next, units]);
    header.extend(payload);
    header
}

fn tagged(mut frame: Vec<u8>) -> Vec<u8> {
    frame.splice(12..12, [0x81, 0, 0, 5]);
    frame
}

/// Behind so many priority tags, of IEEE 802.1Q and 802.1ad in turn, each of another priority.
fn priority_tagged(mut frame: Vec<u8>, tags: u8) -> Vec<u8> {
    for tag in 0..tags {
        frame.splice(12..12, [[0x81, 0, tag << 5, 0], [0x88, 0xa8, 0xf0, 0]][usize::from(tag % 2)]);
    }
    frame
}

/// An IPv6 packet behind such a chain of destination options, of `8 * (units + 1)` bytes each.
fn chained(to: [u8; 16], headers: usize, units: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (next, payload) =
        (0..headers).fold((protocol, payload.to_vec()), |(next, payload), _| (60, extension(next, units, &payload)));
    v6(to, next, 64, &payload)
}

fn uplink_cases() -> Vec<(&'static str, Vec<u8>, Expected)> {
    let (tcp, udp, sctp, icmp, ipip, icmpv6) = (6, 17, 132, 1, 4, 58);
    let echo = [8, 0, 0, 0, 0, 1, 0, 1];
    let mut options = v4(NODE, tcp, 0, &[&[1; 8][..], &to_port(30_000)].concat());
    options[14] = 0x47;
    let mut short_header = v4(NODE, tcp, 0, &to_port(30_000));
    short_header[14] = 0x41;
    let nd = |kind| [kind, 0, 0, 0, 0, 0, 0, 0];
    let four = (0..4).fold((tcp, to_port(30_000)), |(next, payload), _| (60, extension(next, 1, &payload)));
    let five = extension(four.0, 0, &four.1);
    vec![
        ("v4 pod", v4(POD, tcp, 0, &to_port(80)), PREFIX),
        ("v4 pod, unknown protocol", v4(POD, 99, 0, &[]), PREFIX),
        ("v4 pod, later fragment", v4(POD, udp, 185, &[0; 8]), PREFIX),
        ("v4 pod, echo", v4(POD, icmp, 0, &echo), PREFIX),
        ("v4 service", v4([10, 96, 0, 10], udp, 0, &to_port(53)), PREFIX),
        ("v4 last address of the service range", v4([10, 111, 255, 255], udp, 0, &to_port(53)), PREFIX),
        ("v4 first address after it", v4([10, 112, 0, 0], udp, 0, &to_port(53)), PASSED),
        ("v4 pod of another node", v4([10, 7, 1, 5], tcp, 0, &to_port(80)), PASSED),
        ("v4 broadcast", v4([255; 4], udp, 0, &to_port(68)), PASSED),
        ("v4 node, ordinary port", v4(NODE, tcp, 0, &to_port(10_250)), PASSED),
        ("v4 node, owned port", v4(NODE, tcp, 0, &to_port(30_000)), PORT),
        ("v4 node, last of a range", v4(NODE, tcp, 0, &to_port(30_100)), PORT),
        ("v4 node, before and after a range", v4(NODE, tcp, 0, &to_port(29_999)), PASSED),
        ("v4 node, after a range", v4(NODE, tcp, 0, &to_port(30_101)), PASSED),
        ("v4 node, that port of another protocol", v4(NODE, udp, 0, &to_port(30_000)), PASSED),
        ("v4 node, owned UDP port", v4(NODE, udp, 0, &to_port(30_053)), PORT),
        ("v4 node, owned SCTP port", v4(NODE, sctp, 0, &to_port(31_000)), PORT),
        ("v4 node, failsafe beats owned", v4(NODE, tcp, 0, &to_port(22)), FAILSAFE),
        ("v4 node, UDP failsafe", v4(NODE, udp, 0, &to_port(68)), FAILSAFE),
        ("v4 node, TCP is not UDP's failsafe", v4(NODE, tcp, 0, &to_port(68)), PASSED),
        ("v4 pod, no failsafe", v4(POD, tcp, 0, &to_port(22)), PREFIX),
        ("v4 node, header options", options, PORT),
        ("v4 node, a header shorter than a header", short_header, UNREAD),
        ("v4 node, ports cut off", v4(NODE, tcp, 0, &[0, 1, 2]), UNREAD),
        ("v4 node, tunnel", v4(NODE, ipip, 0, &v4(POD, tcp, 0, &to_port(80))[14..]), TUNNEL),
        ("v4 node, fragmented tunnel", v4(NODE, ipip, 0x2000, &[0; 24]), TUNNEL),
        ("v4 node, echo", v4(NODE, icmp, 0, &echo), ICMP),
        ("v4 node, first fragment", v4(NODE, udp, 0x2000, &to_port(30_053)), FRAGMENT),
        ("v4 node, later fragment", v4(NODE, udp, 185, &[0; 8]), FRAGMENT),
        ("v4 node, do not fragment", v4(NODE, udp, 0x4000, &to_port(30_053)), PORT),
        ("v4 node, GRE", v4(NODE, 47, 0, &[0; 8]), PASSED),
        ("v4 cut off", v4(POD, tcp, 0, &[])[..33].to_vec(), PASSED),
        ("v6 pod", v6(POD_V6, tcp, 64, &to_port(80)), PREFIX),
        ("v6 pod, echo", v6(POD_V6, icmpv6, 64, &[128, 0, 0, 0, 0, 0, 0, 0]), PREFIX),
        ("v6 pod, neighbour solicitation", v6(POD_V6, icmpv6, 255, &nd(135)), PASSED),
        ("v6 pod, forged neighbour solicitation", v6(POD_V6, icmpv6, 254, &nd(135)), PREFIX),
        ("v6 another prefix", v6([0xfd; 16], tcp, 64, &to_port(80)), PASSED),
        ("v6 node, ordinary port", v6(NODE_V6, tcp, 64, &to_port(80)), PASSED),
        ("v6 node, owned port", v6(NODE_V6, tcp, 64, &to_port(30_001)), PORT),
        ("v6 node, failsafe", v6(NODE_V6, tcp, 64, &to_port(22)), FAILSAFE),
        ("v6 node, echo", v6(NODE_V6, icmpv6, 255, &[128, 0, 0, 0, 0, 0, 0, 0]), ICMP),
        ("v6 node, too big", v6(NODE_V6, icmpv6, 60, &[2, 0, 0, 0, 0, 0, 5, 0]), ICMP),
        ("v6 node, router solicitation", v6(NODE_V6, icmpv6, 255, &nd(133)), PASSED),
        ("v6 node, redirect", v6(NODE_V6, icmpv6, 255, &nd(137)), PASSED),
        ("v6 node, listener query", v6(NODE_V6, icmpv6, 1, &nd(130)), PASSED),
        ("v6 node, listener report", v6(NODE_V6, 0, 1, &extension(icmpv6, 0, &nd(143))), PASSED),
        ("v6 node, fragment", v6(NODE_V6, 44, 64, &extension(udp, 0, &to_port(30_053))), FRAGMENT),
        ("v6 node, options, fragment", v6(NODE_V6, 60, 64, &extension(44, 2, &extension(udp, 0, &[]))), FRAGMENT),
        ("v6 node, owned port after options", v6(NODE_V6, 0, 64, &extension(tcp, 3, &to_port(30_000))), PORT),
        ("v6 node, after as many options as are looked through", v6(NODE_V6, four.0, 64, &four.1), PORT),
        ("v6 node, after one more", v6(NODE_V6, 60, 64, &five), UNREAD),
        ("v6 node, options cut off", v6(NODE_V6, 0, 64, &[tcp]), UNREAD),
        ("v6 node, options beyond the end", v6(NODE_V6, 0, 64, &extension(tcp, 0, &[])), UNREAD),
        ("v6 node, ICMP beyond the end", v6(NODE_V6, 0, 64, &extension(icmpv6, 0, &[128])), UNREAD),
        ("v6 node, a long chain before a failsafe port", chained(NODE_V6, 9, 0, tcp, &to_port(22)), UNREAD),
        ("v6 node, a long chain before a fragment", chained(NODE_V6, 5, 0, 44, &extension(udp, 0, &[])), UNREAD),
        ("v6 node, no next header", v6(NODE_V6, 59, 64, &[]), PASSED),
        ("v6 cut off", v6(POD_V6, tcp, 64, &[])[..53].to_vec(), PASSED),
        ("ARP", [&[0xff; 6][..], &MACS.1, &[8, 6], &[0; 28]].concat(), PASSED),
        ("VLAN", tagged(v4(POD, tcp, 0, &to_port(80))), PASSED),
        ("VLAN behind a priority tag", priority_tagged(tagged(v4(POD, tcp, 0, &to_port(80))), 1), PASSED),
        ("priority tag, pod", priority_tagged(v4(POD, tcp, 0, &to_port(80)), 1), PREFIX),
        ("priority tag, v6 pod", priority_tagged(v6(POD_V6, tcp, 64, &to_port(80)), 1), PREFIX),
        ("priority tag, owned port", priority_tagged(v4(NODE, tcp, 0, &to_port(30_000)), 1), PORT),
        ("priority tag, ordinary port", priority_tagged(v4(NODE, tcp, 0, &to_port(10_250)), 1), PASSED),
        ("priority tag, failsafe port", priority_tagged(v6(NODE_V6, tcp, 64, &to_port(22)), 1), FAILSAFE),
        ("priority tag, fragment", priority_tagged(v4(NODE, udp, 185, &[0; 8]), 1), FRAGMENT),
        ("priority tag, ARP", priority_tagged([&[0xff; 6][..], &MACS.1, &[8, 6], &[0; 28]].concat(), 1), PASSED),
        ("four priority tags", priority_tagged(v4(POD, tcp, 0, &to_port(80)), 4), PREFIX),
        ("more than are looked through", priority_tagged(v4(POD, tcp, 0, &to_port(80)), 5), TAGS),
        ("more, to an ordinary port", priority_tagged(v4(NODE, tcp, 0, &to_port(10_250)), 9), TAGS),
        ("LLDP", [&[1, 0x80, 0xc2, 0, 0, 0xe][..], &MACS.1, &[0x88, 0xcc], &[0; 40]].concat(), PASSED),
    ]
}

#[test]
fn uplinks_give_up_what_weir_owns_and_nothing_else() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    // What the kernels at both ends say of themselves would be counted too.
    for namespace in [&node.namespace, &outside] {
        namespace.shell("for family in all default; do echo 1 > /proc/sys/net/ipv6/conf/$family/disable_ipv6; done");
    }
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        attachment.set_owned(&node_owned()).unwrap();
        // From one to the other and back, as when the configuration changes.
        for (hook, program, mode, pin) in [
            (UplinkHook::Xdp, "uplink_receive", "native", format!("uplink_{index}")),
            (UplinkHook::Tc, "uplink_take", "tcx", format!("uplink_carry_{index}")),
            (UplinkHook::Xdp, "uplink_receive", "native", format!("uplink_{index}")),
        ] {
            assert_eq!(attachment.attach_uplink(index, "up0", Some(hook)).unwrap(), hook);
            let modes = attachment.modes();
            let of_uplink: Vec<_> = modes.iter().filter(|m| m.device == "up0").map(|m| (m.program, m.mode)).collect();
            assert_eq!(of_uplink, [(program, mode)]);
            assert_eq!(attachment.pinned_uplinks().unwrap(), [index]);
            assert_eq!(shell("ip link show dev up0").contains("xdp"), hook == UplinkHook::Xdp);
            judges_all_cases(&mut attachment, index, hook, &node.pins.join(pin));
        }
        attachment.detach_uplink(index).unwrap();
        assert!(attachment.pinned_uplinks().unwrap().is_empty());
        assert!(!shell("ip link show dev up0").contains("xdp"), "detaching is done when it returns");
    });
}

/// Runs the program at `link` on all cases, without and with a socket to take to.
fn judges_all_cases(attachment: &mut Attachment, index: u32, hook: UplinkHook, link: &Path) {
    // What XDP answers, and the tc program in its place.
    let expected_of = |action: u32| match (hook, action) {
        (UplinkHook::Xdp, action) => action,
        // TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC: include/uapi/linux/pkt_cls.h.
        (UplinkHook::Tc, XDP_REDIRECT) => 7,
        (UplinkHook::Tc, XDP_DROP) => 2,
        (UplinkHook::Tc, _) => u32::MAX,
    };
    let socket = xdp_socket();
    let device = match hook {
        UplinkHook::Xdp => SocketDevice::Uplink(index),
        UplinkHook::Tc => SocketDevice::Trunk,
    };
    for with_socket in [false, true] {
        if with_socket {
            attachment.register_socket(device, 0, socket.as_fd()).unwrap();
        }
        for (name, frame, Expected(taken, untaken, cause)) in uplink_cases() {
            // The kernel runs no tc program on part of an IP header.
            let header_bytes = if frame[12..14] == [0x86, 0xdd] { 40 } else { 20 };
            if hook == UplinkHook::Tc && frame.len() < 14 + header_bytes {
                continue;
            }
            let before = attachment.counters().unwrap();
            let action = match hook {
                UplinkHook::Xdp => test_run(link, &frame, index, 0),
                UplinkHook::Tc => run_tc(&tc_program(link), &frame),
            };
            let after = attachment.counters().unwrap();
            let expected = expected_of(if with_socket { taken } else { untaken });
            assert_eq!(action, expected, "{hook:?}, {name}, socket: {with_socket}");
            let mut counted = vec![cause];
            if taken == XDP_REDIRECT && !with_socket {
                counted.push(match untaken {
                    XDP_DROP => Counter::UplinkUnclaimedDropped,
                    _ => Counter::UplinkUnclaimedPassed,
                });
            }
            let gained: Vec<_> = after
                .iter()
                .filter(|(counter, _)| after.get(*counter) != before.get(*counter))
                .map(|(c, _)| c)
                .collect();
            counted.sort_by_key(|counter| *counter as u32);
            assert_eq!(gained, counted, "{hook:?}, {name}, socket: {with_socket}");
        }
    }
}

#[test]
fn what_is_taken_has_no_priority_tags_any_more() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        attachment.set_owned(&node_owned()).unwrap();
        for (hook, pin) in
            [(UplinkHook::Xdp, format!("uplink_{index}")), (UplinkHook::Tc, format!("uplink_carry_{index}"))]
        {
            attachment.attach_uplink(index, "up0", Some(hook)).unwrap();
            let socket = xdp_socket();
            attachment.register_socket(SocketDevice::Uplink(index), 0, socket.as_fd()).unwrap();
            attachment.register_socket(SocketDevice::Trunk, 0, socket.as_fd()).unwrap();
            let link = node.pins.join(pin);
            for (name, frame) in [
                ("v4", v4(POD, 6, 0, &to_port(80))),
                ("v6", v6(POD_V6, 6, 64, &to_port(80))),
                ("v6, a chain", chained(NODE_V6, 6, 9, 6, &to_port(80))),
            ] {
                for tags in 0..=4 {
                    let left = frame_after(&link, hook, &priority_tagged(frame.clone(), tags), index);
                    // Of what goes to a worker by the trunk, the destination tells whose it is.
                    assert_eq!(left[6..], frame[6..], "{hook:?}, {name}, {tags} tags");
                }
            }
        }
    });
}

/// What a frame has become when a pinned link's program is done with it.
fn frame_after(link: &Path, hook: UplinkHook, frame: &[u8], device: u32) -> Vec<u8> {
    let mut left = vec![0; 4096];
    let context = [0, frame.len() as u32, 0, device, 0, 0].map(u32::to_ne_bytes).concat();
    let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut left), ..TestRunOptions::new() };
    let result = match hook {
        UplinkHook::Xdp => xdp_program(link).test_run(TestRunOptions { ctx_in: Some(&context), ..options }),
        UplinkHook::Tc => tc_program(link).test_run(options),
    };
    let bytes = result.expect("a test run").data_size_out as usize;
    left.truncate(bytes);
    left
}

#[test]
fn fragments_to_the_node_end_with_the_router_where_a_host_endpoint_governs() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        attachment.attach_uplink(index, "up0", Some(UplinkHook::Xdp)).unwrap();
        let link = node.pins.join(format!("uplink_{index}"));
        let fragments = [
            v4(NODE, 17, 185, &[0; 8]),
            v4(NODE, 17, 0x2000, &to_port(68)),
            v6(NODE_V6, 44, 64, &extension(17, 0, &[])),
        ];
        for (governed, action) in [(false, XDP_PASS), (true, XDP_DROP), (false, XDP_PASS)] {
            attachment.set_owned(&Owned { governed, ..node_owned() }).unwrap();
            for frame in &fragments {
                assert_eq!(test_run(&link, frame, index, 0), action, "governed: {governed}");
            }
            // The node stays reachable.
            assert_eq!(test_run(&link, &v4(NODE, 1, 0, &[8, 0, 0, 0, 0, 1, 0, 1]), index, 0), XDP_PASS);
            assert_eq!(test_run(&link, &v4(NODE, 6, 0, &to_port(22)), index, 0), XDP_PASS);
        }
    });
}

/// Every address of the node is the node's, where what it gets is governed; what links live by is not.
#[test]
fn groups_and_link_local_addresses_are_the_nodes_where_a_host_endpoint_governs() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        let (all_hosts, link_local) = (
            [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        );
        let (udp, tcp) = (17, 6);
        let judged = [
            v4([224, 0, 0, 251], udp, 0, &to_port(5353)),
            v4([239, 255, 255, 255], udp, 0x2000, &to_port(5353)),
            v4([255; 4], udp, 0, &to_port(137)),
            priority_tagged(v4([255; 4], udp, 0, &to_port(137)), 1),
            v6(all_hosts, udp, 1, &to_port(5353)),
            v6(link_local, tcp, 64, &to_port(80)),
            v6(link_local, 44, 64, &extension(tcp, 0, &to_port(80))),
        ];
        let nd = |kind| [kind, 0, 0, 0, 0, 0, 0, 0];
        let kernels = [
            // Failsafe ports; IGMP, OSPF; neighbour discovery, listeners.
            v4([255; 4], udp, 0, &to_port(68)),
            v6(link_local, tcp, 64, &to_port(22)),
            v4([224, 0, 0, 22], 2, 0, &[0; 8]),
            v4([224, 0, 0, 5], 89, 0, &[0; 24]),
            v6(all_hosts, 58, 255, &nd(134)),
            v6(link_local, 58, 255, &nd(136)),
            v6(all_hosts, 0, 1, &extension(58, 0, &nd(130))),
        ];
        let ports = [Protocol::TCP, Protocol::UDP].map(|protocol| (protocol, 0..=u16::MAX)).to_vec();
        for hook in [UplinkHook::Xdp, UplinkHook::Tc] {
            attachment.attach_uplink(index, "up0", Some(hook)).unwrap();
            for governed in [false, true] {
                let all = if governed { ports.clone() } else { Vec::new() };
                attachment.set_owned(&Owned { governed, ports: all, ..node_owned() }).unwrap();
                let action = |frame: &[u8]| match hook {
                    UplinkHook::Xdp => {
                        test_run(&node.pins.join(format!("uplink_{index}")), frame, index, 0) != XDP_DROP
                    }
                    UplinkHook::Tc => run_tc(&tc_program(&node.pins.join(format!("uplink_carry_{index}"))), frame) != 2,
                };
                for frame in &judged {
                    assert_eq!(action(frame), !governed, "{hook:?}, governed: {governed}, {frame:x?}");
                }
                for frame in &kernels {
                    assert!(action(frame), "{hook:?}, governed: {governed}, {frame:x?}");
                }
            }
        }
    });
}

#[test]
fn a_nic_is_told_to_leave_tags_in_the_frames_where_xdp_takes_them() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        let takes_off = || shell("ethtool -k up0").contains("rx-vlan-offload: on");
        assert!(takes_off(), "a veth does, as most NICs");
        attachment.attach_uplink(index, "up0", Some(UplinkHook::Tc)).unwrap();
        assert!(takes_off(), "the kernel knows the tag at tc");
        attachment.attach_uplink(index, "up0", Some(UplinkHook::Xdp)).unwrap();
        assert!(!takes_off());
        let reason = |attachment: &Attachment| {
            attachment.modes().into_iter().find(|mode| mode.device == "up0").expect("it is reported").reason
        };
        assert!(reason(&attachment).contains("rxvlan off"), "it is said");
        attachment.attach_uplink(index, "up0", Some(UplinkHook::Xdp)).unwrap();
        assert!(!reason(&attachment).contains("rxvlan off"), "once");
    });
}

#[test]
fn the_packets_of_a_vlan_are_not_the_uplinks_own() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        attachment.set_owned(&node_owned()).unwrap();
        let tap = outside.run(|| Tap::open("eth0"));
        for hook in [UplinkHook::Xdp, UplinkHook::Tc] {
            attachment.attach_uplink(index, "up0", Some(hook)).unwrap();
            let before = attachment.counters().unwrap();
            tap.send(&tagged(v4(POD, 6, 0, &to_port(80))));
            // It comes behind the other, so both are judged when it is.
            tap.send(&v4(POD, 6, 0, &to_port(80)));
            let gained = |counter| attachment.counters().unwrap().get(counter) - before.get(counter);
            let begin = Instant::now();
            while gained(Counter::UplinkTakenPrefix) == 0 && begin.elapsed() < Duration::from_secs(5) {
                thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(gained(Counter::UplinkTakenPrefix), 1, "{hook:?}");
            // The kernel's own neighbour discovery passes as well.
            assert!(gained(Counter::UplinkPassed) >= 1, "{hook:?}");
        }
    });
}

#[test]
fn a_device_without_xdp_is_an_uplink_too() {
    if skipped() {
        return;
    }
    let node = Node::new();
    node.run(|| {
        let mut attachment = node.open();
        attachment.set_owned(&node_owned()).unwrap();
        shell("ip link add plain0 type bridge");
        let index = index_of("plain0");
        assert_eq!(attachment.attach_uplink(index, "plain0", None).unwrap(), UplinkHook::Tc);
        let mode = attachment.modes().into_iter().find(|mode| mode.device == "plain0").expect("it is reported");
        assert!(mode.reason.contains("no XDP of its own"), "{mode:?}");
    });
}

#[test]
fn without_a_router_the_node_stays_reachable_and_owned_ports_are_closed() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.namespace.shell("ip addr add 192.0.2.1/24 dev up0");
    outside.shell("ip addr add 192.0.2.200/24 dev eth0");
    node.run(|| {
        let mut attachment = node.open();
        attachment
            .set_owned(&Owned {
                node_addresses: vec![Ipv4Addr::from(NODE).into()],
                ports: vec![(Protocol::UDP, 30_000..=30_000), (Protocol::UDP, 53..=53)],
                failsafe_ports: vec![(Protocol::UDP, 53)],
                ..Owned::default()
            })
            .unwrap();
        attachment.attach_uplink(index_of("up0"), "up0", None).unwrap();
        drop(attachment);

        outside.shell("ping -c 1 -W 2 192.0.2.1");
        let sender = outside.run(|| UdpSocket::bind("192.0.2.200:0").unwrap());
        for (port, arrives) in [(30_000, false), (7000, true), (53, true)] {
            let socket = UdpSocket::bind(("192.0.2.1", port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(if arrives { 2000 } else { 300 }))).unwrap();
            sender.send_to(b"hello", ("192.0.2.1", port)).unwrap();
            let got = socket.recv(&mut [0; 16]);
            assert_eq!(got.is_ok(), arrives, "port {port}: {got:?}");
        }
    });
}

#[test]
fn a_link_that_cannot_be_renewed_stays() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let _pod = node.pod("calieeee");
    let mac = mac_of(&node.namespace, "calieeee");
    node.run(|| {
        let index = index_of("calieeee");
        let mut attachment = node.open();
        attachment.adopt_workload(index, "calieeee", mac, true).unwrap();
        let (pin, aside) = (node.pins.join(format!("workload_{index}")), node.pins.join("aside"));
        let link = info_of(&pin);
        // Something that is no link stands in its place for a moment, so that the kernel refuses to renew it.
        std::fs::rename(&pin, &aside).unwrap();
        std::fs::hard_link(node.pins.join("counters"), &pin).unwrap();
        attachment.adopt_workload(index, "calieeee", mac, true).unwrap_err();
        assert!(pin.exists(), "nothing that closed the device is taken off");
        std::fs::remove_file(&pin).unwrap();
        std::fs::rename(&aside, &pin).unwrap();
        attachment.adopt_workload(index, "calieeee", mac, true).unwrap();
        assert_eq!(info_of(&pin).0, link.0, "it is the same link");

        // Under another name the device is still there, and stays closed.
        shell("ip link set calieeee down && ip link set calieeee name renamed0");
        let gone = attachment.adopt_workload(index, "calieeee", mac, true);
        assert!(matches!(gone, Err(AttachError::DeviceGone { .. })), "{gone:?}");
        assert_eq!(info_of(&pin).0, link.0);
    });
}

#[test]
fn pins_outlive_the_router_and_the_next_one_adopts_them() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pod = node.pod("calidddd");
    let outside = Namespace::new();
    node.connect("up0", &outside);
    let mac = mac_of(&node.namespace, "calidddd");
    node.run(|| {
        let (workload, uplink) = (index_of("calidddd"), index_of("up0"));
        let mut first = node.open();
        first.set_owned(&node_owned()).unwrap();
        first.adopt_workload(workload, "calidddd", mac, true).unwrap();
        first.attach_uplink(uplink, "up0", None).unwrap();
        assert!(matches!(Attachment::open(node.settings()), Err(AttachError::InUse { .. })));
        assert!(matches!(detach(&node.pins), Err(AttachError::InUse { .. })));
        let pins = [
            "trunk_receive".to_owned(),
            "trunk_deliver".to_owned(),
            format!("workload_{workload}"),
            format!("uplink_{uplink}"),
        ]
        .map(|name| node.pins.join(name));
        let links = pins.each_ref().map(|pin| info_of(pin));
        drop(first);

        // Closed, and still attached.
        assert_eq!(pins.each_ref().map(|pin| info_of(pin)), links);
        let tap = Tap::open(KERNEL_END);
        pod.run(|| UdpSocket::bind("10.7.0.5:0").unwrap().send_to(b"anyone?", "198.51.100.9:53").unwrap());
        assert!(tap.find(|frame| frame.ends_with(b"anyone?")).is_some(), "the pod's packets still go into the trunk");
        let frame = v4(POD, 6, 0, &to_port(80));
        assert_eq!(test_run(&pins[3], &frame, uplink, 0), XDP_DROP);

        let mut second = node.open();
        assert!(second.counters().unwrap().get(Counter::TrunkUnclaimed) > 0, "counters are kept");
        assert_eq!(second.pinned_workloads().unwrap(), [workload]);
        assert_eq!(second.pinned_uplinks().unwrap(), [uplink]);
        second.adopt_workload(workload, "calidddd", mac, true).unwrap();
        second.attach_uplink(uplink, "up0", None).unwrap();
        for (pin, (link, program)) in pins.iter().zip(links) {
            let (new_link, new_program) = info_of(pin);
            assert_eq!(new_link, link, "{pin:?}: the link is the same");
            assert_ne!(new_program, program, "{pin:?}: its program is the new one");
        }
        assert_eq!(test_run(&pins[3], &frame, uplink, 0), XDP_DROP, "what is owned is kept");
        second.register_socket(SocketDevice::Uplink(uplink), 0, xdp_socket().as_fd()).unwrap();

        // Adopting again changes nothing.
        second.adopt_workload(workload, "calidddd", mac, true).unwrap();
        assert_eq!(info_of(&pins[2]).0, links[2].0);
        drop(second);

        let report = detach(&node.pins).unwrap();
        assert_eq!(report.devices, [KERNEL_END, ROUTER_END]);
        for name in ["trunk_receive", "trunk_deliver", "sockets_trunk", "workloads", "counters"] {
            assert!(report.pins.iter().any(|pin| pin == name), "{name} is reported: {report:?}");
        }
        assert!(!node.pins.exists());
        assert!(if_nametoindex(KERNEL_END).is_err() && if_nametoindex(ROUTER_END).is_err());
        let alive: Vec<u32> = loaded_links().map(|link| link.unwrap().id()).collect();
        for (pin, (link, _)) in pins.iter().zip(links) {
            assert!(!alive.contains(&link), "{pin:?} is detached");
        }
        assert!(detach(&node.pins).unwrap().is_empty(), "again: nothing");
    });
}

#[test]
fn a_workload_is_served_at_once_by_a_filter_and_gets_its_link_later() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pod = node.pod("califfff");
    let mac = mac_of(&node.namespace, "califfff");
    node.run(|| {
        let filters = || shell("tc filter show dev califfff ingress").matches("handle 0x77656972").count();
        let pin = |index| node.pins.join(format!("workload_{index}"));
        let index = index_of("califfff");
        let mut attachment = node.open();
        let tap = Tap::open(KERNEL_END);
        // Whether what the pod sends comes by the trunk.
        let is_taken = |what: &str| {
            pod.run(|| UdpSocket::bind("10.7.0.5:0").unwrap().send_to(what.as_bytes(), "198.51.100.9:53").unwrap());
            tap.find(|frame| frame.ends_with(what.as_bytes())).is_some()
        };

        // Somebody else's qdisc is there already.
        shell("tc qdisc add dev califfff clsact");
        attachment.adopt_workload_at_once(index, "califfff", mac, false).unwrap();
        assert!(filters() == 1 && !pin(index).exists() && is_taken("by the filter"));
        attachment.adopt_workload_at_once(index, "califfff", mac, true).unwrap();
        assert!(
            filters() == 1 && attachment.modes().iter().all(|mode| mode.mode != "redirect"),
            "the entry is another"
        );

        // It stays when the process ends; the next one replaces it, or gives the link.
        drop(attachment);
        assert!(filters() == 1 && is_taken("by nobody"));
        let program = || shell("tc filter show dev califfff ingress | grep -o ' id [0-9]*'");
        let left = program();
        let mut attachment = node.open();
        attachment.adopt_workload_at_once(index, "califfff", mac, true).unwrap();
        assert!(filters() == 1 && program() != left && is_taken("by the new one"));
        assert!(attachment.link_next().unwrap());
        assert!(filters() == 0 && pin(index).exists() && is_taken("by the link"));
        assert!(!attachment.link_next().unwrap(), "none is left");
        attachment.adopt_workload_at_once(index, "califfff", mac, false).unwrap();
        assert!(filters() == 0 && attachment.modes().iter().any(|mode| mode.mode == "redirect"));

        // One that is no workload any more is open, one that is gone leaves nothing.
        attachment.forget_workload(index).unwrap();
        attachment.adopt_workload_at_once(index, "califfff", mac, true).unwrap();
        assert!(filters() == 1);
        attachment.forget_workload(index).unwrap();
        assert!(filters() == 0 && !is_taken("by no program"));
        attachment.adopt_workload_at_once(index, "califfff", mac, true).unwrap();
        let other = node.pod("califfee");
        let gone = index_of("califfee");
        attachment.adopt_workload_at_once(gone, "califfee", mac, true).unwrap();
        shell("ip link delete califfee");
        drop(other);
        for left in [true, true, false] {
            assert_eq!(attachment.link_next().unwrap(), left);
        }
        attachment.forget_workload(gone).unwrap();
        assert_eq!(attachment.pinned_workloads().unwrap(), [index]);

        // A process that ends between filter and link, and another one that is taken off.
        attachment.forget_workload(index).unwrap();
        attachment.adopt_workload_at_once(index, "califfff", mac, true).unwrap();
        drop(attachment);
        let mut attachment = node.open();
        attachment.adopt_workload(index, "califfff", mac, true).unwrap();
        assert!(filters() == 0 && pin(index).exists() && is_taken("by the link again"));
        attachment.forget_workload(index).unwrap();
        attachment.adopt_workload_at_once(index, "califfff", mac, true).unwrap();
        drop(attachment);
        assert!(filters() == 1);
        detach(&node.pins).unwrap();
        assert!(filters() == 0);
    });
}

#[test]
fn keys_of_flows_are_inserted_and_listed_at_once() {
    const FLOWS: u32 = 3000;
    if skipped() {
        return;
    }
    let node = Node::new();
    node.run(|| {
        let mut attachment = Attachment::open(TrunkSettings { flows: Some(FLOWS), ..node.settings() }).unwrap();
        let mut keys = attachment.take_offload().expect("there are to be flows").keys;
        assert!(keys.all().unwrap().is_empty());
        let entries = (0..FLOWS).map(|flow| {
            let mut bytes = [0; 44];
            bytes[..4].copy_from_slice(&flow.to_ne_bytes());
            let key = if flow % 3 == 0 { Key::V6(bytes) } else { Key::V4(*bytes.first_chunk().unwrap()) };
            (key, flow, flow ^ 0x1234_5678)
        });
        let entries: Vec<_> = entries.collect();
        let (many, single) = entries.split_at(2000);
        keys.insert_all(many).unwrap();
        single.iter().for_each(|(key, way, serial)| keys.insert(key, *way, *serial).unwrap());
        let mut expected: HashSet<_> = HashSet::from_iter(entries);
        let listed = keys.all().unwrap();
        assert_eq!(listed.len(), expected.len());
        assert_eq!(HashSet::from_iter(listed), expected);
        // What leads elsewhere stays.
        for (key, way, serial) in expected.extract_if(|(_, way, _)| way % 2 == 0) {
            keys.remove(&key, way, serial);
        }
        expected.iter().for_each(|(key, way, serial)| keys.remove(key, *way, serial + 1));
        assert_eq!(HashSet::from_iter(keys.all().unwrap()), expected);
        // There are two for each flow, of either family.
        let too_many: Vec<_> = (0..=2 * FLOWS)
            .map(|key| (Key::V4([key.to_ne_bytes(); 5].as_flattened().try_into().unwrap()), 0, 0))
            .collect();
        assert!(keys.insert_all(&[]).is_ok() && keys.insert_all(&too_many).is_err());
    });
}

#[test]
fn devices_that_are_gone_leave_nothing() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let pods = ["calie0", "calie1"].map(|host| node.pod(host));
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let indexes = ["calie0", "calie1"].map(index_of);
        for (host, index) in ["calie0", "calie1"].iter().zip(indexes) {
            attachment.adopt_workload(index, host, Mac([2; 6]), true).unwrap();
        }
        let uplink = index_of("up0");
        attachment.attach_uplink(uplink, "up0", None).unwrap();

        // One goes while the router runs, the others while none does.
        shell("ip link delete calie0");
        attachment.forget_workload(indexes[0]).unwrap();
        attachment.forget_workload(indexes[0]).unwrap();
        assert_eq!(attachment.pinned_workloads().unwrap(), [indexes[1]]);
        assert!(matches!(
            attachment.adopt_workload(indexes[0], "calie0", Mac([2; 6]), true),
            Err(AttachError::DeviceGone { .. })
        ));
        drop(attachment);
        drop(pods);
        shell("ip link delete up0; while ip link show calie1 2>/dev/null; do sleep 0.05; done");

        let attachment = node.open();
        assert_eq!(attachment.pinned_workloads().unwrap(), [0u32; 0]);
        assert_eq!(attachment.pinned_uplinks().unwrap(), [0u32; 0]);
        let left: Vec<_> = fs::read_dir(&node.pins).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let stale = |name: &std::ffi::OsString| {
            let name = name.to_string_lossy();
            name.starts_with("workload_") || name.starts_with("uplink_") || name == format!("sockets_{uplink}")
        };
        assert!(!left.iter().any(stale), "{left:?}");
    });
}

#[test]
fn what_stays_owned_is_owned_at_every_moment() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let outside = Namespace::new();
    node.connect("up0", &outside);
    node.run(|| {
        let mut attachment = node.open();
        let index = index_of("up0");
        let one = node_owned();
        let other = Owned {
            prefixes: vec!["10.7.0.0/25".parse().unwrap(), "fd07::/63".parse().unwrap()],
            node_addresses: vec![Ipv4Addr::from(NODE).into(), "198.51.100.1".parse().unwrap()],
            ports: vec![(Protocol::TCP, 30_000..=30_000), (Protocol::TCP, 40_000..=50_000)],
            failsafe_ports: vec![(Protocol::TCP, 22), (Protocol::TCP, 179)],
            own_ports: Vec::new(),
            governed: true,
        };
        attachment.set_owned(&one).unwrap();
        attachment.attach_uplink(index, "up0", None).unwrap();
        let link = node.pins.join(format!("uplink_{index}"));

        let (done, runs) = (AtomicBool::new(false), AtomicU32::new(0));
        thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let frames = [
                    (v4(POD, 6, 0, &to_port(80)), XDP_DROP),
                    (v6(POD_V6, 6, 64, &to_port(80)), XDP_DROP),
                    (v4(NODE, 6, 0, &to_port(30_000)), XDP_DROP),
                    (v4(NODE, 6, 0, &to_port(22)), XDP_PASS),
                ];
                while !done.load(Ordering::Relaxed) {
                    for (nth, (frame, action)) in frames.iter().enumerate() {
                        assert_eq!(test_run(&link, frame, index, 0), *action, "frame {nth}");
                    }
                    runs.fetch_add(1, Ordering::Relaxed);
                }
            });
            // However little of the processor the other thread gets.
            let mut rounds = 0;
            while !watch.is_finished() && (rounds < 50 || runs.load(Ordering::Relaxed) < 10) {
                attachment.set_owned(if rounds % 2 == 0 { &other } else { &one }).unwrap();
                rounds += 1;
            }
            done.store(true, Ordering::Relaxed);
            watch.join().expect("always owned");
        });

        // And exactly the last is left.
        attachment.set_owned(&other).unwrap();
        let action = |frame: Vec<u8>| test_run(&link, &frame, index, 0);
        assert_eq!(action(v4([10, 96, 0, 10], 17, 0, &to_port(53))), XDP_PASS);
        assert_eq!(action(v4([10, 7, 0, 128], 6, 0, &to_port(80))), XDP_PASS);
        assert_eq!(action(v4(NODE, 6, 0, &to_port(30_001))), XDP_PASS);
        assert_eq!(action(v4(NODE, 6, 0, &to_port(45_000))), XDP_DROP);
        assert_eq!(action(v6(NODE_V6, 4, 64, &[])), XDP_PASS);
        attachment.set_owned(&Owned::default()).unwrap();
        for (name, frame, Expected(_, _, cause)) in uplink_cases() {
            let expected = if cause == Counter::UplinkTagsDropped { XDP_DROP } else { XDP_PASS };
            assert_eq!(action(frame), expected, "{name}: nothing is owned");
        }
        attachment.set_owned(&one).unwrap();
        for (name, frame, Expected(_, untaken, _)) in uplink_cases() {
            assert_eq!(action(frame), untaken, "{name}");
        }
    });
}

#[test]
fn adopting_many_workloads_is_quick() {
    if skipped() {
        return;
    }
    const WORKLOADS: u32 = 100;
    let node = Node::new();
    let batch: String = (0..WORKLOADS).map(|n| format!("link add w{n} type veth peer name p{n}\n")).collect();
    node.namespace.shell(&format!("ip -batch - <<'END'\n{batch}END\n"));
    node.run(|| {
        let mut attachment = node.open();
        let devices: Vec<_> = (0..WORKLOADS).map(|n| format!("w{n}")).map(|name| (index_of(&name), name)).collect();
        let each = |what: &str, start: Instant, limit: Duration| {
            let mean = start.elapsed() / WORKLOADS;
            assert!(mean < limit, "{what}: {mean:?} each");
        };
        let start = Instant::now();
        for (index, name) in &devices {
            attachment.adopt_workload(*index, name, Mac([2; 6]), false).unwrap();
        }
        // The kernel waits for an RCU grace period, some 10 ms, at the first link of a device, and when one is taken
        // off a live device.
        each("adopting", start, Duration::from_millis(50));
        drop(attachment);
        let mut attachment = node.open();
        let start = Instant::now();
        for (index, name) in &devices {
            attachment.adopt_workload(*index, name, Mac([2; 6]), false).unwrap();
        }
        each("adopting again", start, Duration::from_millis(5));
        let half = devices.len() / 2;
        for (_, name) in &devices[..half] {
            shell(&format!("ip link delete {name}"));
        }
        let start = Instant::now();
        for (index, _) in &devices[..half] {
            attachment.forget_workload(*index).unwrap();
        }
        each("forgetting what is gone", start, Duration::from_millis(5));
        let start = Instant::now();
        for (index, _) in &devices[half..] {
            attachment.forget_workload(*index).unwrap();
        }
        each("forgetting", start, Duration::from_millis(50));
        assert!(attachment.pinned_workloads().unwrap().is_empty());
    });
}

#[test]
fn what_cannot_work_is_refused_with_a_reason() {
    if skipped() {
        return;
    }
    let node = Node::new();
    node.run(|| {
        let settings = node.settings();
        let refused = |settings: TrunkSettings| Attachment::open(settings).err().expect("refused");
        assert!(matches!(
            refused(TrunkSettings { queues: 0, ..settings.clone() }),
            AttachError::Queues { queues: 0, .. }
        ));
        assert!(matches!(refused(TrunkSettings { mtu: 9217, ..settings.clone() }), AttachError::Mtu { mtu: 9217, .. }));
        let ordinary = env::temp_dir().join(&node.namespace.name);
        assert!(matches!(
            refused(TrunkSettings { pin_dir: ordinary.clone(), ..settings.clone() }),
            AttachError::NotBpf { .. }
        ));
        assert!(!ordinary.exists(), "nothing is made in a wrong place");

        shell("ip link add weir0 type veth peer name other");
        assert!(matches!(refused(settings.clone()), AttachError::ForeignDevice { name: KERNEL_END, .. }));
        assert!(matches!(detach(&node.pins), Err(AttachError::ForeignDevice { .. })), "nor is it deleted");
        shell("ip link delete weir0");

        let mut attachment = node.open();
        let lo = index_of("lo");
        assert!(matches!(attachment.attach_uplink(lo, "lo", None), Err(AttachError::Mtu { mtu: 65_536, .. })));
        shell("ip link set lo mtu 1500");
        assert!(matches!(attachment.attach_uplink(lo, "lo", None), Err(AttachError::NotEthernet { .. })));
        shell("ip link add plain0 type bridge");
        let plain = index_of("plain0");
        let xdp = Some(UplinkHook::Xdp);
        assert!(matches!(attachment.attach_uplink(plain, "plain0", xdp), Err(AttachError::NoNativeMode { .. })));
        assert!(matches!(attachment.attach_uplink(lo + 1000, "lo", None), Err(AttachError::DeviceGone { .. })));
        assert!(matches!(
            attachment.attach_uplink(index_of(ROUTER_END), ROUTER_END, None),
            Err(AttachError::Occupied { .. })
        ));
        shell("ip link add narrow numrxqueues 1 type veth peer name wide numtxqueues 4; ethtool -L wide tx 4");
        shell("ip link set narrow up; ip link set wide up");
        let narrow = attachment.attach_uplink(index_of("narrow"), "narrow", xdp);
        assert!(matches!(narrow, Err(AttachError::FewerQueues { .. })), "{narrow:?}");
        assert!(narrow.unwrap_err().to_string().contains("ethtool -L narrow rx N"), "what to do is said");
        assert!(attachment.pinned_uplinks().unwrap().is_empty());
    });
}

#[test]
fn a_pin_folder_serves_one_namespace() {
    if skipped() {
        return;
    }
    let node = Node::new();
    let stranger = Namespace::new();
    let strange = TrunkSettings { queues: 2, mtu: 1500, flows: None, pin_dir: node.pins.clone() };
    node.run(|| drop(node.open()));
    stranger.run(|| {
        assert!(matches!(Attachment::open(strange.clone()), Err(AttachError::OtherNamespace { .. })));
        assert!(matches!(detach(&node.pins), Err(AttachError::OtherNamespace { .. })));
        assert!(if_nametoindex(KERNEL_END).is_err(), "it is refused before anything is made");
    });
    // A namespace that is gone has no claim; nobody can detach there any more.
    let Node { namespace, .. } = &node;
    namespace.run(|| shell("ip link delete weir0"));
    stranger.run(|| {
        let attachment = Attachment::open(strange).expect("the pins are taken over");
        assert_eq!(attachment.trunk().kernel_end, index_of(KERNEL_END));
        drop(attachment);
        assert!(!detach(&node.pins).unwrap().is_empty());
    });
}

#[test]
fn a_namespace_of_mounts_is_noticed() {
    if skipped() {
        return;
    }
    // The pins of a process under `ip netns exec` would go with it. A child takes that part.
    if env::var_os("WEIR_TEST_PRIVATE_MOUNTS").is_some() {
        let settings =
            TrunkSettings { queues: 1, mtu: 1500, flows: None, pin_dir: "/sys/fs/bpf/weir-private-mounts".into() };
        assert!(matches!(detach(&settings.pin_dir), Err(AttachError::PrivateMounts { .. })));
        assert!(matches!(Attachment::open(settings), Err(AttachError::PrivateMounts { .. })));
        return;
    }
    let namespace = Namespace::new();
    let status = Command::new("ip")
        .args(["netns", "exec", &namespace.name])
        .arg(env::current_exe().unwrap())
        .args(["--exact", "a_namespace_of_mounts_is_noticed", "--nocapture"])
        .env("WEIR_TEST_PRIVATE_MOUNTS", "1")
        .status();
    match status {
        Ok(status) => assert!(status.success()),
        Err(error) if error.kind() == ErrorKind::NotFound => panic!("apt-get install iproute2"),
        Err(error) => panic!("{error}"),
    }
}
