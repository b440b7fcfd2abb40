//! From a record to a running microVM: prepare what the host lends, start the VMM, boot, set the
//! guest up.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Instant,
};

use fs_err as fs;
use holdfast_jail::{
    Adopted, Cgroup, Handover, Identity, JailError, ProcessLimits, RunFolder, Slot, SlotSockets,
    VmmPlan, VmmProcess, guest_memory, keep_cores_apart, sealed_bytes,
};
use holdfast_model::{
    MilliCpu, SandboxId,
    link::{GUEST_MAC, MTU},
};
use holdfast_scheduler::Reservation;
use holdfast_store::SandboxRecord;
use holdfast_wire::{
    WIRE_VERSION, frame,
    vmm::{
        Config, CpuTemplate, Disk, Event, Exit, IoLimits, Network, Phase, Segment, Serial, ToVmm,
    },
};
use rustix::process::Signal;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
};

use super::{
    LaunchError, Mended,
    control::{self, Control},
    filling::{self, Filling, ToFill},
    guest::GuestLink,
    limits,
    node::Node,
    snapshots::{Memory, TakenUp},
    uid::UidLease,
};
use crate::{
    config::Smt,
    egress::Way,
    fault::{self, Point},
    images::Located,
    metrics::End,
};

/// Bytes of serial output kept. The console is quiet: what comes is a panic, and that fits.
const SERIAL_BYTES_MAX: u64 = 256 * 1024;

/// Without the watch over the CPU's counter (where it is not steady, the guest tells the time by
/// KVM's clock) and without averages of pressure: both wake an idle guest again and again. Without
/// the kernel's tests of its own ciphers: they are a third of the boot of a distribution's kernel,
/// and test the same code each time. Ours has none.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1 reboot=k tsc=nowatchdog psi=0 \
                            cryptomgr.notests";

/// Launches under way for each CPU of the node. More would slow every one of them down, so that
/// all are late where some could be early.
const LAUNCHES_PER_CPU: usize = 2;

/// How many launches are under way at once on this node.
pub(super) fn launches_max() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) * LAUNCHES_PER_CPU
}

/// How long each phase of a launch took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BootPhases {
    /// Waiting for other launches to end.
    pub turn_us: u64,
    /// Disk, cgroup, run folder, descriptors.
    pub prepare_us: u64,
    /// The VMM's process, until it answered.
    pub spawn_us: u64,
    /// First instruction until PID 1 serves; of a guest that goes on, until it runs.
    pub boot_us: u64,
    /// Root joined and entrypoint started; of a guest that goes on, until it has its clock.
    pub start_us: u64,
}

impl BootPhases {
    /// Names and microseconds, in their order.
    pub fn list(&self) -> [(&'static str, u64); 5] {
        [
            ("turn", self.turn_us),
            ("prepare", self.prepare_us),
            ("spawn", self.spawn_us),
            ("boot", self.boot_us),
            ("start", self.start_us),
        ]
    }
}

/// A VMM and everything it was lent, in the order of return. Dropping it blocks.
pub(super) struct Machine {
    process: VmmProcess,
    /// What its memory is to be filled with, until that has begun.
    to_fill: Mutex<Option<ToFill>>,
    filling: OnceLock<Filling>,
    cgroup: Cgroup,
    run: RunFolder,
    /// `None`: they were handed over.
    sockets: Option<SlotSockets>,
    uid: UidLease,
    _reservation: Reservation,
    pub(super) made: MadeIn,
}

/// How long the making of a machine took, in microseconds. Zeros of one that was taken over.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MadeIn {
    pub(super) disk_us: u64,
    /// Cgroup, run folder, network slot, descriptors.
    pub(super) jail_us: u64,
    /// The process, not until it answered.
    pub(super) spawn_us: u64,
}

/// What a machine is given that lies in no folder.
pub(super) struct Lent {
    pub(super) uid: UidLease,
    pub(super) reservation: Reservation,
}

/// What an earlier agent left of a sandbox's machine.
pub(super) enum Found {
    Running(Box<Machine>),
    /// Its VMM has ended, in words.
    Ended(End, String),
    Nothing,
}

/// A microVM whose guest serves.
pub(super) struct Booted {
    pub(super) control: Control,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) guest: GuestLink,
    /// What a guest that goes on has mended. `None` of one that has just booted.
    pub(super) mended: Option<Mended>,
    /// What it was told of its link to the outside, as a digest. `None`: not by this agent.
    pub(super) network: Option<String>,
}

