//! `make report`: runs the benchmarks, and writes one report of what they say, as Markdown, JSON and plots.
//!
//! A part is some commands, run one after the other, that tell figures: lines of JSON in the file that WEIR_FIGURES names
//! (`weir_benches::figures`), or what `path bench` prints, or Criterion's samples. Each part is kept in target/report/parts/ with its machine, its
//! date and what was built, so that parts may be run at different times, and no figure is without where it comes from. A part that was not run, or
//! cannot be, is named with the reason.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use serde_json::{Map, Value, json};
use weir_benches::{
    figures::{FILE_VARIABLE, Spread},
    machine::{Machine, TSC_METHOD},
};

const USAGE: &str = "\
report run [PART...]      runs parts (without names: all that take minutes together), then writes the report
report write              writes target/report/report.md, report.json and a plot for each table, of the parts that were run
report publish FILE       puts the tables into FILE, between its lines <!-- report: TABLE --> and <!-- end -->
report list               names the parts";

const FOLDER: &str = "target/report";

/// How a command tells its figures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// By itself, to the file that the environment names.
    Told,
    /// `path bench` on standard output: what `weir bench --json` says; the row and column of each result are the [`Axes`]'.
    Bench(Axes),
    /// The file of `make bench-path`: instructions of each case.
    Path,
    /// Criterion's samples of a group: `target/criterion/GROUP`.
    Criterion(&'static str),
}

/// What a table of `weir bench` compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Axes {
    /// Cases by numbers of flows, in ns.
    Flows,
    /// Cases by numbers of workers, in packets a second.
    Workers,
    /// Numbers of flows by who forwards, in ns.
    Peers,
}

/// A command, and how it tells.
struct Step {
    command: &'static [&'static str],
    source: Source,
}

const fn step(command: &'static [&'static str], source: Source) -> Step {
    Step { command, source }
}

/// Some figures that are taken together.
struct Part {
    name: &'static str,
    /// What its tables are about, in a line.
    about: &'static str,
    steps: &'static [Step],
    /// Programs and files that must be there: a name is looked for in PATH.
    needs: &'static [&'static str],
    needs_root: bool,
    /// Whether it is run only when named, since it takes long.
    is_long: bool,
}

const WEIR: &str = "target/release/weir";
const PATH: &str = "target/release/path";
const DPDK: [&str; 2] = ["cc", "/usr/include/dpdk/rte_eal.h"];

