//! What a node says to an API server that is played: it holds objects, refuses what is old, forbids what it is told to, and is away for a while.

mod played;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use weir_cluster::resources::{Identities, ObjectId};
use weir_kubernetes::{
    Access, Source,
    speak::{Fault, PodAddresses, Settings},
};

use played::Request;

const PATIENCE: Duration = Duration::from_secs(60);
const PODS: &str = "/api/v1/namespaces/x/pods";
const NODES: &str = "/api/v1/nodes";
const SERVICES: &str = "/api/v1/namespaces/x/services";
const POLICIES: &str = "/apis/networking.k8s.io/v1/namespaces/x/networkpolicies";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/x/events";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";

#[derive(Default)]
struct World {
    version: u64,
    /// By path.
    objects: BTreeMap<String, Value>,
    /// Method and path of what was written, or was tried to.
    writes: Vec<String>,
    /// Writes to paths that begin so are answered with that.
    refuses: BTreeMap<String, u16>,
    /// It takes what is asked and does not answer.
    is_mute: bool,
    /// Each change, for watches: collection, type, object.
    events: Vec<(u64, String, &'static str, Value)>,
}

impl World {
    fn put(&mut self, path: &str, mut object: Value) {
        self.version += 1;
        let (collection, name) = path.rsplit_once('/').unwrap();
        object["metadata"]["name"] = json!(name);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if let Some((_, rest)) = path.split_once("/namespaces/") {
            object["metadata"]["namespace"] = json!(rest.split('/').next().unwrap());
        }
        let kind = if self.objects.contains_key(path) { "MODIFIED" } else { "ADDED" };
        self.objects.insert(path.to_owned(), object.clone());
        self.events.push((self.version, of_all_namespaces(collection), kind, object));
    }

    fn write(&mut self, method: &str, target: &str, body: &Value) -> u16 {
        self.writes.push(format!("{method} {target}"));
        if let Some(code) =
            self.refuses.iter().find(|(path, _)| target.starts_with(path.as_str())).map(|(_, code)| *code)
        {
            return code;
        }
        let path = target.strip_suffix("/status").unwrap_or(target);
        let known = self.objects.get(path).cloned();
        match (method, known) {
            ("POST", _) => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
                if self.objects.contains_key(&path) {
                    return 409;
                }
                self.put(&path, body.clone());
                201
            }
            (_, None) => 404,
            ("PUT", Some(known)) => {
                if body["metadata"]["resourceVersion"] != known["metadata"]["resourceVersion"] {
                    return 409;
                }
                self.put(path, body.clone());
                200
            }
            ("PATCH", Some(mut known)) => {
                if let Some(steps) = body.as_array() {
                    for step in steps {
                        let pointer = step["path"].as_str().unwrap();
                        let (parent, key) = pointer.rsplit_once('/').unwrap();
                        match step["op"].as_str().unwrap() {
                            "test" if known.pointer(pointer) == Some(&step["value"]) => {}
                            "test" => return 422,
                            _ => known.pointer_mut(parent).unwrap()[key.replace("~1", "/")] = step["value"].clone(),
                        }
                    }
                } else {
                    for same in ["uid", "resourceVersion"] {
                        let wanted = &body["metadata"][same];
                        if !wanted.is_null() && *wanted != known["metadata"][same] {
                            return 409;
                        }
                    }
                    merge(&mut known, body);
                }
                self.put(path, known);
                200
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A merge patch; lists of conditions are merged in no other way here, as each object has one.
fn merge(to: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *to = patch.clone();
        return;
    };
    if !to.is_object() {
        *to = json!({});
    }
    patch.iter().for_each(|(key, value)| merge(&mut to[key], value));
}

fn of_all_namespaces(collection: &str) -> String {
    match collection.split_once("/namespaces/") {
        Some((start, rest)) => format!("{start}/{}", rest.split_once('/').unwrap().1),
        None => collection.to_owned(),
    }
}

#[derive(Clone)]
struct Server {
    world: Arc<(Mutex<World>, Condvar)>,
    address: SocketAddr,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let world = World { version: 10, ..World::default() };
        let server =
            Self { world: Arc::new((Mutex::new(world), Condvar::new())), address: listener.local_addr().unwrap() };
        let own = server.clone();
        played::accept(listener, move |stream| own.serve(stream));
        server
    }

    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let done = change(&mut self.world.0.lock().unwrap());
        self.world.1.notify_all();
        done
    }

