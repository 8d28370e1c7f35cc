/* DPDK's rte_hash on the keys of conntrack/benches/beside.rs, in its lock-free mode with RCU.
 *
 * Each connection has two keys of 16 bytes (source, destination, ports, protocol), both of which hold its number; its 64 bytes lie in an
 * array. Lookups are made in bursts of 32 with rte_hash_lookup_bulk, which prefetches. One line per figure, nanoseconds per
 * operation and thread, median of the rounds. Usage: rte_hash LARGEST ROUNDS MILLISECONDS (perf/dpdk.sh builds and runs it).
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_hash.h>
#include <rte_hash_crc.h>
#include <rte_lcore.h>
#include <rte_malloc.h>
#include <rte_rcu_qsbr.h>

#include "figures.h"

#define BURST 32
#define CHURN 1024
#define ROOM (16 * CHURN)
#define THREADS 2

struct key {
	uint32_t src, dst;
	uint16_t sport, dport;
	uint32_t protocol;
};

struct conn {
	uint32_t word;
} __attribute__((aligned(64)));

enum work { HIT, MISS, CHURNING };

static struct rte_hash *table;
static struct rte_rcu_qsbr *qsbr;
static struct conn *conns;
static uint32_t flows, *order;
static volatile bool stop;
static pthread_barrier_t barrier;

static void keys_of(uint32_t client, uint32_t protocol, struct key out[2])
{
	uint32_t src = 0x0a000000 | client >> 8, dst = 0x0a60000a;
	uint16_t port = 20000 + (client & 0xff);
	out[0] = (struct key){ src, dst, port, 53, protocol };
	out[1] = (struct key){ 0x0af40102, src, 53, port, protocol };
}

static void insert(uint32_t client, unsigned int thread)
{
	struct key keys[2];
	uint32_t conn = client % (flows + ROOM);
	keys_of(client, 17, keys);
	conns[conn].word = client;
	for (int i = 0; i < 2; i++) {
		int result;
		/* Full while what was removed waits for the other thread. */
		while ((result = rte_hash_add_key_data(table, &keys[i], (void *)(uintptr_t)conn)) == -ENOSPC) {
			rte_rcu_qsbr_quiescent(qsbr, thread);
			sched_yield();
		}
		if (result != 0) {
			fprintf(stderr, "add: %s\n", rte_strerror(-result));
			exit(1);
		}
	}
}

static void erase(uint32_t client)
{
	struct key keys[2];
	keys_of(client, 17, keys);
	for (int i = 0; i < 2; i++)
		rte_hash_del_key(table, &keys[i]);
}

struct job {
	enum work work;
	unsigned int number;
	double length_ns, taken;
};

static void *run_job(void *argument)
{
	struct job *job = argument;
	uint32_t sum = 0, bursts = flows / BURST, at = job->number * bursts / 2;
	uint32_t first = flows + job->number * CHURN, added = 0, removed = 0;
	uint64_t operations = 0;
	/* The table keeps free places per lcore, so the thread needs to be one. */
	if (rte_thread_register() != 0) {
		fprintf(stderr, "no lcore: %s\n", rte_strerror(rte_errno));
		exit(1);
	}
	rte_rcu_qsbr_thread_register(qsbr, job->number);
	rte_rcu_qsbr_thread_online(qsbr, job->number);
	if (job->work == CHURNING)
		for (; added < CHURN / 2; added++)
			insert(first + added, job->number);
	pthread_barrier_wait(&barrier);
	double begin = now_ns();
	while (!stop) {
		if (job->work == CHURNING) {
			for (int i = 0; i < BURST; i++)
				insert(first + added++ % CHURN, job->number);
			for (int i = 0; i < BURST; i++)
				erase(first + removed++ % CHURN);
		} else {
			struct key keys[BURST][2];
			const void *pointers[BURST];
			void *data[BURST];
			uint64_t hits = 0;
			for (int i = 0; i < BURST; i++) {
				keys_of(order[at * BURST + i], job->work == HIT ? 17 : 132, keys[i]);
				pointers[i] = &keys[i][0];
			}
			at = at + 1 == bursts ? 0 : at + 1;
			rte_hash_lookup_bulk_data(table, pointers, BURST, &hits, data);
			for (int i = 0; i < BURST; i++)
				if (hits >> i & 1)
					sum += conns[(uintptr_t)data[i]].word;
			if ((job->work == HIT ? UINT32_MAX : 0) != (uint32_t)hits) {
				fprintf(stderr, "wrong answers\n");
				exit(1);
			}
		}
		operations += BURST;
		rte_rcu_qsbr_quiescent(qsbr, job->number);
		if (job->number == 0 && operations % 1024 == 0 && now_ns() - begin > job->length_ns)
			stop = true;
	}
	job->taken = (now_ns() - begin) / operations + (sum == 1 ? 1e-9 : 0);
	while (job->work == CHURNING && removed < added)
		erase(first + removed++ % CHURN);
	rte_rcu_qsbr_thread_offline(qsbr, job->number);
	rte_rcu_qsbr_thread_unregister(qsbr, job->number);
	rte_thread_unregister();
	return NULL;
}

