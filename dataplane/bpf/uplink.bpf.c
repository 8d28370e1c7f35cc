/* SPDX-License-Identifier: Apache-2.0 */
/* An uplink: takes what weir owns, and nothing else.
 *
 * Packets to one of the node's own addresses are judged first and by protocol, so that no prefix can take the node away
 * from its operator; only then the owned prefixes count. What is taken and finds no socket, as when no router runs, is
 * dropped, for it needs a decision; only ICMP to the node itself passes, and fragments where no host endpoint governs, so
 * that the node stays reachable.
 *
 * What cannot be read is not passed: the kernel may read further. Behind priority tags (VLAN id 0), which Linux takes off
 * as if they were not there, lies a packet of the device's own; it goes to a worker without them.
 *
 *   uplink -> uplink_receive -> AF_XDP socket
 *   uplink -> uplink_receive -> kernel -> uplink_carry -> pod, if the packet is one of a flow that was handed over
 *
 * Between the two the kernel merges packets (GRO). What then is no packet of such a flow, after all, takes the trunk to a
 * worker.
 *
 * A device whose driver does not run XDP, or is better off without it, has one program for both:
 *
 *   uplink -> kernel -> uplink_take -> pod, likewise
 *   uplink -> kernel -> uplink_take -> weir0 => weir1 -> trunk_receive -> AF_XDP socket */
#include "offload.h"

#include <linux/icmpv6.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#define IPV4_FRAGMENT 0x3fff /* more fragments, or an offset */
#define NEXT_HOP_BY_HOP 0
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_DESTINATION 60
#define MAX_EXTENSIONS 4
#define MAX_TAGS 4
#define VLAN_ID 0x0fff
#define HOP_LIMIT_NEVER_FORWARDED 255
/* RFC 4861 (neighbour discovery), RFC 2710 and RFC 3810 (multicast listeners). */
#define FIRST_ND 133
#define LAST_ND 137
#define FIRST_MLD 130
#define LAST_MLD 132
#define MLD_V2_REPORT 143

/* What follows an EtherType that says that a tag follows (IEEE 802.1Q, 9.4): priority and VLAN, and the EtherType of the rest. */
struct tag {
	__be16 control;
	__be16 protocol;
};

INLINE int has_port(enum port_set set, enum port_protocol protocol, __u16 port)
{
	__u32 word = (set * PORT_PROTOCOLS + protocol) * PORT_WORDS + port / 64;
	__u64 *bits = map_lookup(&ports, &word);

	return bits && *bits >> port % 64 & 1;
}

/* Whether a host endpoint governs what the node itself gets. */
INLINE int is_governed(void)
{
	__u32 first = 0;
	__u64 *value = map_lookup(&governed, &first);

	return !value || *value;
}

/* Groups, and everybody (RFC 5771, RFC 919): the node's where it takes part, and no router's to forward. */
INLINE int is_group_v4(__be32 address)
{
	return from_network32(address) >> 28 == 0xe || address == 0xffffffff;
}

/* Groups, and addresses that are good on one link only (RFC 4291, 2.5.6 and 2.7). */
INLINE int ends_at_link_v6(const struct in6_addr *address)
{
	return address->s6_addr[0] == 0xff || (address->s6_addr[0] == 0xfe && (address->s6_addr[1] & 0xc0) == 0x80);
}

/* A whole packet to one of the node's own addresses. TCP, UDP and SCTP begin with the source and destination port. */
INLINE enum counter judge_ports(__u8 protocol, const void *header, const void *end)
{
	const __be16 *port = header;
	enum port_protocol row;
	__u16 destination;

	switch (protocol) {
	case IPPROTO_TCP:
		row = PORTS_TCP;
		break;
	case IPPROTO_UDP:
		row = PORTS_UDP;
		break;
	case IPPROTO_SCTP:
		row = PORTS_SCTP;
		break;
	default:
		return COUNTER_UPLINK_PASSED;
	}
	if ((const void *)(port + 2) > end)
		return COUNTER_UPLINK_TAKEN_UNREAD;
	destination = from_network16(port[1]);
	if (has_port(PORTS_FAILSAFE, row, destination))
		return COUNTER_UPLINK_PASSED_FAILSAFE;
	return has_port(PORTS_OWNED, row, destination) ? COUNTER_UPLINK_TAKEN_PORT : COUNTER_UPLINK_PASSED;
}

