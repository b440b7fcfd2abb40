//! Decisions on their way to the agent: a bounded queue, from which the newest connection takes.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use holdfast_wire::egress::{Decision, Decisions, Ended, PATH_BYTES_MAX};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// Decisions and ends that wait at most. A guest that makes them faster than the agent takes them
/// fills the queue, and is seen in the count of what was dropped.
const QUEUE_MAX: usize = 16 * 1024;
/// Of each told in one message: a decision is at most about 1 KiB, a message 256.
const BATCH_MAX: usize = 128;
/// Longest host and method told, in bytes.
const HOST_BYTES_MAX: usize = 255;
const METHOD_BYTES_MAX: usize = 32;

#[derive(Default)]
pub(crate) struct Audit {
    pending: Mutex<Pending>,
    ready: Notify,
}

#[derive(Default)]
struct Pending {
    dropped: u64,
    entries: VecDeque<Decision>,
    ended: VecDeque<Ended>,
}

/// Microseconds since the epoch.
pub(crate) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn cut(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        let at = (0..=bytes_max).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(at);
    }
}

impl Audit {
    pub(crate) fn decided(&self, mut decision: Decision) {
        if let Some(query) = decision.path.find('?') {
            decision.path.truncate(query);
        }
        cut(&mut decision.path, PATH_BYTES_MAX);
        cut(&mut decision.host, HOST_BYTES_MAX);
        cut(&mut decision.method, METHOD_BYTES_MAX);
        self.push(|pending| &mut pending.entries, decision);
    }

    pub(crate) fn ended(&self, ended: Ended) {
        self.push(|pending| &mut pending.ended, ended);
    }

    fn push<T>(&self, queue: impl Fn(&mut Pending) -> &mut VecDeque<T>, entry: T) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if queue(&mut pending).len() >= QUEUE_MAX {
            pending.dropped += 1;
        } else {
            queue(&mut pending).push_back(entry);
        }
        drop(pending);
        self.ready.notify_one();
    }

    /// Waits until there is something to tell, but not before `earliest`, and takes some of it.
    pub(crate) async fn batch(&self, earliest: Instant) -> Decisions {
        while self.is_empty() {
            self.ready.notified().await;
        }
        if Instant::now() < earliest {
            sleep_until(earliest).await;
        }
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let count = pending.entries.len().min(BATCH_MAX);
        let entries = pending.entries.drain(..count).collect();
        let count = pending.ended.len().min(BATCH_MAX);
        let ended = pending.ended.drain(..count).collect();
        Decisions { dropped: pending.dropped, entries, ended }
    }

    fn is_empty(&self) -> bool {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.entries.is_empty() && pending.ended.is_empty()
    }

    /// A batch that could not be told.
    pub(crate) fn lost(&self, batch: &Decisions) {
        let count = batch.entries.len() + batch.ended.len();
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.dropped += u64::try_from(count).unwrap_or(u64::MAX);
    }
}
