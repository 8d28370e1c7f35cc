#!/usr/bin/env bash
# The policy classifier beside a linear scan, DPDK's rte_acl and nftables, on the same rules.
# perf/classify.sh [LARGEST [ROUNDS]]; needs root, for the package libdpdk-dev and for network namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."
largest=${1:-100000} rounds=${2:-7}
if ! pkg-config --exists libdpdk; then
    echo "installing libdpdk-dev" >&2
    apt-get install -y --no-install-recommends libdpdk-dev pkg-config >/dev/null
fi
mkdir -p target
# shellcheck disable=SC2046 # pkg-config prints several words
cc -O3 -march=native -o target/rte_acl perf/rte_acl.c $(pkg-config --cflags --libs libdpdk)
cargo bench -p weir-policy --bench classify
echo
target/rte_acl "$largest" "$rounds"
echo
perf/nft_rules.sh "$rounds"
