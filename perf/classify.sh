#!/usr/bin/env bash
# The policy classifier beside a linear scan, DPDK's rte_acl and nftables, on the same rules.
# perf/classify.sh [LARGEST [ROUNDS]]; needs root for network namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."
largest=${1:-100000} rounds=${2:-7}
cargo bench -p weir-benches --bench classify
echo
perf/dpdk.sh rte_acl "$largest" "$rounds"
echo
perf/nft_rules.sh "$rounds"
