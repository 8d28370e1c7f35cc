//! The node itself: its kernel's own traffic, and what weir must leave alone.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
};

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{CLIENT, DEADLINE, Echo, Site, bulk, connection, two_nodes},
};

const WEB: &str = "10.96.0.10";
const CONTROL: &str = "10.96.0.1";

fn site() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/local", "web", &["10.1.1.20"]);
    manifests.pod("node-b", "default/remote", "web", &["10.1.2.20"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[WEB],
        ports: &[("http", "TCP", 80, 8080, 0), ("echo", "UDP", 53, 7, 0)],
        backends: &[("10.1.1.20", "node-a"), ("10.1.2.20", "node-b")],
        ..ServiceSpec::default()
    });
    // As default/kubernetes: its backends are nodes.
    manifests.service(&ServiceSpec {
        name: "default/control",
        addresses: &[CONTROL],
        ports: &[("http", "TCP", 443, 9000, 0)],
        backends: &[("192.168.10.1", "node-a")],
        ..ServiceSpec::default()
    });
    Site::build(&two_nodes(), &manifests.text(), "")
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn the_nodes_own_kernel_reaches_pods_and_services_and_pods_reach_nodes() {
    let mut site = site();
    site.serve("default/local", &[8080]);
    site.serve("default/remote", &[8080]);
    site.serve("node-a", &[9000]);
    site.serve("node-b", &[9000]);
    site.serve("client", &[9000]);
    site.start_all();

    // The node's kernel to pods and services.
    for (from, own) in [("node-a", "192.168.10.1"), ("node-b", "192.168.10.2")] {
        for (pod, address) in [("default/local", "10.1.1.20"), ("default/remote", "10.1.2.20")] {
            let (by, seen) = site.answered(from, &format!("http://{address}:8080/"));
            assert_eq!((by.as_str(), seen.to_string().as_str()), (pod, own), "{from}");
            site.pings(from, &format!("-c 2 {address}"));
        }
        let text =
            site.lab.run_in(from, &["curl", "-sS", "--max-time", "60", &format!("http://{WEB}/?[1-40]")]).unwrap();
        for pod in ["default/local", "default/remote"] {
            assert!(text.contains(&format!("{pod} {own}\n")), "{from}: {text}");
        }
    }
    {
        let _echoes = [Echo::new(&site, "default/local", "0.0.0.0:7"), Echo::new(&site, "default/remote", "0.0.0.0:7")];
        for _ in 0..10 {
            let socket = site.udp("node-a", "0.0.0.0:0");
            socket.connect(format!("{WEB}:53")).unwrap();
            socket.send(b"question").unwrap();
            assert_eq!(socket.recv(&mut [0; 64]).expect("an answer"), 8);
        }
    }

    // Pods to their own node, to the other one, and outside: beyond the pools they have the node's address.
    for (address, seen_as) in
        [("192.168.10.1", "10.1.1.20"), ("192.168.10.2", "192.168.10.1"), (CLIENT, "192.168.10.1")]
    {
        let (_, seen) = site.answered("default/local", &format!("http://{address}:9000/"));
        assert_eq!(seen.to_string(), seen_as, "{address}");
        site.pings("default/local", &format!("-c 2 {address}"));
    }
    // A service whose backend is a node's kernel: from its pod, from the other node's pod and kernel.
    for from in ["default/local", "default/remote", "node-b"] {
        let (by, _) = site.answered(from, &format!("http://{CONTROL}:443/"));
        assert_eq!(by, "node-a", "from {from}");
    }
    // Much at once, both ways, between a node's kernel and a pod of the other node: only one direction passes weir there.
    let (near, far) = connection(&site, "node-a", "default/remote", "10.1.2.20:5000");
    bulk(&near, &far, 4 << 20);
    bulk(&far, &near, 4 << 20);
    let (near, far) = connection(&site, "default/remote", "node-b", "192.168.10.2:5001");
    bulk(&near, &far, 4 << 20);
    bulk(&far, &near, 4 << 20);

    // From outside: the node's own server, and a pod by its address.
    let (by, seen) = site.answered("client", "http://192.168.10.1:9000/");
    assert_eq!((by.as_str(), seen.to_string().as_str()), ("node-a", CLIENT));
    site.pings("client", "-c 2 192.168.10.1");
    site.lab.ip("client", "route add 10.1.1.0/24 via 192.168.10.1").unwrap();
    let (by, seen) = site.answered("client", "http://10.1.1.20:8080/");
    assert_eq!((by.as_str(), seen.to_string().as_str()), ("default/local", CLIENT));

    // Who the pods' gateway is.
    let gateway = site.lab.run_in("default/local", &["ip", "neighbour", "show", "169.254.1.1"]).unwrap();
    assert!(gateway.contains("lladdr ee:ee:ee:ee:ee:ee"), "{gateway}");
    site.finish();
}

/// Speaks to the ssh-like server: greeting, then what one says comes back.
struct Shell {
    reader: BufReader<TcpStream>,
}

impl Shell {
    fn open(site: &Site, address: &str) -> Self {
        let stream = site.connect("client", &format!("{address}:22"), DEADLINE).expect("port 22 is reachable");
        let mut shell = Self { reader: BufReader::new(stream) };
        assert_eq!(shell.line(), "SSH-2.0-lab");
        shell
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a line in time");
        line.trim_end().to_owned()
    }

    fn speak(&mut self, word: &str) {
        writeln!(self.reader.get_mut(), "{word}").unwrap();
        assert_eq!(self.line(), word);
    }
}

pub fn serve_shell(site: &mut Site, node: &str) {
    let server = ["socat", "TCP4-LISTEN:22,reuseaddr,fork", "SYSTEM:echo SSH-2.0-lab; cat"];
    site.lab.keep(node, &format!("shell-{node}"), &server).unwrap();
    site.wait_for_listener(node, 22);
}

/// Asserts that a new connection to port 22 of node-a works.
pub fn shell_works(site: &Site) {
    Shell::open(site, "192.168.10.1").speak("are you there");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_node_reaches_a_service_whose_only_backend_it_is_itself() {
    let mut site = site();
    site.serve("node-a", &[9000]);
    site.start_all();
    let (by, _) = site.answered("node-a", &format!("http://{CONTROL}:443/"));
    assert_eq!(by, "node-a");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn ssh_to_the_node_works_before_while_and_after_weir_runs() {
    let mut site = site();
    serve_shell(&mut site, "node-a");
    let mut lasting = Shell::open(&site, "192.168.10.1");
    lasting.speak("before");
    site.start_all();
    lasting.speak("while");
    shell_works(&site);
    let mut second = Shell::open(&site, "192.168.10.1");
    let mut router = site.take_router("node-a");
    site.check_end("node-a", &mut router);
    lasting.speak("after");
    second.speak("after");
    shell_works(&site);
    site.start("node-a");
    lasting.speak("again");
    second.speak("again");
    let config = site.config("node-a").display().to_string();
    let mut router = site.take_router("node-a");
    site.check_end("node-a", &mut router);
    site.lab.weir("node-a", &["detach", "-c", &config]).unwrap();
    lasting.speak("detached");
    shell_works(&site);
    site.finish();
}
