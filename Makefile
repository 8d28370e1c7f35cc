# Two commands matter: `make demo` shows weir at work, `make test` tests it. `make help` lists the rest.

CARGO ?= cargo
SOAK_MINUTES ?= 30
STORM_SECONDS ?= 30
FUZZ_SECONDS ?= 60
PROPERTY_ROUNDS ?= 20
PERF_ROUNDS ?= 5
PERF_SECONDS ?= 1
FUZZ_SANITIZER ?= none
# Tests that run at once. The end-to-end ones wait most of the time, each in namespaces of its own: two are dependable beside four busy loops (make test-loaded).
TEST_THREADS ?= 2
# Tests of flow offload itself test nothing where it is off: the summary of such a run counts them as filtered out.
WITHOUT_OFFLOAD = --skip offload_only
CNI_FOLDER = $(or $(CARGO_TARGET_DIR),target)/cni
HOST = $(shell rustc -vV | sed -n 's/host: //p')
LOOM_FLAGS = RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom LOOM_MAX_PREEMPTIONS=2

CLUSTER_TARGETS = cluster cluster-build cluster-status cluster-shell cluster-e2e cluster-down cluster-test

.PHONY: $(CLUSTER_TARGETS) help setup build release cni demo demo-memory test lint unit loom e2e test-loaded storm cases instructions record-instructions bench bench-path bench-tables bench-reload bench-cni report publish-report perf perf-offload perf-kubernetes soak properties fuzz miri test-kubernetes install clean

help: ## Lists the targets.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Installs missing Debian packages (as root).
	@./scripts/setup.sh

build: setup ## Builds weir with debug assertions.
	$(CARGO) build

release: setup ## Builds weir as it is to be run: target/release/weir.
	$(CARGO) build --release

cni: ## Builds the CNI plugin, static: target/cni/HOST/release/weir-cni.
	@# A folder of its own: with other flags everything in target/ would be built again, and then once more. With a target named, the flags
	@# are for the program alone and not for the compiler's own plugins, which cannot be static.
	RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" CARGO_TARGET_DIR=$(CNI_FOLDER) $(CARGO) build --release -p weir-cni --target $(HOST)

demo: build ## Builds a cluster of network namespaces, runs two routers in it, sends real traffic. Needs root.
	./target/debug/weir demo

demo-memory: build ## The same scenario over memory rings, without privileges.
	./target/debug/weir demo --memory

test: setup lint unit loom instructions ## Everything that must pass: formatting, lints, unit, property, loom, golden, end-to-end, conformance, instructions per packet.
	@./scripts/summary.sh

lint: ## Formatting, and clippy with warnings as errors.
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# The same commit must pass or fail each time, so properties get the same cases each time, here. New ones are for `make properties`.
unit: export PROPTEST_RNG_SEED ?= 1
unit: ## All tests of the workspace, and the end-to-end ones again without flow offload (WEIR_SKIP_E2E=1 skips those that need root).
	$(CARGO) test --workspace -- --test-threads=$(TEST_THREADS)
	@# The whole workspace is named so that crates have the same features as above, and are not built once more.
	WEIR_E2E_OFFLOAD=off $(CARGO) test --workspace --test e2e -- --test-threads=$(TEST_THREADS) $(WITHOUT_OFFLOAD)

loom: ## The lock-free structures under loom, bounded.
	$(LOOM_FLAGS) $(CARGO) test --release -p weir-sync -p weir-conntrack --test loom

e2e: setup ## The end-to-end tests alone, one at a time (WEIR_E2E_OFFLOAD=off: without flow offload).
	$(CARGO) test --workspace --test e2e -- --test-threads=1 --nocapture $(if $(filter off,$(WEIR_E2E_OFFLOAD)),$(WITHOUT_OFFLOAD))

test-loaded: setup ## The end-to-end tests three times, with four busy loops beside them.
	$(CARGO) test --workspace --test e2e --no-run
	./scripts/loaded.sh 3 $(CARGO) test --workspace --test e2e -- --test-threads=$(TEST_THREADS)

storm: setup ## A hundred changes of the manifests a second for STORM_SECONDS (30), under traffic that must lose nothing. Needs root.
	WEIR_STORM_SECONDS=$(STORM_SECONDS) $(CARGO) test --workspace --test e2e storm -- --nocapture

cases: setup ## The conformance cases alone.
	$(CARGO) test --test conformance -- --nocapture

instructions: ## Instructions per packet in ten cases, counted by valgrind: none may be 5 % more than benches/instructions.txt records.
	@./scripts/setup.sh valgrind:valgrind
	$(CARGO) run --release -p weir-benches --bin path -- instructions benches/instructions.txt

record-instructions: ## Records in benches/instructions.txt what a packet costs now.
	@./scripts/setup.sh valgrind:valgrind
	$(CARGO) run --release -p weir-benches --bin path -- record benches/instructions.txt

bench-path: ## Instructions, time and cycles per packet in ten cases, as lines and in target/bench-path.json.
	@./scripts/setup.sh valgrind:valgrind
	$(CARGO) run --release -p weir-benches --bin path -- report

bench: setup ## Criterion benchmarks of the hot structures, and the pipeline on memory rings.
	$(CARGO) bench --workspace
	$(CARGO) run --release -- bench
	$(CARGO) run --release -- bench --case udp-dnat-ipip --flows 1000000

