#!/usr/bin/env bash
# Builds a program of perf/ with Debian's DPDK and runs it: perf/dpdk.sh rte_hash|rte_acl|rte_lpm|rte_forward ARGUMENTS...
# Needs root where the package libdpdk-dev is to be installed; the programs use no huge pages, no devices and no root.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1
shift
if ! pkg-config --exists libdpdk; then
    echo "installing libdpdk-dev" >&2
    apt-get install -y --no-install-recommends libdpdk-dev pkg-config >/dev/null
fi
mkdir -p target
# shellcheck disable=SC2046 # pkg-config prints several words
cc -O3 -march=native -Wall -Wextra -o "target/$program" "perf/$program.c" $(pkg-config --cflags --libs libdpdk) -lrte_net_ring
exec "target/$program" "$@"
