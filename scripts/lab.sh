#!/bin/sh
# Builds the command of lab/kubernetes and runs it: scripts/lab.sh up|down|status|shell|e2e|... (`make cluster` and its siblings).
set -eu
cd "$(dirname "$0")/.."

# What the modules in lab/kubernetes ask for: 1.26.6.
too_old() {
    echo "the cluster is built with Go 1.26.6 or later, and $1." >&2
    echo "Nothing else needs Go: \`make demo\` and \`make test\` work without." >&2
    exit 1
}
command -v go >/dev/null 2>&1 || too_old "there is no \`go\` in PATH; Debian 12's golang-go is too old"
# What this Go is, and not another one that it would fetch.
export GOTOOLCHAIN=local
version=$(go env GOVERSION)
minor=$(expr "$version" : 'go1\.\([0-9]*\)') || minor=0
patch=$(expr "$version" : 'go1\.[0-9]*\.\([0-9]*\)') || patch=0
if [ "$minor" -lt 26 ] || { [ "$minor" -eq 26 ] && [ "$patch" -lt 6 ]; }; then
    too_old "this is $version"
fi
./scripts/setup.sh containerd:containerd runc:runc mmdebstrap:mmdebstrap dig:bind9-dnsutils \
    /usr/lib/cni/ptp:containernetworking-plugins nft:nftables >&2

root=$PWD
# So `make` finds what `cargo` made, wherever that is.
target=${CARGO_TARGET_DIR:-target}
case $target in /*) ;; *) target=$root/$target ;; esac
mkdir -p "$target"
(cd lab/kubernetes && CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -trimpath -o "$target/lab" ./cmd/lab)
export WEIR_LAB_SOURCE="$root/lab/kubernetes"
export WEIR="${WEIR:-$target/release/weir}"
# A cluster goes on when this ends, and must not depend on a file that the next build replaces.
exec "$target/lab" "$@"
