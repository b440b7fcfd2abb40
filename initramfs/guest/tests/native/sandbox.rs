//! A sandbox without a microVM: real namespaces, overlay and cgroups of this machine, calls over a
//! Unix socket.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command as Program,
    sync::Arc,
    thread::JoinHandle,
};

use fs_err as fs;
use holdfast_guest::{guest::Guest, mounts, rpc::serve, workload::Site};
use holdfast_wire::{
    WIRE_VERSION,
    frame::{read_frame, write_frame},
    guest::{Call, Output, Request, Start},
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use crate::client::{ANSWER_MAX, Client};

pub(crate) struct Sandbox {
    folder: TempDir,
    cgroups: PathBuf,
    server: Option<JoinHandle<std::io::Result<()>>>,
}

impl Sandbox {
    /// Not started yet.
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests make namespaces: run as root");
        let folder = TempDir::new().unwrap();
        make_image(&folder.path().join("image"));
        // An own file system: this machine's /tmp may be an overlay, which cannot hold another.
        let disk = folder.path().join("disk");
        fs::create_dir(&disk).unwrap();
        mount("tmpfs", &disk, "tmpfs", MountFlags::empty(), None).unwrap();
        let root = folder.path().join("root");
        mounts::join(&folder.path().join("image"), &disk, &root).unwrap();
        let cgroups = cgroup2_mount().join(folder.path().file_name().unwrap());
        fs::create_dir(&cgroups).unwrap();
        let volumes = disk.join("volumes");
        let cgroups_of_site = cgroups.clone();
        let site = Site {
            root,
            hidden: Vec::new(),
            volumes,
            cgroups: cgroups_of_site,
            device: None,
            disk: None,
        };
        let guest = Arc::new(Guest::new(site, None, 1).unwrap());
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let server = std::thread::spawn(move || serve(&listener, &guest));
        Self { folder, cgroups, server: Some(server) }
    }

    pub(crate) fn started() -> Self {
        let sandbox = Self::new();
        assert_eq!(sandbox.start(Start::default()), Ok(()));
        sandbox
    }

    /// The sandbox's root as it lies on this machine.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub(crate) fn power_off(&mut self, grace_ms: u32) {
        let Some(server) = self.server.take() else { return };
        self.simple(Call::PowerOff { grace_ms }).unwrap();
        server.join().unwrap().unwrap();
    }
}

impl Client for Sandbox {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
        stream
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.power_off(0);
        } else if let Ok(stream) = UnixStream::connect(self.folder.path().join("socket")) {
            let call = Call::PowerOff { grace_ms: 0 };
            let _ = write_frame(&mut &stream, &Request { version: WIRE_VERSION, call });
            let _ = stream.set_read_timeout(Some(ANSWER_MAX));
            let _ = read_frame::<Output>(&mut &stream);
        }
        for folder in ["root", "disk"] {
            let _ = unmount(self.folder.path().join(folder), UnmountFlags::DETACH);
        }
        remove_cgroups(&self.cgroups);
    }
}

fn make_image(image: &Path) {
    for folder in ["bin", "etc", "tmp", "home/web", "var/empty"] {
        fs::create_dir_all(image.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", image.join("bin/busybox")).unwrap();
    let applets = Program::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout).unwrap().lines() {
        if applet != "busybox" {
            let _ = fs::os::unix::fs::symlink("busybox", image.join("bin").join(applet));
        }
    }
    fs::write(image.join("bin/data"), "not a program").unwrap();
    let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n";
    fs::write(image.join("etc/passwd"), passwd).unwrap();
    fs::write(image.join("etc/group"), "root:x:0:\nweb:x:1000:\nextra:x:2000:web\n").unwrap();
}

fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    line.and_then(|line| line.split(' ').nth(1)).expect("this machine has a cgroup2 mount").into()
}

fn remove_cgroups(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}
