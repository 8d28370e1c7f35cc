/* SPDX-License-Identifier: Apache-2.0 */
/* What the programs count, one slot of the map `counters` each. src/attach/counters.rs names the same in the same
 * order, and a test compares the two. Append only: the map is pinned and outlives the programs. */
#pragma once

enum counter {
	/* The trunk: what came to weir1. */
	COUNTER_TRUNK_TAKEN,
	COUNTER_TRUNK_UNCLAIMED,
	/* Workload devices: what a pod sent, redirected into weir0. */
	COUNTER_WORKLOAD_SENT,
	/* weir0: what weir sent on weir1. */
	COUNTER_DELIVERED_WORKLOAD,
	COUNTER_DELIVERED_HOST,
	COUNTER_DELIVERED_NOWHERE,
	/* Uplinks: by cause; the two last are those of the taken that found no socket. */
	COUNTER_UPLINK_PASSED,
	COUNTER_UPLINK_PASSED_FAILSAFE,
	COUNTER_UPLINK_TAKEN_PREFIX,
	COUNTER_UPLINK_TAKEN_PORT,
	COUNTER_UPLINK_TAKEN_TUNNEL,
	COUNTER_UPLINK_TAKEN_ICMP,
	COUNTER_UPLINK_TAKEN_FRAGMENT,
	COUNTER_UPLINK_UNCLAIMED_DROPPED,
	COUNTER_UPLINK_UNCLAIMED_PASSED,
	/* Flows in the kernel: packets carried; packets of such flows left to the workers, because of what they are or
	 * because something was published since. */
	COUNTER_OFFLOADED,
	COUNTER_OFFLOAD_UNUSUAL,
	COUNTER_OFFLOAD_STALE,
	/* Uplinks: left to the kernel's GRO, before they are carried. */
	COUNTER_UPLINK_MERGED,
	/* Packets of such flows lost: the kernel had no memory to change them. */
	COUNTER_OFFLOAD_FAILED,
	/* lo: what the node sent to ports of its own that are weir's. */
	COUNTER_LOOPBACK_TAKEN,
	/* Uplinks: to the node, with headers that the programs do not find or that are not whole: a worker's. */
	COUNTER_UPLINK_TAKEN_UNREAD,
	/* Uplinks: dropped, behind more priority tags than are looked through. */
	COUNTER_UPLINK_TAGS_DROPPED,
	/* Devices of the kernel's own: what came for ports of the node that are weir's. */
	COUNTER_DEVICE_TAKEN,
	/* What servers of the node sent by uplinks and by these, in answer to what weir has translated. */
	COUNTER_ANSWER_TAKEN,
};
