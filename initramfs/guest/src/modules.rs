//! Loads kernel modules from the initramfs, for kernels that are not ours: a distribution's kernel
//! has its virtio drivers and file systems as modules.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::io::Errno;

/// Paths of uncompressed modules, one a line, in the order in which they are to be loaded.
const LIST: &str = "/modules.list";

/// Drivers that are modules find their devices some time after they are loaded.
const DEVICES_WAIT_MAX: Duration = Duration::from_secs(5);
const DEVICES_POLL: Duration = Duration::from_millis(2);

/// Loads what the list names, if there is one, then waits until `devices` are there. Says what
/// could not be loaded; the rest is loaded all the same.
pub(crate) fn load(devices: &[&str]) -> Vec<String> {
    let Ok(list) = fs_err::read_to_string(LIST) else { return Vec::new() };
    let mut troubles = Vec::new();
    for path in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Err(error) = load_one(path) {
            troubles.push(format!("cannot load module {path}: {error}"));
        }
    }
    let give_up = Instant::now() + DEVICES_WAIT_MAX;
    while !devices.iter().all(|device| Path::new(device).exists()) && Instant::now() < give_up {
        thread::sleep(DEVICES_POLL);
    }
    troubles
}

fn load_one(path: &str) -> io::Result<()> {
    let file = fs_err::File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Built in, or listed twice.
        Err(Errno::EXIST) => Ok(()),
        outcome => Ok(outcome?),
    }
}
