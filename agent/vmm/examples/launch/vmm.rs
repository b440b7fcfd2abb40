//! Starts a VMM the way the agent does, with every resource by fd, and speaks to it.

use std::{
    collections::VecDeque,
    io::{self, PipeReader, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{
            fs::FileExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use fs_err::{File, OpenOptions};
use holdfast_wire::{
    WIRE_VERSION, frame,
    vmm::{
        CONFIG_FD, Config, CpuTemplate, Disk, Event, IoLimits, Network, Reply, Segment, Serial,
        ToAgent, ToVmm,
    },
};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd},
};
use tempfile::TempDir;

use super::sys;

/// Numbers from here on are given to the VMM, clear of the standard streams and [`CONFIG_FD`].
const FIRST_PASSED_FD: RawFd = 10;
/// Longer than any answer takes on a loaded machine; only a hung VMM reaches it.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Of guest memory, at a time: it is a multiple of this.
const COPY_BYTES: usize = 64 * 1024;
/// Disks whose segments are cut to what the guest may see.
const SECTOR_BYTES: u64 = 4096;

/// One disk: files laid end to end.
#[derive(Debug, Clone)]
pub(crate) struct DiskFiles {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) read_only: bool,
    pub(crate) limits: IoLimits,
}

/// What to start.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) vmm: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: Option<PathBuf>,
    pub(crate) command_line: String,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u8,
    pub(crate) disks: Vec<DiskFiles>,
    /// Each on a tap; the fd in it is ignored.
    pub(crate) networks: Vec<(Arc<OwnedFd>, Network)>,
    pub(crate) balloon: bool,
    pub(crate) cpu: CpuTemplate,
    pub(crate) serial_bytes_max: u64,
    /// Serial output goes to [`Vmm::serial_stream`] instead of the log.
    pub(crate) stream_serial: bool,
    /// What a machine was saved as, to go on from.
    pub(crate) saved: Option<Saved>,
}

/// A machine that was saved.
#[derive(Debug, Clone)]
pub(crate) struct Saved {
    pub(crate) state: Vec<u8>,
    /// An image of its memory, mapped privately and opened for reading.
    pub(crate) memory: PathBuf,
}

impl Saved {
    pub(crate) fn state_in(folder: &Path) -> PathBuf {
        folder.join("state")
    }

    pub(crate) fn memory_in(folder: &Path) -> PathBuf {
        folder.join("memory")
    }

    /// What was saved there.
    pub(crate) fn in_folder(folder: &Path) -> Result<Self> {
        let state = fs_err::read(Self::state_in(folder))?;
        Ok(Self { state, memory: Self::memory_in(folder) })
    }
}

/// A VMM that was started. Killed when dropped.
pub(crate) struct Vmm {
    child: Child,
    memory: OwnedFd,
    pub(crate) control: UnixStream,
    events: VecDeque<Event>,
    /// When its program was started: what was made ready for it before is not its time.
    pub(crate) started: Instant,
    /// Ends with the VMM.
    pub(crate) serial_stream: Option<PipeReader>,
    folder: TempDir,
}

impl Launch {
    /// A small machine with nothing attached.
    pub(crate) fn new(vmm: PathBuf, kernel: PathBuf) -> Self {
        Self {
            vmm,
            kernel,
            initramfs: None,
            command_line: String::new(),
            memory_mib: 64,
            vcpus: 1,
            disks: Vec::new(),
            networks: Vec::new(),
            balloon: false,
            cpu: CpuTemplate::Host,
            serial_bytes_max: 1 << 20,
            stream_serial: false,
            saved: None,
        }
    }

    /// Starts the VMM, connects and says Hello. The guest waits for [`ToVmm::Boot`].
    pub(crate) fn start(&self) -> Result<Vmm> {
        let folder = tempfile::tempdir()?;
        let mut passed = Vec::new();
        let (serial, serial_stream) = self.serial(folder.path())?;
        let memory = match &self.saved {
            Some(saved) => open(&saved.memory)?,
            None => {
                let memory = memfd_create("guest-memory", MemfdFlags::CLOEXEC)?;
                ftruncate(&memory, u64::from(self.memory_mib) << 20)?;
                memory
            }
        };
        let given = memory.try_clone()?;
        let config = self.config(folder.path(), serial, given, &mut passed)?;
        let config_fd = config_file(&config)?;
        let mut command = Command::new(&self.vmm);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        sys::place_fd(&mut command, config_fd.as_raw_fd(), CONFIG_FD);
        let started = Instant::now();
        let child =
            command.spawn().with_context(|| format!("cannot start {}", self.vmm.display()))?;
        drop(passed);
        let control = UnixStream::connect(control_path(folder.path()))?;
        control.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut vmm =
            Vmm { child, memory, control, events: VecDeque::new(), started, serial_stream, folder };
        match vmm.ask(&ToVmm::Hello { version: WIRE_VERSION })? {
            Reply::Hello { .. } => Ok(vmm),
            other => bail!("Hello was answered by {other:?}"),
        }
    }

