//! The AF_XDP driver on real veth devices. Needs root; WEIR_SKIP_E2E=1 leaves these tests out.

use std::{
    io::ErrorKind,
    process::Command,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use crate::veth::{Veth, enter_namespace, frame, ip, skipped};
use weir_dataplane::{
    afxdp::{AfXdp, AfXdpError, AfXdpSettings, PortSettings, RingSizes, receive_queues},
    driver::{Driver, PortId},
    frame::{IfIndex, LinkType, Packet},
};
use weir_packet::Mac;

const TRUNK: PortId = PortId::TRUNK;
const UPLINK: PortId = PortId(1);
const BURST: usize = 64;
const TRUNK_MAC: Mac = Mac([0x06, 0, 0, 0, 0, 1]);
const UPLINK_MAC: Mac = Mac([0x06, 0, 0, 0, 0, 2]);
const FAR_MAC: Mac = Mac([0x06, 0, 0, 0, 0, 9]);
const SMALL: RingSizes = RingSizes { rx: 64, tx: 64 };

/// A trunk and an uplink.
struct Lab {
    trunk: Veth,
    uplink: Veth,
}

impl Lab {
    fn new(queues: u32) -> Self {
        enter_namespace();
        Self { trunk: Veth::new("trunk", queues, TRUNK_MAC), uplink: Veth::new("uplink", queues, UPLINK_MAC) }
    }

    fn settings(&self, queue: u32, sizes: RingSizes) -> AfXdpSettings {
        let port =
            |veth: &Veth| PortSettings { device: veth.near.clone(), index: veth.index, mac: veth.mac, queue, sizes };
        AfXdpSettings { trunk: port(&self.trunk), uplinks: vec![port(&self.uplink)], spare_frames: 128, mtu: 1500 }
    }

    /// With an MTU of 9000.
    fn jumbo() -> Self {
        let lab = Self::new(1);
        for veth in [&lab.trunk, &lab.uplink] {
            ip(&format!("link set {} mtu 9000", veth.near));
            ip(&format!("link set {} mtu 9000", veth.far));
        }
        lab
    }

    fn open(&mut self, queue: u32, sizes: RingSizes) -> AfXdp {
        self.open_for(AfXdpSettings { mtu: 1500, ..self.settings(queue, sizes) })
    }

    fn open_jumbo(&mut self, sizes: RingSizes) -> AfXdp {
        self.open_for(AfXdpSettings { mtu: 9000, ..self.settings(0, sizes) })
    }

    fn open_for(&mut self, settings: AfXdpSettings) -> AfXdp {
        let queue = settings.trunk.queue;
        let driver = AfXdp::open(&settings).unwrap();
        self.trunk.redirect(queue, driver.socket(TRUNK));
        self.uplink.redirect(queue, driver.socket(UPLINK));
        driver
    }
}

/// All bytes of a packet.
fn whole(driver: &AfXdp, packet: &Packet) -> Vec<u8> {
    driver.arena().whole(packet, &mut Vec::new()).to_vec()
}

/// Receives until there are `count` packets.
fn receive(driver: &mut AfXdp, port: PortId, count: usize) -> Vec<Packet> {
    let mut packets = Vec::with_capacity(count.max(BURST) + BURST);
    let deadline = Instant::now() + Duration::from_secs(5);
    while packets.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} packets arrived", packets.len());
        driver.receive(port, &mut packets, BURST);
    }
    assert_eq!(packets.len(), count);
    packets
}

/// Sends all of `packets`.
fn send(driver: &mut AfXdp, port: PortId, packets: &mut Vec<Packet>) {
    driver.transmit(port, packets);
    assert!(packets.is_empty(), "the ring has room");
}

