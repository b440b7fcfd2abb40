//! The microVM as a whole, and the one place that says what may follow what: waiting, booted,
//! paused, over.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use holdfast_wire::vmm::{Config, Phase, Stats};
use kvm_ioctls::VcpuFd;
use log::{error, info};

use crate::{
    boot::{self, BootError, Sources},
    bus::Bus,
    devices::{DeviceError, DeviceSet},
    event::EventSender,
    inherited::{FdError, InheritedFds},
    layout::SERIAL_GSI,
    legacy::serial::SerialPort,
    seccomp::{self, SeccompError, ThreadKind},
    vm::{
        Memory, Vm, VmError,
        gate::Gate,
        memory::{self, MemoryError},
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
    #[error("cannot {wanted} while {phase:?}")]
    WrongPhase { wanted: &'static str, phase: Phase },
    #[error("vCPUs did not stop within {STOP_LIMIT:?}")]
    NotStopped,
}

impl MachineError {
    /// What the operator can do next.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Fd(_) => "the agent passed wrong fds; see its log",
            Self::Memory(_) => "make the memory file as long as the configuration says",
            Self::Vm(_) => "see whether this host has KVM, and this user may use /dev/kvm",
            Self::Wiring(_) => "attach fewer devices",
            Self::Device(error) => error.hint(),
            Self::Boot(_) => "see that kernel and initramfs are whole, and that memory holds them",
            Self::Seccomp(_) => "this host's kernel needs CONFIG_SECCOMP_FILTER",
            Self::Kick(_) | Self::Thread { .. } => "see this sandbox's limit of processes",
            Self::WrongPhase { .. } => "ask for the phase first (Hello tells it)",
            Self::NotStopped => "kill this VMM; its guest cannot be saved",
        }
    }
}

/// One microVM.
pub(crate) struct Machine {
    vm: Vm,
    memory: Memory,
    around: Arc<Surroundings>,
    /// What to load; gone once it was.
    sources: Option<Sources>,
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
        let memory = memory::map(fds.take(config.memory_fd)?, memory_bytes)?;
        let vm = Vm::new(fds.take(config.kvm_fd)?, &memory)?;
        let mut wiring = KvmWiring::new(&vm.fd);
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
        let bus = Bus { devices, serial: Mutex::new(serial) };
        Ok(Self {
            vm,
            memory,
            around: Arc::new(Surroundings { bus, gate: Gate::new(), events }),
            sources: Some(sources),
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
        self.around.gate.open();
        info!(
            load_us = u64::try_from(loaded.as_micros()).unwrap_or(u64::MAX),
            start_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
            vcpus = count;
            "vCPUs started"
        );
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
        let (disks, vsock_rx_bytes, vsock_tx_bytes) = self.around.bus.devices.stats();
        let serial_bytes = self.around.bus.flush_serial();
        let mut stats =
            Stats { disks, vsock_rx_bytes, vsock_tx_bytes, serial_bytes, ..Default::default() };
        for vcpu in &self.vcpus {
            vcpu.counters.add_to(&mut stats.exits);
        }
        stats
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
