/* SPDX-License-Identifier: Apache-2.0 */
/* What all programs share: the kernel's helpers as far as they are used, and the maps.
 *
 * The helpers are declared here, by the numbers of linux/bpf.h, so that a build needs only clang and the kernel's UAPI
 * headers.
 *
 * Every object carries all maps. They are pinned by name in the router's pin folder, so the objects share them, a
 * restarted router finds them filled, and programs whose router is gone go on reading them. */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <linux/types.h>

#include "counters.h"

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define from_network16(value) __builtin_bswap16(value)
#define from_network32(value) __builtin_bswap32(value)
#else
#define from_network16(value) (value)
#define from_network32(value) (value)
#endif

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))

/* A map is declared as a struct whose BTF the loader reads: a number is the length of an array, a type what a pointer
 * points to. */
#define NUMBER(field, number) int(*field)[number]
#define TYPE(field, type) __typeof__(type) *field
#define PIN_BY_NAME NUMBER(pinning, 1)

static void *(*const map_lookup)(const void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const redirect)(__u32 device, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const redirect_map)(const void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;
static long (*const redirect_peer)(__u32 device, __u64 flags) = (void *)BPF_FUNC_redirect_peer;
static long (*const skb_store_bytes)(struct __sk_buff *packet, __u32 offset, const void *from, __u32 len,
				     __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const skb_vlan_pop)(struct __sk_buff *packet) = (void *)BPF_FUNC_skb_vlan_pop;
static long (*const adjust_head)(struct xdp_md *packet, __s32 bytes) = (void *)BPF_FUNC_xdp_adjust_head;
static long (*const skb_change_type)(struct __sk_buff *packet, __u32 type) = (void *)BPF_FUNC_skb_change_type;

/* First byte of a MAC address that carries a device's index: locally administered, unicast. */
#define ENCODED 0x02
/* What stands for the node's own kernel where a device's index stands for others. */
#define HOST_DEVICE 0
/* Second byte of the source MAC address of what weir has translated for a server of the node. */
#define ANSWERED 1
/* With the index of a device: what the node's kernel received by it and only forwards. */
#define FORWARDED 0x80000000

/* In tc_index, of a packet that a worker has judged and hands back to the uplink that it came by: nothing else that is received has one. */
#define RETURNED 0x7765

/* A workload device, by its index. */
struct workload {
	__u8 mac[ETH_ALEN];
	/* Whether the pod's end of the veth pair lies in another network namespace, which bpf_redirect_peer demands. */
	__u8 peer_elsewhere;
	__u8 zero;
};

/* Keys of the tries: prefix length in bits, then the address in network order. */
struct prefix_v4 {
	__u32 bits;
	__u8 address[4];
};

struct prefix_v6 {
	__u32 bits;
	__u8 address[16];
};

/* The port bitmaps: per set and protocol 65536 bits in words of 64. */
enum port_set { PORTS_OWNED, PORTS_FAILSAFE, PORT_SETS };
enum port_protocol { PORTS_TCP, PORTS_UDP, PORTS_SCTP, PORT_PROTOCOLS };
#define PORT_WORDS (65536 / 64)

/* A port of one of the node's own addresses, both in network order. */
struct own_port_v4 {
	__u8 address[4];
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

struct own_port_v6 {
	__u8 address[16];
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

#define MAX_QUEUES 256
#define MAX_WORKLOADS 4096
#define MAX_NODE_ADDRESSES 4096
#define MAX_PREFIXES 262144
#define MAX_OWN_PORTS 262144
/* More than are used, so that a counter can be added without a new map. */
#define COUNTER_SLOTS 64

/* The sockets of one device by queue. Not shared: each load gets a pin of its own (sockets_trunk, sockets_INDEX). */
struct {
	NUMBER(type, BPF_MAP_TYPE_XSKMAP);
	TYPE(key, __u32);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_QUEUES);
	PIN_BY_NAME;
} sockets SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	TYPE(key, __u32);
	TYPE(value, __u64);
	NUMBER(max_entries, COUNTER_SLOTS);
	PIN_BY_NAME;
} counters SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, __u32);
	TYPE(value, struct workload);
	NUMBER(max_entries, MAX_WORKLOADS);
	PIN_BY_NAME;
} workloads SECTION(".maps");

/* A trie must have a value; being in it is what counts. */
struct {
	NUMBER(type, BPF_MAP_TYPE_LPM_TRIE);
	TYPE(key, struct prefix_v4);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_PREFIXES);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} prefixes_v4 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_LPM_TRIE);
	TYPE(key, struct prefix_v6);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_PREFIXES);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} prefixes_v6 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, __u8[4]);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_NODE_ADDRESSES);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} node_v4 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, __u8[16]);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_NODE_ADDRESSES);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} node_v6 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	TYPE(key, __u32);
	TYPE(value, __u64);
	NUMBER(max_entries, PORT_SETS * PORT_PROTOCOLS * PORT_WORDS);
	PIN_BY_NAME;
} ports SECTION(".maps");

/* Slot 0: whether a host endpoint governs what the node itself gets. */
struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	TYPE(key, __u32);
	TYPE(value, __u64);
	NUMBER(max_entries, 1);
	PIN_BY_NAME;
} governed SECTION(".maps");

/* Ports of the node's own addresses, loopback ones too, that are weir's also where the node asks for them. */
struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, struct own_port_v4);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_OWN_PORTS);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} own_ports_v4 SECTION(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	TYPE(key, struct own_port_v6);
	TYPE(value, __u32);
	NUMBER(max_entries, MAX_OWN_PORTS);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	PIN_BY_NAME;
} own_ports_v6 SECTION(".maps");

/* Slot 0: the inode number of the network namespace that the pins belong to. No program reads it. */
struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	TYPE(key, __u32);
	TYPE(value, __u64);
	NUMBER(max_entries, 1);
	PIN_BY_NAME;
} identity SECTION(".maps");

INLINE void count(__u32 counter)
{
	__u64 *value = map_lookup(&counters, &counter);

	if (value)
		++*value;
}

/* The index of weir0; the loader fills it in. */
volatile const __u32 trunk_device;

/* Writes where a packet came from into its destination MAC. */
INLINE long mark(struct __sk_buff *packet, __u32 type, __u32 device)
{
	__u8 destination[ETH_ALEN] = {
		ENCODED, type, device >> 24, device >> 16, device >> 8, device,
	};

	return skb_store_bytes(packet, 0, destination, sizeof(destination), 0);
}

/* Sends a packet into the trunk, with the device that it came by in its destination MAC, which is of no more use than to
 * know how the frame was addressed: that the kernel has found out already. */
INLINE int to_worker(struct __sk_buff *packet)
{
	return mark(packet, packet->pkt_type, packet->ifindex) ? TC_ACT_SHOT : redirect(trunk_device, 0);
}

char program_license[] SECTION("license") = "Apache-2.0";
