//! What threads share: quiescence, published snapshots, per-worker counters.
