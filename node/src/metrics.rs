//! What Prometheus reads, in its OpenMetrics format.
//!
//! Names are weir's own, in base units, and times are timestamps, of which whoever reads them makes ages (Prometheus, "Instrumentation").

use std::{
    sync::atomic::AtomicU64,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};
use weir_kubernetes::State;

use crate::web::Facts;

/// The format's name.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Real = Gauge<f64, AtomicU64>;
type Labels = [(&'static str, String); 1];

/// All metrics.
pub fn of(facts: &Facts) -> String {
    let mut registry = Registry::with_prefix("weir");
    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "What runs", build);
    let own = &mut registry;
    whole(own, "generation", "Number of the publication that is in force", facts.generation.into());
    whole(own, "ready", "Whether what was there at the start is in force", facts.serves.into());
    whole(own, "faulty_objects", "Objects whose newest version is at fault", facts.faulty as i64);
    if let Some(programming) = &facts.programming {
        let help =
            "From the moment at which the cluster saw a change of endpoints to that at which this node goes by it";
        registry.register("network_programming_duration_seconds", help, programming.clone());
    }
    if let Some(cluster) = &facts.cluster {
        of_cluster(cluster, &mut registry);
    }
    let mut text = String::new();
    encode(&mut text, &registry).expect("a text takes everything");
    text
}

/// A number without labels; a truth is 0 or 1.
fn whole(registry: &mut Registry, name: &str, help: &str, value: i64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn of_cluster(cluster: &State, registry: &mut Registry) {
    let family = |registry: &mut Registry, name: &str, help: &str| {
        let family = Family::<Labels, Real>::default();
        registry.register(name, help, family.clone());
        family
    };
    let set = |family: &Family<Labels, Real>, kind: &str, value: f64| {
        family.get_or_create(&[("kind", kind.to_owned())]).set(value);
    };
    let stale = "Whether what is in force is what an earlier run kept, as the API server has not answered yet";
    whole(registry, "api_stale", stale, cluster.kept_since.is_some().into());
    let frozen = "Whether Calico's datastore is not ready, so that all stays as it was";
    whole(registry, "api_frozen", frozen, cluster.is_frozen.into());
    let objects = family(registry, "api_objects", "Objects of a kind that are known");
    let listed = family(registry, "api_listed", "Whether a kind was listed whole");
    let behind = family(registry, "api_behind", "Whether the API server is behind what was seen of a kind");
    let failing = family(registry, "api_failing", "Whether a kind could not be followed when that was tried last");
    let heard =
        family(registry, "api_last_word_timestamp_seconds", "When the API server last said something of a kind");
    let (now, unix) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    for kind in &cluster.kinds {
        set(&objects, &kind.name, kind.count as f64);
        for (family, is) in [(&listed, kind.is_whole), (&behind, kind.is_behind), (&failing, kind.failure.is_some())] {
            set(family, &kind.name, f64::from(u8::from(is)));
        }
        if let Some(at) = kind.last_word {
            set(&heard, &kind.name, unix - now.saturating_duration_since(at).as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use weir_kubernetes::KindState;

    use super::*;

    #[test]
    fn each_kind_of_the_cluster_has_its_lines() {
        let kind = |name: &str, count, last_word| KindState {
            name: name.to_owned(),
            count,
            is_whole: last_word,
            is_behind: false,
            last_word: last_word.then(Instant::now),
            failure: (!last_word).then(|| "no".to_owned()),
        };
        let cluster =
            State { kinds: vec![kind("pods", 3, true), kind("a/b", 0, false)], is_frozen: true, ..State::default() };
        let text = of(&Facts { faulty: 2, cluster: Some(cluster), ..Facts::default() });
        for line in [
            "weir_build_info{version=",
            "weir_faulty_objects 2",
            "weir_api_stale 0",
            "weir_api_frozen 1",
            "weir_api_objects{kind=\"pods\"} 3.0",
            "weir_api_listed{kind=\"a/b\"} 0.0",
            "weir_api_failing{kind=\"a/b\"} 1.0",
            "weir_api_last_word_timestamp_seconds{kind=\"pods\"} ",
            "# EOF",
        ] {
            assert!(text.lines().any(|one| one.starts_with(line)), "{line}:\n{text}");
        }
        assert!(!text.contains("timestamp_seconds{kind=\"a/b\"}"), "{text}");
        assert!(of(&Facts::default()).lines().all(|line| !line.contains("api_")));
    }
}
