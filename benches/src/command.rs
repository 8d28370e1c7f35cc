//! `weir bench`: what a packet of an established connection costs in the pipeline, on memory rings.
//!
//! It is here and not with the other commands so that `path bench` is the same without building all of weir.

use std::{str::FromStr, time::Duration};

use crate::{
    cases::{CASES, Case},
    machine::Machine,
    measure::{BURST, Bench, Flows, Length, Measurement},
};
use serde_json::{Value, json};

/// The cases that are asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct Cases(Vec<Case>);

impl FromStr for Cases {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(CASES.into()));
        }
        Case::named(text).map(|case| Self(vec![case])).map_err(|error| error + ", or all")
    }
}

/// What to measure.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Which cases.
    pub cases: Cases,
    /// Flows that the packets belong to, of all workers together.
    pub flows: u32,
    /// Workers at once.
    pub workers: usize,
    /// How long each case is measured.
    pub time: Duration,
}

/// What is said below the options: each case, and how figures come about.
pub fn help() -> String {
    let cases: String = CASES.iter().map(|case| format!("  {:<15} {}\n", case.name, case.description)).collect();
    format!(
        "Cases:\n{cases}\n\
         Every flow is open, answered, and allowed by policy; packets are small, in bursts of {BURST}. They are written into frames of \
         memory, not received: what writing and taking them back costs is measured alone and subtracted. With several workers each case \
         is measured twice: with flows apart, as where a NIC spreads them, and with all workers on the same flows. Nanoseconds are per \
         packet and worker, medians of rounds, quartiles behind them; packets a second are of all workers. Cycles are the time-stamp \
         counter's, whose rate is measured at the start.\n\n\
         Examples:\n  \
         weir bench                                          every case, ten thousand flows, one worker\n  \
         weir bench --case udp-dnat-ipip --flows 1000000     one case, too large for the caches\n  \
         weir bench --case both --workers 2 --json           two workers, for a program to read"
    )
}

/// Measures, and prints a line for each result, or one JSON document.
///
/// # Errors
/// Where there are too many workers for this machine, or flows for the case, or a packet was not forwarded.
pub fn run(settings: &Settings, as_json: bool) -> Result<(), String> {
    let machine = Machine::here();
    let (processors, workers) = (machine.processors, settings.workers);
    if workers == 0 || workers > processors {
        return Err(format!("{workers} workers: each needs a processor of its own, and there are {processors} here"));
    }
    if !as_json {
        println!("{}", machine.text());
        if cfg!(debug_assertions) {
            println!("weir {}, built without optimisation: figures say nothing", env!("CARGO_PKG_VERSION"));
        }
        println!("{} flows, bursts of {BURST}; medians, (quartiles)", settings.flows);
    }
    let mut results = Vec::new();
    measure(settings, |measured| {
        if !as_json {
            println!("{}", line(&measured, machine.tsc_hz));
        }
        results.push(measured);
    })?;
    if as_json {
        println!("{:#}", document(&machine, &results));
    }
    Ok(())
}

/// Hands each result to `each` as soon as it is there.
fn measure(settings: &Settings, mut each: impl FnMut(Measurement)) -> Result<(), String> {
    let all_shares: &[Flows] = if settings.workers == 1 { &[Flows::Apart] } else { &[Flows::Apart, Flows::Same] };
    for case in &settings.cases.0 {
        for shares in all_shares {
            let mut bench = Bench::new(*case, settings.flows, settings.workers, *shares)?;
            each(bench.measure(Length::Time(settings.time))?);
        }
    }
    Ok(())
}

fn line(measured: &Measurement, tsc_hz: Option<f64>) -> String {
    let (name, ns) = (measured.case.name, measured.ns);
    let cycles = tsc_hz.map_or(String::new(), |hz| format!(", {:5.0} cycles", ns.median * hz / 1e9));
    let workers = match measured.workers {
        1 => String::new(),
        workers => format!(", {workers} workers, flows {}", measured.shares.name()),
    };
    format!(
        "{name:<15} {:6.2} Mpps, {:6.1} ns ({:.1}-{:.1}) per packet{cycles}{workers}",
        measured.packets_per_second() / 1e6,
        ns.median,
        ns.low,
        ns.high
    )
}

