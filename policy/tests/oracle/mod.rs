//! Policy as the rules say it, one rule after another: the dull twin of the classifier.
//!
//! It reads only the model, and finds everything by scanning. Numbers in comments are those of the policy rules.

use std::net::IpAddr;

use ipnet::IpNet;
use weir_packet::Protocol;
use weir_policy::{PolicyDirection, model::*};

/// What rules see of a packet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: Protocol,
    pub source_port: u16,
    pub destination_port: u16,
}

impl Packet {
    fn has_ports(&self) -> bool {
        [6, 17, 132].contains(&self.protocol.0)
    }

    /// ICMP type and code; requests and replies with an identifier have the code above their type.
    fn icmp(&self) -> Option<(u8, u8)> {
        let [code, kind] = self.destination_port.to_be_bytes();
        let has_identifier = match self.protocol.0 {
            1 => [0, 8, 13, 14, 15, 16, 17, 18].contains(&kind),
            58 => [128, 129].contains(&kind),
            _ => return None,
        };
        Some((kind, if has_identifier { code } else { self.source_port as u8 }))
    }
}

/// What policy says of a packet.
#[derive(Debug, PartialEq)]
pub struct Judged {
    /// Whether it may go, and the name of what decided; `None`: what comes next goes on.
    pub decided: Option<(bool, String)>,
    /// The names of the Log rules that came before it and matched; the first four.
    pub logged: Vec<String>,
}

/// What an endpoint's policy for packets of this kind says. All of a workload's packets are local.
pub fn judge(
    model: &Model,
    endpoint: &Endpoint,
    stage: HostStage,
    direction: PolicyDirection,
    packet: &Packet,
) -> Judged {
    let mut logged = Vec::new();
    // 27: before connections and services, no match continues, a tier's end denies nothing, and before DNAT there is ingress only.
    // 28: what is forwarded has no profiles.
    let (scopes, ends_deny): (&[PolicyScope], _) = match (stage, direction) {
        (HostStage::Untracked, _) => (&[PolicyScope::Untracked], false),
        (HostStage::PreDnat, PolicyDirection::Ingress) => (&[PolicyScope::PreDnat], false),
        (HostStage::PreDnat, PolicyDirection::Egress) => (&[], false),
        (HostStage::Forwarded, _) => (&[PolicyScope::ApplyOnForward], true),
        (HostStage::Local, _) => (&[PolicyScope::Normal, PolicyScope::ApplyOnForward], true),
    };
    let mut decided = tiers(model, endpoint, scopes, ends_deny, direction, packet, &mut logged);
    if stage == HostStage::Local {
        decided = decided.or_else(|| Some(profiles(model, endpoint, direction, packet, &mut logged)));
    }
    logged.truncate(4);
    Judged { decided, logged }
}

/// What the policies of these scopes decide, if they do.
fn tiers(
    model: &Model,
    endpoint: &Endpoint,
    scopes: &[PolicyScope],
    ends_deny: bool,
    direction: PolicyDirection,
    packet: &Packet,
    logged: &mut Vec<String>,
) -> Option<(bool, String)> {
    // 15: by order, unset last, ties by name.
    let mut tiers: Vec<&Tier> = model.tiers.iter().collect();
    tiers.sort_by(|a, b| compare((a.order, &a.name), (b.order, &b.name)));
    tiers.sort_by_key(|tier| tier.undefined);
    'tiers: for tier in tiers {
        // 16, 20, 21: policies that apply in this direction and enforce something, in order.
        let mut policies: Vec<(&Policy, &Vec<Rule>)> = tier
            .policies
            .iter()
            .map(|policy| &**policy)
            .filter(|policy| !policy.staged && policy.selector.matches(&endpoint.labels))
            .filter(|policy| scopes.contains(&policy.scope))
            .filter_map(|policy| Some((policy, rules(&policy.ingress, &policy.egress, direction)?)))
            .collect();
        policies.sort_by(|(a, _), (b, _)| compare((a.order, &a.sort_name), (b.order, &b.sort_name)));
        for (policy, rules) in &policies {
            for rule in rules.iter().filter(|rule| matches(model, rule, packet)) {
                let name = format!("{} rule {}", policy.name, rule.number);
                // 17.
                match rule.action {
                    Action::Allow => return Some((true, name)),
                    Action::Deny => return Some((false, name)),
                    Action::Pass => continue 'tiers,
                    Action::Log => logged.push(name),
                }
            }
        }
        // 18.
        if ends_deny && !policies.is_empty() && tier.default_action == TierAction::Deny {
            let names: Vec<&str> = policies.iter().map(|(policy, _)| policy.name.as_str()).collect();
            let more = if names.len() > 8 { format!(" and {} more", names.len() - 8) } else { String::new() };
            return Some((false, format!("default-deny {}{more}", names[..names.len().min(8)].join(", "))));
        }
    }
    None
}

