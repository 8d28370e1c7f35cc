#!/bin/sh
# Installs the Debian packages that building, the demo and the tests need, and those that arguments name alike, if any is missing. Needs
# root only then.
set -eu

# program:package, or /file:package for what has no program.
needs="
clang:clang
m4:m4
cc:gcc
make:make
pkg-config:pkg-config
/usr/include/libelf.h:libelf-dev
/usr/include/zlib.h:zlib1g-dev
/usr/include/linux/bpf.h:linux-libc-dev
ip:iproute2
nft:nftables
nsenter:util-linux
ethtool:ethtool
nginx:nginx-light
curl:curl
tcpdump:tcpdump
ping:iputils-ping
nc:netcat-openbsd
socat:socat
/usr/bin/python3:python3
/usr/lib/python3/dist-packages/yaml/__init__.py:python3-yaml
/usr/lib/python3/dist-packages/scapy/__init__.py:python3-scapy
$*
"

PATH=$PATH:/usr/sbin:/sbin
missing=
for need in $needs; do
    thing=${need%%:*}
    package=${need#*:}
    case $thing in
        /*) [ -e "$thing" ] || missing="$missing $package" ;;
        *) command -v "$thing" >/dev/null 2>&1 || missing="$missing $package" ;;
    esac
done

if [ -z "$missing" ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing:$missing (names of Debian packages; there is no apt-get here to install them)" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "missing:$missing; as root: apt-get install$missing" >&2
    exit 1
fi
echo "installing:$missing"
export DEBIAN_FRONTEND=noninteractive
# A server that a package brings is not to be started on this machine: the tests start their own in namespaces.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing
