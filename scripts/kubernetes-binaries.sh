#!/bin/sh
# Says where kube-apiserver and etcd are, as `make cluster-build` leaves them; builds these two where they are not there.
set -eu
cd "$(dirname "$0")/.."
version=$(sed -n 's/^const Kubernetes = "\(.*\)"/\1/p' lab/kubernetes/internal/build/build.go)
folder=${WEIR_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weir-lab}/kubernetes-$version
if [ ! -x "$folder/kube-apiserver" ] || [ ! -x "$folder/etcd" ]; then
    if ! command -v go >/dev/null 2>&1; then
        echo "There is no kube-apiserver in $folder, and no \`go\` in PATH to build it with. Nothing else of \`make test-kubernetes\` needs Go." >&2
        exit 1
    fi
    mkdir -p "$folder"
    export GOTOOLCHAIN=local CGO_ENABLED=0
    variables="-X k8s.io/component-base/version."
    echo "building kube-apiserver and etcd, once; some ten minutes ..." >&2
    (cd lab/kubernetes && go build -trimpath -o "$folder/kube-apiserver.new" -ldflags \
        "-s -w ${variables}gitVersion=v$version ${variables}gitMajor=${version%%.*} ${variables}gitMinor=$(echo "$version" | cut -d. -f2)" k8s.io/kubernetes/cmd/kube-apiserver)
    (cd lab/kubernetes/etcd && go build -trimpath -o "$folder/etcd.new" -ldflags "-s -w" .)
    mv "$folder/kube-apiserver.new" "$folder/kube-apiserver"
    mv "$folder/etcd.new" "$folder/etcd"
fi
echo "$folder"
