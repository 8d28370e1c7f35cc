//! `weir diff`: what changed objects would do to a cluster.

use std::{
    fmt::Write as _,
    io::{self, BufWriter, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde_json::{Value, json};
use weir_cluster::{
    diff::{
        self, ProblemDiff,
        policy::{Change, PolicyDiff, Question, Said},
        services::{ServiceChange, What},
    },
    policy::{
        matrix::{Pods, Port},
        places::Authority,
    },
    translate::{Assumptions, Loader},
};

use crate::common::{Cluster, ConfigFile, DIFFERENT, ERROR, Failed, Output, SAME, plural, written};

/// Say what changed objects would do to the cluster, before they are applied: who could reach whom then, what services would answer, what
/// would be wrong. Nothing is sent to the cluster.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    weir diff --kubernetes -f policy.yaml          a policy against the running cluster, by your kubeconfig\n  \
    weir diff -c weir.yaml -f changed/             all objects of a folder against the manifests of weir.yaml\n  \
    weir diff --kubernetes -f old.yaml --delete    what happens if these objects go\n  \
    kubectl kustomize overlay | weir diff --kubernetes -f -\n\
    The objects of -f take the place of those with their kind, namespace and name; others are new. It tells of connections that could be\n\
    opened and then not, or the other way round, between pods, from and to networks that rules name, and from and to anywhere else.\n\
    What host endpoints rule is left out, as are objects that make pods (Deployments): apply them, or write their pods.\n\
    Exit status: 0 nothing changes, 1 something does, 2 an error, as `kubectl diff` has it.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    cluster: Cluster,
    /// Files or folders of changed objects; `-` reads standard input. May be given several times.
    #[arg(short, long, value_name = "FILE", required = true)]
    filename: Vec<PathBuf>,
    /// The objects of -f go, whatever is in them besides their names.
    #[arg(long)]
    delete: bool,
    /// The namespace of objects that give none.
    #[arg(long, value_name = "NS", default_value = "default")]
    default_namespace: String,
    /// Only connections from or to pods of this namespace, or that pod; may be given several times.
    #[arg(short, long, value_name = "NS[/POD]")]
    namespace: Vec<Pods>,
    /// Ports to ask about: tcp/80, udp/53, sctp/5060, icmp. Default: those that the containers of each destination publish (tcp/80 where they
    /// publish none), and outside those that changed rules name.
    #[arg(long, value_name = "PORT,...", value_delimiter = ',')]
    ports: Vec<Port>,
    /// Every change and every name, however many there are.
    #[arg(long)]
    all: bool,
    /// How it is printed; JSON has everything.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Changes, and names, that are shown without --all.
const SHOWN: usize = 40;
const NAMED: usize = 3;

/// Compares and prints.
pub fn run(args: &Args) -> ExitCode {
    ExitCode::from(compare(args).unwrap_or_else(|failed| {
        eprintln!("weir: {}", failed.message());
        ERROR
    }))
}

/// All that is another.
struct Found {
    policy: PolicyDiff,
    services: Vec<ServiceChange>,
    problems: ProblemDiff,
}

impl Found {
    fn is_nothing(&self) -> bool {
        let PolicyDiff { changes, added, removed, .. } = &self.policy;
        changes.is_empty()
            && added.is_empty()
            && removed.is_empty()
            && self.services.is_empty()
            && self.problems == ProblemDiff::default()
    }
}

fn compare(args: &Args) -> Result<u8, Failed> {
    let assumptions = Assumptions { pods: false, namespace: Some(args.default_namespace.clone()) };
    let mut loader = Loader::assuming(&args.config.config, &assumptions);
    args.cluster.add_to(&mut loader, &args.config.config)?;
    let (before, wrong_before) = loader.load().map_err(|problems| Failed::config(&problems))?;
    // It lives until all is read.
    let (paths, _folder) = files(&args.filename)?;
    loader.lay_over(paths, args.delete);
    let (after, wrong_after) = loader.reload(&before.objects).map_err(|problems| Failed::config(&problems))?;
    if loader.laid_over().next().is_none() {
        let problems = wrong_after.as_ref().map_or(String::new(), |problems| format!("\n{}", problems.render(false)));
        return Err(format!("the files of -f hold no object that weir reads{problems}").into());
    }
    let question = Question { ports: args.ports.clone(), only: args.namespace.clone() };
    let found = Found {
        policy: diff::policy::policy(&before, &after, &question)?,
        services: diff::services::services(&before.services, &after.services),
        problems: diff::problems((&before, wrong_before.as_ref()), (&after, wrong_after.as_ref())),
    };
    let out = &mut BufWriter::new(io::stdout().lock());
    let text = match args.output {
        Output::Json => format!("{:#}\n", to_json(&found)),
        Output::Text => to_text(&found, args.all),
    };
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))?;
    Ok(if found.is_nothing() { SAME } else { DIFFERENT })
}

/// The files that are named, with the folder where standard input was written to.
fn files(named: &[PathBuf]) -> Result<(Vec<PathBuf>, Option<tempfile::TempDir>), Failed> {
    let mut folder = None;
    let mut paths = Vec::new();
    for path in named {
        if path != Path::new("-") {
            paths.push(path.clone());
            continue;
        }
        let mut text = Vec::new();
        io::stdin().read_to_end(&mut text).map_err(|error| format!("standard input: {error}"))?;
        let made = tempfile::tempdir()?;
        let path = made.path().join("standard-input.yaml");
        std::fs::write(&path, text)?;
        paths.push(path);
        folder = Some(made);
    }
    Ok((paths, folder))
}

