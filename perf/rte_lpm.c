/* DPDK's rte_lpm on the routes and addresses of dataplane/benches/routes.rs.
 *
 * Routes are random prefixes of 16 to 28 bits; half of the addresses are within one of them. Looked up are 4096 addresses, one by one and by
 * rte_lpm_lookup_bulk in bursts of 32. The sum over all answers is printed, and is the same as there. rte_lpm is a table of 2^24 places with
 * second tables behind: one or two accesses, and 64 MiB. Usage: rte_lpm LARGEST ROUNDS (perf/dpdk.sh builds and runs it).
 */
#include <inttypes.h>
#include <stdint.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_lpm.h>

#include "figures.h"

#define ADDRESSES 4096
#define BURST 32
#define PASSES 16
#define MOST_ROUNDS 256

static uint64_t random_state;

static uint32_t below(uint64_t limit)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(((random_state >> 32) * limit) >> 32);
}

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, rte_strerror(rte_errno));
	exit(1);
}

static void measure(uint32_t routes, int rounds)
{
	struct rte_lpm_config config = { .max_rules = routes, .number_tbl8s = 65536 };
	struct rte_lpm *lpm = rte_lpm_create("routes", SOCKET_ID_ANY, &config);
	uint32_t *networks = malloc(routes * sizeof(uint32_t));
	if (lpm == NULL || networks == NULL)
		fail("rte_lpm_create");
	random_state = 7;
	for (uint32_t number = 0; number < routes; number++) {
		uint32_t address = below(1ull << 32), depth = 16 + below(13), other;
		networks[number] = address & (UINT32_MAX << (32 - depth));
		/* Of equal prefixes the first counts. */
		if (rte_lpm_is_rule_present(lpm, networks[number], depth, &other) == 0 &&
		    rte_lpm_add(lpm, networks[number], depth, number + 1) != 0)
			fail("rte_lpm_add");
	}
	static uint32_t addresses[ADDRESSES], answers[ADDRESSES];
	uint64_t sum = 0;
	for (int i = 0; i < ADDRESSES; i++) {
		uint32_t anywhere = below(1ull << 32), number = below(routes), within = below(16);
		addresses[i] = i % 2 ? anywhere : networks[number] + within;
		uint32_t hop = 0;
		if (rte_lpm_lookup(lpm, addresses[i], &hop) == 0)
			sum += hop;
	}
	double single[MOST_ROUNDS], bulk[MOST_ROUNDS];
	for (int round = 0; round < rounds; round++) {
		double start = now_ns();
		for (int pass = 0; pass < PASSES; pass++)
			for (int i = 0; i < ADDRESSES; i++)
				rte_lpm_lookup(lpm, addresses[i], &answers[i]);
		single[round] = (now_ns() - start) / (PASSES * ADDRESSES);
		__asm__ volatile("" : : "r"(answers) : "memory");
		start = now_ns();
		for (int pass = 0; pass < PASSES; pass++)
			for (int i = 0; i < ADDRESSES; i += BURST)
				rte_lpm_lookup_bulk(lpm, &addresses[i], &answers[i], BURST);
		bulk[round] = (now_ns() - start) / (PASSES * ADDRESSES);
		__asm__ volatile("" : : "r"(answers) : "memory");
	}
	char row[32];
	snprintf(row, sizeof(row), "%" PRIu32, routes);
	double one = figure("routes", row, "rte_lpm", "ns", single, rounds, 0);
	double burst = figure("routes", row, "rte_lpm in bursts of 32", "ns", bulk, rounds, 0);
	printf("rte_lpm %7s routes: %5.1f ns one by one, %5.1f ns in bursts of %d, answers sum to %" PRIu64 "\n", row, one, burst, BURST, sum);
	rte_lpm_free(lpm);
	free(networks);
}

int main(int argc, char **argv)
{
	uint32_t largest = argc > 1 ? strtoul(argv[1], NULL, 10) : 100000;
	int rounds = argc > 2 ? atoi(argv[2]) : 51;
	if (rounds < 1 || rounds > MOST_ROUNDS)
		return 2;
	char *eal[] = { argv[0], "--no-huge", "-m", "512", "--no-pci", "--no-shconf", "--no-telemetry", "--log-level=*:4", "--lcores=0" };
	if (rte_eal_init(RTE_DIM(eal), eal) < 0)
		fail("rte_eal_init");
	for (uint32_t routes = 10; routes <= largest; routes *= 10)
		measure(routes, rounds);
	return 0;
}
