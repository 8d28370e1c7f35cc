//! Packets changed in place: addresses, ports, TTL, tunnel headers.
//!
//! Every function takes the frame, or the start of it that was parsed, and a [`View`] of it. Checksums are only ever changed by the difference
//! (RFC 1624), so a bad one stays bad. A view keeps saying what was parsed: after [`translate`] the caller knows the new
//! key, and offsets stay as they are.

use std::net::Ipv4Addr;

use crate::{
    Address, DropReason, FlowKey, Mac, Ports, Protocol,
    checksum::{Increment, Sum, sctp_increment},
    glance::TunnelEnds,
    parse::{ETHERNET_BYTES, Embedded, ICMP_HEADER_BYTES, Kind, UDP_LITE, View, l4_checksum_ok, parse_embedded},
};

/// Length of the header that [`write_ipip_header`] puts before a packet.
pub const IPIP_HEADER_BYTES: usize = 20;

/// TTL of the packets that weir itself makes, tunnel headers included.
pub const ORIGIN_TTL: u8 = 64;

/// Writes an Ethernet header.
///
/// # Panics
/// Where `frame` is shorter than one.
#[inline]
pub fn set_ethernet(frame: &mut [u8], dst: Mac, src: Mac, ethertype: u16) {
    frame[..6].copy_from_slice(&dst.0);
    frame[6..12].copy_from_slice(&src.0);
    frame[12..ETHERNET_BYTES].copy_from_slice(&ethertype.to_be_bytes());
}

/// Changes a packet's addresses and ports (an ICMP echo's identifier) from `view.key` to `to`, with all checksums.
///
/// The type that stands in an echo's key is not written, nor what stands for other ICMP messages' ports. Later fragments
/// have addresses only. A first fragment's layer-4 checksum, which covers the whole packet, comes out right for it.
///
/// # Errors
/// `FragmentChecksum`: the ports of a first fragment of SCTP would change, whose CRC depends on the whole packet's length. Nothing
/// was written.
///
/// # Panics
/// Where `frame` is shorter than the one that was parsed.
#[inline]
pub fn translate<A: Address>(frame: &mut [u8], view: &View<A>, to: &FlowKey<A>) -> Result<(), DropReason> {
    debug_assert_eq!(view.key.protocol, to.protocol);
    let from = &view.key;
    let l4_at = usize::from(view.l4);
    if from.protocol == Protocol::SCTP && from.ports != to.ports && matches!(view.kind, Kind::FirstFragment { .. }) {
        return Err(DropReason::FragmentChecksum);
    }
    let addresses = write_addresses(&mut frame[usize::from(view.l3)..l4_at], from, to);
    if !view.is_later_fragment() {
        let end = usize::from(view.end).min(frame.len());
        let _ = rewrite_l4(&mut frame[l4_at..end], usize::from(view.l4_bytes()), addresses, from, to);
    }
    Ok(())
}

/// Writes `to`'s addresses into an IP header that has `from`'s, and the header checksum that IPv4 has.
#[inline]
fn write_addresses<A: Address>(header: &mut [u8], from: &FlowKey<A>, to: &FlowKey<A>) -> Increment {
    let change = Increment::between(Sum::addresses(from.src, from.dst), Sum::addresses(to.src, to.dst));
    let at = A::HEADER_BYTES - 2 * A::BYTES;
    let (src, dst) = header[at..A::HEADER_BYTES].split_at_mut(A::BYTES);
    to.src.write(src);
    to.dst.write(dst);
    if A::WORDS == 1 {
        update(header, 10, change);
    }
    change
}

/// Applies a change to the checksum at offset `at`.
#[inline]
fn update(bytes: &mut [u8], at: usize, change: Increment) {
    let checksum = change.apply([bytes[at], bytes[at + 1]]);
    bytes[at..at + 2].copy_from_slice(&checksum);
}

