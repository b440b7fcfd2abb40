//! User ids of VMM processes: each of its own, so that none can touch another.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

/// First uid (and gid) of a sandbox.
const UID_FIRST: u32 = 200_000;

/// Uids in use now. The smallest free one is next, so that they stay few.
#[derive(Debug, Clone, Default)]
pub(super) struct Uids {
    used: Arc<Mutex<BTreeSet<u32>>>,
}

/// One uid. Free again on drop.
#[must_use = "dropping the lease lets another sandbox have the uid"]
#[derive(Debug)]
pub(super) struct UidLease {
    uid: u32,
    pool: Uids,
}

impl Uids {
    /// The lease of a VMM that runs as this uid already.
    pub(super) fn take(&self, uid: u32) -> Option<UidLease> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.insert(uid).then(|| UidLease { uid, pool: self.clone() })
    }

    pub(super) fn lease(&self) -> UidLease {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = (UID_FIRST..).find(|uid| !used.contains(uid)).unwrap_or(u32::MAX);
        used.insert(uid);
        UidLease { uid, pool: self.clone() }
    }
}

impl UidLease {
    pub(super) fn uid(&self) -> u32 {
        self.uid
    }
}

impl Drop for UidLease {
    fn drop(&mut self) {
        self.pool.used.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_leases_share_a_uid_and_a_free_one_is_used_again() {
        let pool = Uids::default();
        let (first, second) = (pool.lease(), pool.lease());
        assert_eq!((first.uid(), second.uid()), (UID_FIRST, UID_FIRST + 1));
        drop(first);
        assert_eq!(pool.lease().uid(), UID_FIRST);
    }

    #[test]
    fn a_uid_that_is_taken_again_is_nobody_elses() {
        let pool = Uids::default();
        let taken = pool.take(UID_FIRST).unwrap();
        assert!(pool.take(UID_FIRST).is_none());
        assert_eq!(pool.lease().uid(), UID_FIRST + 1);
        drop(taken);
        assert_eq!(pool.lease().uid(), UID_FIRST);
    }
}
