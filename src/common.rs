//! What several commands share: their common arguments, and how an answer or a failure is printed.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::ValueEnum;
use weir_cluster::{
    text::Problems,
    translate::{Assumptions, Faulty, Loaded, Loader},
};

/// Which configuration.
#[derive(clap::Args)]
pub struct ConfigFile {
    /// The router's configuration file.
    #[arg(short, long, value_name = "FILE", default_value = "weir.yaml")]
    pub config: PathBuf,
}

impl ConfigFile {
    /// Loads as a router does at its start: what is at fault is told on standard error and left out, and the rest goes on.
    ///
    /// # Errors
    /// A bad weir.yaml.
    pub fn load(&self, assumptions: &Assumptions) -> Result<Loaded, Failed> {
        let mut loader = Loader::assuming(&self.config, assumptions);
        let (loaded, _) = loader.load().map_err(|problems| Failed::config(&problems))?;
        tell_faulty(&loaded.faulty);
        Ok(loaded)
    }
}

/// Manifests as people write them, before a cluster has made pods and addresses of them.
#[derive(clap::Args)]
pub struct Unapplied {
    /// Make up what manifests do not say before they are applied: two pods for each workload (Deployment, StatefulSet, DaemonSet,
    /// ReplicaSet, Job, CronJob), on this and on another node, addresses of pods and services, endpoint slices. Then -c may also name a
    /// folder or a file of manifests, without a weir.yaml.
    #[arg(long)]
    pub assume_pods: bool,
}

impl Unapplied {
    /// With the namespace of objects that give none.
    pub fn assumptions(&self, namespace: Option<&str>) -> Assumptions {
        Assumptions { pods: self.assume_pods, namespace: namespace.map(str::to_owned) }
    }
}

/// Tells on standard error what is at fault, with its place, and what became of it.
pub fn tell_faulty(faulty: &[Faulty]) {
    for one in faulty {
        eprintln!("weir: {}: {} ({})", one.problem, one.outcome(), one.object);
    }
    if !faulty.is_empty() {
        eprintln!("weir: `weir check` shows all that is wrong, with its lines");
    }
}

/// How an answer is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Output {
    /// For a person.
    #[default]
    Text,
    /// For a program.
    Json,
}

/// Why a command failed, for a person.
pub struct Failed(String);

impl<E: Display> From<E> for Failed {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl Failed {
    /// With what is wrong with a configuration.
    pub fn config(problems: &Problems) -> Self {
        Self(format!("the configuration has errors\n{}", problems.render(io::stderr().is_terminal())))
    }

    /// What to print after "weir: ".
    pub fn message(&self) -> &str {
        &self.0
    }
}

/// Whether to print in colours, to standard output.
pub fn has_colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// JSON for a program, over several lines.
///
/// # Errors
/// What cannot be written as JSON.
pub fn as_json(value: &impl serde::Serialize) -> Result<String, Failed> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Who reads no more, as `head`, has what they wanted.
///
/// # Errors
/// All other errors.
pub fn written(result: io::Result<()>) -> Result<(), Failed> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