/// Writes `to`'s ports (or identifier) into a layer-4 header, of which at least 8 bytes are there if its protocol has
/// such, and changes its checksum, if that is there, for them and for the addresses in the pseudo header.
///
/// `length_bytes`: of the whole layer-4 packet, of which `l4` may be the start; 0: not known. Returns what it changed,
/// checksum included, for a checksum over all of it.
#[inline]
fn rewrite_l4<A: Address>(
    l4: &mut [u8],
    length_bytes: usize,
    addresses: Increment,
    from: &FlowKey<A>,
    to: &FlowKey<A>,
) -> Increment {
    let checksum_at = match from.protocol {
        Protocol::TCP => 16,
        Protocol::UDP | UDP_LITE => 6,
        Protocol::SCTP => return rewrite_sctp(l4, length_bytes, from, to),
        Protocol::ICMP | Protocol::ICMPV6 => 2,
        _ => return Increment::ZERO,
    };
    let mut written = Increment::ZERO;
    if from.protocol.has_ports() {
        l4[..4].copy_from_slice(&to.ports.word().to_ne_bytes());
        written = written.word32(from.ports.word(), to.ports.word());
    } else if from.protocol.has_identifier(from.ports.destination()) {
        let identifier = to.ports.source().to_be_bytes();
        l4[4..6].copy_from_slice(&identifier);
        written = written.word16(from.ports.source().to_be_bytes(), identifier);
    }
    let covered = if from.protocol == Protocol::ICMP { written } else { written.plus(addresses) };
    let Some(field) = l4.get_mut(checksum_at..checksum_at + 2) else { return written };
    let old = [field[0], field[1]];
    let new = match from.protocol {
        Protocol::UDP | UDP_LITE => covered.apply_udp(old),
        _ => covered.apply(old),
    };
    field.copy_from_slice(&new);
    written.word16(old, new)
}

/// SCTP has no pseudo header: its CRC changes with the ports only.
#[cold]
fn rewrite_sctp<A: Address>(l4: &mut [u8], length_bytes: usize, from: &FlowKey<A>, to: &FlowKey<A>) -> Increment {
    let (old_ports, new_ports) = (from.ports.word(), to.ports.word());
    if old_ports == new_ports {
        return Increment::ZERO;
    }
    l4[..4].copy_from_slice(&new_ports.to_ne_bytes());
    let written = Increment::ZERO.word32(old_ports, new_ports);
    match l4.get_mut(8..12) {
        Some(field) if length_bytes >= 12 => {
            let old = [field[0], field[1], field[2], field[3]];
            let new = sctp_increment(old, old_ports, new_ports, length_bytes);
            field.copy_from_slice(&new);
            written.word32(u32::from_ne_bytes(old), u32::from_ne_bytes(new))
        }
        _ => written,
    }
}

/// Takes `hops` from the TTL or hop limit, which ends at 0. Whether it may still be forwarded (`view.ttl > hops`) is the caller's to
/// ask first.
///
/// # Panics
/// Where `frame` is shorter than the one that was parsed.
#[inline]
pub fn decrement_ttl<A: Address>(frame: &mut [u8], view: &View<A>, hops: u8) {
    let header = &mut frame[usize::from(view.l3)..usize::from(view.l3) + A::HEADER_BYTES];
    if A::WORDS == 1 {
        let (ttl, protocol) = (header[8], header[9]);
        header[8] = ttl.saturating_sub(hops);
        update(header, 10, Increment::ZERO.word16([ttl, protocol], [header[8], protocol]));
    } else {
        header[7] = header[7].saturating_sub(hops);
    }
}

/// Sends a whole TCP or UDP packet on whose header has no options: addresses and ports become `to`'s, the TTL less by `hops`, with all checksums.
///
/// The same bytes as [`translate`] and [`decrement_ttl`] write, for a packet that was only glanced at ([`crate::glance`]); its TTL is not
/// less than `hops`. `ip` begins with its IP header.
///
/// # Panics
/// Where `ip` is shorter than the IP header and 20 bytes.
#[inline(always)]
pub fn forward_plain<A: Address>(ip: &mut [u8], from: &FlowKey<A>, to: &FlowKey<A>, hops: u8) {
    debug_assert!(from.protocol == to.protocol && matches!(from.protocol, Protocol::TCP | Protocol::UDP));
    let (header, l4) = ip.split_at_mut(A::HEADER_BYTES);
    let l4 = l4.first_chunk_mut::<20>().expect("as many bytes as the largest fixed header has");
    let addresses = Increment::between(Sum::addresses(from.src, from.dst), Sum::addresses(to.src, to.dst));
    let at = A::HEADER_BYTES - 2 * A::BYTES;
    to.src.write(&mut header[at..at + A::BYTES]);
    to.dst.write(&mut header[at + A::BYTES..]);
    if A::WORDS == 1 {
        header[8] -= hops;
        // The TTL, in a word with the protocol.
        let [old, new] = [[hops, 0], [0, 0]].map(|word| Sum::ZERO.word16(word));
        update(header, 10, addresses.plus(Increment::between(old, new)));
    } else {
        header[7] -= hops;
    }
    l4[..4].copy_from_slice(&to.ports.word().to_ne_bytes());
    let covered = addresses.word32(from.ports.word(), to.ports.word());
    if from.protocol == Protocol::TCP {
        update(l4, 16, covered);
    } else {
        let checksum = covered.apply_udp([l4[6], l4[7]]);
        l4[6..8].copy_from_slice(&checksum);
    }
}