/// 19: what the endpoint's profiles decide.
fn profiles(
    model: &Model,
    endpoint: &Endpoint,
    direction: PolicyDirection,
    packet: &Packet,
    logged: &mut Vec<String>,
) -> (bool, String) {
    for name in &endpoint.profiles {
        let Some(profile) = model.profiles.iter().find(|profile| profile.name == *name) else { continue };
        let (ingress, egress) = (Some(profile.ingress.clone()), Some(profile.egress.clone()));
        let rules = rules(&ingress, &egress, direction).unwrap();
        for rule in rules.iter().filter(|rule| matches(model, rule, packet)) {
            let number = if rules.len() > 1 { format!(" rule {}", rule.number) } else { String::new() };
            let name = format!("profile {name}{number}");
            match rule.action {
                Action::Log => logged.push(name),
                action => return (action == Action::Allow, name),
            }
        }
    }
    (false, "default-deny without a matching profile".to_owned())
}

fn compare(a: (Option<f64>, &String), b: (Option<f64>, &String)) -> std::cmp::Ordering {
    let order = |order: Option<f64>| order.unwrap_or(f64::INFINITY);
    order(a.0).partial_cmp(&order(b.0)).unwrap().then_with(|| a.1.as_bytes().cmp(b.1.as_bytes()))
}

fn rules<'list>(
    ingress: &'list Option<Vec<Rule>>,
    egress: &'list Option<Vec<Rule>>,
    direction: PolicyDirection,
) -> Option<&'list Vec<Rule>> {
    match direction {
        PolicyDirection::Ingress => ingress.as_ref(),
        PolicyDirection::Egress => egress.as_ref(),
    }
}

/// 22: every field present matches.
pub fn matches(model: &Model, rule: &Rule, packet: &Packet) -> bool {
    let icmp = |wanted: IcmpMatch| {
        packet
            .icmp()
            .is_some_and(|(kind, code)| kind == wanted.icmp_type && wanted.code.is_none_or(|want| want == code))
    };
    rule.ip_version.is_none_or(|version| version == if packet.source.is_ipv4() { 4 } else { 6 })
        && rule.protocol.is_none_or(|protocol| protocol == packet.protocol)
        && rule.not_protocol.is_none_or(|protocol| protocol != packet.protocol)
        && rule.icmp.is_none_or(icmp)
        && !rule.not_icmp.is_some_and(icmp)
        && side(model, &rule.source, packet, packet.source, packet.source_port)
        && side(model, &rule.destination, packet, packet.destination, packet.destination_port)
}

fn side(model: &Model, entity: &EntityMatch, packet: &Packet, address: IpAddr, port: u16) -> bool {
    let of_family = |nets: &[IpNet]| nets.iter().any(|net| net.addr().is_ipv4() == address.is_ipv4());
    let known = |test: &dyn Fn(&Endpoint) -> bool| {
        model.endpoints.iter().any(|endpoint| endpoint.nets.iter().any(|net| net.contains(&address)) && test(endpoint))
    };
    // 22, 23.
    if let Some(nets) = &entity.nets
        && !nets.iter().any(|net| net.contains(&address))
    {
        return false;
    }
    if !entity.not_nets.is_empty()
        && (!of_family(&entity.not_nets) || entity.not_nets.iter().any(|net| net.contains(&address)))
    {
        return false;
    }
    // 25.
    let excluded =
        |endpoint: &Endpoint| entity.not_selector.as_ref().is_some_and(|selector| selector.matches(&endpoint.labels));
    let selected = match &entity.selector {
        Some(selector) => known(&|endpoint| selector.matches(&endpoint.labels) && !excluded(endpoint)),
        None => !known(&|endpoint| excluded(endpoint)),
    };
    // 5, 6.
    let peer = |peer: &Peer| match peer {
        Peer::Selector(selector) => known(&|endpoint| selector.matches(&endpoint.labels)),
        Peer::Block { cidr, except } => cidr.contains(&address) && !except.iter().any(|net| net.contains(&address)),
    };
    // 7, 8, 24.
    let port_is = |wanted: &PortMatch| {
        packet.has_ports()
            && match wanted {
                PortMatch::Range(low, high) => (*low..=*high).contains(&port),
                PortMatch::Named(name) => known(&|endpoint| {
                    endpoint.kind != EndpointKind::NetworkSet
                        && endpoint
                            .ports
                            .iter()
                            .any(|own| own.name == *name && own.protocol == packet.protocol && own.port == port)
                }),
            }
    };
    // 26.
    let service = |(net, point): &(IpNet, Option<(Protocol, u16)>)| {
        net.contains(&address)
            && point
                .is_none_or(|(protocol, wanted)| packet.has_ports() && protocol == packet.protocol && wanted == port)
    };
    selected
        && (entity.any_of.is_empty() || entity.any_of.iter().any(peer))
        && entity.ports.as_ref().is_none_or(|ports| ports.iter().any(port_is))
        && !entity.not_ports.iter().any(port_is)
        && entity.endpoint_ports.as_ref().is_none_or(|services| services.iter().any(service))
}