    /// Where the guest's output goes, and where it comes out if it is streamed.
    fn serial(&self, folder: &Path) -> Result<(OwnedFd, Option<PipeReader>)> {
        if self.stream_serial {
            let (reader, writer) = io::pipe()?;
            return Ok((writer.into(), Some(reader)));
        }
        let log = OpenOptions::new().create(true).append(true).open(serial_path(folder))?;
        Ok((log.into_parts().0.into(), None))
    }

    /// Opens everything and names it by number; `passed` keeps it open until the start.
    fn config(
        &self,
        folder: &Path,
        serial: OwnedFd,
        memory: OwnedFd,
        passed: &mut Vec<OwnedFd>,
    ) -> Result<Config> {
        let mut pass = |fd: OwnedFd| -> Result<RawFd> {
            let moved = fcntl_dupfd_cloexec(&fd, FIRST_PASSED_FD)?;
            fcntl_setfd(&moved, FdFlags::empty())?;
            let number = moved.as_raw_fd();
            passed.push(moved);
            Ok(number)
        };
        let empty = || Ok(memfd_create("no-initramfs", MemfdFlags::CLOEXEC)?);
        let initramfs = self.initramfs.as_deref().map_or_else(empty, open)?;
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
        let mut disks = Vec::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let mut segments = Vec::new();
            for path in &disk.files {
                let file = OpenOptions::new().read(true).write(!disk.read_only).open(path)?;
                let bytes = file.metadata()?.len() / SECTOR_BYTES * SECTOR_BYTES;
                segments.push(Segment { fd: pass(file.into_parts().0.into())?, bytes });
            }
            let name = format!("disk{index}");
            let DiskFiles { read_only, limits, .. } = *disk;
            disks.push(Disk { name, read_only, segments, limits });
        }
        let mut networks = Vec::new();
        for (tap, network) in &self.networks {
            networks.push(Network { tap_fd: pass(tap.try_clone()?)?, ..network.clone() });
        }
        Ok(Config {
            version: WIRE_VERSION,
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            memory_fd: pass(memory)?,
            memory_private: self.saved.is_some(),
            written: Vec::new(),
            userfault_fd: None,
            kvm_fd: pass(kvm.into_parts().0.into())?,
            kernel_fd: pass(open(&self.kernel)?)?,
            initramfs_fd: pass(initramfs)?,
            command_line: self.command_line.clone(),
            control_fd: pass(UnixListener::bind(control_path(folder))?.into())?,
            vsock_fd: pass(UnixListener::bind(vsock_path(folder))?.into())?,
            serial: Serial { log_fd: pass(serial)?, bytes_max: self.serial_bytes_max },
            disks,
            networks,
            balloon: self.balloon,
            cpu: self.cpu,
            state_fd: match &self.saved {
                Some(saved) => Some(pass(file_of("state", &saved.state)?)?),
                None => None,
            },
        })
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    Ok(File::open(path)?.into_parts().0.into())
}

fn config_file(config: &Config) -> Result<OwnedFd> {
    file_of("config", &frame::encode(config)?)
}

fn file_of(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
    // Clear of the number it may be placed at: dup2 onto itself would keep close-on-exec.
    let fd = fcntl_dupfd_cloexec(&fd, FIRST_PASSED_FD)?;
    let mut file = File::from_parts(fd.into(), name);
    file.write_all(bytes)?;
    Ok(file.into_parts().0.into())
}

fn control_path(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}

fn vsock_path(folder: &Path) -> PathBuf {
    folder.join("vsock.sock")
}

fn serial_path(folder: &Path) -> PathBuf {
    folder.join("serial.log")
}

impl Vmm {
    /// Sends one request and returns its reply; events that come in between are kept.
    pub(crate) fn ask(&mut self, request: &ToVmm) -> Result<Reply> {
        frame::write_frame(&mut self.control, request)?;
        loop {
            match self.next_message()? {
                ToAgent::Reply(reply) => return Ok(reply),
                ToAgent::Event(event) => self.events.push_back(event),
            }
        }
    }

