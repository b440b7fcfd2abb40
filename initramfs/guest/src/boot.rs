//! From the kernel's hand-over to the first call: as little as can be before the host is told.

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
};

use rustix::{
    mm::MlockAllFlags,
    process::{Resource, Rlimit, setrlimit},
    time::{ClockId, clock_gettime},
};

use crate::{
    guest::Guest,
    modules, mounts, network, power, rpc, scheduler, sys,
    vsock::{self, Vsock},
    workload::Site,
};

/// Open files of one process of the workload: enough for servers that do not raise it themselves.
const OPEN_FILES: Rlimit = Rlimit { current: Some(65_536), maximum: Some(1_048_576) };
/// Processes of one user: the workload's cgroup limits them, for all users together.
const USER_PROCESSES: Rlimit = Rlimit { current: None, maximum: None };

/// As container users know it: any user may ping and listen on low ports. And the kernel's own
/// timers, each of which wakes an idle guest: no look for memory to compact twice a second (it is
/// compacted when it is needed), and counters of memory folded every ten seconds, not every one.
const SETTINGS: &[(&str, &str)] = &[
    ("/proc/sys/vm/compaction_proactiveness", "0"),
    ("/proc/sys/vm/stat_interval", "10"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
];

/// Boots, serves and turns the machine off. Returns only what made that impossible.
pub fn run() -> io::Error {
    match serve() {
        Ok(()) => power::off(),
        Err(error) => error,
    }
}

fn serve() -> io::Result<()> {
    let mut troubles = Vec::new();
    troubles.extend(mounts::mount_kernel_file_systems().err().map(|error| error.describe()));
    troubles.extend(modules::load(&[mounts::IMAGE_DEVICE, mounts::DISK_DEVICE]));
    let root = mounts::mount_sandbox().err().map(|error| error.describe());
    troubles.extend(root.clone());
    // Without vsock (no such device) there is nobody to serve; the line below still tells that
    // PID 1 runs.
    let listener = Vsock::listen();
    let ready_ns = monotonic_ns();
    let site = Site {
        root: PathBuf::from(mounts::SANDBOX),
        hidden: vec![mounts::IMAGE, mounts::DISK, mounts::CGROUPS],
        volumes: PathBuf::from(mounts::VOLUMES),
        cgroups: PathBuf::from(mounts::CGROUPS),
        device: Some(network::DEVICE),
        disk: Some(PathBuf::from(mounts::DISK)),
    };
    let guest = Arc::new(Guest::new(site, root, ready_ns)?);
    if listener.is_ok() {
        vsock::ring();
    }
    say(&troubles);
    settle();
    rpc::serve(&listener?, &guest)
}

/// What can be done after the host has been told. None of it is worth not serving for: what a
/// kernel does not have stays as it is.
fn settle() {
    let _ = setrlimit(Resource::Nofile, OPEN_FILES);
    let _ = setrlimit(Resource::Nproc, USER_PROCESSES);
    // The workload may add swap; PID 1 must answer while it thrashes.
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    let _ = rustix::mm::mlockall(all);
    let _ = sys::interface_up("lo");
    for (path, value) in SETTINGS {
        let _ = fs_err::write(path, value);
    }
    let _ = scheduler::let_idle_cpus_sleep();
}

/// The one line of a good boot, and one for each trouble. Kept short: each byte is a VM exit.
fn say(troubles: &[String]) {
    let mut console = io::stdout().lock();
    for trouble in troubles {
        let _ = writeln!(console, "holdfast: {trouble}");
    }
    let _ = writeln!(console, "holdfast: ready");
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec.unsigned_abs())
}
