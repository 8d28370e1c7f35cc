/* SPDX-License-Identifier: Apache-2.0 */
/* What is weir's of packets to and from the node's own addresses, where no route of the kernel's leads them to it: to frontends there, and from
 * servers of the node that are backends.
 *
 * A server of the node answers who asked by a service as it answers everybody: by the device that leads there, in its own name. Only weir knows
 * the name that was asked. So weir says of what it has translated for the node (ANSWERED), weir0 remembers its ends, and where devices send
 * something with these ends, it goes to weir. Every packet that comes from the client is looked at, so a flow that was forgotten for another is
 * remembered again. While no router runs, such flows go nowhere, and all others as ever. */
#pragma once

#include "weir.h"

#include <linux/icmpv6.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#define IPV4_FRAGMENT 0x3fff /* more fragments, or an offset */
#define IPV4_OFFSET 0x1fff
#define LOOPBACK_NET 127
#define IPV6_OFFSET 0xfff8
#define NEXT_FRAGMENT 44
/* ICMP errors: of IPv4 those that are neither obsolete nor redirects (RFC 792; linux/icmp.h needs a C library), of IPv6 all. */
#define UNREACHABLE_V4 3
#define TIME_EXCEEDED_V4 11
#define PARAMETER_PROBLEM_V4 12
#define LAST_ERROR_V6 127
#define ICMP_HEADER 8

static long (*const map_update)(const void *map, const void *key, const void *value,
				__u64 flags) = (void *)BPF_FUNC_map_update_elem;

/* The extension header of IPv6 fragments. */
struct fragment_v6 {
	__u8 next;
	__u8 zero;
	__be16 offset;
	__be16 identification[2];
};

/* The ends of a flow: the node's own first, then the other's. Ports and addresses in network order. Of later fragments of a packet, which have no
 * ports, the identification stands in their place. */
struct ends_v4 {
	__u32 addresses[2];
	__be16 ports[2];
	__u8 protocol;
	__u8 is_later_fragment;
	__u8 zero[2];
};

struct ends_v6 {
	__u64 addresses[2][2];
	__be16 ports[2];
	__u8 protocol;
	__u8 is_later_fragment;
	__u8 zero[2];
};

#define MAX_ANSWERED 65536

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	TYPE(key, struct ends_v4);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_ANSWERED);
	PIN_BY_NAME;
} answered_v4 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	TYPE(key, struct ends_v6);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_ANSWERED);
	PIN_BY_NAME;
} answered_v6 SECTION(".maps");

/* Of a packet in fragments, the first alone shows ports: whether that is enough. */
enum pieces { WHOLE, FIRST };

/* Which end of a packet is the node's. */
enum own_end { SENDER, RECEIVER };

INLINE int has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

/* The ends of a packet with ports; 0: it is none. All is read before it is known which end comes first: an offset that depends on that is
 * refused by the verifier. */
INLINE int plain_ends_v4(const struct iphdr *ip, const void *end, enum own_end own, enum pieces pieces,
			 struct ends_v4 *ends)
{
	__u16 refused = pieces == WHOLE ? IPV4_FRAGMENT : IPV4_OFFSET;
	__u32 source, destination;
	const __be16 *port;

	if ((const void *)(ip + 1) > end || from_network16(ip->frag_off) & refused || !has_ports(ip->protocol))
		return 0;
	port = (const void *)ip + ip->ihl * 4;
	if ((const void *)(port + 2) > end)
		return 0;
	source = ip->saddr;
	destination = ip->daddr;
	ends->addresses[0] = own == SENDER ? source : destination;
	ends->addresses[1] = own == SENDER ? destination : source;
	ends->ports[0] = own == SENDER ? port[0] : port[1];
	ends->ports[1] = own == SENDER ? port[1] : port[0];
	ends->protocol = ip->protocol;
	return 1;
}

/* The same, or those of the packet that an ICMP error is about, which went the other way. */
INLINE int ends_v4(const struct iphdr *ip, const void *end, enum own_end own, enum pieces pieces, struct ends_v4 *ends)
{
	const __u8 *icmp;

	if ((const void *)(ip + 1) > end)
		return 0;
	if (ip->protocol != IPPROTO_ICMP || from_network16(ip->frag_off) & IPV4_FRAGMENT)
		return plain_ends_v4(ip, end, own, pieces, ends);
	icmp = (const void *)ip + ip->ihl * 4;
	if (icmp + ICMP_HEADER > (const __u8 *)end)
		return 0;
	if (*icmp != UNREACHABLE_V4 && *icmp != TIME_EXCEEDED_V4 && *icmp != PARAMETER_PROBLEM_V4)
		return 0;
	return plain_ends_v4((const void *)(icmp + ICMP_HEADER), end, !own, FIRST, ends);
}

