//! What this process gives up before it looks at stored bytes: everything but the calls that filling
//! memory takes. It opens nothing, connects to nothing and starts nothing.

use std::{collections::BTreeMap, io};

use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::{PagerError, sys};

/// Some MiB of layers and frames, and stacks; 64 GiB of pages each alone would take 512 MiB.
const ADDRESS_SPACE_BYTES_MAX: u64 = 2 << 30;

/// Calls with any arguments, each with its reason.
const ALLOWED: &[(i64, &str)] = &[
    (libc::SYS_read, "take faults"),
    (libc::SYS_pread64, "read pieces"),
    (libc::SYS_pwrite64, "write the memory file"),
    (libc::SYS_ftruncate, "give the memory file its length"),
    (libc::SYS_fstat, "tell a piece's length"),
    (libc::SYS_statx, "tell a piece's length"),
    (libc::SYS_poll, "wait for faults"),
    (libc::SYS_ppoll, "wait for faults"),
    (libc::SYS_write, "report, and log"),
    (libc::SYS_close, "let pieces go"),
    (libc::SYS_futex, "wait for the other thread"),
    (libc::SYS_munmap, "free memory"),
    (libc::SYS_mremap, "grow an allocation"),
    (libc::SYS_madvise, "give a stack back"),
    (libc::SYS_brk, "allocate memory"),
    (libc::SYS_sched_yield, "let the other thread finish"),
    (libc::SYS_clock_gettime, "read a clock that the vDSO cannot"),
    (libc::SYS_getrandom, "seed a hash map"),
    (libc::SYS_sigaltstack, "end a thread"),
    (libc::SYS_rt_sigprocmask, "end a thread, or abort"),
    (libc::SYS_rt_sigaction, "abort"),
    (libc::SYS_rt_sigreturn, "come back from a signal"),
    (libc::SYS_restart_syscall, "go on waiting after a stop"),
    (libc::SYS_getpid, "abort"),
    (libc::SYS_gettid, "abort"),
    (libc::SYS_tgkill, "abort"),
    (libc::SYS_exit, "end a thread"),
    (libc::SYS_exit_group, "end"),
];

/// Of userfaultfd.
const REQUESTS: [u64; 3] = [sys::COPY, sys::WAKE, sys::UNREGISTER];

/// For the whole process and every thread it has.
pub(crate) fn confine() -> Result<(), PagerError> {
    let failed = |what: &'static str| move |source: io::Error| PagerError::Confine { what, source };
    for (resource, max) in [(Resource::As, ADDRESS_SPACE_BYTES_MAX), (Resource::Core, 0)] {
        let limit = Rlimit { current: Some(max), maximum: Some(max) };
        setrlimit(resource, limit).map_err(|error| failed("resource limits")(error.into()))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|error| failed("new rights")(error.into()))?;
    let cannot = failed("system calls");
    filter()
        .and_then(|filter| filter.try_into())
        .map_err(io::Error::other)
        .and_then(|program| {
            let program: seccompiler::BpfProgram = program;
            seccompiler::apply_filter_all_threads(&program).map_err(io::Error::other)
        })
        .map_err(cannot)
}

fn filter() -> Result<SeccompFilter, seccompiler::BackendError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|(call, _)| (*call, Vec::new())).collect();
    let is = |argument, operator, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
    };
    let requests = REQUESTS
        .into_iter()
        .map(|request| SeccompRule::new(vec![is(1, SeccompCmpOp::Eq, request)?]))
        .collect::<Result<_, _>>()?;
    calls.insert(libc::SYS_ioctl, requests);
    if cfg!(debug_assertions) {
        // Before a descriptor is closed the standard library sees that it is open.
        let get_flags = u64::from(libc::F_GETFD.unsigned_abs());
        let rule = SeccompRule::new(vec![is(1, SeccompCmpOp::Eq, get_flags)?])?;
        calls.insert(libc::SYS_fcntl, vec![rule]);
    }
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    let never_code = || -> Result<_, seccompiler::BackendError> {
        Ok(vec![SeccompRule::new(vec![is(2, SeccompCmpOp::MaskedEq(executable), 0)?])?])
    };
    calls.insert(libc::SYS_mmap, never_code()?);
    calls.insert(libc::SYS_mprotect, never_code()?);
    let (other, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    SeccompFilter::new(calls, other, listed, std::env::consts::ARCH.try_into()?)
}
