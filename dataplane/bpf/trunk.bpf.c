/* SPDX-License-Identifier: Apache-2.0 */
/* The trunk: how packets of workloads and of the node's own kernel get to weir's sockets on weir1, and back.
 *
 *   pod -> its veth -> workload_send -> another pod, if the packet is one of a flow that was handed over (offload.h)
 *   pod -> its veth -> workload_send ----> weir0 => weir1 -> trunk_receive -> AF_XDP socket
 *          a process of the node (routes) -> host_send -> pod, likewise
 *          node's kernel (routes) -> host_send ->  weir0, marked as the node's own or as forwarded
 *          node's kernel -> lo -> loopback_send -> weir0, to ports of the node that are weir's
 *          a device of the kernel's own -> device_take -> weir0, likewise, marked as forwarded
 *          a server of the node -> answer_send -> weir0, on its way out, where weir has translated what it answers
 *   pod <- its veth <- trunk_deliver <---  weir0 <= weir1 <-------------------AF_XDP socket
 *          node's kernel <-- (pass) <----
 *          node's kernel <- uplink  <----   groups' packets and others of the uplink's link
 *
 * Everything here fails closed: without a router there is no socket, and what pods send ends in trunk_receive. */
#include "node.h"
#include "offload.h"

#include <linux/if_packet.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

/* The index of lo is the same in every network namespace (LOOPBACK_IFINDEX, include/net/net_namespace.h). */
#define LOOPBACK_DEVICE 1

#define VLAN_ID 0x0fff

static long (*const change_head)(struct __sk_buff *packet, __u32 bytes, __u64 flags) = (void *)BPF_FUNC_skb_change_head;

/* Bytes of the largest IP packet that weir0 carries; the loader fills it in. */
volatile const __u32 trunk_mtu;

SECTION("xdp.frags") int trunk_receive(struct xdp_md *packet)
{
	long action = redirect_map(&sockets, packet->rx_queue_index, XDP_DROP);

	count(action == XDP_REDIRECT ? COUNTER_TRUNK_TAKEN : COUNTER_TRUNK_UNCLAIMED);
	return action;
}

/* On the host's end of a workload's veth pair. */
SECTION("classifier") int workload_send(struct __sk_buff *packet)
{
	int action = offload(packet, packet->ifindex);

	if (action >= 0)
		return action;
	count(COUNTER_WORKLOAD_SENT);
	return to_worker(packet);
}

/* On weir0, of what leaves by it: also what workload_send has sent there.
 *
 * What the node's kernel sends gets a mark in its destination MAC, which is of no other use: whether a process of the node made it, or by
 * which device it came that is only forwarded. Packets that are received have that device in skb_iif, which a bridge, a VLAN and a tunnel
 * device set anew and which fragments inherit; those that are made here have 0, answers of the kernel among them. Who meets no mark knows
 * nothing of the packet's maker, and takes it for a forwarded one. */
