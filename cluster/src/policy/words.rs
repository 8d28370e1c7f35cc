//! Rules and selectors in words.

use std::fmt::Write as _;

use ipnet::IpNet;
use weir_policy::{
    PolicyDirection, Selector,
    model::{Action, EntityMatch, IcmpMatch, Peer, PortMatch, Rule},
};

/// Items of a list that are named; the others are counted.
const NAMED: usize = 8;

/// Labels that every pod has, or inherits, under Calico's names.
const NAMESPACE: &str = "projectcalico.org/namespace";
const ORCHESTRATOR: &str = "projectcalico.org/orchestrator";
const OF_NAMESPACE: &str = "pcns.";
const OF_SERVICE_ACCOUNT: &str = "pcsa.";

/// Rules that one rule of an object became: they differ in protocol and destination ports only. In the order of the list.
pub fn runs(rules: &[Rule]) -> impl Iterator<Item = &[Rule]> {
    let is_one = |a: &Rule, b: &Rule| {
        let rest = |rule: &Rule| {
            let destination = EntityMatch { ports: None, ..rule.destination.clone() };
            Rule { protocol: None, destination, ..rule.clone() }
        };
        a.number == b.number && rest(a) == rest(b)
    };
    rules.chunk_by(move |a, b| is_one(a, b))
}

/// A run of rules, like "allow tcp port 80 from pods of namespaces with name == 'was'". In a profile, Pass denies.
///
/// # Panics
/// Where the run is empty.
pub fn rules_in_words(run: &[Rule], in_profile: bool) -> String {
    let rule = &run[0];
    let mut words = match rule.action {
        Action::Allow => "allow",
        Action::Deny => "deny",
        Action::Pass if in_profile => "deny (pass)",
        Action::Pass => "pass to the next tier",
        Action::Log => "log",
    }
    .to_owned();
    let what: Vec<String> = run.iter().map(packets_in_words).collect();
    let _ = write!(words, " {}", list(&what));
    for part in [entity_in_words("from", &rule.source, true), entity_in_words("to", &rule.destination, false)] {
        words.push_str(&part);
    }
    words
}

/// "tcp port 80", "everything", "IPv4 icmp type 8".
fn packets_in_words(rule: &Rule) -> String {
    let mut parts = Vec::new();
    if let Some(version) = rule.ip_version {
        parts.push(format!("IPv{version}"));
    }
    match (rule.protocol, rule.not_protocol) {
        (Some(protocol), None) => parts.push(protocol.to_string()),
        (Some(protocol), Some(not)) => parts.push(format!("{protocol} and not {not}")),
        (None, Some(not)) => parts.push(format!("every protocol but {not}")),
        (None, None) => {}
    }
    parts.extend(rule.icmp.map(|icmp| icmp_in_words(icmp, rule)));
    if let Some(ports) = &rule.destination.ports {
        parts.push(ports_in_words(ports));
    }
    if parts.is_empty() {
        parts.push("everything".to_owned());
    }
    if let Some(icmp) = rule.not_icmp {
        parts.push(format!("except {}", icmp_in_words(icmp, rule)));
    }
    if !rule.destination.not_ports.is_empty() {
        parts.push(format!("except {}", ports_in_words(&rule.destination.not_ports)));
    }
    parts.join(" ")
}

fn icmp_in_words(icmp: IcmpMatch, rule: &Rule) -> String {
    let name = if rule.protocol.is_some() { "" } else { "icmp " };
    match icmp.code {
        Some(code) => format!("{name}type {} code {code}", icmp.icmp_type),
        None => format!("{name}type {}", icmp.icmp_type),
    }
}

/// "port 80", "ports 80, 8000-8010, web"; an empty list matches none.
fn ports_in_words(ports: &[PortMatch]) -> String {
    match ports {
        [] => "no port".to_owned(),
        [PortMatch::Range(first, last)] if first == last => format!("port {first}"),
        [PortMatch::Named(name)] => format!("port {name}"),
        _ => format!("ports {}", port_names(ports)),
    }
}

fn port_names(ports: &[PortMatch]) -> String {
    let name = |port: &PortMatch| match port {
        PortMatch::Range(first, last) if first == last => first.to_string(),
        PortMatch::Range(first, last) => format!("{first}-{last}"),
        PortMatch::Named(name) => name.clone(),
    };
    list(&ports.iter().map(name).collect::<Vec<_>>())
}