INLINE enum counter judge_v4(const struct iphdr *ip, const void *end)
{
	struct prefix_v4 prefix;

	/* Nobody can read it: the first buffer of a packet has all of this header, if there is all of it. */
	if ((const void *)(ip + 1) > end)
		return COUNTER_UPLINK_PASSED;
	prefix.bits = 32;
	__builtin_memcpy(prefix.address, &ip->daddr, sizeof(prefix.address));

	if (!map_lookup(&node_v4, prefix.address) && !(is_group_v4(ip->daddr) && is_governed()))
		return map_lookup(&prefixes_v4, &prefix) ? COUNTER_UPLINK_TAKEN_PREFIX : COUNTER_UPLINK_PASSED;
	if (ip->protocol == IPPROTO_IPIP)
		return COUNTER_UPLINK_TAKEN_TUNNEL;
	/* Only the first fragment shows its ports, so all go one way: to the router, which punts those that no flow
	 * claims. */
	if (from_network16(ip->frag_off) & IPV4_FRAGMENT)
		return COUNTER_UPLINK_TAKEN_FRAGMENT;
	if (ip->protocol == IPPROTO_ICMP)
		return COUNTER_UPLINK_TAKEN_ICMP;
	if (ip->ihl < 5)
		return COUNTER_UPLINK_TAKEN_UNREAD;
	return judge_ports(ip->protocol, (const void *)ip + ip->ihl * 4, end);
}

INLINE int is_extension(__u8 next)
{
	return next == NEXT_HOP_BY_HOP || next == NEXT_ROUTING || next == NEXT_DESTINATION;
}

/* Between a link's nodes and routers; never a router's to forward. */
INLINE int is_link_protocol(__u8 type)
{
	return (type >= FIRST_MLD && type <= LAST_MLD) || (type >= FIRST_ND && type <= LAST_ND) ||
	       type == MLD_V2_REPORT;
}

INLINE enum counter judge_v6(const struct ipv6hdr *ip, const void *end)
{
	const struct icmp6hdr *icmp = (const void *)(ip + 1);
	const void *header = ip + 1;
	struct prefix_v6 prefix;
	__u8 next;
	int i;

	if (header > end)
		return COUNTER_UPLINK_PASSED;
	next = ip->nexthdr;
	/* Neighbour discovery is the kernel's, whatever it is about; it is genuine only if no router has passed it on
	 * (RFC 4861, 7.1). */
	if (next == IPPROTO_ICMPV6 && ip->hop_limit == HOP_LIMIT_NEVER_FORWARDED && (const void *)(icmp + 1) <= end &&
	    icmp->icmp6_type >= FIRST_ND && icmp->icmp6_type <= LAST_ND)
		return COUNTER_UPLINK_PASSED;
	prefix.bits = 128;
	__builtin_memcpy(prefix.address, &ip->daddr, sizeof(prefix.address));

	if (!map_lookup(&node_v6, prefix.address) && !(ends_at_link_v6(&ip->daddr) && is_governed()))
		return map_lookup(&prefixes_v6, &prefix) ? COUNTER_UPLINK_TAKEN_PREFIX : COUNTER_UPLINK_PASSED;
	for (i = 0; i < MAX_EXTENSIONS && is_extension(next); i++) {
		const struct ipv6_opt_hdr *extension = header;

		if ((const void *)(extension + 1) > end)
			return COUNTER_UPLINK_TAKEN_UNREAD;
		next = extension->nexthdr;
		header += (extension->hdrlen + 1) * 8;
	}
	if (is_extension(next))
		return COUNTER_UPLINK_TAKEN_UNREAD;
	if (next == NEXT_FRAGMENT)
		return COUNTER_UPLINK_TAKEN_FRAGMENT;
	if (next == IPPROTO_ICMPV6) {
		icmp = header;
		if ((const void *)(icmp + 1) > end)
			return COUNTER_UPLINK_TAKEN_UNREAD;
		return is_link_protocol(icmp->icmp6_type) ? COUNTER_UPLINK_PASSED : COUNTER_UPLINK_TAKEN_ICMP;
	}
	return judge_ports(next, header, end);
}

INLINE int is_tag(__u16 protocol)
{
	return protocol == ETH_P_8021Q || protocol == ETH_P_8021AD;
}

