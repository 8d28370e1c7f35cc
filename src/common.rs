//! What several commands share: their common arguments, and how an answer or a failure is printed.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::ValueEnum;
use weir_cluster::{
    config::RouterConfig,
    text::Problems,
    translate::{Assumptions, Faulty, Loaded, Loader},
};
use weir_kubernetes::{Access, Settings, Source, access_of};

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
    pub fn load(&self, assumptions: &Assumptions, cluster: &Cluster) -> Result<Loaded, Failed> {
        let mut loader = Loader::assuming(&self.config, assumptions);
        cluster.add_to(&mut loader, &self.config)?;
        let (loaded, _) = loader.load().map_err(|problems| Failed::config(&problems))?;
        tell_faulty(&loaded.faulty);
        Ok(loaded)
    }
}

/// A running cluster to look at.
#[derive(clap::Args)]
pub struct Cluster {
    /// Take the objects of a running cluster instead of the manifests, by a kubeconfig (--kubernetes=FILE; without FILE: $KUBECONFIG, else
    /// ~/.kube/config). It needs to list and watch what weir reads, and no privileges here. Without a weir.yaml, the node is a made-up one.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub kubernetes: Option<PathBuf>,
}

/// How long a cluster has for its first lists.
const PATIENCE: Duration = Duration::from_secs(60);

impl Cluster {
    /// Gives a loader the objects of the cluster that is named, here or by the weir.yaml at `path`.
    ///
    /// # Errors
    /// Where they cannot be had.
    pub fn add_to(&self, loader: &mut Loader, path: &Path) -> Result<(), Failed> {
        // What is wrong with it is told by the load.
        let config = RouterConfig::read(path, &mut Problems::default()).map(|(config, _)| config).unwrap_or_default();
        let (access, is_asked) = match (&self.kubernetes, &config.kubernetes) {
            (Some(path), _) if path.as_os_str().is_empty() => (Access::Kubeconfig(own_kubeconfig()), true),
            (Some(path), _) => (Access::Kubeconfig(path.clone()), true),
            (None, Some(kubernetes)) => (access_of(kubernetes), false),
            (None, None) => return Ok(()),
        };
        let settings = Settings { proxy_name: config.service_proxy_name, ..Settings::default() };
        let source = Source::start(access, loader.identities(), settings)?;
        let objects = source.wait(PATIENCE).map_err(|why| format!("the cluster's objects are not to be had: {why}"))?;
        if is_asked {
            loader.set_only_live(objects)
        } else {
            loader.set_live(objects)
        }
        Ok(())
    }
}

/// The kubeconfig that kubectl takes.
fn own_kubeconfig() -> PathBuf {
    let given = std::env::var_os("KUBECONFIG").filter(|given| !given.is_empty());
    // Of several, the first.
    let given = given.and_then(|given| std::env::split_paths(&given).next());
    given.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".kube/config"))
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

/// Exit statuses of who compares, as of diff(1): nothing is another, something is, it cannot be told.
pub const SAME: u8 = 0;
/// See [`SAME`].
pub const DIFFERENT: u8 = 1;
/// See [`SAME`].
pub const ERROR: u8 = 2;

/// What makes a noun's number of `count`.
pub fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
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
