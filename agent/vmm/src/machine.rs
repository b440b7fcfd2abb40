//! The microVM as a whole, and the one place that says what may follow what: waiting, booted,
//! paused, over.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use holdfast_wire::vmm::{Config, PageRun, Phase, Stats};
use kvm_ioctls::VcpuFd;
use log::{debug, error, info};

use crate::{
    boot::{self, BootError, Sources},
    bus::Bus,
    devices::{DeviceError, DeviceSet, Unfit},
    event::EventSender,
    generation::{Generation, GenerationError},
    inherited::{FdError, InheritedFds},
    layout::{GENERATION_GSI, SERIAL_GSI},
    legacy::serial::SerialPort,
    saved::{MachineState, StateError},
    seccomp::{self, SeccompError, ThreadKind},
    vm::{
        Memory, Vm, VmError,
        gate::Gate,
        memory::{self, MemoryError},
        userfault,
        vcpu::{self, RunningVcpu, Surroundings},
        wiring::{KvmWiring, WiringError},
    },
};

/// A vCPU is out of the guest within microseconds, unless a device holds it in a register access;
/// after this long something is broken.
const STOP_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error(transparent)]
    Fd(#[from] FdError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("guest memory cannot be watched for what is missing (userfaultfd)")]
    Faults(#[source] io::Error),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("handler of the vCPUs' signal cannot be installed")]
    Kick(#[source] vmm_sys_util::errno::Error),
    #[error("thread of vCPU {index} cannot be started")]
    Thread {
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("this machine has no balloon")]
    NoBalloon,
    #[error("a balloon of {target_mib} MiB leaves nothing of {memory_mib} MiB")]
    BalloonTooLarge { target_mib: u32, memory_mib: u32 },
    #[error(transparent)]
    Generation(#[from] GenerationError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("this machine was given no saved state")]
    NoState,
    #[error("vCPU {index} did not tell its state within {STOP_LIMIT:?}")]
    NotTold { index: usize },
    #[error("cannot {wanted} while {phase:?}")]
    WrongPhase { wanted: &'static str, phase: Phase },
    #[error("vCPUs did not stop within {STOP_LIMIT:?}")]
    NotStopped,
    #[error("threads of vCPUs did not start within {STOP_LIMIT:?}")]
    NotStarted,
    #[error("cannot {wanted}: the guest has just ended")]
    Over { wanted: &'static str },
}

impl MachineError {
    /// What the operator can do next.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Fd(_) => "the agent passed wrong fds; see its log",
            Self::Memory(_) => "make the memory file as long as the configuration says",
            Self::Faults(_) => {
                "this host's kernel needs CONFIG_USERFAULTFD and shared memory in it"
            }
            Self::Vm(VmError::Template(_)) => "use the host's own CPU, or another host",
            Self::Vm(VmError::Unlike(_) | VmError::Counter { .. } | VmError::Msr { .. }) => {
                "restore it on a host of the kind it was saved on"
            }
            Self::Vm(VmError::Vcpus { .. }) => "configure the machine as it was when it was saved",
            Self::Vm(_) => "see whether this host has KVM, and this user may use /dev/kvm",
            Self::Wiring(_) => "attach fewer devices",
            Self::Device(error) => error.hint(),
            Self::Boot(_) => "see that kernel and initramfs are whole, and that memory holds them",
            Self::Seccomp(_) => "this host's kernel needs CONFIG_SECCOMP_FILTER",
            Self::Kick(_) | Self::Thread { .. } => "see this sandbox's limit of processes",
            Self::NoBalloon => "configure one before the start; it cannot be added later",
            Self::BalloonTooLarge { .. } => "ask for less",
            Self::Generation(_) => "see whether this host's random number generator works",
            Self::WrongPhase { .. } => "ask for the phase first (Hello tells it)",
            Self::Over { .. } => "wait for the event that says how",
            Self::NotStarted => "see that the host has CPU time to give",
            Self::NotStopped | Self::NotTold { .. } => "kill this VMM; its guest cannot be saved",
            Self::State(_) => "take an earlier snapshot, or a VMM of the release that saved it",
            Self::Unfit(_) => "configure the machine as it was when it was saved",
            Self::NoState => "name one in the configuration, or boot",
        }
    }
}

/// One microVM.
pub(crate) struct Machine {
    vm: Vm,
    memory: Memory,
    memory_mib: u32,
    generation: Generation,
    around: Arc<Surroundings>,
    /// What to load; gone once it was.
    sources: Option<Sources>,
    /// What to restore from; gone once it was.
    state: Option<OwnedFd>,
    /// Tells what is missing of the memory. Its last close would turn that into zeros.
    _faults: Option<OwnedFd>,
    /// Pages that a guest which goes on writes first.
    written: Vec<PageRun>,
    vcpus: Vec<RunningVcpu>,
    /// PID 1 has reported.
    ready: bool,
    paused: bool,
}

impl Machine {
    /// Makes everything but the vCPUs.
    pub(crate) fn new(
        config: &Config,
        fds: &mut InheritedFds,
        events: EventSender,
    ) -> Result<Self, MachineError> {
        vcpu::install_kick().map_err(MachineError::Kick)?;
        let memory_bytes = u64::from(config.memory_mib) << 20;
        let memory = memory::map(fds.take(config.memory_fd)?, memory_bytes, config.memory_private)?;
        let device = config.userfault_fd.map(|fd| fds.take(fd)).transpose()?;
        let faults = match &device {
            Some(device) if config.memory_private => userfault::one_by_one(device, &memory)
                .inspect_err(|error| debug!(error:%; "pages come with their neighbours"))
                .ok(),
            Some(device) => Some(userfault::watch(device, &memory).map_err(MachineError::Faults)?),
            None => None,
        };
        let vm = Vm::new(fds.take(config.kvm_fd)?, &memory, config.cpu)?;
        let mut wiring = KvmWiring::new(&vm.fd);
        let generation = Generation::new(wiring.fixed_line(GENERATION_GSI)?);
        let serial_line = wiring.fixed_line(SERIAL_GSI)?;
        let log = fds.take(config.serial.log_fd)?;
        let serial = SerialPort::new(serial_line, log, config.serial.bytes_max);
        let devices = DeviceSet::new(config, fds, memory.clone(), &mut wiring, events.clone())?;
        let sources = Sources {
            kernel: fds.take(config.kernel_fd)?,
            initramfs: fds.take(config.initramfs_fd)?,
            command_line: config.command_line.clone(),
            memory_bytes,
            vcpus: config.vcpus,
        };
        let state = config.state_fd.map(|fd| fds.take(fd)).transpose()?;
        let bus = Bus { devices, serial: Mutex::new(serial) };
        let around = Surroundings { bus, gate: Gate::new(), events, msrs: vm.msrs() };
        Ok(Self {
            vm,
            memory,
            memory_mib: config.memory_mib,
            generation,
            around: Arc::new(around),
            sources: Some(sources),
            state,
            _faults: faults,
            written: config.written.clone(),
            vcpus: Vec::new(),
            ready: false,
            paused: false,
        })
    }

    pub(crate) fn phase(&self) -> Phase {
        match (self.vcpus.is_empty(), self.paused, self.ready) {
            (true, _, _) => Phase::Waiting,
            (_, true, _) => Phase::Paused,
            (_, _, true) => Phase::Ready,
            (_, _, false) => Phase::Booting,
        }
    }

    /// PID 1 serves.
    pub(crate) fn note_ready(&mut self) {
        self.ready = true;
    }

    /// Loads the kernel and starts the vCPUs.
    pub(crate) fn boot(&mut self) -> Result<(), MachineError> {
        let started = Instant::now();
        let sources = self.sources.take().ok_or(self.wrong_phase("boot"))?;
        let count = sources.vcpus;
        let entry = boot::load(sources, self.around.bus.devices.windows(), &self.memory)?;
        let loaded = started.elapsed();
        let vcpus = self.vm.vcpus(count, entry)?;
        // Those of a machine that is restored have answered already.
        self.around.bus.devices.await_threads();
        self.hold(vcpus)?;
        self.around.gate.open();
        info!(
            load_us = u64::try_from(loaded.as_micros()).unwrap_or(u64::MAX),
            start_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
            vcpus = count;
            "vCPUs started"
        );
        Ok(())
    }

    /// Puts the machine where its state in the configuration was told. It is paused then.
    pub(crate) fn restore(&mut self) -> Result<(), MachineError> {
        let started = Instant::now();
        let count = match &self.sources {
            Some(sources) if self.vcpus.is_empty() => sources.vcpus,
            _ => return Err(self.wrong_phase("restore")),
        };
        let file = self.state.take().ok_or(MachineError::NoState)?;
        // Nothing is left to be booted, whatever comes of it.
        self.sources = None;
        let state = MachineState::read(file)?;
        let (found, wanted) = (state.memory_mib, self.memory_mib);
        if found != wanted {
            return Err(StateError::Memory { found, wanted }.into());
        }
        memory::copy_ahead(&self.memory, &std::mem::take(&mut self.written));
        let vcpus = self.vm.restored_vcpus(count, &state.vcpus, &state.shared)?;
        // After the interrupt controllers: they raise interrupts.
        self.around.bus.devices.restore(&state.devices)?;
        self.around.bus.restore_serial(&state.serial);
        self.hold(vcpus)?;
        (self.ready, self.paused) = (state.ready, true);
        let restore_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        info!(restore_us, vcpus = count; "machine restored");
        Ok(())
    }

    /// What a snapshot keeps of the machine beside memory and disks.
    pub(crate) fn save(&self) -> Result<Vec<u8>, MachineError> {
        if self.phase() != Phase::Paused {
            return Err(self.wrong_phase("save"));
        }
        self.around.gate.ask();
        let told = self.vcpus.iter().enumerate().map(|(index, vcpu)| {
            let state = vcpu.state(STOP_LIMIT).ok_or(MachineError::NotTold { index })?;
            Ok(state?)
        });
        let mut vcpus = told.collect::<Result<Vec<_>, MachineError>>()?;
        self.vm.add_features(&mut vcpus)?;
        let bus = &self.around.bus;
        let state = MachineState {
            memory_mib: self.memory_mib,
            ready: self.ready,
            shared: self.vm.shared_state()?,
            vcpus,
            devices: bus.devices.save()?,
            serial: bus.save_serial(),
        };
        Ok(state.encode()?)
    }

    /// Starts the vCPUs' threads, which wait at the gate.
    fn hold(&mut self, vcpus: Vec<VcpuFd>) -> Result<(), MachineError> {
        // Held back until all threads are there: when one cannot be had, none has run.
        self.around.gate.close();
        if let Err(error) = self.start_threads(vcpus) {
            self.stop();
            return Err(error);
        }
        // The last thread to get its filter; no guest instruction has run yet.
        if let Err(error) = seccomp::install(ThreadKind::Main) {
            self.stop();
            return Err(error.into());
        }
        // Each has its own filter by then, so that whoever sees the guest run sees all of them.
        if !self.around.gate.await_all(self.vcpus.len(), STOP_LIMIT) {
            self.stop();
            return Err(MachineError::NotStarted);
        }
        Ok(())
    }

    fn start_threads(&mut self, vcpus: Vec<VcpuFd>) -> Result<(), MachineError> {
        for (index, fd) in (0u8..).zip(vcpus) {
            let around = Arc::clone(&self.around);
            let running = RunningVcpu::start(index, fd, around)
                .map_err(|source| MachineError::Thread { index: index.into(), source })?;
            self.vcpus.push(running);
        }
        Ok(())
    }

    /// Stops the vCPUs, then drains the devices.
    pub(crate) fn pause(&mut self) -> Result<(), MachineError> {
        if !matches!(self.phase(), Phase::Booting | Phase::Ready) {
            return Err(self.wrong_phase("pause"));
        }
        let gate = &self.around.gate;
        gate.close();
        self.vcpus.iter().for_each(RunningVcpu::kick);
        if !gate.await_all(self.vcpus.len(), STOP_LIMIT) {
            gate.open();
            return Err(MachineError::NotStopped);
        }
        // The event of it has not been taken yet. Who ended would never tell a state.
        if gate.holds_an_end() {
            gate.open();
            return Err(MachineError::Over { wanted: "pause" });
        }
        self.around.bus.devices.pause();
        self.paused = true;
        Ok(())
    }

    pub(crate) fn resume(&mut self) -> Result<(), MachineError> {
        if self.phase() != Phase::Paused {
            return Err(self.wrong_phase("resume"));
        }
        self.around.bus.devices.resume();
        self.paused = false;
        self.around.gate.open();
        Ok(())
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = self.around.bus.devices.stats();
        stats.serial_bytes = self.around.bus.flush_serial();
        for vcpu in &self.vcpus {
            vcpu.counters.add_to(&mut stats.exits);
        }
        stats
    }

    /// Sets how much of its memory the guest shall give up.
    pub(crate) fn set_balloon(&self, target_mib: u32) -> Result<(), MachineError> {
        if target_mib >= self.memory_mib {
            return Err(MachineError::BalloonTooLarge { target_mib, memory_mib: self.memory_mib });
        }
        let there = self.around.bus.devices.set_balloon(target_mib);
        if there { Ok(()) } else { Err(MachineError::NoBalloon) }
    }

    /// Gives the guest a new generation id and tells it. After a restore: before the vCPUs run.
    pub(crate) fn renew_generation(&self) -> Result<(), MachineError> {
        if self.phase() == Phase::Waiting {
            return Err(self.wrong_phase("renew the generation id"));
        }
        Ok(self.generation.renew(&self.memory)?)
    }

    /// Ends the vCPUs' threads, then drains the devices: afterwards nothing touches memory, disks
    /// or logs. A vCPU that does not come is left behind, for the process ends anyway.
    pub(crate) fn stop(&mut self) {
        let gate = &self.around.gate;
        gate.dismiss();
        self.vcpus.iter().for_each(RunningVcpu::kick);
        if !gate.await_left(self.vcpus.len(), STOP_LIMIT) {
            error!("vCPUs did not stop; devices are not drained");
            return;
        }
        self.vcpus.drain(..).for_each(RunningVcpu::join);
        self.around.bus.devices.pause();
        self.around.bus.flush_serial();
    }

    fn wrong_phase(&self, wanted: &'static str) -> MachineError {
        MachineError::WrongPhase { wanted, phase: self.phase() }
    }
}
