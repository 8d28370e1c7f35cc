//! A storm of reloads under traffic: what stays loses nothing, and what the last change says is what holds.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, Site, passes, two_nodes},
};

const CHANGES_PER_SECOND: u32 = 100;
const WEB: &str = "10.96.0.10";
/// The backend that is never touched, the one that is terminating all along, and the one that comes and goes.
const STAYS: (&str, &str) = ("default/stays", "10.1.1.21");
const LEAVES: (&str, &str) = ("default/leaves", "10.1.2.21");
const FLAPS: (&str, &str) = ("default/flaps", "10.1.1.22");
const BACKENDS: [(&str, &str); 3] = [STAYS, LEAVES, FLAPS];

/// `make test` makes a short one, `make storm` one of 30 s.
fn seconds() -> u32 {
    std::env::var("WEIR_STORM_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(5)
}

/// Its endpoints with their conditions: ready or terminating.
fn web_slice(endpoints: &[(&str, bool)]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|(address, ready)| {
            json!({"addresses": [address], "conditions": {"ready": ready, "serving": true, "terminating": !ready}})
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": "web", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 8080}, {"name": "udp", "protocol": "UDP", "port": 7}],
        "endpoints": endpoints,
    })
}

/// The file that changes: the slice, a service that only the change of this number has, and many others that are no concern of the test.
fn changed(number: u32, slice: Option<&Value>) -> String {
    let mut manifests = Manifests::default();
    let [high, low] = (number as u16).to_be_bytes();
    let backend = format!("10.1.2.{}", 100 + number % 100);
    for other in 0..40 {
        manifests.service(&ServiceSpec {
            name: &format!("noise/service-{other}"),
            addresses: &[&format!("10.96.9.{other}")],
            ports: &[("http", "TCP", 80, 8080, 0)],
            backends: &[(&backend, "node-b"), ("10.1.2.99", "node-b")],
            ..ServiceSpec::default()
        });
    }
    manifests.service(&ServiceSpec {
        name: "default/marker",
        addresses: &[&marker(high, low)],
        ports: &[("udp", "UDP", 53, 7, 0)],
        backends: &[(STAYS.1, "node-a")],
        ..ServiceSpec::default()
    });
    if let Some(slice) = slice {
        manifests.add(slice.clone());
    }
    manifests.text()
}

fn marker(high: u8, low: u8) -> String {
    format!("10.96.{}.{low}", 128 + high)
}

/// Answers every datagram with its pod's name, until stopped.
fn answer(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    }
}

