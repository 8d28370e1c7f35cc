/* SPDX-License-Identifier: Apache-2.0 */
/* Established flows in the kernel: what a worker has decided, and a program may repeat.
 *
 * A flow is found by its key and the device that its packet came by, so that a key is also the check of the source. What
 * is found is a way: one direction of a flow. The program carries the packet only if
 *   - the flow is the one that the key was made for, and has not been taken back (its state);
 *   - nothing has been published since that might change the verdict on it (its epoch);
 *   - the packet is plain: whole, without IP options, not at the end of its life, small enough for where it goes; of
 *     TCP, an acknowledgment of an established connection that lies inside both windows.
 * All others go to a worker, as if there were no such flow. src/offload/mod.rs tells why this is enough; there and in
 * src/offload/flow.rs is the same layout. */
#pragma once

#include "weir.h"

#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

static long (*const skb_pull_data)(struct __sk_buff *packet, __u32 len) = (void *)BPF_FUNC_skb_pull_data;
static long (*const adjust_room)(struct __sk_buff *packet, __s32 difference, __u32 mode,
				 __u64 flags) = (void *)BPF_FUNC_skb_adjust_room;
static __s64 (*const csum_update)(struct __sk_buff *packet, __wsum difference) = (void *)BPF_FUNC_csum_update;
static long (*const l4_csum_replace)(struct __sk_buff *packet, __u32 offset, __u64 from, __u64 to,
				     __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;

/* How a way's packets leave. */
enum exit { EXIT_CLOSED, EXIT_PEER, EXIT_DEVICE, EXIT_HOST };

/* One direction of a flow. 96 bytes. */
struct way {
	/* Of IP packets as they came, each segment one. */
	__u64 packets;
	__u64 bytes;
	/* Where they go. */
	__u32 device;
	__u8 destination[ETH_ALEN];
	__u8 source[ETH_ALEN];
	/* Bytes of the largest IP packet that fits. */
	__u16 mtu;
	__u8 exit;
	/* Whether addresses or ports change: to these, in network order. */
	__u8 translates;
	__be16 ports[2];
	/* By how much the one's complement sum of the addresses, and of the ports, grows. */
	__u32 address_difference;
	__u32 port_difference;
	/* The outer source of packets that come in an IPIP tunnel, and the outer addresses of those that leave in one; 0:
	 * none. In network order. */
	__u32 comes_from;
	__u32 tunnel[2];
	__u32 addresses[2][4];
};

/* What a side of a TCP connection has sent and offered: conntrack/src/tcp.rs. */
struct side {
	__u32 end;
	__u32 max_end;
	__u32 max_win;
	__u32 max_ack;
};

/* A flow. 256 bytes: a line for what both directions share, three for the ways. */
struct flow {
	/* The name's serial, and a phase in the two lowest bits. */
	__u32 state;
	/* The last publication that does not change the verdict on the flow. */
	__u32 epoch;
	__u8 scales[2];
	/* Whether windows are looked at: not of UDP. */
	__u8 has_windows;
	/* Whether what is outside of them passes: a connection that was picked up in the middle. */
	__u8 is_liberal;
	__u32 zero[5];
	struct side sides[2];
	struct way ways[2];
};

#define PHASE_LIVE 1

struct flow_key_v4 {
	__u32 addresses[2];
	__be16 ports[2];
	__u32 device;
	__u32 protocol;
};

struct flow_key_v6 {
	__u32 addresses[2][4];
	__be16 ports[2];
	__u32 device;
	__u32 protocol;
};

/* Where a key leads: the flow's slot and, in the lowest bit, the way; and which use of the slot it means. */
struct flow_name {
	__u32 way;
	__u32 serial;
};

/* The loader changes how many entries these have. */
struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	TYPE(key, __u32);
	TYPE(value, struct flow);
	NUMBER(max_entries, 1);
	NUMBER(map_flags, BPF_F_MMAPABLE);
	PIN_BY_NAME;
} offload_flows SECTION(".maps");

