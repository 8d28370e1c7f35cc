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
/* ICMP errors: of IPv4 those that are neither obsolete nor redirects (RFC 792; linux/icmp.h needs a C library), of IPv6 all. */
#define UNREACHABLE_V4 3
#define TIME_EXCEEDED_V4 11
#define PARAMETER_PROBLEM_V4 12
#define LAST_ERROR_V6 127
#define ICMP_HEADER 8

static long (*const map_update)(const void *map, const void *key, const void *value,
				__u64 flags) = (void *)BPF_FUNC_map_update_elem;

/* The ends of a flow: the node's own first, then the other's. Ports and addresses in network order. */
struct ends_v4 {
	__u32 addresses[2];
	__be16 ports[2];
	__u8 protocol;
	__u8 zero[3];
};

struct ends_v6 {
	__u64 addresses[2][2];
	__be16 ports[2];
	__u8 protocol;
	__u8 zero[3];
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

/* Which end of a packet is the node's. */
enum own_end { SENDER, RECEIVER };

INLINE int has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

/* The ends of a whole packet with ports; 0: it is none. All is read before it is known which end comes first: an offset that depends on that is
 * refused by the verifier. */
INLINE int plain_ends_v4(const struct iphdr *ip, const void *end, enum own_end own, struct ends_v4 *ends)
{
	__u32 source, destination;
	const __be16 *port;

	if ((const void *)(ip + 1) > end || from_network16(ip->frag_off) & IPV4_FRAGMENT || !has_ports(ip->protocol))
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
INLINE int ends_v4(const struct iphdr *ip, const void *end, enum own_end own, struct ends_v4 *ends)
{
	const __u8 *icmp;

	if ((const void *)(ip + 1) > end)
		return 0;
	if (ip->protocol != IPPROTO_ICMP || from_network16(ip->frag_off) & IPV4_FRAGMENT)
		return plain_ends_v4(ip, end, own, ends);
	icmp = (const void *)ip + ip->ihl * 4;
	if (icmp + ICMP_HEADER > (const __u8 *)end)
		return 0;
	if (*icmp != UNREACHABLE_V4 && *icmp != TIME_EXCEEDED_V4 && *icmp != PARAMETER_PROBLEM_V4)
		return 0;
	return plain_ends_v4((const void *)(icmp + ICMP_HEADER), end, !own, ends);
}

/* Extension headers no socket has cause to send. */
INLINE int plain_ends_v6(const struct ipv6hdr *ip, const void *end, enum own_end own, struct ends_v6 *ends)
{
	const __be16 *port = (const void *)(ip + 1);
	__u64 source[2], destination[2];

	if ((const void *)(port + 2) > end || !has_ports(ip->nexthdr))
		return 0;
	__builtin_memcpy(source, &ip->saddr, sizeof(source));
	__builtin_memcpy(destination, &ip->daddr, sizeof(destination));
	ends->addresses[0][0] = own == SENDER ? source[0] : destination[0];
	ends->addresses[0][1] = own == SENDER ? source[1] : destination[1];
	ends->addresses[1][0] = own == SENDER ? destination[0] : source[0];
	ends->addresses[1][1] = own == SENDER ? destination[1] : source[1];
	ends->ports[0] = own == SENDER ? port[0] : port[1];
	ends->ports[1] = own == SENDER ? port[1] : port[0];
	ends->protocol = ip->nexthdr;
	return 1;
}

INLINE int ends_v6(const struct ipv6hdr *ip, const void *end, enum own_end own, struct ends_v6 *ends)
{
	const struct icmp6hdr *icmp = (const void *)(ip + 1);

	if ((const void *)icmp + ICMP_HEADER > end)
		return 0;
	if (ip->nexthdr != IPPROTO_ICMPV6)
		return plain_ends_v6(ip, end, own, ends);
	if (icmp->icmp6_type > LAST_ERROR_V6)
		return 0;
	return plain_ends_v6((const void *)icmp + ICMP_HEADER, end, !own, ends);
}

INLINE int is_loopback_v6(const __u8 address[16])
{
	const __u32 *word = (const void *)address;

	return !word[0] && !word[1] && !word[2] && word[3] == from_network32(1);
}

/* Whether an IP packet goes to a port of the node itself that is weir's, or is an ICMP error about what came from there. A loopback address
 * only the node itself may ask. */
INLINE int is_for_own_port(__be16 protocol, const void *ip, const void *end, int from_node)
{
	switch (from_network16(protocol)) {
	case ETH_P_IP: {
		struct own_port_v4 key = {};
		struct ends_v4 ends = {};

		if (!ends_v4(ip, end, RECEIVER, &ends))
			return 0;
		__builtin_memcpy(key.address, &ends.addresses[0], sizeof(key.address));
		key.port = ends.ports[0];
		key.protocol = ends.protocol;
		return (from_node || key.address[0] != 127) && map_lookup(&own_ports_v4, &key);
	}
	case ETH_P_IPV6: {
		struct own_port_v6 key = {};
		struct ends_v6 ends = {};

		if (!ends_v6(ip, end, RECEIVER, &ends))
			return 0;
		__builtin_memcpy(key.address, &ends.addresses[0], sizeof(key.address));
		key.port = ends.ports[0];
		key.protocol = ends.protocol;
		return (from_node || !is_loopback_v6(key.address)) && map_lookup(&own_ports_v6, &key);
	}
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

		if (plain_ends_v4(ip, end, RECEIVER, &ends) && !map_lookup(&answered_v4, &ends))
			map_update(&answered_v4, &ends, &one, BPF_ANY);
		return;
	}
	case ETH_P_IPV6: {
		struct ends_v6 ends = {};

		if (plain_ends_v6(ip, end, RECEIVER, &ends) && !map_lookup(&answered_v6, &ends))
			map_update(&answered_v6, &ends, &one, BPF_ANY);
		return;
	}
	}
}

/* Whether an IP packet that the node has made answers such a one. */
INLINE int is_answer(__be16 protocol, const void *ip, const void *end)
{
	switch (from_network16(protocol)) {
	case ETH_P_IP: {
		struct ends_v4 ends = {};

		return ends_v4(ip, end, SENDER, &ends) && map_lookup(&answered_v4, &ends);
	}
	case ETH_P_IPV6: {
		struct ends_v6 ends = {};

		return ends_v6(ip, end, SENDER, &ends) && map_lookup(&answered_v6, &ends);
	}
	default:
		return 0;
	}
}
