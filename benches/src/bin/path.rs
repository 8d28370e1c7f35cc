//! What one packet of a connection costs in `process_burst`, in ten cases, on memory rings: for holding a change against what was before.
//!
//! *Instructions* are counted by valgrind's callgrind within `measured_burst` alone: the difference of 240 and 40 bursts of 64, so that
//! what only the first packets do falls out. They are the same on every run and every machine, so they are what a change is held against
//! (`make instructions`). *Time* is taken as `weir bench` takes it (`weir_benches::measure`).

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    time::Duration,
};

use serde_json::{Map, Value, json};
use weir_benches::{
    cases::{CASES, Case},
    command::{self, Settings},
    machine::Machine,
    measure::{BURST, Bench, Flows, Length, Measurement},
};
use weir_packet::Protocol;

const USAGE: &str = "\
path report [FLOWS] [ROUNDS]      instructions, ns and cycles of every case, as lines and in target/bench-path.json
path bench CASE FLOWS WORKERS     what `weir bench --case CASE --flows FLOWS --workers WORKERS --json` prints; CASE may be all
path instructions FILE            instructions of every case; fails where one has grown by more than 5 % since the file was recorded
path record FILE                  records them
path count CASE FLOWS BURSTS      handles so many bursts of a case, for callgrind
path time CASE FLOWS ROUNDS       ns of a case
path check CASE FLOWS BURSTS      a hash over all bytes that are sent and their devices, for comparing builds";

const FLOWS: u32 = 10_000;
/// Rounds of the report.
const ROUNDS: u32 = 2000;
/// Flows while instructions are counted: opening them takes most of that time, and the table is as full with few as with many.
const COUNTED_FLOWS: u32 = 1000;
/// Bursts of the two counts whose difference is taken.
const COUNTED_BURSTS: [u32; 2] = [40, 240];
/// What instructions may grow by before somebody has to say so.
const TOLERANCE: f64 = 1.05;

fn count(case: Case, flows: u32, bursts: u32) -> Result<(), String> {
    let mut bench = Bench::new(case, flows, 1, Flows::Apart)?;
    for _ in 0..bursts {
        bench.burst(|_, _| {});
    }
    bench.all_forwarded()
}

/// A hash (FNV-1a) over what is sent, but a tunnel's identification, which begins at random, and its checksum.
fn check(case: Case, flows: u32, bursts: u32) -> Result<u64, String> {
    let mut bench = Bench::new(case, flows, 1, Flows::Apart)?;
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for _ in 0..bursts {
        bench.burst(|device, bytes| {
            let mut bytes = bytes.to_vec();
            if bytes[12..15] == [8, 0, 0x45] && bytes[23] == Protocol::IPIP.0 {
                bytes[18..20].fill(0);
                bytes[24..26].fill(0);
            }
            add(&device.0.to_be_bytes());
            add(&bytes);
        });
    }
    bench.all_forwarded()?;
    Ok(hash)
}

fn time(case: Case, flows: u32, rounds: u32) -> Result<Measurement, String> {
    Bench::new(case, flows, 1, Flows::Apart)?.measure(Length::Rounds(rounds as usize))
}

/// Instructions per packet of a case, counted by callgrind over this very program.
fn instructions(case: Case) -> Result<f64, String> {
    let program = env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let collected = |bursts: u32| {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
            .arg("--toggle-collect=*measured_burst*")
            .arg(&program)
            .args(["count", case.name, &COUNTED_FLOWS.to_string(), &bursts.to_string()])
            .output()
            .map_err(|error| format!("cannot run valgrind (Debian package valgrind): {error}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let count = text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<u64>().ok());
        match count.filter(|count| output.status.success() && *count > 0) {
            Some(count) => Ok(count),
            None => Err(format!("callgrind counted nothing in {}: {}\n{text}", case.name, output.status)),
        }
    };
    let [few, many] = COUNTED_BURSTS;
    let packets = f64::from(many - few) * BURST as f64;
    let (few, many) = (collected(few)?, collected(many)?);
    Ok(((many.saturating_sub(few)) as f64 / packets * 10.0).round() / 10.0)
}

/// The cases and instructions that a file records.
fn recorded(file: &Path) -> Result<Vec<(String, f64)>, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let read = |line: &str| {
        let (name, count) = line.split_once(char::is_whitespace)?;
        Some((name.to_owned(), count.trim().parse().ok()?))
    };
    lines.map(|line| read(line).ok_or_else(|| format!("{}: not a case and a number: {line}", file.display()))).collect()
}

fn record(file: &Path) -> Result<(), String> {
    let mut text = String::from(
        "# Instructions per packet in process_burst. `make instructions` compares with this, `make record-instructions` writes it.\n",
    );
    for case in CASES {
        let line = format!("{:<14} {:.1}", case.name, instructions(case)?);
        println!("{line}");
        text += &(line + "\n");
    }
    fs::write(file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))
}