/* Slot 0: the number of the publication in force. */
struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	TYPE(key, __u32);
	TYPE(value, __u64);
	NUMBER(max_entries, 1);
	NUMBER(map_flags, BPF_F_MMAPABLE);
	PIN_BY_NAME;
} offload_epoch SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, struct flow_key_v4);
	TYPE(value, struct flow_name);
	NUMBER(max_entries, 1);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} offload_v4 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, struct flow_key_v6);
	TYPE(value, struct flow_name);
	NUMBER(max_entries, 1);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} offload_v6 SECTION(".maps");

/* Whether the programs look for flows at all; the loader fills it in. */
volatile const __u32 offload_is_on;

#define IPV4_UNUSUAL 0xbfff /* the reserved bit, more fragments, or an offset */
/* Acknowledgments a router is to let pass may be so late (MAXACKWINDOW: conntrack/src/tcp.rs). */
#define MIN_ACK_WINDOW 66000
/* Of the TCP header's fourth word, in network order: FIN, SYN, RST, ACK, URG. */
#define TCP_PLAIN_MASK 0x37
#define TCP_PLAIN 0x10

#define IPV4_DONT_FRAGMENT 0x4000
#define ORIGIN_TTL 64

#define LOAD(place) (*(volatile __typeof__(place) *)&(place))
#define STORE(place, value) (*(volatile __typeof__(place) *)&(place) = (value))

INLINE int is_before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}

/* What a packet is, as far as a flow asks. */
struct plain {
	/* Bytes of the IP packet, and of all its headers. */
	__u32 bytes;
	__u32 headers;
	/* Where in the header of layer 4 its checksum is; 0: it has none. */
	__u32 checksum;
	__u32 protocol;
	__u32 seq;
	__u32 length;
	__u32 ack;
	__u32 window;
};

/* The four tests of conntrack/src/tcp.rs, of a segment that is no more than data and acknowledgment; inside, it moves
 * the windows. Only `end` must not be lost by two processors at once.
 *
 * Of several segments in one packet, all of which have `size` bytes of data but the last, each must be inside: the first
 * is the oldest, and the last begins farthest ahead. */
INLINE int fits_windows(struct flow *flow, __u32 way, const struct plain *plain, __u32 size, __u32 segments)
{
	struct side *sender = &flow->sides[way & 1], *receiver = &flow->sides[~way & 1];
	__u32 sent = LOAD(sender->end), may_send = LOAD(sender->max_end), offered = LOAD(sender->max_win);
	__u32 answered = LOAD(receiver->end), receives = LOAD(receiver->max_win);
	__u32 end = plain->seq + plain->length, ack = plain->ack, window = plain->window, edge;
	__u32 late = offered > MIN_ACK_WINDOW ? offered : MIN_ACK_WINDOW;
	int is_beyond = is_before(may_send, plain->seq + (segments - 1) * size);
	int is_amiss = is_before(answered, ack) || is_before(plain->seq + size, sent - receives) ||
		       is_before(ack, answered - late);

	window <<= flow->scales[way & 1] & 15;
	if (is_beyond || is_amiss) {
		if (!flow->is_liberal || segments > 1)
			return 0;
		/* Beyond by less than a window: it counts as sent. */
		if (!is_amiss && end - may_send < receives && is_before(sent, end))
			return __sync_val_compare_and_swap(&sender->end, sent, end) == sent;
		return 1;
	}
	if (offered < window)
		STORE(sender->max_win, window);
	if (is_before(sent, end) && __sync_val_compare_and_swap(&sender->end, sent, end) != sent)
		return 0;
	if (is_before(LOAD(sender->max_ack), ack))
		STORE(sender->max_ack, ack);
	if (is_before(may_send, end))
		STORE(receiver->max_win, receives + (end - may_send));
	edge = ack + window;
	if (!is_before(edge, LOAD(receiver->max_end)))
		STORE(receiver->max_end, window ? edge : edge + 1);
	return 1;
}

/* What a packet is found to be. */
struct found {
	struct plain plain;
	struct flow *flow;
	struct way *way;
	__u32 way_number;
};

