/* SPDX-License-Identifier: Apache-2.0 */
/* The trunk: how packets of workloads and of the node's own kernel get to weir's sockets on weir1, and back.
 *
 *   pod -> its veth -> workload_send -> another pod, if the packet is one of a flow that was handed over (offload.h)
 *   pod -> its veth -> workload_send ----> weir0 => weir1 -> trunk_receive -> AF_XDP socket
 *          node's kernel (routes) -> host_send -> pod, likewise
 *          node's kernel (routes) -> host_send ->  weir0
 *   pod <- its veth <- trunk_deliver <---  weir0 <= weir1 <-------------------AF_XDP socket
 *          node's kernel <-- (pass) <----
 *
 * Everything here fails closed: without a router there is no socket, and what pods send ends in trunk_receive. */
#include "offload.h"

#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

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

/* On weir0, of what leaves by it: also what workload_send has sent there. */
SECTION("classifier") int host_send(struct __sk_buff *packet)
{
	struct ethhdr *ethernet = (void *)(long)packet->data;
	int action;

	if (!offload_is_on || (void *)(ethernet + 1) > (void *)(long)packet->data_end || ethernet->h_dest[0] == ENCODED)
		return TC_ACT_UNSPEC;
	action = offload(packet, HOST_DEVICE);
	return action >= 0 ? action : TC_ACT_UNSPEC;
}

/* On weir0. */
SECTION("classifier") int trunk_deliver(struct __sk_buff *packet)
{
	struct ethhdr *ethernet = (void *)(long)packet->data;
	struct workload *workload;
	__u8 *source;
	__u32 device;

	if ((void *)(ethernet + 1) > (void *)(long)packet->data_end)
		return TC_ACT_SHOT;
	/* weir1's peer has a MAC of its own, so the kernel took the frame for somebody else's. */
	if (skb_change_type(packet, PACKET_HOST))
		return TC_ACT_SHOT;
	source = ethernet->h_source;
	device = (__u32)source[2] << 24 | (__u32)source[3] << 16 | (__u32)source[4] << 8 | source[5];
	if (source[0] != ENCODED || source[1] || !device) {
		count(COUNTER_DELIVERED_HOST);
		return TC_ACT_OK;
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
