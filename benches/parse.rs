//! Cost per packet of reading and rewriting, over a set of packets that stays in cache.

use std::{hint::black_box, net::Ipv4Addr, net::Ipv6Addr};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use weir_packet::{
    Address, FlowKey, Ports,
    checksum::{Sum, crc32c},
    parse::{Parsed, View, l4_checksum_ok, parse},
    rewrite::{decrement_ttl, translate, write_ipip_header},
};

/// Packets of a burst.
const BURST: usize = 64;

fn frames(six: bool, tcp: bool) -> Vec<Vec<u8>> {
    (0..BURST as u16)
        .map(|flow| {
            let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
            let low = flow as u8 + 1;
            let ip = if six {
                let address = |last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).octets();
                ethernet.ipv6(address(u16::from(low)), address(0x1000), 64)
            } else {
                ethernet.ipv4([10, 244, 1, low], [10, 96, 0, 10], 64)
            };
            let mut frame = Vec::new();
            if tcp {
                ip.tcp(40000 + flow, 80, 1, 1000).ack(2).write(&mut frame, &[7; 64]).unwrap();
            } else {
                ip.udp(40000 + flow, 53).write(&mut frame, &[7; 64]).unwrap();
            }
            frame
        })
        .collect()
}

fn view_v4(frame: &[u8]) -> View<Ipv4Addr> {
    match parse(frame) {
        Ok(Parsed::V4(view)) => view,
        other => unreachable!("{other:?}"),
    }
}

fn view_v6(frame: &[u8]) -> View<Ipv6Addr> {
    match parse(frame) {
        Ok(Parsed::V6(view)) => view,
        other => unreachable!("{other:?}"),
    }
}

/// Translates to another destination and back by turns, so that the frame always fits its view.
fn bench_translate<A: Address>(
    criterion: &mut Criterion,
    name: &str,
    mut frames: Vec<Vec<u8>>,
    view_of: fn(&[u8]) -> View<A>,
    backend: A,
) {
    let mut group = criterion.benchmark_group("translate");
    group.throughput(Throughput::Elements(BURST as u64));
    let there: Vec<View<A>> = frames.iter().map(|frame| view_of(frame)).collect();
    let back: Vec<View<A>> = there
        .iter()
        .map(|view| View {
            key: FlowKey { dst: backend, ports: Ports::new(view.key.ports.source(), 8080), ..view.key },
            ..*view
        })
        .collect();
    let mut turn = false;
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            let (from, to) = if turn { (&back, &there) } else { (&there, &back) };
            turn = !turn;
            for ((frame, from), to) in frames.iter_mut().zip(from).zip(to) {
                translate(frame, from, &to.key).unwrap();
            }
            black_box(&frames);
        });
    });
    group.finish();
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(BURST as u64));
    for (name, six, tcp) in
        [("ipv4_udp", false, false), ("ipv4_tcp", false, true), ("ipv6_udp", true, false), ("ipv6_tcp", true, true)]
    {
        let frames = frames(six, tcp);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for frame in &frames {
                    let _ = black_box(parse(black_box(frame)));
                }
            });
        });
    }
    group.finish();

    bench_translate(criterion, "ipv4_udp", frames(false, false), view_v4, Ipv4Addr::new(10, 244, 2, 2));
    bench_translate(criterion, "ipv4_tcp", frames(false, true), view_v4, Ipv4Addr::new(10, 244, 2, 2));
    let backend = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2);
    bench_translate(criterion, "ipv6_udp", frames(true, false), view_v6, backend);

    let mut group = criterion.benchmark_group("header");
    group.throughput(Throughput::Elements(BURST as u64));
    let mut some = frames(false, false);
    let views: Vec<_> = some.iter().map(|frame| view_v4(frame)).collect();
    group.bench_function("decrement_ttl_ipv4", |bencher| {
        bencher.iter(|| {
            for (frame, view) in some.iter_mut().zip(&views) {
                frame[22] = 64;
                decrement_ttl(frame, view, 1);
            }
            black_box(&some);
        });
    });
    group.bench_function("write_ipip_header", |bencher| {
        let mut header = [0; 20];
        bencher.iter(|| {
            for frame in &some {
                write_ipip_header(&mut header, &frame[14..], [192, 168, 0, 1].into(), [192, 168, 0, 2].into(), 7);
                black_box(&header);
            }
        });
    });
    group.finish();

    let payload = [0x5a; 1460];
    let mut group = criterion.benchmark_group("sum_1460_bytes");
    group.throughput(Throughput::Bytes(1460));
    group.bench_function("internet", |bencher| bencher.iter(|| Sum::ZERO.bytes(black_box(&payload)).finish()));
    group.bench_function("crc32c", |bencher| bencher.iter(|| crc32c(&[black_box(&payload)])));
    let tcp = &frames(false, true)[0];
    let view = view_v4(tcp);
    group.bench_function("l4_checksum_ok_84_bytes", |bencher| bencher.iter(|| l4_checksum_ok(black_box(tcp), &view)));
    group.finish();
}

criterion_group!(parse_and_rewrite, benches);
criterion_main!(parse_and_rewrite);
