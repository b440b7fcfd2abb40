//! The calls for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::ptr;

/// The least of the priorities that are ahead of everybody who has none.
const PRIORITY: i32 = 1;

/// This thread is ahead of others for as long as this lives.
pub(crate) struct Ahead {
    /// What it is otherwise. `None`: it is as it was.
    before: Option<(i32, libc::sched_param)>,
}

impl Ahead {
    /// Where the thread may not be, everything is as it was: it takes longer then.
    pub(crate) fn begin() -> Self {
        // SAFETY: 0 is this thread, and the call takes no pointer.
        let policy = unsafe { libc::sched_getscheduler(0) };
        let mut own = libc::sched_param { sched_priority: 0 };
        // SAFETY: 0 is this thread; the kernel fills in the one structure, which is alive and ours.
        let known = policy >= 0 && unsafe { libc::sched_getparam(0, ptr::from_mut(&mut own)) } == 0;
        // The flag: whoever is started meanwhile is as others are.
        let ahead = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        Self { before: (known && set(ahead, PRIORITY)).then_some((policy, own)) }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some((policy, own)) = self.before {
            // Less is always granted.
            set(policy, own.sched_priority);
        }
    }
}

fn set(policy: i32, priority: i32) -> bool {
    let wanted = libc::sched_param { sched_priority: priority };
    // SAFETY: 0 is this thread; the kernel only reads the one structure, which is alive.
    unsafe { libc::sched_setscheduler(0, policy, ptr::from_ref(&wanted)) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: 0 is this thread, and the call takes no pointer.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_thread_is_ahead_for_as_long_as_it_should_and_no_longer() {
        let before = policy();
        let ahead = Ahead::begin();
        // Root may: everything else here needs that too.
        assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, libc::SCHED_FIFO);
        drop(ahead);
        assert_eq!(policy(), before);
    }
}