/// Every frame is somewhere; when the kernel is done with all of them, those that we do not have lie in the rings.
fn assert_accounted(driver: &mut AfXdp, in_packets: u32) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        // Takes the completions of what was sent on a port that sends nothing more.
        driver.sleep(Duration::ZERO);
        let counts = driver.frames();
        assert_eq!(counts.free + counts.in_packets + counts.receiving + counts.sending, counts.total, "{counts:?}");
        assert_eq!(counts.in_packets, in_packets);
        if counts.in_rings == counts.receiving + counts.sending {
            return;
        }
        assert!(Instant::now() < deadline, "the kernel keeps frames: {counts:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_trunk_tells_devices_apart() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let wire = lab.trunk.wire();
    let cases = [
        ("host", Mac([2, 0, 0, 0, 0, 7]), IfIndex(7), LinkType::Host, Mac([2, 0, 0, 0, 0, 7])),
        ("broadcast", Mac([2, 1, 0, 1, 0, 0]), IfIndex(65536), LinkType::Broadcast, Mac([2, 0, 0, 1, 0, 0])),
        ("multicast", Mac([2, 2, 0, 0, 0, 7]), IfIndex(7), LinkType::Multicast, Mac([2, 0, 0, 0, 0, 7])),
        ("other", Mac([2, 3, 0, 0, 0, 7]), IfIndex(7), LinkType::Other, Mac([2, 0, 0, 0, 0, 7])),
        ("the node itself", Mac([2, 0, 0, 0, 0, 0]), IfIndex::HOST, LinkType::Host, FAR_MAC),
        ("forwarded", Mac([2, 0, 0x80, 0, 0, 7]), IfIndex(7).forwarded(), LinkType::Host, FAR_MAC),
        ("no mark", TRUNK_MAC, IfIndex::FORWARDED_BY_UNKNOWN, LinkType::Host, FAR_MAC),
        ("no mark, broadcast", Mac::BROADCAST, IfIndex::FORWARDED_BY_UNKNOWN, LinkType::Host, FAR_MAC),
    ];
    for (number, (name, destination, device, link, source)) in cases.into_iter().enumerate() {
        let sent = frame(destination, FAR_MAC, number as u32, 46);
        wire.send(&sent);
        let mut packets = receive(&mut driver, TRUNK, 1);
        assert_eq!((packets[0].device, packets[0].link), (device, link), "{name}");
        assert_eq!(packets[0].bytes(), sent, "{name}");
        send(&mut driver, TRUNK, &mut packets);
        // On the way back the source names the device; nothing else changes.
        assert_eq!(wire.receive().unwrap(), frame(destination, source, number as u32, 46), "{name}");
    }
    assert_accounted(&mut driver, 0);
}

#[test]
fn an_uplink_tells_how_a_packet_was_addressed() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let wire = lab.uplink.wire();
    for (destination, link) in [
        (UPLINK_MAC, LinkType::Host),
        (Mac::BROADCAST, LinkType::Broadcast),
        (Mac([0x33, 0x33, 0, 0, 0, 1]), LinkType::Multicast),
        (Mac([2, 0, 0, 0, 0, 7]), LinkType::Other),
    ] {
        wire.send(&frame(destination, FAR_MAC, 0, 46));
        let mut packets = receive(&mut driver, UPLINK, 1);
        assert_eq!((packets[0].device, packets[0].link), (lab.uplink.index, link));
        send(&mut driver, UPLINK, &mut packets);
        assert_eq!(
            wire.receive().unwrap(),
            frame(destination, FAR_MAC, 0, 46),
            "an uplink's packets leave as they are"
        );
    }
    assert_accounted(&mut driver, 0);
}

#[test]
fn a_packet_leaves_from_wherever_it_starts() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let wire = lab.uplink.wire();
    for (number, payload_bytes) in [0, 46, 498, 1462].into_iter().enumerate() {
        let sent = frame(UPLINK_MAC, FAR_MAC, number as u32, payload_bytes);
        wire.send(&sent);
        let mut packets = receive(&mut driver, UPLINK, 1);
        assert!(packets[0].grow_front(20));
        let tunnel_header: Vec<u8> = (0..20).map(|i| 0xa0 + i).collect();
        packets[0].bytes_mut()[..20].copy_from_slice(&tunnel_header);
        send(&mut driver, UPLINK, &mut packets);
        assert_eq!(wire.receive().unwrap(), [&tunnel_header[..], &sent].concat(), "{payload_bytes}");

        wire.send(&[&tunnel_header[..], &sent].concat());
        let mut packets = receive(&mut driver, UPLINK, 1);
        packets[0].shrink_front(20);
        send(&mut driver, UPLINK, &mut packets);
        assert_eq!(wire.receive().unwrap(), sent, "{payload_bytes}");
    }
    // The whole headroom, and a packet of our own making.
    let mut packet = driver.allocate().unwrap();
    assert_eq!((packet.bytes().len(), packet.grow_front(256)), (0, true));
    packet.set_len(0);
    let made = frame(FAR_MAC, UPLINK_MAC, 9, 1500);
    packet.set_len(made.len());
    packet.bytes_mut().copy_from_slice(&made);
    send(&mut driver, UPLINK, &mut vec![packet]);
    assert_eq!(wire.receive().unwrap(), made);
    assert_accounted(&mut driver, 0);
}

