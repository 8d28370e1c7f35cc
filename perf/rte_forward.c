/* A loop like DPDK's l3fwd on memory rings, on the packets of weir's case udp-pod (benches/cases.rs).
 *
 * As there, packets of so many flows from each of 32 pods to the next are written into frames (here mbufs) and taken back, 64 at a time, by
 * one thread; what writing and taking cost alone is measured in rounds that alternate, and subtracted. Between the two a burst passes two
 * Ethernet devices over rings (net_ring), one at which it is received and one by which it is sent: weir's memory rings are plain vectors, so
 * these are some nanoseconds that only this side pays.
 *
 * What is done to a packet is what examples/l3fwd does, written for this purpose: it checks that the IPv4 header is whole, and its checksum,
 * looks the destination up (by longest prefix, rte_lpm_lookup_bulk, a route for each pod) or the five fields of the flow (exact match,
 * rte_hash_lookup_bulk_data, an entry for each flow), takes one from the TTL, and writes both MAC addresses. What weir does beyond that for the
 * same packet: it judges where the packet came from (spoofing) and its UDP length, follows the connection in both directions with its timeout
 * and state, holds the generations of policy and services against the entry, counts, keeps the MTU, and knows tunnels, fragments and ICMP errors.
 * So the difference is the price of a stateful router over a stateless one, not of one implementation over another. Usage: rte_forward ROUNDS FLOWS... (perf/dpdk.sh builds and runs it).
 */
#include <inttypes.h>
#include <stdint.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_eth_ring.h>
#include <rte_ethdev.h>
#include <rte_hash.h>
#include <rte_hash_crc.h>
#include <rte_ip.h>
#include <rte_lpm.h>
#include <rte_mbuf.h>
#include <rte_prefetch.h>
#include <rte_udp.h>

#include "figures.h"

#define BURST 64
#define ROUND_BURSTS 16
#define PODS 32
#define FIRST_PORT 16384
#define FRAME_BYTES 60
#define MOST_ROUNDS 100000
#define AHEAD 4

struct key {
	uint32_t src, dst;
	uint16_t sport, dport;
	uint32_t protocol;
};

enum lookup { PREFIX, EXACT };

static struct rte_mempool *pool;
static struct rte_ring *arriving, *leaving;
static uint16_t in_port, out_port;
static struct rte_lpm *routes;
static struct rte_hash *flows_table;
static struct rte_ether_addr macs[PODS];
static const struct rte_ether_addr own_mac = { { 0xee, 0xee, 0xee, 0xee, 0xee, 0xee } };
static uint8_t (*frames)[FRAME_BYTES];
static uint32_t flows, at;
static uint64_t forwarded, lost;

/* As the report writes numbers. */
static const char *flows_text(uint32_t number)
{
	static char text[16];
	if (number >= 1000000)
		snprintf(text, sizeof(text), "%" PRIu32 ",%03" PRIu32 ",%03" PRIu32, number / 1000000, number / 1000 % 1000, number % 1000);
	else if (number >= 1000)
		snprintf(text, sizeof(text), "%" PRIu32 ",%03" PRIu32, number / 1000, number % 1000);
	else
		snprintf(text, sizeof(text), "%" PRIu32, number);
	return text;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, rte_strerror(rte_errno));
	exit(1);
}

static uint32_t pod_address(uint32_t pod)
{
	return RTE_IPV4(10, 1, 1, 10 + pod);
}

