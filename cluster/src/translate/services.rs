//! Services and EndpointSlices (the design's companion on services says which fields count).

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use hashbrown::HashMap;
use ipnet::IpNet;
use weir_dataplane::model::Cluster;
use weir_nat::{Endpoint, MAX_AFFINITY_SECONDS, Model, ServicePort, TrafficPolicy};
use weir_packet::Protocol;

use crate::{
    config::RouterConfig,
    resources::{
        Content, Manifests, Memo, Object, Same,
        at::{At, Reporter},
        kubernetes::{
            Address, Addresses, EndpointSlice, Name, SERVICE_NAME_LABEL, Service, ServicePort as KubernetesPort,
            ServiceSpec, SliceEndpoint,
        },
    },
    text::{
        Diagnostic, Problems, Span, Topic,
        address::{parse_ip, parse_network},
        problem::nearest,
    },
    translate::{
        impossible::{is_usable, usable, usable_on_link},
        last_api::{API, LastApi},
    },
};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Kubernetes's default for the timeout of ClientIP affinity, in seconds.
const AFFINITY_SECONDS: u32 = 10_800;

/// The service ports of each service, by its number.
type Assembled = Memo<u32, Parts, Box<[Arc<ServicePort>]>>;

/// What services were translated to last.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// For which node, and for the proxy of which name.
    as_whom: (String, Option<String>),
    assembled: Assembled,
    /// What default/kubernetes had last.
    pub(super) api: LastApi,
    last: Option<Last>,
    /// How often all were looked at.
    whole: u64,
}

/// The whole of it, and where in it what is: see [`again`].
#[derive(Debug)]
struct Last {
    manifests: Arc<Manifests>,
    model: Model,
    /// What was said.
    said: Vec<Diagnostic>,
    /// By namespace and name, those that only slices name too.
    places: HashMap<(Name, Name), Place>,
}

/// A service in a model.
#[derive(Debug, Default)]
struct Place {
    /// Its number and its first service port's place; `None` where it is not served.
    served: Option<(u32, u32)>,
    /// Its slices' numbers, in the order of their names.
    slices: Vec<u32>,
}

/// What service ports are made of.
#[derive(Debug)]
pub(super) struct Parts {
    service: Same<Content<Service>>,
    slices: Box<[Same<Content<EndpointSlice>>]>,
}

