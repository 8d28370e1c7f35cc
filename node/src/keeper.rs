//! Keeps the objects that are in force for the next start, on a thread of its own: disks may take long.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tracing::{info, warn};
use weir_cluster::{
    sources::{
        keep::{KeepError, Kept},
        library::InForce,
    },
    translate::{LastApi, Loaded, Loader},
};

/// The least time between two times of writing.
const INTERVAL: Duration = Duration::from_secs(30);
/// How long the end of a router waits for what is to be written yet.
const PATIENCE: Duration = Duration::from_secs(2);

/// What keeps the objects in force. Dropped, it writes what is left to be written.
pub struct Keeper {
    folder: PathBuf,
    shared: Arc<Shared>,
    /// Told by its end that the thread has ended.
    ended: Option<mpsc::Receiver<()>>,
}

#[derive(Default)]
struct Shared {
    slot: Mutex<Slot>,
    changed: Condvar,
}

#[derive(Default)]
struct Slot {
    next: Option<Next>,
    ends: bool,
    /// Why the last try failed.
    problem: Option<String>,
}

/// What is to be written.
struct Next {
    texts: Vec<InForce>,
    api: LastApi,
}

impl Next {
    fn write(&self, folder: &Path) -> Result<(), KeepError> {
        self.api.write(folder)?;
        Kept::write(folder, &self.texts).map(|_| ())
    }
}

impl Shared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keeper {
    /// With a state folder, from whose texts `loader` is to begin.
    pub fn start(folder: PathBuf, loader: &mut Loader) -> Self {
        Self::with_interval(folder, loader, INTERVAL)
    }

    fn with_interval(folder: PathBuf, loader: &mut Loader, interval: Duration) -> Self {
        match Kept::read(&folder) {
            Ok(Some(kept)) => loader.begin_from(kept),
            Ok(None) => {}
            Err(error) => warn!(%error, "a start from the objects of the last run is not possible"),
        }
        match LastApi::read(&folder) {
            Ok(Some(api)) => loader.begin_from_api(api),
            Ok(None) => {}
            Err(error) => warn!(%error, "the backends that default/kubernetes had in the last run are not known"),
        }
        let shared = Arc::<Shared>::default();
        let (end, ended) = mpsc::channel::<()>();
        let work = {
            let (shared, folder) = (Arc::clone(&shared), folder.clone());
            move || {
                write_on(&shared, &folder, interval);
                drop(end);
            }
        };
        let started = thread::Builder::new().name("weir-keep".into()).spawn(work);
        if let Err(error) = &started {
            let problem = format!("there is no thread to keep the objects in force with: {error}");
            warn!("{problem}");
            shared.slot().problem = Some(problem);
        }
        Self { folder, shared, ended: started.is_ok().then_some(ended) }
    }

    /// Has the texts of what is in force written, soon.
    pub fn offer(&self, loaded: &Loaded) {
        self.shared.slot().next = Some(Next { texts: loaded.in_force.clone(), api: LastApi::of(&loaded.services) });
        self.shared.changed.notify_one();
    }

    /// For `weir status`.
    pub fn to_json(&self) -> Value {
        json!({"folder": self.folder, "problem": self.shared.slot().problem})
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.slot().ends = true;
        self.shared.changed.notify_one();
        if let Some(ended) = &self.ended
            && ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout)
        {
            warn!(folder = %self.folder.display(), "the objects in force are not kept for the next start: the disk takes too long");
        }
    }
}

