//! Listings as text, with a column for hits where a router tells them.

use std::{fmt::Write as _, net::IpAddr};

use weir_cluster::policy::{
    listing::{Counted, HostListing, Listed, ListedPolicy, Listing, Overview, Side},
    words,
};
use weir_policy::PolicyDirection;

/// The overview for a person.
pub fn overview_text(overview: &Overview) -> String {
    let counted = |counted: &Counted| {
        let mut words = match counted.policies {
            0 => "profiles only".to_owned(),
            1 => "1 policy".to_owned(),
            many => format!("{many} policies"),
        };
        if counted.staged > 0 {
            let _ = write!(words, " + {} staged", counted.staged);
        }
        match counted.shared_by {
            0 | 1 => words,
            many => format!("{words}, shared by {many}"),
        }
    };
    let rows: Vec<[String; 4]> = overview
        .endpoints
        .iter()
        .map(|line| [line.endpoint.clone(), addresses(&line.addresses), counted(&line.ingress), counted(&line.egress)])
        .collect();
    let header = ["ENDPOINT", "ADDRESS", "INGRESS", "EGRESS"].map(str::to_owned);
    let width = |column: usize| rows.iter().chain([&header]).map(|row| row[column].len()).max().unwrap_or(0);
    let [a, b, c] = [width(0), width(1), width(2)];
    let mut text = String::new();
    for [endpoint, address, ingress, egress] in [&header].into_iter().chain(&rows) {
        let _ = writeln!(text, "{endpoint:<a$}  {address:<b$}  {ingress:<c$}  {egress}");
    }
    let Overview { endpoints, host_endpoints, ingress_programs, egress_programs } = overview;
    let _ = writeln!(
        text,
        "\n{} endpoints of this node share {ingress_programs} programs for ingress and {egress_programs} for egress.",
        endpoints.len(),
    );
    if !host_endpoints.is_empty() {
        let _ = writeln!(text, "Its host endpoints: {}.", host_endpoints.join(", "));
    }
    text
}

fn addresses(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
}

/// Lines, with a column for hits if they are known.
struct Page {
    text: String,
    has_hits: bool,
}

impl Page {
    fn line(&mut self, hits: Option<u64>, line: &str) {
        let _ = match hits {
            Some(hits) => write!(self.text, "{hits:>9}  "),
            None if self.has_hits => write!(self.text, "{:11}", ""),
            None => Ok(()),
        };
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn policy(&mut self, policy: &ListedPolicy) {
        let staged = if policy.staged { ", staged: not enforced" } else { "" };
        let (order, at) = match &policy.at {
            Some(at) => (in_order(policy.order), format!(", {at}")),
            None => (String::new(), String::new()),
        };
        self.line(None, &format!("    {}{order}{staged}{at}", policy.name));
        if policy.rules.is_empty() {
            self.line(None, "      no rules");
        }
        for rule in &policy.rules {
            self.line(rule.hits, &format!("      {}  {}", rule.rule, rule.words));
        }
    }

    /// `has_profiles`: what no tier decides comes to profiles; else it goes on.
    fn side(&mut self, direction: PolicyDirection, side: &Side, has_profiles: bool) {
        self.line(None, &format!("{}: {}", direction.name(), words::direction_in_words(direction)));
        for tier in &side.tiers {
            self.line(None, &format!("  tier {}{}", tier.tier, in_order(tier.order)));
            tier.policies.iter().for_each(|policy| self.policy(policy));
            self.line(
                tier.end_hits,
                match tier.end {
                    "deny" => "    end: deny what none of these decided",
                    "pass" => "    end: pass to the next tier",
                    _ => "    end: nothing is enforced here",
                },
            );
        }
        if !has_profiles {
            return self.line(None, "  what no tier decided goes on");
        }
        if !side.profiles_reached {
            return self.line(None, "  profiles: not reached");
        }
        self.line(None, if side.tiers.is_empty() { "  profiles, as no policy applies" } else { "  profiles" });
        side.profiles.iter().for_each(|profile| self.policy(profile));
        self.line(side.no_profile_hits, "    end: deny");
    }
}

fn in_order(order: Option<f64>) -> String {
    order.map_or(", comes last".to_owned(), |order| format!(", order {order}"))
}

/// The listing for a person.
pub fn text(listed: &Listed) -> String {
    match listed {
        Listed::Workload(listing) => workload_text(listing),
        Listed::HostEndpoint(listing) => host_text(listing),
    }
}

const ABOUT_HITS: &str = "hits: new connections that a rule decided on this node, of any endpoint that it applies to\n";

fn workload_text(listing: &Listing) -> String {
    let mut page = Page { text: String::new(), has_hits: listing.ingress.no_profile_hits.is_some() };
    let node = match (&listing.node, listing.local) {
        (Some(node), true) => format!(", on {node}, which is this node"),
        (Some(node), false) => format!(", on {node}, which enforces what follows"),
        (None, _) => String::new(),
    };
    let _ = writeln!(page.text, "{}, {}{node}", listing.endpoint, addresses(&listing.addresses));
    if page.has_hits {
        page.text.push_str(ABOUT_HITS);
    }
    for (direction, side) in PolicyDirection::ALL.into_iter().zip([&listing.ingress, &listing.egress]) {
        page.text.push('\n');
        page.side(direction, side, true);
    }
    page.text
}

fn host_text(listing: &HostListing) -> String {
    let has_hits = listing.stages.iter().any(|stage| stage.ingress.no_profile_hits.is_some());
    let mut page = Page { text: String::new(), has_hits };
    let whose = if listing.local { "this node" } else { "another node, which enforces what follows" };
    let addresses = match &listing.addresses[..] {
        [] => String::new(),
        some => format!(", {}", addresses(some)),
    };
    let _ = writeln!(page.text, "host endpoint {}{addresses}, of {whose}", listing.host_endpoint);
    page.text.push_str("failsafe ports come first: FelixConfiguration names them, or Calico's defaults hold\n");
    if page.has_hits {
        page.text.push_str(ABOUT_HITS);
    }
    for stage in &listing.stages {
        let (title, has_profiles) = match stage.stage {
            "untracked" => ("untracked: each packet, before connections are looked up", false),
            "preDNAT" => ("before DNAT: first packets, as they arrive, before services are translated", false),
            "forwarded" => ("forwarded: first packets that go on to another endpoint", false),
            _ => ("local: first packets to or from the node itself", true),
        };
        page.text.push('\n');
        page.line(None, title);
        let sides = PolicyDirection::ALL.into_iter().zip([&stage.ingress, &stage.egress]);
        let sides: Vec<_> = sides.filter(|(_, side)| has_profiles || !side.tiers.is_empty()).collect();
        if sides.is_empty() {
            page.line(None, "  no policy applies: all go on");
        }
        for (direction, side) in sides {
            page.side(direction, side, has_profiles);
        }
    }
    page.text
}
