//! Death, restart, detach; pods that come and go.

use std::{
    fs,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use weir_lab::wait_until;

use crate::{
    manifests::Manifests,
    own_node::{serve_shell, shell_works},
    site::{DEADLINE, Echo, Site, connection, one_node, passes},
};

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_killed_router_leaves_the_node_reachable_and_pods_closed_and_a_restart_adopts_them() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    let (config, url) = (site.config("node-a").display().to_string(), "http://10.1.1.20/");
    let detach = ["detach", "-c", config.as_str()];
    let pins = weir_node::run::pin_folder(&site.lab.node_name("node-a"));
    site.serve("default/server", &[80]);
    // A kubelet's port, which lies within snat.portRange.
    site.serve("node-a", &[10250]);
    serve_shell(&mut site, "node-a");
    site.lab.ip("client", "route add 10.1.1.0/24 via 192.168.10.1").unwrap();
    site.start_all();
    site.answered("default/client", url);
    site.answered("client", url);
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.1.20:5000");
    assert!(passes(&near, &far, DEADLINE));
    let refused =
        site.lab.output_in("node-a", &[&[crate::site::weir_binary().to_str().unwrap()], &detach[..]].concat());
    let refused = refused.unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("stop it first"), "a running router is not detached: {said}");
    site.answered("default/client", url);
    site.answered("node-a", url);

    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGKILL);
    assert!(!router.wait(DEADLINE).unwrap().success());
    shell_works(&site);
    site.answered("client", "http://192.168.10.1:10250/");
    site.pings("client", "-c 2 192.168.10.1");
    site.unanswered("default/client", url);
    site.unanswered("client", url);
    site.unanswered("node-a", url);
    assert!(pins.exists(), "links and maps stay pinned");

    site.start("node-a");
    site.answered("default/client", url);
    site.answered("client", url);
    site.answered("node-a", url);
    shell_works(&site);
    assert!(passes(&near, &far, DEADLINE) && passes(&far, &near, DEADLINE), "connections between pods are picked up");
    site.check_rest("node-a");
    let mut router = site.take_router("node-a");
    site.check_end("node-a", &mut router);
    site.unanswered("default/client", url);
    shell_works(&site);

    let said = site.lab.weir("node-a", &detach).unwrap();
    for part in ["removed the device weir0", "removed the device weir1", "pinned links and maps", "rule"] {
        assert!(said.contains(part), "{part} is missing in what was removed:\n{said}");
    }
    assert!(!pins.exists());
    let links = site.lab.run_in("node-a", &["ip", "link"]).unwrap();
    assert!(!links.contains("weir0@") && !links.contains("weir1@") && !links.contains("xdp"), "{links}");
    let rules = site.lab.run_in("node-a", &["ip", "rule"]).unwrap();
    assert_eq!(rules.lines().count(), 3, "local, main and default are left:\n{rules}");
    assert_eq!(site.lab.weir("node-a", &detach).unwrap().trim(), "nothing was attached");
    shell_works(&site);

    // And from nothing again.
    site.start("node-a");
    site.answered("default/client", url);
    site.finish();
}