/// Writes what is to be written, until the end.
fn write_on(shared: &Shared, folder: &Path, interval: Duration) {
    let mut last: Option<Instant> = None;
    let mut slot = shared.slot();
    loop {
        let wait = last.map_or(Duration::ZERO, |last| interval.saturating_sub(last.elapsed()));
        if !slot.ends && (slot.next.is_none() || !wait.is_zero()) {
            let wait = if slot.next.is_none() { Duration::from_secs(3600) } else { wait };
            let waited = shared.changed.wait_timeout(slot, wait);
            slot = waited.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        let Some(next) = slot.next.take() else { return };
        drop(slot);
        last = Some(Instant::now());
        let outcome = next.write(folder);
        slot = shared.slot();
        tell(&mut slot, outcome);
        if slot.problem.is_some() && !slot.ends {
            // What came meanwhile is newer.
            slot.next.get_or_insert(next);
        }
    }
}

fn tell(slot: &mut Slot, outcome: Result<(), KeepError>) {
    match outcome {
        Ok(()) => {
            if slot.problem.take().is_some() {
                info!("the objects in force are kept again");
            }
        }
        Err(error) => {
            let problem = Some(error.to_string());
            if slot.problem != problem {
                warn!("{error}");
            }
            slot.problem = problem;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn the_newest_objects_are_written_seldom_and_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (weir, manifests, state) =
            (folder.path().join("weir.yaml"), folder.path().join("m.yaml"), folder.path().join("state"));
        fs::write(&weir, "nodeName: a\nmanifests: [m.yaml]\n").unwrap();
        let kept = || Kept::read(&state).ok().flatten().map(|kept| kept.texts[0].1.clone());
        let text = |name: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n");
        let mut loader = Loader::new(&weir);
        // In the way of the folder.
        fs::write(&state, "").unwrap();
        let keeper = Keeper::with_interval(state.clone(), &mut loader, Duration::from_millis(300));
        let mut put_in_force = |name: &str| {
            fs::write(&manifests, text(name)).unwrap();
            keeper.offer(&loader.start().unwrap().0);
        };
        put_in_force("a");
        until("a problem", || keeper.to_json()["problem"].as_str().is_some_and(|why| why.contains("state")));
        fs::remove_file(&state).unwrap();
        until("it tries again", || kept() == Some(text("a")) && keeper.to_json()["problem"].is_null());
        put_in_force("b");
        put_in_force("c");
        assert_eq!(kept(), Some(text("a")), "not at once");
        until("the newest", || kept() == Some(text("c")));
        put_in_force("d");
        drop(keeper);
        assert_eq!(kept(), Some(text("d")));
        // And the next one begins with it.
        fs::write(&manifests, "a: [").unwrap();
        let mut loader = Loader::new(&weir);
        drop(Keeper::start(state, &mut loader));
        let (loaded, _) = loader.start().unwrap();
        assert_eq!(loaded.counts.get("Namespace"), Some(&1));
        assert_eq!(loaded.stale.unwrap().objects.into_iter().collect::<Vec<_>>(), ["Namespace d"]);
    }

    /// Whatever becomes of its Service and its slice, and of the router.
    #[test]
    fn the_api_keeps_its_last_backends_over_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let (weir, manifests, state) =
            (folder.path().join("weir.yaml"), folder.path().join("m.yaml"), folder.path().join("state"));
        fs::write(&weir, "nodeName: a\nmanifests: [m.yaml]\n").unwrap();
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: kubernetes}\nspec: {clusterIP: 10.96.0.1, ports: [{name: https, port: \
                       443}]}\n";
        let slice = |address: &str| {
            format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: kubernetes, labels: {{kubernetes.io/service-name: \
                 kubernetes}}}}\naddressType: IPv4\nports: [{{name: https, port: 6443}}]\nendpoints: [{{addresses: [{address}]}}]\n"
            )
        };
        // One run of a router with these objects; the backends of the API's service.
        let run = |text: &str| {
            fs::write(&manifests, text).unwrap();
            let mut loader = Loader::new(&weir);
            let keeper = Keeper::start(state.clone(), &mut loader);
            let loaded = loader.start().unwrap().0;
            keeper.offer(&loaded);
            let ports = loaded.services.services.iter();
            ports.flat_map(|port| port.endpoints.iter().map(|one| one.address.to_string())).collect::<Vec<_>>()
        };
        assert_eq!(run(service), [""; 0], "nobody has heard of any yet");
        assert_eq!(run(&(service.to_owned() + &slice("192.0.2.1"))), ["192.0.2.1"]);
        assert_eq!(run(service), ["192.0.2.1"], "its slice is gone");
        assert_eq!(run("---\n"), ["192.0.2.1"], "so is the service");
        assert_eq!(run("---\n"), ["192.0.2.1"]);
        assert_eq!(run(&(service.to_owned() + &slice("192.0.2.2"))), ["192.0.2.2"]);
        assert_eq!(run(&slice("192.0.2.3")), ["192.0.2.2"]);
        fs::write(state.join("api"), "{").unwrap();
        assert_eq!(run(service), [""; 0], "a file that cannot be read is none");
    }
}