impl Machine {
    /// Makes and starts everything up to the VMM's first instruction of its own. Blocks.
    pub(super) fn prepare(
        node: &Node,
        record: &SandboxRecord,
        image: &Located,
        lent: Lent,
        saved: Option<TakenUp>,
    ) -> Result<Self, LaunchError> {
        let Lent { uid, reservation } = lent;
        let resources = record.spec.resources;
        let began = Instant::now();
        let disk = match &saved {
            Some(saved) => node.disks.create_from(&record.id, &saved.disk),
            None => node.disks.create(&record.id, resources.disk),
        };
        let disk = disk.map_err(LaunchError::Disk)?;
        let disk_us = us_since(began);
        fault::at(Point::CreateDisk);
        let began = Instant::now();
        let limits = limits::at_boot(resources, reservation.demand().memory, &node.traffic);
        node.cgroups.prepare()?;
        let cgroup = node.cgroups.create(record.id.as_str(), limits)?;
        fault::at(Point::CreateCgroup);
        let run = RunFolder::create(&node.run, record.id.as_str())?;
        fault::at(Point::CreateRunFolder);

        let mut handover = Handover::default();
        let mut state_fd = None;
        let stood = saved.as_ref().filter(|saved| !matches!(saved.memory, Memory::Nothing));
        if let Some(saved) = stood {
            let state = sealed_bytes(&saved.state).map_err(LaunchError::State)?;
            state_fd = Some(handover.give(state)?);
        }
        let identity = Identity { uid: uid.uid(), gid: uid.uid() };
        let (mut memory_private, mut to_fill, mut written) = (false, None, Vec::new());
        let mut userfault_fd = None;
        if stood.is_some() {
            userfault_fd = Some(handover.give(open_device("/dev/userfaultfd")?)?);
        }
        let memory = match saved.map(|saved| (saved.memory, saved.written)) {
            Some((Memory::Image(image), known)) => {
                (memory_private, written) = (true, known);
                image.into_parts().0.into()
            }
            Some((Memory::Missing(cold), _)) => {
                to_fill = Some(ToFill { cold: *cold, identity });
                guest_memory(resources.memory)?
            }
            Some((Memory::Nothing, _)) | None => guest_memory(resources.memory)?,
        };
        let Slot { tap, sockets } = node.slots.take()?;
        let config = Config {
            version: WIRE_VERSION,
            vcpus: resources.vcpus(),
            memory_mib: resources.memory.0,
            memory_fd: handover.give(memory)?,
            memory_private,
            userfault_fd,
            written,
            kvm_fd: handover.give(open_device("/dev/kvm")?)?,
            kernel_fd: handover.give(open("the guest's kernel", &node.kernel)?)?,
            initramfs_fd: handover.give(open("the guest's initramfs", &node.initramfs)?)?,
            command_line: COMMAND_LINE.to_owned(),
            control_fd: handover.give(run.listen("control.sock")?)?,
            vsock_fd: handover.give(run.listen("vsock.sock")?)?,
            serial: Serial {
                log_fd: handover.give(run.log("serial.log")?)?,
                bytes_max: SERIAL_BYTES_MAX,
            },
            disks: vec![
                image_disk(image, &mut handover)?,
                Disk {
                    name: "disk".to_owned(),
                    read_only: false,
                    segments: vec![Segment {
                        fd: handover.give(disk)?,
                        bytes: resources.disk.bytes(),
                    }],
                    limits: node.traffic.disk_buckets(resources.cpu),
                },
            ],
            networks: vec![Network {
                tap_fd: handover.give(tap)?,
                mac: GUEST_MAC,
                mtu: MTU,
                to_guest: node.traffic.network_buckets(resources.cpu),
                from_guest: node.traffic.network_buckets(resources.cpu),
            }],
            balloon: true,
            cpu: CpuTemplate::Host,
            state_fd,
        };
        let frame = frame::encode(&config)
            .map_err(|error| LaunchError::Image { reason: error.to_string() })?;
        let jail_us = us_since(began);
        let began = Instant::now();
        let process = VmmProcess::spawn(VmmPlan {
            jailer: &node.jailer,
            program: &node.vmm,
            arguments: &[record.id.as_str()],
            run: &run,
            cgroup: &cgroup,
            identity,
            limits: ProcessLimits {
                descriptors: limits::VMM_FDS_MAX,
                threads: limits::VMM_PIDS_MAX,
                file_bytes: resources.disk.bytes(),
            },
            handover,
            config: &frame,
            log: run.log("vmm.log")?,
        })?;
        if node.smt == Smt::CoreScheduling {
            // Before the order to boot: nothing of the guest's has run on any core yet.
            keep_cores_apart(process.pid())?;
        }
        let made = MadeIn { disk_us, jail_us, spawn_us: us_since(began) };
        fault::at(Point::CreateSpawned);
        Ok(Self {
            process,
            to_fill: Mutex::new(to_fill),
            filling: OnceLock::new(),
            cgroup,
            run,
            sockets: Some(sockets),
            uid,
            _reservation: reservation,
            made,
        })
    }