/// Writes the type of service or traffic class.
///
/// # Panics
/// Where `frame` is shorter than the one that was parsed.
pub fn apply_tos<A: Address>(frame: &mut [u8], view: &View<A>, tos: u8) {
    let header = &mut frame[usize::from(view.l3)..usize::from(view.l3) + A::HEADER_BYTES];
    let old = [header[0], header[1]];
    if A::WORDS == 1 {
        header[1] = tos;
        update(header, 10, Increment::ZERO.word16(old, [old[0], tos]));
    } else {
        header[0] = old[0] & 0xf0 | tos >> 4;
        header[1] = tos << 4 | old[1] & 0x0f;
    }
}

/// Changes an ICMP error on its way back through a translation: its own addresses, and addresses and ports of the packet
/// that it quotes, with all checksums that cover them (RFC 5508, 4.2).
///
/// `embedded` is what [`crate::parse::parse_embedded`] read from `view.quote(frame)`. A layer-4 checksum that was cut off
/// the quote is left out; the quoted IPv4 header's checksum stays as right as it was.
///
/// # Panics
/// Where `frame` or the quote is shorter than what was parsed.
pub fn translate_icmp_error<A: Address>(
    frame: &mut [u8],
    view: &View<A>,
    embedded: &Embedded<A>,
    outer_src: A,
    outer_dst: A,
    inner_to: &FlowKey<A>,
) {
    debug_assert_eq!(view.kind, Kind::IcmpError);
    debug_assert_eq!(embedded.key.protocol, inner_to.protocol);
    let l4_at = usize::from(view.l4);
    let outer_to = FlowKey { src: outer_src, dst: outer_dst, ..view.key };
    let outer = write_addresses(&mut frame[usize::from(view.l3)..l4_at], &view.key, &outer_to);

    let end = usize::from(view.end).min(frame.len());
    let message = &mut frame[l4_at..end];
    let quote = &mut message[ICMP_HEADER_BYTES..];
    let (quoted_header, quoted_l4) = quote.split_at_mut(usize::from(embedded.l4));
    let old_checksum = [quoted_header[10], quoted_header[11]];
    let addresses = write_addresses(quoted_header, &embedded.key, inner_to);
    let mut change = addresses;
    if A::WORDS == 1 {
        change = change.word16(old_checksum, [quoted_header[10], quoted_header[11]]);
    }
    let length = usize::from(embedded.l4_bytes);
    change = change.plus(rewrite_l4(quoted_l4, length, addresses, &embedded.key, inner_to));
    if A::WORDS != 1 {
        change = change.plus(outer);
    }
    update(message, 2, change);
}