INLINE int is_plain_v4(const struct iphdr *ip)
{
	const __u16 *half = (const void *)ip;
	__u32 sum = 0;
	int i;

	if (ip->version != 4 || ip->ihl != 5 || ip->ttl <= 1 || from_network16(ip->frag_off) & IPV4_UNUSUAL)
		return 0;
	for (i = 0; i < 10; i++)
		sum += half[i];
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16) == 0xffff;
}

/* Reads layer 4 behind an IP header of so many bytes: 0 if it is not plain. */
INLINE int read_layer_4(const void *header, const void *end, __u32 ip_bytes, __be16 *ports, struct plain *plain)
{
	const struct tcphdr *tcp = header;
	const struct udphdr *udp = header;

	switch (plain->protocol) {
	case IPPROTO_TCP:
		if ((const void *)(tcp + 1) > end)
			return 0;
		if ((((const __u8 *)tcp)[13] & TCP_PLAIN_MASK) != TCP_PLAIN || tcp->doff < 5)
			return 0;
		plain->headers = ip_bytes + tcp->doff * 4;
		if (plain->headers > plain->bytes)
			return 0;
		plain->checksum = __builtin_offsetof(struct tcphdr, check);
		plain->seq = from_network32(tcp->seq);
		plain->ack = from_network32(tcp->ack_seq);
		plain->window = from_network16(tcp->window);
		plain->length = plain->bytes - plain->headers;
		ports[0] = tcp->source;
		ports[1] = tcp->dest;
		return 1;
	case IPPROTO_UDP:
		if ((const void *)(udp + 1) > end)
			return 0;
		plain->headers = ip_bytes + sizeof(*udp);
		plain->checksum = udp->check ? __builtin_offsetof(struct udphdr, check) : 0;
		if (from_network16(udp->len) != plain->bytes - ip_bytes)
			return 0;
		ports[0] = udp->source;
		ports[1] = udp->dest;
		return 1;
	default:
		return 0;
	}
}

/* Whether a packet, whose IP header begins at `header`, is a plain one of a flow that is in force. `is_v6` is known when it
 * is compiled; `tunnelled_from` is the source of the tunnel's header, if it came in one. */
INLINE int find(const void *header, const void *end, int is_v6, __u32 device, __u32 tunnelled_from, struct found *found)
{
	struct plain *plain = &found->plain;
	struct flow_name *name;
	__u32 slot, amiss, *epoch;

	if (is_v6) {
		const struct ipv6hdr *ip = header;
		struct flow_key_v6 key;

		if ((const void *)(ip + 1) > end || ip->version != 6 || ip->hop_limit <= 1)
			return 0;
		plain->bytes = from_network16(ip->payload_len) + sizeof(*ip);
		plain->protocol = ip->nexthdr;
		if (!read_layer_4(ip + 1, end, sizeof(*ip), key.ports, plain) || !plain->checksum)
			return 0;
		__builtin_memcpy(key.addresses, &ip->saddr, sizeof(key.addresses));
		key.device = device;
		key.protocol = plain->protocol;
		name = map_lookup(&offload_v6, &key);
	} else {
		const struct iphdr *ip = header;
		struct flow_key_v4 key;

		if ((const void *)(ip + 1) > end || !is_plain_v4(ip))
			return 0;
		plain->bytes = from_network16(ip->tot_len);
		plain->protocol = ip->protocol;
		if (!read_layer_4(ip + 1, end, sizeof(*ip), key.ports, plain))
			return 0;
		key.addresses[0] = ip->saddr;
		key.addresses[1] = ip->daddr;
		key.device = device;
		key.protocol = plain->protocol;
		name = map_lookup(&offload_v4, &key);
	}
	if (!name)
		return 0;
	slot = name->way >> 1;
	found->way_number = name->way & 1;
	found->flow = map_lookup(&offload_flows, &slot);
	if (!found->flow)
		return 0;
	amiss = LOAD(found->flow->state) ^ (name->serial << 2 | PHASE_LIVE);
	/* The compiler is not to know that it is zero below. */
	asm volatile("" : "+r"(amiss));
	if (amiss)
		return 0;
	/* Nothing of the flow may be read before its state. A processor that reads ahead (arm64) does not read from an address that it
	 * does not know yet; a barrier would cost the others, too. */
	asm volatile("%0 += %1" : "+r"(found->flow) : "r"((__u64)amiss));
	slot = 0;
	epoch = map_lookup(&offload_epoch, &slot);
	if (!epoch || is_before(LOAD(found->flow->epoch), LOAD(*epoch))) {
		count(COUNTER_OFFLOAD_STALE);
		return 0;
	}
	found->way = &found->flow->ways[found->way_number];
	return found->way->exit != EXIT_CLOSED && found->way->comes_from == tunnelled_from;
}