const PARTS: [Part; 12] = [
    Part {
        name: "instructions",
        about: "Instructions of one packet of an established connection in process_burst, counted by valgrind; other load does not change them.",
        steps: &[step(&[PATH, "report"], Source::Path)],
        needs: &["valgrind", PATH],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "pipeline",
        about: "Time of one packet of an established connection in the pipeline on memory rings, one worker.",
        steps: &[
            step(&[PATH, "bench", "all", "10000", "1"], Source::Bench(Axes::Flows)),
            step(&[PATH, "bench", "all", "1000000", "1"], Source::Bench(Axes::Flows)),
        ],
        needs: &[PATH],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "workers",
        about: "Packets a second of all workers together, 10,000 flows: with flows apart, and with all workers on the same flows.",
        steps: &[
            step(&[PATH, "bench", "all", "10000", "1"], Source::Bench(Axes::Workers)),
            step(&[PATH, "bench", "all", "10000", "2"], Source::Bench(Axes::Workers)),
        ],
        needs: &[PATH],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "forwarding",
        about: "From pod to pod on memory rings, beside DPDK: a loop like its l3fwd on the same packets, which knows no connections, services or policy \
                (perf/rte_forward.c says what it leaves out), and its testpmd, which writes MAC addresses and nothing else.",
        steps: &[
            step(&[PATH, "bench", "udp-pod", "10000", "1"], Source::Bench(Axes::Peers)),
            step(&[PATH, "bench", "udp-pod", "1000000", "1"], Source::Bench(Axes::Peers)),
            step(&["perf/dpdk.sh", "rte_forward", "2000", "10000", "1000000"], Source::Told),
            step(&["perf/testpmd.sh", "12"], Source::Told),
        ],
        needs: &[PATH, DPDK[0], DPDK[1], "dpdk-testpmd"],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "routes",
        about: "A route by its longest prefix, beside DPDK's rte_lpm. weir asks once for each connection, rte_lpm is made to be asked for each packet.",
        steps: &[
            step(&["cargo", "bench", "-q", "-p", "weir-benches", "--bench", "routes"], Source::Told),
            step(&["perf/dpdk.sh", "rte_lpm", "100000", "51"], Source::Told),
        ],
        needs: &DPDK,
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "connections",
        about: "The connection table beside other concurrent maps and DPDK's rte_hash: ns per operation and thread, the same keys for all.",
        steps: &[step(&["perf/tables.sh", "1000000", "5", "60"], Source::Told)],
        needs: &DPDK,
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "policy",
        about: "A verdict of one pod's ingress rules, beside a scan of the list and DPDK's rte_acl.",
        steps: &[
            step(&["cargo", "bench", "-q", "-p", "weir-benches", "--bench", "classify"], Source::Told),
            step(&["perf/dpdk.sh", "rte_acl", "100000", "7"], Source::Told),
        ],
        needs: &DPDK,
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "services",
        about: "A decision of the service table: lookup, lists, one random number; ten backends for each service.",
        steps: &[step(
            &[
                "cargo",
                "bench",
                "-q",
                "-p",
                "weir-benches",
                "--bench",
                "services",
                "--",
                "decide/(cluster_ip|miss|node_port)",
                "--warm-up-time",
                "0.3",
                "--measurement-time",
                "0.8",
                "--sample-size",
                "30",
            ],
            Source::Criterion("decide"),
        )],
        needs: &[],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "new-flow",
        about: "The whole first packet of a connection, at numbers of services and policy rules.",
        steps: &[step(&["cargo", "bench", "-q", "-p", "weir-benches", "--bench", "first_packet"], Source::Told)],
        needs: &[],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "reload",
        about: "From a changed file to compiled tables: a load, a change of one file of 100 documents, and a pod that the CNI plugin has made; ten \
                endpoints for each service.",
        steps: &[step(&["target/release/examples/reload", "10", "1000", "10000"], Source::Told)],
        needs: &["target/release/examples/reload"],
        needs_root: false,
        is_long: false,
    },
    Part {
        name: "veth",
        about: "Small UDP packets from pod to pod through real veth devices: weir, a bare AF_XDP forwarder on the same trunk, programs and rings, and \
                the node's kernel. All take turns; sender on core 0, forwarder on core 1.",
        steps: &[step(&["target/release/examples/veth_pps", "7", "1"], Source::Told)],
        needs: &[WEIR, "target/release/examples/veth_pps"],
        needs_root: true,
        is_long: false,
    },
    Part {
        name: "offload",
        about: "Flow offload beside the kernel's own forwarding and kube-proxy's iptables rules: `make perf-offload`.",
        steps: &[step(&["nice", "-n", "-20", "target/release/examples/offload", "3", "1"], Source::Told)],
        needs: &[WEIR, "target/release/examples/offload", "iperf3", "wrk", "iptables-nft-restore"],
        needs_root: true,
        is_long: true,
    },
];

/// One number of a table.
struct Figure {
    table: String,
    row: String,
    column: String,
    unit: String,
    spread: Spread,
}

