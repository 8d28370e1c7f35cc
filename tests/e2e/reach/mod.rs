//! Who reaches what, from everywhere: a table of clients, addresses, backends, traffic policies and families, each cell asked with real sockets,
//! through weir and through the kernel with kube-proxy's rules for the same objects. Same outcome, or a reason that is written down here.

mod cluster;
mod kernel;
mod table;
mod trace;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{self, ErrorKind, Read, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use weir_lab::wait_until;

use self::cluster::{Backend, GATEWAY, NODE_A, What, Who};
use crate::{
    kernel::family::Family,
    site::{DEADLINE, Echo, NO_ANSWER_SECONDS, Site, pattern},
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// How a cell is asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Protocol {
    Tcp,
    Udp,
}

/// What a socket saw.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    /// Answered, and whom the server saw: by name.
    Answered(String),
    Refused,
    Unreachable,
    Dropped,
}

/// A cell of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Cell {
    what: What,
    backend: Backend,
    is_local: bool,
    who: Who,
    family: Family,
    protocol: Protocol,
}

impl Cell {
    fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for (what, backend, is_local) in cluster::rows() {
            for who in Who::ALL {
                for family in FAMILIES {
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        cells.push(Self { what, backend, is_local, who, family, protocol });
                    }
                }
            }
        }
        cells
    }

    /// Whether nothing comes back, by the rules for services: policy Local, no backend on the node that is asked, and no short cut.
    fn is_dropped(&self) -> bool {
        let asked = match self.what {
            What::Pod | What::HostPort => return false,
            What::NodePortThere => "node-b",
            What::NodePortHere | What::NodePortBehind => "node-a",
            _ => self.who.asks(),
        };
        // To itself a backend is led by the node that it asks, which sees the answers.
        if self.who == Who::Itself && self.backend == Backend::PodHere {
            return false;
        }
        let has_short_cut = self.what != What::ClusterIp && self.who.has_short_cut(asked);
        self.is_local && self.backend.node() != asked && !has_short_cut
    }

    /// What comes of it through weir, where that is another outcome than the kernel's, and why.
    fn difference(&self) -> Option<(Outcome, &'static str)> {
        let Self { what, backend, is_local, who, .. } = *self;
        let is_service = !matches!(what, What::Pod | What::HostPort);
        if what == What::ExternalOwn && who == Who::NodeThere {
            // As by a node port of node-a.
            let outcome = match backend {
                Backend::NodeHere => return None,
                Backend::PodHere if is_local => return None,
                _ if is_local => Outcome::Dropped,
                _ => Outcome::Answered("node-a".into()),
            };
            return Some((
                outcome,
                "a node sends to the addresses of another past weir, so that one judges what services have there",
            ));
        }
        let is_own = match (who, backend) {
            (Who::Node, Backend::NodeHere) => what != What::NodePortThere,
            (Who::NodeThere, Backend::NodeThere) => !matches!(what, What::NodePortHere | What::NodePortBehind),
            _ => false,
        };
        (is_service && is_own).then(|| {
            let reason = "a node that asks itself has a source that only weir's routes lead to: an answer to its own address stays on lo";
            (Outcome::Answered("weir".into()), reason)
        })
    }

    fn address(&self) -> SocketAddr {
        let (address, port) = cluster::address(self.what, self.backend, self.is_local);
        self.family.socket(address, port)
    }

    fn ask(&self, is_dropped: bool) -> Outcome {
        let limit = if is_dropped { Duration::from_secs_f32(NO_ANSWER_SECONDS) } else { DEADLINE };
        let answer = match self.protocol {
            Protocol::Tcp => ask_tcp(self.address(), limit),
            Protocol::Udp => ask_udp(self.address(), limit),
        };
        match answer {
            Ok(text) => {
                let (by, seen) = text.trim().rsplit_once(' ').expect("who, and whom it saw");
                let (by, seen) =
                    (by.rsplit('\n').next().expect("a line"), cluster::name_of(&self.family.written(seen.trim())));
                assert_eq!(by, self.backend.namespace(), "{self:?}");
                Outcome::Answered(seen)
            }
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Outcome::Refused,
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Outcome::Dropped,
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Outcome::Unreachable,
                _ => panic!("{self:?}: {error}"),
            },
        }
    }
}