impl Parts {
    fn are(&self, service: &Object<Service>, slices: &[OfService<'_>]) -> bool {
        let is = |(known, (slice, _)): (&Same<_>, &OfService<'_>)| Arc::ptr_eq(&known.0, slice.content());
        Arc::ptr_eq(&self.service.0, service.content())
            && self.slices.len() == slices.len()
            && self.slices.iter().zip(slices).all(is)
    }
}

/// The services, and a number: as long as it is the same, so are they but for their endpoints.
pub(super) fn translate(
    config: &RouterConfig,
    manifests: &Arc<Manifests>,
    cluster: &Cluster,
    kept: &mut Kept,
    problems: &mut Problems,
) -> (Model, u64) {
    let this_node = manifests.nodes().iter().find(|node| *node.name == *config.node_name);
    let zone = this_node.and_then(|node| node.value.metadata.labels.get(ZONE_LABEL).map(|zone| zone.to_string()));
    let local_addresses = config.local_addresses.clone().unwrap_or_else(|| {
        let node = cluster.nodes.iter().find(|node| node.name == config.node_name);
        node.map_or(Vec::new(), |node| node.internal_ips.iter().chain(&node.other_ips).copied().collect())
    });
    let model = Model {
        node_name: config.node_name.clone(),
        zone: zone.filter(|zone| !zone.is_empty()),
        pod_cidrs: cluster.pod_cidrs.clone(),
        masquerade_all: config.masquerade_all,
        node_port_addresses: config.node_port_addresses.clone(),
        local_addresses,
        service_cidrs: cluster.service_cidrs.clone(),
        ..Model::default()
    };
    // Of an endpoint listed twice, the listing on this node counts.
    let as_whom = (config.node_name.clone(), config.service_proxy_name.clone());
    if kept.as_whom != as_whom {
        let api = std::mem::take(&mut kept.api);
        *kept = Kept { as_whom, whole: kept.whole, api, ..Kept::default() };
    }
    let proxy_name = config.service_proxy_name.as_deref();
    if let Some(mut last) = kept.last.take()
        && again(&model, manifests, &mut last, proxy_name, &kept.api, &mut kept.assembled).is_some()
    {
        let last = kept.last.insert(Last { manifests: Arc::clone(manifests), ..last });
        problems.extend(last.said.iter().cloned());
        return (last.model.clone(), kept.whole);
    }
    let mut own = problems.without_diagnostics();
    let (model, places) = whole(model, manifests, proxy_name, &kept.api, &mut kept.assembled, &mut own);
    let api = LastApi::of(&model);
    if !api.is_empty() {
        kept.api = api;
    }
    let said = own.diagnostics().to_vec();
    problems.extend(said.iter().cloned());
    if !own.has_errors() {
        kept.last = Some(Last { manifests: Arc::clone(manifests), model: model.clone(), said, places });
    }
    kept.whole += 1;
    (model, kept.whole)
}

/// Translates all services into `model`.
fn whole(
    mut model: Model,
    manifests: &Manifests,
    proxy_name: Option<&str>,
    last_api: &LastApi,
    assembled: &mut Assembled,
    problems: &mut Problems,
) -> (Model, HashMap<(Name, Name), Place>) {
    let services = manifests.services();
    let mut slices = slices(manifests, proxy_name, problems);
    let mut places = HashMap::with_capacity(services.len().max(slices.len()));
    let mut claims = Claims { cluster_ips: HashMap::with_capacity(services.len()), ..Claims::default() };
    let mut all = Vec::with_capacity(services.len());
    let mut has_api = false;
    assembled.turn();
    for object in services {
        let Some(facts) = own_service(object, proxy_name, problems) else {
            has_api |= is_api(object) && is_others(&object.value, proxy_name);
            continue;
        };
        claims.of(object, facts, problems);
        let of_service = slices.remove(&(object.namespace.as_ref(), object.name.as_ref())).unwrap_or_default();
        model.unserved.extend(unserved(Some(facts), &of_service));
        let ports = assembled_ports(object, facts, &of_service, &model.node_name, last_api, assembled);
        has_api |= is_api(object) && !ports.is_empty();
        if is_api(object)
            && !of_service.iter().any(has_usable)
            && ports.iter().any(|port| port.endpoints.iter().any(Endpoint::is_usable))
        {
            let message = "no backend is left, so its last ones stay: without the API nobody would hear of others";
            let help = "if the API is elsewhere now, write its EndpointSlice".to_owned();
            object.reporter(problems).warning(object.at().key("metadata").key("name"), message, help);
        }
        let place = Place { served: Some((object.origin, all.len() as u32)), slices: numbers(&of_service) };
        places.insert((Arc::clone(&object.namespace), Arc::clone(&object.name)), place);
        all.extend(ports.iter().cloned());
    }
    for of_service in slices.values() {
        model.unserved.extend(unserved(None, of_service));
        if let Some((object, slice)) = of_service.first() {
            let place = Place { served: None, slices: numbers(of_service) };
            places.insert((Arc::clone(&object.namespace), Arc::clone(&slice.service)), place);
        }
    }
    if !has_api {
        let before = all.len();
        all.extend(last_api.service_ports(|address| claims.cluster_ips.contains_key(address)));
        if all.len() > before {
            let message = "no manifest has the service default/kubernetes any more, so it stays as it was last: without the API nobody would \
                           hear of another";
            let help = "write its Service and EndpointSlice, if the API is elsewhere now".to_owned();
            problems.warning(Span { file: 0, start: 0, end: 0 }, message, help);
        }
    }
    model.unserved.sort_unstable();
    model.services = all.into();
    (model, places)
}

fn numbers(slices: &[OfService<'_>]) -> Vec<u32> {
    slices.iter().map(|(object, _)| object.origin).collect()
}

/// The ports of a service that is served, as they are kept or made.
fn assembled_ports<'a>(
    object: &Object<Service>,
    facts: &ServiceFacts,
    slices: &[OfService<'_>],
    node_name: &str,
    last_api: &LastApi,
    assembled: &'a mut Assembled,
) -> &'a [Arc<ServicePort>] {
    let make = |_: Option<&_>| {
        let parts = Parts {
            service: Same(Arc::clone(object.content())),
            slices: slices.iter().map(|(slice, _)| Same(Arc::clone(slice.content()))).collect(),
        };
        let mut ports = service_ports(object, facts, slices, node_name);
        if is_api(object) {
            last_api.fill(&mut ports);
        }
        (parts, ports)
    };
    assembled.get(object.origin, |parts| parts.are(object, slices), make)
}

/// Brings `last` up to date where nothing but EndpointSlices has changed, which is nearly all that changes in a large cluster: only services
/// whose slices changed are looked at. `None` where it cannot, and then `last` is of no use any more.
///
/// `model` has what is not of services. Whatever there is to say about a text that changed, or was before, is found by looking at all.
fn again(
    model: &Model,
    manifests: &Manifests,
    last: &mut Last,
    proxy_name: Option<&str>,
    last_api: &LastApi,
    assembled: &mut Assembled,
) -> Option<()> {
    let before = Arc::clone(&last.manifests);
    let changes = manifests.changes_since(&before)?;
    if !last.model.is_of_same_node(model)
        || changes.lists().contains("services")
        || last.said.iter().any(|said| changes.has_file(said.span.file))
    {
        return None;
    }
    // What slices have to say would be said at each load.
    let mut said = Problems::default();
    let mut touched: BTreeMap<(Name, Name), Vec<u32>> = BTreeMap::new();
    let (mut gone, mut come) = (Vec::new(), Vec::new());
    for (before, after) in changes.of(|lists| &lists.endpoint_slices) {
        gone.extend(others(before, after));
        come.extend(others(after, before));
    }
    for (objects, is_new) in [(gone, false), (come, true)] {
        for object in objects {
            let Some(facts) = own_slice(object, proxy_name, &mut said) else { continue };
            let key = (Arc::clone(&object.namespace), Arc::clone(&facts.service));
            let place = last.places.entry(key.clone()).or_default();
            touched.entry(key).or_insert_with(|| place.slices.clone());
            match is_new {
                true => place.slices.push(object.origin),
                false => place.slices.retain(|number| *number != object.origin),
            }
        }
    }
    let services = &mut *last.model.services;
    for (key, were) in touched {
        let place = last.places.get_mut(&key)?;
        let [before, after] = [(&*before, &were), (manifests, &place.slices)].map(|(manifests, numbers)| {
            let by_number = numbers.iter().map(|number| {
                let object = manifests.object(*number, |lists| &lists.endpoint_slices)?;
                Some((object, object.made(&mut said, slice).as_ref()?))
            });
            let mut slices = by_number.collect::<Option<Vec<OfService<'_>>>>()?;
            slices.sort_by_key(|(object, _)| &object.name);
            Some(slices)
        });
        let (before, after) = (before?, after?);
        place.slices = numbers(&after);
        let served = match place.served {
            None => None,
            Some((number, first)) => {
                let object = manifests.object(number, |lists| &lists.services)?;
                Some((object, object.made(&mut said, service).as_ref()?, first as usize))
            }
        };
        let facts = served.map(|(_, facts, _)| facts);
        exchange(&mut last.model.unserved, unserved(facts, &before), unserved(facts, &after));
        if let Some((object, facts, first)) = served {
            if is_api(object) {
                return None;
            }
            let ports = assembled_ports(object, facts, &after, &model.node_name, last_api, assembled);
            services.get_mut(first..first + ports.len())?.clone_from_slice(ports);
        }
        if place.slices.is_empty() && place.served.is_none() {
            last.places.remove(&key);
        }
    }
    said.diagnostics().is_empty().then_some(())
}

/// Those objects of one list that are not in the other.
fn others<'m, T>(of: &'m [Object<T>], than: &'m [Object<T>]) -> impl Iterator<Item = &'m Object<T>> {
    let than: HashSet<*const Content<T>> = than.iter().map(|object| Arc::as_ptr(object.content())).collect();
    of.iter().filter(move |object| !than.contains(&Arc::as_ptr(object.content())))
}

/// Takes some out of a sorted list, and puts others in.
fn exchange<T: Ord>(list: &mut Vec<T>, gone: impl Iterator<Item = T>, come: impl Iterator<Item = T>) {
    for one in gone {
        if let Ok(place) = list.binary_search(&one) {
            list.remove(place);
        }
    }
    for one in come {
        let place = list.binary_search(&one).unwrap_or_else(|place| place);
        list.insert(place, one);
    }
}

/// Whether a service says itself that it is not to be served here.
fn is_others(service: &Service, proxy_name: Option<&str>) -> bool {
    let is_headless = service.spec.as_ref().is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None"));
    is_headless || service.for_proxy.left_to_others(proxy_name).is_some()
}

/// What is made of a service, unless its labels leave it to another proxy.
fn own_service<'m>(
    object: &'m Object<Service>,
    proxy_name: Option<&str>,
    problems: &mut Problems,
) -> Option<&'m ServiceFacts> {
    let facts = object.made(problems, service).as_ref()?;
    let Some(label) = object.value.for_proxy.left_to_others(proxy_name) else { return Some(facts) };
    let at = object.at().key("metadata").key("labels").key(label);
    let message = format_args!("its label {label} leaves it to another than this router: it is not served");
    object.reporter(problems).note(at, message);
    None
}