#[test]
fn what_no_device_can_send_stays_in_the_list() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let before = driver.frames();
    let mut packets: Vec<Packet> = (0..3).map(|_| driver.allocate().unwrap()).collect();
    packets[1].set_len(13);
    packets[2].set_len(14);
    packets[2].device = IfIndex(3);
    packets[2].bytes_mut().copy_from_slice(&frame(FAR_MAC, FAR_MAC, 0, 0)[..14]);
    let wire = lab.trunk.wire();
    driver.transmit(TRUNK, &mut packets);
    assert_eq!(packets.iter().map(|packet| packet.bytes().len()).collect::<Vec<_>>(), [0, 13]);
    packets.into_iter().for_each(|packet| driver.release(packet));
    assert_eq!(wire.receive().unwrap(), frame(FAR_MAC, Mac([2, 0, 0, 0, 0, 3]), 0, 0)[..14]);
    assert_accounted(&mut driver, 0);
    assert_eq!(driver.frames(), before);
    assert_eq!(driver.statistics(TRUNK).unwrap().tx_invalid_descs, 0);
}

#[test]
fn a_hundred_thousand_frames_pass_whole_and_in_order_between_two_ports() {
    if skipped() {
        return;
    }
    const COUNT: u32 = 100_000;
    const WINDOW: u32 = 64;
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, RingSizes { rx: 256, tx: 256 });
    let (trunk, uplink) = (lab.trunk.wire(), lab.uplink.wire());
    let mut packets = Vec::with_capacity(BURST);
    let (mut sent, mut arrived) = (0, 0);
    while arrived < COUNT {
        while sent < COUNT && sent - arrived < WINDOW {
            trunk.send(&frame(Mac([2, 0, 0, 0, 0, 7]), FAR_MAC, sent, (sent % 700) as usize));
            sent += 1;
        }
        let mut forwarded = 0;
        let deadline = Instant::now() + Duration::from_secs(5);
        while forwarded < sent - arrived {
            assert!(Instant::now() < deadline, "frame {} does not arrive", arrived + forwarded);
            forwarded += driver.receive(TRUNK, &mut packets, BURST) as u32;
            for packet in &mut packets {
                packet.device = lab.uplink.index;
            }
            send(&mut driver, UPLINK, &mut packets);
        }
        while arrived < sent {
            let expected = frame(Mac([2, 0, 0, 0, 0, 7]), FAR_MAC, arrived, (arrived % 700) as usize);
            assert!(uplink.receive().unwrap() == expected, "frame {arrived}");
            arrived += 1;
        }
    }
    assert_accounted(&mut driver, 0);
    for port in [TRUNK, UPLINK] {
        let statistics = driver.statistics(port).unwrap();
        assert_eq!(
            (
                statistics.rx_dropped,
                statistics.rx_ring_full,
                statistics.rx_fill_ring_empty_descs,
                statistics.tx_refused
            ),
            (0, 0, 0, 0)
        );
        assert_eq!((statistics.rx_invalid_descs, statistics.tx_invalid_descs), (0, 0));
    }
}

/// Bytes behind the header and the number of a jumbo test's frame: from none to all that an MTU of 9000 carries.
fn jumbo_payload(number: u32) -> usize {
    match number % 4 {
        0 => 9000 - 4,
        // Around whole frames.
        1 => 1792 * (number as usize / 4 % 5 + 1) - 18 + number as usize / 20 % 3 - 1,
        2 => number as usize % 700,
        _ => number as usize * 37 % 8997,
    }
}