/// Makes an ICMP error about a tunnel packet one about the packet inside it, as who put it into the tunnel must (RFC 2003, 4): a path
/// MTU is smaller by the tunnel's header, and what ends a tunnel packet's way leaves the inner destination unreachable.
///
/// `embedded` is what [`crate::parse::parse_embedded`] read from `view.quote(frame)`: an IPIP packet. The error keeps its source
/// and goes to the inner packet's; the view of the result, which is shorter. `None`, and nothing written, for what is not to be told, for a
/// quote that is too short to tell whom, and for a wrong ICMP checksum.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn error_about_inner(
    frame: &mut [u8],
    view: &View<Ipv4Addr>,
    embedded: &Embedded<Ipv4Addr>,
) -> Option<View<Ipv4Addr>> {
    const UNREACHABLE: u8 = 3;
    const HOST_UNREACHABLE: u8 = 1;
    const FRAGMENTATION_NEEDED: u8 = 4;
    const TIME_EXCEEDED: u8 = 11;
    /// The smallest MTU that IPv4 allows (RFC 791, 3.2).
    const SMALLEST_MTU: u16 = 68;
    debug_assert_eq!((view.kind, embedded.key.protocol), (Kind::IcmpError, Protocol::IPIP));
    let message = view.l4_slice(frame);
    let header: &[u8; ICMP_HEADER_BYTES] = message.first_chunk()?;
    let mtu = u16::from_be_bytes([header[6], header[7]]);
    let (code, rest) = match (header[0], header[1]) {
        // 0: from a router that is older than RFC 1191, for the sender to guess.
        (UNREACHABLE, FRAGMENTATION_NEEDED) if mtu == 0 => (FRAGMENTATION_NEEDED, 0),
        (UNREACHABLE, FRAGMENTATION_NEEDED) if mtu < SMALLEST_MTU + IPIP_HEADER_BYTES as u16 => return None,
        (UNREACHABLE, FRAGMENTATION_NEEDED) => (FRAGMENTATION_NEEDED, mtu - IPIP_HEADER_BYTES as u16),
        (UNREACHABLE, _) | (TIME_EXCEEDED, 0) => (HOST_UNREACHABLE, 0),
        _ => return None,
    };
    let tunnel_header = usize::from(embedded.l4);
    let inner = parse_embedded::<Ipv4Addr>(message.get(ICMP_HEADER_BYTES + tunnel_header..)?)?;
    if !l4_checksum_ok(frame, view) {
        return None;
    }
    let (l3, l4, end) = (usize::from(view.l3), usize::from(view.l4), usize::from(view.end) - tunnel_header);
    frame.copy_within(l4 + ICMP_HEADER_BYTES + tunnel_header..usize::from(view.end), l4 + ICMP_HEADER_BYTES);
    let message = &mut frame[l4..end];
    message[..4].copy_from_slice(&[UNREACHABLE, code, 0, 0]);
    message[4..8].copy_from_slice(&u32::from(rest).to_be_bytes());
    let checksum = Sum::ZERO.bytes(message).finish();
    message[2..4].copy_from_slice(&checksum);

    let header = &mut frame[l3..l4];
    let old_bytes = [header[2], header[3]];
    let new_bytes = ((end - l3) as u16).to_be_bytes();
    header[2..4].copy_from_slice(&new_bytes);
    update(header, 10, Increment::ZERO.word16(old_bytes, new_bytes));
    let ports = Ports::new(u16::from(code), u16::from(UNREACHABLE));
    let key = FlowKey { dst: inner.key.src, ports, ..view.key };
    let _ = write_addresses(header, &view.key, &key);
    Some(View { key, end: end as u16, ..*view })
}

/// Writes the outer header of an IPIP packet (RFC 2003): protocol 4, TTL 64, the inner DSCP, ECN by RFC 6040's normal
/// mode (the inner ECN field), DF set.
///
/// `header` are the 20 bytes directly before `inner`, which begins with its own IPv4 header; the lengths are taken from
/// that header, so `inner` may have padding after it.
///
/// # Panics
/// Where `header` or `inner` is shorter than 20 bytes.
#[inline]
pub fn write_ipip_header(header: &mut [u8], inner: &[u8], src: Ipv4Addr, dst: Ipv4Addr, id: u16) {
    let header = header.first_chunk_mut::<IPIP_HEADER_BYTES>().expect("20 bytes for the outer header");
    let inner = inner.first_chunk::<20>().expect("an inner IPv4 header");
    let total_bytes = u16::from_be_bytes([inner[2], inner[3]]).saturating_add(IPIP_HEADER_BYTES as u16);
    *header = ipv4_header(src, dst, Protocol::IPIP, total_bytes, inner[1], id);
}

/// The headers that a packet gets on its next link, ready to be written before its IP header: an Ethernet header, and for a tunnel what
/// follows it.
///
/// There is room for those of a VXLAN tunnel (RFC 7348: Ethernet, IPv4, UDP, VXLAN, Ethernet), the largest that there are. Those of IPIP are
/// in the first 48 bytes with all that is asked to write them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LinkHeaders {
    kind: LinkKind,
    count: u8,
    /// The sum of the outer IPv4 header without its length, type of service and identification.
    sum: u16,
    bytes: [u8; LinkHeaders::MAX_BYTES],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum LinkKind {
    Ethernet,
    Ipip,
}

impl LinkHeaders {
    /// Bytes of the largest.
    pub const MAX_BYTES: usize = 14 + 20 + 8 + 8 + 14;

    /// An Ethernet header before the packet itself.
    pub fn ethernet(dst: Mac, src: Mac, ethertype: u16) -> Self {
        let mut bytes = [0; Self::MAX_BYTES];
        set_ethernet(&mut bytes, dst, src, ethertype);
        Self { kind: LinkKind::Ethernet, count: ETHERNET_BYTES as u8, sum: 0, bytes }
    }