/// As [`own_service`], of a slice.
fn own_slice<'m>(
    object: &'m Object<EndpointSlice>,
    proxy_name: Option<&str>,
    problems: &mut Problems,
) -> Option<&'m Slice> {
    let facts = object.made(problems, slice).as_ref()?;
    object.value.labels.for_proxy.left_to_others(proxy_name).is_none().then_some(facts)
}

/// Whether it is the cluster's own API.
fn is_api(object: &Object<Service>) -> bool {
    (&*object.namespace, &*object.name) == API
}

/// Whether a slice has an endpoint that packets may come to.
fn has_usable((object, slice): &OfService<'_>) -> bool {
    slice.endpoints(&object.value).any(|(address, endpoint)| model_endpoint(address, 0, endpoint).is_usable())
}

/// What services take from an EndpointSlice, besides its endpoints.
struct Slice {
    service: Name,
    is_ipv6: bool,
    ports: Box<[PortOfSlice]>,
}

struct PortOfSlice {
    name: Name,
    protocol: Protocol,
    number: u16,
}

impl Slice {
    /// Those endpoints that have an address, with the one that clients use.
    fn endpoints<'s>(&self, slice: &'s EndpointSlice) -> impl Iterator<Item = (IpAddr, &'s SliceEndpoint)> {
        let is_ipv6 = self.is_ipv6;
        slice.endpoints.iter().filter_map(move |endpoint| {
            // The API says that clients use the first one only.
            let address = endpoint.addresses.as_slice().first()?.ip().ok()?;
            (address.is_ipv6() == is_ipv6 && is_usable(address)).then_some((address, endpoint))
        })
    }
}