#[test]
fn jumbo_frames_pass_whole_and_in_order_both_ways() {
    if skipped() {
        return;
    }
    const COUNT: u32 = 3000;
    let mut lab = Lab::jumbo();
    let mut driver = lab.open_jumbo(RingSizes { rx: 256, tx: 256 });
    let wires = [lab.trunk.wire(), lab.uplink.wire()];
    let devices = [IfIndex(7), lab.uplink.index];
    let (to_trunk, to_uplink) = (Mac([2, 0, 0, 0, 0, 7]), UPLINK_MAC);
    let mut packets = Vec::with_capacity(BURST);
    for number in (0..COUNT).step_by(16) {
        let from = (number / 16 % 2) as usize;
        let (ports, to) = ([TRUNK, UPLINK], 1 - from);
        let destination = [to_trunk, to_uplink][from];
        for number in number..number + 16 {
            wires[from].send(&frame(destination, FAR_MAC, number, jumbo_payload(number)));
        }
        let mut forwarded = 0;
        let deadline = Instant::now() + Duration::from_secs(5);
        while forwarded < 16 {
            assert!(Instant::now() < deadline, "frame {} does not arrive", number + forwarded);
            forwarded += driver.receive(ports[from], &mut packets, 5) as u32;
            packets.iter_mut().for_each(|packet| packet.device = devices[to]);
            send(&mut driver, ports[to], &mut packets);
        }
        let source = [to_trunk, FAR_MAC][to];
        for number in number..number + 16 {
            let expected = frame(destination, source, number, jumbo_payload(number));
            assert!(wires[to].receive().unwrap() == expected, "frame {number}");
        }
    }
    assert_accounted(&mut driver, 0);
    for port in [TRUNK, UPLINK] {
        let statistics = driver.statistics(port).unwrap();
        assert_eq!((statistics.rx_dropped, statistics.rx_ring_full, statistics.tx_refused), (0, 0, 0));
        assert_eq!((statistics.rx_invalid_descs, statistics.tx_invalid_descs), (0, 0));
    }
}

#[test]
fn a_jumbo_frame_leaves_with_a_header_before_it_or_without_one() {
    if skipped() {
        return;
    }
    let mut lab = Lab::jumbo();
    let mut driver = lab.open_jumbo(SMALL);
    let wire = lab.uplink.wire();
    let sent = frame(UPLINK_MAC, FAR_MAC, 1, 8976);
    wire.send(&sent);
    let mut packets = receive(&mut driver, UPLINK, 1);
    assert_eq!((packets[0].total_bytes(), driver.arena().frames_of(&packets[0])), (sent.len(), 6));
    assert!(whole(&driver, &packets[0]) == sent);
    assert!(packets[0].grow_front(20));
    packets[0].bytes_mut()[..20].fill(0xa0);
    send(&mut driver, UPLINK, &mut packets);
    assert!(wire.receive().unwrap() == [&[0xa0; 20][..], &sent].concat());

    wire.send(&[&[0xa0; 20][..], &sent].concat());
    let mut packets = receive(&mut driver, UPLINK, 1);
    packets[0].shrink_front(20);
    // And padding that is cut off, whole frames of it.
    driver.truncate(&mut packets[0], 2000);
    assert_accounted(&mut driver, 2);
    send(&mut driver, UPLINK, &mut packets);
    assert!(wire.receive().unwrap() == sent[..2000]);
    assert_accounted(&mut driver, 0);
}