    fn get(&self, path: &str) -> Value {
        self.change(|world| world.objects.get(path).cloned().unwrap_or_default())
    }

    fn writes(&self, what: &str) -> usize {
        self.change(|world| world.writes.iter().filter(|write| write.starts_with(what)).count())
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut out = stream;
        loop {
            let Some(Request { method, target, body, .. }) = Request::read(&mut reader)? else { return Ok(()) };
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            if query.contains("watch=1") {
                return self.watch(&mut out, path, query);
            }
            while self.world.0.lock().unwrap().is_mute {
                thread::sleep(Duration::from_millis(5));
            }
            let (code, answer) = match method.as_str() {
                "GET" => self.read(path, query),
                _ => {
                    let body: Value = serde_json::from_slice(&body).unwrap();
                    (self.change(|world| world.write(&method, path, &body)), json!({}))
                }
            };
            let answer = answer.to_string();
            let answer = format!("HTTP/1.1 {code} X\r\nContent-Length: {}\r\n\r\n{answer}", answer.len());
            out.write_all(answer.as_bytes())?;
        }
    }

    fn read(&self, path: &str, query: &str) -> (u16, Value) {
        let world = self.world.0.lock().unwrap();
        if path == "/apis" {
            return (200, json!({"groups": []}));
        }
        if let Some(code) = world.refuses.iter().find(|(of, _)| path.starts_with(of.as_str())).map(|(_, code)| *code) {
            return (code, json!({"code": code, "message": "no"}));
        }
        if let Some(object) = world.objects.get(path) {
            return (200, object.clone());
        }
        if path.starts_with(LEASES) {
            return (404, json!({"code": 404}));
        }
        let name = query.split_once("metadata.name%3D").map(|(_, name)| name);
        let is_asked = |key: &str| {
            let (collection, own) = key.rsplit_once('/').unwrap();
            (collection == path || of_all_namespaces(collection) == path) && name.is_none_or(|name| name == own)
        };
        let items: Vec<_> = world.objects.iter().filter(|(key, _)| is_asked(key)).map(|(_, object)| object).collect();
        (200, json!({"metadata": {"resourceVersion": world.version.to_string()}, "items": items}))
    }