/// " from pods with app == 'x'", or nothing where every address will do. `ports`: those too; a destination's stand with the protocol.
fn entity_in_words(preposition: &str, entity: &EntityMatch, ports: bool) -> String {
    let mut parts = Vec::new();
    if let Some(selector) = &entity.selector {
        parts.push(selector_in_words(selector));
    }
    if !entity.any_of.is_empty() {
        let peers: Vec<String> = entity.any_of.iter().map(peer_in_words).collect();
        parts.push(peers.join(" or "));
    }
    if let Some(nets) = &entity.nets {
        parts.push(if nets.is_empty() { "nowhere".to_owned() } else { nets_in_words(nets) });
    }
    if let Some(endpoints) = &entity.endpoint_ports {
        let names: Vec<String> = endpoints
            .iter()
            .map(|(net, port)| match port {
                Some((protocol, port)) => format!("{} {protocol}/{port}", net_in_words(net)),
                None => net_in_words(net),
            })
            .collect();
        let what = "service endpoints";
        parts.push(if names.is_empty() { format!("no {what}") } else { format!("{what} {}", list(&names)) });
    }
    let mut words = parts.join(" that are in ");
    let mut except = |what: String| {
        let glue = if words.is_empty() { "anywhere but " } else { ", but not " };
        let _ = write!(words, "{glue}{what}");
    };
    if !entity.not_nets.is_empty() {
        except(nets_in_words(&entity.not_nets));
    }
    if let Some(selector) = &entity.not_selector {
        except(selector_in_words(selector));
    }
    if ports {
        let glue = |words: &str| if words.is_empty() { "" } else { ", " };
        if let Some(ports) = &entity.ports {
            words = format!("{words}{}{}", glue(&words), ports_in_words(ports));
        }
        if !entity.not_ports.is_empty() {
            words = format!("{words}{}every port but {}", glue(&words), port_names(&entity.not_ports));
        }
    }
    if words.is_empty() { words } else { format!(" {preposition} {words}") }
}

fn peer_in_words(peer: &Peer) -> String {
    match peer {
        Peer::Selector(selector) => selector_in_words(selector),
        Peer::Block { cidr, except } if except.is_empty() => net_in_words(cidr),
        Peer::Block { cidr, except } => format!("{} but not {}", net_in_words(cidr), nets_in_words(except)),
    }
}

fn nets_in_words(nets: &[IpNet]) -> String {
    list(&nets.iter().map(net_in_words).collect::<Vec<_>>())
}