/* The header of a tunnel packet that weir may have made: without options, whole, of plain congestion notification. */
INLINE int is_plain_tunnel(const struct iphdr *outer, const void *end)
{
	const struct iphdr *inner = outer + 1;

	if ((const void *)(inner + 1) > end || !is_plain_v4(outer) || outer->protocol != IPPROTO_IPIP)
		return 0;
	if (from_network16(outer->tot_len) != from_network16(inner->tot_len) + sizeof(*outer))
		return 0;
	/* RFC 6040, figure 4: what changes the inner field, or is dropped, is a worker's. */
	return !(outer->tos & 3) || (outer->tos & 3) == (inner->tos & 3);
}

/* Puts a tunnel's header before a packet: as rewrite::write_ipip_header does. */
INLINE int encapsulate(struct __sk_buff *packet, const struct way *way)
{
	const struct iphdr *inner;
	struct iphdr *outer;
	const __u16 *half;
	__u32 sum = 0;
	void *data, *end;
	int i;

	if (adjust_room(packet, sizeof(*outer), BPF_ADJ_ROOM_MAC,
			BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_FIXED_GSO))
		return 0;
	data = (void *)(long)packet->data;
	end = (void *)(long)packet->data_end;
	outer = data + ETH_HLEN;
	inner = outer + 1;
	if ((void *)(inner + 1) > end)
		return 0;
	outer->version = 4;
	outer->ihl = 5;
	outer->tos = inner->tos;
	outer->tot_len = from_network16((__u16)(from_network16(inner->tot_len) + sizeof(*outer)));
	/* Only to tell fragments apart, which DF forbids (RFC 6864, 4.1). */
	outer->id = 0;
	outer->frag_off = from_network16(IPV4_DONT_FRAGMENT);
	outer->ttl = ORIGIN_TTL;
	outer->protocol = IPPROTO_IPIP;
	outer->check = 0;
	outer->saddr = way->tunnel[0];
	outer->daddr = way->tunnel[1];
	half = (const void *)outer;
	for (i = 0; i < 10; i++)
		sum += half[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	outer->check = ~sum;
	return 1;
}

/* The program for one family, and for packets in a tunnel or not; both are known when it is compiled. `device`: by which
 * the packet came, as in its key. -1: the packet is a worker's. */
INLINE int carry(struct __sk_buff *packet, int is_v6, int in_tunnel, __u32 device)
{
	void *data = (void *)(long)packet->data, *end = (void *)(long)packet->data_end;
	__u32 header_bytes = is_v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr), offset = ETH_HLEN + header_bytes;
	__u32 tunnel_bytes = in_tunnel ? sizeof(struct iphdr) : 0, tunnelled_from = 0, size, segments = 1;
	struct iphdr *v4 = data + ETH_HLEN;
	struct ipv6hdr *v6;
	struct found found = {};
	struct plain *plain = &found.plain;
	struct way *way;
	int is_hop;

	if (in_tunnel) {
		if (!is_plain_tunnel(v4, end))
			return -1;
		tunnelled_from = v4->saddr;
	}
	if (!find(data + ETH_HLEN + tunnel_bytes, end, is_v6, device, tunnelled_from, &found))
		return -1;
	way = found.way;
	size = plain->bytes - plain->headers;
	/* gso_segs is 0 where a virtual machine has sent the packet, or a tunnel was put around it. */
	if (packet->gso_size && packet->gso_size < size) {
		segments = (size + packet->gso_size - 1) / packet->gso_size;
		size = packet->gso_size;
	}
	/* Ethernet padding, or a length that is no length (RFC 2675), is for those who look closer. What comes merged out of
	 * a tunnel is still marked as tunnelled, so no device must cut it again. */
	if (packet->len != plain->bytes + tunnel_bytes + ETH_HLEN || plain->headers + size > way->mtu ||
	    (in_tunnel && packet->gso_size && way->exit != EXIT_PEER) ||
	    (found.flow->has_windows && !fits_windows(found.flow, found.way_number, plain, size, segments))) {
		count(COUNTER_OFFLOAD_UNUSUAL);
		return -1;
	}
	__sync_fetch_and_add(&way->packets, segments);
	__sync_fetch_and_add(&way->bytes, plain->bytes + (segments - 1) * plain->headers);

	if (in_tunnel &&
	    adjust_room(packet, -(__s32)sizeof(struct iphdr), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		goto failed;
	if (way->translates && plain->checksum) {
		__u64 flags = plain->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
		__u32 checksum = offset + plain->checksum;

		/* It knows which checksums a device is still to finish: those have the addresses in them, not the ports. */
		if (l4_csum_replace(packet, checksum, 0, way->address_difference, flags | BPF_F_PSEUDO_HDR) ||
		    l4_csum_replace(packet, checksum, 0, way->port_difference, flags))
			goto failed;
		/* Where the device has summed all of the packet, the helper takes the change of the checksum for one of that sum. In IPv4 it
		 * is; in IPv6, whose header has no checksum, the addresses make up for it. */
		if (is_v6)
			csum_update(packet, way->address_difference);
	}
	data = (void *)(long)packet->data;
	end = (void *)(long)packet->data_end;
	v4 = data + ETH_HLEN;
	v6 = data + ETH_HLEN;
	if (data + offset + 2 * sizeof(__be16) > end)
		goto failed;
	/* To the node itself, or from it, no router is passed. */
	is_hop = device != HOST_DEVICE && way->exit != EXIT_HOST;
	__builtin_memcpy(data, way->destination, 2 * ETH_ALEN);
	if (way->translates)
		*(__u32 *)(data + offset) = *(__u32 *)way->ports;
	if (is_v6) {
		if (way->translates)
			__builtin_memcpy(&v6->saddr, way->addresses, sizeof(way->addresses));
		if (is_hop) {
			v6->hop_limit--;
			/* One less in the lower byte of a half-word, for that sum. */
			csum_update(packet, (__u16)~from_network16(1));
		}
	} else {
		__u32 sum = (__u16)~v4->check;

		/* RFC 1624, equation 3: one less in the upper byte of the fifth half-word. */
		if (is_hop) {
			sum += (__u16)~from_network16(0x0100);
			v4->ttl--;
		}
		if (way->translates) {
			sum += (way->address_difference & 0xffff) + (way->address_difference >> 16);
			v4->saddr = way->addresses[0][0];
			v4->daddr = way->addresses[1][0];
		}
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		v4->check = ~sum;
		if (way->tunnel[1] && !encapsulate(packet, way))
			goto failed;
	}
	count(COUNTER_OFFLOADED);
	switch (way->exit) {
	case EXIT_PEER:
		return redirect_peer(way->device, 0);
	case EXIT_HOST:
		return redirect(trunk_device, BPF_F_INGRESS);
	default:
		return redirect(way->device, 0);
	}

failed:
	count(COUNTER_OFFLOAD_FAILED);
	return TC_ACT_SHOT;
}

/* Carries the packet if it is one of a flow that was handed over; -1: it is a worker's. */
INLINE int offload(struct __sk_buff *packet, __u32 device)
{
	if (!offload_is_on || packet->pkt_type != PACKET_HOST || packet->vlan_present)
		return -1;
	if (packet->protocol == from_network16(ETH_P_IP))
		return carry(packet, 0, 0, device);
	if (packet->protocol == from_network16(ETH_P_IPV6))
		return carry(packet, 1, 0, device);
	return -1;
}
