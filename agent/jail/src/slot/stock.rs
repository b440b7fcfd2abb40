//! Slots made ahead: a create or a resume takes a ready one, and waits for no nft.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use log::warn;
use rustix::{process::setpriority_process, thread::gettid};

use super::Slot;
use crate::JailError;

/// Slots kept ready. Each is a network namespace, some 100 KiB of the kernel's memory, and three
/// descriptors; as many creates at once as an agent has under way find one.
const READY: usize = 8;

/// After a slot could not be made.
const PAUSE: Duration = Duration::from_secs(5);

/// Whoever waits for a sandbox comes first, and a slot is wanted at the next one only.
const NICENESS: i32 = 19;

/// A stock of slots, all with the same rules. Each is used once.
#[derive(Debug)]
pub struct Slots {
    ruleset: &'static str,
    shared: Arc<Shared>,
    maker: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stock: Mutex<Stock>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Stock {
    slots: VecDeque<Slot>,
    closed: bool,
}

impl Shared {
    fn stock(&self) -> MutexGuard<'_, Stock> {
        // A thread that panicked left a queue that is whole.
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// Begins to make slots in which `ruleset` (nft(8)) holds, on a thread of its own.
    pub fn start(ruleset: &'static str) -> Self {
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        let maker = thread::Builder::new()
            .name("slots".to_owned())
            .spawn(move || keep_ready(&theirs, ruleset))
            .inspect_err(|error| warn!(error:%; "no slots are made ahead: no thread for it"))
            .ok();
        Self { ruleset, shared, maker }
    }

    /// A slot nobody else has: a ready one, or one made now. Blocks.
    pub fn take(&self) -> Result<Slot, JailError> {
        let ready = self.shared.stock().slots.pop_front();
        self.shared.changed.notify_all();
        ready.map_or_else(|| Slot::make(self.ruleset), Ok)
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.shared.stock().slots.len()
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.shared.stock().closed = true;
        self.shared.changed.notify_all();
        // It is in the making of one slot at most. One that panicked has said so.
        let _ = self.maker.take().map(JoinHandle::join);
    }
}

fn keep_ready(shared: &Shared, ruleset: &str) {
    if let Err(error) = setpriority_process(Some(gettid()), NICENESS) {
        warn!(error:%; "slots are made at usual priority");
    }
    loop {
        let wanting = |stock: &mut Stock| !stock.closed && stock.slots.len() >= READY;
        let stock = shared.changed.wait_while(shared.stock(), wanting);
        if stock.unwrap_or_else(PoisonError::into_inner).closed {
            return;
        }
        match Slot::make(ruleset) {
            Ok(slot) => shared.stock().slots.push_back(slot),
            Err(error) => {
                // Whoever needs one makes it, and is told what is wrong.
                warn!(error:%; "no slot made ahead");
                let open = |stock: &mut Stock| !stock.closed;
                drop(shared.changed.wait_timeout_while(shared.stock(), PAUSE, open));
            }
        }
    }
}
