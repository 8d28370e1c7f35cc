//! What Kubernetes' kinds have in common, as weir reads it: metadata, selectors, values that are a number or a name.

use std::{borrow::Cow, cell::RefCell, collections::BTreeMap, fmt, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use weir_nat::Topology;

use super::identity::Names;

/// A text that may be held by many.
pub type Name = Arc<str>;

thread_local! {
    /// Where texts are held that objects repeat, while objects are read on this thread.
    static NAMES: RefCell<Option<Names>> = const { RefCell::new(None) };
}

/// Reads objects, of which those texts that many objects repeat are held in `names`, once each.
pub fn sharing<R>(names: &Names, read: impl FnOnce() -> R) -> R {
    let before = NAMES.replace(Some(names.clone()));
    let read = read();
    NAMES.set(before);
    read
}

/// The text as it is held, see [`sharing`].
fn shared(text: &str) -> Name {
    NAMES.with_borrow(|names| names.as_ref().map_or_else(|| text.into(), |names| names.of(text)))
}

/// The topology as it is held, see [`sharing`].
pub(super) fn shared_topology(topology: Topology) -> Arc<Topology> {
    NAMES.with_borrow(|names| match names {
        Some(names) => names.topology(topology),
        None => Arc::new(topology),
    })
}

/// A text that is held once, see [`sharing`].
struct Shared(Name);

impl<'de> Deserialize<'de> for Shared {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Shared;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Shared, E> {
                Ok(Shared(shared(text)))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Reads a text that many objects repeat.
pub fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
    Option::<Shared>::deserialize(deserializer).map(|name| name.map_or_else(Name::default, |name| name.0))
}

/// Reads a text that many objects repeat, or nothing.
pub fn maybe_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Name>, D::Error> {
    Option::<Shared>::deserialize(deserializer).map(|name| name.map(|name| name.0))
}

/// Reads texts that many objects repeat.
pub fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[Name]>, D::Error> {
    let names = Option::<Vec<Shared>>::deserialize(deserializer)?;
    Ok(names.into_iter().flatten().map(|name| name.0).collect())
}

/// Labels or annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(Box<[(Name, Name)]>);

impl Labels {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Name> {
        self.iter().find_map(|(known, value)| (&**known == key).then_some(value))
    }

    /// All, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &(Name, Name)> {
        self.0.iter()
    }

    /// The same without some keys.
    pub(super) fn without(self, keys: &[&str]) -> Self {
        if !self.iter().any(|(key, _)| keys.contains(&&**key)) {
            return self;
        }
        Self(self.0.into_iter().filter(|(key, _)| !keys.contains(&&**key)).collect())
    }

    /// As a map of its own.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    /// Those with a key that `is_kept`.
    fn read<'de, D: Deserializer<'de>>(deserializer: D, is_kept: fn(&str) -> bool) -> Result<Self, D::Error> {
        struct Pairs(fn(&str) -> bool);
        impl<'de> Visitor<'de> for Pairs {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_unit<E: Error>(self) -> Result<Labels, E> {
                Ok(Labels::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut pairs = BTreeMap::new();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    // A value that is null reads as the empty text, as it does in a Go map.
                    let value = map.next_value::<Option<Shared>>()?.map_or_else(Name::default, |value| value.0);
                    if (self.0)(&key) {
                        pairs.insert(shared(&key), value);
                    }
                }
                Ok(Labels(pairs.into_iter().collect()))
            }
        }
        deserializer.deserialize_map(Pairs(is_kept))
    }
}

/// The annotation of the object that stands for a static pod.
pub const MIRRORED_UID: &str = "kubernetes.io/config.mirror";
/// A pod's first address as its CNI plugin writes it when it makes the pod: "10.1.0.5/32" (libcalico-go, conversion/constants.go).
pub const POD_IP: &str = "cni.projectcalico.org/podIP";
/// All of them, with commas between.
pub const POD_IPS: &str = "cni.projectcalico.org/podIPs";
/// What the annotations begin with that Calico writes, of nodes and of what it stores.
const CALICO_ANNOTATIONS: &str = "projectcalico.org/";

fn all_labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
    Labels::read(deserializer, |_| true)
}

fn annotations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
    let is_read = |key: &str| [MIRRORED_UID, POD_IP, POD_IPS].contains(&key) || key.starts_with(CALICO_ANNOTATIONS);
    Labels::read(deserializer, is_read)
}

/// Of an object's metadata.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// Its labels.
    #[serde(deserialize_with = "all_labels")]
    pub labels: Labels,
    /// Those annotations that weir reads.
    #[serde(deserialize_with = "annotations")]
    pub annotations: Labels,
    /// Its uid.
    #[serde(deserialize_with = "maybe_name")]
    pub uid: Option<Name>,
    /// When it was made.
    pub creation_timestamp: Option<Time>,
    /// When it shall go.
    pub deletion_timestamp: Option<Time>,
}

/// A moment, written as RFC 3339 has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(jiff::Timestamp);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        let time = text.parse().map_err(|_| {
            D::Error::custom(format_args!("{text:?} is not a time\nwrite it as RFC 3339 does: 2026-01-31T12:00:00Z"))
        })?;
        Ok(Self(time))
    }
}

/// A number or a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntOrString {
    /// A number.
    Int(i32),
    /// A name, or a number in quotes.
    String(String),
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = IntOrString;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a string")
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<IntOrString, E> {
                let out_of_range = |_| E::custom(format_args!("{number} is out of range"));
                i32::try_from(number).map(IntOrString::Int).map_err(out_of_range)
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<IntOrString, E> {
                // What no i64 holds is out of range as well.
                self.visit_i64(i64::try_from(number).unwrap_or(i64::MAX))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<IntOrString, E> {
                Ok(IntOrString::String(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Things by their labels.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels with their values, of which all must be there.
    pub match_labels: Option<BTreeMap<String, String>>,
    /// More that must hold.
    pub match_expressions: Option<Vec<LabelSelectorRequirement>>,
}

/// One thing about a label.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LabelSelectorRequirement {
    /// The label.
    pub key: String,
    /// "In", "NotIn", "Exists" or "DoesNotExist".
    pub operator: String,
    /// The values of the first two.
    pub values: Option<Vec<String>>,
}