/// A slice, of a service.
type OfService<'m> = (&'m Object<EndpointSlice>, &'m Slice);

/// The backends that slices have for no port of their service, of which `None` is served.
fn unserved<'m>(
    facts: Option<&'m ServiceFacts>,
    slices: &'m [OfService<'m>],
) -> impl Iterator<Item = (Protocol, IpAddr, u16)> + 'm {
    slices.iter().flat_map(move |(object, slice)| {
        let is_served = move |port: &PortOfSlice| {
            let ports = facts.map_or(&[][..], |facts| &facts.ports);
            ports.iter().any(|one| (one.name.as_str(), one.protocol) == (&*port.name, port.protocol))
        };
        let ports = slice.ports.iter().filter(move |port| !is_served(port));
        ports.flat_map(|port| slice.endpoints(&object.value).map(|(address, _)| (port.protocol, address, port.number)))
    })
}

type SlicesByService<'m> = HashMap<(&'m str, &'m str), Vec<OfService<'m>>>;

/// The slices by namespace and service, each service's in the order of their names.
fn slices<'m>(manifests: &'m Manifests, proxy_name: Option<&str>, problems: &mut Problems) -> SlicesByService<'m> {
    let mut slices = SlicesByService::with_capacity(manifests.endpoint_slices().len());
    for object in manifests.endpoint_slices() {
        if let Some(facts) = own_slice(object, proxy_name, problems) {
            slices.entry((&object.namespace, &facts.service)).or_default().push((object, facts));
        }
    }
    for slices in slices.values_mut() {
        slices.sort_by_key(|(object, _)| &object.name);
    }
    slices
}

fn slice(object: &Object<EndpointSlice>, problems: &mut Problems) -> Option<Slice> {
    let mut report = object.reporter(problems);
    let slice = &object.value;
    let at = object.at();
    let is_ipv6 = match &*slice.address_type {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => return None,
        "" => {
            let help = "write addressType: IPv4 or IPv6".to_owned();
            report.error(at, "addressType is missing", help);
            return None;
        }
        other => {
            let help = "it is one of IPv4, IPv6, FQDN".to_owned();
            report.error(at.key("addressType"), format_args!("addressType: {other:?} is not known"), help);
            return None;
        }
    };
    for (index, endpoint) in slice.endpoints.iter().enumerate() {
        // Nearly all are of this form, and there is nothing to say about it.
        let is_plain = |address: IpAddr| address.is_ipv6() == is_ipv6 && is_usable(address);
        if !matches!(endpoint.addresses, Addresses::One(Address::Ip(address)) if is_plain(address)) {
            check_endpoint(endpoint, index, is_ipv6, at.key("endpoints").item(index), &mut report);
        }
    }
    let mut ports = Vec::with_capacity(slice.ports.len());
    for (index, port) in slice.ports.iter().enumerate() {
        let at = at.key("ports").item(index);
        let protocol = protocol(port.protocol.as_deref(), at.key("protocol"), &format!("ports[{index}]"), &mut report);
        // A port without a number gives no backend.
        let Some(number) = port.port else { continue };
        let number = port_number(number, at.key("port"), &format!("ports[{index}].port"), &mut report);
        if let (Some(protocol), Some(number)) = (protocol, number) {
            ports.push(PortOfSlice { name: port.name.clone().unwrap_or_default(), protocol, number });
        }
    }
    let Some(service) = slice.labels.service.as_ref().filter(|name| !name.is_empty()) else {
        let message = format!("it has no label {SERVICE_NAME_LABEL} and belongs to no service");
        report.note_on(Topic::NoService, at.key("metadata").key("name"), message);
        return None;
    };
    Some(Slice { service: Arc::clone(service), is_ipv6, ports: ports.into() })
}

