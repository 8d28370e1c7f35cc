//! What a policy is about, read for its own sake: it stands for the policy where the rest cannot be read.

use super::{
    kinds::{CALICO_GROUP, Kind},
    meta::LabelSelector,
};
use crate::text::{
    Problems, Severity,
    tree::{Node, Value},
    typed,
};

/// What a policy selects, and where it stands, as far as that can be read.
#[derive(Clone, Debug)]
pub enum Subject {
    /// Of a Kubernetes NetworkPolicy.
    Kubernetes {
        /// Its `spec.podSelector`.
        pod_selector: Option<LabelSelector>,
    },
    /// Of one of Calico's.
    Calico {
        /// Its `spec.selector`.
        selector: Option<String>,
        /// Its `spec.tier`.
        tier: Option<String>,
        /// Its `spec.applyOnForward`.
        apply_on_forward: bool,
    },
    /// Of a ClusterNetworkPolicy.
    Cluster {
        /// Whether its `spec.tier` is Baseline.
        is_baseline: bool,
    },
}

impl Subject {
    /// `None` for what enforces nothing.
    pub(super) fn read(kind: &Kind, object: &Node) -> Option<Self> {
        let spec = object.get("spec");
        let field = |key: &str| spec.and_then(|spec| spec.get(key));
        let text = |key: &str| field(key).and_then(Node::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
        match (kind.group(), kind.name) {
            ("networking.k8s.io", "NetworkPolicy") => {
                Some(Self::Kubernetes { pod_selector: field("podSelector").and_then(label_selector) })
            }
            (CALICO_GROUP, "NetworkPolicy" | "GlobalNetworkPolicy") => {
                let apply_on_forward =
                    field("applyOnForward").is_some_and(|node| matches!(node.value, Value::Bool(true)));
                Some(Self::Calico { selector: text("selector"), tier: text("tier"), apply_on_forward })
            }
            (_, "ClusterNetworkPolicy") => {
                Some(Self::Cluster { is_baseline: text("tier").as_deref() == Some("Baseline") })
            }
            _ => None,
        }
    }
}

/// A selector of which no part is at fault. Read from a copy, so that the policy's own reading reports its faults.
fn label_selector(node: &Node) -> Option<LabelSelector> {
    let selector = node.clone();
    let mut unread = Problems::default();
    let selector = typed::read(&selector, "", |_| Severity::Error, &mut unread);
    selector.filter(|_| !unread.has_errors())
}