impl Figure {
    fn to_json(&self) -> Value {
        let round = |value: f64| (value * 100.0).round() / 100.0;
        let Self { table, row, column, unit, spread } = self;
        json!({
            "table": table, "row": row, "column": column, "unit": unit,
            "median": round(spread.median), "low": round(spread.low), "high": round(spread.high),
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let text = |field: &str| value[field].as_str().map(str::to_owned);
        let number = |field: &str| value[field].as_f64();
        Some(Self {
            table: text("table")?,
            row: text("row")?,
            column: text("column")?,
            unit: text("unit")?,
            spread: Spread { low: number("low")?, median: number("median")?, high: number("high")? },
        })
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let outcome = match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", names @ ..] => run(names),
        ["write"] => write(&BTreeMap::new()).map(|()| true),
        ["publish", file] => publish(Path::new(file)).map(|()| true),
        ["list"] => {
            for part in &PARTS {
                println!("{:<14} {}{}", part.name, part.about, if part.is_long { " Only when named." } else { "" });
            }
            Ok(true)
        }
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn file_of(part: &Part) -> PathBuf {
    Path::new(FOLDER).join("parts").join(part.name).with_extension("json")
}

/// Runs parts, and writes the report. Whether each that could be run went well.
fn run(names: &[&str]) -> Result<bool, String> {
    if let Some(unknown) = names.iter().find(|name| PARTS.iter().all(|part| part.name != **name)) {
        return Err(format!("no part {unknown}; there are {}", PARTS.map(|part| part.name).join(", ")));
    }
    let is_asked = |part: &&Part| if names.is_empty() { !part.is_long } else { names.contains(&part.name) };
    let mut reasons = BTreeMap::new();
    let mut all_well = true;
    fs::create_dir_all(file_of(&PARTS[0]).with_file_name(""))
        .map_err(|error| format!("cannot make {FOLDER}: {error}"))?;
    for part in PARTS.iter().filter(is_asked) {
        // What an earlier run left is not this one's.
        let _ = fs::remove_file(file_of(part));
        if let Some(missing) = missing_need(part) {
            eprintln!("{}: not run: {missing}", part.name);
            reasons.insert(part.name, missing);
            continue;
        }
        match run_part(part) {
            Ok(()) => {}
            Err(message) => {
                eprintln!("{}: {message}", part.name);
                reasons.insert(part.name, message);
                all_well = false;
            }
        }
    }
    write(&reasons)?;
    Ok(all_well)
}

fn missing_need(part: &Part) -> Option<String> {
    let is_there = |need: &str| {
        let in_path =
            || env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(need)).find(|file| file.exists());
        if need.contains('/') { Path::new(need).exists() } else { in_path().is_some() }
    };
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    if part.needs_root && !is_root {
        return Some("it needs root, for network namespaces".into());
    }
    part.needs.iter().find(|need| !is_there(need)).map(|need| format!("{need} is not there"))
}

/// Runs a part and keeps its figures.
fn run_part(part: &Part) -> Result<(), String> {
    let told = file_of(part).with_extension("lines");
    let _ = fs::remove_file(&told);
    let absolute = env::current_dir().map_err(|error| error.to_string())?.join(&told);
    let machine = Machine::here();
    let begin = Instant::now();
    let mut figures = Vec::new();
    for step in part.steps {
        eprintln!("{}: {}", part.name, step.command.join(" "));
        let mut command = Command::new(step.command[0]);
        command.args(&step.command[1..]).env(FILE_VARIABLE, &absolute).stdin(Stdio::null());
        command.stdout(if matches!(step.source, Source::Bench(_)) { Stdio::piped() } else { Stdio::inherit() });
        let output =
            command.stderr(Stdio::inherit()).output().map_err(|error| format!("{}: {error}", step.command[0]))?;
        if !output.status.success() {
            return Err(format!("`{}` ended with {}", step.command.join(" "), output.status));
        }
        match step.source {
            Source::Told => {}
            Source::Bench(axes) => {
                let text = String::from_utf8_lossy(&output.stdout);
                let document = serde_json::from_str(&text).map_err(|error| format!("path bench: {error}"))?;
                figures.extend(of_bench(&document, axes).ok_or("path bench says something unknown")?);
            }
            Source::Path => figures.extend(of_path()?),
            Source::Criterion(group) => figures.extend(of_criterion(group)?),
        }
    }
    if let Ok(text) = fs::read_to_string(&told) {
        for line in text.lines() {
            let figure = serde_json::from_str(line).ok().as_ref().and_then(Figure::from_json);
            figures.push(figure.ok_or_else(|| format!("no figure: {line}"))?);
        }
        let _ = fs::remove_file(&told);
    }
    if figures.is_empty() {
        return Err("it told no figures".into());
    }
    let document = json!({
        "part": part.name,
        "about": part.about,
        "commands": part.steps.iter().map(|step| step.command.join(" ")).collect::<Vec<_>>(),
        "date": output_of(&["date", "-u", "+%Y-%m-%d %H:%M"]),
        "seconds": begin.elapsed().as_secs(),
        "machine": machine.to_json(),
        "loadAfter": Machine::here().load,
        "versions": {
            "weir": env!("CARGO_PKG_VERSION"),
            "commit": output_of(&["git", "describe", "--always", "--dirty", "--abbrev=12"]),
            "rustc": output_of(&["rustc", "--version"]),
            "dpdk": part.needs.contains(&DPDK[1]).then(|| output_of(&["pkg-config", "--modversion", "libdpdk"])).flatten(),
        },
        "figures": figures.iter().map(Figure::to_json).collect::<Vec<_>>(),
    });
    save(&file_of(part), &format!("{document:#}\n"))
}

/// The first line that a command prints, if it can be run.
fn output_of(command: &[&str]) -> Option<String> {
    let output = Command::new(command[0]).args(&command[1..]).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or_default().to_owned())
}

fn save(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))
}