#[test]
fn a_storm_of_jumbo_frames_fills_the_rings_and_loses_no_frame() {
    if skipped() {
        return;
    }
    let mut lab = Lab::jumbo();
    let mut driver = lab.open_jumbo(SMALL);
    let before = driver.frames();
    let wire = lab.uplink.wire();
    let jumbo = |number| frame(UPLINK_MAC, FAR_MAC, number, 8996);
    let mut last = None;
    for round in 0..50 {
        // 10 packets of 6 descriptors fit the rx ring.
        (0..30).for_each(|number| wire.send(&jumbo(round * 30 + number)));
        wire.send(&frame(UPLINK_MAC, FAR_MAC, round * 30, 46));
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut packets = Vec::with_capacity(2 * BURST);
        while packets.len() < 10 {
            assert!(Instant::now() < deadline, "{} of round {round}", packets.len());
            driver.receive(UPLINK, &mut packets, BURST);
        }
        // The rest of them, as far as there was room.
        thread::sleep(Duration::from_millis(1));
        driver.receive(UPLINK, &mut packets, BURST);
        for packet in &packets {
            let bytes = whole(&driver, packet);
            let number = u32::from_be_bytes(*bytes[14..].first_chunk().unwrap());
            let expected = if packet.has_tail() { jumbo(number) } else { frame(UPLINK_MAC, FAR_MAC, number, 46) };
            assert!(bytes == expected, "{number}");
            assert!(!packet.has_tail() || last.replace(number).is_none_or(|last| last < number), "{number} in order");
        }
        packets.into_iter().for_each(|packet| driver.release(packet));
    }
    assert!(driver.statistics(UPLINK).unwrap().rx_ring_full > 0, "{:?}", driver.statistics(UPLINK));
    assert_accounted(&mut driver, 0);

    // The tx ring takes whole packets only.
    ip(&format!("link set {} down", lab.uplink.near));
    let made = |number| frame(FAR_MAC, UPLINK_MAC, number, 8996);
    let mut packets: Vec<Packet> = (0..15).map(|number| driver.packet_of(&[&made(number)]).unwrap()).collect();
    driver.transmit(UPLINK, &mut packets);
    assert_eq!((packets.len(), driver.frames().sending), (5, 60));
    // Four descriptors of room: one for a short packet, though a long one waits before it.
    let short = driver.packet_of(&[&frame(FAR_MAC, UPLINK_MAC, 99, 46)]).unwrap();
    driver.transmit(UPLINK, &mut vec![short]);
    packets.into_iter().for_each(|packet| driver.release(packet));
    ip(&format!("link set {} up", lab.uplink.near));
    let wire = lab.uplink.wire();
    assert!(wire.is_silent(Duration::from_millis(100)));
    driver.transmit(UPLINK, &mut vec![]);
    (0..10).for_each(|number| assert!(wire.receive().unwrap() == made(number), "{number}"));
    assert_eq!(wire.receive().unwrap(), frame(FAR_MAC, UPLINK_MAC, 99, 46));

    // What the device refuses is counted in packets.
    ip(&format!("link set {} down", lab.uplink.far));
    let mut packets: Vec<Packet> = (0..10).map(|number| driver.packet_of(&[&made(number)]).unwrap()).collect();
    send(&mut driver, UPLINK, &mut packets);
    assert_accounted(&mut driver, 0);
    assert_eq!((driver.frames().sending, driver.statistics(UPLINK).unwrap().tx_refused), (0, 10));
    assert_eq!(driver.frames(), before);
}

#[test]
fn sockets_for_short_packets_drop_and_count_jumbo_frames() {
    if skipped() {
        return;
    }
    let mut lab = Lab::jumbo();
    let mut driver = lab.open(0, SMALL);
    let wire = lab.uplink.wire();
    wire.send(&frame(UPLINK_MAC, FAR_MAC, 1, 8996));
    wire.send(&frame(UPLINK_MAC, FAR_MAC, 2, 1700));
    let packet = receive(&mut driver, UPLINK, 1).pop().unwrap();
    assert!(packet.bytes() == frame(UPLINK_MAC, FAR_MAC, 2, 1700));
    driver.release(packet);
    assert_eq!(driver.statistics(UPLINK).unwrap().rx_dropped, 1);
    assert_accounted(&mut driver, 0);
}

#[test]
fn a_full_rx_ring_is_counted_and_recovers() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let wire = lab.uplink.wire();
    for number in 0..100 {
        wire.send(&frame(UPLINK_MAC, FAR_MAC, number, 46));
        // Slowly enough for the veth's own ring.
        if number % 32 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while driver.statistics(UPLINK).unwrap().rx_ring_full < 36 {
        assert!(Instant::now() < deadline, "{:?}", driver.statistics(UPLINK));
        thread::sleep(Duration::from_millis(1));
    }
    let mut packets = receive(&mut driver, UPLINK, 64);
    for (number, packet) in packets.iter().enumerate() {
        assert_eq!(packet.bytes(), frame(UPLINK_MAC, FAR_MAC, number as u32, 46));
    }
    assert_eq!(driver.statistics(UPLINK).unwrap().rx_ring_full, 36);
    send(&mut driver, UPLINK, &mut packets);
    for number in 0..64 {
        assert_eq!(wire.receive().unwrap(), frame(UPLINK_MAC, FAR_MAC, number, 46));
    }
    wire.send(&frame(UPLINK_MAC, FAR_MAC, 100, 46));
    let packet = receive(&mut driver, UPLINK, 1).pop().unwrap();
    driver.release(packet);
    assert_accounted(&mut driver, 0);
}

