//! Whatever bytes arrive, the dataplane goes on: no panic, no lost frame (debug builds keep a ledger), and every packet is counted.

use std::{path::Path, time::Duration};

use proptest::prelude::*;
use weir_cluster::{compile, translate};
use weir_dataplane::model::{Links, Role};
use weir_node::memory_router::MemoryRouter;
use weir_packet::Mac;

fn router() -> MemoryRouter {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/packets/nodeport-tcp/weir.yaml");
    let loaded = translate::load_strictly(&path).unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    let links: Links = compile::links_of(&loaded.config);
    MemoryRouter::new(loaded, links, 1).unwrap()
}

/// Frames that get far: the right MAC addresses and EtherTypes, addresses that the router knows, any content behind.
fn near_valid() -> impl Strategy<Value = Vec<u8>> {
    const ADDRESSES: [[u8; 4]; 7] = [
        [10, 244, 1, 2],
        [10, 244, 1, 3],
        [10, 244, 2, 2],
        [10, 96, 0, 10],
        [192, 168, 0, 10],
        [192, 168, 0, 11],
        [203, 0, 113, 7],
    ];
    let address = || prop::sample::select(ADDRESSES.to_vec());
    let protocol = prop::sample::select(vec![1u8, 4, 6, 17, 41, 132, 255]);
    let port = || prop::sample::select(vec![0u16, 22, 80, 8080, 30080, 12345, 40000]);
    (
        address(),
        address(),
        protocol,
        port(),
        port(),
        any::<[u8; 3]>(),
        0u16..0x8000,
        prop::collection::vec(any::<u8>(), 0..200),
    )
        .prop_map(|(src, dst, protocol, sport, dport, [ttl, tos, flags], fragment, payload)| {
            let mut l4 = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
            l4.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags & 0x3f, 0xff, 0xff, 0, 0, 0, 0]);
            l4.extend(payload);
            let fragment = if fragment < 0x7000 { 0x4000 } else { fragment & 0x3fff };
            let mut header = [0u8; 20];
            header[0] = 0x45;
            header[1] = tos;
            header[2..4].copy_from_slice(&(20 + l4.len() as u16).to_be_bytes());
            header[6..8].copy_from_slice(&fragment.to_be_bytes());
            header[8] = ttl;
            header[9] = protocol;
            header[12..16].copy_from_slice(&src);
            header[16..20].copy_from_slice(&dst);
            let sum = header.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum::<u32>();
            let folded = (sum & 0xffff) + (sum >> 16);
            let folded = (folded & 0xffff) + (folded >> 16);
            header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
            let mut frame = vec![0; 12];
            frame.extend([8, 0]);
            frame.extend(header);
            frame.extend(l4);
            frame
        })
}

fn frames() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let random = prop::collection::vec(any::<u8>(), 0..400);
    let typed = (
        prop::sample::select(vec![[8u8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]]),
        prop::collection::vec(any::<u8>(), 0..300),
    )
        .prop_map(|(ethertype, rest)| [&[0; 12], &ethertype[..], &rest].concat());
    let cut = (near_valid(), any::<prop::sample::Index>()).prop_map(|(mut frame, at)| {
        frame.truncate(at.index(frame.len() + 1));
        frame
    });
    let long = (1700usize..4000).prop_map(|len| vec![0x45; len]);
    let frame = prop_oneof![2 => random, 3 => typed, 8 => near_valid(), 2 => cut, 1 => long];
    prop::collection::vec((0usize..4, frame), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_bytes_are_survived_and_counted(frames in frames()) {
        let mut router = router();
        let macs: Vec<(Mac, Role)> = router.devices().iter().map(|d| (d.mac, d.role)).collect();
        let mut sent = 0u64;
        for (number, (device, mut frame)) in frames.iter().cloned().enumerate() {
            if frame.len() >= 6 && frame[..6] == [0; 6] {
                frame[..6].copy_from_slice(&macs[device].0.0);
            }
            if frame.len() >= 12 && frame[6..12] == [0; 6] {
                frame[6..12].copy_from_slice(&[2, 0, 0, 0, 9, device as u8]);
            }
            router.packet(device, &frame, Duration::from_millis(10 * number as u64)).unwrap();
            router.drain_sent(|_, _| sent += 1);
        }
        let totals = router.finish();
        prop_assert_eq!(totals.rx, frames.len() as u64);
        prop_assert_eq!(totals.tx + totals.punted, sent);
        prop_assert!(totals.balance(), "{:?}", totals);
    }
}
