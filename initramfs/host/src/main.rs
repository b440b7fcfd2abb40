//! PID 1 of the host until its root is mounted: loads the storage modules, finds the root
//! partition, mounts it and becomes systemd.
//!
//! It asks nobody and repairs nothing. When a step fails it says why on the console and ends; the
//! kernel then panics, reboots by `panic=`, and the boot loader counts the failed try.
#![forbid(unsafe_code)]

mod cmdline;
mod disk;
mod gpt;
mod modalias;
mod modules;
mod root;

use std::{
    error::Error,
    fmt::Write as _,
    io::Write as _,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use crate::{
    cmdline::{BadCmdline, Cmdline, RootName},
    modules::{ModuleError, Modules},
    root::RootError,
};

/// How long a disk may take to show itself: RAID controllers with many disks need this long.
const ROOT_WAIT: Duration = Duration::from_secs(60);
/// Pause between two looks at the disks.
const POLL: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    Cmdline(#[from] BadCmdline),
    #[error("cannot read a list of this initramfs")]
    List(#[from] std::io::Error),
    #[error(transparent)]
    Module(#[from] ModuleError),
    #[error("no partition {name} on {} within {} s", list(.disks), ROOT_WAIT.as_secs())]
    NoRoot { name: RootName, disks: Vec<String> },
    #[error(transparent)]
    Root(#[from] RootError),
}

impl BootError {
    /// What the operator can do next.
    fn hint(&self) -> &'static str {
        match self {
            Self::Cmdline(_) => "boot with root=PARTUUID=… of the root partition",
            Self::List(_) | Self::Module(_) => "the boot image is damaged: flash the node again",
            Self::NoRoot { .. } => "check that the disk is attached and holds the flashed image",
            Self::Root(_) => "the root partition is damaged: flash the node again",
        }
    }
}

fn list(disks: &[String]) -> String {
    if disks.is_empty() { "any disk (none seen)".to_owned() } else { disks.join(", ") }
}

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        complain("runs only as PID 1 of the host's initramfs");
        return ExitCode::from(2);
    }
    let Err(error) = boot();
    let mut text = format!("cannot boot: {error}");
    let mut cause = error.source();
    while let Some(next) = cause {
        let _ = write!(text, ": {next}");
        cause = next.source();
    }
    complain(&text);
    complain(error.hint());
    ExitCode::FAILURE
}

fn boot() -> Result<std::convert::Infallible, BootError> {
    root::mount_kernel_filesystems()?;
    let cmdline: Cmdline = fs_err::read_to_string("/proc/cmdline")?.parse()?;
    let mut modules = Modules::open("/modules".as_ref())?;
    for name in modules::ALWAYS {
        modules.load(name)?;
    }
    let device = find_root(&mut modules, &cmdline.root)?;
    say(&format!("root is {} ({})", device.display(), cmdline.root));
    Ok(root::enter(&device, &cmdline.init)?)
}

/// Loads modules for what the buses show until the root partition is there.
fn find_root(modules: &mut Modules, name: &RootName) -> Result<std::path::PathBuf, BootError> {
    let start = Instant::now();
    loop {
        modules.load_for_devices("/sys/bus".as_ref());
        if let Some(device) = disk::find("/sys/class/block".as_ref(), "/dev".as_ref(), name) {
            return Ok(device);
        }
        if start.elapsed() > ROOT_WAIT {
            let disks = disk::names("/sys/class/block".as_ref());
            return Err(BootError::NoRoot { name: name.clone(), disks });
        }
        thread::sleep(POLL);
    }
}

/// One line for the kernel's log.
fn say(text: &str) {
    log(5, text);
}

/// One line that a quiet console shows too.
fn complain(text: &str) {
    log(2, text);
}

fn log(level: u8, text: &str) {
    let line = format!("<{level}>holdfast-host: {text}\n");
    // Without a log there is nowhere left to complain to.
    if let Ok(mut log) = fs_err::OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = log.write_all(line.as_bytes());
    }
}