int main(int argc, char **argv)
{
	char *eal[] = { argv[0], "--no-huge", "-m", "8192", "--no-pci", "--no-shconf", "--log-level=4", "--no-telemetry" };
	if (argc != 4 || rte_eal_init(8, eal) < 0) {
		fprintf(stderr, "usage: rte_hash LARGEST ROUNDS MILLISECONDS; DPDK: %s\n", rte_strerror(rte_errno));
		return 2;
	}
	uint32_t largest = strtoul(argv[1], NULL, 10);
	int rounds = atoi(argv[2]);
	double length_ns = atof(argv[3]) * 1e6;
	static const struct {
		const char *name;
		int measured, beside;
		enum work work, other;
	} works[] = {
		{ "hit", 1, 0, HIT, HIT },
		{ "miss", 1, 0, MISS, HIT },
		{ "insert + remove", 1, 0, CHURNING, HIT },
		{ "hit, 2 threads", 2, 0, HIT, HIT },
		{ "hit beside a writer", 1, 1, HIT, CHURNING },
		{ "miss beside a writer", 1, 1, MISS, CHURNING },
		{ "insert + remove, 2 threads", 2, 0, CHURNING, HIT },
	};
	for (flows = 1000; flows <= largest; flows *= 10) {
		struct rte_hash_parameters parameters = {
			.name = "connections",
			.entries = 2 * (flows + ROOM) + 4096,
			.key_len = sizeof(struct key),
			.hash_func = rte_hash_crc,
			.extra_flag = RTE_HASH_EXTRA_FLAGS_RW_CONCURRENCY_LF | RTE_HASH_EXTRA_FLAGS_MULTI_WRITER_ADD |
				      RTE_HASH_EXTRA_FLAGS_EXT_TABLE,
		};
		table = rte_hash_create(&parameters);
		size_t bytes = rte_rcu_qsbr_get_memsize(THREADS);
		qsbr = aligned_alloc(RTE_CACHE_LINE_SIZE, (bytes + 63) & ~(size_t)63);
		rte_rcu_qsbr_init(qsbr, THREADS);
		struct rte_hash_rcu_config rcu = { .v = qsbr, .mode = RTE_HASH_QSBR_MODE_DQ };
		conns = aligned_alloc(64, sizeof(struct conn) * (size_t)(flows + ROOM));
		order = malloc(sizeof(*order) * flows);
		if (table == NULL || conns == NULL || order == NULL || rte_hash_rcu_qsbr_add(table, &rcu) != 0) {
			fprintf(stderr, "no table for %" PRIu32 " connections: %s\n", flows, rte_strerror(rte_errno));
			return 1;
		}
		memset(conns, 0, sizeof(struct conn) * (size_t)(flows + ROOM));
		uint64_t random = 88172645463325252;
		for (uint32_t i = 0; i < flows; i++)
			order[i] = i;
		for (uint32_t i = flows - 1; i > 0; i--) {
			random ^= random << 13, random ^= random >> 7, random ^= random << 17;
			uint32_t other = random % (i + 1), kept = order[i];
			order[i] = order[other], order[other] = kept;
		}
		for (uint32_t i = 0; i < flows; i++)
			insert(order[i], 0);
		for (size_t work = 0; work < RTE_DIM(works); work++) {
			double taken[rounds];
			for (int round = 0; round < rounds; round++) {
				int count = works[work].measured + works[work].beside;
				struct job jobs[THREADS];
				pthread_t threads[THREADS];
				stop = false;
				pthread_barrier_init(&barrier, NULL, count);
				for (int i = 0; i < count; i++) {
					bool measured = i < works[work].measured;
					jobs[i] = (struct job){ measured ? works[work].work : works[work].other, i, length_ns, 0 };
					pthread_create(&threads[i], NULL, run_job, &jobs[i]);
				}
				taken[round] = 0;
				for (int i = 0; i < count; i++) {
					pthread_join(threads[i], NULL);
					taken[round] += i < works[work].measured ? jobs[i].taken / works[work].measured : 0;
				}
				pthread_barrier_destroy(&barrier);
			}
			char row[64];
			snprintf(row, sizeof(row), "%" PRIu32 " connections, %s", flows, works[work].name);
			double median = figure("connection table", row, "rte_hash", "ns", taken, rounds, 0);
			printf("rte_hash %10" PRIu32 " %-28s %8.1f\n", flows, works[work].name, median);
			fflush(stdout);
		}
		rte_hash_free(table);
		free(qsbr), free(conns), free(order);
	}
	return 0;
}