/// A number as people read it.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| str::from_utf8(group).expect("digits")).collect();
    groups.join(",")
}

/// The results of `weir bench --json`, which `path bench` prints.
fn of_bench(document: &Value, axes: Axes) -> Option<Vec<Figure>> {
    let figure = |result: &Value| {
        let case = result["case"].as_str()?;
        let flows = format!("{} flows", grouped(result["flows"].as_u64()?));
        let ns = &result["nsPerPacket"];
        let spread = Spread {
            low: ns["lowerQuartile"].as_f64()?,
            median: ns["median"].as_f64()?,
            high: ns["upperQuartile"].as_f64()?,
        };
        let workers = result["workers"].as_u64()?;
        let ([table, row, column, unit], spread) = match axes {
            Axes::Flows => (["pipeline".into(), case.into(), flows, "ns".into()], spread),
            Axes::Peers => (["forwarding".into(), flows, format!("weir, {case}"), "ns".into()], spread),
            Axes::Workers => {
                let column = match result["flowsAre"].as_str() {
                    None => "1 worker".into(),
                    Some(are) => format!("{workers} workers, flows {are}"),
                };
                // The slowest rounds make the lowest rate.
                let rate = |ns: f64| workers as f64 * 1e3 / ns;
                let spread = Spread { low: rate(spread.high), median: rate(spread.median), high: rate(spread.low) };
                (["workers".into(), case.into(), column, "Mpps".into()], spread)
            }
        };
        Some(Figure { table, row, column, unit, spread })
    };
    document["results"].as_array()?.iter().map(figure).collect()
}

/// What `path report` wrote.
fn of_path() -> Result<Vec<Figure>, String> {
    let file = "target/bench-path.json";
    let text = fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"))?;
    let cases: Map<String, Value> = serde_json::from_str(&text).map_err(|error| format!("{file}: {error}"))?;
    let figure = |(case, of_case): (&String, &Value)| {
        let count = of_case["instructions"].as_f64()?;
        Some(Figure {
            table: "instructions".into(),
            row: case.clone(),
            column: "instructions".into(),
            unit: String::new(),
            spread: Spread { low: count, median: count, high: count },
        })
    };
    cases.iter().map(figure).collect::<Option<_>>().ok_or_else(|| format!("{file} is none of path's"))
}

/// Samples of Criterion: `target/criterion/GROUP/FUNCTION/NUMBER/new/sample.json`, iterations and nanoseconds of each.
fn of_criterion(group: &str) -> Result<Vec<Figure>, String> {
    let mut figures = Vec::new();
    for function in entries(&Path::new("target/criterion").join(group))? {
        let mut numbers: Vec<(u64, PathBuf)> = entries(&function)?
            .into_iter()
            .filter_map(|folder| Some((folder.file_name()?.to_str()?.parse().ok()?, folder.join("new/sample.json"))))
            .collect();
        numbers.sort();
        for (number, file) in numbers {
            let text = fs::read_to_string(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
            let sample: Value = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
            let all = |field: &str| sample[field].as_array().into_iter().flatten().filter_map(Value::as_f64);
            let mut each: Vec<f64> = all("times").zip(all("iters")).map(|(ns, times)| ns / times).collect();
            if each.is_empty() {
                return Err(format!("{} has no samples", file.display()));
            }
            figures.push(Figure {
                table: group.into(),
                row: grouped(number),
                column: function.file_name().unwrap_or_default().to_string_lossy().replace('_', " "),
                unit: "ns".into(),
                spread: Spread::of(&mut each),
            });
        }
    }
    Ok(figures)
}

/// Folders within a folder, in order.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    };
    read().map_err(|error| format!("cannot read {}: {error}", folder.display()))
}