/// As on a disk that is full.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_log_that_takes_no_line_ends_no_router() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    let config = site.config("node-a").display().to_string();
    site.serve("default/server", &[80]);
    let command = format!("exec {} run -c {config} 2>/dev/full", crate::site::weir_binary().display());
    let mut router = site.lab.spawn("node-a", "weir-without-log", &["sh", "-c", &command]).unwrap();
    // Before it runs, nobody tells the client its gateway's MAC address, and the client gives up.
    wait_until("its status", DEADLINE, || site.lab.weir("node-a", &["status", "-c", &config]).ok()).unwrap();
    site.answered("default/client", "http://10.1.1.20/");
    assert!(router.is_running());
    router.signal(Signal::SIGTERM);
    assert!(router.wait(DEADLINE).unwrap().success());
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_fails_while_a_router_runs_does_not_end_it() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    site.serve("default/server", &[80]);
    site.start_all();
    site.answered("default/client", "http://10.1.1.20/");
    let trouble = |site: &Site| site.status("node-a")["trouble"]["now"]["error"].as_str().map(str::to_owned);
    assert_eq!(trouble(&site), None);

    // Clients that say nothing, one that says too much, and one that reads nothing keep nobody waiting.
    let socket = weir_node::control::socket_path(&site.lab.node_name("node-a"));
    let silent: Vec<_> = (0..500).map(|_| std::os::unix::net::UnixStream::connect(&socket).unwrap()).collect();
    let deaf = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut &deaf, b"{\"conntrack\":{\"action\":\"watch\"}}\n").unwrap();
    let endless = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut &endless, &[b'x'; 1000]).unwrap();

    // No room for packets of the uplink; a range that holds the node's own ways.
    site.lab.ip("node-a", "link set eth0 mtu 9000").unwrap();
    let shown = wait_until("the trouble", DEADLINE, || trouble(&site)).unwrap();
    assert!(shown.contains("MTU of eth0 has become 9000"), "{shown}");
    site.answered("default/client", "http://10.1.1.20/");
    let pool = "\n---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: all}\nspec: {cidr: '::/0'}\n";
    site.set_cluster(&(manifests.text() + pool));
    let faulty = site.status("node-a")["faultyObjects"].to_string();
    assert!(faulty.contains("IPPool") && faulty.contains("every address"), "{faulty}");
    site.lab.ip("node-a", "link set eth0 mtu 1500").unwrap();
    wait_until("its end", DEADLINE, || trouble(&site).is_none().then_some(())).unwrap();
    site.answered("default/client", "http://10.1.1.20/");
    assert!(site.router("node-a").log().contains("this is over"));
    drop((silent, endless, deaf));
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pods_come_and_go_under_traffic() {
    const PODS: usize = 12;
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    let names: Vec<String> = (0..PODS).map(|n| format!("default/new-{n}")).collect();
    for (number, name) in names.iter().enumerate() {
        manifests.pod("node-a", name, "new", &[&format!("10.1.1.{}", 100 + number)]);
    }
    let absent: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut site = Site::build_without(&one_node(), &manifests.text(), "", &absent);
    site.start_all();
    let _echo = Echo::new(&site, "default/server", "0.0.0.0:7");
    let steady = site.udp("default/client", "0.0.0.0:0");
    steady.connect("10.1.1.20:7").unwrap();
    let to_the_new = site.udp("default/client", "0.0.0.0:0");
    let (stop, exchanges) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut delays = Vec::new();
    thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        // Between pods that stay, nothing may be lost.
        let steady = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                steady.send(b"tick").unwrap();
                steady.recv(&mut [0; 16]).expect("an answer: pods that stay lose nothing");
                exchanges.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(200));
            }
        });
        // Towards those that come and go, packets are always on their way.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for number in 0..PODS {
                    let _ = to_the_new.send_to(&[0; 600], format!("10.1.1.{}:9", 100 + number));
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        for _ in 0..2 {
            for name in &names {
                delays.push(appear(&mut site, name));
                // The flood towards it fills what may wait for its MAC address, so a first answer may be lost.
                weir_lab::wait_until("the new pod's ping", DEADLINE, || {
                    site.ping(name, "-c 1 10.1.1.20").0.then_some(())
                })
                .unwrap();
            }
            for name in &names {
                site.lab.remove_pod(name).unwrap();
            }
            let count = |site: &Site| site.status("node-a")["workloads"].as_u64().unwrap();
            weir_lab::wait_until("the pods' going", DEADLINE, || (count(&site) == 2).then_some(())).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        steady.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    delays.sort();
    println!(
        "a new pod is adopted after {:?} (median), {:?} (worst of {}); {} exchanges meanwhile",
        delays[delays.len() / 2],
        delays[delays.len() - 1],
        delays.len(),
        exchanges.load(Ordering::Relaxed)
    );
    assert!(exchanges.load(Ordering::Relaxed) > 100);
    let gone = fs::read_dir(weir_node::run::pin_folder(&site.lab.node_name("node-a"))).unwrap();
    let pins: Vec<String> = gone.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let workloads = pins.iter().filter(|name| name.contains("workload") && name.chars().any(|c| c.is_ascii_digit()));
    assert_eq!(workloads.count(), 2, "the links of those that went are gone: {pins:?}");
    site.finish();
}

/// Makes a pod; the time from when its device exists to when the router has adopted it.
fn appear(site: &mut Site, name: &str) -> Duration {
    let pod = site.cluster.workloads.iter().find(|w| w.name == name).unwrap().clone();
    let adopted = format!("device adopted device=\"{}\"", pod.device);
    let log_file = site.lab.folder().join("weir-node-a.log");
    let log = || fs::read_to_string(&log_file).unwrap_or_default();
    let before = log().matches(&adopted).count();
    let namespace = format!("/run/netns/{}", site.lab.namespace_name("node-a"));
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            nix::sched::setns(fs::File::open(&namespace).unwrap(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let deadline = Instant::now() + DEADLINE;
            let wait = |condition: &dyn Fn() -> bool| {
                while !condition() {
                    assert!(Instant::now() < deadline, "{name} is not adopted");
                    thread::sleep(Duration::from_millis(1));
                }
            };
            wait(&|| fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains(&pod.device));
            let begin = Instant::now();
            wait(&|| log().matches(&adopted).count() > before);
            begin.elapsed()
        });
        site.lab.add_pod("node-a", name, &pod.device, &pod.addresses).unwrap();
        watch.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