    /// Begins to fill its memory, if that is to be: its VMM has answered, so that it has all it
    /// makes at its start.
    pub(super) fn fill(&self, node: &Arc<Node>) -> Result<(), LaunchError> {
        let waiting = self.to_fill.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(ToFill { cold, identity }) = waiting else { return Ok(()) };
        let filling = Filling::start(node, self.vmm_pid(), identity, cold);
        let filling = filling.map_err(|source| LaunchError::Open { what: "a thread", source })?;
        // It is begun once.
        let _ = self.filling.set(filling);
        Ok(())
    }

    /// Waits until all of its memory is there. The error: it never will be, and the VMM has ended.
    pub(super) async fn filled(&self) -> Result<(), String> {
        match self.filling.get() {
            Some(filling) => filling.done().await,
            None => Ok(()),
        }
    }

    /// Follows its memory, if that is brought while it runs.
    pub(super) fn filling(&self) -> Option<&Filling> {
        self.filling.get()
    }

    /// Goes on filling what an earlier agent had begun to fill. Blocks.
    fn fill_on(&self, node: &Arc<Node>, record: &SandboxRecord) -> Result<(), LaunchError> {
        let wanting = filling::is_wanting(self.vmm_pid());
        let wanting =
            wanting.map_err(|source| LaunchError::Open { what: "the VMM's memory", source })?;
        let Some(saved) = record.saved.as_ref().filter(|_| wanting) else { return Ok(()) };
        let cold = node.snapshots.cold(&record.group, &saved.snapshot);
        if let Some((cold, _)) = cold.map_err(LaunchError::Snapshot)? {
            let identity = Identity { uid: self.uid.uid(), gid: self.uid.uid() };
            let to_fill = ToFill { cold, identity };
            *self.to_fill.lock().unwrap_or_else(PoisonError::into_inner) = Some(to_fill);
        }
        self.fill(node)
    }

    /// Takes over what an earlier agent had lent to a sandbox, if its VMM runs still. Blocks.
    pub(super) fn adopt(
        node: &Node,
        id: &SandboxId,
        lent: impl FnOnce() -> Option<Lent>,
    ) -> Result<Found, JailError> {
        let cgroup = node.cgroups.adopt(id.as_str())?;
        let run = RunFolder::adopt(&node.run, id.as_str())?;
        let (Some(cgroup), Some(run)) = (cgroup, run) else { return Ok(Found::Nothing) };
        match VmmProcess::adopt(&run, &cgroup)? {
            Adopted::Running(process) => Ok(match lent() {
                Some(Lent { uid, reservation }) => Found::Running(Box::new(Self {
                    process,
                    to_fill: Mutex::new(None),
                    filling: OnceLock::new(),
                    cgroup,
                    run,
                    sockets: None,
                    uid,
                    _reservation: reservation,
                    made: MadeIn::default(),
                })),
                None => Found::Nothing,
            }),
            Adopted::Ended(status) => {
                let out_of_memory = cgroup.ran_out_of_memory();
                let end = end_of(None, status, out_of_memory);
                Ok(Found::Ended(end, describe_end(None, status, out_of_memory)))
            }
        }
    }

    /// Leaves all of it as it is, for the next agent.
    pub(super) fn detach(self) {
        let Self { process, cgroup, run, .. } = self;
        process.detach();
        cgroup.detach();
        run.detach();
    }

