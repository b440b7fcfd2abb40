//! The lists of system calls. A rule names one call with one value of what its argument decides, so
//! that `tests/seccomp` can tell which of them nothing needs.

use libc::c_long;

/// One thing a thread may ask of the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub name: &'static str,
    pub call: c_long,
    /// What its arguments must be: all of it. Empty: anything.
    pub when: &'static [Check],
    /// What we need it for.
    pub why: &'static str,
    /// Why no guest of the tests makes us do this for certain. What a failure needs is then forced
    /// by the tests beside this file.
    pub exempt: Option<&'static str>,
}

/// About one argument, by its place from 0. Looked at are its lower 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    Is(u8, u64),
    /// None of these bits is set.
    Lacks(u8, u64),
    /// What is left of it under the mask is this.
    Masked(u8, u64, u64),
    /// It is this process's id.
    IsOwnPid(u8),
}

impl Check {
    /// Whether a call of a process `own_pid` with these arguments passes.
    pub fn passes(self, arguments: &[u64], own_pid: u64) -> bool {
        let low = |place: u8| arguments.get(usize::from(place)).map(|value| value & 0xffff_ffff);
        match self {
            Self::Is(place, value) => low(place) == Some(value),
            Self::Lacks(place, bits) => low(place).is_some_and(|found| found & bits == 0),
            Self::Masked(place, mask, value) => low(place).is_some_and(|it| it & mask == value),
            Self::IsOwnPid(place) => low(place) == Some(own_pid),
        }
    }
}

use Check::{Is, IsOwnPid, Lacks, Masked};

impl Rule {
    const fn without_a_guest(mut self, reason: &'static str) -> Self {
        self.exempt = Some(reason);
        self
    }
}

const fn may(name: &'static str, call: c_long, why: &'static str) -> Rule {
    Rule { name, call, when: &[], why, exempt: None }
}

const fn may_if(
    name: &'static str,
    call: c_long,
    when: &'static [Check],
    why: &'static str,
) -> Rule {
    Rule { name, call, when, why, exempt: None }
}

/// A request by which KVM tells a part of a machine's state.
macro_rules! tells {
    ($request:ident) => {
        may_if("ioctl", libc::SYS_ioctl, &[Is(1, $request)], "tell the state for a snapshot")
    };
}

/// Operations of futex, without the bits that say whose it is and by which clock.
const FUTEX_OPERATION: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;
const FUTEX_WAIT_BITSET: u64 = 9;
const EXECUTABLE: u64 = libc::PROT_EXEC.unsigned_abs() as u64;
const ADVICE_NOT_NEEDED: u64 = 4;
const SIGNAL_ABORT: u64 = 6;
/// The first signal that the C library leaves to programs: it fetches a vCPU out of the guest.
const SIGNAL_KICK: u64 = 34;
const IOCTL_KVM_RUN: u64 = 0xae80;
const IOCTL_KVM_CLOCK_PAUSED: u64 = 0xaead;
const IOCTL_KVM_GET_REGS: u64 = 0x8090_ae81;
const IOCTL_KVM_GET_SREGS: u64 = 0x8138_ae83;
const IOCTL_KVM_GET_MSRS: u64 = 0xc008_ae88;
const IOCTL_KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const IOCTL_KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const IOCTL_KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const IOCTL_KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const IOCTL_KVM_GET_TSC_KHZ: u64 = 0xaea3;
const IOCTL_KVM_GET_XSAVE: u64 = 0x9000_aea4;
const IOCTL_KVM_GET_XCRS: u64 = 0x8188_aea6;
const IOCTL_KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const IOCTL_KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const IOCTL_NOT_BLOCKING: u64 = 0x5421;
const GET_FLAGS: u64 = 1;
const SOCKET_LEVEL: u64 = 1;
const SEND_TIMEOUT: u64 = 21;
const IOCTL_TAP_OFFLOAD: u64 = 0x4004_54d0;
/// Of a read: only what is in memory (RWF_NOWAIT).
const NOT_WAITING: u64 = 8;
/// Modes of fallocate, which keep the file's length.
const PUNCH_HOLE: u64 = 0x2 | 0x1;
const ZERO_RANGE: u64 = 0x10 | 0x1;

