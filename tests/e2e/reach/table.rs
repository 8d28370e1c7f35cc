//! The table as docs/REACH.md has it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use super::{
    Cell, FAMILIES, Outcome, Protocol,
    cluster::{self, Backend, What, Who},
};

fn title(who: Who) -> &'static str {
    match who {
        Who::PodHere => "pod here",
        Who::PodThere => "pod there",
        Who::Node => "node here",
        Who::NodeThere => "node there",
        Who::Outside => "outside, by uplink",
        Who::Behind => "outside, other device",
        Who::Itself => "pod here, the backend of its services",
    }
}

fn name_of_what(what: What) -> &'static str {
    match what {
        What::ClusterIp => "cluster IP",
        What::NodePortHere => "node port here",
        What::NodePortThere => "node port there",
        What::NodePortBehind => "node port, address of the other device",
        What::LoadBalancer => "load-balancer IP",
        What::External => "external IP",
        What::ExternalOwn => "external IP, the node's own",
        What::HostPort => "host port",
        What::Pod => "the backend itself",
    }
}

fn name_of_backend(backend: Backend) -> &'static str {
    match backend {
        Backend::PodHere => "pod here",
        Backend::PodThere => "pod there",
        Backend::NodeHere => "hostNetwork here",
        Backend::NodeThere => "hostNetwork there",
    }
}

/// An outcome, as of who asked.
fn text(outcome: &Outcome, who: Who) -> String {
    match outcome {
        Outcome::Answered(seen) if *seen == cluster::name_of(who.address()) => "yes".into(),
        Outcome::Answered(seen) => format!("as {seen}"),
        Outcome::Refused => "refused".into(),
        Outcome::Unreachable => "unreachable".into(),
        Outcome::Dropped => "no".into(),
    }
}

/// What came of all cells by weir, with the kernel's where it is another.
pub fn table(kernel: &BTreeMap<Cell, Outcome>, weir: &BTreeMap<Cell, Outcome>) -> String {
    let mut table = "| asked | backend | policy |".to_owned();
    Who::ALL.iter().for_each(|who| write!(table, " {} |", title(*who)).unwrap());
    table += "\n|---|---|---|";
    Who::ALL.iter().for_each(|_| table += "---|");
    table.push('\n');
    for (what, backend, is_local) in cluster::rows() {
        let policy = match what {
            What::HostPort | What::Pod => "",
            _ if is_local => "Local",
            _ => "Cluster",
        };
        write!(table, "| {} | {} | {policy} |", name_of_what(what), name_of_backend(backend)).unwrap();
        for who in Who::ALL {
            let ways = FAMILIES.iter().flat_map(|family| [Protocol::Tcp, Protocol::Udp].map(|way| (*family, way)));
            let outcomes: BTreeSet<String> = ways
                .map(|(family, protocol)| {
                    let cell = Cell { what, backend, is_local, who, family, protocol };
                    let (by_kernel, by_weir) = (text(&kernel[&cell], who), text(&weir[&cell], who));
                    if by_kernel == by_weir { by_weir } else { format!("{by_weir} (kernel: {by_kernel})") }
                })
                .collect();
            write!(table, " {} |", outcomes.into_iter().collect::<Vec<_>>().join(" / ")).unwrap();
        }
        table.push('\n');
    }
    table
}
