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

#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

static long (*const l4_csum_replace)(struct __sk_buff *packet, __u32 offset, __u64 from, __u64 to,
				     __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;

/* How a way's packets leave. */
enum exit { EXIT_CLOSED, EXIT_PEER, EXIT_DEVICE };

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
	__u32 zero[3];
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

#define LOAD(place) (*(volatile __typeof__(place) *)&(place))
#define STORE(place, value) (*(volatile __typeof__(place) *)&(place) = (value))

INLINE int is_before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}

/* The four tests of conntrack/src/tcp.rs, of a segment that is no more than data and acknowledgment; inside, it moves
 * the windows. Only `end` must not be lost by two processors at once. */
INLINE int fits_windows(struct flow *flow, __u32 way, __u32 seq, __u32 length, __u32 ack, __u32 window)
{
	struct side *sender = &flow->sides[way & 1], *receiver = &flow->sides[~way & 1];
	__u32 sent = LOAD(sender->end), may_send = LOAD(sender->max_end), offered = LOAD(sender->max_win);
	__u32 answered = LOAD(receiver->end), receives = LOAD(receiver->max_win);
	__u32 end = seq + length, edge;
	__u32 late = offered > MIN_ACK_WINDOW ? offered : MIN_ACK_WINDOW;
	int is_beyond = is_before(may_send, seq);
	int is_amiss = is_before(answered, ack) || is_before(end, sent - receives) || is_before(ack, answered - late);

	window <<= flow->scales[way & 1] & 15;
	if (is_beyond || is_amiss) {
		if (!flow->is_liberal)
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

/* What a packet is, as far as a flow asks. */
struct plain {
	/* Bytes of the IP packet, and of all its headers. */
	__u32 bytes;
	__u32 headers;
	/* Offset of the checksum of layer 4 in the frame. */
	__u32 checksum;
	__u32 seq;
	__u32 length;
	__u32 ack;
	__u32 window;
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

/* Reads layer 4: 0 if it is not plain. `header` lies at `offset` of the frame. */
INLINE int read_layer_4(__u8 protocol, const void *header, const void *end, __u32 offset, __be16 *ports,
			struct plain *plain)
{
	const struct tcphdr *tcp = header;
	const struct udphdr *udp = header;

	switch (protocol) {
	case IPPROTO_TCP:
		if ((const void *)(tcp + 1) > end)
			return 0;
		if ((((const __u8 *)tcp)[13] & TCP_PLAIN_MASK) != TCP_PLAIN || tcp->doff < 5)
			return 0;
		plain->headers = offset - ETH_HLEN + tcp->doff * 4;
		if (plain->headers > plain->bytes)
			return 0;
		plain->checksum = offset + __builtin_offsetof(struct tcphdr, check);
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
		plain->headers = offset - ETH_HLEN + sizeof(*udp);
		plain->checksum = udp->check ? offset + __builtin_offsetof(struct udphdr, check) : 0;
		if (from_network16(udp->len) != plain->bytes - (offset - ETH_HLEN))
			return 0;
		ports[0] = udp->source;
		ports[1] = udp->dest;
		return 1;
	default:
		return 0;
	}
}

/* The program for one family; `is_v6` is known when it is compiled. TC_ACT_UNSPEC: it is a worker's. */
INLINE int carry(struct __sk_buff *packet, int is_v6)
{
	void *data = (void *)(long)packet->data, *end = (void *)(long)packet->data_end;
	__u32 header_bytes = is_v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	struct iphdr *v4 = data + ETH_HLEN;
	struct ipv6hdr *v6 = data + ETH_HLEN;
	__u32 protocol, offset = ETH_HLEN + header_bytes, slot, way_number, segments;
	struct plain plain = {};
	struct flow_name *name;
	struct flow *flow;
	struct way *way;

	if (data + offset > end)
		return -1;
	if (is_v6) {
		struct flow_key_v6 key;

		if (v6->version != 6 || v6->hop_limit <= 1)
			return -1;
		plain.bytes = from_network16(v6->payload_len) + sizeof(*v6);
		protocol = v6->nexthdr;
		if (!read_layer_4(protocol, data + offset, end, offset, key.ports, &plain) || !plain.checksum)
			return -1;
		__builtin_memcpy(key.addresses, &v6->saddr, sizeof(key.addresses));
		key.device = packet->ifindex;
		key.protocol = protocol;
		name = map_lookup(&offload_v6, &key);
	} else {
		struct flow_key_v4 key;

		if (!is_plain_v4(v4))
			return -1;
		plain.bytes = from_network16(v4->tot_len);
		protocol = v4->protocol;
		if (!read_layer_4(protocol, data + offset, end, offset, key.ports, &plain))
			return -1;
		key.addresses[0] = v4->saddr;
		key.addresses[1] = v4->daddr;
		key.device = packet->ifindex;
		key.protocol = protocol;
		name = map_lookup(&offload_v4, &key);
	}
	if (!name)
		return -1;
	slot = name->way >> 1;
	way_number = name->way & 1;
	flow = map_lookup(&offload_flows, &slot);
	if (!flow || LOAD(flow->state) != (name->serial << 2 | PHASE_LIVE))
		return -1;
	slot = 0;
	{
		__u32 *epoch = map_lookup(&offload_epoch, &slot);

		if (!epoch || is_before(LOAD(flow->epoch), LOAD(*epoch))) {
			count(COUNTER_OFFLOAD_STALE);
			return -1;
		}
	}
	way = &flow->ways[way_number];
	segments = packet->gso_segs ? packet->gso_segs : 1;
	/* Ethernet padding, or a length that is no length (RFC 2675), is for those who look closer. */
	if (way->exit == EXIT_CLOSED || packet->len != plain.bytes + ETH_HLEN ||
	    (packet->gso_size ? plain.headers + packet->gso_size : plain.bytes) > way->mtu ||
	    (flow->has_windows &&
	     !fits_windows(flow, way_number, plain.seq, plain.length, plain.ack, plain.window))) {
		count(COUNTER_OFFLOAD_UNUSUAL);
		return -1;
	}
	__sync_fetch_and_add(&way->packets, segments);
	__sync_fetch_and_add(&way->bytes, plain.bytes + (segments - 1) * plain.headers);

	if (way->translates) {
		/* It knows which checksums are still to be finished by a device. The addresses are part of those too. */
		if (plain.checksum) {
			__u64 flags = protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

			if (l4_csum_replace(packet, plain.checksum, 0, way->address_difference,
					    flags | BPF_F_PSEUDO_HDR) ||
			    l4_csum_replace(packet, plain.checksum, 0, way->port_difference, flags))
				return TC_ACT_SHOT;
		}
		data = (void *)(long)packet->data;
		end = (void *)(long)packet->data_end;
		if (data + offset + 2 * sizeof(__be16) > end)
			return TC_ACT_SHOT;
		*(__u32 *)(data + offset) = *(__u32 *)way->ports;
	}
	v4 = data + ETH_HLEN;
	v6 = data + ETH_HLEN;
	if (data + offset > end)
		return TC_ACT_SHOT;
	__builtin_memcpy(data, way->destination, 2 * ETH_ALEN);
	if (is_v6) {
		v6->hop_limit--;
		if (way->translates)
			__builtin_memcpy(&v6->saddr, way->addresses, sizeof(way->addresses));
	} else {
		/* RFC 1624, equation 3: one less in the upper byte of the fifth half-word. */
		__u32 sum = (__u16)~v4->check + (__u32)(__u16)~from_network16(0x0100);

		v4->ttl--;
		if (way->translates) {
			sum += (way->address_difference & 0xffff) + (way->address_difference >> 16);
			v4->saddr = way->addresses[0][0];
			v4->daddr = way->addresses[1][0];
		}
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		v4->check = ~sum;
	}
	count(COUNTER_OFFLOADED);
	return way->exit == EXIT_PEER ? redirect_peer(way->device, 0) : redirect(way->device, 0);
}

/* Carries the packet if it is one of a flow that was handed over; -1: it is a worker's. */
INLINE int offload(struct __sk_buff *packet)
{
	/* To this device, or to somebody else, or to all. */
	if (!offload_is_on || packet->pkt_type != 0)
		return -1;
	if (packet->protocol == from_network16(ETH_P_IP))
		return carry(packet, 0);
	if (packet->protocol == from_network16(ETH_P_IPV6))
		return carry(packet, 1);
	return -1;
}
