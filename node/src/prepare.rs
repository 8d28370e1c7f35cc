//! A changed configuration made ready on a thread of its own, so that control goes on serving the kernel's and the workers' events:
//! read, translated, compiled; all but what the kernel must be told.

use std::{
    collections::HashSet,
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use weir_cluster::{
    compile::{self, CompileError, Compilers},
    config::RouterConfig,
    resources::Manifests,
    sockets::{Listening, Sockets, ephemeral_ports},
    text::{Problems, Severity},
    translate::{LoadTimes, Loaded, Loader, LocalPods, Room},
};
use weir_dataplane::{attach::MAX_OWN_PORTS, snapshot::Rules};
use weir_kubernetes::LiveObjects;
use weir_nat::SnatPorts;
use weir_packet::Protocol;

/// Errors of a refused reload that are kept to be shown; the log has all.
const SHOWN_ERRORS: usize = 20;

/// How much of a configuration may have changed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Scope {
    /// The pods that this node's CNI plugin made.
    LocalPods,
    /// The objects of a running cluster too.
    Cluster,
    /// The files too.
    Files,
}

/// What is in force and what is known, when the next configuration begins to be prepared.
pub struct Basis {
    /// The objects of the configuration in force.
    pub in_force: Arc<Manifests>,
    /// The node's addresses.
    pub own_addresses: Vec<IpAddr>,
    /// The pods that this node's CNI plugin has made.
    pub local_pods: Arc<LocalPods>,
    /// The objects of a running cluster.
    pub live: LiveObjects,
    /// Ports that sockets of the node listen on, as they were looked at last.
    pub listening: Listening,
    /// The host ports that are served.
    pub host_ports: HashSet<(String, Protocol)>,
}

/// A configuration that is ready to be taken over.
pub struct Prepared {
    /// How much may be another than before.
    pub scope: Scope,
    /// What was read and translated.
    pub loaded: Loaded,
    /// All problems, where an object is at fault and another stands for it.
    pub problems: Option<Problems>,
    /// Services and policy.
    pub rules: Rules,
    /// Ports that sockets of the node listen on, as far as it matters.
    pub listening: Listening,
    /// The other ones.
    pub snat: SnatPorts,
    /// The node's addresses that it was prepared with.
    pub own_addresses: Vec<IpAddr>,
    /// How long it took.
    pub times: Times,
}

/// Why a changed configuration is not taken over.
pub enum Refused {
    /// It has errors that are not single objects'.
    Config(Problems),
    /// It is too large.
    Compile(CompileError),
}

/// What became of a preparation; a refusal with what was tried.
pub type Outcome = Result<Prepared, (Scope, Refused)>;

impl Refused {
    /// The errors, a line each.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Self::Config(problems) => {
                problems.of(Severity::Error).take(SHOWN_ERRORS).map(|error| problems.line(error)).collect()
            }
            Self::Compile(error) => vec![error.to_string()],
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(problems) => f.write_str(&problems.render(false)),
            Self::Compile(error) => error.fmt(f),
        }
    }
}

/// How long the steps of taking a configuration over took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Reading and translating.
    pub load: LoadTimes,
    /// Compiling services and policy.
    pub compile: Duration,
    /// Devices, the kernel's maps and routes, and the snapshot itself.
    pub publish: Duration,
}

impl Times {
    /// Milliseconds, by step.
    pub fn to_json(self) -> Value {
        let Self { load, compile, publish } = self;
        let ms = |duration: Duration| (duration.as_secs_f64() * 1e4).round() / 10.0;
        json!({"read": ms(load.read), "translate": ms(load.translate), "compile": ms(compile), "publish": ms(publish)})
    }
}

/// What makes the next configuration out of the one before.
struct Tools {
    loader: Loader,
    compilers: Compilers,
}

/// A preparation that is done.
pub struct Finished {
    tools: Tools,
    outcome: Outcome,
}

