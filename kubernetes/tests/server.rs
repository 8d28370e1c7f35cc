//! The client beside an API server that is played: one that has no streaming lists, cuts, loses its history, refuses a field, sends nonsense.

mod played;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use flate2::{Compression, read::GzEncoder};
use serde_json::{Value, json};
use weir_cluster::resources::{Identities, Manifests};
use weir_kubernetes::{Access, Settings, Source};

use played::Request;

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct World {
    /// Up to which version there is history.
    version: u64,
    /// By path and name.
    objects: BTreeMap<(String, String), Value>,
    /// Version, path, type, object.
    events: Vec<(u64, String, &'static str, Value)>,
    /// What was before is compacted.
    compacted: u64,
    streams: bool,
    refuses_fields: bool,
    /// Watches end when this changes.
    cuts: u32,
    groups: Value,
    asked: Vec<String>,
    /// Paths that it does not let be read.
    forbidden: BTreeSet<String>,
    /// A list breaks off within its first object.
    breaks_lists: bool,
}

#[derive(Clone)]
struct Server {
    world: Arc<(Mutex<World>, Condvar)>,
    address: SocketAddr,
}

impl Server {
    fn start(streams: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let world = World { version: 10, streams, groups: json!({"groups": []}), ..World::default() };
        let server =
            Self { world: Arc::new((Mutex::new(world), Condvar::new())), address: listener.local_addr().unwrap() };
        let own = server.clone();
        played::accept(listener, move |stream| own.serve(stream));
        server
    }

    fn change(&self, change: impl FnOnce(&mut World)) {
        change(&mut self.world.0.lock().unwrap());
        self.world.1.notify_all();
    }

    fn put(&self, path: &str, name: &str, more: Value) {
        self.change(|world| {
            world.version += 1;
            let mut object = more;
            object["metadata"]["name"] = json!(name);
            object["metadata"]["resourceVersion"] = json!(world.version.to_string());
            let was = world.objects.insert((path.to_owned(), name.to_owned()), object.clone());
            world.events.push((
                world.version,
                path.to_owned(),
                if was.is_some() { "MODIFIED" } else { "ADDED" },
                object,
            ));
        });
    }

    fn delete(&self, path: &str, name: &str) {
        self.change(|world| {
            world.version += 1;
            let mut object = world.objects.remove(&(path.to_owned(), name.to_owned())).unwrap();
            object["metadata"]["resourceVersion"] = json!(world.version.to_string());
            world.events.push((world.version, path.to_owned(), "DELETED", object));
        });
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut out = stream;
        loop {
            let Some(Request { target, headers, .. }) = Request::read(&mut reader)? else { return Ok(()) };
            let may_compress = headers.contains("accept-encoding: gzip");
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            let given: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
            self.world.0.lock().unwrap().asked.push(target.clone());
            if given.contains_key("watch") {
                assert!(!may_compress, "a watch may not be held back");
                return self.watch(&mut out, path, &given);
            }
            let world = self.world.0.lock().unwrap();
            let (code, body) = match path {
                "/apis" => (200, world.groups.clone()),
                // It asks with limit=1 whether a path is there.
                path if world.forbidden.contains(path) => {
                    (403, json!({"kind": "Status", "code": 403, "reason": "Forbidden", "message": "no"}))
                }
                path if path.starts_with("/apis/") && path.matches('/').count() == 3 && !query.contains("limit") => {
                    let of = |name: &str, kind: &str| json!({"name": name, "kind": kind});
                    (200, json!({"resources": [of("tiers", "Tier"), of("clusterinformations", "ClusterInformation")]}))
                }
                _ if world.refuses_fields && given.contains_key("fieldSelector") => (
                    400,
                    json!({"kind": "Status", "code": 400, "reason": "BadRequest", "message": "field label not supported"}),
                ),
                path => {
                    let all: Vec<&Value> =
                        world.objects.iter().filter(|((of, _), _)| of == path).map(|(_, object)| object).collect();
                    let from: usize = given.get("continue").map_or(0, |token| token.parse().unwrap());
                    let page: Vec<_> = all.iter().skip(from).take(2).collect();
                    let go_on = (from + 2 < all.len()).then(|| (from + 2).to_string());
                    (
                        200,
                        json!({"metadata": {"resourceVersion": world.version.to_string(), "continue": go_on}, "items": page}),
                    )
                }
            };
            drop(world);
            assert!(may_compress, "lists are long");
            let (body, mut bytes) = (body.to_string(), Vec::new());
            GzEncoder::new(body.as_bytes(), Compression::fast()).read_to_end(&mut bytes)?;
            write!(
                out,
                "HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n",
                bytes.len()
            )?;
            out.write_all(&bytes)?;
        }
    }

    fn watch(&self, out: &mut TcpStream, path: &str, given: &BTreeMap<&str, &str>) -> std::io::Result<()> {
        let (lock, changed) = &*self.world;
        let is_list = given.contains_key("sendInitialEvents");
        let mut world = lock.lock().unwrap();
        let refusal = match () {
            () if world.forbidden.contains(path) => Some((403, "no")),
            () if is_list && !world.streams => Some((422, "sendInitialEvents is forbidden for watch")),
            () if world.refuses_fields && given.contains_key("fieldSelector") => {
                Some((400, "field label not supported"))
            }
            () => None,
        };
        if let Some((code, message)) = refusal {
            let body = json!({"kind": "Status", "code": code, "message": message}).to_string();
            return write!(
                out,
                "HTTP/1.1 {code} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        }
        write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let mut send = |kind: &str, object: Value| {
            let line = json!({"type": kind, "object": object}).to_string() + "\n";
            // In two pieces, as a network cuts where it likes.
            let (one, other) = line.split_at(line.len() / 2);
            write!(out, "{:x}\r\n{one}\r\n", one.len())?;
            out.flush()?;
            write!(out, "{:x}\r\n{other}\r\n", other.len())
        };
        let mut from = given.get("resourceVersion").map_or(world.version, |from| from.parse().unwrap());
        let cuts = world.cuts;
        if is_list {
            for object in world.objects.iter().filter(|((of, _), _)| of == path).map(|(_, object)| object.clone()) {
                send("ADDED", object)?;
                if world.breaks_lists {
                    return Ok(());
                }
            }
            let mark = json!({"metadata": {"resourceVersion": from.to_string(),
                "annotations": {"k8s.io/initial-events-end": "true"}}});
            send("BOOKMARK", mark)?;
        }
        if from < world.compacted {
            return send("ERROR", json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}));
        }
        loop {
            for (version, of, kind, object) in world.events.clone() {
                if version > from && of == path {
                    send(kind, object)?;
                }
            }
            from = world.version;
            world = changed.wait(world).unwrap();
            if world.cuts != cuts {
                return Ok(());
            }
        }
    }
}

struct Node {
    source: Source,
    folder: tempfile::TempDir,
}

impl Node {
    fn of(server: &Server) -> Self {
        Self::start(server.address, tempfile::tempdir().unwrap())
    }

    /// With a folder in which objects are kept.
    fn start(server: SocketAddr, folder: tempfile::TempDir) -> Self {
        let path = played::kubeconfig(folder.path(), server);
        let settings = Settings { folder: Some(folder.path().join("kept")), ..Settings::default() };
        let source = Source::start(Access::Kubeconfig(path), &Identities::default(), settings).unwrap();
        Self { source, folder }
    }

    fn names(&self) -> Option<String> {
        let objects = self.source.objects()?;
        let numbered = (0..).zip(objects.iter());
        let mut problems = weir_cluster::text::Problems::default();
        let manifests = Manifests::of(numbered, &BTreeMap::new(), &mut Default::default(), &mut problems);
        let mut names: Vec<String> = manifests.iter().map(|origin| origin.to_string()).collect();
        names.sort();
        Some(names.join(" "))
    }

    #[track_caller]
    fn comes_to(&self, expected: &str) {
        let until = Instant::now() + PATIENCE;
        while self.names().as_deref() != Some(expected) {
            assert!(
                Instant::now() < until,
                "{:?} is not {expected:?}: {}",
                self.names(),
                self.source.state().missing()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

const PODS: &str = "/api/v1/pods";
const SERVICES: &str = "/api/v1/services";

fn in_x() -> Value {
    json!({"metadata": {"namespace": "x"}})
}

fn life(streams: bool) {
    let server = Server::start(streams);
    for name in ["a", "b", "c"] {
        server.put(PODS, name, in_x());
    }
    let node = Node::of(&server);
    node.comes_to("Pod/x/a Pod/x/b Pod/x/c");
    server.put(PODS, "d", in_x());
    server.delete(PODS, "a");
    node.comes_to("Pod/x/b Pod/x/c Pod/x/d");
    // The watch goes on from where it was cut, or from a new list where its place is gone.
    server.change(|world| world.cuts += 1);
    server.put(PODS, "e", in_x());
    node.comes_to("Pod/x/b Pod/x/c Pod/x/d Pod/x/e");
    server.change(|world| {
        world.cuts += 1;
        world.version += 10;
        world.compacted = world.version;
        world.events.clear();
        drop(world.objects.remove(&(PODS.to_owned(), "b".to_owned())));
    });
    node.comes_to("Pod/x/c Pod/x/d Pod/x/e");
    let asked = server.world.0.lock().unwrap().asked.clone();
    let lists = |what: &str| asked.iter().filter(|asked| asked.starts_with(PODS) && asked.contains(what)).count();
    if streams {
        assert_eq!((lists("limit="), lists("sendInitialEvents")), (0, 2), "{asked:#?}");
    } else {
        // It is remembered that there are no streaming lists.
        assert!(lists("limit=") >= 4 && lists("sendInitialEvents") == 1, "{asked:#?}");
    }
}

#[test]
fn a_server_with_streaming_lists_is_followed_through_cuts_and_compaction() {
    life(true);
}

#[test]
fn a_server_without_streaming_lists_is_followed_as_well() {
    life(false);
}

#[test]
fn nothing_is_handed_on_of_a_list_that_broke_off_and_fields_that_a_server_does_not_know_are_left_out() {
    let server = Server::start(true);
    server.put(PODS, "a", in_x());
    server.put(PODS, "b", in_x());
    server.put(SERVICES, "s", json!({"metadata": {"namespace": "x"}, "spec": {"clusterIP": "10.96.0.1"}}));
    server.change(|world| (world.breaks_lists, world.refuses_fields) = (true, true));
    let node = Node::of(&server);
    let until = Instant::now() + PATIENCE;
    let is_broken = || node.source.state().kinds.iter().any(|kind| kind.name == "pods" && kind.failure.is_some());
    while !is_broken() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.names(), None);
    server.change(|world| world.breaks_lists = false);
    node.comes_to("Pod/x/a Pod/x/b Service/x/s");
    // A later list that breaks off takes nothing away.
    server.change(|world| {
        world.breaks_lists = true;
        world.cuts += 1;
        world.version += 10;
        world.compacted = world.version;
    });
    server.put(SERVICES, "t", json!({"metadata": {"namespace": "x"}, "spec": {"clusterIP": "10.96.0.2"}}));
    server.change(|world| world.breaks_lists = false);
    node.comes_to("Pod/x/a Pod/x/b Service/x/s Service/x/t");
}

#[test]
fn a_kind_that_cannot_be_read_is_told_and_holds_up_the_start_only() {
    let server = Server::start(true);
    server.put(PODS, "a", in_x());
    server.put(PODS, "b", json!({"metadata": {"namespace": "x"}}));
    let accounts = "/api/v1/serviceaccounts";
    server.change(|world| world.forbidden.extend([accounts.to_owned(), SERVICES.to_owned()]));
    let node = Node::of(&server);
    let until = Instant::now() + PATIENCE;
    while !node.source.state().missing().contains("services: the API server refuses /api/v1/services: 403") {
        assert!(Instant::now() < until, "{}", node.source.state().missing());
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.names(), None);
    server.change(|world| assert!(world.forbidden.remove(SERVICES)));
    node.comes_to("Pod/x/a Pod/x/b");
    // A policy by accounts has them asked for, in vain.
    let policies = "/apis/networking.k8s.io/v1/networkpolicies";
    server.put(
        policies,
        "p",
        json!({"metadata": {"namespace": "x"}, "spec": {"serviceAccountSelector": "a", "podSelector": {}}}),
    );
    server.put(PODS, "c", in_x());
    node.comes_to("NetworkPolicy/x/p Pod/x/a Pod/x/b Pod/x/c");
}

#[test]
fn where_nobody_answers_a_start_has_what_was_kept_until_somebody_does() {
    let server = Server::start(true);
    server.put(PODS, "a", in_x());
    server.put(PODS, "b", in_x());
    let node = Node::of(&server);
    node.comes_to("Pod/x/a Pod/x/b");
    server.put(PODS, "c", in_x());
    server.delete(PODS, "a");
    node.comes_to("Pod/x/b Pod/x/c");
    assert!(node.source.fresh().is_some() && node.source.state().kept_since.is_none());
    let Node { source, folder } = node;
    drop(source);
    let file = folder.path().join("kept/_v1_pods");
    let until = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(&file).is_ok_and(|text| text.lines().any(|line| line.starts_with('-'))) {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    // A port that nobody listens at.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let node = Node::start(nobody, folder);
    node.comes_to("Pod/x/b Pod/x/c");
    assert!(node.source.fresh().is_none() && node.source.state().kept_since.is_some());
    server.delete(PODS, "b");
    let node = Node::start(server.address, node.folder);
    node.comes_to("Pod/x/c");
    assert!(node.source.state().kept_since.is_none());
    let until = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(&file).is_ok_and(|text| text.lines().count() == 1) {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    // What is broken in the middle is not taken at all.
    let Node { source, folder } = node;
    drop(source);
    std::fs::write(&file, "+{\"metadata\":{}}\n").unwrap();
    let node = Node::start(nobody, folder);
    let until = Instant::now() + PATIENCE;
    // By then it has read what was kept.
    while node.source.state().kinds.is_empty() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.names(), None);
}

#[test]
fn what_makes_no_sense_is_told_and_changes_nothing() {
    let server = Server::start(true);
    server.put(PODS, "a", in_x());
    let node = Node::of(&server);
    node.comes_to("Pod/x/a");
    server.change(|world| world.events.push((world.version + 1, PODS.to_owned(), "ADDED", json!([1, 2, 3]))));
    let until = Instant::now() + PATIENCE;
    let is_told = || {
        node.source.state().kinds.iter().any(|kind| kind.failure.as_ref().is_some_and(|why| why.contains("no object")))
    };
    while !is_told() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.names().as_deref(), Some("Pod/x/a"));
}

/// A group of Calico's, as discovery has it.
fn group(name: &str, version: &str) -> Value {
    json!({"name": name, "versions": [{"version": version}]})
}

const CRD: &str = "/apis/crd.projectcalico.org/v1";
const V3: &str = "/apis/projectcalico.org/v3";

fn ready(server: &Server, group: &str, is_ready: bool) {
    server.put(&format!("{group}/clusterinformations"), "default", json!({"spec": {"datastoreReady": is_ready}}));
}

fn tier(server: &Server, group: &str, name: &str) {
    server.put(&format!("{group}/tiers"), name, json!({"spec": {"order": 1}}));
}

#[track_caller]
fn is_frozen(node: &Node, expected: bool) {
    let until = Instant::now() + PATIENCE;
    while node.source.state().is_frozen != expected {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_is_followed_and_not_listed_is_named_and_mended() {
    let server = Server::start(true);
    let path = "/api/v1/namespaces";
    for name in ["a", "b"] {
        server.put(path, name, json!({"metadata": {"labels": {"v": "1"}}}));
    }
    let node = Node::of(&server);
    node.comes_to("Namespace/a Namespace/b");
    let compare = || node.source.lister().compare(PATIENCE).unwrap();
    assert_eq!(compare(), []);
    // Events that nobody tells: one goes, one is another, one comes.
    server.change(|world| {
        world.objects.remove(&(path.to_owned(), "a".to_owned()));
        let changed = |name: &str, version: &str| json!({"metadata": {"name": name, "resourceVersion": version, "labels": {"v": "2"}}});
        world.objects.insert((path.to_owned(), "b".to_owned()), changed("b", "11"));
        world.objects.insert((path.to_owned(), "c".to_owned()), changed("c", "11"));
    });
    let found = compare();
    let found: Vec<_> =
        found.iter().map(|one| (one.object.as_str(), one.known.is_some(), one.listed.is_some())).collect();
    assert_eq!(found, [("Namespace/b", true, true), ("Namespace/c", false, true), ("Namespace/a", true, false)]);
    node.source.lister().follow_anew();
    node.comes_to("Namespace/b Namespace/c");
    let until = Instant::now() + PATIENCE;
    while !compare().is_empty() {
        assert!(Instant::now() < until, "{:?}", compare());
    }
}

#[test]
fn while_calicos_datastore_is_not_ready_what_was_in_force_stays() {
    let server = Server::start(true);
    server.change(|world| world.groups = json!({"groups": [group("crd.projectcalico.org", "v1")]}));
    ready(&server, CRD, true);
    tier(&server, CRD, "one");
    let node = Node::of(&server);
    node.comes_to("ClusterInformation/default Tier/one");
    ready(&server, CRD, false);
    is_frozen(&node, true);
    tier(&server, CRD, "two");
    server.delete(&format!("{CRD}/tiers"), "one");
    server.put(PODS, "a", in_x());
    let until = Instant::now() + PATIENCE;
    let knows = || node.source.state().kinds.iter().any(|kind| kind.name == "pods" && kind.count == 1);
    while !knows() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.names().as_deref(), Some("ClusterInformation/default Tier/one"));
    // Who starts meanwhile goes on with what was kept.
    let Node { source, folder } = node;
    drop(source);
    let node = Node::start(server.address, folder);
    is_frozen(&node, true);
    assert_eq!(node.names().as_deref(), Some("ClusterInformation/default Tier/one"));
    // Once more, after all was listed meanwhile.
    let Node { source, folder } = node;
    drop(source);
    let node = Node::start(server.address, folder);
    is_frozen(&node, true);
    assert_eq!(node.names().as_deref(), Some("ClusterInformation/default Tier/one"));
    assert!(node.source.fresh().is_none() && node.source.state().missing().contains("datastoreReady"));
    ready(&server, CRD, true);
    is_frozen(&node, false);
    node.comes_to("ClusterInformation/default Pod/x/a Tier/two");
}

#[test]
fn calicos_objects_count_where_they_were_until_all_of_them_are_where_they_go() {
    let server = Server::start(true);
    let both = json!({"groups": [group("crd.projectcalico.org", "v1"), group("projectcalico.org", "v3")]});
    server.change(|world| world.groups = both);
    ready(&server, CRD, true);
    tier(&server, CRD, "one");
    let node = Node::of(&server);
    node.comes_to("ClusterInformation/default Tier/one");
    // They move: what is there yet is not all.
    ready(&server, V3, false);
    ready(&server, CRD, false);
    is_frozen(&node, true);
    tier(&server, V3, "one");
    tier(&server, V3, "two");
    let until = Instant::now() + PATIENCE;
    let follows_both =
        || node.source.state().kinds.iter().any(|kind| kind.name == "projectcalico.org/tiers" && kind.count == 2);
    while !follows_both() {
        assert!(Instant::now() < until, "{:#?}", node.source.state());
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.names().as_deref(), Some("ClusterInformation/default Tier/one"));
    ready(&server, V3, true);
    node.comes_to("ClusterInformation/default Tier/one Tier/two");
    is_frozen(&node, false);
    // Where they were, nothing counts any more.
    tier(&server, CRD, "three");
    tier(&server, V3, "four");
    node.comes_to("ClusterInformation/default Tier/four Tier/one Tier/two");
}

#[test]
fn slices_of_headless_services_are_followed_once_a_policy_names_a_service() {
    let server = Server::start(true);
    server.put(PODS, "a", in_x());
    let node = Node::of(&server);
    node.comes_to("Pod/x/a");
    let follows =
        || node.source.state().kinds.iter().any(|kind| kind.name.ends_with("endpointslices of headless services"));
    assert!(!follows());
    let policies = "/apis/networking.k8s.io/v1/networkpolicies";
    server.put(policies, "p", json!({"metadata": {"namespace": "x"}, "spec": {"podSelector": {}, "services": {}}}));
    node.comes_to("NetworkPolicy/x/p Pod/x/a");
    let until = Instant::now() + PATIENCE;
    while !follows() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(10));
    }
    let asked = server.world.0.lock().unwrap().asked.clone();
    let slices: Vec<_> = asked.iter().filter(|asked| asked.contains("endpointslices")).collect();
    assert!(
        slices.iter().any(|asked| asked.contains("labelSelector=%21service.kubernetes.io%2Fheadless")),
        "{slices:#?}"
    );
    assert!(slices.iter().any(|asked| asked.contains("labelSelector=service.kubernetes.io%2Fheadless")), "{slices:#?}");
}