/* Adds the tags in the frame that the packet lies behind to `tags`. What bears the id of a VLAN is not the device's own, but that VLAN's. */
INLINE enum counter judge(const struct ethhdr *ethernet, const void *end, __u32 *tags)
{
	const struct tag *tag = (const void *)(ethernet + 1);
	__u16 protocol;
	int i;

	if ((const void *)tag > end)
		return COUNTER_UPLINK_PASSED;
	protocol = from_network16(ethernet->h_proto);
	for (i = 0; i < MAX_TAGS && is_tag(protocol); i++, tag++) {
		if ((const void *)(tag + 1) > end)
			return COUNTER_UPLINK_TAGS_DROPPED;
		if (from_network16(tag->control) & VLAN_ID)
			return COUNTER_UPLINK_PASSED;
		protocol = from_network16(tag->protocol);
	}
	*tags += i;
	switch (protocol) {
	case ETH_P_IP:
		return judge_v4((const void *)tag, end);
	case ETH_P_IPV6:
		return judge_v6((const void *)tag, end);
	default:
		return is_tag(protocol) ? COUNTER_UPLINK_TAGS_DROPPED : COUNTER_UPLINK_PASSED;
	}
}

/* Whether weir leaves a packet to the kernel. */
INLINE int is_the_kernels(enum counter cause)
{
	return cause == COUNTER_UPLINK_PASSED || cause == COUNTER_UPLINK_PASSED_FAILSAFE;
}

/* Whether the kernel may have what weir owns where no router runs: the node stays reachable by that. The first fragment
 * alone shows which port a packet is for, so where ports are governed, none passes. */
INLINE int passes_unclaimed(enum counter cause)
{
	if (cause == COUNTER_UPLINK_TAKEN_ICMP)
		return 1;
	return cause == COUNTER_UPLINK_TAKEN_FRAGMENT && !is_governed();
}

/* Whether uplink_carry would carry a packet that weir owns. */
INLINE int is_offloaded(const void *data, const void *end, __u32 device, enum counter cause)
{
	const struct ethhdr *ethernet = data;
	const void *header = ethernet + 1;
	struct found found = {};

	if (!offload_is_on || header > end)
		return 0;
	switch (cause) {
	case COUNTER_UPLINK_TAKEN_TUNNEL: {
		const struct iphdr *outer = header;

		return is_plain_tunnel(outer, end) && find(outer + 1, end, 0, device, outer->saddr, &found);
	}
	case COUNTER_UPLINK_TAKEN_PREFIX:
	case COUNTER_UPLINK_TAKEN_PORT:
		if (ethernet->h_proto == from_network16(ETH_P_IP))
			return find(header, end, 0, device, 0, &found);
		return find(header, end, 1, device, 0, &found);
	default:
		return 0;
	}
}

/* Takes priority tags out of the frame: what follows the MAC addresses begins with the last EtherType. */
INLINE int take_tags_off(struct xdp_md *packet, __u32 tags)
{
	void *data = (void *)(long)packet->data;
	__u8 addresses[2 * ETH_ALEN];

	if (data + sizeof(addresses) > (void *)(long)packet->data_end)
		return 0;
	__builtin_memcpy(addresses, data, sizeof(addresses));
	if (adjust_head(packet, tags * sizeof(struct tag)))
		return 0;
	data = (void *)(long)packet->data;
	if (data + sizeof(addresses) > (void *)(long)packet->data_end)
		return 0;
	__builtin_memcpy(data, addresses, sizeof(addresses));
	return 1;
}

SECTION("xdp.frags") int uplink_receive(struct xdp_md *packet)
{
	const void *data = (void *)(long)packet->data, *end = (void *)(long)packet->data_end;
	__u32 tags = 0;
	enum counter cause = judge(data, end, &tags);
	__u64 fallback = XDP_DROP;
	long action;

	if (!tags && is_offloaded(data, end, packet->ingress_ifindex, cause)) {
		count(COUNTER_UPLINK_MERGED);
		return XDP_PASS;
	}
	count(cause);
	if (is_the_kernels(cause))
		return XDP_PASS;
	if (cause == COUNTER_UPLINK_TAGS_DROPPED || (tags && !take_tags_off(packet, tags)))
		return XDP_DROP;
	if (passes_unclaimed(cause))
		fallback = XDP_PASS;
	action = redirect_map(&sockets, packet->rx_queue_index, fallback);
	if (action != XDP_REDIRECT)
		count(fallback == XDP_DROP ? COUNTER_UPLINK_UNCLAIMED_DROPPED : COUNTER_UPLINK_UNCLAIMED_PASSED);
	return action;
}