/// Keeps each address and port once: its most usable listing (ready, then serving and terminating), of those one on this node, of those the
/// first. A pod that got the address of one that is stuck while it terminates is so not hidden by it.
fn each_once(endpoints: &mut Vec<Endpoint>, node_name: &str) {
    let worth = |endpoint: &Endpoint| (endpoint.ready, endpoint.is_usable(), endpoint.node_name() == Some(node_name));
    let mut places: HashMap<(IpAddr, u16), usize> = HashMap::with_capacity(endpoints.len());
    let mut unique: Vec<Endpoint> = Vec::with_capacity(endpoints.len());
    for endpoint in endpoints.drain(..) {
        match places.get(&(endpoint.address, endpoint.port)) {
            Some(place) if worth(&endpoint) > worth(&unique[*place]) => unique[*place] = endpoint,
            Some(_) => {}
            None => {
                places.insert((endpoint.address, endpoint.port), unique.len());
                unique.push(endpoint);
            }
        }
    }
    *endpoints = unique;
}

/// Reports what is wrong with an endpoint's addresses.
fn check_endpoint(endpoint: &SliceEndpoint, index: usize, is_ipv6: bool, at: At<'_>, report: &mut Reporter<'_>) {
    let addresses = endpoint.addresses.as_slice();
    if addresses.is_empty() {
        let help = "an endpoint has at least one address".to_owned();
        report.error(at, format_args!("endpoints[{index}].addresses is missing"), help);
    }
    for (number, given) in addresses.iter().enumerate() {
        let read = given.ip();
        if matches!(&read, Ok(address) if address.is_ipv6() == is_ipv6 && is_usable(*address)) {
            continue;
        }
        let at = at.key("addresses").item(number);
        let field = format!("endpoints[{index}].addresses[{number}]");
        let address = report.read(at, &field, read);
        let Some(address) = usable(report, at, &field, address) else { continue };
        if address.is_ipv6() != is_ipv6 {
            let (text, family) = (given.text(), if is_ipv6 { "IPv6" } else { "IPv4" });
            let help = "a slice holds addresses of one family; put the others in a slice of their own".to_owned();
            report.error(at, format_args!("{field}: {text} is not an {family} address as addressType says"), help);
        }
    }
}

fn model_endpoint(address: IpAddr, port: u16, endpoint: &SliceEndpoint) -> Endpoint {
    let ready = endpoint.ready.unwrap_or(true);
    Endpoint {
        address,
        port,
        ready,
        serving: endpoint.serving.unwrap_or(true),
        terminating: endpoint.terminating.unwrap_or(false),
        topology: endpoint.topology.clone(),
    }
}

/// What only one service may have, with who has it.
#[derive(Default)]
struct Claims<'m> {
    cluster_ips: HashMap<IpAddr, Claim<'m, Option<usize>>>,
    node_ports: HashMap<(u16, Protocol), Claim<'m, Option<usize>>>,
}

/// Who has it, and which of its addresses or ports that is.
type Claim<'m, P> = (&'m Object<Service>, P);

