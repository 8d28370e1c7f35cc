//! Figures: the middle of some samples with their spread, and how benchmarks tell them to `make report`.
//!
//! Benchmarks of crates further down take this file in as a module of theirs, so it uses std alone. perf/figures.h is the same in C.

use std::{env, fs::OpenOptions, io::Write as _};

/// The middle of some samples, and how far apart they are.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// A quarter of the samples is below.
    pub low: f64,
    /// Half of them are.
    pub median: f64,
    /// Three quarters are.
    pub high: f64,
}

impl Spread {
    /// Of samples, which are put in order.
    ///
    /// # Panics
    /// Where there is none.
    pub fn of(samples: &mut [f64]) -> Self {
        samples.sort_by(f64::total_cmp);
        let quantile = |quarter: usize| samples[(samples.len() - 1) * quarter / 4];
        Self { low: quantile(1), median: samples[samples.len() / 2], high: quantile(3) }
    }

    /// The same, of which so much is none of the measured thing's.
    #[must_use]
    pub fn less(self, amount: f64) -> Self {
        Self { low: self.low - amount, median: self.median - amount, high: self.high - amount }
    }
}

/// The environment's name for the file to which figures are added, a line of JSON each.
pub const FILE_VARIABLE: &str = "WEIR_FIGURES";

/// Adds a figure to the file that the environment names, if it names one. Names must need no escapes in JSON.
///
/// # Panics
/// Where the file cannot be written.
pub fn tell(table: &str, row: &str, column: &str, unit: &str, spread: Spread) {
    let Some(path) = env::var_os(FILE_VARIABLE) else { return };
    let mut file = OpenOptions::new().append(true).create(true).open(&path).expect("WEIR_FIGURES names a file");
    let Spread { low, median, high } = spread;
    writeln!(
        file,
        r#"{{"table":"{table}","row":"{row}","column":"{column}","unit":"{unit}","median":{median:.2},"low":{low:.2},"high":{high:.2}}}"#
    )
    .expect("a figure is written");
}