fn document(machine: &Machine, results: &[Measurement]) -> Value {
    let round = |value: f64| (value * 10.0).round() / 10.0;
    let result = |measured: &Measurement| {
        let ns = measured.ns;
        json!({
            "case": measured.case.name,
            "description": measured.case.description,
            "flows": measured.flows,
            "workers": measured.workers,
            "flowsAre": if measured.workers == 1 { Value::Null } else { measured.shares.name().into() },
            "packetsPerSecond": measured.packets_per_second().round(),
            "nsPerPacket": {"median": round(ns.median), "lowerQuartile": round(ns.low), "upperQuartile": round(ns.high)},
            "cyclesPerPacket": machine.tsc_hz.map(|hz| round(ns.median * hz / 1e9)),
            "overheadNs": round(measured.overhead_ns),
            "rounds": measured.rounds,
        })
    };
    json!({
        "weir": {
            "version": env!("CARGO_PKG_VERSION"),
            // Who builds packages sets it; a build in a working tree does not know whether its sources are a commit's.
            "commit": option_env!("WEIR_COMMIT"),
            "optimised": !cfg!(debug_assertions),
        },
        "machine": machine.to_json(),
        "burst": BURST,
        "results": results.iter().map(result).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(cases: &str, workers: usize) -> Settings {
        Settings { cases: cases.parse().unwrap(), flows: 200, workers, time: Duration::ZERO }
    }

    fn measured(settings: &Settings) -> Vec<Measurement> {
        let mut results = Vec::new();
        measure(settings, |measured| results.push(measured)).unwrap();
        results
    }

    #[test]
    fn all_are_all_cases_and_an_unknown_one_names_them() {
        let Cases(all) = "all".parse().unwrap();
        assert_eq!(all, CASES);
        let error = "udp-dnat".parse::<Cases>().unwrap_err();
        for case in CASES {
            assert_eq!(case.name.parse(), Ok(Cases(vec![case])));
            assert!(error.contains(case.name) && help().contains(case.name), "{error}");
        }
        assert!(error.starts_with("no case udp-dnat;") && error.ends_with("or all"), "{error}");
    }

    #[test]
    fn every_case_runs_and_is_told_of() {
        let results = measured(&settings("all", 1));
        let machine = Machine { tsc_hz: Some(2e9), ..Machine::here() };
        let document = document(&machine, &results);
        assert_eq!(document["weir"]["version"], env!("CARGO_PKG_VERSION"));
        for field in ["processor", "processors", "kernel", "tscHz", "tscHzFrom"] {
            assert!(!document["machine"][field].is_null(), "{field}");
        }
        let told = document["results"].as_array().unwrap();
        assert_eq!(told.len(), CASES.len());
        for ((case, told), measured) in CASES.iter().zip(told).zip(&results) {
            assert_eq!((told["case"].as_str(), told["flows"].as_u64()), (Some(case.name), Some(200)));
            assert_eq!((told["workers"].as_u64(), told["flowsAre"].is_null()), (Some(1), true));
            for field in ["packetsPerSecond", "cyclesPerPacket", "overheadNs", "rounds"] {
                assert!(told[field].is_number(), "{field}");
            }
            for field in ["median", "lowerQuartile", "upperQuartile"] {
                assert!(told["nsPerPacket"][field].is_number(), "{field}");
            }
            let line = line(measured, machine.tsc_hz);
            assert!(line.starts_with(case.name) && line.contains("Mpps") && line.contains("cycles"), "{line}");
            assert!(!line.contains("workers"), "{line}");
        }
    }

    #[test]
    fn two_workers_have_flows_apart_and_the_same() {
        let results = measured(&settings("tcp-pod", 2));
        assert_eq!(results.iter().map(|one| one.shares).collect::<Vec<_>>(), [Flows::Apart, Flows::Same]);
        assert!(line(&results[1], None).ends_with("2 workers, flows same"));
        let document = document(&Machine { tsc_hz: None, ..Machine::here() }, &results);
        assert_eq!(document["results"][0]["flowsAre"], "apart");
        assert!(document["results"][1]["cyclesPerPacket"].is_null());
    }
}
