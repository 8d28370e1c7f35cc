/* DPDK's rte_acl on the rules and packets of policy/benches/classify.rs.
 *
 * A fifth of the rules are CIDRs, the others ten pods each, which here have neighbouring addresses and so are one range; each rule
 * has a protocol and a port. Looked up are 4096 packets, one by one as weir judges them, and in bursts of 32, which is what
 * rte_acl is made for. Every verdict is compared with a linear scan first. Usage: rte_acl LARGEST ROUNDS (perf/dpdk.sh
 * builds and runs it).
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_acl.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_malloc.h>

#include "figures.h"

#define PACKETS 4096
#define BURST 32
#define PASSES 64
#define TCP 6

struct packet {
	uint8_t protocol;
	uint8_t unused[3];
	uint32_t source;
	uint16_t source_port;
	uint16_t port;
};

enum { PROTOCOL, SOURCE, SOURCE_PORT, PORT, FIELDS };

RTE_ACL_RULE_DEF(acl_rule, FIELDS);

struct rule {
	uint32_t low, high;
	uint16_t port;
};

static const struct rte_acl_field_def definitions[FIELDS] = {
	{.type = RTE_ACL_FIELD_TYPE_BITMASK, .size = 1, .field_index = PROTOCOL, .input_index = 0,
	 .offset = offsetof(struct packet, protocol)},
	{.type = RTE_ACL_FIELD_TYPE_RANGE, .size = 4, .field_index = SOURCE, .input_index = 1,
	 .offset = offsetof(struct packet, source)},
	{.type = RTE_ACL_FIELD_TYPE_RANGE, .size = 2, .field_index = SOURCE_PORT, .input_index = 2,
	 .offset = offsetof(struct packet, source_port)},
	{.type = RTE_ACL_FIELD_TYPE_RANGE, .size = 2, .field_index = PORT, .input_index = 2,
	 .offset = offsetof(struct packet, port)},
};

static uint64_t random_state = 7;

static uint32_t below(uint32_t limit)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)((random_state >> 33) % limit);
}

static struct rule rule_of(uint32_t number)
{
	uint16_t port = 8000 + number % 50;
	if (number % 5 == 0)
		return (struct rule){0xc0000000u + (number << 8), 0xc00000ffu + (number << 8), port};
	return (struct rule){0x0a000001u + 10 * number, 0x0a00000au + 10 * number, port};
}

static size_t allocated(void)
{
	struct rte_malloc_socket_stats stats;
	rte_malloc_get_socket_stats(0, &stats);
	return stats.heap_allocsz_bytes;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, rte_strerror(rte_errno));
	exit(1);
}

static void measure(uint32_t rules, int rounds)
{
	struct rte_acl_param parameters = {
		.name = "rules", .socket_id = SOCKET_ID_ANY, .rule_size = RTE_ACL_RULE_SZ(FIELDS), .max_rule_num = rules};
	struct rte_acl_ctx *context = rte_acl_create(&parameters);
	if (context == NULL)
		fail("rte_acl_create");
	for (uint32_t number = 0; number < rules; number++) {
		struct rule rule = rule_of(number);
		struct acl_rule added = {
			.data = {.category_mask = 1, .priority = (int32_t)(RTE_ACL_MAX_PRIORITY - number), .userdata = number + 1}};
		added.field[PROTOCOL].value.u8 = TCP;
		added.field[PROTOCOL].mask_range.u8 = 0xff;
		added.field[SOURCE].value.u32 = rule.low;
		added.field[SOURCE].mask_range.u32 = rule.high;
		added.field[SOURCE_PORT].value.u16 = 0;
		added.field[SOURCE_PORT].mask_range.u16 = 0xffff;
		added.field[PORT].value.u16 = rule.port;
		added.field[PORT].mask_range.u16 = rule.port;
		if (rte_acl_add_rules(context, (struct rte_acl_rule *)&added, 1) != 0)
			fail("rte_acl_add_rules");
	}
	size_t before = allocated();
	struct rte_acl_config configuration = {.num_categories = 1, .num_fields = FIELDS};
	memcpy(configuration.defs, definitions, sizeof(definitions));
	double start = now_ns();
	int error = rte_acl_build(context, &configuration);
	double build = now_ns() - start;
	if (error != 0) {
		printf("%7u rules: cannot be built: %s\n", rules, strerror(-error));
		rte_acl_free(context);
		return;
	}
	size_t memory = allocated() - before;

	static struct packet packets[PACKETS];
	static const uint8_t *data[PACKETS];
	static uint32_t results[PACKETS];
	random_state = 7;
	for (uint32_t index = 0; index < PACKETS; index++) {
		uint32_t number = below(rules);
		uint32_t source = number % 5 == 0 ? 0xc0000000u + (number << 8) + below(256) : 0x0a000001u + 10 * number + below(10);
		uint16_t port = 8000 + (number + index % 2) % 50;
		packets[index] = (struct packet){.protocol = TCP, .source = rte_cpu_to_be_32(source),
			.source_port = rte_cpu_to_be_16(40000), .port = rte_cpu_to_be_16(port)};
		data[index] = (const uint8_t *)&packets[index];
		uint32_t expected = 0;
		for (uint32_t other = 0; other < rules && expected == 0; other++) {
			struct rule rule = rule_of(other);
			if (rule.low <= source && source <= rule.high && rule.port == port)
				expected = other + 1;
		}
		rte_acl_classify(context, &data[index], &results[index], 1, 1);
		if (results[index] != expected) {
			fprintf(stderr, "packet %u: rule %u, not %u\n", index, results[index], expected);
			exit(1);
		}
	}

	double single[64], burst[64];
	for (int round = 0; round < rounds; round++) {
		start = now_ns();
		for (int pass = 0; pass < PASSES; pass++)
			for (int index = 0; index < PACKETS; index++)
				rte_acl_classify(context, &data[index], &results[index], 1, 1);
		single[round] = (now_ns() - start) / (PASSES * PACKETS);
		start = now_ns();
		for (int pass = 0; pass < PASSES; pass++)
			for (int index = 0; index < PACKETS; index += BURST)
				rte_acl_classify(context, &data[index], &results[index], BURST, 1);
		burst[round] = (now_ns() - start) / (PASSES * PACKETS);
	}
	char row[32];
	snprintf(row, sizeof(row), "%u rules", rules);
	double one = figure("policy", row, "rte_acl", "ns", single, rounds, 0);
	double many = figure("policy", row, "rte_acl in bursts of 32", "ns", burst, rounds, 0);
	printf("%7u rules: %6.1f ns alone, %6.1f ns in bursts of %d, built in %.1f ms, %zu KiB\n", rules, one, many, BURST,
	       build / 1e6, memory / 1024);
	rte_acl_free(context);
}

int main(int argc, char **argv)
{
	uint32_t largest = argc > 1 ? strtoul(argv[1], NULL, 10) : 100000;
	int rounds = argc > 2 ? atoi(argv[2]) : 7;
	if (rounds < 1 || rounds > 64)
		return 2;
	char *arguments[] = {argv[0], "--no-huge", "-m", "2048", "--no-pci", "--no-telemetry", "--log-level=*:4", "--lcores=0"};
	if (rte_eal_init(RTE_DIM(arguments), arguments) < 0)
		fail("rte_eal_init");
	for (uint32_t rules = 10; rules <= largest; rules *= 10)
		measure(rules, rounds);
	return 0;
}