impl<'m> Claims<'m> {
    fn of(&mut self, object: &'m Object<Service>, facts: &ServiceFacts, problems: &mut Problems) {
        for (address, position) in &facts.cluster_ips {
            if let Some((other, position)) = self.cluster_ips.insert(*address, (object, *position)) {
                let mut report = object.reporter(problems);
                let spec = other.at().key("spec");
                let place = match position {
                    Some(position) => spec.key("clusterIPs").item(position),
                    None => spec.key("clusterIP"),
                };
                let help = format!("it is at {}", report.place(place.span()));
                let message = format!("its cluster IP {address} is {}'s too", other.subject());
                report.error(object.at().key("spec").key("clusterIP"), message, help);
            }
        }
        let health = facts.health_check_node_port.map(|number| (number, Protocol::TCP, None));
        let node_ports = facts.ports.iter().filter_map(|port| Some((port.node_port?, port.protocol, Some(port.index))));
        for (number, protocol, index) in health.into_iter().chain(node_ports) {
            if let Some((other, other_index)) = self.node_ports.insert((number, protocol), (object, index)) {
                let at = |object: &'m Object<Service>, index: Option<usize>| match index {
                    Some(index) => object.at().key("spec").key("ports").item(index).key("nodePort"),
                    None => object.at().key("spec").key("healthCheckNodePort"),
                };
                let mut report = object.reporter(problems);
                let help = format!("it is at {}", report.place(at(other, other_index).span()));
                let message = format!("node port {number} ({protocol}) is {}'s too", other.subject());
                report.error(at(object, index), message, help);
            }
        }
    }
}

/// What a service that is served says by itself.
struct ServiceFacts {
    /// Not empty; each with its position in `clusterIPs` if it is from there.
    cluster_ips: Vec<(IpAddr, Option<usize>)>,
    ports: Vec<Port>,
    internal_policy: TrafficPolicy,
    external_policy: TrafficPolicy,
    affinity: Option<u32>,
    health_check_node_port: Option<u16>,
    external_ips: Vec<IpAddr>,
    load_balancer_ips: Vec<IpAddr>,
    source_ranges: Vec<IpNet>,
}

