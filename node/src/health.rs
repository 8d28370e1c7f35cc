//! Health-check node ports: a load balancer's question whether this node has backends of a service, answered as kube-proxy does.
//!
//! With `externalTrafficPolicy: Local` a load balancer may only send to nodes that have a backend themselves, and finds out by HTTP at
//! `spec.healthCheckNodePort` of each node: 200 with local ready endpoints, 503 without. It is the node's own port, no service NAT:
//! these are ordinary sockets of the node's kernel.
//!
//! A thread with a runtime of its own listens, so that probes are answered in time while control compiles. Control tells it what
//! is wanted ([`HealthChecks::follow`]); a port that cannot be had is tried again every few seconds, and `weir status` says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::ready,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    body::Bytes,
    header::{self, HeaderName},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time};
use tracing::{info, warn};
use weir_nat::Model;

use crate::http::{self, listen, problem_of};

/// How soon a port that another process has is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How many endpoints there are here, for load balancers that weigh nodes by that.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is answered at one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The service's namespace.
    pub namespace: String,
    /// The service's name.
    pub name: String,
    /// Its ready endpoints on this node, of the address's family.
    pub local_endpoints: usize,
}

impl Check {
    fn response(&self) -> Response<Full<Bytes>> {
        let status = if self.local_endpoints > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let body = json!({
            "service": {"namespace": self.namespace, "name": self.name},
            "localEndpoints": self.local_endpoints,
            // Whoever answers runs.
            "serviceProxyHealthy": true,
        });
        Response::builder()
            .status(status)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
            .header(WEIGHT, self.local_endpoints)
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("its headers are valid")
    }
}

/// The health checks of `model`, by the addresses that they are answered at.
///
/// In each family that a service has a cluster IP of: on every address, or, where `nodePortAddresses` chooses some, on these.
pub fn wanted(model: &Model) -> BTreeMap<SocketAddr, Check> {
    let mut services: BTreeMap<(u16, &str), [Option<BTreeSet<IpAddr>>; 2]> = BTreeMap::new();
    for port in &model.services {
        let Some(number) = port.health_check_node_port else { continue };
        let service = port.name.split_once(':').map_or(port.name.as_str(), |(service, _)| service);
        let families = services.entry((number, service)).or_default();
        for cluster_ip in &port.cluster_ips {
            families[usize::from(cluster_ip.is_ipv6())].get_or_insert_default();
        }
        for endpoint in &port.endpoints {
            let is_local = endpoint.node_name() == Some(&*model.node_name);
            if let Some(local) = &mut families[usize::from(endpoint.address.is_ipv6())]
                && is_local
                && endpoint.ready
                && endpoint.serving
            {
                local.insert(endpoint.address);
            }
        }
    }
    let mut checks = BTreeMap::new();
    for ((port, service), families) in services {
        let (namespace, name) = service.split_once('/').unwrap_or(("", service));
        for (is_ipv6, local) in [false, true].into_iter().zip(families) {
            let Some(local) = local else { continue };
            let check = Check { namespace: namespace.into(), name: name.into(), local_endpoints: local.len() };
            checks.extend(
                addresses(model, is_ipv6).into_iter().map(|address| (SocketAddr::new(address, port), check.clone())),
            );
        }
    }
    checks
}

/// Where node ports of a family are open: on its unspecified address, or on some of the node's.
fn addresses(model: &Model, is_ipv6: bool) -> Vec<IpAddr> {
    let chosen = || model.node_port_addresses.iter().filter(|net| net.addr().is_ipv6() == is_ipv6);
    if chosen().all(|net| net.prefix_len() == 0) {
        return vec![if is_ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }];
    }
    let is_open = |address: &&IpAddr| chosen().any(|net| net.contains(*address)) && !address.is_loopback();
    model.local_addresses.iter().filter(is_open).copied().collect()
}

/// How a wanted address fares.
#[derive(Clone, Debug)]
struct Report {
    check: Check,
    /// Why nobody listens there.
    problem: Option<String>,
}

type Reports = Arc<Mutex<BTreeMap<SocketAddr, Report>>>;

/// The ports that are listened on. Dropping it closes them.
#[derive(Debug)]
pub struct HealthChecks {
    wanted: watch::Sender<BTreeMap<SocketAddr, Check>>,
    reports: Reports,
}

