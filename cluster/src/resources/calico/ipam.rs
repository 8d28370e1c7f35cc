//! Where Calico's IPAM has given addresses to nodes, and whether its datastore may be believed.
//!
//! A pool is cut into blocks. A block's affinity says which node takes addresses of it, and once it is confirmed the block is that
//! node's route. Another node may borrow single addresses of a block; only the block itself says so (Calico, "Block affinity" and
//! libcalico-go's ipam package). Blocks change with each pod of the cluster, so nothing is kept of them but what is borrowed.

use serde::{Deserialize, Deserializer};

use super::Unread;
use crate::resources::meta::{Name, maybe_name, name};

/// An object that Calico writes for itself, so that nothing is missed where it lacks something.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Own<S> {
    /// The API group and version.
    pub api_version: Option<Unread>,
    /// The kind.
    pub kind: Option<Unread>,
    /// Of no interest.
    pub metadata: Option<Unread>,
    /// What it says.
    pub spec: S,
    /// Of no interest.
    pub status: Option<Unread>,
}

/// A ClusterInformation.
pub type ClusterInformation = Own<ClusterInformationSpec>;

/// ClusterInformation's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClusterInformationSpec {
    /// Whether what is stored may be believed; unset is yes. It is false while the datastore is migrated.
    pub datastore_ready: Option<bool>,
}

/// A BlockAffinity.
pub type BlockAffinity = Own<BlockAffinitySpec>;

/// BlockAffinity's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct BlockAffinitySpec {
    /// The block.
    #[serde(deserialize_with = "name")]
    pub cidr: Name,
    /// The node that it is for.
    #[serde(deserialize_with = "name")]
    pub node: Name,
    /// "pending", "confirmed" or "pendingDeletion".
    #[serde(deserialize_with = "maybe_name")]
    pub state: Option<Name>,
    /// "host", also where it is unset, or "virtual", which is no node.
    #[serde(rename = "type", deserialize_with = "maybe_name")]
    pub type_: Option<Name>,
    /// Whether it is about to go.
    #[serde(rename = "deleted", deserialize_with = "flag")]
    pub is_deleted: bool,
}

impl BlockAffinitySpec {
    /// Whether the block is the node's.
    pub fn is_confirmed(&self) -> bool {
        self.state.as_deref() == Some("confirmed")
            && matches!(self.type_.as_deref(), None | Some("" | "host"))
            && !self.is_deleted
    }
}

/// A truth that Calico stores as a text in one of its forms.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Flag {
        Bool(bool),
        Text(String),
    }
    Ok(match Option::<Flag>::deserialize(deserializer)? {
        Some(Flag::Bool(flag)) => flag,
        Some(Flag::Text(text)) => text == "true",
        None => false,
    })
}

/// An IPAMBlock.
pub type IpamBlock = Own<IpamBlockSpec>;

/// What is read of an IPAMBlock's spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(from = "Allocations")]
pub struct IpamBlockSpec {
    /// The block.
    pub cidr: Name,
    /// The addresses that nodes have which the block is not for, by their place in it.
    pub borrowed: Box<[(u32, Name)]>,
}

/// The most addresses of a block that are looked at: of a /20, or the /116 that is as large. Calico's own limit is the former.
const MOST: usize = 1 << 12;

/// An IPAMBlock's spec as it is written.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Allocations {
    #[serde(deserialize_with = "name")]
    cidr: Name,
    /// "host:NODE".
    affinity: Option<String>,
    /// For each address, the place of its attributes.
    allocations: Option<Vec<Option<i64>>>,
    attributes: Option<Vec<Attributes>>,
    #[serde(deserialize_with = "flag")]
    deleted: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Attributes {
    secondary: Option<Owner>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Owner {
    #[serde(deserialize_with = "maybe_name")]
    node: Option<Name>,
}

impl From<Allocations> for IpamBlockSpec {
    fn from(written: Allocations) -> Self {
        let Allocations { cidr, affinity, allocations, attributes, deleted } = written;
        let attributes = attributes.unwrap_or_default();
        let own = affinity.as_deref().and_then(|affinity| affinity.strip_prefix("host:"));
        let node_of = |place: i64| attributes.get(usize::try_from(place).ok()?)?.secondary.as_ref()?.node.as_ref();
        let all = allocations.filter(|_| !deleted).unwrap_or_default();
        let borrowed = (0_u32..).zip(all.into_iter().take(MOST)).filter_map(|(ordinal, place)| {
            let node = node_of(place?)?;
            (own != Some(&**node)).then(|| (ordinal, node.clone()))
        });
        Self { cidr, borrowed: borrowed.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_what_others_have_borrowed_of_it() {
        let read = |affinity: &str, deleted: bool| -> IpamBlockSpec {
            let text = format!(
                r#"{{"cidr": "10.1.0.0/29", "affinity": {affinity}, "strictAffinity": false, "deleted": {deleted},
                    "allocations": [0, null, 1, 0, 7, -1, 2, null], "unallocated": [1, 7],
                    "attributes": [{{"handle_id": "a", "secondary": {{"node": "n1", "pod": "p"}}}}, {{"secondary": {{"node": "n2"}}}}, {{}}]}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let named = |spec: &IpamBlockSpec| -> Vec<_> {
            spec.borrowed.iter().map(|(ordinal, node)| format!("{ordinal} {node}")).collect()
        };
        assert_eq!(named(&read("\"host:n1\"", false)), ["2 n2"]);
        // Nobody's block: whoever has an address of it has it alone.
        assert_eq!(named(&read("null", false)), ["0 n1", "2 n2", "3 n1"]);
        assert!(read("null", true).borrowed.is_empty());
        assert_eq!(serde_json::from_str::<IpamBlockSpec>("{\"allocations\": null}").unwrap(), IpamBlockSpec::default());
    }

    #[test]
    fn an_affinity_is_confirmed_for_a_host_that_keeps_it() {
        let is = |more: &str| {
            let text = format!(r#"{{"cidr": "10.1.0.0/26", "node": "n"{more}}}"#);
            serde_json::from_str::<BlockAffinitySpec>(&text).unwrap().is_confirmed()
        };
        assert!(is(r#","state": "confirmed""#) && is(r#","state": "confirmed","deleted": "false","type": "host""#));
        assert!(is(r#","state": "confirmed","deleted": false"#));
        for not in [
            "",
            r#","state": "pending""#,
            r#","state": "pendingDeletion""#,
            r#","state": "confirmed","deleted": "true""#,
            r#","state": "confirmed","deleted": true"#,
            r#","state": "confirmed","type": "virtual""#,
        ] {
            assert!(!is(not), "{not}");
        }
    }
}
