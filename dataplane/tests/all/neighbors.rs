//! Next hops whose MAC address nobody knows yet: packets wait, and somebody is asked.

use std::sync::Arc;

use crate::packets::{Packet, UDP};
use crate::router::{CLIENT_POD, OTHER_MAC, Router, SERVER_POD, UPLINK, cluster, ip, links, rules};
use weir_dataplane::{forwarding::Forwarding, held::PATIENCE, model::Neighbor};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Mac, Tick};

const SECOND: u32 = (1_000_000_000 / Tick::NS) as u32;

/// A word to somebody on the uplink's link whose MAC address is not known.
fn word(to: &str) -> Vec<u8> {
    word_of("10.1.1.10", to)
}

fn word_of(from: &str, to: &str) -> Vec<u8> {
    let l4 = [&[0x9c, 0x40, 0, 53, 0, 12, 0, 0][..], b"word"].concat();
    Packet { src: ip(from), dst: ip(to), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }.frame()
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

#[test]
fn a_pod_that_asks_for_everybody_keeps_nobody_from_waiting() {
    const MOST: u64 = 256;
    // The server's own next hop; one that both wait for.
    for near in ["192.168.10.77", "192.168.10.2"] {
        let mut router = Router::new(rules(Vec::new(), true), SnatPorts::new(10_000..=20_000, []).unwrap(), 1024);
        let mut unknown = links();
        unknown.neighbors.retain(|neighbor| neighbor.address != ip("192.168.10.2"));
        let next = router.next(rules(Vec::new(), true), Arc::new(Forwarding::compile(&cluster(), &unknown).unwrap()));
        router.published.publish(next);
        // As many as may wait for one next hop, to all that there are.
        let frames: Vec<_> = (1..=254)
            .filter(|last| *last != 1 && *last != 100 && *last != 77)
            .flat_map(|last| std::iter::repeat_n((CLIENT_POD, word(&format!("192.168.10.{last}"))), 16))
            .collect();
        frames.chunks(64).for_each(|turn| assert!(router.turn(turn).is_empty()));
        assert_eq!(router.totals().held, MOST, "all places are taken");
        let flood = router.drops()[&DropReason::NeighborUnresolved];
        for _ in 0..4 {
            assert!(router.one(SERVER_POD, &word_of("10.1.1.20", near)).is_empty());
        }
        assert_eq!((router.totals().held, router.drops()[&DropReason::NeighborUnresolved]), (MOST, flood + 4));

        let mac = Mac([2, 0, 0, 0, 0, 0x77]);
        unknown.neighbors.push(Neighbor { address: ip(near), mac, device: UPLINK });
        let next = router.next(rules(Vec::new(), true), Arc::new(Forwarding::compile(&cluster(), &unknown).unwrap()));
        router.published.publish(next);
        let has_left = |frame: &[u8]| frame.ends_with(b"word") && frame[..6] == mac.0;
        let sent = router.wait(1);
        let count = sent.iter().filter(|(_, frame)| has_left(frame)).count();
        // Of those that the flood had waiting for the same next hop, twelve are left.
        assert_eq!(count, if near == "192.168.10.2" { 16 } else { 4 }, "{near}");
        router.wait(PATIENCE + 1);
        router.finish();
    }
}

#[test]
fn only_a_pods_own_addresses_are_learned() {
    // Nobody has said where the pods are.
    let mut cluster = cluster();
    cluster.workloads.iter_mut().for_each(|workload| workload.mac = None);
    let (rules, snat) = (rules(Vec::new(), true), SnatPorts::new(10_000..=20_000, []).unwrap());
    let mut router = Router::between(&cluster, &links(), rules, snat, 1024);
    for made_up in 0..1000_u16 {
        let [high, low] = made_up.to_be_bytes();
        assert!(router.one(CLIENT_POD, &word_of(&format!("10.1.{}.{low}", 100 + high), "10.1.1.20")).is_empty());
        assert_eq!(router.learned(), []);
    }
    // Nor is another pod's.
    router.one(CLIENT_POD, &word_of("10.1.1.20", "192.168.10.100"));
    assert_eq!(router.learned(), []);
    assert_eq!(router.drops()[&DropReason::SpoofedSource], 1001);
    router.one(CLIENT_POD, &word_of("10.1.1.10", "192.168.10.100"));
    assert_eq!(router.learned(), [(CLIENT_POD, ip("10.1.1.10"))]);
    router.finish();
}

#[test]
fn a_pods_mac_that_changes_is_learned_again_but_not_each_of_many() {
    let (rules, snat) = (rules(Vec::new(), true), SnatPorts::new(10_000..=20_000, []).unwrap());
    let mut router = Router::between(&cluster(), &links(), rules, snat, 1024);
    // Each opens a flow, as packets of one are not looked at for that.
    let mut ports = 1000_u16..;
    let mut says = |router: &mut Router, mac: u8| {
        let mut frame = word("10.1.1.20");
        frame[6..12].copy_from_slice(&[10, 0, 0, 0, 0, mac]);
        frame[34..36].copy_from_slice(&ports.next().unwrap().to_be_bytes());
        router.one(CLIENT_POD, &frame);
        router.learned().len()
    };
    // As the manifests have it.
    assert_eq!(says(&mut router, 1), 0);
    assert_eq!(says(&mut router, 9), 1);
    let told: usize = (10..110).map(|mac| says(&mut router, mac)).sum();
    assert_eq!(told, 3, "four at once");
    router.wait(2 * SECOND);
    let told: usize = (10..110).map(|mac| says(&mut router, mac)).sum();
    assert_eq!(told, 2, "one a second");
    router.finish();
}