/// A table of a part: its rows and columns in the order in which they were told.
struct Table {
    name: String,
    unit: String,
    rows: Vec<String>,
    columns: Vec<String>,
    cells: BTreeMap<(String, String), Spread>,
}

fn tables(part: &Value) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for figure in part["figures"].as_array().into_iter().flatten().filter_map(Figure::from_json) {
        let place = tables.iter().position(|table| table.name == figure.table).unwrap_or_else(|| {
            tables.push(Table {
                name: figure.table.clone(),
                unit: figure.unit.clone(),
                rows: Vec::new(),
                columns: Vec::new(),
                cells: BTreeMap::new(),
            });
            tables.len() - 1
        });
        let table = &mut tables[place];
        for (names, name) in [(&mut table.rows, &figure.row), (&mut table.columns, &figure.column)] {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        table.cells.insert((figure.row, figure.column), figure.spread);
    }
    tables
}

/// With as many digits as mean something.
fn shown(value: f64) -> String {
    match value.abs() {
        ..10.0 => format!("{value:.2}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => grouped(value.round() as u64),
    }
}

impl Table {
    /// As Markdown: medians, and quartiles in brackets.
    fn markdown(&self, cycles_of_ns: Option<f64>) -> String {
        let unit = if self.unit.is_empty() { String::new() } else { format!(" ({})", self.unit) };
        let heads: String = self.columns.iter().map(|column| format!(" {column}{unit} |")).collect();
        let mut text = format!("| |{heads}\n|---|{}\n", "---|".repeat(self.columns.len()));
        for row in &self.rows {
            let _ = write!(text, "| {row} |");
            for column in &self.columns {
                let cell = self.cells.get(&(row.clone(), column.clone())).map_or(String::new(), |spread| {
                    let Spread { low, median, high } = *spread;
                    let range = if low == high { String::new() } else { format!(" ({}-{})", shown(low), shown(high)) };
                    let cycles = cycles_of_ns.map_or(String::new(), |rate| format!(", {:.0} cycles", median * rate));
                    format!("{}{range}{cycles}", shown(median))
                });
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        text
    }

    fn file_name(&self) -> String {
        let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
        self.name.chars().map(plain).collect::<String>() + ".svg"
    }

    /// As bars: one for each figure, a line from quartile to quartile on it. Where figures are far apart, by their logarithm.
    fn svg(&self) -> String {
        const COLORS: [&str; 8] =
            ["#1f5fa8", "#c8501e", "#3a8a3a", "#8a4fa3", "#7a6a2e", "#2e8a8a", "#a83a5c", "#6b6b6b"];
        const LEFT: f64 = 300.0;
        const WIDTH: f64 = 460.0;
        const BAR: f64 = 14.0;
        let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let highest =
            self.cells.values().map(|spread| spread.high.max(spread.median)).fold(f64::MIN_POSITIVE, f64::max);
        let lowest = self.cells.values().map(|spread| spread.median).filter(|m| *m > 0.0).fold(highest, f64::min);
        let is_logarithmic = highest > 50.0 * lowest;
        let floor = lowest / 2.0;
        let place = |value: f64| {
            let part =
                if is_logarithmic { (value.max(floor) / floor).ln() / (highest / floor).ln() } else { value / highest };
            part.clamp(0.0, 1.0) * WIDTH
        };
        let mut body = String::new();
        let mut y = 34.0;
        for (number, column) in self.columns.iter().enumerate() {
            let color = COLORS[number % COLORS.len()];
            let _ = write!(body, "<rect x=\"10\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{color}\"/>", y - 9.0);
            let _ = writeln!(body, "<text x=\"26\" y=\"{y}\">{}</text>", escaped(column));
            y += 16.0;
        }
        for row in &self.rows {
            y += 8.0;
            let bars = self.columns.iter().enumerate().filter_map(|(number, column)| {
                Some((COLORS[number % COLORS.len()], self.cells.get(&(row.clone(), column.clone()))?))
            });
            for (count, (color, spread)) in bars.enumerate() {
                if count == 0 {
                    let _ = writeln!(
                        body,
                        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                        LEFT - 8.0,
                        y + 11.0,
                        escaped(row)
                    );
                }
                let (end, middle) = (place(spread.median), y + BAR / 2.0);
                let [from, to] = [spread.low, spread.high].map(|value| LEFT + place(value));
                let _ = writeln!(
                    body,
                    "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{end:.1}\" height=\"{}\" fill=\"{color}\"/>\
                     <line x1=\"{from:.1}\" y1=\"{middle}\" x2=\"{to:.1}\" y2=\"{middle}\" stroke=\"black\"/>\
                     <text x=\"{:.1}\" y=\"{}\">{}</text>",
                    BAR - 2.0,
                    LEFT + end.max(to - LEFT) + 6.0,
                    y + 11.0,
                    shown(spread.median)
                );
                y += BAR;
            }
        }
        let unit = if self.unit.is_empty() { String::new() } else { format!(", {}", self.unit) };
        let scale = if is_logarithmic { ", logarithmic" } else { "" };
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"840\" height=\"{0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"840\" height=\"{0}\" fill=\"white\"/>\n\
             <text x=\"10\" y=\"16\" font-weight=\"bold\">{1}{unit}{scale}: medians, lines from quartile to quartile</text>\n{body}</svg>\n",
            y + 12.0,
            escaped(&self.name)
        )
    }
}

/// A part that was run, or why there is none.
fn kept(part: &Part) -> Option<Value> {
    serde_json::from_str(&fs::read_to_string(file_of(part)).ok()?).ok()
}

/// Where and how a part's figures were taken, in a paragraph.
fn origin(part: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let (machine, versions) = (&part["machine"], &part["versions"]);
    let commands: Vec<String> =
        part["commands"].as_array().into_iter().flatten().map(|command| format!("`{}`", text(command))).collect();
    let load = |value: &Value| value.as_f64().map_or("unknown".into(), |load| format!("{load:.1}"));
    let dpdk = versions["dpdk"].as_str().map_or(String::new(), |version| format!(", DPDK {version}"));
    format!(
        "{}. {}, {} processors, Linux {}, load {} before and {} after; weir {} ({}), {}{dpdk}; {} UTC.",
        commands.join(", "),
        text(&machine["processor"]),
        machine["processors"],
        text(&machine["kernel"]),
        load(&machine["load"]),
        load(&part["loadAfter"]),
        text(&versions["weir"]),
        text(&versions["commit"]),
        text(&versions["rustc"]),
        text(&part["date"]),
    )
}

/// Cycles of a nanosecond, where a table's figures are the pipeline's.
fn cycles_of_ns(part: &Value, table: &Table) -> Option<f64> {
    let hz = part["machine"]["tscHz"].as_f64()?;
    (table.name == "pipeline").then_some(hz / 1e9)
}

/// Writes the report. `reasons`: why parts were not run just now.
fn write(reasons: &BTreeMap<&str, String>) -> Result<(), String> {
    fs::create_dir_all(FOLDER).map_err(|error| format!("cannot make {FOLDER}: {error}"))?;
    let mut text = format!(
        "# What weir costs\n\nMedians; in brackets the quartiles of rounds. Cycles are of {TSC_METHOD}. Absolute figures of a shared machine are worth less than\n\
         ratios within one table, whose rounds take turns where it says so.\n"
    );
    let (mut parts, mut missing) = (Vec::new(), Vec::new());
    for part in &PARTS {
        let Some(document) = kept(part) else {
            let reason = reasons.get(part.name).cloned();
            let reason = reason.unwrap_or_else(|| format!("it was not run: report run {}", part.name));
            missing.push(json!({"part": part.name, "about": part.about, "reason": reason}));
            continue;
        };
        let _ = write!(text, "\n## {}\n\n{}\n\n{}\n", part.name, part.about, origin(&document));
        for table in tables(&document) {
            save(&Path::new(FOLDER).join(table.file_name()), &table.svg())?;
            let _ = write!(
                text,
                "\n### {}\n\n{}\n![{0}]({})\n",
                table.name,
                table.markdown(cycles_of_ns(&document, &table)),
                table.file_name()
            );
        }
        parts.push(document);
    }
    if !missing.is_empty() {
        text += "\n## Missing\n\n";
        for part in &missing {
            let field = |name: &str| part[name].as_str().unwrap_or_default().to_owned();
            let _ = writeln!(text, "- {}: {}. {}", field("part"), field("reason"), field("about"));
        }
    }
    save(&Path::new(FOLDER).join("report.md"), &text)?;
    let document = json!({"parts": parts, "missing": missing});
    save(&Path::new(FOLDER).join("report.json"), &format!("{document:#}\n"))?;
    eprintln!("{FOLDER}/report.md, {FOLDER}/report.json: {} parts, {} missing", parts.len(), missing.len());
    Ok(())
}

/// Puts tables where a document has a place for them.
fn publish(file: &Path) -> Result<(), String> {
    const END: &str = "<!-- end -->";
    let text = fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let parts: Vec<Value> = PARTS.iter().filter_map(kept).collect();
    let section = |name: &str| {
        let mut all = parts.iter().flat_map(|part| tables(part).into_iter().map(move |table| (part, table)));
        let (part, table) = all.find(|(_, table)| table.name == name)?;
        Some(format!("{}\n\n{}", origin(part), table.markdown(cycles_of_ns(part, &table))))
    };
    let mut result = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        result += line;
        result.push('\n');
        let Some(name) = line.strip_prefix("<!-- report: ").and_then(|rest| rest.strip_suffix(" -->")) else {
            continue;
        };
        let old: Vec<&str> = lines.by_ref().take_while(|line| *line != END).collect();
        match section(name) {
            Some(section) => result += &section,
            None => {
                eprintln!("{}: {name} stays as it is: it was not run", file.display());
                old.iter().for_each(|line| result += &format!("{line}\n"));
            }
        }
        result += END;
        result.push('\n');
    }
    save(file, &result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(row: &str, column: &str, median: f64) -> Figure {
        let spread = Spread { low: median - 1.0, median, high: median + 1.0 };
        Figure { table: "a <table>".into(), row: row.into(), column: column.into(), unit: "ns".into(), spread }
    }

    #[test]
    fn tables_keep_the_order_in_which_figures_were_told_and_leave_what_is_missing_empty() {
        let figures = [figure("ten", "weir", 20.0), figure("ten", "other", 2000.0), figure("many", "weir", 5.0)];
        let part = json!({"figures": figures.iter().map(Figure::to_json).collect::<Vec<_>>()});
        let tables = tables(&part);
        assert_eq!(tables.len(), 1);
        assert_eq!(
            tables[0].markdown(None),
            "| | weir (ns) | other (ns) |\n|---|---|---|\n\
             | ten | 20.0 (19.0-21.0) | 2,000 (1,999-2,001) |\n| many | 5.00 (4.00-6.00) |  |\n"
        );
        assert!(tables[0].markdown(Some(2.0)).contains("20.0 (19.0-21.0), 40 cycles"));
        let svg = tables[0].svg();
        assert!(svg.contains("a &lt;table&gt;, ns, logarithmic") && svg.matches("<line ").count() == 3, "{svg}");
        assert_eq!(tables[0].file_name(), "a--table-.svg");
    }

    #[test]
    fn results_of_weir_bench_become_figures() {
        let result = |workers: u64, are: Value| {
            json!({"case": "both", "flows": 10_000, "workers": workers, "flowsAre": are,
                   "nsPerPacket": {"median": 50.0, "lowerQuartile": 40.0, "upperQuartile": 100.0}})
        };
        let document = json!({"results": [result(1, Value::Null), result(2, "same".into())]});
        let figures = of_bench(&document, Axes::Workers).unwrap();
        assert_eq!((&figures[0].row[..], &figures[0].column[..]), ("both", "1 worker"));
        assert_eq!((&figures[1].column[..], &figures[1].unit[..]), ("2 workers, flows same", "Mpps"));
        assert_eq!(figures[1].spread, Spread { low: 20.0, median: 40.0, high: 50.0 });
        let figures = of_bench(&document, Axes::Flows).unwrap();
        assert_eq!(
            (&figures[0].row[..], &figures[0].column[..], figures[0].spread.high),
            ("both", "10,000 flows", 100.0)
        );
        assert!(of_bench(&json!({"results": [{}]}), Axes::Flows).is_none());
    }

    #[test]
    fn numbers_are_shown_with_what_means_something() {
        assert_eq!([0.126, 12.34, 999.96, 1_234_567.8].map(shown), ["0.13", "12.3", "1000.0", "1,234,568"]);
        assert_eq!([0, 999, 1000, 1_000_000].map(grouped), ["0", "999", "1,000", "1,000,000"]);
    }
}