/// Prepares one configuration at a time. What changes in the meantime leads to one more.
pub struct Preparer {
    /// Not there while it is at work.
    tools: Option<Tools>,
    once_more: Option<Scope>,
    /// Whether the next one begins from nothing.
    forgets: bool,
    deliver: Arc<dyn Fn(Finished) + Send + Sync>,
}

impl Preparer {
    /// With the loader and the compiler of the configuration that is in force. `deliver` gets what is done, for [`Preparer::finish`]; it is
    /// called on a thread that may wait.
    pub fn new(loader: Loader, compilers: Compilers, deliver: impl Fn(Finished) + Send + Sync + 'static) -> Self {
        Self { tools: Some(Tools { loader, compilers }), once_more: None, forgets: false, deliver: Arc::new(deliver) }
    }

    /// Begins to prepare what the files say now, or, by `scope`, what they said and the pods that there are now; where that is under way,
    /// sees to it that it is done once more, as what was read already may have changed. Needs a tokio runtime.
    pub fn begin(&mut self, scope: Scope, basis: impl FnOnce() -> Basis) {
        let scope = self.once_more.take().map_or(scope, |due| due.max(scope));
        let Some(mut tools) = self.tools.take() else {
            self.once_more = Some(scope);
            return;
        };
        let (basis, deliver) = (basis(), Arc::clone(&self.deliver));
        let forgets = std::mem::take(&mut self.forgets);
        spawn_blocking(move || {
            if forgets {
                tools.loader.forget();
                tools.compilers = Compilers::default();
            }
            let outcome = prepare(&mut tools, scope, basis).map_err(|refused| (scope, refused));
            deliver(Finished { tools, outcome });
        });
    }

    /// Has the next one made from nothing: nothing that those before have left is taken over.
    pub fn forget(&mut self) {
        self.forgets = true;
    }

    /// Takes back what is needed for the next one; what became of this one.
    pub fn finish(&mut self, Finished { tools, outcome }: Finished) -> Outcome {
        self.tools = Some(tools);
        outcome
    }

    /// Whether nothing is being prepared.
    pub(crate) fn is_idle(&self) -> bool {
        self.tools.is_some()
    }

    /// Whether, and with what, to begin again, now that it is done.
    pub fn due(&self) -> Option<Scope> {
        self.once_more.filter(|_| self.tools.is_some())
    }
}

/// Prepares a configuration from nothing, beside those that follow each other, with a loader that has loaded nothing yet.
///
/// # Errors
/// As of any other.
pub fn afresh(loader: Loader, basis: Basis) -> Result<Prepared, Refused> {
    // A loader that has read nothing reads files too, and ports stay as they were looked at.
    prepare(&mut Tools { loader, compilers: Compilers::default() }, Scope::Cluster, basis)
}

fn prepare(tools: &mut Tools, scope: Scope, basis: Basis) -> Result<Prepared, Refused> {
    let Basis { in_force, own_addresses, local_pods, live, listening: looked_at, host_ports } = basis;
    tools.loader.set_local_pods(local_pods);
    tools.loader.set_live(live);
    let outcome = match scope {
        Scope::Files => tools.loader.reload(&in_force),
        Scope::LocalPods | Scope::Cluster => tools.loader.reload_local_pods(&in_force),
    };
    let (mut loaded, problems) = outcome.map_err(Refused::Config)?;
    loaded.add_local_addresses(&own_addresses);
    loaded.settle_host_ports(room(&loaded.config), &host_ports, Sockets::read);
    let begin = Instant::now();
    let rules = tools.compilers.rules(&loaded).map_err(Refused::Compile)?;
    let listening = match scope {
        Scope::Files => listening(&loaded),
        // Where there are many sockets, to list them takes longer than all else.
        Scope::LocalPods | Scope::Cluster => looked_at,
    };
    let snat = compile::snat_ports(&loaded, &rules, &listening).map_err(Refused::Compile)?;
    let times = Times { load: loaded.times, compile: begin.elapsed(), publish: Duration::ZERO };
    Ok(Prepared { scope, loaded, problems, rules, listening, snat, own_addresses, times })
}

