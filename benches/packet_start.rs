//! What a tunnel header in front of a packet costs: sent from an address of its own (`Packet::grow_front`), or after a shift of the
//! packet within its frame, as descriptors with a fixed start would need. "warm" uses the same 64 frames over and over, "cold" 16 MiB of
//! them, more than a core's own caches hold. In copy mode the kernel reads the whole packet right afterwards, so that the warm figure is the
//! nearer one. Unsafe is used for the arena over a heap block only.

use std::{hint::black_box, ptr::NonNull};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use weir_dataplane::frame::{Arena, FRAME_BYTES, HEADROOM_BYTES, IfIndex, LinkType, Packet, Segment};

const BURST: usize = 64;
const ETHERNET_BYTES: usize = 14;
const TUNNEL_BYTES: usize = 20;

fn own_address(packet: &mut Packet, header: &[u8; TUNNEL_BYTES]) {
    assert!(packet.grow_front(TUNNEL_BYTES as u16));
    let bytes = packet.bytes_mut();
    bytes.copy_within(TUNNEL_BYTES..TUNNEL_BYTES + ETHERNET_BYTES, 0);
    bytes[ETHERNET_BYTES..ETHERNET_BYTES + TUNNEL_BYTES].copy_from_slice(header);
}

fn shifted(packet: &mut Packet, header: &[u8; TUNNEL_BYTES]) {
    let len = packet.bytes().len();
    packet.set_len(len + TUNNEL_BYTES);
    let bytes = packet.bytes_mut();
    bytes.copy_within(ETHERNET_BYTES..len, ETHERNET_BYTES + TUNNEL_BYTES);
    bytes[ETHERNET_BYTES..ETHERNET_BYTES + TUNNEL_BYTES].copy_from_slice(header);
}

fn bench(criterion: &mut Criterion) {
    for (temperature, frames) in [("warm", BURST), ("cold", 8192)] {
        let mut memory = vec![0u8; frames * FRAME_BYTES];
        // SAFETY: the block outlives arena and packets, and is used through them only.
        let mut arena = unsafe { Arena::over(NonNull::new(memory.as_mut_ptr()).unwrap(), frames as u32) };
        let mut group = criterion.benchmark_group(format!("packet_start/{temperature}"));
        group.throughput(Throughput::Elements(BURST as u64));
        for len in [64, 512, 1480] {
            let mut packets: Vec<Packet> = (0..frames)
                .map(|number| {
                    // SAFETY: each frame is taken once, and was given back after the length before.
                    let frame = unsafe { arena.take((number * FRAME_BYTES) as u64) };
                    let segment = Segment { frame, start: HEADROOM_BYTES as u16, len };
                    Packet::new(segment, IfIndex::HOST, LinkType::Host)
                })
                .collect();
            let header = black_box([0x45; TUNNEL_BYTES]);
            let mut bursts = (0..frames / BURST).map(|burst| burst * BURST).cycle();
            group.bench_function(BenchmarkId::new("own_address", len), |bencher| {
                bencher.iter(|| {
                    let first = bursts.next().unwrap();
                    for packet in &mut packets[first..first + BURST] {
                        own_address(packet, &header);
                        packet.shrink_front(TUNNEL_BYTES as u16);
                    }
                })
            });
            group.bench_function(BenchmarkId::new("shifted", len), |bencher| {
                bencher.iter(|| {
                    let first = bursts.next().unwrap();
                    for packet in &mut packets[first..first + BURST] {
                        shifted(packet, &header);
                        packet.set_len(usize::from(len));
                    }
                })
            });
            for packet in packets {
                arena.give_back(arena.split(packet).0.frame);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
