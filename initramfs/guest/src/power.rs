//! The end: the workload is stopped, the disk is made safe, the power goes.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    mount::{UnmountFlags, unmount},
    process::{Signal, kill_process},
    system::{RebootCommand, reboot},
};

use crate::{
    mounts,
    processes::{self, Target},
    workload::Workload,
};

/// How often it is looked whether the workload has ended by itself.
const LOOK: Duration = Duration::from_millis(10);

/// How long the kernel may take to let go of what was killed.
const KILL_MAX: Duration = Duration::from_secs(5);

/// Asks the workload to end, waits for the grace, then kills what is left, and syncs the disks.
pub fn stop(workload: &Workload, grace: Duration) {
    let entrypoint = workload.entrypoint().filter(|entrypoint| entrypoint.exited().is_none());
    let running = || processes::targets(workload).unwrap_or_default();
    // The entrypoint stops its children itself, at the one signal its image names for it.
    let told = |target: &Target| entrypoint.is_some() && target.of_entrypoint;
    for target in running().iter().filter(|target| !told(target)) {
        // A process may end in between; its number is not given away within the moment.
        let _ = kill_process(target.pid, Signal::TERM);
    }
    if let Some(entrypoint) = &entrypoint {
        entrypoint.signal(workload.settings.stop_signal);
    }
    let patience = Instant::now() + grace;
    while !running().is_empty() && Instant::now() < patience {
        thread::sleep(LOOK);
    }
    let patience = Instant::now() + KILL_MAX;
    // It cannot refuse while the cgroup is there; if it is gone, so is the workload.
    let _ = workload.cgroups().kill_all();
    while !workload.cgroups().is_empty().unwrap_or(true) && Instant::now() < patience {
        thread::sleep(LOOK);
    }
    rustix::fs::sync();
}

/// Unmounts the disk and turns the machine off. Returns only if the kernel refuses.
pub fn off() -> io::Error {
    for mount in [mounts::SANDBOX, mounts::DISK] {
        let patience = Instant::now() + Duration::from_millis(200);
        // The namespace of the workload lets go of its mounts a moment after its last process.
        while unmount(mount, UnmountFlags::empty()) == Err(Errno::BUSY) && Instant::now() < patience
        {
            thread::sleep(LOOK);
        }
    }
    // Whatever is still mounted is clean all the same.
    rustix::fs::sync();
    match reboot(RebootCommand::PowerOff) {
        Ok(()) => io::ErrorKind::Other.into(),
        Err(error) => error.into(),
    }
}