/// `None` where it is not served.
fn service(object: &Object<Service>, problems: &mut Problems) -> Option<ServiceFacts> {
    let mut report = object.reporter(problems);
    let at = object.at().key("spec");
    let Some(spec) = &object.value.spec else {
        let help = "a service without ports serves nothing".to_owned();
        report.error(object.at(), "spec is missing", help);
        return None;
    };
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    one_of(kind, &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"], at.key("type"), "spec.type", &mut report);
    if kind == "ExternalName" {
        return None;
    }
    let ports = ports(spec, kind, at, &mut report);
    let external_policy = policy(spec.external_traffic_policy.as_deref(), at, "externalTrafficPolicy", &mut report);
    let internal_policy = policy(spec.internal_traffic_policy.as_deref(), at, "internalTrafficPolicy", &mut report);
    let affinity = affinity(spec, at, &mut report);
    let health_check_node_port = health_check_node_port(spec, kind, external_policy, at, &mut report);
    let cluster_ips = cluster_ips(spec, at, &mut report);
    let mut external_ips = external_ips(spec, at, &mut report);
    let mut load_balancer_ips = load_balancer_ips(object, &mut report);
    let mut source_ranges = source_ranges(spec, at, &mut report);
    if spec.cluster_ip.as_deref() == Some("None") {
        return None;
    }
    if cluster_ips.is_empty() {
        // Kubernetes allocates one when it accepts the service.
        report.note_on(
            Topic::NoClusterIp,
            object.at().key("metadata").key("name"),
            "it has no cluster IP and is not served",
        );
        return None;
    }
    let families = |is_ipv6: bool| cluster_ips.iter().any(|(address, _)| address.is_ipv6() == is_ipv6);
    external_ips.retain(|ip| families(ip.is_ipv6()));
    load_balancer_ips.retain(|ip| families(ip.is_ipv6()));
    source_ranges.retain(|net| families(net.addr().is_ipv6()));
    Some(ServiceFacts {
        cluster_ips,
        ports,
        internal_policy,
        external_policy,
        affinity,
        health_check_node_port,
        external_ips,
        load_balancer_ips,
        source_ranges,
    })
}

/// A service's ports with the backends that its slices give.
fn service_ports(
    object: &Object<Service>,
    facts: &ServiceFacts,
    slices: &[OfService<'_>],
    node_name: &str,
) -> Box<[Arc<ServicePort>]> {
    let endpoints = |port: &Port| {
        let mut endpoints = Vec::new();
        for (object, slice) in slices {
            for of_slice in slice.ports.iter().filter(|one| *one.name == *port.name && one.protocol == port.protocol) {
                endpoints.extend(
                    slice
                        .endpoints(&object.value)
                        .map(|(address, endpoint)| model_endpoint(address, of_slice.number, endpoint)),
                );
            }
        }
        each_once(&mut endpoints, node_name);
        endpoints
    };
    let service_port = |port: &Port| ServicePort {
        name: if port.name.is_empty() { object.full_name() } else { format!("{}:{}", object.full_name(), port.name) },
        protocol: port.protocol,
        port: port.port,
        cluster_ips: facts.cluster_ips.iter().map(|(address, _)| *address).collect(),
        host_port: None,
        node_port: port.node_port,
        external_ips: facts.external_ips.clone(),
        load_balancer_ips: facts.load_balancer_ips.clone(),
        source_ranges: facts.source_ranges.clone(),
        internal_policy: facts.internal_policy,
        external_policy: facts.external_policy,
        affinity: facts.affinity,
        health_check_node_port: facts.health_check_node_port,
        endpoints: endpoints(port),
        origin: object.origin,
    };
    facts.ports.iter().map(|port| Arc::new(service_port(port))).collect()
}

/// The port where load balancers ask for local backends: only services that keep external traffic local have one.
fn health_check_node_port(
    spec: &ServiceSpec,
    kind: &str,
    external_policy: TrafficPolicy,
    at: At<'_>,
    report: &mut Reporter<'_>,
) -> Option<u16> {
    let given = spec.health_check_node_port.filter(|port| *port != 0)?;
    let at = at.key("healthCheckNodePort");
    let number = port_number(given, at, "spec.healthCheckNodePort", report)?;
    if kind == "LoadBalancer" && external_policy == TrafficPolicy::Local {
        return Some(number);
    }
    let help = "it counts with type: LoadBalancer and externalTrafficPolicy: Local only".to_owned();
    report.warning(at, format_args!("spec.healthCheckNodePort {number} is not answered"), help);
    None
}

struct Port {
    /// Which of the service's ports it is.
    index: usize,
    name: String,
    protocol: Protocol,
    port: u16,
    node_port: Option<u16>,
}

fn ports(spec: &ServiceSpec, kind: &str, at: At<'_>, report: &mut Reporter<'_>) -> Vec<Port> {
    let list: &[KubernetesPort] = &spec.ports;
    let at = at.key("ports");
    if list.is_empty() && spec.cluster_ip.as_deref() != Some("None") {
        report.error(at, "spec.ports is missing", "a service has at least one port".to_owned());
    }
    let mut ports = Vec::new();
    let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
    for (index, port) in list.iter().enumerate() {
        let at = at.item(index);
        let field = format!("spec.ports[{index}]");
        let name = port.name.as_deref().unwrap_or_default().to_owned();
        if name.is_empty() && list.len() > 1 {
            let help = "the ports of a service with several have names".to_owned();
            report.error(at, format_args!("{field}.name is missing"), help);
        } else if !names.insert(name.clone()) {
            report.error(at.key("name"), format_args!("{field}.name: {name:?} is given twice"), None);
        }
        let protocol = protocol(port.protocol.as_deref(), at.key("protocol"), &field, report);
        let number = port_number(port.port, at.key("port"), &format!("{field}.port"), report);
        let node_port = match port.node_port.filter(|port| *port != 0) {
            Some(_) if kind == "ClusterIP" => {
                let help = "write type: NodePort or LoadBalancer, or take it out".to_owned();
                report.error(at.key("nodePort"), format_args!("{field}.nodePort of a service of type {kind}"), help);
                None
            }
            Some(number) => port_number(number, at.key("nodePort"), &format!("{field}.nodePort"), report),
            None => None,
        };
        let (Some(protocol), Some(number)) = (protocol, number) else { continue };
        if !numbers.insert((protocol, number)) {
            report.error(at.key("port"), format_args!("{field}: port {number} ({protocol}) is given twice"), None);
        }
        ports.push(Port { index, name, protocol, port: number, node_port });
    }
    ports
}

fn one_of(value: &str, known: &[&str], at: At<'_>, field: &str, report: &mut Reporter<'_>) -> bool {
    let is_known = known.contains(&value);
    if !is_known {
        let help = match nearest(value, known.iter().copied()) {
            Some(name) => format!("did you mean {name}?"),
            None => format!("it is one of {}", known.join(", ")),
        };
        report.error(at, format_args!("{field}: {value:?} is not known"), help);
    }
    is_known
}

/// TCP, UDP or SCTP; unset is TCP.
pub(super) fn protocol(name: Option<&str>, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<Protocol> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(Protocol::TCP),
        "UDP" => Some(Protocol::UDP),
        "SCTP" => Some(Protocol::SCTP),
        other => {
            one_of(other, &["TCP", "UDP", "SCTP"], at, &format!("{field}.protocol"), report);
            None
        }
    }
}

pub(super) fn port_number(number: i32, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<u16> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    if port.is_none() {
        let help = "a port is a number from 1 to 65535".to_owned();
        report.error(at, format_args!("{field}: {number} is not a port"), help);
    }
    port
}

fn policy(value: Option<&str>, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> TrafficPolicy {
    match value {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            one_of(other, &["Cluster", "Local"], at.key(field), &format!("spec.{field}"), report);
            TrafficPolicy::Cluster
        }
    }
}

fn affinity(spec: &ServiceSpec, at: At<'_>, report: &mut Reporter<'_>) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => None,
        Some("ClientIP") => {
            let Some(given) = spec.affinity_seconds else { return Some(AFFINITY_SECONDS) };
            let seconds = u32::try_from(given).ok().filter(|seconds| (1..=MAX_AFFINITY_SECONDS).contains(seconds));
            if seconds.is_none() {
                let at = at.key("sessionAffinityConfig").key("clientIP").key("timeoutSeconds");
                let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                let help = format!("write 1 to {MAX_AFFINITY_SECONDS}, or leave it out for {AFFINITY_SECONDS}");
                report.error(at, format_args!("{field}: {given} is out of range"), help);
            }
            Some(seconds.unwrap_or(AFFINITY_SECONDS))
        }
        Some(other) => {
            one_of(other, &["None", "ClientIP"], at.key("sessionAffinity"), "spec.sessionAffinity", report);
            None
        }
    }
}