/// What host ports must leave to the node.
pub fn room(config: &RouterConfig) -> Room {
    Room { snat: config.snat.port_range, ephemeral: ephemeral_ports(), frontends: MAX_OWN_PORTS as usize }
}

/// The ports that the node listens on, as far as they matter to this configuration.
pub fn listening(loaded: &Loaded) -> Listening {
    Listening::read().relevant(loaded.config.snat.port_range, !loaded.cluster.host_endpoints.is_empty())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::sync::mpsc;

    use super::*;
    use weir_cluster::translate::LocalPod;

    fn service(name: &str, last: u8) -> String {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.{last}, ports: [{{port: 80}}]}}\n"
        )
    }

    fn basis(objects: &Arc<Manifests>, local_pods: &Arc<LocalPods>) -> Basis {
        Basis {
            in_force: Arc::clone(objects),
            own_addresses: Vec::new(),
            local_pods: Arc::clone(local_pods),
            live: Arc::default(),
            listening: Listening::default(),
            host_ports: HashSet::new(),
        }
    }

    /// A preparer, and what it delivers.
    fn preparer(loader: Loader) -> (Preparer, mpsc::UnboundedReceiver<Finished>) {
        let (sender, finished) = mpsc::unbounded_channel();
        let deliver = move |done| drop(sender.send(done));
        (Preparer::new(loader, Compilers::default(), deliver), finished)
    }

    async fn done((preparer, finished): &mut (Preparer, mpsc::UnboundedReceiver<Finished>)) -> Outcome {
        let finished = finished.recv().await.expect("something was begun");
        preparer.finish(finished)
    }

    fn names(prepared: &Prepared) -> Vec<&str> {
        prepared.loaded.services.services.iter().map(|service| service.name.as_str()).collect()
    }

    #[test]
    fn changes_while_it_is_at_work_lead_to_one_more_and_none_is_lost() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            // As a whole at once: half a text would be another one.
            let write = |name: &str, text: &str| {
                let new = folder.path().join("new");
                fs::write(&new, text).unwrap();
                fs::rename(new, folder.path().join(name)).unwrap();
            };
            write("weir.yaml", "nodeName: a\nmanifests: [m.yaml]\n");
            write("m.yaml", &service("one", 1));
            let mut loader = Loader::new(&folder.path().join("weir.yaml"));
            let first = loader.load_strictly().unwrap();
            let none = Arc::default();
            let mut preparer = preparer(loader);
            assert_eq!(preparer.0.due(), None);

            write("m.yaml", &(service("one", 1) + &service("two", 2)));
            preparer.0.begin(Scope::Files, || basis(&first.objects, &none));
            // It has read the file, or not yet.
            write("m.yaml", &(service("one", 1) + &service("three", 3)));
            for _ in 0..3 {
                preparer.0.begin(Scope::Files, || basis(&first.objects, &none));
                assert_eq!(preparer.0.due(), None, "it is still at work");
            }
            let prepared = done(&mut preparer).await.ok().unwrap();
            assert!(["default/two", "default/three"].contains(&names(&prepared)[1]), "{:?}", names(&prepared));
            assert_eq!(preparer.0.due(), Some(Scope::Files));
            preparer.0.begin(Scope::Files, || basis(&prepared.loaded.objects, &none));
            let prepared = done(&mut preparer).await.ok().unwrap();
            assert_eq!(names(&prepared), ["default/one", "default/three"]);
            assert_eq!(preparer.0.due(), None);

            // A refusal leaves it as able as before, with the last good objects.
            write("weir.yaml", "nodeName: a\nmanifests: [m.yaml]\ntypo: 1\n");
            preparer.0.begin(Scope::Files, || basis(&prepared.loaded.objects, &none));
            let (_, refused) = done(&mut preparer).await.err().unwrap();
            assert!(refused.lines()[0].ends_with("weir.yaml:3:1: unknown field typo"), "{:?}", refused.lines());
            write("weir.yaml", "nodeName: a\nmanifests: [m.yaml]\n");
            write("m.yaml", "---\napiVersion: [\n");
            preparer.0.begin(Scope::Files, || basis(&prepared.loaded.objects, &none));
            let prepared = done(&mut preparer).await.ok().unwrap();
            assert_eq!(names(&prepared), ["default/one", "default/three"]);
            assert_eq!(prepared.loaded.faulty.len(), 2);
        });
    }

    #[test]
    fn pods_are_prepared_without_the_files_and_also_where_those_are_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let (weir, manifests) = (folder.path().join("weir.yaml"), folder.path().join("m.yaml"));
            fs::write(&weir, "nodeName: a\nmanifests: [m.yaml]\n").unwrap();
            fs::write(&manifests, service("one", 1)).unwrap();
            let mut loader = Loader::new(&weir);
            let first = loader.load_strictly().unwrap();
            let mut preparer = preparer(loader);
            let pods = |names: &[&str]| {
                let mut pods = LocalPods::default();
                for (name, last) in names.iter().zip(1..) {
                    pods.insert(Arc::new(LocalPod {
                        name: format!("x/{name}"),
                        uid: None,
                        sandbox: String::new(),
                        device: format!("cali{name}"),
                        mac: weir_packet::Mac([2, 0, 0, 0, 0, last]),
                        addresses: vec![IpAddr::from([10, 0, 0, last])],
                    }));
                }
                Arc::new(pods)
            };
            let workloads = |prepared: &Prepared| {
                let all = prepared.loaded.cluster.workloads.iter().map(|workload| workload.name.clone());
                (all.collect::<Vec<_>>(), names(prepared).len())
            };
            let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();

            // The files have changed, but nobody has said so yet.
            fs::write(&manifests, service("one", 1) + &service("two", 2)).unwrap();
            preparer.0.begin(Scope::LocalPods, || basis(&first.objects, &pods(&["p"])));
            // One more comes meanwhile, and then a file: all that is asked for is done.
            preparer.0.begin(Scope::LocalPods, || unreachable!("it is at work"));
            preparer.0.begin(Scope::Files, || unreachable!("it is at work"));
            preparer.0.begin(Scope::LocalPods, || unreachable!("it is at work"));
            let prepared = done(&mut preparer).await.ok().unwrap();
            assert_eq!((prepared.scope, workloads(&prepared)), (Scope::LocalPods, (names(&["x/p"]), 1)));
            assert_eq!(preparer.0.due(), Some(Scope::Files));
            preparer.0.begin(Scope::Files, || basis(&prepared.loaded.objects, &pods(&["p", "q"])));
            let prepared = done(&mut preparer).await.ok().unwrap();
            assert_eq!((prepared.scope, workloads(&prepared)), (Scope::Files, (names(&["x/p", "x/q"]), 2)));

            fs::write(&weir, "nodeName: a\nmanifests: [m.yaml]\ntypo: 1\n").unwrap();
            preparer.0.begin(Scope::Files, || basis(&prepared.loaded.objects, &pods(&["q"])));
            assert_eq!(done(&mut preparer).await.err().unwrap().0, Scope::Files);
            preparer.0.begin(Scope::LocalPods, || basis(&prepared.loaded.objects, &pods(&["q"])));
            let prepared = done(&mut preparer).await.ok().unwrap();
            assert_eq!((prepared.scope, workloads(&prepared)), (Scope::LocalPods, (names(&["x/q"]), 2)));
            assert_eq!(prepared.loaded.local_pods, pods(&["q"]));
        });
    }
}