static void write_frame(uint8_t *frame, uint32_t flow)
{
	uint32_t pod = flow % PODS;
	struct rte_ether_hdr *ethernet = (struct rte_ether_hdr *)frame;
	struct rte_ipv4_hdr *ip = (struct rte_ipv4_hdr *)(ethernet + 1);
	struct rte_udp_hdr *udp = (struct rte_udp_hdr *)(ip + 1);
	memset(frame, 0, FRAME_BYTES);
	ethernet->dst_addr = own_mac;
	ethernet->src_addr = macs[pod];
	ethernet->ether_type = rte_cpu_to_be_16(RTE_ETHER_TYPE_IPV4);
	ip->version_ihl = RTE_IPV4_VHL_DEF;
	ip->total_length = rte_cpu_to_be_16(FRAME_BYTES - sizeof(*ethernet));
	ip->time_to_live = 64;
	ip->next_proto_id = 17;
	ip->src_addr = rte_cpu_to_be_32(pod_address(pod));
	ip->dst_addr = rte_cpu_to_be_32(pod_address((pod + 1) % PODS));
	ip->hdr_checksum = rte_ipv4_cksum(ip);
	udp->src_port = rte_cpu_to_be_16(FIRST_PORT + flow / PODS);
	udp->dst_port = rte_cpu_to_be_16(5353);
	udp->dgram_len = rte_cpu_to_be_16(FRAME_BYTES - sizeof(*ethernet) - sizeof(*ip));
	udp->dgram_cksum = rte_ipv4_udptcp_cksum(ip, udp);
}

static struct key key_of(const struct rte_ipv4_hdr *ip)
{
	const struct rte_udp_hdr *udp = (const struct rte_udp_hdr *)(ip + 1);
	return (struct key){ ip->src_addr, ip->dst_addr, udp->src_port, udp->dst_port, ip->next_proto_id };
}

static uint16_t open_device(const char *name, struct rte_ring *receive, struct rte_ring *send)
{
	int port = rte_eth_from_rings(name, &receive, 1, &send, 1, SOCKET_ID_ANY);
	struct rte_eth_conf configuration = { 0 };
	if (port < 0 || rte_eth_dev_configure(port, 1, 1, &configuration) != 0 ||
	    rte_eth_rx_queue_setup(port, 0, 512, SOCKET_ID_ANY, NULL, pool) != 0 ||
	    rte_eth_tx_queue_setup(port, 0, 512, SOCKET_ID_ANY, NULL) != 0 || rte_eth_dev_start(port) != 0)
		fail(name);
	return port;
}

static inline bool is_whole(const struct rte_mbuf *packet, const struct rte_ether_hdr *ethernet, const struct rte_ipv4_hdr *ip)
{
	return packet->data_len >= sizeof(*ethernet) + sizeof(*ip) + sizeof(struct rte_udp_hdr) &&
	       ethernet->ether_type == rte_cpu_to_be_16(RTE_ETHER_TYPE_IPV4) && ip->version_ihl == RTE_IPV4_VHL_DEF &&
	       rte_be_to_cpu_16(ip->total_length) >= sizeof(*ip) &&
	       rte_be_to_cpu_16(ip->total_length) + sizeof(*ethernet) <= packet->data_len && ip->time_to_live > 1 &&
	       rte_raw_cksum(ip, sizeof(*ip)) == 0xffff;
}