    /// Connects to a VMM that was booted long ago. Its guest has reported already.
    pub(super) async fn connect(
        &self,
        node: &Arc<Node>,
        record: &SandboxRecord,
    ) -> Result<Booted, LaunchError> {
        let (control, events, phase) = control::connect(&self.control_path()).await?;
        tokio::task::block_in_place(|| self.fill_on(node, record))?;
        match phase {
            Phase::Ready => {}
            Phase::Paused => control
                .demand(ToVmm::Resume)
                .await?
                .map_err(|reason| LaunchError::Refused { reason })?,
            Phase::Waiting | Phase::Booting => {
                return Err(LaunchError::Ended { reason: format!("its VMM is {phase:?}") });
            }
        }
        let guest = GuestLink::new(self.vsock_path());
        Ok(Booted { control, events, guest, mended: None, network: None })
    }

    pub(super) fn control_path(&self) -> PathBuf {
        self.run.path().join("control.sock")
    }

    /// Holds it to so much CPU. Not before its guest is set up: a boot gets what there is.
    pub(super) fn limit_cpu(&self, cpu: MilliCpu) -> Result<(), JailError> {
        self.cgroup.limit_cpu(cpu)
    }

    pub(super) fn vmm_pid(&self) -> u32 {
        self.process.pid()
    }

    /// The sockets of its slot, once, or what they are found by. Blocks for a moment.
    pub(super) fn way_out(&mut self) -> Result<Way, JailError> {
        match self.sockets.take() {
            Some(sockets) => Ok(Way::Sockets(sockets)),
            None => Ok(Way::Tap(self.process.tap()?)),
        }
    }

    pub(super) fn cgroup_path(&self) -> &Path {
        self.cgroup.path()
    }

    pub(super) fn vsock_path(&self) -> PathBuf {
        self.run.path().join("vsock.sock")
    }

    /// Waits until the VMM's process has ended.
    pub(super) async fn ended(&self) -> std::io::Result<()> {
        let ended = self.process.pidfd().try_clone_to_owned()?;
        #[expect(deprecated, reason = "the replacement is unsafe, and an owned fd stays open")]
        let watched = AsyncFd::with_interest(ended, Interest::READABLE)?;
        watched.readable().await.map(|_| ())
    }

    /// Why it ended, from the VMM's own last word if there was one, its wait status, and its
    /// cgroup: in one word and in a sentence. Ends it if it runs still.
    pub(super) fn post_mortem(&mut self, last_word: Option<Exit>) -> (End, String) {
        if last_word.is_none() {
            self.process.kill();
        }
        let out_of_memory = self.cgroup.ran_out_of_memory();
        let status = self.process.ended();
        if let Some(reason) = self.filling.get().and_then(Filling::failure) {
            return (End::VmmError, format!("its memory could not be filled: {reason}"));
        }
        let end = end_of(last_word.as_ref(), status, out_of_memory);
        (end, describe_end(last_word, status, out_of_memory))
    }

    /// The last lines of the guest's serial port and of the VMM's log, for the agent's log.
    pub(super) fn last_words(&self) -> (String, String) {
        (tail(&self.run.path().join("serial.log")), tail(&self.run.path().join("vmm.log")))
    }
}

/// Why a machine ended, for counting.
fn end_of(last_word: Option<&Exit>, status: Option<ExitStatus>, out_of_memory: bool) -> End {
    let code = status.and_then(|status| status.code());
    match last_word.cloned().or_else(|| code.and_then(Exit::from_code)) {
        Some(Exit::PowerOff) => End::PowerOff,
        Some(Exit::Reset) => End::Reset,
        Some(Exit::GuestPanic) => End::GuestPanic,
        Some(Exit::GuestFault(_)) => End::GuestFault,
        Some(Exit::Killed) => End::Killed,
        Some(Exit::VmmError(_)) => End::VmmError,
        None if out_of_memory => End::OutOfMemory,
        None => match status.and_then(|status| status.signal()) {
            Some(signal) if signal == Signal::SYS.as_raw() => End::Seccomp,
            Some(_) => End::Signal,
            None => End::Unknown,
        },
    }
}

