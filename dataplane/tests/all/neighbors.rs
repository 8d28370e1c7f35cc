//! Next hops whose MAC address nobody knows yet: packets wait, and somebody is asked.

use std::sync::Arc;

use crate::packets::{Packet, UDP};
use crate::router::{CLIENT_POD, OTHER_MAC, Router, UPLINK, cluster, ip, links, rules};
use weir_dataplane::{forwarding::Forwarding, held::PATIENCE, model::Neighbor};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Mac, Tick};

const SECOND: u32 = (1_000_000_000 / Tick::NS) as u32;

/// A word to somebody on the uplink's link whose MAC address is not known.
fn word(to: &str) -> Vec<u8> {
    let l4 = [&[0x9c, 0x40, 0, 53, 0, 12, 0, 0][..], b"word"].concat();
    Packet { src: ip("10.1.1.10"), dst: ip(to), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame()
}

fn router() -> Router {
    Router::new(rules(Vec::new(), true), SnatPorts::new(10_000..=20_000, []).unwrap(), 64)
}

#[test]
fn a_question_that_is_lost_is_asked_again_by_a_flow_that_never_pauses() {
    let mut router = router();
    let (near, other) = ("192.168.10.77", "192.168.10.78");
    // Four packets a second: one waits at any time.
    let mut asked = Vec::new();
    for turn in 0..40 {
        assert_eq!(router.one(CLIENT_POD, &word(near)), [], "nobody has answered");
        asked.extend(router.asked().into_iter().map(|address| (turn, address)));
        router.wait(SECOND / 4);
    }
    let turns: Vec<i32> = asked.iter().map(|(turn, _)| *turn).collect();
    assert!(asked.iter().all(|(_, address)| *address == (UPLINK, ip(near))), "{asked:?}");
    assert_eq!(turns[0], 0, "at once");
    assert!(turns.windows(2).all(|pair| (4..=5).contains(&(pair[1] - pair[0]))), "once a second: {turns:?}");
    assert!(turns.len() >= 8, "{turns:?}");
    // Another next hop is asked for by itself.
    router.one(CLIENT_POD, &word(other));
    assert!(router.asked().contains(&(UPLINK, ip(other))));

    // One answers, and all that wait for it leave.
    let waiting = router.totals().held;
    let mac = Mac([2, 0, 0, 0, 0, 0x77]);
    let mut links = links();
    links.neighbors.push(Neighbor { address: ip(near), mac, device: UPLINK });
    let next = router.next(rules(Vec::new(), true), Arc::new(Forwarding::compile(&cluster(), &links).unwrap()));
    router.published.publish(next);
    let sent = router.wait(1);
    assert_eq!(sent.len() as u64, waiting - 1);
    assert!(sent.iter().all(|(device, frame)| *device == UPLINK && frame[..6] == mac.0), "{sent:?}");
    assert_ne!(mac, OTHER_MAC);

    // The other does not.
    let before = router.drops()[&DropReason::NeighborUnresolved];
    router.wait(PATIENCE + 1);
    assert_eq!(router.drops()[&DropReason::NeighborUnresolved], before + 1);
    router.finish();
}