    /// A tunnel's header (RFC 2003), as [`write_ipip_header`] writes it.
    pub fn ipip(dst: Mac, src: Mac, ends: TunnelEnds) -> Self {
        let mut headers = Self::ethernet(dst, src, Ipv4Addr::ETHERTYPE);
        let mut outer = ipv4_header(ends.src, ends.dst, Protocol::IPIP, 0, 0, 0);
        outer[10..12].fill(0);
        headers.bytes[ETHERNET_BYTES..ETHERNET_BYTES + 20].copy_from_slice(&outer);
        let count = (ETHERNET_BYTES + IPIP_HEADER_BYTES) as u8;
        Self { kind: LinkKind::Ipip, count, sum: Sum::ZERO.bytes(&outer).fold(), ..headers }
    }

    /// Number of bytes.
    #[inline(always)]
    pub const fn count(&self) -> u16 {
        self.count as u16
    }

    /// The addresses of a tunnel's header; `None` where there is no tunnel.
    #[inline(always)]
    pub fn ends(&self) -> Option<TunnelEnds> {
        let ends = TunnelEnds { src: Ipv4Addr::read(&self.bytes[26..30]), dst: Ipv4Addr::read(&self.bytes[30..34]) };
        (self.kind == LinkKind::Ipip).then_some(ends)
    }

    /// Writes them to the start of `frame`, before an IP packet of `ip_bytes` bytes, no more than fit a tunnel packet, with that type of
    /// service. `id` tells tunnel packets apart (RFC 6864).
    ///
    /// # Panics
    /// Where `frame` has no room for them.
    #[inline(always)]
    pub fn write(&self, frame: &mut [u8], ip_bytes: u16, tos: u8, id: impl FnOnce() -> u16) {
        match self.kind {
            LinkKind::Ethernet => {
                let frame = frame.first_chunk_mut::<ETHERNET_BYTES>().expect("room for an Ethernet header");
                frame.copy_from_slice(&self.bytes[..ETHERNET_BYTES]);
            }
            LinkKind::Ipip => {
                const BYTES: usize = ETHERNET_BYTES + IPIP_HEADER_BYTES;
                let frame = frame.first_chunk_mut::<BYTES>().expect("room for a tunnel's headers");
                let total_bytes = (ip_bytes + IPIP_HEADER_BYTES as u16).to_be_bytes();
                let id = id().to_be_bytes();
                let sum = Sum::ZERO.word16(self.sum.to_ne_bytes()).word16([0, tos]).word16(total_bytes).word16(id);
                frame.copy_from_slice(&self.bytes[..BYTES]);
                frame[15] = tos;
                frame[16..18].copy_from_slice(&total_bytes);
                frame[18..20].copy_from_slice(&id);
                frame[24..26].copy_from_slice(&sum.finish());
            }
        }
    }
}

const _: () = assert!(size_of::<LinkHeaders>() == 68);

/// An IPv4 header without options, with DF and TTL 64.
#[inline]
pub(crate) fn ipv4_header(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: Protocol,
    total_bytes: u16,
    tos: u8,
    id: u16,
) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[1] = tos;
    header[2..4].copy_from_slice(&total_bytes.to_be_bytes());
    header[4..6].copy_from_slice(&id.to_be_bytes());
    header[6] = 0x40;
    header[8] = ORIGIN_TTL;
    header[9] = protocol.0;
    src.write(&mut header[12..16]);
    dst.write(&mut header[16..20]);
    let checksum = Sum::ZERO.bytes(&header).finish();
    header[10..12].copy_from_slice(&checksum);
    header
}

/// The inner type of service after decapsulation (RFC 6040, 4.2, figure 4): the inner DSCP, and the ECN field that both
/// headers say. `None`: the packet met congestion and its transport could not be told, so it is dropped.
#[inline]
pub const fn decapsulated_tos(outer_tos: u8, inner_tos: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0b00;
    const ECT_1: u8 = 0b01;
    const ECT_0: u8 = 0b10;
    const CE: u8 = 0b11;
    let ecn = match (inner_tos & 0b11, outer_tos & 0b11) {
        (NOT_ECT, CE) => return None,
        (NOT_ECT, _) => NOT_ECT,
        (CE, _) | (_, CE) => CE,
        (ECT_0, ECT_1) => ECT_1,
        (inner, _) => inner,
    };
    Some(inner_tos & !0b11 | ecn)
}