/* Whether a worker has judged a packet already, and hands it back. */
INLINE int is_returned(struct __sk_buff *packet)
{
	if (packet->tc_index != RETURNED)
		return 0;
	packet->tc_index = 0;
	return 1;
}

/* What a packet is that the kernel has received, and merged with others perhaps; -1: there is no memory for its headers, or for it without
 * its tags. Then it may be weir's, and the kernel could not read it either. What is weir's has no tag any more. */
INLINE int judge_received(struct __sk_buff *packet)
{
	/* Of IPv4 in IPv4, or of IPv6, and of TCP with options, behind tags. */
	__u32 headers = ETH_HLEN + MAX_TAGS * sizeof(struct tag) + sizeof(struct ipv6hdr) + sizeof(struct tcphdr) + 40;
	__u32 tags = 0, i;
	int cause;

	/* The kernel has taken the first tag off. */
	if (packet->vlan_present) {
		if (packet->vlan_tci & VLAN_ID)
			return COUNTER_UPLINK_PASSED;
		tags = 1;
	}
	if (headers > packet->len)
		headers = packet->len;
	if ((void *)(long)packet->data + headers > (void *)(long)packet->data_end && skb_pull_data(packet, headers))
		goto failed;
	cause = judge((void *)(long)packet->data, (void *)(long)packet->data_end, &tags);
	if (is_the_kernels(cause) || cause == COUNTER_UPLINK_TAGS_DROPPED)
		return cause;
	for (i = 0; i < tags && i <= MAX_TAGS; i++)
		if (skb_vlan_pop(packet))
			goto failed;
	return cause;

failed:
	count(COUNTER_OFFLOAD_FAILED);
	return -1;
}

/* Carries a packet that weir owns, if it is one of a flow that was handed over; -1: it is a worker's. */
INLINE int carry_owned(struct __sk_buff *packet, int cause)
{
	if (!offload_is_on)
		return -1;
	switch (cause) {
	case COUNTER_UPLINK_TAKEN_TUNNEL:
		return packet->pkt_type == PACKET_HOST ? carry(packet, 0, 1, packet->ifindex) : -1;
	case COUNTER_UPLINK_TAKEN_PREFIX:
	case COUNTER_UPLINK_TAKEN_PORT:
		return offload(packet, packet->ifindex);
	default:
		return -1;
	}
}

/* On the same device, after uplink_receive has let a packet pass. */
SECTION("classifier") int uplink_carry(struct __sk_buff *packet)
{
	int cause, action;

	if (is_returned(packet) || !offload_is_on)
		return TC_ACT_UNSPEC;
	cause = judge_received(packet);
	if (cause < 0)
		return TC_ACT_SHOT;
	switch (cause) {
	case COUNTER_UPLINK_TAKEN_TUNNEL:
	case COUNTER_UPLINK_TAKEN_PREFIX:
	case COUNTER_UPLINK_TAKEN_PORT:
		action = carry_owned(packet, cause);
		return action >= 0 ? action : to_worker(packet);
	case COUNTER_UPLINK_TAGS_DROPPED:
		count(cause);
		return TC_ACT_SHOT;
	default:
		return TC_ACT_UNSPEC;
	}
}

/* On a device that has no uplink_receive. Its sockets are the trunk's. */
SECTION("classifier") int uplink_take(struct __sk_buff *packet)
{
	int cause, action, may_pass;
	__u32 first = 0;

	if (is_returned(packet))
		return TC_ACT_UNSPEC;
	cause = judge_received(packet);
	if (cause < 0)
		return TC_ACT_SHOT;
	action = carry_owned(packet, cause);
	if (action >= 0)
		return action;
	count(cause);
	if (is_the_kernels(cause))
		return TC_ACT_UNSPEC;
	if (cause == COUNTER_UPLINK_TAGS_DROPPED)
		return TC_ACT_SHOT;
	if (map_lookup(&sockets, &first))
		return to_worker(packet);
	may_pass = passes_unclaimed(cause);
	count(may_pass ? COUNTER_UPLINK_UNCLAIMED_PASSED : COUNTER_UPLINK_UNCLAIMED_DROPPED);
	return may_pass ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}