/// Asks by HTTP: the answer, whose last line says who, and whom it saw.
fn ask_tcp(to: SocketAddr, limit: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Asks by datagrams, and takes an answer from whom it asked only. Again and again: where hundreds ask at once, some wait for a neighbour's MAC
/// address in a queue that is too short for all.
fn ask_udp(to: SocketAddr, limit: Duration) -> io::Result<String> {
    const PATIENCE: Duration = Duration::from_millis(400);
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    let begin = Instant::now();
    loop {
        match socket.send(b"who?") {
            // What the kernel says where its own rules drop what is sent.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
            sent => drop(sent?),
        }
        let mut answer = [0; 256];
        match socket.recv(&mut answer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && begin.elapsed() < limit => {}
            received => return received.map(|length| String::from_utf8_lossy(&answer[..length]).into_owned()),
        }
    }
}

/// What every cell comes to. All wait together, those that are to be dropped for a second only.
fn outcomes(site: &Site, cells: &[Cell], is_dropped: fn(&Cell) -> bool) -> BTreeMap<Cell, Outcome> {
    let of_one = |who: Who| {
        let of_who: Vec<Cell> = cells.iter().copied().filter(|cell| cell.who == who).collect();
        let ask = || {
            thread::scope(|scope| {
                let asked: Vec<_> = of_who.iter().map(|cell| scope.spawn(move || cell.ask(is_dropped(cell)))).collect();
                asked.into_iter().map(|one| one.join().expect("it is asked to its end")).collect::<Vec<_>>()
            })
        };
        let seen = site.inside(who.namespace(), ask);
        of_who.into_iter().zip(seen).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let all: Vec<_> = Who::ALL.into_iter().map(|who| scope.spawn(move || of_one(who))).collect();
        all.into_iter().flat_map(|one| one.join().expect("each is asked")).collect()
    })
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn everybody_reaches_everything_as_with_the_kernel_and_kube_proxys_rules() {
    let (mut site, _echoes) = cluster::site();
    let cells = Cell::all();
    kernel::forwards(&site, true);
    let kernel = outcomes(&site, &cells, Cell::is_dropped);
    kernel::forwards(&site, false);
    site.start_all();
    let weir = outcomes(&site, &cells, |cell| match cell.difference() {
        Some((outcome, _)) => outcome == Outcome::Dropped,
        None => cell.is_dropped(),
    });
    let mut wrong = String::new();
    for cell in &cells {
        let (by_kernel, by_weir) = (&kernel[cell], &weir[cell]);
        let is_expected = cell.is_dropped() == (*by_kernel == Outcome::Dropped);
        let expected = cell.difference().map_or_else(|| by_kernel.clone(), |(outcome, _)| outcome);
        if *by_weir != expected || !is_expected {
            writeln!(wrong, "{cell:?}\n  kernel {by_kernel:?}\n  weir   {by_weir:?}").unwrap();
        }
    }
    for (cell, answer) in trace::disagreements(&site, &weir) {
        writeln!(wrong, "{cell:?}\n  weir   {:?}\n  trace  {answer}", weir[&cell]).unwrap();
    }
    assert!(wrong.is_empty(), "{wrong}");
    let table = table::table(&kernel, &weir);
    let document = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/REACH.md")).unwrap_or_default();
    assert!(document.contains(&table), "docs/REACH.md has not this table:\n{table}");
    site.finish();
}

/// A server of node-a, asked by a node port.
const SERVED: (Backend, bool) = (Backend::NodeHere, false);

fn answers_taken(site: &Site) -> u64 {
    site.status("node-a")["programs"]["AnswerTaken"].as_u64().unwrap()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_server_of_the_node_is_spoken_to_at_length_and_refuses_by_itself() {
    let (mut site, echoes) = cluster::site();
    let mut much = vec![0; 4 << 20];
    pattern(0, &mut much);
    fs::create_dir_all(site.lab.folder().join("files")).unwrap();
    fs::write(site.lab.folder().join("files/much"), &much).unwrap();
    // As strict as an operator may have it.
    for device in ["all", "third0"] {
        site.lab.run_in("node-a", &["sysctl", "-qw", &format!("net.ipv4.conf.{device}.rp_filter=1")]).unwrap();
    }
    site.start_all();
    drop(echoes);
    for who in [Who::Outside, Who::Behind, Who::NodeThere] {
        for (family, any) in FAMILIES.into_iter().zip(["0.0.0.0", "[::]"]) {
            let (address, port) = cluster::address(What::NodePortHere, SERVED.0, SERVED.1);
            let to = family.socket(address, port);
            // Much at once.
            let mut stream = site.connect(who.namespace(), &to.to_string(), DEADLINE).unwrap();
            stream.write_all(b"GET /files/much HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert!(answer.ends_with(&much), "{who:?} {family:?}: {} bytes", answer.len());

            // In one piece, and in fragments, both ways.
            let client = site.udp(who.namespace(), &format!("{any}:0"));
            client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            client.connect(to).unwrap();
            {
                let server = family.socket(SERVED.0.address(), cluster::SERVED).to_string();
                let _echo = Echo::new(&site, "node-a", &server);
                for size in [5, 1400, 8000] {
                    let (sent, mut got) = (vec![size as u8; size], vec![0; 9000]);
                    let echoed = || {
                        client.send(&sent).unwrap();
                        client.recv(&mut got).ok()
                    };
                    let length = wait_until(&format!("{size} bytes back at {who:?} {family:?}"), DEADLINE, echoed);
                    assert_eq!(length.unwrap(), size);
                }
            }
            // Nobody is there any more, and its kernel says so of the address that was asked.
            let refused = || {
                let _ = client.send(b"who?");
                let error = client.recv(&mut [0; 16]).err()?;
                (error.kind() == ErrorKind::ConnectionRefused).then_some(())
            };
            wait_until(&format!("a refusal at {who:?} {family:?}"), DEADLINE, refused).unwrap();
        }
    }
    assert!(answers_taken(&site) > 0);

    // Without a router the server is asked by itself as ever, and by the service again once there is one.
    let (_, port) = cluster::address(What::NodePortHere, SERVED.0, SERVED.1);
    let direct = format!("http://{}:{}/", SERVED.0.address(), cluster::SERVED);
    site.router("node-a").signal(Signal::SIGKILL);
    site.take_router("node-a").wait(DEADLINE).unwrap();
    for who in [Who::Outside, Who::Behind, Who::NodeThere] {
        assert_eq!(site.answered(who.namespace(), &direct).0, "node-a");
    }
    site.start("node-a");
    for who in [Who::Outside, Who::Behind, Who::NodeThere] {
        assert_eq!(site.answered(who.namespace(), &format!("http://{}:{port}/", SERVED.0.address())).0, "node-a");
        assert_eq!(site.answered(who.namespace(), &direct).0, "node-a");
    }

    // Nothing is left of it on any device.
    let config = site.config("node-a").display().to_string();
    let mut router = site.take_router("node-a");
    site.check_end("node-a", &mut router);
    site.lab.weir("node-a", &["detach", "-c", &config]).unwrap();
    for who in [Who::Outside, Who::Behind] {
        assert_eq!(site.answered(who.namespace(), &direct).0, "node-a");
        let refused = site.connect(who.namespace(), &format!("{}:{port}", SERVED.0.address()), DEADLINE);
        assert_eq!(refused.map_err(|error| error.kind()).err(), Some(ErrorKind::ConnectionRefused), "{who:?}");
    }
    site.finish();
}

/// A VPN whose device has no link headers: datagrams of one end are the other's.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn who_is_behind_a_device_without_link_headers_reaches_all_that_others_do() {
    let (mut site, _echoes) = cluster::site();
    site.lab.add_namespace("vpn").unwrap();
    let end = |name: &str| site.lab.folder().join(name).display().to_string();
    let (near, far) = (end("near.sock"), end("far.sock"));
    site.start_all();
    // It appears while the router runs. Nothing is sent before both ends are there.
    let tunnels =
        [("node-a", "10.9.0.1", &near, &far), ("vpn", "10.9.0.2", &far, &near)].map(|(at, address, own, other)| {
            site.lab.run_in(at, &["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"]).unwrap();
            let tun = format!("TUN:{address}/24,tun-name=tun0,iff-no-pi,up");
            site.lab
                .spawn(at, &format!("tun-{at}"), &["socat", &tun, &format!("UNIX-SENDTO:{other},bind={own}")])
                .unwrap()
        });
    for (at, socket) in [("node-a", &near), ("vpn", &far)] {
        let is_up = || (site.lab.ip(at, "link show tun0 up").is_ok() && fs::metadata(socket).is_ok()).then_some(());
        wait_until("the tunnel", DEADLINE, is_up).unwrap();
    }
    site.lab.ip("vpn", "route add default dev tun0").unwrap();
    let has_programs = |site: &Site| {
        let modes = site.status("node-a")["modes"].clone();
        modes.as_array().unwrap().iter().any(|mode| mode["device"] == "tun0")
    };
    wait_until("its programs", DEADLINE, || has_programs(&site).then_some(())).unwrap();
    for what in [What::ClusterIp, What::NodePortHere, What::LoadBalancer, What::ExternalOwn] {
        for backend in Backend::ALL {
            let (address, port) = cluster::address(what, backend, false);
            let by = site.answered("vpn", &format!("http://{address}:{port}/")).0;
            assert_eq!(by, backend.namespace(), "{what:?}");
        }
    }
    // Who is asked by policy Local sees who asks.
    for backend in [Backend::PodHere, Backend::NodeHere] {
        let (address, port) = cluster::address(What::NodePortHere, backend, true);
        let (by, seen) = site.answered("vpn", &format!("http://{address}:{port}/"));
        assert_eq!((by.as_str(), seen.to_string().as_str()), (backend.namespace(), "10.9.0.2"));
    }

    // Not in the node's own name.
    let taken = || site.status("node-a")["programs"]["DeviceTaken"].as_u64().unwrap();
    site.lab.ip("vpn", &format!("address add {NODE_A}/32 dev lo")).unwrap();
    let (_, port) = cluster::address(What::NodePortHere, Backend::PodHere, true);
    let before = taken();
    for (own, more) in [(NODE_A, 0), ("10.9.0.2", 1)] {
        let socket = site.udp("vpn", &format!("{own}:0"));
        socket.connect((GATEWAY, port)).unwrap();
        socket.send(b"who?").unwrap();
        if more > 0 {
            assert!(socket.recv(&mut [0; 256]).is_ok(), "an honest one is answered");
        }
    }
    assert_eq!(taken(), before + 1);

    // It goes, and its programs with it.
    drop(tunnels);
    wait_until("that it is forgotten", DEADLINE, || (!has_programs(&site)).then_some(())).unwrap();
    site.finish();
}
