//! What decided, by its name and where it stands.

use std::collections::HashMap;

use weir_policy::{Model, RuleOrigin};

use crate::{resources::Manifests, translate::Loaded};

/// What decided, for people.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Authority {
    /// Its name: "NetworkPolicy/web/p rule 2", or "default-deny NetworkPolicy/web/p" for the end of a tier.
    pub name: String,
    /// "file:line" of its object; of the end of a tier, of each of the policies that brought the packet there.
    pub at: Vec<String>,
}

impl std::fmt::Display for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if self.at.is_empty() { Ok(()) } else { write!(f, " ({})", self.at.join(", ")) }
    }
}

/// Where the policies of a model stand.
pub struct Places<'l> {
    objects: &'l Manifests,
    by_policy: HashMap<&'l str, u32>,
}

impl<'l> Places<'l> {
    /// Those of what was loaded.
    pub fn new(loaded: &'l Loaded) -> Self {
        let Model { tiers, .. } = &*loaded.policy;
        let policies = tiers.iter().flat_map(|tier| &tier.policies);
        Self { objects: &loaded.objects, by_policy: policies.map(|p| (p.name.as_str(), p.origin)).collect() }
    }

    /// "file:line" of a model's object; `None` for one that no file has.
    pub fn of(&self, origin: u32) -> Option<String> {
        self.objects.get(origin).map(|origin| origin.place())
    }

    /// The name and place of what decided.
    pub fn authority(&self, rule: &RuleOrigin<'_>) -> Authority {
        let at = match rule {
            RuleOrigin::Policy { object, .. } => self.of(*object).into_iter().collect(),
            RuleOrigin::TierEnd { policies, .. } => {
                policies.iter().filter_map(|policy| self.of(*self.by_policy.get(policy)?)).collect()
            }
            RuleOrigin::Profile { .. } | RuleOrigin::NoProfile | RuleOrigin::Undecided => Vec::new(),
        };
        Authority { name: rule.to_string(), at }
    }
}
