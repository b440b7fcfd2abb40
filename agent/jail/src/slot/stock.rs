//! Slots made ahead: a create or a resume takes a ready one, and waits for no nft.

use std::time::Duration;

use super::Slot;
use crate::{
    JailError,
    stock::{Plan, Stock},
};

/// Slots kept ready. Each is a network namespace, some 100 KiB of the kernel's memory, and three descriptors; as many
/// creates at once as an agent has under way find one.
const READY: usize = 8;

const PLAN: Plan = Plan { name: "slots", ready: READY, delay: Duration::from_millis(50) };

/// A stock of slots, all with the same rules. Each is used once.
#[derive(Debug)]
pub struct Slots {
    ruleset: &'static str,
    stock: Stock<Slot>,
}

impl Slots {
    /// Begins to make slots in which `ruleset` (nft(8)) holds, on a thread of its own.
    pub fn start(ruleset: &'static str) -> Self {
        Self { ruleset, stock: Stock::start(PLAN, move || Slot::make(ruleset)) }
    }

    /// A slot nobody else has: a ready one, or one made now. Blocks.
    pub fn take(&self) -> Result<Slot, JailError> {
        self.stock.take().map_or_else(|| Slot::make(self.ruleset), Ok)
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.stock.ready()
    }
}
