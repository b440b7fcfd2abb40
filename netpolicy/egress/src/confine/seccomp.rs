//! The only system calls left once the process serves. What is not listed fails with EPERM: the
//! libraries take that for an error of the one connection, while a killed process would cut off
//! every sandbox of the group.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// What needs no look at its arguments.
const ALLOWED: &[i64] = &[
    // Sockets that exist, and what comes and goes on them.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_splice,
    libc::SYS_accept4,
    libc::SYS_connect,
    // Landlock leaves UDP: the source port of a query.
    libc::SYS_bind,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    libc::SYS_pipe2,
    // Waiting.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // Memory, never for code (mmap and mprotect are below).
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Ends of threads and of the process.
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_getaffinity,
];

fn is(argument: u8, value: i32) -> Result<SeccompCondition, BackendError> {
    let value = u64::from(value.unsigned_abs());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn lacks(argument: u8, bits: i32) -> Result<SeccompCondition, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(u64::from(bits.unsigned_abs()));
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, 0)
}

/// The filter, for every thread of the process.
pub(super) fn filter() -> Result<BpfProgram, BackendError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let mut when = |call: i64, conditions: Vec<SeccompCondition>| -> Result<(), BackendError> {
        calls.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    for family in [libc::AF_INET, libc::AF_INET6] {
        when(libc::SYS_socket, vec![is(0, family)?])?;
    }
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        when(call, vec![lacks(2, libc::PROT_EXEC)?])?;
    }
    for command in
        [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD, libc::F_DUPFD_CLOEXEC]
    {
        when(libc::SYS_fcntl, vec![is(1, command)?])?;
    }
    // Asking how much can be read, and making sockets not block.
    for request in [0x541b, 0x5421] {
        when(libc::SYS_ioctl, vec![is(1, request)?])?;
    }
    let own = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
    when(libc::SYS_tgkill, vec![is(0, own)?, is(2, libc::SIGABRT)?])?;
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(calls, denied, SeccompAction::Allow, arch)?.try_into()
}