#[test]
fn a_starved_fill_ring_is_counted_and_recovers() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let settings = AfXdpSettings { spare_frames: 0, ..lab.settings(0, SMALL) };
    let mut driver = AfXdp::open(&settings).unwrap();
    lab.uplink.redirect(0, driver.socket(UPLINK));
    let wire = lab.uplink.wire();
    // Two tx rings' worth of frames are free; 128 more wait in the fill ring of the uplink.
    let mut kept = Vec::with_capacity(1024);
    for number in 0..128 + 128 {
        wire.send(&frame(UPLINK_MAC, FAR_MAC, number, 46));
        kept.append(&mut receive(&mut driver, UPLINK, 1));
    }
    assert!(driver.allocate().is_none(), "all frames are in packets or in fill rings");
    assert_eq!(driver.statistics(UPLINK).unwrap().rx_fill_ring_empty_descs, 0);
    wire.send(&frame(UPLINK_MAC, FAR_MAC, 1000, 46));
    let deadline = Instant::now() + Duration::from_secs(5);
    while driver.statistics(UPLINK).unwrap().rx_fill_ring_empty_descs == 0 {
        assert!(Instant::now() < deadline, "{:?}", driver.statistics(UPLINK));
        thread::sleep(Duration::from_millis(1));
    }
    assert_accounted(&mut driver, 256);
    for packet in kept {
        driver.release(packet);
    }
    let mut none = Vec::with_capacity(BURST);
    assert_eq!(driver.receive(UPLINK, &mut none, BURST), 0);
    wire.send(&frame(UPLINK_MAC, FAR_MAC, 1001, 46));
    let packet = receive(&mut driver, UPLINK, 1).pop().unwrap();
    assert_eq!(packet.bytes(), frame(UPLINK_MAC, FAR_MAC, 1001, 46));
    driver.release(packet);
    assert_accounted(&mut driver, 0);
}

#[test]
fn what_a_full_tx_ring_has_no_room_for_stays_in_the_list() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let wire = lab.uplink.wire();
    ip(&format!("link set {} down", lab.uplink.near));
    let make = |driver: &mut AfXdp, number| {
        let bytes = frame(FAR_MAC, UPLINK_MAC, number, 46);
        let mut packet = driver.allocate().unwrap();
        packet.set_len(bytes.len());
        packet.bytes_mut().copy_from_slice(&bytes);
        packet
    };
    let mut packets: Vec<Packet> = (0..100).map(|number| make(&mut driver, number)).collect();
    driver.transmit(UPLINK, &mut packets);
    let left: Vec<_> = packets.iter().map(|packet| packet.bytes().to_vec()).collect();
    assert_eq!(left, (64..100).map(|number| frame(FAR_MAC, UPLINK_MAC, number, 46)).collect::<Vec<_>>());
    assert!(driver.fault().is_none(), "a device that is down comes up again");
    packets.into_iter().for_each(|packet| driver.release(packet));
    assert_accounted(&mut driver, 0);
    assert_eq!(driver.frames().sending, 64);
    ip(&format!("link set {} up", lab.uplink.near));
    // The far end's carrier follows a moment later.
    assert!(wire.is_silent(Duration::from_millis(100)));
    driver.transmit(UPLINK, &mut vec![]);
    for number in 0..64 {
        assert_eq!(wire.receive().unwrap(), frame(FAR_MAC, UPLINK_MAC, number, 46));
    }
    assert_accounted(&mut driver, 0);
    assert_eq!(driver.frames().sending, 0);
}

#[test]
fn what_the_device_refuses_is_counted_and_its_frames_come_back() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    // Our end has no carrier then: the kernel takes each packet and drops it.
    ip(&format!("link set {} down", lab.uplink.far));
    let mut packets: Vec<Packet> = (0..40).map(|_| driver.allocate().unwrap()).collect();
    packets.iter_mut().for_each(|packet| packet.set_len(60));
    send(&mut driver, UPLINK, &mut packets);
    assert_accounted(&mut driver, 0);
    assert_eq!((driver.frames().sending, driver.statistics(UPLINK).unwrap().tx_refused), (0, 40));
    assert!(driver.fault().is_none());
}