impl HealthChecks {
    /// Starts the thread, without a port so far.
    ///
    /// # Errors
    /// Where there can be no more threads.
    pub fn start() -> io::Result<Self> {
        let (wanted, receiver) = watch::channel(BTreeMap::new());
        let reports = Reports::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = reports.clone();
        thread::Builder::new().name("weir-health".into()).spawn(move || runtime.block_on(serve(receiver, &shared)))?;
        Ok(Self { wanted, reports })
    }

    /// Opens, closes and updates ports, so that these are answered.
    pub fn follow(&self, checks: BTreeMap<SocketAddr, Check>) {
        self.wanted.send_if_modified(|wanted| {
            let differs = *wanted != checks;
            *wanted = checks;
            differs
        });
    }

    /// What is answered where, and what is not.
    pub fn status(&self) -> Value {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = reports.iter().map(|(address, Report { check, problem })| {
            json!({
                "address": address.to_string(),
                "service": format!("{}/{}", check.namespace, check.name),
                "localEndpoints": check.local_endpoints,
                "problem": problem,
            })
        });
        entries.collect()
    }
}

/// A socket that answers until it is dropped.
struct Port {
    check: watch::Sender<Check>,
    task: JoinHandle<()>,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows what is wanted until nobody can want anything any more.
async fn serve(mut wanted: watch::Receiver<BTreeMap<SocketAddr, Check>>, reports: &Reports) {
    let mut ports: BTreeMap<SocketAddr, Port> = BTreeMap::new();
    loop {
        let checks = wanted.borrow_and_update().clone();
        let is_wanted = |address: &SocketAddr| checks.contains_key(address);
        for closed in ports.extract_if(.., |address, _| !is_wanted(address)) {
            info!(address = %closed.0, "health checks are not answered any more");
        }
        let mut next = BTreeMap::new();
        for (address, check) in checks {
            let mut problem = None;
            if let Some(port) = ports.get(&address) {
                port.check.send_replace(check.clone());
            } else {
                match listen(address) {
                    Ok(listener) => {
                        info!(%address, service = %check.name, namespace = %check.namespace, "health checks are answered");
                        ports.insert(address, open(listener, check.clone()));
                    }
                    Err(error) => problem = Some(problem_of(&error)),
                }
            }
            next.insert(address, Report { check, problem });
        }
        let has_problem = next.values().any(|report| report.problem.is_some());
        let before = std::mem::replace(&mut *reports.lock().unwrap_or_else(PoisonError::into_inner), next.clone());
        for (address, Report { check, problem }) in next {
            if let Some(problem) = problem
                && before.get(&address).is_none_or(|before| before.problem.as_ref() != Some(&problem))
            {
                let service = format!("{}/{}", check.namespace, check.name);
                warn!(%address, service, "load balancers that probe this node get no answer: {problem}");
            }
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = time::sleep(RETRY), if has_problem => {}
        }
    }
}

/// Answers with what the check is at that moment, whatever is asked for, as kube-proxy does.
fn open(listener: TcpListener, check: Check) -> Port {
    let (check, current) = watch::channel(check);
    let task = tokio::spawn(http::answer_all(listener, move |_| ready(current.borrow().response())));
    Port { check, task }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use weir_nat::{Endpoint, ServicePort, Topology};

    use super::*;

    fn endpoint(address: &str, node: &str, ready: bool) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            port: 8080,
            ready,
            serving: true,
            terminating: !ready,
            topology: Some(Arc::new(Topology::on(node))),
        }
    }

    fn port(name: &str, health: Option<u16>, cluster_ips: &[&str], endpoints: Vec<Endpoint>) -> ServicePort {
        ServicePort {
            name: name.into(),
            health_check_node_port: health,
            cluster_ips: cluster_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            endpoints,
            ..ServicePort::default()
        }
    }

    fn model(services: Vec<ServicePort>) -> Model {
        Model {
            node_name: "here".into(),
            local_addresses: ["192.168.0.1", "10.9.0.1", "fd00::1", "127.0.0.1"].map(|ip| ip.parse().unwrap()).into(),
            services: services.into_iter().map(Arc::new).collect(),
            ..Model::default()
        }
    }

    fn counts(model: &Model) -> Vec<(String, String, usize)> {
        let row = |(address, check): (SocketAddr, Check)| {
            (address.to_string(), format!("{}/{}", check.namespace, check.name), check.local_endpoints)
        };
        wanted(model).into_iter().map(row).collect()
    }

    #[test]
    fn addresses_are_counted_once_where_they_are_ready_and_here() {
        let endpoints = || {
            vec![
                endpoint("10.0.0.1", "here", true),
                endpoint("10.0.0.2", "here", true),
                endpoint("10.0.0.3", "here", false),
                endpoint("10.0.0.4", "there", true),
                endpoint("fd00:1::1", "here", true),
            ]
        };
        let both = ["10.96.0.1", "fd00:96::1"];
        let mut model = model(vec![
            port("a/web:http", Some(32000), &both, endpoints()),
            port("a/web:https", Some(32000), &both, endpoints()),
            port("a/single", Some(32001), &both[..1], vec![endpoint("fd00:1::1", "here", true)]),
            port("a/none", None, &both, endpoints()),
        ]);
        let row = |address: &str, service: &str, count| (address.to_owned(), service.to_owned(), count);
        assert_eq!(
            counts(&model),
            [row("0.0.0.0:32000", "a/web", 2), row("0.0.0.0:32001", "a/single", 0), row("[::]:32000", "a/web", 1),]
        );
        model.node_port_addresses = vec!["192.168.0.0/16".parse().unwrap(), "127.0.0.0/8".parse().unwrap()];
        assert_eq!(
            counts(&model),
            [
                row("192.168.0.1:32000", "a/web", 2),
                row("192.168.0.1:32001", "a/single", 0),
                row("[::]:32000", "a/web", 1),
            ]
        );
    }

    fn get(address: SocketAddr, request: &str) -> Option<String> {
        let mut stream = std::net::TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        Some(text)
    }

    fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            match look() {
                Some(seen) => return seen,
                None => assert!(std::time::Instant::now() < deadline, "it does not come to be"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn who_says_nothing_keeps_nobody_from_being_answered() {
        let checks = HealthChecks::start().unwrap();
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let places = [free(), free()];
        let [busy, other] = places.each_ref().map(|listener| listener.local_addr().unwrap());
        drop(places);
        let check = Check { namespace: "a".into(), name: "web".into(), local_endpoints: 1 };
        checks.follow(BTreeMap::from([(busy, check.clone()), (other, check)]));
        until(|| get(busy, "GET / HTTP/1.0\r\n\r\n"));
        let _silent: Vec<_> = (0..300).map(|_| std::net::TcpStream::connect(busy).unwrap()).collect();
        for address in [other, busy] {
            let begin = std::time::Instant::now();
            let answer = until(|| get(address, "GET / HTTP/1.0\r\n\r\n"));
            assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
            assert!(begin.elapsed() < http::PATIENCE, "{address}: after {:?}", begin.elapsed());
        }
    }

    #[test]
    fn ports_follow_what_is_wanted() {
        let checks = HealthChecks::start().unwrap();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = taken.local_addr().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let check = |count| Check { namespace: "a".into(), name: "web".into(), local_endpoints: count };
        checks.follow(BTreeMap::from([(free, check(2)), (busy, check(1))]));
        let answer = until(|| get(free, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"));
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        for header in
            ["content-type: application/json", "x-content-type-options: nosniff", "x-load-balancing-endpoint-weight: 2"]
        {
            assert!(head.lines().any(|line| line == header), "{header} is not in {head}");
        }
        let body: Value = serde_json::from_str(body).unwrap();
        let service = json!({"namespace": "a", "name": "web"});
        assert_eq!(body, json!({"service": service, "localEndpoints": 2, "serviceProxyHealthy": true}));
        let problem = |address: SocketAddr| {
            let status = checks.status();
            let entry =
                status.as_array().unwrap().iter().find(|entry| entry["address"] == address.to_string()).cloned();
            entry.map(|entry| entry["problem"].as_str().unwrap_or_default().to_owned())
        };
        assert_eq!(problem(free).as_deref(), Some(""));
        assert!(problem(busy).unwrap().contains("another process listens there"), "{}", checks.status());
        // Another count on the port that stays; the other is free now, and tried again.
        drop(taken);
        checks.follow(BTreeMap::from([(free, check(0)), (busy, check(1))]));
        until(|| get(free, "HEAD / HTTP/1.0\r\n\r\n").filter(|text| text.starts_with("HTTP/1.0 503 ")));
        until(|| get(busy, "GET / HTTP/1.0\r\n\r\n").filter(|text| text.starts_with("HTTP/1.0 200 ")));
        assert_eq!(problem(busy).as_deref(), Some(""));
        checks.follow(BTreeMap::from([(busy, check(1))]));
        until(|| std::net::TcpStream::connect(free).err());
        drop(checks);
        until(|| std::net::TcpStream::connect(busy).err());
    }
}