/// Prints what has become of every case's instructions since they were recorded. Whether none has grown too much.
fn compare(file: &Path) -> Result<bool, String> {
    let before = recorded(file)?;
    let mut is_good = true;
    for case in CASES {
        let Some((_, before)) = before.iter().find(|(name, _)| name == case.name) else {
            return Err(format!("{} does not record the case {}: make record-instructions", file.display(), case.name));
        };
        let now = instructions(case)?;
        let verdict = if now > before * TOLERANCE {
            is_good = false;
            ", GROWN by more than 5 %"
        } else if now * TOLERANCE < *before {
            ", less by more than 5 %: record it"
        } else {
            ""
        };
        println!("{:<14} {before:7.1} recorded, {now:7.1} now{verdict}", case.name);
    }
    if !is_good {
        eprintln!("packets cost more than {} records; if that is meant: make record-instructions", file.display());
    }
    Ok(is_good)
}

fn report(flows: u32, rounds: u32) -> Result<(), String> {
    let tsc_hz = Machine::here().tsc_hz;
    let mut all = Map::new();
    for case in CASES {
        let ns = time(case, flows, rounds)?.ns.median;
        let instructions = instructions(case)?;
        let round = |value: f64| (value * 10.0).round() / 10.0;
        let cycles = tsc_hz.map(|hz| round(ns * hz / 1e9));
        let shown = cycles.map_or(String::new(), |cycles| format!(", {cycles:6.1} cycles"));
        println!("{:<14} {instructions:7.1} instructions, {ns:6.1} ns{shown}", case.name);
        all.insert(case.name.into(), json!({ "instructions": instructions, "ns": round(ns), "cycles": cycles }));
    }
    fs::create_dir_all("target").map_err(|error| format!("cannot make target/: {error}"))?;
    let text = serde_json::to_string_pretty(&Value::Object(all)).expect("plain numbers");
    fs::write("target/bench-path.json", text + "\n").map_err(|e| format!("cannot write target/bench-path.json: {e}"))
}

fn run(arguments: &[&str]) -> Result<bool, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("not a number: {text}\n{USAGE}"));
    match *arguments {
        ["report", ref rest @ ..] if rest.len() <= 2 => {
            let flows = rest.first().map_or(Ok(FLOWS), |text| number(text))?;
            report(flows, rest.get(1).map_or(Ok(ROUNDS), |text| number(text))?)?;
        }
        ["instructions", file] => return compare(Path::new(file)),
        ["record", file] => record(Path::new(file))?,
        ["count", case, flows, bursts] => count(Case::named(case)?, number(flows)?, number(bursts)?)?,
        ["time", case, flows, rounds] => {
            println!("{:.1}", time(Case::named(case)?, number(flows)?, number(rounds)?)?.ns.median);
        }
        ["check", case, flows, bursts] => {
            println!("{:016x}", check(Case::named(case)?, number(flows)?, number(bursts)?)?)
        }
        ["bench", cases, flows, workers] => {
            let settings = Settings {
                cases: cases.parse()?,
                flows: number(flows)?,
                workers: number(workers)? as usize,
                time: Duration::from_secs(1),
            };
            command::run(&settings, true)?;
        }
        _ => return Err(USAGE.into()),
    }
    Ok(true)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
