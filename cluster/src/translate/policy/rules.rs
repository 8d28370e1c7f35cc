//! Calico's rules, one by one.

use ipnet::IpNet;
use weir_packet::Protocol;
use weir_policy::{
    PolicyDirection, Selector,
    model::{self, EntityMatch, IcmpMatch, PortMatch},
};

use super::{
    labels::{NAMESPACE_PREFIX, SERVICE_ACCOUNT_LABEL, SERVICE_ACCOUNT_PREFIX},
    selectors::{expression, in_namespace, inherited, namespaces},
    services::ServiceEndpoints,
};
use crate::{
    resources::{
        at::{At, Reporter},
        calico::policy::{Action, EntityRule, Icmp, Rule, ServiceMatch},
        meta::IntOrString,
    },
    text::address::{AddressError, parse_ip, parse_network},
};

/// What reading a rule takes besides the rule.
#[derive(Clone, Copy)]
pub(super) struct RuleReader<'a> {
    /// The namespace of the policy, if it has one.
    pub(super) namespace: Option<&'a str>,
    /// What rules that name services stand for.
    pub(super) services: &'a ServiceEndpoints<'a>,
}

/// The rules of one direction of a policy or profile, whose spec is at `spec_at`.
pub(super) fn rules(
    rules: &[Rule],
    direction: PolicyDirection,
    reader: RuleReader<'_>,
    spec_at: At<'_>,
    report: &mut Reporter<'_>,
) -> Vec<model::Rule> {
    let list = direction.name();
    let read = rules.iter().enumerate().map(|(index, rule)| {
        let at = spec_at.key(list).item(index);
        reader.rule(rule, index, direction, at, &format!("spec.{list}[{index}]"), report)
    });
    read.collect()
}

impl RuleReader<'_> {
    fn rule(
        self,
        rule: &Rule,
        index: usize,
        direction: PolicyDirection,
        at: At<'_>,
        field: &str,
        report: &mut Reporter<'_>,
    ) -> model::Rule {
        if rule.http.is_some() {
            let help = "match on protocol and ports, or keep a proxy in front of the workload".to_owned();
            let why = "HTTP requests are seen by a proxy only, and weir is none";
            report.error(at.name_of("http"), format_args!("{field}.http: {why}"), help);
        }
        if let Some(version) = rule.ip_version.filter(|version| ![4, 6].contains(version)) {
            let message = format_args!("{field}.ipVersion: {version} is no IP version");
            report.error(at.key("ipVersion"), message, "write 4 or 6".to_owned());
        }
        let mut protocol = |value: &Option<IntOrString>, key: &str| {
            value.as_ref().and_then(|value| self::protocol(value, at.key(key), &format!("{field}.{key}"), report))
        };
        let given = protocol(&rule.protocol, "protocol");
        let not_protocol = protocol(&rule.not_protocol, "notProtocol");
        let mut icmp = |value: &Option<Icmp>, key: &str| match value {
            Some(Icmp { icmp_type: Some(icmp_type), code }) => Some(IcmpMatch { icmp_type: *icmp_type, code: *code }),
            Some(Icmp { icmp_type: None, code: Some(_) }) => {
                let help = "a code means something with its type only: write type".to_owned();
                report.error(at.key(key).key("code"), format_args!("{field}.{key}.code stands without type"), help);
                None
            }
            Some(Icmp { icmp_type: None, code: None }) | None => None,
        };
        let (icmp, not_icmp) = (icmp(&rule.icmp, "icmp"), icmp(&rule.not_icmp, "notICMP"));
        contradictions(rule, given, not_protocol, at, field, report);
        let mut side = |entity: &EntityRule, key: &str, services_have_ports: Option<bool>| {
            let side = Side { reader: self, entity, at: at.key(key), field: format!("{field}.{key}"), protocol: given };
            side.read(services_have_ports, report)
        };
        // Services stand for the remote side: whom a workload answers by address, whom it asks also by port.
        let (source, destination) = match direction {
            PolicyDirection::Ingress => {
                (side(&rule.source, "source", Some(false)), side(&rule.destination, "destination", None))
            }
            PolicyDirection::Egress => {
                (side(&rule.source, "source", None), side(&rule.destination, "destination", Some(true)))
            }
        };
        model::Rule {
            number: index as u32 + 1,
            action: match rule.action {
                Action::Allow => model::Action::Allow,
                Action::Deny => model::Action::Deny,
                Action::Log => model::Action::Log,
                Action::Pass => model::Action::Pass,
            },
            ip_version: rule.ip_version,
            protocol: given,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
        }
    }
}