/// A whole address without its prefix.
fn net_in_words(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

fn list(items: &[String]) -> String {
    let named = items[..items.len().min(NAMED)].join(", ");
    match items.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Who is selected: "pods with app == 'x' of namespaces with team == 'a'".
pub fn selector_in_words(selector: &Selector) -> String {
    let mut parts = Vec::new();
    flatten(selector, &mut parts);
    let mut noun = "endpoints";
    let mut place = None;
    let (mut own, mut namespaces, mut accounts) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts {
        match part {
            Selector::Equals(label, value) if label == ORCHESTRATOR && value == "k8s" => noun = "pods",
            Selector::Equals(label, value) if label == NAMESPACE => place = Some(format!(" of namespace {value}")),
            Selector::Has(label) if label == NAMESPACE => {
                place.get_or_insert_with(|| " of any namespace".to_owned());
            }
            Selector::Not(not) if **not == Selector::Has(NAMESPACE.to_owned()) => {
                place = Some(" outside of every namespace".to_owned());
            }
            part if all_begin_with(part, OF_NAMESPACE) => namespaces.push(stripped(part, OF_NAMESPACE)),
            part if all_begin_with(part, OF_SERVICE_ACCOUNT) => accounts.push(stripped(part, OF_SERVICE_ACCOUNT)),
            part => own.push(part.clone()),
        }
    }
    let mut words = match own.is_empty() && namespaces.is_empty() && accounts.is_empty() && place.is_none() {
        true => format!("all {noun}"),
        false => noun.to_owned(),
    };
    let and = |parts: &[Selector]| parts.iter().map(Selector::to_string).collect::<Vec<_>>().join(" && ");
    if !own.is_empty() {
        let _ = write!(words, " with {}", and(&own));
    }
    if !accounts.is_empty() {
        let _ = write!(words, " of service accounts with {}", and(&accounts));
    }
    match (place, namespaces.is_empty()) {
        (Some(place), true) => words.push_str(&place),
        (Some(place), false) if place != " of any namespace" => {
            let _ = write!(words, "{place} with {}", and(&namespaces));
        }
        (_, false) => drop(write!(words, " of namespaces with {}", and(&namespaces))),
        (None, true) => {}
    }
    words
}

/// The parts that all must hold.
fn flatten<'s>(selector: &'s Selector, parts: &mut Vec<&'s Selector>) {
    match selector {
        Selector::All | Selector::Global => {}
        Selector::And(all) => all.iter().for_each(|part| flatten(part, parts)),
        other => parts.push(other),
    }
}

/// Whether it is about labels with this prefix only.
fn all_begin_with(selector: &Selector, prefix: &str) -> bool {
    match selector {
        Selector::All | Selector::Global => false,
        Selector::Equals(label, _)
        | Selector::NotEquals(label, _)
        | Selector::In(label, _)
        | Selector::NotIn(label, _)
        | Selector::Has(label)
        | Selector::Contains(label, _)
        | Selector::StartsWith(label, _)
        | Selector::EndsWith(label, _) => label.starts_with(prefix),
        Selector::And(parts) | Selector::Or(parts) => {
            !parts.is_empty() && parts.iter().all(|part| all_begin_with(part, prefix))
        }
        Selector::Not(part) => all_begin_with(part, prefix),
    }
}

/// The same about labels without the prefix.
fn stripped(selector: &Selector, prefix: &str) -> Selector {
    let label = |label: &str| label.strip_prefix(prefix).unwrap_or(label).to_owned();
    let parts = |parts: &[Selector]| parts.iter().map(|part| stripped(part, prefix)).collect();
    match selector {
        Selector::All | Selector::Global => selector.clone(),
        Selector::Equals(name, value) => Selector::Equals(label(name), value.clone()),
        Selector::NotEquals(name, value) => Selector::NotEquals(label(name), value.clone()),
        Selector::In(name, values) => Selector::In(label(name), values.clone()),
        Selector::NotIn(name, values) => Selector::NotIn(label(name), values.clone()),
        Selector::Has(name) => Selector::Has(label(name)),
        Selector::Contains(name, text) => Selector::Contains(label(name), text.clone()),
        Selector::StartsWith(name, text) => Selector::StartsWith(label(name), text.clone()),
        Selector::EndsWith(name, text) => Selector::EndsWith(label(name), text.clone()),
        Selector::And(all) => Selector::And(parts(all)),
        Selector::Or(any) => Selector::Or(parts(any)),
        Selector::Not(part) => Selector::Not(Box::new(stripped(part, prefix))),
    }
}

/// "what arrives" or "what it sends".
pub fn direction_in_words(direction: PolicyDirection) -> &'static str {
    match direction {
        PolicyDirection::Ingress => "what arrives",
        PolicyDirection::Egress => "what it sends",
    }
}

#[cfg(test)]
mod tests {
    use weir_packet::Protocol;

    use super::*;

    fn select(text: &str) -> Selector {
        Selector::parse(text).unwrap()
    }

    #[test]
    fn selectors_tell_whom_they_pick() {
        let pods = "projectcalico.org/orchestrator == 'k8s'";
        let own = "projectcalico.org/namespace == 'shop'";
        let any = "has(projectcalico.org/namespace)";
        for (text, words) in [
            (String::new(), "all endpoints"),
            (pods.to_owned(), "all pods"),
            (format!("{own} && {pods}"), "pods of namespace shop"),
            (format!("{own} && {pods} && app == 'x' && !has(y)"), "pods with app == 'x' && !has(y) of namespace shop"),
            (format!("{any} && {pods}"), "pods of any namespace"),
            (
                format!("{any} && {pods} && pcns.team in {{'a', 'b'}} && app == 'x'"),
                "pods with app == 'x' of namespaces with team in {'a', 'b'}",
            ),
            (
                "pcsa.role == 'db' || pcsa.role == 'api'".to_owned(),
                "endpoints of service accounts with role == 'db' || role == 'api'",
            ),
            ("pcns.team == 'a' || app == 'x'".to_owned(), "endpoints with pcns.team == 'a' || app == 'x'"),
            (
                "!has(projectcalico.org/namespace) && role == 'gate'".to_owned(),
                "endpoints with role == 'gate' outside of every namespace",
            ),
        ] {
            assert_eq!(selector_in_words(&select(&text)), words, "{text}");
        }
    }

