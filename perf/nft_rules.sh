#!/usr/bin/env bash
# What a new connection costs through a forwarding namespace with N nftables rules, of the shape of benches/classify.rs: a source
# prefix, a protocol and a port each. The sender's own rule is the one in the middle, so half of the rules are evaluated, as for a
# packet of a random rule. Every datagram has another destination and so is a new connection of conntrack; established ones pass
# before the rules. Shown is the fastest of the rounds. perf/nft_rules.sh [ROUNDS]; needs root.
set -euo pipefail
rounds=${1:-5} flows=20000
a=weir-nft-a r=weir-nft-r b=weir-nft-b
clean() { for ns in $a $r $b; do ip netns del $ns 2>/dev/null || true; done; }
trap clean EXIT
clean
for ns in $a $r $b; do ip netns add $ns; ip -n $ns link set lo up; done
ip -n $a link add eth0 type veth peer name left netns $r
ip -n $b link add eth0 type veth peer name right netns $r
for end in "$a eth0 10.7.0.2/24" "$r left 10.7.0.1/24" "$r right 10.8.0.1/24" "$b eth0 10.8.0.2/24"; do
    read -r ns device address <<<"$end"
    ip -n "$ns" addr add "$address" dev "$device"
    ip -n "$ns" link set dev "$device" up
done
ip -n $a route add default via 10.7.0.1
ip -n $b route add default via 10.8.0.1
ip -n $r route add 10.9.0.0/16 via 10.8.0.2
ip netns exec $r sysctl -qw net.ipv4.ip_forward=1

rules() {
    local count=$1 number source
    echo "table ip rules { chain forward { type filter hook forward priority 0; policy drop;"
    echo "ct state established,related accept"
    for ((number = 0; number < count; number++)); do
        source="192.$((number / 65536)).$((number / 256 % 256)).$((number % 256))"
        ((number == count / 2)) && source=10.7.0.2
        echo "ip saddr $source udp dport $((8000 + (number == count / 2 ? 0 : number % 50))) accept"
    done
    printf "}\n}\n"
}

# Sends to each destination once; prints the nanoseconds per datagram until all have arrived.
send() {
    ip netns exec $a python3 - "$flows" "$1" <<'PYTHON'
import socket, subprocess, sys, time
flows, first = int(sys.argv[1]), int(sys.argv[2])
def arrived():
    path = "/sys/class/net/eth0/statistics/rx_packets"
    return int(subprocess.run(["ip", "netns", "exec", "weir-nft-b", "cat", path], capture_output=True, check=True).stdout)
targets = [(f"10.9.{n // 256 % 256}.{n % 256}", 8000) for n in range(first, first + flows)]
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.bind(("10.7.0.2", 20000 + first // flows))
before, start = arrived(), time.monotonic_ns()
for target in targets:
    sender.sendto(b"x", target)
# Whatever is asked about in between is a datagram or two of neighbour discovery.
while arrived() < before + flows * 0.99:
    if time.monotonic_ns() - start > 60e9:
        sys.exit(f"only {arrived() - before} of {flows} arrived")
print((time.monotonic_ns() - start) // flows)
PYTHON
}

# The same for all: the first datagram resolves the neighbours.
ip netns exec $a ping -c 1 -q 10.8.0.2 >/dev/null
for count in 10 100 1000 10000; do
    rules $count >"/tmp/$r.nft"
    ip netns exec $r nft flush ruleset
    start=$(date +%s%N)
    ip netns exec $r nft -f "/tmp/$r.nft"
    loaded=$(((($(date +%s%N) - start)) / 1000000))
    for ((round = 0; round < rounds; round++)); do
        ip netns exec $r conntrack -F 2>/dev/null || true
        send $((round % 3 * flows))
    done | sort -n | awk -v count=$count -v loaded=$loaded 'NR == 1 { ns = $1 }
        END {
            printf "%6d nftables rules: %8d ns per new connection, %7d per second, loaded in %d ms\n", count, ns, 1e9 / ns, loaded }'
    rm -f "/tmp/$r.nft"
done
