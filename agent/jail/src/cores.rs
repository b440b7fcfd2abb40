//! Core scheduling: which processes may run beside each other on the threads of one core.

use rustix::{
    io::Errno,
    process::{Pid, getpid},
    thread::{CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie},
};

use crate::JailError;

/// Gives the process `pid` a core of its own kind: none but its own threads run on the other
/// hardware threads of a core while one of them does. To be called before guest code runs; threads
/// made later belong to it. Harmless where a core has one thread.
pub fn keep_cores_apart(pid: u32) -> Result<(), JailError> {
    let outcome = match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        Some(pid) => create_core_scheduling_cookie(pid, CoreSchedulingScope::ThreadGroup),
        None => Err(Errno::SRCH),
    };
    match outcome {
        // `NODEV` is the kernel's way to say that no core has a second thread.
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        // It has no core scheduling, and needs none.
        Err(Errno::INVAL) if !cores_have_threads() => Ok(()),
        Err(errno) => Err(JailError::Cores { pid, source: errno.into() }),
    }
}

/// Whether several threads of one core are in use.
fn cores_have_threads() -> bool {
    let active = fs_err::read_to_string("/sys/devices/system/cpu/smt/active");
    active.is_ok_and(|active| active.trim() == "1")
}

/// Whether the kernel has core scheduling.
pub fn cores_can_be_kept_apart() -> bool {
    // The kernel refuses every core scheduling call in the same way when it has none.
    core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread) != Err(Errno::INVAL)
}