/// The cluster IPs, each with its position in `clusterIPs` if it is from there; none of a headless service.
fn cluster_ips(spec: &ServiceSpec, at: At<'_>, report: &mut Reporter<'_>) -> Vec<(IpAddr, Option<usize>)> {
    let mut addresses: Vec<(IpAddr, Option<usize>)> = Vec::new();
    for (index, text) in spec.cluster_ips.iter().enumerate() {
        let at = at.key("clusterIPs").item(index);
        if &**text != "None" && !text.is_empty() {
            let field = format!("spec.clusterIPs[{index}]");
            let address = report.read(at, &field, parse_ip(text));
            let address = usable(report, at, &field, address);
            addresses.extend(address.map(|address| (address, Some(index))));
        }
    }
    if let Some(text) = spec.cluster_ip.as_ref().filter(|text| !text.is_empty() && &***text != "None") {
        let at = at.key("clusterIP");
        let address = report.read(at, "spec.clusterIP", parse_ip(text));
        // One that is listed too was told of there.
        let address = if addresses.is_empty() { usable(report, at, "spec.clusterIP", address) } else { address };
        match (address, addresses.first()) {
            (Some(address), None) => addresses.push((address, None)),
            (Some(address), Some((listed, _))) if address != *listed => {
                let help = "make it the first of clusterIPs".to_owned();
                report.error(at, format_args!("spec.clusterIP {address} is not spec.clusterIPs[0], {listed}"), help);
            }
            _ => {}
        }
    }
    addresses
}

fn external_ips(spec: &ServiceSpec, at: At<'_>, report: &mut Reporter<'_>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (index, text) in spec.external_ips.iter().enumerate() {
        let at = at.key("externalIPs").item(index);
        let field = format!("spec.externalIPs[{index}]");
        let address = report.read(at, &field, parse_ip(text.trim()));
        addresses.extend(usable(report, at, &field, address));
    }
    addresses
}

fn load_balancer_ips(object: &Object<Service>, report: &mut Reporter<'_>) -> Vec<IpAddr> {
    let at = object.at().key("status").key("loadBalancer").key("ingress");
    let mut addresses = Vec::new();
    for (index, ingress) in object.value.ingress.iter().enumerate() {
        let at = at.item(index);
        let field = format!("status.loadBalancer.ingress[{index}]");
        let mode = ingress.ip_mode.as_deref().unwrap_or("VIP");
        one_of(mode, &["VIP", "Proxy"], at.key("ipMode"), &format!("{field}.ipMode"), report);
        if let Some(text) = ingress.ip.as_ref().filter(|text| !text.is_empty()) {
            let (at, field) = (at.key("ip"), format!("{field}.ip"));
            let address = report.read(at, &field, parse_ip(text));
            let address = usable_on_link(report, at, &field, address);
            addresses.extend(address.filter(|_| mode == "VIP"));
        }
    }
    addresses
}

fn source_ranges(spec: &ServiceSpec, at: At<'_>, report: &mut Reporter<'_>) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for (index, text) in spec.load_balancer_source_ranges.iter().enumerate() {
        let at = at.key("loadBalancerSourceRanges").item(index);
        let field = format!("spec.loadBalancerSourceRanges[{index}]");
        ranges.extend(report.read(at, &field, parse_network(text.trim())));
    }
    ranges
}