#[test]
fn a_packet_ends_the_sleep() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    let start = Instant::now();
    assert!(!driver.sleep(Duration::from_millis(30)));
    assert!(start.elapsed() >= Duration::from_millis(30));

    for (port, wire) in [(TRUNK, lab.trunk.wire()), (UPLINK, lab.uplink.wire())] {
        // One that is there before the sleep begins.
        wire.send(&frame(UPLINK_MAC, FAR_MAC, 0, 46));
        let start = Instant::now();
        assert!(driver.sleep(Duration::from_secs(20)));
        let packet = receive(&mut driver, port, 1).pop().unwrap();
        driver.release(packet);
        // One that comes while it lasts, at many different moments.
        let ready = &Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(move || {
                for number in 0..200 {
                    ready.wait();
                    thread::sleep(Duration::from_micros(number * 3));
                    wire.send(&frame(UPLINK_MAC, FAR_MAC, number as u32, 46));
                }
            });
            for _ in 0..200 {
                ready.wait();
                assert!(driver.sleep(Duration::from_secs(20)));
                let packet = receive(&mut driver, port, 1).pop().unwrap();
                driver.release(packet);
            }
        });
        assert!(start.elapsed() < Duration::from_secs(10), "a wakeup was lost");
    }
    assert_eq!(driver.fds().len(), 2);
    assert_accounted(&mut driver, 0);
}

#[test]
fn two_workers_own_a_queue_each() {
    if skipped() {
        return;
    }
    const FLOWS: u16 = 64;
    let mut lab = Lab::new(2);
    let workers = [lab.open(0, SMALL), lab.open(1, SMALL)];
    let (trunk, uplink) = (lab.trunk.wire(), lab.uplink.wire());
    let device = lab.uplink.index;
    let counts: Vec<usize> = thread::scope(|scope| {
        let workers = workers.map(|mut driver| {
            scope.spawn(move || {
                let mut packets = Vec::with_capacity(BURST);
                let mut forwarded = 0;
                let mut last = Instant::now();
                while last.elapsed() < Duration::from_millis(500) {
                    let received = driver.receive(TRUNK, &mut packets, BURST);
                    if received > 0 {
                        last = Instant::now();
                    }
                    packets.iter_mut().for_each(|packet| packet.device = device);
                    send(&mut driver, UPLINK, &mut packets);
                    forwarded += received;
                    driver.sleep(Duration::from_millis(20));
                }
                assert_accounted(&mut driver, 0);
                forwarded
            })
        });
        for round in 0..10 {
            for flow in 0..FLOWS {
                trunk.send(&udp(flow, round));
            }
            for _ in 0..FLOWS {
                uplink.receive().expect("every packet passes");
            }
        }
        workers.map(|worker| worker.join().unwrap()).to_vec()
    });
    assert_eq!(counts.iter().sum::<usize>(), 10 * usize::from(FLOWS));
    assert!(counts.iter().all(|count| *count > 0), "the kernel spread the flows over both queues: {counts:?}");
}

/// A UDP packet from the port 1000 + `flow`.
fn udp(flow: u16, round: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ethernet2(FAR_MAC.0, [2, 0, 0, 0, 0, 7])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(1000 + flow, 53)
        .write(&mut packet, &[round; 18])
        .unwrap();
    packet
}

#[test]
fn errors_say_what_is_wrong() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let settings = lab.settings(0, SMALL);
    let driver = lab.open(0, SMALL);

    let error = AfXdp::open(&settings).unwrap_err();
    assert!(matches!(&error, AfXdpError::QueueTaken { device, queue: 0, .. } if device == "trunkn"), "{error:?}");

    let mut no_queue = settings.clone();
    no_queue.trunk.queue = 3;
    let error = AfXdp::open(&no_queue).unwrap_err();
    assert!(matches!(&error, AfXdpError::NoSuchQueue { device, queue: 3, .. } if device == "trunkn"), "{error:?}");
    assert!(error.to_string().contains("ethtool -L trunkn"), "{error}");

    let mut gone = settings.clone();
    gone.trunk.device = "gone".into();
    let error = AfXdp::open(&gone).unwrap_err();
    assert!(matches!(&error, AfXdpError::NoSuchDevice { device, .. } if device == "gone"), "{error:?}");

    let mut renamed = settings.clone();
    renamed.trunk.index = IfIndex(settings.trunk.index.0 + 100);
    let error = AfXdp::open(&renamed).unwrap_err();
    assert!(matches!(error, AfXdpError::NoSuchDevice { .. }), "{error:?}");

    // A closed driver's queues can be had at once.
    drop(driver);
    for _ in 0..3 {
        drop(AfXdp::open(&settings).unwrap());
    }
}

