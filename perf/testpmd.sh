#!/usr/bin/env bash
# DPDK's testpmd between two devices over memory rings: what moving a packet through its device layer costs, and nothing else.
# Packets go round: each device's ring is its own, testpmd takes bursts of 64 from one, writes both MAC addresses (forward mode mac) and gives them to
# the other. No packet is written, looked up or freed, and no other core takes part; the same 4,096 packets stay in the caches. So it is a
# floor for any router over such devices. A figure for each second but the first. perf/testpmd.sh [SECONDS]; needs the package dpdk-dev.
set -euo pipefail
seconds=${1:-12}
# The first processor prints, the second forwards. testpmd takes an interrupt for a good end.
text=$(timeout -s INT $((seconds + 2)) dpdk-testpmd --no-huge -m 512 --no-pci --no-shconf --no-telemetry '--log-level=*:4' \
    --lcores='0@0,1@1' --vdev=net_ring0 --vdev=net_ring1 -d librte_net_ring.so -- --forward-mode=mac --tx-first \
    --stats-period=1 --nb-cores=1 --total-num-mbufs=8192 --burst=64 --no-mlockall) || [ $? = 124 ]
rates=$(awk '/Rx-pps:/ { rate += $2; if (++ports % 2 == 0) { if (rate > 0) print rate; rate = 0 } }' <<<"$text" | tail -n +2 | sort -n)
awk -v file="${WEIR_FIGURES:-}" '
    { rate[NR] = $1 }
    # Rates ascend, so times descend.
    function ns(place) { return 1e9 / rate[place] }
    END {
        if (NR < 3) { print "testpmd told too few rates" > "/dev/stderr"; exit 1 }
        median = ns(int(NR / 2) + 1); low = ns(int((NR - 1) * 3 / 4) + 1); high = ns(int((NR - 1) / 4) + 1)
        printf "testpmd, forward mode mac: %.1f ns per packet, %.1f Mpps, median of %d seconds\n", median, 1e3 / median, NR
        if (file != "")
            printf "{\"table\":\"forwarding\",\"row\":\"no flows\",\"column\":\"testpmd\",\"unit\":\"ns\",\"median\":%.2f,\"low\":%.2f,\"high\":%.2f}\n", median, low, high >> file
    }' <<<"$rates"
