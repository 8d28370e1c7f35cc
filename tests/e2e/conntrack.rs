//! `weir conntrack`: lists, filters, counts, deletions, events.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, Echo, Site, connection, one_node, passes, weir_binary},
};

const ECHO: &str = "10.96.0.12";

fn site() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20"]);
    manifests.service(&ServiceSpec {
        name: "default/echo",
        addresses: &[ECHO],
        ports: &[("echo", "UDP", 53, 7, 0)],
        backends: &[("10.1.1.20", "node-a")],
        ..ServiceSpec::default()
    });
    let mut site = Site::build(&one_node(), &manifests.text(), "");
    site.start_all();
    site
}

fn conntrack(site: &Site, arguments: &[&str]) -> String {
    let config = site.config("node-a").display().to_string();
    site.lab.weir("node-a", &[&["conntrack"], arguments, &["-c", &config]].concat()).unwrap()
}

fn count(site: &Site, arguments: &[&str]) -> usize {
    conntrack(site, &[&["count"], arguments].concat()).trim().parse().unwrap()
}

/// A command that is ended with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn connections_are_listed_filtered_counted_deleted_and_watched() {
    let site = site();
    assert_eq!(conntrack(&site, &["--output", "json"]), "[]\n");

    let mut watch = Command::new(weir_binary());
    let config = site.config("node-a").display().to_string();
    watch.args(["conntrack", "watch", "--address", "10.1.1.0/24", "-f", "4", "--output", "json", "-c", &config]);
    let mut watch = Running(watch.stdout(Stdio::piped()).spawn().unwrap());
    let output = watch.0.stdout.take().unwrap();
    let (sender, events) = mpsc::channel();
    // Ends with the command that it reads from.
    thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let event_within = move |what: &str, proto: &str, time: Duration| -> Option<Value> {
        loop {
            let line = events.recv_timeout(time).ok()?;
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == what && event["proto"] == proto {
                return Some(event);
            }
        }
    };
    // The watch looks from its start on: what it tells proves that it looks. What came before is not told.
    weir_lab::wait_until("the watch", DEADLINE, || {
        site.pings("default/client", "-c 1 10.1.1.20");
        event_within("new", "icmp", Duration::from_secs(1))
    })
    .unwrap();
    let event = |what: &str, proto: &str| {
        event_within(what, proto, DEADLINE).unwrap_or_else(|| panic!("no event {what} of {proto}"))
    };

    let _echo = Echo::new(&site, "default/server", "0.0.0.0:7");
    let udp = site.udp("default/client", "0.0.0.0:0");
    udp.connect(format!("{ECHO}:53")).unwrap();
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.1.20:5000");
    assert!(passes(&near, &far, DEADLINE));
    udp.send(b"x").unwrap();
    udp.recv(&mut [0; 4]).expect("an answer");

    let port = udp.local_addr().unwrap().port();
    let new = event("new", "udp");
    assert_eq!((&new["original"]["dst"], &new["original"]["sport"]), (&ECHO.into(), &port.into()));
    assert_eq!((&new["dnat"], &new["snat"]), (&true.into(), &false.into()));

    let listed: Value = serde_json::from_str(&conntrack(&site, &["--proto", "tcp", "--output", "json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let tcp = &listed[0];
    assert_eq!(
        (&tcp["tcpState"], &tcp["state"], &tcp["assured"]),
        (&"ESTABLISHED".into(), &"established".into(), &true.into())
    );
    assert_eq!(tcp["reply"]["src"], "10.1.1.20");
    let line = conntrack(&site, &["--proto", "udp"]);
    let expected =
        format!("src=10.1.1.10 dst={ECHO} sport={port} dport=53 src=10.1.1.20 dst=10.1.1.10 sport=7 dport={port}");
    // One exchange is no reason to hand a flow over.
    assert!(line.starts_with("udp      17 ") && line.trim_end().ends_with(&expected), "{line}");

    for (filter, expected) in [
        (&["--dnat"][..], 1),
        (&["--snat"], 0),
        (&["--dst", ECHO, "--dport", "53"], 1),
        (&["--reply-src", "10.1.1.20", "--proto", "17"], 1),
        (&["--tcp-state", "established"], 1),
        (&["--state", "unreplied"], 0),
        (&["--src", "10.1.2.0/24"], 0),
        (&["-f", "6"], 0),
    ] {
        assert_eq!(count(&site, filter), expected, "{filter:?}");
    }

    // A deleted flow is opened anew by its next packet; others are left alone.
    let refused = site.lab.weir("node-a", &["conntrack", "delete", "-c", &config]);
    assert!(refused.unwrap_err().to_string().contains("--all"));
    assert_eq!(conntrack(&site, &["delete", "--proto", "udp"]), "1 deleted\n");
    assert_eq!(event("destroy", "udp")["original"]["sport"], port);
    assert_eq!((count(&site, &["--proto", "udp"]), count(&site, &["--proto", "tcp"])), (0, 1));
    udp.send(b"y").unwrap();
    udp.recv(&mut [0; 4]).expect("an answer");
    assert_eq!(event("new", "udp")["original"]["sport"], port);
    assert!(passes(&near, &far, DEADLINE));

    drop((near, far));
    let closing = event("update", "tcp");
    assert!(["closing", "closed"].contains(&closing["state"].as_str().unwrap()), "{closing}");
    conntrack(&site, &["delete", "--all"]);
    assert_eq!(count(&site, &["--proto", "tcp"]), 0);
    site.finish();
}