#[test]
fn a_removed_device_is_a_fault_and_loses_no_frame() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    assert!(driver.fault().is_none());
    ip(&format!("link del {}", lab.uplink.near));
    let packet = driver.allocate().map(|mut packet| {
        packet.set_len(60);
        packet
    });
    send(&mut driver, UPLINK, &mut packet.into_iter().collect());
    let fault = driver.fault().expect("sending found it");
    assert!(matches!(&fault, AfXdpError::Failed { device, .. } if device == "uplinkn"), "{fault:?}");
    let mut packet = driver.allocate().unwrap();
    packet.set_len(60);
    let mut packets = vec![packet];
    driver.transmit(UPLINK, &mut packets);
    assert_eq!(packets.len(), 1, "nothing more is given to it");
    driver.release(packets.remove(0));
    // The other port works on.
    let wire = lab.trunk.wire();
    wire.send(&frame(TRUNK_MAC, FAR_MAC, 0, 46));
    assert!(driver.sleep(Duration::from_secs(5)));
    let packet = receive(&mut driver, TRUNK, 1).pop().unwrap();
    driver.release(packet);
    assert!(!driver.sleep(Duration::from_millis(10)), "a failed port does not end every sleep");
}

#[test]
fn a_removed_device_is_found_without_traffic() {
    if skipped() {
        return;
    }
    let mut lab = Lab::new(1);
    let mut driver = lab.open(0, SMALL);
    driver.check();
    assert!(driver.fault().is_none());
    ip(&format!("link del {}", lab.trunk.near));
    assert!(!driver.sleep(Duration::from_millis(10)), "pollers are not told");
    driver.check();
    assert!(matches!(driver.fault(), Some(AfXdpError::Failed { device, .. }) if device == "trunkn"));
}

#[test]
fn memory_and_modes_are_as_stated() {
    if skipped() {
        return;
    }
    let lab = Lab::new(1);
    let mut settings = lab.settings(0, RingSizes { rx: 512, tx: 128 });
    settings.trunk.sizes = RingSizes { rx: 1024, tx: 2048 };
    let driver = AfXdp::open(&settings).unwrap();
    let list_bytes = settings.frames() as usize * 16;
    assert_eq!(driver.mapped_bytes() + list_bytes, settings.memory_bytes());
    let counts = driver.frames();
    assert_eq!(counts.total, 2 * 1024 + 2048 + 2 * 512 + 128 + 128);
    assert_eq!((counts.receiving, counts.in_rings, counts.sending), (2048 + 1024, 2048 + 1024, 0));
    let modes: Vec<_> = driver.modes().unwrap().into_iter().map(|mode| (mode.device, mode.queue, mode.mode)).collect();
    assert_eq!(modes, [("trunkn".to_owned(), 0, "copy"), ("uplinkn".to_owned(), 0, "copy")]);
}

/// A device may have been made with more queues than it uses: a veth is, on a machine with several processors.
#[test]
fn receive_queues_are_those_in_use() {
    if skipped() {
        return;
    }
    let lab = Lab::new(3);
    assert_eq!(receive_queues(&lab.uplink.near).unwrap(), 3);
    // The far end first: a device with an XDP program must not have fewer than its peer sends by.
    for device in [&lab.uplink.far, &lab.uplink.near] {
        let fewer = Command::new("ethtool").args(["-L", device, "rx", "2", "tx", "2"]).output().unwrap();
        assert!(fewer.status.success(), "{fewer:?}");
    }
    assert_eq!(receive_queues(&lab.uplink.near).unwrap(), 2);
    // A device of a driver that has no queues to choose from.
    assert_eq!(receive_queues("lo").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(receive_queues("absent").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    for hostile in ["a-name-that-is-too-long", "nul\0"] {
        assert_eq!(receive_queues(hostile).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