/// Parts of a rule that cannot hold together, which Calico's API refuses: what the rule was meant for is not known.
fn contradictions(
    rule: &Rule,
    protocol: Option<Protocol>,
    not_protocol: Option<Protocol>,
    at: At<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) {
    for (key, is_given) in [("icmp", rule.icmp.is_some()), ("notICMP", rule.not_icmp.is_some())] {
        if let Some(other) = protocol.filter(|protocol| is_given && !protocol.is_icmp()) {
            let help = "write protocol: ICMP or ICMPv6, or leave it out".to_owned();
            report.error(at.name_of(key), format_args!("{field}.{key} stands beside the protocol {other}"), help);
        }
    }
    for (key, protocol) in [("protocol", protocol), ("notProtocol", not_protocol)] {
        let of_version = match protocol {
            Some(Protocol::ICMP) => 4,
            Some(Protocol::ICMPV6) => 6,
            _ => continue,
        };
        if rule.ip_version.is_some_and(|version| version != of_version) {
            let help = format!("write ipVersion: {of_version}, or leave it out");
            let message = format_args!("{field}.{key} is of IPv{of_version}, and ipVersion is not");
            report.error(at.key("ipVersion"), message, help);
        }
    }
    // The family that the rule is for, where it says one.
    let family = rule.ip_version.or(match protocol {
        Some(Protocol::ICMP) => Some(4),
        Some(Protocol::ICMPV6) => Some(6),
        _ => None,
    });
    for (side, entity) in [("source", &rule.source), ("destination", &rule.destination)] {
        for (key, nets) in [("nets", &entity.nets), ("notNets", &entity.not_nets)] {
            let read = nets.iter().enumerate().filter_map(|(index, text)| Some((index, any_network(text).ok()?)));
            for (index, net) in read {
                let at = at.key(side).key(key).item(index);
                let field = format!("{field}.{side}.{key}[{index}]");
                let version = if net.addr().is_ipv4() { 4 } else { 6 };
                if let Some(family) = family.filter(|family| *family != version && [4, 6].contains(family)) {
                    let help = "make a rule for each family".to_owned();
                    report.error(at, format_args!("{field}: {net} in a rule for IPv{family}"), help);
                }
                if key == "notNets" && net.prefix_len() == 0 {
                    let help = "take it out, or the rule".to_owned();
                    report.error(
                        at,
                        format_args!("{field}: {net} leaves no address, so the rule matches nothing"),
                        help,
                    );
                }
            }
        }
    }
}

/// A rule's source or destination, about to be read.
struct Side<'a, 't> {
    reader: RuleReader<'a>,
    entity: &'a EntityRule,
    at: At<'t>,
    field: String,
    /// The rule's protocol.
    protocol: Option<Protocol>,
}

impl Side<'_, '_> {
    /// `services_have_ports`: `None` where no service may stand.
    fn read(&self, services_have_ports: Option<bool>, report: &mut Reporter<'_>) -> EntityMatch {
        let entity = self.entity;
        let nets = self.nets(&entity.nets, "nets", report);
        EntityMatch {
            nets: (!entity.nets.is_empty()).then_some(nets),
            not_nets: self.nets(&entity.not_nets, "notNets", report),
            selector: self.selector(report),
            not_selector: self
                .given(&entity.not_selector, "notSelector")
                .map(|(text, at, field)| expression(text, at, &field, report)),
            ports: self.ports(&entity.ports, "ports", report),
            not_ports: self.ports(&entity.not_ports, "notPorts", report).unwrap_or_default(),
            any_of: Vec::new(),
            endpoint_ports: entity.services.as_ref().map(|service| self.services(service, services_have_ports, report)),
        }
    }

