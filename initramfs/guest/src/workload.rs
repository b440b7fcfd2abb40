//! The workload's world: a mount, pid and cgroup namespace that one process holds open, and the
//! settings everything in it runs with.
//!
//! PID 1 itself stays outside. A thread that has something to do inside enters with
//! [`Workload::enter`] and stays there until it ends: paths it resolves are then the sandbox's,
//! mounts made by the workload included. It must not start threads from there: the kernel refuses
//! threads across pid namespaces.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use holdfast_wire::guest::{Failure, FailureKind, Network, Start};
use rustix::{
    fs::{CWD, Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
    process::Pid,
    thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces},
};

use crate::{
    cgroup::{Cgroup, Cgroups, Limits},
    children::Children,
    entrypoint::Entrypoint,
    environment::Environment,
    failure::{failure, from_errno, from_io, invalid},
    root, signals, sys, trust, volumes,
};

/// Where a workload is put.
#[derive(Debug, Clone)]
pub struct Site {
    /// Mount that becomes the sandbox's root.
    pub root: PathBuf,
    /// Mounts that the sandbox's namespace must not keep.
    pub hidden: Vec<&'static str>,
    /// Folder of the disk for the image's volumes.
    pub volumes: PathBuf,
    /// Folder of a cgroup2 mount.
    pub cgroups: PathBuf,
    /// The link to the outside. `None`: there is none that is ours.
    pub device: Option<&'static str>,
    /// Where the sandbox's own disk is mounted. `None`: what it writes to is others' too.
    pub disk: Option<PathBuf>,
}

/// What everything inside runs with unless an exec says otherwise.
#[derive(Debug)]
pub struct Settings {
    pub environment: Environment,
    pub cwd: String,
    pub user: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub stop_signal: i32,
}

#[derive(Debug)]
pub struct Workload {
    pub settings: Settings,
    pub children: Arc<Children>,
    cgroups: Cgroups,
    /// Process 1 of the sandbox. It does nothing and cannot be killed from inside.
    holder: sys::Child,
    /// The holder's own cgroup; kept so that it is removed with the workload.
    _holder_cgroup: Cgroup,
    /// PID 1's own `/dev/null`: the sandbox's could be anything.
    null: OwnedFd,
    entrypoint: Mutex<Option<Arc<Entrypoint>>>,
}

/// Proof that the current thread is inside: paths mean the sandbox's. Not to be sent elsewhere.
#[derive(Debug)]
pub struct Inside(PhantomData<*const ()>);

impl Settings {
    fn parse(start: &Start) -> Result<Self, Failure> {
        let mut environment = Environment::with_defaults(&start.host_name);
        environment.extend(&start.env)?;
        let cwd = if start.cwd.is_empty() { "/" } else { &start.cwd };
        if !cwd.starts_with('/') || cwd.contains('\0') {
            return Err(invalid(format!("working directory {cwd:?} is not an absolute path")));
        }
        let stop_signal = match start.stop_signal.as_str() {
            "" => signals::DEFAULT_STOP,
            name => signals::parse(name)
                .ok_or_else(|| invalid(format!("stop signal {name:?} is not a signal")))?,
        };
        Ok(Self {
            environment,
            cwd: cwd.to_owned(),
            user: start.user.clone(),
            entrypoint: start.entrypoint.clone(),
            cmd: start.cmd.clone(),
            stop_signal,
        })
    }
}