/* Other extension headers no socket has cause to send. */
INLINE int plain_ends_v6(const struct ipv6hdr *ip, const void *end, enum own_end own, enum pieces pieces,
			 struct ends_v6 *ends)
{
	const struct fragment_v6 *fragment = (const void *)(ip + 1);
	const __be16 *port = (const void *)fragment;
	__u64 source[2], destination[2];
	__u8 protocol;

	if ((const void *)(port + 2) > end)
		return 0;
	protocol = ip->nexthdr;
	if (pieces == FIRST && protocol == NEXT_FRAGMENT) {
		port = (const void *)(fragment + 1);
		if ((const void *)(port + 2) > end || from_network16(fragment->offset) & IPV6_OFFSET)
			return 0;
		protocol = fragment->next;
	}
	if (!has_ports(protocol))
		return 0;
	__builtin_memcpy(source, &ip->saddr, sizeof(source));
	__builtin_memcpy(destination, &ip->daddr, sizeof(destination));
	ends->addresses[0][0] = own == SENDER ? source[0] : destination[0];
	ends->addresses[0][1] = own == SENDER ? source[1] : destination[1];
	ends->addresses[1][0] = own == SENDER ? destination[0] : source[0];
	ends->addresses[1][1] = own == SENDER ? destination[1] : source[1];
	ends->ports[0] = own == SENDER ? port[0] : port[1];
	ends->ports[1] = own == SENDER ? port[1] : port[0];
	ends->protocol = protocol;
	return 1;
}

INLINE int ends_v6(const struct ipv6hdr *ip, const void *end, enum own_end own, enum pieces pieces, struct ends_v6 *ends)
{
	const struct icmp6hdr *icmp = (const void *)(ip + 1);

	if ((const void *)icmp + ICMP_HEADER > end)
		return 0;
	if (ip->nexthdr != IPPROTO_ICMPV6)
		return plain_ends_v6(ip, end, own, pieces, ends);
	if (icmp->icmp6_type > LAST_ERROR_V6)
		return 0;
	return plain_ends_v6((const void *)icmp + ICMP_HEADER, end, !own, FIRST, ends);
}

INLINE int is_loopback_v6(const __u8 address[16])
{
	const __u32 *word = (const void *)address;

	return !word[0] && !word[1] && !word[2] && word[3] == from_network32(1);
}

/* How later fragments of a packet of these ends are known. */
INLINE void make_later_v4(const struct iphdr *ip, struct ends_v4 *ends)
{
	ends->addresses[0] = ip->saddr;
	ends->addresses[1] = ip->daddr;
	ends->ports[0] = ip->id;
	ends->ports[1] = 0;
	ends->protocol = ip->protocol;
	ends->is_later_fragment = 1;
}

INLINE void make_later_v6(const struct ipv6hdr *ip, const struct fragment_v6 *fragment, struct ends_v6 *ends)
{
	__builtin_memcpy(ends->addresses[0], &ip->saddr, sizeof(ends->addresses[0]));
	__builtin_memcpy(ends->addresses[1], &ip->daddr, sizeof(ends->addresses[1]));
	ends->ports[0] = fragment->identification[0];
	ends->ports[1] = fragment->identification[1];
	ends->protocol = fragment->next;
	ends->is_later_fragment = 1;
}

INLINE int is_for_own_port_v4(const struct iphdr *ip, const void *end, int from_node)
{
	struct own_port_v4 key = {};
	struct ends_v4 ends = {};
	__u16 fragment;
	__u32 one = 1;

	if ((const void *)(ip + 1) > end)
		return 0;
	fragment = from_node ? 0 : from_network16(ip->frag_off) & IPV4_FRAGMENT;
	if (fragment & IPV4_OFFSET) {
		make_later_v4(ip, &ends);
		return map_lookup(&answered_v4, &ends) != 0;
	}
	if (!ends_v4(ip, end, RECEIVER, from_node ? WHOLE : FIRST, &ends))
		return 0;
	__builtin_memcpy(key.address, &ends.addresses[0], sizeof(key.address));
	key.port = ends.ports[0];
	key.protocol = ends.protocol;
	if (!map_lookup(&own_ports_v4, &key))
		return 0;
	/* Of others the kernel drops it, which has not looked at it yet. */
	if (!from_node && (key.address[0] == LOOPBACK_NET || map_lookup(&node_v4, &ip->saddr)))
		return 0;
	if (fragment) {
		make_later_v4(ip, &ends);
		map_update(&answered_v4, &ends, &one, BPF_ANY);
	}
	return 1;
}