const ALLOCATOR: &str = "depends on how much memory the allocator holds at the time";
const PANIC: &str = "only a panic or an abort, which the tests force";
const CHANCE: &str = "depends on which thread is where at the time; the tests force it";

/// What the standard library adds where it checks itself, as no release does.
pub(super) const DEBUG: &[Rule] = if cfg!(debug_assertions) {
    &[may_if("fcntl", libc::SYS_fcntl, &[Is(1, GET_FLAGS)], "see that what is closed is open")
        .without_a_guest("only in a debug build")]
} else {
    &[]
};

/// What any thread may.
pub(super) const EVERY: &[Rule] = &[
    may("write", libc::SYS_write, "ring a bell (eventfd), log to stderr or the serial log"),
    may_if("futex", libc::SYS_futex, &[Masked(1, FUTEX_OPERATION, FUTEX_WAKE)], "unlock, wake"),
    may_if(
        "futex",
        libc::SYS_futex,
        &[Masked(1, FUTEX_OPERATION, FUTEX_WAIT_BITSET)],
        "wait for a lock or a condition",
    ),
    may_if(
        "futex",
        libc::SYS_futex,
        &[Masked(1, FUTEX_OPERATION, FUTEX_WAIT)],
        "wait for a lock of the C library",
    )
    .without_a_guest(CHANCE),
    may_if("mmap", libc::SYS_mmap, &[Lacks(2, EXECUTABLE)], "allocate memory, never for code")
        .without_a_guest(ALLOCATOR),
    may("mremap", libc::SYS_mremap, "grow a large allocation").without_a_guest(ALLOCATOR),
    may("brk", libc::SYS_brk, "grow the main heap").without_a_guest(ALLOCATOR),
    may("munmap", libc::SYS_munmap, "free memory; unmap what a thread or the machine had"),
    may_if(
        "madvise",
        libc::SYS_madvise,
        &[Is(2, ADVICE_NOT_NEEDED)],
        "give a thread's stack back at its end",
    ),
    may("close", libc::SYS_close, "drop a descriptor"),
    may("sigaltstack", libc::SYS_sigaltstack, "put away the stack for overflows at a thread's end"),
    may("rt_sigprocmask", libc::SYS_rt_sigprocmask, "block signals while a thread ends"),
    may("exit", libc::SYS_exit, "end a thread"),
    may("exit_group", libc::SYS_exit_group, "end the process, also in a panic"),
    may("sched_yield", libc::SYS_sched_yield, "let another finish what it holds up a channel with")
        .without_a_guest(CHANCE),
    may("clock_gettime", libc::SYS_clock_gettime, "read a clock that the vDSO cannot")
        .without_a_guest("only where the host's clock is not the CPU's counter"),
    may("restart_syscall", libc::SYS_restart_syscall, "go on with a timed wait after a stop")
        .without_a_guest("nobody stops a VMM in a test of guests; the tests force it"),
    may("rt_sigaction", libc::SYS_rt_sigaction, "let an abort or an overflow be fatal")
        .without_a_guest(PANIC),
    may("gettid", libc::SYS_gettid, "abort: name the thread").without_a_guest(PANIC),
    may("getpid", libc::SYS_getpid, "signal one of our threads: name the process"),
    may_if(
        "tgkill",
        libc::SYS_tgkill,
        &[IsOwnPid(0), Is(2, SIGNAL_ABORT)],
        "abort this process, no other",
    )
    .without_a_guest(PANIC),
];

/// What a thread may that waits for descriptors: all but the vCPUs.
pub(super) const WAITING: &[Rule] = &[
    may("epoll_wait", libc::SYS_epoll_wait, "wait for bells, kicks and sockets"),
    may("read", libc::SYS_read, "silence a bell; read from a socket"),
];

