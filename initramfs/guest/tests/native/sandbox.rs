//! A sandbox without a microVM: real namespaces, overlay and cgroups of this machine, calls over a
//! Unix socket.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command as Program,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use fs_err as fs;
use holdfast_guest::{
    mounts,
    rpc::{Guest, serve},
    workload::Site,
};
use holdfast_wire::{
    WIRE_VERSION,
    frame::{read_frame, write_frame},
    guest::{Call, Command, Exec, Exited, Failure, Input, Output, Request, Start},
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// Longest wait for any one answer: a hang must end as a failure.
const ANSWER_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Sandbox {
    folder: TempDir,
    cgroups: PathBuf,
    server: Option<JoinHandle<std::io::Result<()>>>,
}

/// What an exec said and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    pub(crate) pid: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) exited: Option<Exited>,
}

/// One exec under way.
pub(crate) struct Running {
    pub(crate) stream: UnixStream,
    pub(crate) pid: u32,
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
        let site = Site { root, hidden: Vec::new(), cgroups: cgroups.clone() };
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

    pub(crate) fn start(&self, start: Start) -> Result<(), Failure> {
        self.simple(Call::Start(start)).map(|outputs| assert_eq!(outputs, [Output::Done]))
    }

    /// The sandbox's root as it lies on this machine.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
        stream
    }

    pub(crate) fn call(&self, call: Call) -> UnixStream {
        let mut stream = self.connect();
        write_frame(&mut stream, &Request { version: WIRE_VERSION, call }).unwrap();
        stream
    }

    /// A call without input: all answers, or the failure.
    pub(crate) fn simple(&self, call: Call) -> Result<Vec<Output>, Failure> {
        collect(&mut self.call(call))
    }

    pub(crate) fn begin(&self, exec: Exec) -> Result<Running, Failure> {
        let mut stream = self.call(Call::Exec(exec));
        match read_frame(&mut stream).unwrap() {
            Some(Output::Started { pid }) => Ok(Running { stream, pid }),
            Some(Output::Failed(failure)) => Err(failure),
            other => panic!("an exec began with {other:?}"),
        }
    }

    pub(crate) fn exec(&self, exec: Exec) -> Result<Finished, Failure> {
        self.begin(exec)?.finish()
    }

    pub(crate) fn shell(&self, script: &str) -> Finished {
        self.exec(shell(script)).unwrap()
    }

    /// Names of the sandbox's processes but the first.
    pub(crate) fn process_names(&self) -> Vec<String> {
        match self.simple(Call::Processes).unwrap().as_slice() {
            [Output::Processes(all)] => {
                all.iter().filter(|one| one.pid != 1).map(|one| one.name.clone()).collect()
            }
            other => panic!("processes were answered by {other:?}"),
        }
    }

    pub(crate) fn write(&self, call: Call, content: &[u8]) -> Result<(), Failure> {
        let mut stream = self.call(call);
        for piece in content.chunks(60_000) {
            // A refused write closes the connection while we send.
            if write_frame(&mut stream, &Input::Data(piece.to_vec())).is_err() {
                break;
            }
        }
        let _ = write_frame(&mut stream, &Input::End);
        collect(&mut stream).map(|outputs| assert_eq!(outputs, [Output::Done]))
    }

    pub(crate) fn power_off(&mut self, grace_ms: u32) {
        let Some(server) = self.server.take() else { return };
        self.simple(Call::PowerOff { grace_ms }).unwrap();
        server.join().unwrap().unwrap();
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

impl Running {
    pub(crate) fn send(&mut self, input: Input) {
        write_frame(&mut self.stream, &input).unwrap();
    }

    pub(crate) fn finish(mut self) -> Result<Finished, Failure> {
        let mut finished = Finished { pid: self.pid, ..Finished::default() };
        for output in collect(&mut self.stream)? {
            match output {
                Output::Stdout(bytes) => finished.stdout += &String::from_utf8_lossy(&bytes),
                Output::Stderr(bytes) => finished.stderr += &String::from_utf8_lossy(&bytes),
                Output::Exited(exited) => finished.exited = Some(exited),
                other => panic!("an exec said {other:?}"),
            }
        }
        Ok(finished)
    }
}

pub(crate) fn argv(words: &[&str]) -> Exec {
    exec(Command::Argv(words.iter().map(|&word| word.to_owned()).collect()))
}

pub(crate) fn shell(script: &str) -> Exec {
    exec(Command::Shell(script.to_owned()))
}

pub(crate) fn exec(command: Command) -> Exec {
    Exec { command, env: Vec::new(), cwd: None, user: None, stdin: false, timeout_ms: None }
}

/// Waits for a condition, not for a duration.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let give_up = std::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(std::time::Instant::now() < give_up, "never came: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn collect(stream: &mut UnixStream) -> Result<Vec<Output>, Failure> {
    let mut outputs = Vec::new();
    while let Some(output) = read_frame(stream).unwrap() {
        match output {
            Output::Failed(failure) => return Err(failure),
            output => outputs.push(output),
        }
    }
    Ok(outputs)
}

fn make_image(image: &Path) {
    for folder in ["bin", "etc", "tmp", "home/web"] {
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
