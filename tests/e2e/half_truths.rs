//! Files that say half of the truth for a moment, or nothing: what was in force stays.

use std::{
    fs::{self, File},
    io::Write,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ONLY_FRIENDS},
    site::{DEADLINE, NodePlan, Site, connection, passes},
};

const DENIED: &str = "10.1.1.20:5000";
/// Long enough for many connections to be tried.
const SECOND: Duration = Duration::from_secs(1);

/// A cluster whose server only friends may reach; its router runs.
fn site() -> Site {
    let mut manifests = Manifests::cluster("Always");
    for (pod, app, address) in [
        ("default/client", "client", "10.1.1.10"),
        ("default/friend", "friend", "10.1.1.11"),
        ("default/server", "server", "10.1.1.20"),
    ] {
        manifests.pod("node-a", pod, app, &[address]);
    }
    let plan = [NodePlan::new("node-a", &["192.168.10.1/24"], &[0])];
    let mut site = Site::build(&plan, &manifests.text(), ONLY_FRIENDS);
    site.start_all();
    site
}

/// Does something with a file while a denied client tries all the time, and a friend's connection is used.
fn nothing_opens_and_nothing_is_cut(site: &Site, what: &str, work: impl FnOnce()) {
    let listener = site.listen("default/server", "0.0.0.0:5000");
    let near = site.connect("default/friend", DENIED, DEADLINE).expect("a friend may");
    let (far, _) = listener.accept().unwrap();
    let (over, tries, exchanges) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        let guard = Over(&over);
        // Each try sends one SYN, which a single moment in which the pods are open would let through.
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let tried = site.connect("default/client", DENIED, Duration::from_millis(50));
                    assert!(tried.is_err(), "{what}: a denied connection opens");
                    tries.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(passes(&near, &far, DEADLINE) && passes(&far, &near, DEADLINE), "{what}: a connection is cut");
                exchanges.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        work();
        drop(guard);
    });
    let counts = [tries.into_inner(), exchanges.into_inner()];
    assert!(counts.iter().all(|count| *count > 20), "{what}: {counts:?}");
    assert!(passes(&near, &far, DEADLINE), "{what}: a connection is cut in the end");
}

fn faulty(site: &Site) -> String {
    site.status("node-a")["faultyObjects"].to_string()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_policy_file_that_is_truncated_and_written_a_second_later_opens_and_cuts_nothing() {
    let site = site();
    let path = site.lab.folder().join("policies.yaml");
    // A policy that isolates the server comes first: the half that has only it would cut friends.
    let isolating = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: isolated, namespace: default}\n\
                     spec: {podSelector: {}, policyTypes: [Ingress]}\n---\n";
    let whole = format!("{isolating}{ONLY_FRIENDS}");
    let is_in_force = |site: &Site| {
        wait_until("the text in force", DEADLINE, || (faulty(site) == "[]").then_some(())).unwrap();
    };

    nothing_opens_and_nothing_is_cut(&site, "truncated, open, written in halves", || {
        let mut file = File::create(&path).unwrap();
        thread::sleep(SECOND);
        file.write_all(isolating.as_bytes()).unwrap();
        thread::sleep(SECOND);
        // Another reload in the middle of it.
        site.hang_up("node-a");
        thread::sleep(SECOND / 2);
        assert!(faulty(&site).contains("open for writing"), "{}", faulty(&site));
        file.write_all(ONLY_FRIENDS.as_bytes()).unwrap();
        drop(file);
        is_in_force(&site);
    });
    nothing_opens_and_nothing_is_cut(&site, "truncated, closed, written a second later", || {
        fs::write(&path, "").unwrap();
        thread::sleep(SECOND);
        assert!(faulty(&site).contains("holds no document any more"), "{}", faulty(&site));
        fs::write(&path, &whole).unwrap();
        is_in_force(&site);
    });
    nothing_opens_and_nothing_is_cut(&site, "written in place again and again", || {
        let end = Instant::now() + 2 * SECOND;
        while Instant::now() < end {
            fs::write(&path, &whole).unwrap();
            thread::sleep(Duration::from_millis(3));
        }
    });

    // What stays empty is believed in the end.
    let begin = Instant::now();
    fs::write(&path, "# nothing any more\n").unwrap();
    let _listener = site.listen("default/server", "0.0.0.0:5000");
    wait_until("an open server", DEADLINE, || site.connect("default/client", DENIED, SECOND).ok()).unwrap();
    assert!(begin.elapsed() > Duration::from_secs(4), "{:?}", begin.elapsed());
    assert_eq!(site.status("node-a")["faultyObjects"], json!([]));
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_start_without_its_manifests_begins_from_the_objects_of_the_last_run() {
    let mut site = site();
    let (policies, cluster) = (site.lab.folder().join("policies.yaml"), site.lab.folder().join("cluster.yaml"));
    let objects = site.lab.folder().join("state-node-a/objects");
    wait_until("the objects are kept", DEADLINE, || objects.exists().then_some(())).unwrap();
    let serves = |site: &Site| {
        let (near, far) = connection(site, "default/friend", "default/server", DENIED);
        assert!(passes(&near, &far, DEADLINE));
        let _listener = site.listen("default/server", "0.0.0.0:5001");
        assert!(site.connect("default/client", "10.1.1.20:5001", SECOND).is_err());
    };
    serves(&site);
    assert_eq!(site.status("node-a")["stale"], Value::Null);
    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGKILL);
    assert!(!router.wait(DEADLINE).unwrap().success());

    // One is gone, and one is cut in the middle of a word.
    let whole = fs::read_to_string(&policies).unwrap();
    fs::write(&policies, "apiVersion: networking.k8s.io/v1\nkind: Netw\nspec: {").unwrap();
    let away = site.lab.folder().join("away");
    fs::rename(&cluster, &away).unwrap();
    site.start("node-a");
    serves(&site);
    let status = site.status("node-a");
    let stale = status["stale"]["objects"].to_string();
    assert!(stale.contains("cluster.yaml") && stale.contains("NetworkPolicy default/only-friends"), "{status}");
    assert_eq!(status["state"]["problem"], Value::Null);

    fs::rename(&away, &cluster).unwrap();
    fs::write(&policies, whole).unwrap();
    wait_until("nothing stale", DEADLINE, || site.status("node-a")["stale"].is_null().then_some(())).unwrap();
    serves(&site);
    site.finish();
}