/// Who answers a flow's next datagram.
fn ask(socket: &UdpSocket) -> Result<String, ErrorKind> {
    let mut name = [0; 64];
    socket.send(b"who?").map_err(|error| error.kind())?;
    let length = socket.recv(&mut name).map_err(|error| error.kind())?;
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

/// A UDP flow to the service that one backend answers.
fn flow_to(site: &Site, backend: &str) -> UdpSocket {
    (0..200)
        .find_map(|_| {
            let socket = site.udp("default/client", "0.0.0.0:0");
            socket.connect(format!("{WEB}:53")).unwrap();
            (ask(&socket).expect("an answer") == backend).then_some(socket)
        })
        .expect("one in three flows goes there")
}

/// A connection through the service to one backend, both ends.
fn connection_to(site: &Site, listeners: &[(&str, TcpListener)], backend: &str) -> (TcpStream, TcpStream) {
    (0..200)
        .find_map(|_| {
            let near = site.connect("default/client", &format!("{WEB}:80"), DEADLINE).unwrap();
            let accept = || listeners.iter().find_map(|(pod, listener)| Some((*pod, listener.accept().ok()?.0)));
            let (pod, far) = weir_lab::wait_until("the connection", DEADLINE, accept).unwrap();
            far.set_nonblocking(false).unwrap();
            far.set_write_timeout(Some(DEADLINE)).unwrap();
            (pod == backend).then_some((near, far))
        })
        .expect("one in three connections goes there")
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_storm_of_reloads_loses_nothing() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", STAYS.0, "web", &[STAYS.1]);
    manifests.pod("node-b", LEAVES.0, "web", &[LEAVES.1]);
    manifests.pod("node-a", FLAPS.0, "web", &[FLAPS.1]);
    let ports: [crate::manifests::PortSpec; 2] = [("tcp", "TCP", 80, 8080, 0), ("udp", "UDP", 53, 7, 0)];
    manifests.service(&ServiceSpec { name: "default/web", addresses: &[WEB], ports: &ports, ..ServiceSpec::default() });
    let all = web_slice(&BACKENDS.map(|(_, address)| (address, true)));
    let mut site = Site::build(&two_nodes(), &manifests.text(), &changed(0, Some(&all)));
    site.start_all();
    let stop = Arc::new(AtomicBool::new(false));
    let servers: Vec<_> = BACKENDS
        .iter()
        .map(|(pod, _)| {
            let (socket, stop) = (site.udp(pod, "0.0.0.0:7"), stop.clone());
            thread::spawn(move || answer(&socket, pod, &stop))
        })
        .collect();
    let listeners = BACKENDS.map(|(pod, _)| {
        let listener = site.listen(pod, "0.0.0.0:8080");
        listener.set_nonblocking(true).unwrap();
        (pod, listener)
    });
    let [flow_to_stays, flow_to_flaps] = [STAYS.0, FLAPS.0].map(|backend| flow_to(&site, backend));
    let connections = [STAYS.0, LEAVES.0].map(|backend| connection_to(&site, &listeners, backend));
    let (mut near_flaps, _far_flaps) = connection_to(&site, &listeners, FLAPS.0);

    let changes = seconds() * CHANGES_PER_SECOND;
    let exchanges = [(); 4].map(|()| AtomicU32::new(0));
    let (over, site_in_storm) = (AtomicBool::new(false), &site);
    let again = |count: &AtomicU32| {
        count.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(1));
        !over.load(Ordering::Relaxed)
    };
    thread::scope(|scope| {
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let guard = Over(&over);
        scope.spawn(|| {
            while again(&exchanges[0]) {
                assert_eq!(ask(&flow_to_stays).as_deref(), Ok(STAYS.0), "a flow whose backend stays");
            }
        });
        for ((near, far), count) in connections.iter().zip(&exchanges[1..]) {
            let again = &again;
            scope.spawn(move || {
                while again(count) {
                    assert!(passes(near, far, DEADLINE), "a connection to a backend that is there");
                    assert!(passes(far, near, DEADLINE), "and back");
                }
            });
        }
        // New ones, to a service that has no part in it.
        scope.spawn(|| {
            while again(&exchanges[3]) {
                let socket = site_in_storm.udp("default/client", "0.0.0.0:0");
                socket.connect(format!("{}:7", LEAVES.1)).unwrap();
                assert_eq!(ask(&socket).as_deref(), Ok(LEAVES.0), "a new flow");
            }
        });
        for number in 1..=changes {
            let flaps: &[(&str, bool)] = [&[(FLAPS.1, true)][..], &[(FLAPS.1, false)], &[]][number as usize % 3];
            let slice = web_slice(&[&[(STAYS.1, true), (LEAVES.1, false)], flaps].concat());
            site.write("policies.yaml", &changed(number, Some(&slice)));
            thread::sleep(Duration::from_secs(1) / CHANGES_PER_SECOND);
        }
        drop(guard);
    });
    let exchanges = exchanges.map(AtomicU32::into_inner);
    assert!(exchanges.iter().all(|count| *count > 20), "{exchanges:?}");

    // The last change is the one that holds.
    let last = |slice: Option<Value>, number: u32| {
        site.write("policies.yaml", &changed(number, slice.as_ref()));
        let [high, low] = (number as u16).to_be_bytes();
        weir_lab::wait_until("the last change", DEADLINE, || {
            let socket = site.udp("default/client", "0.0.0.0:0");
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            socket.connect(format!("{}:53", marker(high, low))).unwrap();
            (ask(&socket).as_deref() == Ok(STAYS.0)).then_some(())
        })
        .unwrap();
    };
    let only_stays = || web_slice(&[(STAYS.1, true)]);
    last(Some(only_stays()), changes + 1);
    // The backend is gone: its flows go elsewhere at their next packet, its connections are reset.
    assert_eq!(ask(&flow_to_flaps).as_deref(), Ok(STAYS.0));
    near_flaps.write_all(b"x").unwrap();
    let reset = near_flaps.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(reset, Err(ErrorKind::ConnectionReset));
    // Emptied: refused; filled again: answered; all of that by one flow.
    last(None, changes + 2);
    assert_eq!(ask(&flow_to_flaps), Err(ErrorKind::ConnectionRefused));
    last(Some(only_stays()), changes + 3);
    assert_eq!(ask(&flow_to_flaps).as_deref(), Ok(STAYS.0));

    for node in ["node-a", "node-b"] {
        let configuration = &site.status(node)["configuration"];
        println!("{node}: {changes} changes, {configuration}; exchanges {exchanges:?}");
        assert_eq!((&configuration["newestInForce"], &configuration["refused"]), (&json!(true), &json!(0)));
        let reloads = configuration["reloads"].as_u64().unwrap();
        assert!(reloads > 2 && reloads <= u64::from(changes) + 4, "{configuration}");
        assert!(configuration["lastReloadMs"]["translate"].is_number(), "{configuration}");
    }
    stop.store(true, Ordering::Relaxed);
    for server in servers {
        server.join().unwrap();
    }
    site.finish();
}
