#!/bin/sh
# Runs every property test of the workspace in rounds, each with random cases of its own, until one fails. $1: how many rounds.
set -eu
CARGO=${CARGO:-cargo}
rounds=$1
log=target/properties.log

# Tests in a `proptest!`, and those that use a runner of their own.
names=$(find . -name '*.rs' -not -path './target/*' -not -path './fuzz/*' -exec awk '
    FNR == 1 { inside = 0 }
    /^ *proptest! \{$/ { inside = 1; end = $0; sub(/proptest.*/, "}", end) }
    $0 == end { inside = 0 }
    /^ *#\[test\]$/ { test = 1 }
    /^ *fn / { name = $2; sub(/[<(].*/, "", name); if (inside && test) print name; test = 0 }
    /TestRunner::new\(/ { print name }
' {} +)

# A failure is repeated by its seed, not by a file beside the test.
export PROPTEST_DISABLE_FAILURE_PERSISTENCE=1
if [ -n "${PROPTEST_RNG_SEED:-}" ]; then
    rounds=1
fi
$CARGO test --workspace --tests --no-run
round=1
while [ "$round" -le "$rounds" ]; do
    seed=${PROPTEST_RNG_SEED:-$(od -An -N8 -tu8 /dev/urandom | tr -d ' ')}
    echo "round $round of $rounds: PROPTEST_RNG_SEED=$seed"
    # shellcheck disable=SC2086
    if ! PROPTEST_RNG_SEED=$seed $CARGO test --workspace --tests -- $names >"$log" 2>&1; then
        cat "$log"
        echo "This again: make properties PROPTEST_RNG_SEED=$seed"
        exit 1
    fi
    round=$((round + 1))
done
awk '/^test result: ok/ { tests += $4 } END { print tests " properties held in each round." }' "$log"