/// Says in words why a machine ended.
pub(super) fn describe_end(
    last_word: Option<Exit>,
    status: Option<ExitStatus>,
    out_of_memory: bool,
) -> String {
    let exit = last_word.or_else(|| status.and_then(|s| s.code()).and_then(Exit::from_code));
    match (exit, status) {
        (Some(Exit::PowerOff), _) => "the guest powered itself off".to_owned(),
        (Some(Exit::Reset), _) => "the guest restarted itself".to_owned(),
        (Some(Exit::GuestPanic), _) => "the guest's kernel panicked".to_owned(),
        (Some(Exit::GuestFault(reason)), _) => {
            format!("the guest did what cannot be carried on from: {reason}")
        }
        (Some(Exit::Killed), _) => "the VMM was told to end".to_owned(),
        (Some(Exit::VmmError(reason)), _) => format!("the VMM failed: {reason}"),
        (None, _) if out_of_memory => {
            "the VMM was killed: it used up the memory of its cgroup".to_owned()
        }
        (None, Some(status)) => {
            let how = holdfast_jail::in_words(status);
            if end_of(None, Some(status), false) == End::Seccomp {
                "the VMM was killed by its system call filter".to_owned()
            } else if status.code().is_some() {
                format!("the VMM ended with {how}; its log may say why")
            } else {
                format!("the VMM was killed by {how}")
            }
        }
        (None, None) => "the VMM closed its control connection".to_owned(),
    }
}

fn image_disk(image: &Located, handover: &mut Handover) -> Result<Disk, LaunchError> {
    let mut segments = Vec::with_capacity(image.record.segments.len());
    for segment in &image.record.segments {
        let file = image.open(&segment.path).map_err(|error| open_error("the image", error))?;
        segments.push(Segment { fd: handover.give(file)?, bytes: segment.bytes });
    }
    let limits = IoLimits::default();
    Ok(Disk { name: "image".to_owned(), read_only: true, segments, limits })
}

fn open_device(path: &'static str) -> Result<fs::File, LaunchError> {
    let device = fs::OpenOptions::new().read(true).write(true).open(path);
    device.map_err(|error| open_error(path, error))
}

fn open(what: &'static str, path: &Path) -> Result<fs::File, LaunchError> {
    fs::File::open(path).map_err(|error| open_error(what, error))
}

fn open_error(what: &'static str, source: std::io::Error) -> LaunchError {
    LaunchError::Open { what, source }
}

fn tail(path: &Path) -> String {
    /// Of each log: enough for a panic's last lines.
    const TAIL_BYTES: usize = 4096;
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]).into_owned()
}

pub(super) fn ms_since(began: Instant) -> u64 {
    us_since(began) / 1000
}

pub(super) fn us_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_told_from_the_last_word_then_the_cgroup_then_the_wait_status() {
        let signal = |number| Some(ExitStatus::from_raw(number));
        let code = |code: i32| Some(ExitStatus::from_raw(code << 8));
        let cases = [
            (Some(Exit::GuestPanic), signal(9), true, "the guest's kernel panicked"),
            (None, signal(9), true, "the VMM was killed: it used up the memory of its cgroup"),
            (None, signal(9), false, "the VMM was killed by signal 9"),
            (None, signal(31), false, "the VMM was killed by its system call filter"),
            (None, code(10), false, "the guest restarted itself"),
            (None, code(0), false, "the guest powered itself off"),
            (None, code(101), false, "the VMM ended with exit code 101; its log may say why"),
            (None, None, false, "the VMM closed its control connection"),
        ];
        for (word, status, oom, text) in cases {
            assert_eq!(describe_end(word, status, oom), text);
        }
    }

    #[test]
    fn every_end_is_counted_as_what_it_was() {
        let signal = |number| Some(ExitStatus::from_raw(number));
        let code = |code: i32| Some(ExitStatus::from_raw(code << 8));
        let cases = [
            (Some(Exit::GuestPanic), signal(9), true, End::GuestPanic),
            (None, code(0), false, End::PowerOff),
            (None, code(10), false, End::Reset),
            (None, code(12), false, End::GuestFault),
            (None, code(13), false, End::Killed),
            (None, code(1), false, End::VmmError),
            (None, signal(9), true, End::OutOfMemory),
            (None, signal(31), false, End::Seccomp),
            (None, signal(11), false, End::Signal),
            (None, code(101), false, End::Unknown),
            (None, None, false, End::Unknown),
        ];
        for (word, status, oom, end) in cases {
            assert_eq!(end_of(word.as_ref(), status, oom), end, "{word:?} {status:?}");
        }
    }
}