SECTION("classifier") int host_send(struct __sk_buff *packet)
{
	struct ethhdr *ethernet = (void *)(long)packet->data;
	__u32 device = packet->ingress_ifindex;

	if ((void *)(ethernet + 1) > (void *)(long)packet->data_end)
		return TC_ACT_SHOT;
	if (ethernet->h_dest[0] == ENCODED)
		return TC_ACT_UNSPEC;
	if (device) {
		device |= FORWARDED;
	} else if (offload_is_on) {
		int action = offload(packet, HOST_DEVICE);

		if (action >= 0)
			return action;
	}
	return mark(packet, PACKET_HOST, device) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* Whether a packet, or each of the segments that it is to be cut into, is longer than the trunk carries. (The kernel's own helper for it is for
 * programs under the GPL.) */
INLINE int is_too_long(const struct __sk_buff *packet)
{
	const __u32 least_headers = sizeof(struct iphdr) + sizeof(struct udphdr);

	if (packet->gso_size)
		return packet->gso_size + least_headers > trunk_mtu;
	return packet->len > trunk_mtu + ETH_HLEN;
}

/* On lo, of what leaves by it: all that the node sends to its own addresses, which no route can lead elsewhere. Its frames have the MAC
 * address zero on both sides, which says on the trunk that they are the kernel's.
 *
 * What is longer than the trunk carries, whole or in segments, stays the kernel's, which has its own socket there or says that it has none:
 * weir0 would drop it, and nobody would be told. */
SECTION("classifier") int loopback_send(struct __sk_buff *packet)
{
	const struct ethhdr *ethernet = (void *)(long)packet->data;
	const void *end = (void *)(long)packet->data_end;

	if ((const void *)(ethernet + 1) > end || !is_for_own_port(ethernet->h_proto, ethernet + 1, end, 1))
		return TC_ACT_UNSPEC;
	if (is_too_long(packet))
		return TC_ACT_UNSPEC;
	count(COUNTER_LOOPBACK_TAKEN);
	return redirect(trunk_device, 0);
}

/* Gives a packet of a device without link headers an Ethernet header, for the trunk. */
INLINE int add_ethernet(struct __sk_buff *packet)
{
	struct ethhdr header = { .h_proto = packet->protocol };

	return change_head(packet, sizeof(header), 0) || skb_store_bytes(packet, 0, &header, sizeof(header), 0);
}

/* Of what a device of the kernel's own receives, which is no uplink: frontends on addresses of the node that no route leads to weir, as the
 * kernel has those addresses itself. It goes to a worker as what the kernel forwards. What bears the tag of a VLAN is that VLAN's device's, and
 * what is not addressed to this one is nobody's here. */
INLINE int take_from_device(struct __sk_buff *packet, __u32 link_header)
{
	/* Headers and ports. Where a driver left less in the packet's first buffer. */
	__u32 headers = link_header + sizeof(struct ipv6hdr) + sizeof(struct udphdr);

	if (packet->pkt_type != PACKET_HOST || (packet->vlan_present && packet->vlan_tci & VLAN_ID))
		return TC_ACT_UNSPEC;
	if (headers > packet->len)
		headers = packet->len;
	if ((void *)(long)packet->data + headers > (void *)(long)packet->data_end && skb_pull_data(packet, headers))
		return TC_ACT_SHOT;
	if (!is_for_own_port(packet->protocol, (void *)(long)packet->data + link_header, (void *)(long)packet->data_end, 0))
		return TC_ACT_UNSPEC;
	if (is_too_long(packet))
		return TC_ACT_UNSPEC;
	if (!link_header && add_ethernet(packet))
		return TC_ACT_SHOT;
	count(COUNTER_DEVICE_TAKEN);
	return mark(packet, PACKET_HOST, packet->ifindex | FORWARDED) ? TC_ACT_SHOT : redirect(trunk_device, 0);
}

SECTION("classifier") int device_take(struct __sk_buff *packet)
{
	return take_from_device(packet, ETH_HLEN);
}

/* On a device without link headers, such as a VPN's. */
SECTION("classifier") int device_take_bare(struct __sk_buff *packet)
{
	return take_from_device(packet, 0);
}

/* Of what the node itself sends by a device: answers that only weir can give the name that was asked. */
INLINE int take_answer(struct __sk_buff *packet, __u32 link_header)
{
	const void *ip = (void *)(long)packet->data + link_header;

	if (packet->ingress_ifindex || !is_answer(packet->protocol, ip, (void *)(long)packet->data_end))
		return TC_ACT_UNSPEC;
	if (!link_header && add_ethernet(packet))
		return TC_ACT_SHOT;
	count(COUNTER_ANSWER_TAKEN);
	return mark(packet, PACKET_HOST, HOST_DEVICE) ? TC_ACT_SHOT : redirect(trunk_device, 0);
}

/* On uplinks and devices of the kernel's own, of what leaves by them. */
SECTION("classifier") int answer_send(struct __sk_buff *packet)
{
	return take_answer(packet, ETH_HLEN);
}

SECTION("classifier") int answer_send_bare(struct __sk_buff *packet)
{
	return take_answer(packet, 0);
}

/* Whether it is an IPv6 packet with the source ::1: an answer, by way of a host port. */
INLINE int is_from_loopback_v6(const struct ethhdr *ethernet, const void *end)
{
	const struct ipv6hdr *ip = (const void *)(ethernet + 1);

	if (ethernet->h_proto != from_network16(ETH_P_IPV6) || (const void *)(ip + 1) > end)
		return 0;
	return is_loopback_v6(ip->saddr.in6_u.u6_addr8);
}

/* Hands a packet to the kernel on lo: from no other device does it take ::1 (RFC 4291, 2.5.3). For IPv4 it has a sysctl. */
INLINE int to_loopback(struct __sk_buff *packet)
{
	__u8 nobody[ETH_ALEN] = {};

	if (skb_store_bytes(packet, 0, nobody, sizeof(nobody), 0))
		return TC_ACT_SHOT;
	return redirect(LOOPBACK_DEVICE, BPF_F_INGRESS);
}

/* On weir0. */
SECTION("classifier") int trunk_deliver(struct __sk_buff *packet)
{
	struct ethhdr *ethernet = (void *)(long)packet->data;
	struct workload *workload;
	int from_loopback;
	__u8 *source;
	__u32 device;

	if ((void *)(ethernet + 1) > (void *)(long)packet->data_end)
		return TC_ACT_SHOT;
	from_loopback = is_from_loopback_v6(ethernet, (void *)(long)packet->data_end);
	/* weir1's peer has a MAC of its own, so the kernel took the frame for somebody else's. */
	if (skb_change_type(packet, PACKET_HOST))
		return TC_ACT_SHOT;
	source = ethernet->h_source;
	device = (__u32)source[2] << 24 | (__u32)source[3] << 16 | (__u32)source[4] << 8 | source[5];
	if (source[0] != ENCODED || source[1] || !device) {
		if (source[0] == ENCODED && source[1] == ANSWERED)
			remember_answered(ethernet->h_proto, ethernet + 1, (void *)(long)packet->data_end);
		count(COUNTER_DELIVERED_HOST);
		return from_loopback ? to_loopback(packet) : TC_ACT_OK;
	}
	/* For the node by an address that is good on one link only: of another device the kernel would not take it. */
	if (device & FORWARDED) {
		packet->tc_index = RETURNED;
		count(COUNTER_DELIVERED_HOST);
		return redirect(device & ~FORWARDED, BPF_F_INGRESS);
	}
	workload = map_lookup(&workloads, &device);
	if (!workload) {
		count(COUNTER_DELIVERED_NOWHERE);
		return TC_ACT_SHOT;
	}
	if (skb_store_bytes(packet, ETH_ALEN, workload->mac, ETH_ALEN, 0))
		return TC_ACT_SHOT;
	count(COUNTER_DELIVERED_WORKLOAD);
	return workload->peer_elsewhere ? redirect_peer(device, 0) : redirect(device, 0);
}
