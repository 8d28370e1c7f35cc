#!/bin/sh
# Builds the command of lab/kubernetes and runs it: scripts/lab.sh up|down|status|shell|e2e|... (`make cluster` and its siblings).
set -eu
cd "$(dirname "$0")/.."

if ! command -v go >/dev/null 2>&1; then
    echo "the cluster is built with Go 1.26 or later, and there is no \`go\` in PATH; install it (Debian 12's golang-go is too old)." >&2
    echo "Nothing else needs Go: \`make demo\` and \`make test\` work without." >&2
    exit 1
fi
# What this Go is, and not another one that it would fetch.
export GOTOOLCHAIN=local
version=$(go env GOVERSION)
minor=$(expr "$version" : 'go1\.\([0-9]*\)' || true)
if [ "${minor:-0}" -lt 26 ]; then
    echo "the cluster is built with Go 1.26 or later, and \`go\` is $version; \`make demo\` and \`make test\` work without." >&2
    exit 1
fi
./scripts/setup.sh containerd:containerd runc:runc mmdebstrap:mmdebstrap dig:bind9-dnsutils \
    /usr/lib/cni/ptp:containernetworking-plugins nft:nftables >&2

root=$PWD
# So `make` finds what `cargo` made, wherever that is.
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
(cd lab/kubernetes && CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -trimpath -o "$root/$target/lab" ./cmd/lab)
export WEIR_LAB_SOURCE="$root/lab/kubernetes"
export WEIR="${WEIR:-$root/$target/release/weir}"
# A cluster goes on when this ends, and must not depend on a file that the next build replaces.
exec "$root/$target/lab" "$@"
