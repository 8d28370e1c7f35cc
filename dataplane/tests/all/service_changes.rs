//! What becomes of flows when their service changes, at their next packet and not by any event: the whole pipeline over the memory
//! driver.

use crate::router;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use crate::packets::{Packet, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, rules, service, sum};
use weir_dataplane::{forwarding::Forwarding, frame::IfIndex, snapshot::Rules};
use weir_nat::{HostAddresses, ServicePort, ServiceTable, SnatPorts};
use weir_packet::{DropReason, FlowKey, Ports, Protocol};
use weir_policy::Classifier;

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const REMOTE: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

fn router(services: Vec<ServicePort>) -> Router {
    Router::new(rules(services, true), SnatPorts::new(10000..=20000, []).unwrap(), 1024)
}

/// The service with these backends, each of both families.
fn with_backends(protocol: Protocol, vip: [&str; 2], backends: &[[&str; 2]]) -> Vec<ServicePort> {
    let mut service = service("default/dns", protocol, vip, SERVER, None);
    let like = service.endpoints.remove(0);
    service.endpoints =
        backends.iter().flatten().map(|a| weir_nat::Endpoint { address: ip(a), ..like.clone() }).collect();
    vec![service]
}

fn word(packet: &Packet, at: usize) -> u16 {
    u16::from_be_bytes([packet.l4[at], packet.l4[at + 1]])
}

fn udp(from: IpAddr, to: IpAddr) -> Packet {
    let l4 = [&5000_u16.to_be_bytes()[..], &53_u16.to_be_bytes(), &[0, 12, 0, 0, 1, 2, 3, 4]].concat();
    Packet { src: from, dst: to, protocol: UDP, ttl: 64, tos: 0, options: 0, l4 }
}

fn tcp(flags: u8, from: (IpAddr, u16), to: (IpAddr, u16), sequence: u32, acknowledged: u32) -> Packet {
    let mut l4 = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    l4.extend(sequence.to_be_bytes());
    l4.extend(acknowledged.to_be_bytes());
    l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    Packet { src: from.0, dst: to.0, protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }
}

/// All that leaves for one packet: by which device, and what.
fn through(router: &mut Router, device: IfIndex, packet: &Packet) -> Vec<(IfIndex, Packet)> {
    let sent = router.one(device, &packet.frame());
    received(&sent).into_iter().map(|((device, _), bytes)| (device, read(bytes))).collect()
}

