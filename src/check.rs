//! `weir check`: loads and compiles everything, and says all that is wrong.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use weir_cluster::{
    compile,
    text::{Problems, Severity, Span, Topic},
    translate::{Assumed, Loaded, Loader, makes_pods},
};

use crate::common::{Cluster, ConfigFile, Output, Unapplied};

/// Load and compile the configuration and all manifests; print every problem as file:line:column.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    unapplied: Unapplied,
    /// The namespace of objects that give none.
    #[arg(short, long, value_name = "NS", default_value = "default")]
    namespace: String,
    /// Show each note with its place, also where many objects have the same.
    #[arg(short, long)]
    verbose: bool,
    /// How problems are printed.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Checks the configuration: problems go to standard error and a summary to standard output; as JSON, the list of
/// problems goes to standard output. Exit status 0, or 1 where there is an error.
pub fn run(args: &Args) -> ExitCode {
    let (config, output) = (&*args.config.config, args.output);
    let mut loader = Loader::assuming(config, &args.unapplied.assumptions(Some(&args.namespace)));
    loader.review();
    if let Err(failed) = args.cluster.add_to(&mut loader, config) {
        eprintln!("weir: {}", failed.message());
        return ExitCode::FAILURE;
    }
    let outcome = load_and_compile(&mut loader);
    let colour = output == Output::Text && std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let Report { stdout, stderr, success } = report(&outcome, config, Form { output, colour, verbose: args.verbose });
    // A reader that went away must not turn the answer into a panic.
    let _ = std::io::stderr().write_all(stderr.as_bytes());
    let _ = std::io::stdout().write_all(stdout.as_bytes());
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Loads, and compiles what was loaded as a running router does.
fn load_and_compile(loader: &mut Loader) -> Result<Loaded, Problems> {
    let mut loaded = loader.load_strictly()?;
    missing_cores(&mut loaded);
    if let Err(error) = compile::snapshot(&loaded) {
        loaded.notes.error(Span::default(), error.to_string(), None);
    }
    if loaded.notes.has_errors() {
        loaded.notes.sort();
        return Err(loaded.notes);
    }
    Ok(loaded)
}

/// Warns of workers that could not run on this machine, which need not be the one that is configured.
fn missing_cores(loaded: &mut Loaded) {
    let here: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect();
    let missing = loaded.config.workers.cores.iter().filter(|core| !here.contains(core));
    let missing: Vec<String> = missing.map(usize::to_string).collect();
    // The default is not written anywhere.
    let Some(start) = loaded.notes.source(0).text().find("cores") else { return };
    if !here.is_empty() && !missing.is_empty() {
        let span = Span { file: 0, start: start as u32, end: (start + "cores".len()) as u32 };
        let message = format!("workers.cores: this machine has no core {} for this process", missing.join(", "));
        loaded.notes.warning(span, message, format!("it may run on {here:?}; `weir run` refuses to start with others"));
        loaded.notes.sort();
    }
}

struct Report {
    stdout: String,
    stderr: String,
    success: bool,
}

/// How a report is written.
#[derive(Clone, Copy)]
struct Form {
    output: Output,
    colour: bool,
    /// Whether notes that many objects have are told one by one.
    verbose: bool,
}

fn report(outcome: &Result<Loaded, Problems>, config: &Path, form: Form) -> Report {
    let Form { output, colour, verbose } = form;
    let (problems, success) = match outcome {
        Ok(loaded) => (&loaded.notes, true),
        Err(problems) => (problems, false),
    };
    if output == Output::Json {
        let list = serde_json::to_string_pretty(&problems.to_json()).expect("plain data becomes JSON");
        return Report { stdout: format!("{list}\n"), stderr: String::new(), success };
    }
    let topics = problems.topics();
    let told_in_short = if verbose { 0 } else { topics.values().sum::<usize>() - topics.len() };
    let number = |severity| match severity {
        Severity::Note => problems.of(severity).count() - told_in_short,
        _ => problems.of(severity).count(),
    };
    let count = |severity, one: &str| match number(severity) {
        0 => None,
        1 => Some(format!("1 {one}")),
        more => Some(format!("{more} {one}s")),
    };
    let counts = [count(Severity::Error, "error"), count(Severity::Warning, "warning"), count(Severity::Note, "note")];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    let counts = if counts.is_empty() { "no problems".to_owned() } else { counts.join(", ") };
    let mut stdout = format!("{}: {counts}\n", config.display());
    if let Ok(loaded) = outcome {
        for (kind, number) in &loaded.counts {
            stdout.push_str(&format!("  {kind}: {number}\n"));
        }
        if let Some(assumed) = &loaded.assumed {
            stdout.push_str(&made_up(assumed));
        }
    }
    let mut stderr =
        if verbose { problems.render(colour) } else { problems.render_in_short(colour) + &in_short(&topics) };
    if topics.keys().any(|topic| makes_pods(topic)) {
        stderr.push_str(
            "Are these manifests from before they are applied? --assume-pods makes up their pods and addresses.\n",
        );
    }
    Report { stdout, stderr, success }
}

/// A line for each topic of notes, with the number of objects.
fn in_short(topics: &BTreeMap<&Topic, usize>) -> String {
    if topics.is_empty() {
        return String::new();
    }
    let lines = topics.iter().map(|(topic, number)| format!("  {number:>5}  {topic}\n"));
    format!("Notes, each with its place with --verbose:\n{}", lines.collect::<String>())
}

/// What --assume-pods has made up.
fn made_up(assumed: &Assumed) -> String {
    let pods = assumed.workloads.values().map(Vec::len).sum::<usize>();
    let counted = |number: usize, one: &str| match number {
        1 => format!("1 {one}"),
        more => format!("{more} {one}s"),
    };
    format!(
        "  made up: {} of {}, addresses of {} and of {}, endpoint slices of {}\n",
        counted(pods, "pod"),
        counted(assumed.workloads.len(), "workload"),
        counted(assumed.pods, "other pod"),
        counted(assumed.services, "service"),
        counted(assumed.slices, "service"),
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use weir_cluster::translate::Assumptions;

    use super::*;

    fn loaded(path: &Path, assumptions: &Assumptions) -> Result<Loaded, Problems> {
        let mut loader = Loader::assuming(path, assumptions);
        loader.review();
        load_and_compile(&mut loader)
    }

    fn check(weir: &str, output: Output) -> (Report, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weir.yaml");
        fs::write(&path, weir).unwrap();
        let outcome = loaded(&path, &Assumptions::default());
        (report(&outcome, &path, Form { output, colour: false, verbose: false }), path.display().to_string())
    }

    #[test]
    fn a_faulty_configuration_is_shown_whole_and_fails() {
        let (report, path) = check("nodename: a\nmanifests: []\nworkers: {burst: 99}\n", Output::Text);
        assert!(!report.success);
        assert_eq!(report.stdout, format!("{path}: 3 errors\n"));
        let expected =
            format!("  \u{d7} unknown field nodename\n   \u{256d}\u{2500}[{path}:1:1]\n 1 \u{2502} nodename: a\n");
        assert!(report.stderr.contains(&expected), "{}", report.stderr);
        assert!(report.stderr.contains("help: did you mean nodeName?"), "{}", report.stderr);
        assert!(report.stderr.contains(&format!("[{path}:3:18]")), "{}", report.stderr);
    }

    #[test]
    fn a_valid_configuration_is_summed_up() {
        let (report, path) = check("nodeName: a\nmanifests: []\n", Output::Text);
        assert!(report.success);
        assert_eq!((report.stdout, report.stderr), (format!("{path}: no problems\n"), String::new()));
    }

    #[test]
    fn notes_that_many_objects_have_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let object = |version: &str, kind: &str, name: &str| {
            format!(
                "---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n"
            )
        };
        let mut text = object("apps/v1", "Deployment", "a") + &object("v1", "Service", "a");
        (0..12).for_each(|n| text += &object("v1", "ConfigMap", &format!("c{n}")));
        fs::write(folder.path().join("m.yaml"), text).unwrap();
        let path = folder.path().join("weir.yaml");
        fs::write(&path, "nodeName: a\nmanifests: [m.yaml]\n").unwrap();
        let outcome = loaded(&path, &Assumptions::default());
        let form = |verbose: bool| Form { output: Output::Text, colour: false, verbose };
        let short = report(&outcome, &path, form(false));
        let told = [
            "Notes, each with its place with --verbose:",
            "     12  ConfigMap of v1: skipped",
            "      1  Deployment of apps/v1: skipped",
            "      1  Service: without a cluster IP, so not served",
            "Are these manifests from before they are applied? --assume-pods makes up their pods and addresses.",
        ];
        assert!(short.stderr.ends_with(&(told.join("\n") + "\n")), "{}", short.stderr);
        assert!(short.stdout.starts_with(&format!("{}: 1 warning, 3 notes\n", path.display())), "{}", short.stdout);
        let long = report(&outcome, &path, form(true));
        assert_eq!(long.stderr.matches("ConfigMap of v1 is skipped").count(), 12);
        assert!(long.stdout.contains("14 notes"), "{}", long.stdout);
        let json = report(&outcome, &path, Form { output: Output::Json, ..form(false) });
        assert_eq!(json.stdout.matches("\"severity\": \"note\"").count(), 14);

        let assumptions = Assumptions { pods: true, namespace: None };
        let outcome = loaded(folder.path().join("m.yaml").as_path(), &assumptions);
        let assumed = report(&outcome, &path, form(false));
        let made_up = "  made up: 0 pods of 0 workloads, addresses of 0 other pods and of 1 service, endpoint slices of 0 services\n";
        assert!(assumed.stdout.ends_with(made_up), "{}", assumed.stdout);
        assert!(
            !assumed.stderr.contains("Deployment") && !assumed.stderr.contains("--assume-pods makes"),
            "{}",
            assumed.stderr
        );
    }

    #[test]
    fn json_lists_every_problem() {
        let (report, path) = check("nodeName: a\nmanifests: 5\n", Output::Json);
        let list: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
        assert!(!report.success && report.stderr.is_empty());
        assert_eq!(
            list,
            serde_json::json!([{
                "file": path, "line": 2, "column": 12, "severity": "error",
                "message": "manifests: expected a list, found the number 5", "help": null
            }])
        );
    }
}
