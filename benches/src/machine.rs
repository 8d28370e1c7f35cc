//! What was measured on: every figure is worth as much as is known of that.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// A machine, as far as it tells of itself.
#[derive(Clone, PartialEq, Debug)]
pub struct Machine {
    /// The processor's name, or that it is unknown.
    pub processor: String,
    /// Processors that this process may use.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: String,
    /// Processes that ran or waited, over the last minute: /proc/loadavg.
    pub load: Option<f64>,
    /// How fast the time-stamp counter goes.
    pub tsc_hz: Option<f64>,
}

/// How the rate of the time-stamp counter is got, for whoever reads a figure in cycles.
pub const TSC_METHOD: &str = "the time-stamp counter (RDTSC), counted against CLOCK_MONOTONIC over 50 ms; its rate is constant, the \
                              processor's own clock may be faster or slower";

impl Machine {
    /// This one. Takes 50 ms.
    pub fn here() -> Self {
        let line = |file: &str| fs::read_to_string(file).ok().map(|text| text.trim().to_owned());
        let information = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let value = information.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
            value.map(|(_, value)| value.trim().to_owned())
        };
        let has_steady_counter =
            field("flags").is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "constant_tsc"));
        Self {
            processor: field("model name").unwrap_or_else(|| "unknown".into()),
            processors: thread::available_parallelism().map_or(1, usize::from),
            kernel: line("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
            load: line("/proc/loadavg").and_then(|text| text.split_whitespace().next()?.parse().ok()),
            tsc_hz: has_steady_counter.then(tsc_hz).flatten(),
        }
    }

    /// For JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "processor": self.processor,
            "processors": self.processors,
            "kernel": self.kernel,
            "load": self.load,
            "tscHz": self.tsc_hz.map(f64::round),
            "tscHzFrom": self.tsc_hz.map(|_| TSC_METHOD),
        })
    }

    /// In a line.
    pub fn text(&self) -> String {
        let load = self.load.map_or(String::new(), |load| format!(", load {load:.1}"));
        let rate = self.tsc_hz.map_or("unknown".into(), |hz| format!("{:.2} GHz", hz / 1e9));
        let Self { processor, processors, kernel, .. } = self;
        format!("{processor}, {processors} processors, TSC {rate}, Linux {kernel}{load}")
    }
}

#[cfg(target_arch = "x86_64")]
fn tsc_hz() -> Option<f64> {
    // SAFETY: every x86-64 processor has RDTSC, and it touches no memory.
    let now = || (Instant::now(), unsafe { core::arch::x86_64::_rdtsc() });
    let (begin, first) = now();
    thread::sleep(Duration::from_millis(50));
    let (end, last) = now();
    let ticks = last.checked_sub(first)?;
    (ticks > 0).then(|| ticks as f64 / (end - begin).as_secs_f64())
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc_hz() -> Option<f64> {
    None
}
