//! Who reaches what, from everywhere: a table of clients, addresses, backends, traffic policies and families, each cell asked with real sockets,
//! through weir and through the kernel with kube-proxy's rules for the same objects. Same outcome, or a reason that is written down here.

mod cluster;
mod kernel;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, ErrorKind, Read, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use self::cluster::{Backend, What, Who};
use crate::{
    kernel::family::Family,
    site::{DEADLINE, NO_ANSWER_SECONDS, Site},
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

/// Asks by a datagram, and takes the answer from whom it asked only.
fn ask_udp(to: SocketAddr, limit: Duration) -> io::Result<String> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(limit))?;
    socket.connect(to)?;
    match socket.send(b"who?") {
        // What the kernel says where its own rules drop what is sent.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        sent => drop(sent?),
    }
    let mut answer = [0; 256];
    socket.recv(&mut answer).map(|length| String::from_utf8_lossy(&answer[..length]).into_owned())
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
    assert!(wrong.is_empty(), "{wrong}");
    site.finish();
}