/* What is measured: from one device to the other. */
static __rte_noinline void forward(enum lookup lookup)
{
	struct rte_mbuf *packets[BURST];
	struct key keys[BURST];
	const void *pointers[BURST];
	uint32_t destinations[BURST], hops[BURST];
	void *data[BURST];
	uint64_t hits = 0;
	uint16_t count = rte_eth_rx_burst(in_port, 0, packets, BURST), kept = 0;
	for (uint16_t i = 0; i < AHEAD && i < count; i++)
		rte_prefetch0(rte_pktmbuf_mtod(packets[i], void *));
	for (uint16_t i = 0; i < count; i++) {
		if (i + AHEAD < count)
			rte_prefetch0(rte_pktmbuf_mtod(packets[i + AHEAD], void *));
		struct rte_ether_hdr *ethernet = rte_pktmbuf_mtod(packets[i], struct rte_ether_hdr *);
		struct rte_ipv4_hdr *ip = (struct rte_ipv4_hdr *)(ethernet + 1);
		if (!is_whole(packets[i], ethernet, ip)) {
			rte_pktmbuf_free(packets[i]);
			continue;
		}
		packets[kept] = packets[i];
		if (lookup == EXACT) {
			keys[kept] = key_of(ip);
			pointers[kept] = &keys[kept];
		} else {
			destinations[kept] = rte_be_to_cpu_32(ip->dst_addr);
		}
		kept++;
	}
	if (lookup == EXACT) {
		rte_hash_lookup_bulk_data(flows_table, pointers, kept, &hits, data);
		for (uint16_t i = 0; i < kept; i++)
			hops[i] = hits >> i & 1 ? (uint32_t)(uintptr_t)data[i] | RTE_LPM_LOOKUP_SUCCESS : 0;
	} else {
		rte_lpm_lookup_bulk(routes, destinations, hops, kept);
	}
	uint16_t sent = 0;
	for (uint16_t i = 0; i < kept; i++) {
		if (!(hops[i] & RTE_LPM_LOOKUP_SUCCESS)) {
			rte_pktmbuf_free(packets[i]);
			continue;
		}
		struct rte_ether_hdr *ethernet = rte_pktmbuf_mtod(packets[i], struct rte_ether_hdr *);
		struct rte_ipv4_hdr *ip = (struct rte_ipv4_hdr *)(ethernet + 1);
		ip->time_to_live--;
		/* RFC 1141, as l3fwd has it. */
		uint32_t sum = ip->hdr_checksum + rte_cpu_to_be_16(0x0100);
		ip->hdr_checksum = sum + (sum >= 0xffff);
		ethernet->dst_addr = macs[hops[i] & (PODS - 1)];
		ethernet->src_addr = own_mac;
		packets[sent++] = packets[i];
	}
	uint16_t taken = rte_eth_tx_burst(out_port, 0, packets, sent);
	forwarded += taken;
	lost += BURST - taken;
}

static double round_of(bool with, enum lookup lookup)
{
	struct rte_mbuf *packets[BURST];
	double start = now_ns();
	for (int burst = 0; burst < ROUND_BURSTS; burst++) {
		if (rte_pktmbuf_alloc_bulk(pool, packets, BURST) != 0)
			fail("mbufs");
		for (int i = 0; i < BURST; i++) {
			memcpy(rte_pktmbuf_mtod(packets[i], void *), frames[at], FRAME_BYTES);
			packets[i]->data_len = packets[i]->pkt_len = FRAME_BYTES;
			at = at + 1 == flows ? 0 : at + 1;
		}
		unsigned int count = BURST;
		if (with) {
			rte_ring_enqueue_burst(arriving, (void **)packets, BURST, NULL);
			forward(lookup);
			count = rte_ring_dequeue_burst(leaving, (void **)packets, BURST, NULL);
		}
		__asm__ volatile("" : : "r"(packets) : "memory");
		rte_pktmbuf_free_bulk(packets, count);
	}
	return (now_ns() - start) / ROUND_BURSTS / BURST;
}

/* That what leaves is what came, one hop on. */
static void check(enum lookup lookup)
{
	struct rte_mbuf *packet;
	for (uint32_t flow = 0; flow < RTE_MIN(flows, 1000u); flow++) {
		if ((packet = rte_pktmbuf_alloc(pool)) == NULL)
			fail("mbufs");
		memcpy(rte_pktmbuf_append(packet, FRAME_BYTES), frames[flow], FRAME_BYTES);
		rte_ring_enqueue(arriving, packet);
		forward(lookup);
		if (rte_ring_dequeue(leaving, (void **)&packet) != 0)
			fail("a packet was not forwarded");
		struct rte_ether_hdr *ethernet = rte_pktmbuf_mtod(packet, struct rte_ether_hdr *);
		struct rte_ipv4_hdr *ip = (struct rte_ipv4_hdr *)(ethernet + 1);
		if (ip->time_to_live != 63 || rte_raw_cksum(ip, sizeof(*ip)) != 0xffff ||
		    !rte_is_same_ether_addr(&ethernet->dst_addr, &macs[(flow % PODS + 1) % PODS])) {
			fprintf(stderr, "flow %" PRIu32 " was forwarded wrongly\n", flow);
			exit(1);
		}
		rte_pktmbuf_free(packet);
	}
	forwarded = lost = 0;
}