INLINE int is_for_own_port_v6(const struct ipv6hdr *ip, const void *end, int from_node)
{
	const struct fragment_v6 *fragment = (const void *)(ip + 1);
	struct own_port_v6 key = {};
	struct ends_v6 ends = {};
	int is_fragment;
	__u32 one = 1;

	if ((const void *)(fragment + 1) > end)
		return 0;
	is_fragment = !from_node && ip->nexthdr == NEXT_FRAGMENT;
	if (is_fragment && from_network16(fragment->offset) & IPV6_OFFSET) {
		make_later_v6(ip, fragment, &ends);
		return map_lookup(&answered_v6, &ends) != 0;
	}
	if (!ends_v6(ip, end, RECEIVER, from_node ? WHOLE : FIRST, &ends))
		return 0;
	__builtin_memcpy(key.address, &ends.addresses[0], sizeof(key.address));
	key.port = ends.ports[0];
	key.protocol = ends.protocol;
	if (!map_lookup(&own_ports_v6, &key))
		return 0;
	if (!from_node && (is_loopback_v6(key.address) || map_lookup(&node_v6, &ip->saddr)))
		return 0;
	if (is_fragment) {
		make_later_v6(ip, fragment, &ends);
		map_update(&answered_v6, &ends, &one, BPF_ANY);
	}
	return 1;
}

/* Whether an IP packet goes to a port of the node itself that is weir's, or is an ICMP error about what came from there. A loopback address
 * only the node itself may ask, and only it asks from its own addresses; and it has no cause to send fragments there: lo's MTU is 64 KiB. Fragments of others come in order, or not at
 * all. */
INLINE int is_for_own_port(__be16 protocol, const void *ip, const void *end, int from_node)
{
	switch (from_network16(protocol)) {
	case ETH_P_IP:
		return is_for_own_port_v4(ip, end, from_node);
	case ETH_P_IPV6:
		return is_for_own_port_v6(ip, end, from_node);
	default:
		return 0;
	}
}

/* Remembers the ends of what weir has translated for a server of the node. */
INLINE void remember_answered(__be16 protocol, const void *ip, const void *end)
{
	__u32 one = 1;

	switch (from_network16(protocol)) {
	case ETH_P_IP: {
		struct ends_v4 ends = {};

		if (plain_ends_v4(ip, end, RECEIVER, FIRST, &ends) && !map_lookup(&answered_v4, &ends))
			map_update(&answered_v4, &ends, &one, BPF_ANY);
		return;
	}
	case ETH_P_IPV6: {
		struct ends_v6 ends = {};

		if (plain_ends_v6(ip, end, RECEIVER, FIRST, &ends) && !map_lookup(&answered_v6, &ends))
			map_update(&answered_v6, &ends, &one, BPF_ANY);
		return;
	}
	}
}

INLINE int is_answer_v4(const struct iphdr *ip, const void *end)
{
	struct ends_v4 ends = {};
	__u16 fragment;
	__u32 one = 1;

	if ((const void *)(ip + 1) > end)
		return 0;
	fragment = from_network16(ip->frag_off) & IPV4_FRAGMENT;
	if (fragment & IPV4_OFFSET) {
		make_later_v4(ip, &ends);
		return map_lookup(&answered_v4, &ends) != 0;
	}
	if (!ends_v4(ip, end, SENDER, FIRST, &ends) || !map_lookup(&answered_v4, &ends))
		return 0;
	if (fragment) {
		make_later_v4(ip, &ends);
		map_update(&answered_v4, &ends, &one, BPF_ANY);
	}
	return 1;
}

INLINE int is_answer_v6(const struct ipv6hdr *ip, const void *end)
{
	const struct fragment_v6 *fragment = (const void *)(ip + 1);
	struct ends_v6 ends = {};
	int is_fragment;
	__u32 one = 1;

	if ((const void *)(fragment + 1) > end)
		return 0;
	is_fragment = ip->nexthdr == NEXT_FRAGMENT;
	if (is_fragment && from_network16(fragment->offset) & IPV6_OFFSET) {
		make_later_v6(ip, fragment, &ends);
		return map_lookup(&answered_v6, &ends) != 0;
	}
	if (!ends_v6(ip, end, SENDER, FIRST, &ends) || !map_lookup(&answered_v6, &ends))
		return 0;
	if (is_fragment) {
		make_later_v6(ip, fragment, &ends);
		map_update(&answered_v6, &ends, &one, BPF_ANY);
	}
	return 1;
}

/* Whether an IP packet that the node has made answers such a one. The kernel sends a packet's first fragment first. */
INLINE int is_answer(__be16 protocol, const void *ip, const void *end)
{
	switch (from_network16(protocol)) {
	case ETH_P_IP:
		return is_answer_v4(ip, end);
	case ETH_P_IPV6:
		return is_answer_v6(ip, end);
	default:
		return 0;
	}
}