    /// The next event, waiting for it. Also fails when the VMM says nothing for a minute.
    pub(crate) fn next_event(&mut self) -> Result<Event> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        match self.next_message()? {
            ToAgent::Event(event) => Ok(event),
            ToAgent::Reply(reply) => bail!("a reply nobody asked for: {reply:?}"),
        }
    }

    /// The next event if it comes within `limit`.
    pub(crate) fn event_within(&mut self, limit: Duration) -> Result<Option<Event>> {
        if self.events.is_empty() {
            // The frame is small and comes in one piece, so peeking at its first byte suffices.
            self.control.set_read_timeout(Some(limit))?;
            let peeked =
                rustix::net::recv(&self.control, &mut [0; 1][..], rustix::net::RecvFlags::PEEK);
            self.control.set_read_timeout(Some(ANSWER_LIMIT))?;
            match peeked.map_err(io::Error::from) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        self.next_event().map(Some)
    }

    fn next_message(&mut self) -> Result<ToAgent> {
        frame::read_frame(&mut self.control)?.context("the VMM closed the control socket")
    }

    /// Where the agent connects.
    pub(crate) fn control_path(&self) -> PathBuf {
        control_path(self.folder.path())
    }

    /// Where the host reaches the guest's vsock ports.
    pub(crate) fn vsock_path(&self) -> PathBuf {
        vsock_path(self.folder.path())
    }

    /// What the guest wrote to its serial port so far.
    pub(crate) fn serial(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.serial_raw()?).into_owned())
    }

    /// The same as it came.
    pub(crate) fn serial_raw(&self) -> Result<Vec<u8>> {
        Ok(fs_err::read(serial_path(self.folder.path()))?)
    }

    /// Pauses the machine and saves it: its state, and its memory copied to the file `memory`. It
    /// can go on.
    pub(crate) fn save(&mut self, memory: &Path) -> Result<Saved> {
        match self.ask(&ToVmm::Pause)? {
            Reply::Done => {}
            other => bail!("Pause was answered by {other:?}"),
        }
        let Reply::Saved { state } = self.ask(&ToVmm::Save)? else { bail!("nothing was saved") };
        self.copy_memory(&File::create(memory)?)?;
        Ok(Saved { state, memory: memory.to_owned() })
    }

    /// As the VMM sees it: where its memory is mapped privately, the file has only a part.
    fn copy_memory(&self, to: &File) -> Result<()> {
        let stat = rustix::fs::fstat(&self.memory)?;
        to.set_len(u64::try_from(stat.st_size)?)?;
        let memory = File::open(format!("/proc/{}/mem", self.pid()))?;
        let maps = fs_err::read_to_string(format!("/proc/{}/maps", self.pid()))?;
        // Range of addresses, rights, offset in the file, device, inode, path.
        for fields in maps.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
            let [range, _, offset, _, inode, ..] = fields[..] else { continue };
            if inode.parse() != Ok(stat.st_ino) {
                continue;
            }
            let (start, end) = range.split_once('-').context("no range of addresses")?;
            let number = |text| u64::from_str_radix(text, 16);
            let (start, end, offset) = (number(start)?, number(end)?, number(offset)?);
            let mut page = vec![0; COPY_BYTES];
            for at in (0..end - start).step_by(COPY_BYTES) {
                memory.file().read_exact_at(&mut page, start + at)?;
                if page.iter().any(|byte| *byte != 0) {
                    to.file().write_all_at(&page, offset + at)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of the process.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Bytes of the host's memory under the guest's.
    pub(crate) fn guest_bytes(&self) -> Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.memory)?.st_blocks)? * 512)
    }

    /// Resident KiB that are not guest memory: all mappings but the memory file's.
    pub(crate) fn overhead_kib(&self) -> Result<u64> {
        self.sum_kib("Rss")
    }

    /// Those of them that no file holds: what each VMM has for itself alone.
    pub(crate) fn anonymous_kib(&self) -> Result<u64> {
        self.sum_kib("Anonymous")
    }

    fn sum_kib(&self, wanted: &str) -> Result<u64> {
        let maps = fs_err::read_to_string(format!("/proc/{}/smaps", self.pid()))?;
        let mut guest = false;
        let mut sum = 0;
        for line in maps.lines() {
            match line.split_once(':') {
                Some((key, rest)) if key == wanted && !guest => {
                    sum += rest.trim().trim_end_matches(" kB").parse::<u64>()?;
                }
                // A mapping's first line begins with its range of addresses.
                _ if line.split_once('-').is_some_and(|(start, _)| is_hexadecimal(start)) => {
                    guest = line.contains("memfd:guest-memory");
                }
                _ => {}
            }
        }
        Ok(sum)
    }
}

fn is_hexadecimal(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Fails when it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
