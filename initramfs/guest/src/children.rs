//! Waits for PID 1's children. Each one made here has an owner who waits for it; what the workload
//! makes a child of PID 1 by tricks (`CLONE_PARENT`) has none and is reaped as a stray.
//!
//! Orphans of the sandbox never come here: their namespace's first process reaps them.

use std::{
    collections::HashSet,
    io,
    os::fd::AsFd,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use holdfast_wire::guest::Exited;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::sys::Child;

#[derive(Debug, Default)]
pub struct Children {
    owned: Mutex<HashSet<Pid>>,
    waited: Condvar,
}

impl Children {
    /// Makes a child that the caller will [`Self::wait`] for.
    pub fn make(&self, spawn: impl FnOnce() -> io::Result<Child>) -> io::Result<Child> {
        // Held over the clone: a child that ends at once must not look like a stray.
        let mut owned = self.lock();
        let child = spawn()?;
        owned.insert(child.pid);
        Ok(child)
    }

    /// Waits until `child` has ended and forgets it.
    pub fn wait(&self, child: &Child) -> io::Result<Exited> {
        let id = || WaitId::PidFd(child.pidfd.as_fd());
        // First without the lock, for as long as it takes; then at once and with it, so that its
        // number is free only when nobody calls it owned any more.
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::io::retry_on_intr(|| waitid(id(), ended))?;
        let mut owned = self.lock();
        let outcome = rustix::io::retry_on_intr(|| waitid(id(), WaitIdOptions::EXITED));
        owned.remove(&child.pid);
        drop(owned);
        self.waited.notify_all();
        let status = outcome?.ok_or(io::ErrorKind::NotFound)?;
        let signal = status.terminating_signal().map(Exited::Signal);
        let code = status.exit_status().map(Exited::Code);
        code.or(signal).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Reaps strays until there is no child at all. Only PID 1 may run it: elsewhere it would take
    /// children that others wait for.
    pub fn reap_strays(&self) -> io::Result<()> {
        while let Some(pid) = crate::sys::ended_child()? {
            let mut owned = self.lock();
            if owned.contains(&pid) {
                // Its owner is about to wait for it; until then it would be found again and again.
                while owned.contains(&pid) {
                    owned = self.waited.wait(owned).unwrap_or_else(PoisonError::into_inner);
                }
            } else {
                crate::sys::reap(pid)?;
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Pid>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