static void measure(int rounds)
{
	static double with[MOST_ROUNDS], without[MOST_ROUNDS];
	frames = malloc((size_t)flows * FRAME_BYTES);
	struct rte_hash_parameters parameters = { .name = "flows", .entries = flows + flows / 4 + 64,
		.key_len = sizeof(struct key), .hash_func = rte_hash_crc, .socket_id = SOCKET_ID_ANY };
	flows_table = rte_hash_create(&parameters);
	if (frames == NULL || flows_table == NULL)
		fail("rte_hash_create");
	for (uint32_t flow = 0; flow < flows; flow++) {
		write_frame(frames[flow], flow);
		struct key key = key_of((struct rte_ipv4_hdr *)(frames[flow] + sizeof(struct rte_ether_hdr)));
		if (rte_hash_add_key_data(flows_table, &key, (void *)(uintptr_t)((flow % PODS + 1) % PODS)) != 0)
			fail("rte_hash_add_key_data");
	}
	static const char *names[] = { "l3fwd-like by longest prefix", "l3fwd-like by exact match" };
	for (enum lookup lookup = PREFIX; lookup <= EXACT; lookup++) {
		check(lookup);
		at = 0;
		for (int round = 0; round < rounds; round++) {
			with[round] = round_of(true, lookup);
			without[round] = round_of(false, lookup);
		}
		if (lost != 0 || forwarded != (uint64_t)rounds * ROUND_BURSTS * BURST)
			fail("packets were lost");
		qsort(without, rounds, sizeof(double), ascending);
		char row[32];
		snprintf(row, sizeof(row), "%s flows", flows_text(flows));
		double median = figure("forwarding", row, names[lookup], "ns", with, rounds, without[rounds / 2]);
		printf("%-30s %8" PRIu32 " flows: %5.1f ns per packet (writing and taking: %.1f ns, subtracted)\n", names[lookup],
		       flows, median, without[rounds / 2]);
	}
	rte_hash_free(flows_table);
	free(frames);
}

int main(int argc, char **argv)
{
	int rounds = argc > 2 ? atoi(argv[1]) : 0;
	char *eal[] = { argv[0], "--no-huge", "-m", "1024", "--no-pci", "--no-shconf", "--no-telemetry", "--log-level=*:4", "--lcores=0" };
	if (rounds < 1 || rounds > MOST_ROUNDS || rte_eal_init(RTE_DIM(eal), eal) < 0) {
		fprintf(stderr, "usage: rte_forward ROUNDS FLOWS...\n");
		return 2;
	}
	pool = rte_pktmbuf_pool_create("packets", 2047, 256, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);
	arriving = rte_ring_create("arriving", 512, SOCKET_ID_ANY, RING_F_SP_ENQ | RING_F_SC_DEQ);
	leaving = rte_ring_create("leaving", 512, SOCKET_ID_ANY, RING_F_SP_ENQ | RING_F_SC_DEQ);
	struct rte_lpm_config config = { .max_rules = PODS, .number_tbl8s = 8 };
	routes = rte_lpm_create("pods", SOCKET_ID_ANY, &config);
	if (pool == NULL || arriving == NULL || leaving == NULL || routes == NULL)
		fail("no memory");
	in_port = open_device("in", arriving, arriving);
	out_port = open_device("out", leaving, leaving);
	for (uint32_t pod = 0; pod < PODS; pod++) {
		macs[pod] = (struct rte_ether_addr){ { 2, 0, 0, 0, 1, pod } };
		if (rte_lpm_add(routes, pod_address(pod), 32, pod) != 0)
			fail("rte_lpm_add");
	}
	for (int argument = 2; argument < argc; argument++) {
		flows = strtoul(argv[argument], NULL, 10);
		if (flows < 1 || flows > PODS * 32768)
			fail("FLOWS");
		measure(rounds);
	}
	return 0;
}
