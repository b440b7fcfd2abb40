//! A microVM with a small image and a writable disk, started by the VMM's own launcher.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use fs_err as fs;
use holdfast_wire::guest::{Call, Info, Output, RPC_PORT, Start};
use tempfile::TempDir;

use crate::client::{ANSWER_MAX, Client};

const DISK_BYTES: u64 = 256 << 20;

/// Longest time to PID 1's report, in an L1 that is itself emulated.
const BOOT_MAX: Duration = Duration::from_secs(60);

/// Image and disk, to boot from as often as wanted.
pub(crate) struct Disks {
    folder: TempDir,
}

pub(crate) struct Machine {
    launcher: Child,
    vsock: PathBuf,
    said: Receiver<String>,
}

impl Disks {
    pub(crate) fn make() -> Self {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("image");
        for inner in ["bin", "etc", "tmp", "folder/deep"] {
            fs::create_dir_all(image.join(inner)).unwrap();
        }
        fs::copy("/bin/busybox", image.join("bin/busybox")).unwrap();
        let applets = Command::new("/bin/busybox").arg("--list").output().unwrap();
        for applet in String::from_utf8(applets.stdout).unwrap().lines() {
            if applet != "busybox" {
                fs::os::unix::fs::symlink("busybox", image.join("bin").join(applet)).unwrap();
            }
        }
        fs::write(image.join("folder/deep/file"), "from the image\n").unwrap();
        let disks = Self { folder };
        run(Command::new("/usr/bin/mkfs.erofs").arg("--quiet").args([disks.image(), image]));
        fs::File::create(disks.disk()).unwrap().set_len(DISK_BYTES).unwrap();
        run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-F"]).arg(disks.disk()));
        disks
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image.erofs")
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk.ext4")
    }

    /// Boots and waits until PID 1 has reported.
    pub(crate) fn boot(&self, memory_mib: u32) -> Machine {
        let mut launcher = Command::new(env::var("HOLDFAST_LAUNCH").expect("HOLDFAST_LAUNCH"))
            .args(["--memory-mib", &memory_mib.to_string(), "--timeout-s", "240"])
            .arg("--disk")
            .arg(format!("{}:ro", self.image().display()))
            .arg("--disk")
            .arg(self.disk())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
        let (say, said) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // A test that has ended listens no more.
                let _ = say.send(line);
            }
        });
        let mut machine = Machine { launcher, vsock: PathBuf::new(), said };
        let vsock = machine.hear("[vsock ");
        machine.vsock = Path::new(vsock.trim_start_matches("[vsock ").trim_end_matches(']')).into();
        machine.hear("GuestReady");
        machine
    }

    /// Boots and starts an empty workload.
    pub(crate) fn start(&self, memory_mib: u32) -> Machine {
        let machine = self.boot(memory_mib);
        let start = Start { host_name: "box".to_owned(), ..Start::default() };
        assert_eq!(machine.start(start), Ok(()));
        machine
    }
}

impl Machine {
    /// Waits until the launcher prints a line with this in it.
    fn hear(&self, text: &str) -> String {
        loop {
            let line = self.said.recv_timeout(BOOT_MAX);
            let line = line.unwrap_or_else(|error| panic!("never heard {text:?}: {error}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn info(&self) -> Info {
        match self.simple(Call::Info).unwrap().swap_remove(0) {
            Output::Info(info) => info,
            other => panic!("info was answered by {other:?}"),
        }
    }

    /// Asks for the power-off and waits for the launcher's end.
    pub(crate) fn power_off(mut self) -> ExitStatus {
        assert_eq!(self.simple(Call::PowerOff { grace_ms: 1000 }), Ok(vec![Output::Done]));
        self.launcher.wait().unwrap()
    }
}

impl Client for Machine {
    fn connect(&self) -> UnixStream {
        let mut stream = UnixStream::connect(&self.vsock).unwrap();
        stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
        stream.write_all(format!("CONNECT {RPC_PORT}\n").as_bytes()).unwrap();
        // Byte by byte: what follows the line is the guest's.
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            answer.extend(byte);
        }
        assert!(answer.starts_with(b"OK "), "{}", String::from_utf8_lossy(&answer));
        stream
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; the VMM ends with the launcher that holds its control socket
        // or when asked, and the microVM with the VMM.
        if let Ok(None) = self.launcher.try_wait() {
            if let Ok(mut stream) = UnixStream::connect(self.vsock.with_file_name("control.sock")) {
                let kill = holdfast_wire::vmm::ToVmm::Kill;
                let _ = holdfast_wire::frame::write_frame(&mut stream, &kill);
            }
            let _ = self.launcher.wait();
        }
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
}
