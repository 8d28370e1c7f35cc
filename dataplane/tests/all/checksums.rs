//! A bad layer-4 checksum stays bad, and is never a reason for a connection's state to change (the design, "Details").

use crate::packets::{Packet, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, ip, rules, service};
use weir_conntrack::Entry;
use weir_dataplane::frame::IfIndex;
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Protocol};

const CLIENT: &str = "10.1.1.10";
const SERVER: &str = "10.1.1.20";
const VIP: &str = "10.96.0.10";
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const FIN_ACK: u8 = 0x11;
const SYN_ACK: u8 = 0x12;

fn router() -> Router {
    let services = [Protocol::TCP, Protocol::UDP].map(|protocol| {
        service(&format!("default/s:{protocol}"), protocol, [VIP, "fd00:96::10"], [SERVER, "fd00:1:1::20"], None)
    });
    Router::new(rules(services.to_vec(), true), SnatPorts::new(10_000..=20_000, []).unwrap(), 64)
}

/// From the client to the service, or the answer of its backend.
fn packet(protocol: u8, is_answer: bool, (flags, seq, ack): (u8, u32, u32)) -> (IfIndex, Packet) {
    let ports: [u16; 2] = if is_answer { [5353, 40_000] } else { [53, 40_000] };
    let [to, from] = if is_answer { [ports[1], ports[0]] } else { [ports[0], ports[1]] };
    let mut l4 = [from.to_be_bytes(), to.to_be_bytes()].concat();
    match protocol {
        UDP => l4.extend([0, 12, 0, 0, 1, 2, 3, 4]),
        _ => {
            l4.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
            l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0, 7, 7]);
        }
    }
    let (device, src, dst) = if is_answer { (SERVER_POD, SERVER, CLIENT) } else { (CLIENT_POD, CLIENT, VIP) };
    (device, Packet { src: ip(src), dst: ip(dst), protocol, ttl: 64, tos: 0, options: 0, l4 })
}

/// Sends it, with a bit of its payload turned over if it is to be bad; whether it left. What leaves is as bad as what came, and no worse:
/// with the bit turned back its checksum is right.
fn send(router: &mut Router, (device, packet): (IfIndex, Packet), is_bad: bool) -> bool {
    let turn = |bytes: &mut [u8]| *bytes.last_mut().expect("a payload") ^= u8::from(is_bad) << 6;
    let mut frame = packet.frame();
    turn(&mut frame);
    let sent = router.one(device, &frame);
    let Some((_, bytes)) = received(&sent).first().copied() else { return false };
    let mut bytes = bytes.to_vec();
    turn(&mut bytes);
    assert_ne!(Packet::read(&bytes).dst, ip(VIP), "translated");
    true
}

fn entry(router: &Router) -> Option<Entry<std::net::Ipv4Addr>> {
    let mut found = None;
    router.tables.v4.for_each(router.now, |entry| found = Some(*entry));
    found
}

fn tcp_state(router: &Router) -> &'static str {
    entry(router).and_then(|entry| entry.tcp_state).map_or("none", |state| state.name())
}

#[test]
fn of_tcp_it_opens_and_ends_nothing() {
    let mut router = router();
    let out = |segment| packet(TCP, false, segment);
    let back = |segment| packet(TCP, true, segment);
    assert!(!send(&mut router, out((SYN, 99, 0)), true), "a connection is not opened");
    assert_eq!((tcp_state(&router), router.drops()[&DropReason::Invalid]), ("none", 1));
    // Its two bytes of payload count.
    for (segment, state) in [
        (out((SYN, 97, 0)), "SYN_SENT"),
        (back((SYN_ACK, 897, 100)), "SYN_RECV"),
        (out((ACK, 100, 900)), "ESTABLISHED"),
        (back((ACK, 900, 102)), "ESTABLISHED"),
    ] {
        assert!(send(&mut router, segment, false));
        assert_eq!(tcp_state(&router), state);
    }
    for bad in [out((RST, 102, 0)), back((RST | ACK, 902, 102)), out((FIN_ACK, 102, 902)), back((FIN_ACK, 902, 102))] {
        assert!(send(&mut router, bad, true), "its receiver will drop it");
        assert_eq!(tcp_state(&router), "ESTABLISHED");
    }
    assert!(send(&mut router, out((ACK, 102, 902)), true), "data too");
    assert!(send(&mut router, out((RST, 104, 0)), false));
    assert_eq!(tcp_state(&router), "CLOSE");
    router.finish();
}

#[test]
fn of_udp_it_opens_and_answers_nothing() {
    let mut router = router();
    let (asked, answer) = (|| packet(UDP, false, (0, 0, 0)), || packet(UDP, true, (0, 0, 0)));
    assert!(!send(&mut router, asked(), true));
    assert!(entry(&router).is_none());
    assert!(send(&mut router, asked(), false));
    assert!(send(&mut router, answer(), true));
    assert_eq!(entry(&router).unwrap().lifecycle.name(), "unreplied");
    assert!(send(&mut router, answer(), false));
    assert_eq!(entry(&router).unwrap().lifecycle.name(), "established");
    assert!(send(&mut router, asked(), true));
    assert_eq!(router.finish().dropped(), 1);
}