/// What the main thread may.
pub(super) const MAIN: &[Rule] = &[
    may("accept4", libc::SYS_accept4, "take the agent's connection"),
    may("epoll_ctl", libc::SYS_epoll_ctl, "watch the agent's connection"),
    may("recvfrom", libc::SYS_recvfrom, "read the agent's requests"),
    may("sendto", libc::SYS_sendto, "answer the agent"),
    may("getrandom", libc::SYS_getrandom, "renew the generation id"),
    may_if(
        "ioctl",
        libc::SYS_ioctl,
        &[Is(1, IOCTL_NOT_BLOCKING)],
        "not block on the agent, and block for the farewell",
    ),
    may_if(
        "setsockopt",
        libc::SYS_setsockopt,
        &[Is(1, SOCKET_LEVEL), Is(2, SEND_TIMEOUT)],
        "limit how long the farewell may take",
    ),
    may_if(
        "tgkill",
        libc::SYS_tgkill,
        &[IsOwnPid(0), Is(2, SIGNAL_KICK)],
        "fetch a vCPU out of the guest",
    ),
    tells!(IOCTL_KVM_GET_IRQCHIP),
    tells!(IOCTL_KVM_GET_CLOCK),
];

/// What a vCPU's thread may.
pub(super) const VCPU: &[Rule] = &[
    may_if("ioctl", libc::SYS_ioctl, &[Is(1, IOCTL_KVM_RUN)], "run the guest"),
    may_if(
        "ioctl",
        libc::SYS_ioctl,
        &[Is(1, IOCTL_KVM_CLOCK_PAUSED)],
        "tell the guest's clock of a pause",
    ),
    may("rt_sigreturn", libc::SYS_rt_sigreturn, "come back from the signal that fetched it"),
    tells!(IOCTL_KVM_GET_MP_STATE),
    tells!(IOCTL_KVM_GET_REGS),
    tells!(IOCTL_KVM_GET_SREGS),
    tells!(IOCTL_KVM_GET_XSAVE),
    tells!(IOCTL_KVM_GET_XCRS),
    tells!(IOCTL_KVM_GET_DEBUGREGS),
    tells!(IOCTL_KVM_GET_LAPIC),
    tells!(IOCTL_KVM_GET_TSC_KHZ),
    tells!(IOCTL_KVM_GET_MSRS),
    tells!(IOCTL_KVM_GET_VCPU_EVENTS),
];

/// What a disk's thread may.
pub(super) const DISK: &[Rule] = &[
    may_if(
        "preadv2",
        libc::SYS_preadv2,
        &[Is(5, NOT_WAITING)],
        "read from the disk's files into guest memory what the host has in its own",
    ),
    may_if("preadv2", libc::SYS_preadv2, &[Is(5, 0)], "the same of what it has not"),
    may("pwritev", libc::SYS_pwritev, "write guest memory to the disk's file"),
    may("fdatasync", libc::SYS_fdatasync, "flush"),
    may_if("fallocate", libc::SYS_fallocate, &[Is(1, PUNCH_HOLE)], "discard"),
    may_if("fallocate", libc::SYS_fallocate, &[Is(1, ZERO_RANGE)], "write zeros")
        .without_a_guest("a Linux guest may zero by a discard; the disk's own tests ask for it"),
];

/// What the entropy device's thread may.
pub(super) const RNG: &[Rule] = &[may("getrandom", libc::SYS_getrandom, "random bytes")];

/// What the thread of the sockets to the guest may.
pub(super) const VSOCK: &[Rule] = &[
    may("accept4", libc::SYS_accept4, "take a client"),
    may("epoll_ctl", libc::SYS_epoll_ctl, "watch a client"),
    may("recvfrom", libc::SYS_recvfrom, "read a client's greeting"),
    may("sendto", libc::SYS_sendto, "answer a client's greeting; send it what waited"),
    may("shutdown", libc::SYS_shutdown, "pass the guest's end of one direction on"),
    may_if("ioctl", libc::SYS_ioctl, &[Is(1, IOCTL_NOT_BLOCKING)], "not block on a client"),
];

/// What a network's thread may.
pub(super) const NET: &[Rule] = &[
    may("writev", libc::SYS_writev, "send a frame from guest memory to the tap"),
    may_if(
        "ioctl",
        libc::SYS_ioctl,
        &[Is(1, IOCTL_TAP_OFFLOAD)],
        "tell the tap what the guest's driver can take",
    ),
];

/// What the balloon's thread may.
pub(super) const BALLOON: &[Rule] =
    &[may_if("fallocate", libc::SYS_fallocate, &[Is(1, PUNCH_HOLE)], "give pages back")];