impl Workload {
    /// Makes the namespaces and the root. The calling thread's root and mounts become the
    /// sandbox's, so it must be one that does nothing else afterwards.
    pub fn create(
        site: &Site,
        (start, network): (&Start, Option<&Network>),
        limits: Limits,
        children: Arc<Children>,
    ) -> Result<Self, Failure> {
        let mut settings = Settings::parse(start)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let null = rustix::fs::openat(CWD, "/dev/null", flags, Mode::empty())
            .map_err(|error| from_errno("cannot open /dev/null", error))?;
        let cgroups = Cgroups::create(&site.cgroups, limits)
            .map_err(|error| from_io("cannot make the workload's cgroup", &error))?;
        let volumes = volumes::prepare(&site.volumes, &start.volumes)?;
        root::enter_root(&site.root, &site.hidden)
            .map_err(|error| from_errno("cannot enter the sandbox's root", error))?;
        volumes::mount(volumes)?;
        root::populate(&start.host_name)
            .map_err(|error| from_io("cannot fill the sandbox's root", &error))?;
        if let Some(network) = network {
            root::name_server(network.gateway);
            for (name, value) in trust::install(&network.ca_pem) {
                settings.environment.set_default(name, value);
            }
        }
        fs_err::create_dir_all(&settings.cwd)
            .map_err(|error| from_io("cannot make the working directory", &error))?;
        let (holder, holder_cgroup) = hold(&cgroups)?;
        Ok(Self {
            settings,
            children,
            cgroups,
            holder,
            _holder_cgroup: holder_cgroup,
            null,
            entrypoint: Mutex::new(None),
        })
    }

    /// Moves the calling thread inside, for good.
    pub fn enter(&self) -> Result<Inside, Failure> {
        let gone =
            |error| from_errno("cannot enter the sandbox: is its first process gone?", error);
        // Threads share root and working directory until they say otherwise.
        sys::unshare(UnshareFlags::FS).map_err(gone)?;
        let both = ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::PROCESS_ID;
        move_into_thread_name_spaces(self.holder.pidfd.as_fd(), both).map_err(gone)?;
        rustix::process::umask(Mode::from_raw_mode(0o022));
        Ok(Inside(PhantomData))
    }

    pub fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }

    pub fn holder(&self) -> BorrowedFd<'_> {
        self.holder.pidfd.as_fd()
    }

    pub fn holder_pid(&self) -> Pid {
        self.holder.pid
    }

    pub fn null(&self) -> BorrowedFd<'_> {
        self.null.as_fd()
    }

    pub fn entrypoint(&self) -> Option<Arc<Entrypoint>> {
        self.entrypoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_entrypoint(&self, entrypoint: Arc<Entrypoint>) {
        *self.entrypoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(entrypoint);
    }
}

/// Starts the process that holds the namespaces, and waits until it has mounted what only it can.
fn hold(cgroups: &Cgroups) -> Result<(sys::Child, Cgroup), Failure> {
    let cgroup =
        cgroups.named("init").map_err(|error| from_io("cannot make the init cgroup", &error))?;
    let (told, report) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| from_errno("cannot make a pipe", error))?;
    // Its cgroup at this moment becomes the root of the sandbox's cgroup namespace.
    let holder = sys::spawn_holder(cgroups.workload(), report.as_fd())
        .map_err(|error| from_io("cannot start the sandbox's first process", &error))?;
    drop(report);
    let mut number = [0; sys::REPORT_BYTES];
    let count = rustix::io::retry_on_intr(|| rustix::io::read(&told, &mut number));
    match (count, i32::from_ne_bytes(number)) {
        (Ok(sys::REPORT_BYTES), 0) => {}
        (Ok(sys::REPORT_BYTES), number) => {
            let error = io::Error::from_raw_os_error(number);
            return Err(from_io("cannot mount /proc and /sys/fs/cgroup of the sandbox", &error));
        }
        _ => {
            let message = "the sandbox's first process ended at once";
            return Err(failure(FailureKind::Internal, message));
        }
    }
    cgroup
        .adopt(holder.pid)
        .map_err(|error| from_io("cannot move the sandbox's first process", &error))?;
    // PID 1 of the machine is never chosen by the out-of-memory killer; process 1 of the sandbox
    // would be. This is its own /proc, which nobody but the holder has touched yet.
    match fs_err::write("/proc/1/oom_score_adj", "-1000") {
        // Root of a container without CAP_SYS_RESOURCE, where tests run; PID 1 has it.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        outcome => outcome
            .map_err(|error| from_io("cannot protect the sandbox's first process", &error))?,
    }
    Ok((holder, cgroup))
}
