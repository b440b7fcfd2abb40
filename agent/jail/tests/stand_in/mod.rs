//! A place to run stand-ins for a VMM in: shell scripts of builtins alone, by a shell that needs no
//! libraries and no files.

#![allow(dead_code, reason = "no test file needs all of it")]

use std::{
    io::PipeWriter,
    path::{Path, PathBuf},
    process::ExitStatus,
};

use holdfast_jail::{
    Cgroup, CgroupTree, Handover, Identity, Jailer, Limits, ProcessLimits, RunFolder, VmmPlan,
    VmmProcess,
};
use holdfast_model::{Mib, MilliCpu};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

/// Who the stand-ins run as.
pub(crate) const IDENTITY: Identity = Identity { uid: 200_017, gid: 200_018 };
pub(crate) const LIMITS: ProcessLimits =
    ProcessLimits { descriptors: 100, threads: 9, file_bytes: 1 << 30 };
pub(crate) const CONFIG: &str = "the configuration\n";

/// Cgroups and run folders of one test. What is dropped of a guard here is not what is tested.
pub(crate) struct Place {
    folder: TempDir,
    jailer: Jailer,
    /// The other end of what [`Place::spawn`] hands over first: scripts that read it wait.
    _hold: PipeWriter,
    held: std::io::PipeReader,
}

impl Place {
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "a shim changes users");
        let folder = tempfile::tempdir().unwrap();
        let (held, hold) = std::io::pipe().unwrap();
        let jailer = Jailer::new(env!("CARGO_BIN_EXE_holdfast-shim"));
        Self { folder, jailer, _hold: hold, held }
    }

    pub(crate) fn runs(&self) -> PathBuf {
        self.folder.path().join("runs")
    }

    fn cgroups(&self) -> PathBuf {
        self.folder.path().join("cgroups")
    }

    /// A run folder and a folder that stands in for a cgroup.
    pub(crate) fn lend(&self, name: &str) -> (RunFolder, Cgroup) {
        fs_err::create_dir_all(self.cgroups()).unwrap();
        let limits = Limits { cpu: MilliCpu(1000), memory: Mib(64), pids: 16 };
        let cgroup = CgroupTree::new(self.cgroups()).create(name, limits).unwrap();
        for (file, text) in [("cgroup.procs", ""), ("cgroup.events", "populated 0\n")] {
            fs_err::write(cgroup.path().join(file), text).unwrap();
        }
        (RunFolder::create(&self.runs(), name).unwrap(), cgroup)
    }

    pub(crate) fn plan<'a>(
        &'a self,
        run: &'a RunFolder,
        cgroup: &'a Cgroup,
        arguments: &'a [&'a str],
    ) -> VmmPlan<'a> {
        VmmPlan {
            jailer: &self.jailer,
            program: Path::new("/bin/busybox"),
            arguments,
            run,
            cgroup,
            identity: IDENTITY,
            limits: LIMITS,
            own_cores: false,
            handover: Handover::default(),
            config: CONFIG.as_bytes(),
            log: run.log("vmm.log").unwrap(),
        }
    }

    /// Runs a script; `handover` comes with it.
    pub(crate) fn spawn(&self, name: &str, script: &str, handover: Handover) -> VmmProcess {
        let (run, cgroup) = self.lend(name);
        let plan = self.plan(&run, &cgroup, &[]);
        let arguments = ["sh", "-c", script];
        let vmm = VmmProcess::spawn(VmmPlan { handover, arguments: &arguments, ..plan });
        let log = || fs_err::read_to_string(run.path().join("vmm.log")).unwrap();
        let vmm = vmm.unwrap_or_else(|error| panic!("{error:?}: {}", log()));
        run.detach();
        cgroup.detach();
        vmm
    }

    /// Runs a stand-in that waits to be killed.
    pub(crate) fn spawn_waiting(&self, name: &str) -> VmmProcess {
        let mut handover = Handover::default();
        let hold = handover.give(&self.held).unwrap();
        self.spawn(name, &format!("read -u {hold} x"), handover)
    }

    /// Waits until a shim has given up its rights, which it does after it told of its VMM.
    pub(crate) fn await_settled(&self, pid: u32) {
        let settled = |text: String| text.contains("NoNewPrivs:\t1");
        while !fs_err::read_to_string(format!("/proc/{pid}/status")).is_ok_and(settled) {
            std::thread::yield_now();
        }
    }

    pub(crate) fn adopt(&self, name: &str) -> (RunFolder, Cgroup) {
        let cgroup = CgroupTree::new(self.cgroups()).adopt(name).unwrap().unwrap();
        (RunFolder::adopt(&self.runs(), name).unwrap().unwrap(), cgroup)
    }

    pub(crate) fn shim_pid(&self, name: &str) -> i32 {
        let pids = fs_err::read_to_string(self.runs().join(name).join("pids")).unwrap();
        pids.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// Waits for the end.
pub(crate) fn ended(vmm: &mut VmmProcess) -> ExitStatus {
    poll(&mut [PollFd::new(&vmm.pidfd(), PollFlags::IN)], None).unwrap();
    vmm.ended().unwrap()
}

/// Is there, and not only as a zombie that waits for its parent.
pub(crate) fn is_alive(pid: u32) -> bool {
    let status = fs_err::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|text| !text.contains("State:\tZ"))
}