report: release ## Runs the benchmarks that take minutes (PARTS=... names some), writes target/report/report.md, report.json and plots. Root for veth.
	./scripts/setup.sh valgrind:valgrind pkg-config:pkg-config /usr/include/dpdk/rte_eal.h:libdpdk-dev dpdk-testpmd:dpdk-dev
	$(CARGO) build --release -p weir-benches
	$(CARGO) build --release -p weir --example veth_pps --example offload --example reload
	$(CARGO) run --release -p weir-benches --bin report -- run $(PARTS)

publish-report: ## Puts the tables of target/report into perf/RESULTS.md.
	$(CARGO) run --release -p weir-benches --bin report -- publish perf/RESULTS.md

bench-tables: setup ## The connection table beside other concurrent maps and DPDK's rte_hash. Needs root for a package.
	./perf/tables.sh

bench-reload: ## From a changed file to compiled tables, and memory, at 10 to 50,000 services.
	$(CARGO) run --release --example reload

bench-cni: release cni ## How long ADD and DEL of a pod take, alone and many at once, beside Debian's ptp and host-local. Needs root.
	./scripts/setup.sh /usr/lib/cni/ptp:containernetworking-plugins
	$(CARGO) run --release -p weir-cni --example add -- target/release/weir $(CNI_FOLDER)/$(HOST)/release/weir-cni

perf: release ## Packets per second through veth, beside a bare AF_XDP forwarder in the same run. Needs root.
	$(CARGO) run --release --example veth_pps

perf-offload: release ## What the kernel carries for weir, beside the kernel's own forwarding and kube-proxy's iptables rules. Needs root.
	./scripts/setup.sh iperf3:iperf3 wrk:wrk iptables-nft-restore:iptables taskset:util-linux
	$(CARGO) run --release --example offload -- $(PERF_ROUNDS) $(PERF_SECONDS)

soak: ## Two workers under a mix of everything for SOAK_MINUTES (30); at the end every entry, frame and port is accounted for.
	$(CARGO) run --example soak -- $(SOAK_MINUTES)

properties: ## Every property test with new random cases, PROPERTY_ROUNDS (20) times or until one fails; PROPTEST_RNG_SEED=N repeats a round.
	CARGO="$(CARGO)" ./scripts/properties.sh $(PROPERTY_ROUNDS)

fuzz: setup ## Every fuzz target for FUZZ_SECONDS (60); finds lie in fuzz/artifacts, what was learnt in fuzz/corpus.
	command -v cargo-fuzz >/dev/null || $(CARGO) install cargo-fuzz --locked
	@# Without a sanitizer the stable toolchain does; with nightly: make fuzz CARGO='cargo +nightly' FUZZ_SANITIZER=address.
	for target in $$($(CARGO) fuzz list); do \
		$(CARGO) fuzz run --sanitizer $(FUZZ_SANITIZER) $$target -- -max_total_time=$(FUZZ_SECONDS) -len_control=10 || exit 1; \
	done

test-kubernetes: build ## The conformance cases by way of a real kube-apiserver and etcd: the same verdicts as from files. Needs Go, once, to build those.
	$(CARGO) build --workspace --bin weir-cni
	@binaries=$$(./scripts/kubernetes-binaries.sh) && /usr/bin/python3 tests/kubernetes/run.py target/debug/weir "$$binaries" && \
		/usr/bin/python3 tests/kubernetes/live.py target/debug/weir "$$binaries" && \
		/usr/bin/python3 tests/kubernetes/speak.py target/debug/weir target/debug/weir-cni "$$binaries"

perf-kubernetes: release ## A router that follows a real API server with SIZES (1000 nodes, 50,000 pods ...): start, memory, changes. Needs root and Go.
	@binaries=$$(./scripts/kubernetes-binaries.sh) && /usr/bin/python3 perf/kubernetes.py target/release/weir "$$binaries" $(SIZES)

miri: ## The unsafe and lock-free parts under miri (needs a nightly toolchain with miri).
	$(CARGO) +nightly miri test -p weir-sync -p weir-conntrack --lib
	$(CARGO) +nightly miri test -p weir-dataplane --lib -- frame:: memory::

cluster: release cni ## A real Kubernetes cluster of NODES (2) on this machine, weir its network (FAMILY, ENCAP, OFFLOAD, WITH=kube-proxy). Needs root and Go.
	@WEIR_CNI=$(abspath $(CNI_FOLDER)/$(HOST)/release/weir-cni) ./scripts/lab.sh up

cluster-build: ## Builds Kubernetes and the images for the cluster, once.
	@./scripts/lab.sh build

cluster-status: ## What runs of the cluster.
	@./scripts/lab.sh status

cluster-shell: ## A shell in a node of the cluster: NODE=a, b, ... or outside.
	@./scripts/lab.sh shell

cluster-e2e: ## Kubernetes' own tests on the cluster: SUITE=conformance|netpol|services|cnp|rolling|pods|all, FOCUS=, PROCS=.
	@./scripts/lab.sh e2e

cluster-down: ## Takes the cluster away, whatever is left of it.
	@./scripts/lab.sh down

cluster-test: ## The tests of the lab's own code. Needs root and Go.
	cd lab/kubernetes && CGO_ENABLED=0 go test ./internal/... ./cmd/...

install: release cni ## Installs weir to /usr/local/bin, weir-cni to /opt/cni/bin.
	install -m 755 target/release/weir /usr/local/bin/weir
	install -D -m 755 $(CNI_FOLDER)/$(HOST)/release/weir-cni /opt/cni/bin/weir-cni

clean: ## Removes what was built.
	$(CARGO) clean
