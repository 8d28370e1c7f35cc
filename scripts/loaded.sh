#!/bin/sh
# Runs a command so many times, each time beside four busy loops: what passes on an idle machine only is not dependable.
set -eu
times=$1
shift
loops=
end() { [ -z "$loops" ] || kill $loops 2>/dev/null || true; }
trap end EXIT
trap 'exit 1' INT TERM
for _ in 1 2 3 4; do
    sh -c 'while :; do :; done' &
    loops="$loops $!"
done
round=1
while [ "$round" -le "$times" ]; do
    echo "round $round of $times, four busy loops beside"
    "$@"
    round=$((round + 1))
done