    fn watch(&self, out: &mut TcpStream, path: &str, query: &str) -> std::io::Result<()> {
        let (lock, changed) = &*self.world;
        write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let mut send = |kind: &str, object: Value| {
            let line = json!({"type": kind, "object": object}).to_string() + "\n";
            write!(out, "{:x}\r\n{line}\r\n", line.len())
        };
        let mut world = lock.lock().unwrap();
        let mut from = world.version;
        if query.contains("sendInitialEvents") {
            for (key, object) in &world.objects {
                if of_all_namespaces(key.rsplit_once('/').unwrap().0) == path {
                    send("ADDED", object.clone())?;
                }
            }
            send(
                "BOOKMARK",
                json!({"metadata": {"resourceVersion": from.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}}),
            )?;
        }
        loop {
            for (version, of, kind, object) in &world.events {
                if *version > from && of == path {
                    send(kind, object.clone())?;
                }
            }
            from = world.version;
            world = changed.wait(world).unwrap();
        }
    }
}

#[track_caller]
fn comes(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn node(server: &Server, name: &str, taint: Option<&str>, lease: Duration) -> (Source, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = played::kubeconfig(folder.path(), server.address);
    let settings = Settings {
        node: name.to_owned(),
        startup_taint: taint.map(str::to_owned),
        lease_namespace: "kube-system".to_owned(),
        lease,
        refusals: Duration::ZERO,
    };
    let access = Access::Kubeconfig(path);
    let source = Source::start(
        access,
        &Identities::default(),
        weir_kubernetes::Settings { speaks: Some(settings), ..Default::default() },
    )
    .unwrap();
    comes("its objects", || source.fresh().is_some());
    (source, folder)
}

fn web(uid: &str, addresses: &[&str]) -> PodAddresses {
    PodAddresses {
        namespace: "x".into(),
        name: "web".into(),
        uid: uid.into(),
        addresses: addresses.iter().map(|one| one.parse().unwrap()).collect(),
    }
}

#[test]
fn a_pods_addresses_are_written_on_its_object_and_taken_back_where_they_are_its_own() {
    let server = Server::start();
    let web_path = format!("{PODS}/web");
    let annotations = |server: &Server| {
        let object = server.get(&web_path);
        let annotations = &object["metadata"]["annotations"];
        ["podIP", "podIPs"].map(|key| {
            let value = &annotations[format!("cni.projectcalico.org/{key}")];
            value.as_str().map(str::to_owned)
        })
    };
    let both = |ip: &str, ips: &str| [Some(ip.to_owned()), Some(ips.to_owned())];
    server.change(|world| world.put(&web_path, json!({"metadata": {"uid": "u1", "annotations": {"mine": "stays"}}})));
    let (source, _folder) = node(&server, "n", None, Duration::from_secs(60));
    let speaker = source.speaker().unwrap();
    let heard = speaker.announce(web("u1", &["10.0.0.5", "fd00::5"])).unwrap();
    heard.recv_timeout(PATIENCE).unwrap();
    assert_eq!(annotations(&server), both("10.0.0.5/32", "10.0.0.5/32,fd00::5/128"));
    assert_eq!(server.get(&web_path)["metadata"]["annotations"]["mine"], "stays");
    // Another address is none that this one takes back, and another pod's object is left alone.
    speaker.withdraw(web("u1", &["10.0.0.6"]));
    comes("it tried", || speaker.status()["podAddresses"]["waiting"] == 0);
    speaker.withdraw(web("u2", &["10.0.0.5", "fd00::5"]));
    comes("it tried", || speaker.status()["podAddresses"]["waiting"] == 0);
    speaker.announce(web("u2", &["10.0.0.9"])).unwrap().recv_timeout(PATIENCE).unwrap();
    assert_eq!(annotations(&server), both("10.0.0.5/32", "10.0.0.5/32,fd00::5/128"));
    speaker.withdraw(web("u1", &["10.0.0.5", "fd00::5"]));
    comes("they are taken back", || annotations(&server) == both("", ""));
    // A pod that is gone is no failure.
    server.change(|world| drop(world.objects.remove(&web_path)));
    speaker.announce(web("u1", &["10.0.0.5"])).unwrap().recv_timeout(PATIENCE).unwrap();
    assert_eq!(speaker.status()["podAddresses"]["problem"], Value::Null);
    comes("nothing is left", || speaker.status()["podAddresses"]["waiting"] == 0);
}

#[test]
fn what_fails_is_written_later_and_nobody_waits_for_it_meanwhile() {
    let server = Server::start();
    let web_path = format!("{PODS}/web");
    server.change(|world| {
        world.put(&web_path, json!({"metadata": {"uid": "u1", "annotations": {}}}));
        world.refuses.insert(PODS.to_owned(), 503);
    });
    let (source, _folder) = node(&server, "n", None, Duration::from_secs(60));
    let speaker = source.speaker().unwrap();
    let heard = speaker.announce(web("u1", &["10.0.0.5"])).unwrap();
    heard.recv_timeout(PATIENCE).unwrap();
    assert!(speaker.status()["podAddresses"]["problem"].as_str().unwrap().contains("503"));
    assert!(speaker.announce(web("u9", &["10.0.0.9"])).is_none());
    server.change(|world| world.refuses.clear());
    let written = || server.get(&web_path)["metadata"]["annotations"]["cni.projectcalico.org/podIP"] == "10.0.0.5/32";
    comes("it is written when the server is there again", written);
    // Forbidden: told once, and nothing more is tried.
    server.change(|world| world.refuses.insert(PODS.to_owned(), 403));
    comes("it hears of it", || {
        drop(speaker.announce(web("u1", &["10.0.0.6"])));
        speaker.status()["podAddresses"]["problem"].as_str().is_some_and(|why| why.contains("403"))
    });
    let before = server.writes("PATCH");
    for _ in 0..20 {
        assert!(speaker.announce(web("u1", &["10.0.0.7"])).is_none());
    }
    assert_eq!(speaker.status()["podAddresses"]["waiting"], 0);
    assert_eq!(server.writes("PATCH"), before);
}

#[test]
fn the_node_says_that_its_network_is_there_whenever_it_says_otherwise_and_loses_its_taint() {
    let server = Server::start();
    let own = format!("{NODES}/n");
    let taints = json!([{"key": "other", "effect": "NoSchedule"}, {"key": "weir", "effect": "NoSchedule"}]);
    let unavailable = json!({"conditions": [{"type": "NetworkUnavailable", "status": "True"}]});
    server.change(|world| {
        world.put(&own, json!({"metadata": {"uid": "u"}, "spec": {"taints": taints}, "status": unavailable}));
        world.put(&format!("{NODES}/m"), json!({"metadata": {"uid": "v"}, "spec": {"taints": taints}}));
    });
    let (source, _folder) = node(&server, "n", Some("weir"), Duration::from_secs(60));
    let speaker = source.speaker().unwrap();
    assert_eq!(server.writes(""), 0, "nothing is said before policy is in force");
    speaker.set_up();
    let says = |server: &Server| {
        let condition = server.get(&own)["status"]["conditions"][0].clone();
        condition["status"] == "False" && condition["reason"] == "WeirIsUp"
    };
    comes("it says it", || says(&server));
    comes("the taint is off", || server.get(&own)["spec"]["taints"] == json!([taints[0]]));
    assert_eq!(server.get(&format!("{NODES}/m"))["spec"]["taints"], taints);
    comes("it is told", || speaker.status()["node"]["written"] == 2);
    // Somebody says otherwise.
    server.change(|world| {
        let mut object = world.objects[&own].clone();
        object["status"] = unavailable.clone();
        object["spec"]["taints"] = taints.clone();
        world.put(&own, object);
    });
    comes("it says it again", || says(&server));
    // The Node is made anew, and its taint is there before it is up.
    server.change(|world| {
        let object = json!({"metadata": {"uid": "w"}, "spec": {"taints": taints}, "status": {}});
        world.put(&own, object);
    });
    comes("it says it of the new one", || says(&server));
    comes("the taint is off", || server.get(&own)["spec"]["taints"] == json!([taints[0]]));
}

fn fault(group: &'static str, kind: &'static str, name: &str, message: &str) -> Fault {
    Fault { object: ObjectId { group, kind, namespace: "x".into(), name: name.into() }, message: message.to_owned() }
}

fn condition(server: &Server, path: &str) -> Option<(String, String)> {
    let object = server.get(path);
    let all = object["status"]["conditions"].as_array()?;
    let own = all.iter().find(|condition| condition["type"] == "weir/Accepted")?;
    Some((own["status"].as_str()?.to_owned(), own["message"].as_str()?.to_owned()))
}

fn events(server: &Server) -> Vec<Value> {
    server.change(|world| {
        let of = world.objects.iter().filter(|(path, _)| path.starts_with(EVENTS));
        of.map(|(_, event)| event.clone()).collect()
    })
}

#[test]
fn one_node_says_what_is_at_fault_and_another_goes_on_when_it_ends() {
    let server = Server::start();
    let (web, policy) = (format!("{SERVICES}/web"), format!("{POLICIES}/p"));
    server.change(|world| {
        let other = json!({"type": "Other", "status": "True"});
        world.put(&web, json!({"metadata": {"uid": "s"}, "status": {"conditions": [other]}}));
        world.put(&policy, json!({"metadata": {"uid": "p"}}));
    });
    let lease = Duration::from_secs(2);
    let (a, _folder_a) = node(&server, "a", None, lease);
    let (b, _folder_b) = node(&server, "b", None, lease);
    let speakers = || [&a, &b].map(|source| source.speaker().unwrap());
    // Without a fault nobody asks for the lease.
    assert_eq!(server.get(&format!("{LEASES}/weir")), Value::Null);
    let of_service = fault("", "Service", "web", "its cluster IP is another's; weir leaves it out");
    let of_policy = fault("networking.k8s.io", "NetworkPolicy", "p", "it cannot be read; weir denies what it selects");
    let of_file = fault("", "Service", "in-a-file", "no matter");
    let all = vec![of_service.clone(), of_policy.clone(), of_file];
    speakers().iter().for_each(|speaker| speaker.set_faults(all.clone()));
    comes("both are said", || events(&server).len() == 2);
    comes("the condition", || condition(&server, &web) == Some(("False".into(), of_service.message.clone())));
    assert_eq!(server.get(&web)["status"]["conditions"][0]["type"], "Other");
    assert_eq!(condition(&server, &policy), None, "its kind has no conditions");
    for event in events(&server) {
        let regarding = &event["regarding"];
        let (of, version) =
            if regarding["kind"] == "Service" { (&of_service, "v1") } else { (&of_policy, "networking.k8s.io/v1") };
        assert_eq!((regarding["apiVersion"].as_str(), event["note"].as_str()), (Some(version), Some(&*of.message)));
        assert!(regarding["uid"].is_string() && event["type"] == "Warning" && event["metadata"]["namespace"] == "x");
    }
    // The same again is nothing new.
    let before = server.writes("POST");
    speakers().iter().for_each(|speaker| speaker.set_faults(all[..2].to_vec()));
    // Both nodes come to know who has it.
    let holder = || {
        let known = speakers().map(|speaker| speaker.status()["faults"]["leaseHolder"].as_str().map(str::to_owned));
        known[0].clone().filter(|holder| known[1].as_ref() == Some(holder))
    };
    comes("both know the holder", || holder().is_some());
    assert_eq!(server.writes("POST"), before);
    // The holder ends well and gives it back; the other says what has ended meanwhile.
    let (first, second) = if holder().unwrap() == "a" { (a, b) } else { (b, a) };
    drop(first);
    assert_eq!(server.get(&format!("{LEASES}/weir"))["spec"]["holderIdentity"], "", "it is given back at the end");
    let speaker = second.speaker().unwrap();
    speaker.set_faults(vec![of_policy.clone()]);
    comes("it is accepted again", || condition(&server, &web).is_some_and(|(status, _)| status == "True"));
    // What is the same in another node's words is counted up.
    comes("it is counted up", || {
        events(&server).iter().any(|event| event["note"] == *of_policy.message && event["series"]["count"] == 2)
    });
    speaker.set_faults(Vec::new());
    comes("with nothing to say it gives the lease back", || {
        server.get(&format!("{LEASES}/weir"))["spec"]["holderIdentity"] == ""
    });
}

#[test]
fn a_lease_that_nobody_renews_is_taken_over_and_one_that_is_renewed_is_not() {
    let server = Server::start();
    let web = format!("{SERVICES}/web");
    let left = format!("{SERVICES}/left");
    server.change(|world| {
        world.put(&web, json!({"metadata": {"uid": "s"}}));
        let condition =
            json!({"type": "weir/Accepted", "status": "False", "reason": "Faulty", "message": "it was faulty"});
        world.put(&left, json!({"metadata": {"uid": "l"}, "status": {"conditions": [condition]}}));
    });
    let of_another = |renewed: u32| {
        json!({"spec": {"holderIdentity": "z", "leaseDurationSeconds": 2, "leaseTransitions": 7,
            "renewTime": format!("2000-01-01T00:00:{renewed:02}.000000Z")}})
    };
    let own = format!("{LEASES}/weir");
    server.change(|world| world.put(&own, of_another(0)));
    let (source, _folder) = node(&server, "a", None, Duration::from_secs(2));
    let speaker = source.speaker().unwrap();
    speaker.set_faults(vec![fault("", "Service", "web", "it is faulty")]);
    // Renewed for some seconds, by a clock that is far behind.
    for renewed in 1..20 {
        thread::sleep(Duration::from_millis(200));
        server.change(|world| world.put(&own, of_another(renewed)));
        assert_eq!(condition(&server, &web), None);
    }
    comes("it is taken over", || server.get(&own)["spec"]["holderIdentity"] == "a");
    assert_eq!(server.get(&own)["spec"]["leaseTransitions"], 8);
    comes("it speaks", || condition(&server, &web).is_some());
    comes("and for the other", || condition(&server, &left).is_some_and(|(status, _)| status == "True"));
}

#[test]
fn a_node_that_may_not_write_says_so_once() {
    let server = Server::start();
    let web = format!("{SERVICES}/web");
    server.change(|world| {
        world.put(&web, json!({"metadata": {"uid": "s"}}));
        world.refuses.insert(LEASES.to_owned(), 403);
    });
    let (source, _folder) = node(&server, "a", None, Duration::from_secs(1));
    let speaker = source.speaker().unwrap();
    speaker.set_faults(vec![fault("", "Service", "web", "it is faulty")]);
    comes("it is told", || speaker.status()["faults"]["problem"].as_str().is_some_and(|why| why.contains("403")));
    for number in 0..20 {
        speaker.set_faults(vec![fault("", "Service", "web", &number.to_string())]);
        thread::sleep(Duration::from_millis(20));
    }
    let all: BTreeSet<String> = server.change(|world| world.writes.iter().cloned().collect());
    assert!(all.is_empty(), "{all:?}");
}