/// Reads a packet and asserts that its checksums are right, also where weir made it and gave it an identification of its own.
fn read(bytes: &[u8]) -> Packet {
    let mut bytes = bytes.to_vec();
    if bytes[0] >> 4 == 4 {
        assert_eq!(sum(&bytes[..20]), 0xffff, "the header's checksum");
        bytes[4..6].copy_from_slice(&[0x12, 0x34]);
        bytes[10..12].fill(0);
        let checksum = !sum(&bytes[..20]);
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    Packet::read(&bytes)
}

/// Where the flow's next packet goes: device, address and port.
#[track_caller]
fn goes(router: &mut Router, packet: &Packet) -> (IfIndex, IpAddr, u16) {
    let sent = through(router, CLIENT_POD, packet);
    assert_eq!(sent.len(), 1, "{sent:?}");
    (sent[0].0, sent[0].1.dst, word(&sent[0].1, 2))
}

#[test]
fn a_udp_flow_follows_its_service_at_its_next_packet() {
    for family in 0..2 {
        let address = |of: [&str; 2]| ip(of[family]);
        let dns = |backends: &[[&str; 2]]| rules(with_backends(Protocol::UDP, VIP, backends), true);
        let mut router = router(with_backends(Protocol::UDP, VIP, &[SERVER]));
        let question = udp(address(CLIENT), address(VIP));
        let to_server = (SERVER_POD, address(SERVER), 5353);
        let to_remote = (UPLINK, address(REMOTE), 5353);
        assert_eq!(goes(&mut router, &question), to_server);

        // Another backend more changes nothing; the flow's own gone, it goes to the one that is left, and answers come back.
        router.publish(dns(&[SERVER, REMOTE]));
        assert_eq!(goes(&mut router, &question), to_server);
        router.publish(dns(&[REMOTE]));
        assert_eq!(goes(&mut router, &question), to_remote);
        assert_eq!(goes(&mut router, &question), to_remote);

        // Not ready any more is as good as gone for UDP, and so is terminating where nobody has answered.
        for (ready, serving, terminating, expected) in
            [(true, true, false, to_remote), (false, true, true, to_server), (false, false, true, to_server)]
        {
            let mut services = with_backends(Protocol::UDP, VIP, &[SERVER, REMOTE]);
            for endpoint in services[0].endpoints.iter_mut().filter(|endpoint| endpoint.address == address(REMOTE)) {
                (endpoint.ready, endpoint.serving, endpoint.terminating) = (ready, serving, terminating);
            }
            router.publish(rules(services, true));
            assert_eq!(goes(&mut router, &question), expected, "{ready} {serving} {terminating}");
        }
        assert_eq!(router.drops(), BTreeMap::new());

        // Emptied: told by ICMP, each time; deleted: an address of the service range that nobody has; back again.
        router.publish(dns(&[]));
        for n in 1..=2 {
            let told = through(&mut router, CLIENT_POD, &question);
            let expected = [(1, 3, 3), (58, 1, 4)][family];
            assert_eq!(told.len(), 1, "{told:?}");
            let (device, told) = &told[0];
            assert_eq!((*device, told.src, told.dst), (CLIENT_POD, address(NODE), address(CLIENT)));
            assert_eq!((told.protocol, told.l4[0], told.l4[1]), expected);
            assert_eq!(router.drops()[&DropReason::NoBackend], n);
        }
        router.publish(rules(Vec::new(), true));
        assert_eq!(through(&mut router, CLIENT_POD, &question), []);
        assert_eq!(router.drops()[&DropReason::UnallocatedServiceIp], 1);
        router.publish(dns(&[REMOTE]));
        assert_eq!(goes(&mut router, &question), to_remote);
        router.finish();
    }
}

#[test]
fn a_udp_flow_that_began_before_its_service_is_taken_over_by_it() {
    for family in 0..2 {
        let address = |of: [&str; 2]| ip(of[family]);
        let mut router = router(Vec::new());
        let question = udp(address(CLIENT), address(OUTSIDE));
        assert_eq!(goes(&mut router, &question), (UPLINK, address(OUTSIDE), 53));
        router.publish(rules(with_backends(Protocol::UDP, OUTSIDE, &[SERVER]), true));
        assert_eq!(goes(&mut router, &question), (SERVER_POD, address(SERVER), 5353));
        // And the other way round.
        router.publish(rules(Vec::new(), true));
        assert_eq!(goes(&mut router, &question), (UPLINK, address(OUTSIDE), 53));
        assert_eq!(router.finish().dropped(), 0);
    }
}

#[test]
fn a_tcp_connection_keeps_its_backend_until_that_is_gone_and_is_reset_then() {
    for family in 0..2 {
        for from_client in [true, false] {
            let address = |of: [&str; 2]| ip(of[family]);
            let (client, vip, server) = ((address(CLIENT), 5000), (address(VIP), 53), (address(SERVER), 5353));
            let mut router = router(with_backends(Protocol::TCP, VIP, &[SERVER]));
            let opening = through(&mut router, CLIENT_POD, &tcp(SYN, client, vip, 100, 0));
            assert_eq!((opening[0].0, opening[0].1.dst), (SERVER_POD, server.0));
            assert_eq!(through(&mut router, SERVER_POD, &tcp(SYN | ACK, server, client, 900, 101)).len(), 1);
            let data = tcp(ACK, client, vip, 101, 901);
            assert_eq!(goes(&mut router, &data), (SERVER_POD, server.0, server.1));

            // Others come and go, and the connection's own backend is not used for new ones any more: it stays.
            let mut services = with_backends(Protocol::TCP, VIP, &[REMOTE, SERVER]);
            for (ready, serving, terminating) in [(true, true, false), (false, true, true), (false, false, false)] {
                for endpoint in services[0].endpoints.iter_mut().filter(|endpoint| endpoint.address == server.0) {
                    (endpoint.ready, endpoint.serving, endpoint.terminating) = (ready, serving, terminating);
                }
                router.publish(rules(services.clone(), true));
                assert_eq!(
                    goes(&mut router, &data),
                    (SERVER_POD, server.0, server.1),
                    "{ready} {serving} {terminating}"
                );
                let answer = through(&mut router, SERVER_POD, &tcp(ACK, server, client, 901, 101));
                assert_eq!((answer.len(), answer[0].0, answer[0].1.src), (1, CLIENT_POD, vip.0));
            }
            assert_eq!(router.drops(), BTreeMap::new());

            // Gone: who sends next is told by a RST that it accepts, in the name of whom it speaks to; and where that is the backend, so is
            // the client.
            router.publish(rules(with_backends(Protocol::TCP, VIP, &[REMOTE]), true));
            let answer = tcp(ACK, server, client, 901, 101);
            let (device, next) = if from_client { (CLIENT_POD, data) } else { (SERVER_POD, answer) };
            let told = through(&mut router, device, &next).into_iter().map(|(by, reset)| {
                assert_eq!(reset.l4[13] & RST, RST);
                (by, [(reset.src, word(&reset, 0)), (reset.dst, word(&reset, 2))], reset.l4[4..8].to_vec())
            });
            let client_is_told = (CLIENT_POD, [vip, client], 901_u32.to_be_bytes().to_vec());
            let backend_is_told = (SERVER_POD, [client, server], 101_u32.to_be_bytes().to_vec());
            let expected = if from_client { vec![client_is_told] } else { vec![client_is_told, backend_is_told] };
            assert_eq!(told.collect::<Vec<_>>(), expected, "their sequence numbers are what the other expects");
            assert_eq!(router.drops(), BTreeMap::from([(DropReason::BackendGone, 1)]));
            // A new connection goes to the one that is left.
            let again = goes(&mut router, &tcp(SYN, (client.0, 5001), vip, 100, 0));
            assert_eq!(again, (UPLINK, address(REMOTE), 5353));
            router.finish();
        }
    }
}

/// Who takes a service away takes its slices along, and no pod: what both ends know goes on until the pod goes too.
#[test]
fn a_tcp_connection_outlives_its_service_and_not_its_pod() {
    for family in 0..2 {
        let address = |of: [&str; 2]| ip(of[family]);
        let (client, vip, server) = ((address(CLIENT), 5000), (address(VIP), 53), (address(SERVER), 5353));
        let mut router = router(with_backends(Protocol::TCP, VIP, &[SERVER]));
        assert_eq!(through(&mut router, CLIENT_POD, &tcp(SYN, client, vip, 100, 0)).len(), 1);
        assert_eq!(through(&mut router, SERVER_POD, &tcp(SYN | ACK, server, client, 900, 101)).len(), 1);
        let data = tcp(ACK, client, vip, 101, 901);
        for services in [Vec::new(), with_backends(Protocol::UDP, VIP, &[REMOTE]), Vec::new()] {
            router.publish(rules(services, true));
            assert_eq!(goes(&mut router, &data), (SERVER_POD, server.0, server.1));
            let answer = through(&mut router, SERVER_POD, &tcp(ACK, server, client, 901, 101));
            assert_eq!((answer.len(), answer[0].0, answer[0].1.src), (1, CLIENT_POD, vip.0));
        }
        assert_eq!(router.drops(), BTreeMap::new());
        // Nothing opens there any more.
        assert_eq!(through(&mut router, CLIENT_POD, &tcp(SYN, (client.0, 5001), vip, 100, 0)).len(), 0);
        let mut links = router::links();
        links.devices.retain(|device| device.index != SERVER_POD);
        links.complete = true;
        let forwarding = Arc::new(Forwarding::compile(&router::cluster(), &links).unwrap());
        let next = router.next(rules(Vec::new(), true), forwarding);
        router.published.publish(next);
        let told = through(&mut router, CLIENT_POD, &data);
        assert_eq!((told.len(), told[0].0, told[0].1.src, told[0].1.l4[13] & RST), (1, CLIENT_POD, vip.0, RST));
        router.finish();
    }
}

/// A frontend appears on a port of the node that one of the node's own sockets has: a host port, or a node port.
#[test]
fn what_opens_nothing_at_an_own_address_is_the_kernels() {
    const FIN: u8 = 0x01;
    for (family, is_host_port) in [(0, false), (0, true), (1, false), (1, true)] {
        let address = |of: [&str; 2]| ip(of[family]);
        let mut service = with_backends(Protocol::TCP, VIP, &[SERVER]).remove(0);
        if is_host_port {
            (service.port, service.cluster_ips) = (45_678, Vec::new());
            service.host_port = Some(HostAddresses::All);
        } else {
            service.node_port = Some(45_678);
        }
        let (node, api, pod) = ((address(NODE), 45_678), (address(OUTSIDE), 6443), (address(CLIENT), 6443));
        let mut router = router(vec![service]);
        for flags in [ACK, SYN | ACK, FIN | ACK, RST | ACK, RST] {
            // From outside, and from the node's own kernel, which gets it back.
            for (device, from) in [(UPLINK, api), (IfIndex::HOST, node)] {
                let segment = tcp(flags, from, node, 7, 9);
                let sent = through(&mut router, device, &segment);
                let punted: Vec<_> = sent.iter().map(|(by, packet)| (*by, &packet.l4)).collect();
                assert_eq!(
                    punted,
                    [(IfIndex::HOST, &Packet::read(&segment.frame()[14..]).l4)],
                    "{flags} from {from:?}"
                );
            }
            let before = router.totals().dropped();
            assert_eq!(
                through(&mut router, CLIENT_POD, &tcp(flags, pod, node, 7, 9)),
                [],
                "{flags}: a pod's is judged"
            );
            assert_eq!(router.totals().dropped(), before + 1);
        }
        assert_eq!(router.drops(), BTreeMap::from([(DropReason::Invalid, 5)]));
        assert_eq!(router.totals().opened, 0);
        // A new connection is the service's; and what is in the middle of nothing at the cluster IP is nobody's.
        let opened = through(&mut router, UPLINK, &tcp(SYN, api, node, 7, 0));
        assert_eq!((opened[0].0, opened[0].1.dst), (SERVER_POD, address(SERVER)));
        if !is_host_port {
            assert_eq!(through(&mut router, UPLINK, &tcp(ACK, api, (address(VIP), 53), 7, 9)), []);
        }
        router.finish();
    }
}

/// A backend whose own address and port are the frontend's, as a host-network pod's behind an external IP of its node.
#[test]
fn a_flow_to_a_backend_that_is_the_frontend_stays_there() {
    for family in 0..2 {
        let address = |of: [&str; 2]| ip(of[family]);
        let both = || {
            let mut service = with_backends(Protocol::UDP, VIP, &[OUTSIDE, SERVER]).remove(0);
            service.external_ips = OUTSIDE.map(ip).into();
            service.endpoints.iter_mut().for_each(|endpoint| endpoint.port = 53);
            vec![service]
        };
        let mut router = router(both());
        let mut at_itself = 0;
        for port in 5000..5020_u16 {
            let mut question = udp(address(CLIENT), address(OUTSIDE));
            question.l4[..2].copy_from_slice(&port.to_be_bytes());
            let first = goes(&mut router, &question);
            at_itself += u32::from(first == (UPLINK, address(OUTSIDE), 53));
            for _ in 0..5 {
                router.publish(rules(both(), true));
                assert_eq!(goes(&mut router, &question), first, "port {port}");
            }
        }
        assert!(at_itself > 3, "some of them");
        assert_eq!(router.finish().opened, 20);
    }
}

/// A process before this one has judged the flow, and its pod's object does not come: what policy it has nobody knows.
#[test]
fn a_flow_from_before_a_restart_waits_for_its_pods_policy() {
    fn taken_over<A: weir_dataplane::tables::Family>(router: &mut Router, src: IpAddr, dst: IpAddr) {
        let [src, dst] = [src, dst].map(|address| A::from_ip(address).expect("of the family"));
        let key = FlowKey { src, dst, ports: Ports::new(5000, 53), protocol: Protocol::UDP };
        let found = router.connection(&key, |conn, _| {
            let [.., backend] = conn.stamps();
            conn.set_stamps([0, 0, backend]);
            conn.set_generation(0);
        });
        assert_eq!(found, Some(()));
    }
    for family in 0..2 {
        let mut router = router(Vec::new());
        let question = udp(ip(OUTSIDE[family]), ip(SERVER[family]));
        assert_eq!(through(&mut router, UPLINK, &question)[0].0, SERVER_POD);
        let services = ServiceTable::compile(&weir_nat::Model::default()).unwrap();
        let policy = Classifier::compile(&weir_policy::model::Model::default()).unwrap();
        router.publish(Rules::new(services, policy, &router::cluster()));
        match family {
            0 => taken_over::<Ipv4Addr>(&mut router, ip(OUTSIDE[0]), ip(SERVER[0])),
            _ => taken_over::<Ipv6Addr>(&mut router, ip(OUTSIDE[1]), ip(SERVER[1])),
        }
        assert_eq!(through(&mut router, UPLINK, &question), []);
        assert_eq!(router.drops(), BTreeMap::from([(DropReason::PolicyNotReady, 1)]));
        router.finish();
    }
}
