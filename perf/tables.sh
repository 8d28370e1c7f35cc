#!/usr/bin/env bash
# The connection table beside other concurrent maps and DPDK's rte_hash, on the same keys.
# perf/tables.sh [LARGEST [ROUNDS [MILLISECONDS]]]; needs root for the package libdpdk-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
largest=${1:-1000000} rounds=${2:-7} milliseconds=${3:-100}
if ! pkg-config --exists libdpdk; then
    echo "installing libdpdk-dev" >&2
    apt-get install -y --no-install-recommends libdpdk-dev pkg-config >/dev/null
fi
mkdir -p target
# shellcheck disable=SC2046 # pkg-config prints several words
cc -O3 -march=native -o target/rte_hash perf/rte_hash.c $(pkg-config --cflags --libs libdpdk)
cargo bench -p weir-conntrack --bench beside -- --largest "$largest" --rounds "$rounds" --milliseconds "$milliseconds"
echo
target/rte_hash "$largest" "$rounds" "$milliseconds"
