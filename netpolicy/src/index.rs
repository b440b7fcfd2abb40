//! Finds the rules that speak of a name in as many steps as the name has labels.

use std::collections::HashMap;

use crate::{HostName, HostPattern};

/// Position of a rule in a policy: `rules` first, then `hostRules`.
pub(crate) type Position = usize;

/// Positions of rules by host pattern, each list in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Index {
    exact: HashMap<HostName, Vec<Position>>,
    below: HashMap<HostName, Vec<Position>>,
    any: Vec<Position>,
}

impl Index {
    pub(crate) fn new<'a>(patterns: impl Iterator<Item = &'a HostPattern>) -> Self {
        let mut index = Self::default();
        for (position, pattern) in patterns.enumerate() {
            let list = match pattern {
                HostPattern::Any => &mut index.any,
                HostPattern::Below(name) => index.below.entry(name.clone()).or_default(),
                HostPattern::Exact(name) => index.exact.entry(name.clone()).or_default(),
            };
            list.push(position);
        }
        index
    }

    /// Positions of the rules whose pattern matches `name`, in the policy's order.
    pub(crate) fn of(&self, name: &HostName) -> Vec<Position> {
        let below = name.suffixes().skip(1).filter_map(|suffix| self.below.get(suffix));
        let lists = self.exact.get(name).into_iter().chain(below).chain([&self.any]);
        let mut found: Vec<Position> = lists.flatten().copied().collect();
        found.sort_unstable();
        found
    }
}
