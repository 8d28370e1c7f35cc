#!/usr/bin/env bash
# The connection table beside other concurrent maps and DPDK's rte_hash, on the same keys.
# perf/tables.sh [LARGEST [ROUNDS [MILLISECONDS]]]
set -euo pipefail
cd "$(dirname "$0")/.."
largest=${1:-1000000} rounds=${2:-7} milliseconds=${3:-100}
cargo bench -p weir-benches --bench tables_beside -- --largest "$largest" --rounds "$rounds" --milliseconds "$milliseconds"
echo
perf/dpdk.sh rte_hash "$largest" "$rounds" "$milliseconds"