    #[test]
    fn rules_tell_what_they_do() {
        let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
        let any_of = vec![
            Peer::Selector(select("app == 'x'")),
            Peer::Block { cidr: "10.0.0.0/8".parse().unwrap(), except: nets(&["10.1.0.0/16", "10.2.0.1/32"]) },
        ];
        let ports = vec![PortMatch::Range(80, 80), PortMatch::Range(8000, 8010), PortMatch::Named("web".into())];
        let to = |destination: EntityMatch| Rule { destination, ..Rule::default() };
        let from = |source: EntityMatch| Rule { source, ..Rule::default() };
        let icmp = Some(IcmpMatch { icmp_type: 8, code: None });
        let many: Vec<IpNet> = (0..10).map(|n| format!("10.{n}.0.0/16").parse().unwrap()).collect();
        for (rule, words) in [
            (Rule::default(), "allow everything"),
            (Rule { action: Action::Deny, protocol: Some(Protocol::UDP), ..Rule::default() }, "deny udp"),
            (
                Rule {
                    action: Action::Pass,
                    ip_version: Some(6),
                    not_protocol: Some(Protocol::TCP),
                    ..Rule::default()
                },
                "pass to the next tier IPv6 every protocol but tcp",
            ),
            (Rule { protocol: Some(Protocol::ICMP), icmp, ..Rule::default() }, "allow icmp type 8"),
            (
                Rule { not_icmp: Some(IcmpMatch { icmp_type: 3, code: Some(4) }), ..Rule::default() },
                "allow everything except icmp type 3 code 4",
            ),
            (
                from(EntityMatch { any_of, ..EntityMatch::default() }),
                "allow everything from endpoints with app == 'x' or 10.0.0.0/8 but not 10.1.0.0/16, 10.2.0.1",
            ),
            (
                Rule {
                    protocol: Some(Protocol::TCP),
                    ..to(EntityMatch { ports: Some(ports.clone()), ..EntityMatch::default() })
                },
                "allow tcp ports 80, 8000-8010, web",
            ),
            (
                Rule {
                    action: Action::Log,
                    ..from(EntityMatch { not_ports: ports[..1].to_vec(), ..EntityMatch::default() })
                },
                "log everything from every port but 80",
            ),
            (
                to(EntityMatch {
                    nets: Some(many),
                    not_selector: Some(select("app == 'y'")),
                    ..EntityMatch::default()
                }),
                "allow everything to 10.0.0.0/16, 10.1.0.0/16, 10.2.0.0/16, 10.3.0.0/16, 10.4.0.0/16, 10.5.0.0/16, 10.6.0.0/16, \
                 10.7.0.0/16 and 2 more, but not endpoints with app == 'y'",
            ),
            (
                to(EntityMatch { not_nets: nets(&["192.0.2.0/24"]), ..EntityMatch::default() }),
                "allow everything to anywhere but 192.0.2.0/24",
            ),
            (
                to(EntityMatch {
                    endpoint_ports: Some(vec![("10.1.1.1/32".parse().unwrap(), Some((Protocol::TCP, 80)))]),
                    ..EntityMatch::default()
                }),
                "allow everything to service endpoints 10.1.1.1 tcp/80",
            ),
            (to(EntityMatch { nets: Some(Vec::new()), ..EntityMatch::default() }), "allow everything to nowhere"),
        ] {
            assert_eq!(rules_in_words(&[rule], false), words);
        }
    }

    #[test]
    fn rules_of_one_number_that_differ_in_ports_only_are_one() {
        let port = |number, protocol, port| Rule {
            number,
            protocol: Some(protocol),
            destination: EntityMatch { ports: Some(vec![PortMatch::Range(port, port)]), ..EntityMatch::default() },
            ..Rule::default()
        };
        let rules = [port(1, Protocol::UDP, 53), port(1, Protocol::TCP, 53), port(2, Protocol::TCP, 53)];
        let words: Vec<String> = runs(&rules).map(|run| rules_in_words(run, false)).collect();
        assert_eq!(words, ["allow udp port 53, tcp port 53", "allow tcp port 53"]);
    }
}