/// Names, of which the first few are written out.
fn names(names: &[String], all: bool) -> String {
    let shown = if all || names.len() <= NAMED + 1 { names.len() } else { NAMED };
    let mut text = names[..shown].join(", ");
    if shown < names.len() {
        let _ = write!(text, " and {} more", names.len() - shown);
    }
    text
}

fn ports(change: &Change) -> String {
    change.ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ")
}

/// What is shown of a list: its entries, and how many are left out.
fn shown<T>(list: &[T], all: bool) -> (&[T], usize) {
    let count = if all { list.len() } else { list.len().min(SHOWN) };
    (&list[..count], list.len() - count)
}

fn left_out(text: &mut String, count: usize) {
    if count > 0 {
        let _ = writeln!(text, "  and {count} more (--all)");
    }
}

fn to_text(found: &Found, all: bool) -> String {
    if found.is_nothing() {
        return "Nothing changes.\n".to_owned();
    }
    let mut text = String::new();
    let PolicyDiff { changes, pairs, added, removed } = &found.policy;
    if !changes.is_empty() {
        let _ = writeln!(text, "Connections: {pairs} pair{} fare otherwise.", plural(*pairs));
        let (these, more) = shown(changes, all);
        for change in these {
            let Change { from, to, before, after, .. } = change;
            let _ = writeln!(text, "  {} > {} {}", names(from, all), names(to, all), ports(change));
            let _ = writeln!(text, "    before: {}", said(before));
            let _ = writeln!(text, "    after:  {}", said(after));
        }
        left_out(&mut text, more);
    }
    for (list, words) in [(added, "Workloads that are new"), (removed, "Workloads that go")] {
        if !list.is_empty() {
            let _ = writeln!(text, "{words}: {}", names(list, all));
        }
    }
    if !found.services.is_empty() {
        let _ =
            writeln!(text, "Services: {} port{} answer otherwise.", found.services.len(), plural(found.services.len()));
        let (these, more) = shown(&found.services, all);
        these.iter().for_each(|service| service_text(&mut text, service, all));
        left_out(&mut text, more);
    }
    for (list, words) in [(&found.problems.added, "New problems"), (&found.problems.removed, "Problems that go")] {
        if list.is_empty() {
            continue;
        }
        let _ = writeln!(text, "{words}:");
        let (these, more) = shown(list, all);
        for line in these {
            let _ = writeln!(text, "  {line}");
        }
        left_out(&mut text, more);
    }
    text
}

/// A verdict with what it comes from: what bars, or else what lets through.
fn said(said: &Said) -> String {
    let ends = [("egress", &said.egress), ("ingress", &said.ingress)];
    let by: Vec<String> = ends.into_iter().filter_map(|(end, by)| Some(format!("{end} by {}", by.as_ref()?))).collect();
    format!("{}: {}", said.verdict.words(), by.join("; "))
}

fn service_text(text: &mut String, service: &ServiceChange, all: bool) {
    let ServiceChange { name, protocol, what } = service;
    match what {
        What::Added => drop(writeln!(text, "  {name} ({protocol}) is new")),
        What::Removed => drop(writeln!(text, "  {name} ({protocol}) goes")),
        What::Changed { fields, backends_added, backends_removed, backends } => {
            let _ = writeln!(text, "  {name} ({protocol})");
            for (field, before, after) in fields {
                let _ = writeln!(text, "    {field}: {before} -> {after}");
            }
            for (list, sign) in [(backends_added, "+"), (backends_removed, "-")] {
                if !list.is_empty() {
                    let _ = writeln!(text, "    backends {sign} {}", names(list, all));
                }
            }
            if *backends == 0 && !backends_removed.is_empty() {
                let _ = writeln!(text, "    no backend is left");
            }
        }
    }
}

fn to_json(found: &Found) -> Value {
    let said = |said: &Said| {
        let by = |by: &Option<Authority>| by.as_ref().map(|by| json!({"by": by.name, "at": by.at}));
        json!({"verdict": said.verdict.name(), "egress": by(&said.egress), "ingress": by(&said.ingress)})
    };
    let change = |change: &Change| {
        let ports: Vec<String> = change.ports.iter().map(Port::to_string).collect();
        json!({
            "from": change.from, "to": change.to, "ports": ports, "pairs": change.pairs, "before": said(&change.before),
            "after": said(&change.after),
        })
    };
    let service = |service: &ServiceChange| {
        let mut json = json!({"name": service.name, "protocol": service.protocol});
        match &service.what {
            What::Added => json["what"] = "added".into(),
            What::Removed => json["what"] = "removed".into(),
            What::Changed { fields, backends_added, backends_removed, backends } => {
                json["what"] = "changed".into();
                let field = |(field, before, after): &(&str, String, String)| json!({"field": field, "before": before, "after": after});
                json["fields"] = fields.iter().map(field).collect();
                json["backends"] = json!({"added": backends_added, "removed": backends_removed, "after": backends});
            }
        }
        json
    };
    json!({
        "pairs": found.policy.pairs,
        "connections": found.policy.changes.iter().map(change).collect::<Vec<_>>(),
        "workloads": {"added": found.policy.added, "removed": found.policy.removed},
        "services": found.services.iter().map(service).collect::<Vec<_>>(),
        "problems": {"added": found.problems.added, "removed": found.problems.removed},
    })
}
