//! Network programming time: how long a change of a service's endpoints takes from the moment at which the cluster saw it to that at which this
//! node goes by it.
//!
//! The moment is in each slice's annotation endpoints.kubernetes.io/last-change-trigger-time; kube-proxy measures the same
//! (kubeproxy_network_programming_duration_seconds, SIG Scalability's "network programming latency"), in these buckets. What a first list
//! has is none: it was changed before this node was there.

use std::time::{Duration, SystemTime};

use prometheus_client::metrics::histogram::Histogram;
use serde_json::{Value, json};

/// Changes that may wait to be in force; more are not measured.
const MOST: usize = 100_000;

/// Upper ends of the buckets, in seconds: as kube-proxy's, from 1 ms on (Kubernetes, pkg/proxy/metrics).
pub fn buckets() -> impl Iterator<Item = f64> {
    let fine = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1];
    let seconds = (1..=60).map(f64::from);
    let minutes = (1..12).map(|step| f64::from(60 + 5 * step)).chain((0..7).map(|step| f64::from(120 + 30 * step)));
    fine.into_iter().chain([0.25, 0.5]).chain(seconds).chain(minutes)
}

/// What is measured.
pub struct Programming {
    /// Of what is being prepared.
    preparing: Vec<SystemTime>,
    /// Of what was taken over and is not in force yet.
    taken_over: Vec<SystemTime>,
    histogram: Histogram,
    /// By bucket; the last is beyond all.
    counts: Vec<u64>,
    longest: Duration,
}

impl Default for Programming {
    fn default() -> Self {
        Self {
            preparing: Vec::new(),
            taken_over: Vec::new(),
            histogram: Histogram::new(buckets()),
            counts: vec![0; buckets().count() + 1],
            longest: Duration::ZERO,
        }
    }
}

impl Programming {
    /// Changes that are part of what is prepared from now on.
    pub fn begin(&mut self, changed: Vec<SystemTime>) {
        let room = MOST.saturating_sub(self.preparing.len());
        self.preparing.extend(changed.into_iter().take(room));
    }

    /// What was prepared was taken over.
    pub fn taken_over(&mut self) {
        self.taken_over.append(&mut self.preparing);
    }

    /// What was taken over is in force.
    pub fn in_force(&mut self, now: SystemTime) {
        for changed in self.taken_over.drain(..) {
            // Another node's clock may be before this one's.
            let took = now.duration_since(changed).unwrap_or_default();
            self.histogram.observe(took.as_secs_f64());
            let bucket = buckets().position(|end| took.as_secs_f64() <= end).unwrap_or(self.counts.len() - 1);
            self.counts[bucket] += 1;
            self.longest = self.longest.max(took);
        }
    }

    /// For Prometheus.
    pub fn histogram(&self) -> Histogram {
        self.histogram.clone()
    }

    /// The upper end of the bucket that this part of all changes is within; beyond all, the longest.
    fn quantile(&self, part: f64) -> f64 {
        let all: u64 = self.counts.iter().sum();
        if all == 0 {
            return 0.0;
        }
        let wanted = (all as f64 * part).ceil() as u64;
        let mut seen = 0;
        let ends = buckets().chain([self.longest.as_secs_f64()]);
        let holding = self.counts.iter().zip(ends).find(|(count, _)| {
            seen += **count;
            seen >= wanted
        });
        holding.map_or(0.0, |(_, end)| end)
    }

    /// For `weir status`: how many, and within how many milliseconds half and 99 of a hundred were in force.
    pub fn to_json(&self) -> Value {
        let ms = |seconds: f64| (seconds * 1000.0).round();
        json!({
            "changes": self.counts.iter().sum::<u64>(), "p50Ms": ms(self.quantile(0.5)), "p99Ms": ms(self.quantile(0.99)),
            "longestMs": self.longest.as_millis() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_it_is_in_force() {
        let mut programming = Programming::default();
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let at = |ms: u64| start + Duration::from_millis(ms);
        programming.begin(vec![at(0); 98]);
        programming.in_force(at(9));
        assert_eq!(programming.to_json(), json!({"changes": 0, "p50Ms": 0.0, "p99Ms": 0.0, "longestMs": 0}));
        programming.taken_over();
        programming.begin(vec![at(500)]);
        programming.in_force(at(8));
        assert_eq!(programming.to_json(), json!({"changes": 98, "p50Ms": 10.0, "p99Ms": 10.0, "longestMs": 8}));
        programming.begin(vec![at(0), at(9000)]);
        programming.taken_over();
        programming.in_force(at(700));
        // One was of the future by this clock. The hundredth of the 101 took 200 ms, the last one 700.
        assert_eq!(programming.to_json(), json!({"changes": 101, "p50Ms": 10.0, "p99Ms": 250.0, "longestMs": 700}));
        assert!(buckets().is_sorted());
    }
}