    /// A text that is given: an empty one is not.
    fn given<'s>(&'s self, text: &'s Option<String>, key: &'static str) -> Option<(&'s str, At<'s>, String)> {
        let text = text.as_deref().filter(|text| !text.is_empty())?;
        Some((text, self.at.key(key), format!("{}.{key}", self.field)))
    }

    fn nets(&self, texts: &[String], key: &str, report: &mut Reporter<'_>) -> Vec<IpNet> {
        let read = texts.iter().enumerate().filter_map(|(index, text)| {
            network(text, self.at.key(key).item(index), &format!("{}.{key}[{index}]", self.field), report)
        });
        read.collect()
    }

    /// The selector with its limits: as soon as a namespaced policy selects by anything, it selects in its own namespace
    /// unless it names namespaces.
    fn selector(&self, report: &mut Reporter<'_>) -> Option<Selector> {
        let entity = self.entity;
        let mut parts = Vec::new();
        if let Some((text, at, field)) = self.given(&entity.selector, "selector") {
            parts.push(expression(text, at, &field, report));
        }
        if let Some(accounts) = &entity.service_accounts {
            let at = self.at.key("serviceAccounts");
            if !accounts.names.is_empty() {
                let names = accounts.names.iter().cloned().collect();
                parts.push(Selector::In(SERVICE_ACCOUNT_LABEL.to_owned(), names));
            }
            if let Some(text) = accounts.selector.as_deref().filter(|text| !text.is_empty()) {
                let field = format!("{}.serviceAccounts.selector", self.field);
                let at = at.key("selector");
                parts.push(inherited(text, SERVICE_ACCOUNT_PREFIX, SERVICE_ACCOUNT_LABEL, at, &field, report));
            }
        }
        let selects = !parts.is_empty();
        if let Some((text, at, field)) = self.given(&entity.namespace_selector, "namespaceSelector") {
            parts.push(namespaces(text, NAMESPACE_PREFIX, at, &field, report));
        } else if let Some(namespace) = self.reader.namespace
            && (selects || entity.not_selector.as_ref().is_some_and(|text| !text.is_empty()))
        {
            parts.push(in_namespace(namespace));
        }
        // One that selects everything still wants a known thing.
        (!parts.is_empty()).then(|| Selector::all_of(parts))
    }

    fn ports(&self, ports: &[IntOrString], key: &str, report: &mut Reporter<'_>) -> Option<Vec<PortMatch>> {
        let at = self.at.key(key);
        let mut read = Vec::new();
        for (index, port) in ports.iter().enumerate() {
            match port_match(port) {
                Ok(port) => read.push(port),
                Err(message) => {
                    let help = "write a number, a range like \"8000:8080\", or a port's name".to_owned();
                    report.error(at.item(index), format_args!("{}.{key}[{index}]: {message}", self.field), help);
                }
            }
        }
        let has_ports = match self.protocol {
            Some(protocol) => protocol.has_ports(),
            // A name brings its protocol along.
            None => read.iter().all(|port| matches!(port, PortMatch::Named(_))),
        };
        if !(ports.is_empty() || has_ports) {
            let help = "write protocol: TCP, UDP or SCTP".to_owned();
            report.error(at, format_args!("{}.{key}: only TCP, UDP and SCTP have ports", self.field), help);
        }
        (!ports.is_empty()).then_some(read)
    }

    fn services(
        &self,
        service: &ServiceMatch,
        with_ports: Option<bool>,
        report: &mut Reporter<'_>,
    ) -> Vec<model::ServiceEndpoint> {
        let (at, field) = (self.at.key("services"), format!("{}.services", self.field));
        let Some(with_ports) = with_ports else {
            let help = "a service is the source of an ingress rule or the destination of an egress rule".to_owned();
            report.error(at, format_args!("{field} cannot stand on this side"), help);
            return Vec::new();
        };
        if !(self.entity.ports.is_empty() && self.entity.not_ports.is_empty()) {
            let help = "a service has its own ports: leave ports and notPorts out".to_owned();
            report.error(at, format_args!("{field} stands beside ports"), help);
        }
        let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let entity = self.entity;
        let beside = [
            ("nets", !entity.nets.is_empty()),
            ("notNets", !entity.not_nets.is_empty()),
            ("selector", given(&entity.selector)),
            ("notSelector", given(&entity.not_selector)),
            ("namespaceSelector", given(&entity.namespace_selector)),
            ("serviceAccounts", entity.service_accounts.is_some()),
        ];
        for (key, _) in beside.iter().filter(|(_, is_given)| *is_given) {
            let help = format!("a service has its own endpoints: leave {key} out, or make two rules");
            report.error(at, format_args!("{field} stands beside {key}"), help);
        }
        let namespace = service.namespace.as_deref().filter(|name| !name.is_empty()).or(self.reader.namespace);
        match namespace {
            Some(namespace) => self.reader.services.of(namespace, &service.name, with_ports),
            None => {
                let help = "write the service's namespace".to_owned();
                report.error(at, format_args!("{field}.namespace is missing"), help);
                Vec::new()
            }
        }
    }
}

/// A CIDR, whose host bits do not matter, or a single address.
pub(super) fn network(text: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<IpNet> {
    report.read(at, field, any_network(text))
}

fn any_network(text: &str) -> Result<IpNet, AddressError> {
    parse_network(text).or_else(|error| parse_ip(text).map(IpNet::from).map_err(|_| error))
}

/// A protocol by its name or number.
pub(super) fn protocol(value: &IntOrString, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Option<Protocol> {
    let protocol = match value {
        IntOrString::Int(number) => u8::try_from(*number).ok().map(Protocol),
        IntOrString::String(name) => Protocol::from_name(name),
    };
    if protocol.is_none() {
        let help = "write TCP, UDP, SCTP, ICMP, ICMPv6, UDPLite, or a number up to 255".to_owned();
        report.error(at, format_args!("{field} is not known"), help);
    }
    protocol
}

fn port_match(port: &IntOrString) -> Result<PortMatch, String> {
    let number = |text: &str| match text.parse::<u16>() {
        Ok(0) | Err(_) => Err(format!("{text:?} is not a port from 1 to 65535")),
        Ok(port) => Ok(port),
    };
    let text = match port {
        IntOrString::Int(port) => return number(&port.to_string()).map(|port| PortMatch::Range(port, port)),
        IntOrString::String(text) => text,
    };
    if let Some((first, last)) = text.split_once(':') {
        let (first, last) = (number(first)?, number(last)?);
        return if first <= last {
            Ok(PortMatch::Range(first, last))
        } else {
            Err(format!("{text:?} ends before it begins"))
        };
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return number(text).map(|port| PortMatch::Range(port, port));
    }
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if text.len() <= 128 && text.bytes().all(known) {
        Ok(PortMatch::Named(text.clone()))
    } else {
        Err(format!("{text:?} cannot be a port's name"))
    }
}
