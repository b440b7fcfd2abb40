//! One vCPU and its thread: runs the guest, carries each exit to the bus, stops at the gate.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use holdfast_wire::vmm::Exit;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{self, Killable};

use super::{
    VmError,
    exits::ExitCounters,
    gate::{Gate, Pass},
    saved::VcpuState,
};
use crate::{
    bus::Bus,
    event::{Event, EventSender},
    limits::threads::VCPU_STACK_BYTES,
    seccomp::{self, ThreadKind},
    sys::ImmediateExit,
};

/// Signal that fetches a vCPU out of the guest.
fn kick_signal() -> i32 {
    signal::SIGRTMIN()
}

/// Does nothing: that the signal arrives is what ends KVM_RUN.
extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the kick, once a process.
pub(crate) fn install_kick() -> Result<(), vmm_sys_util::errno::Error> {
    signal::register_signal_handler(kick_signal(), on_kick)
}

/// What every vCPU's thread shares.
pub(crate) struct Surroundings {
    pub(crate) bus: Bus,
    pub(crate) gate: Gate,
    pub(crate) events: EventSender,
    /// Registers that a vCPU's state has.
    pub(crate) msrs: Arc<[u32]>,
}

/// A vCPU in its thread.
pub(crate) struct RunningVcpu {
    thread: JoinHandle<()>,
    immediate_exit: ImmediateExit,
    told: Receiver<Result<VcpuState, VmError>>,
    pub(crate) counters: Arc<ExitCounters>,
}

impl RunningVcpu {
    /// Starts the thread; the vCPU runs as soon as it passes the gate.
    pub(crate) fn start(index: u8, fd: VcpuFd, around: Arc<Surroundings>) -> io::Result<Self> {
        let immediate_exit = ImmediateExit::of(&fd)?;
        let counters = Arc::new(ExitCounters::default());
        // One: it is asked again only when it has told.
        let (tell, told) = mpsc::sync_channel(1);
        let vcpu = Vcpu { index, fd, tell, counters: Arc::clone(&counters) };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(VCPU_STACK_BYTES)
            .spawn(move || vcpu.run(&around))?;
        Ok(Self { thread, immediate_exit, told, counters })
    }

    /// What it tells when [`Gate::ask`] has asked. `None`: nothing within `limit`.
    pub(crate) fn state(&self, limit: Duration) -> Option<Result<VcpuState, VmError>> {
        self.told.recv_timeout(limit).ok()
    }

    /// Fetches the vCPU out of the guest, to the gate.
    pub(crate) fn kick(&self) {
        self.immediate_exit.request();
        // Fails only when the thread has ended, and then there is nobody to fetch.
        let _ = self.thread.kill(kick_signal());
    }

    /// Waits for the end of a thread that was dismissed.
    pub(crate) fn join(self) {
        if self.thread.join().is_err() {
            log::error!("a vCPU's thread panicked");
        }
    }
}

struct Vcpu {
    index: u8,
    fd: VcpuFd,
    tell: SyncSender<Result<VcpuState, VmError>>,
    counters: Arc<ExitCounters>,
}

/// Where a vCPU goes from the gate.
#[derive(PartialEq, Eq)]
enum Go {
    On,
    Leave,
}

/// What follows an exit.
enum Next {
    Run,
    Gate,
    End(Exit),
}

impl Vcpu {
    fn run(mut self, around: &Surroundings) {
        if let Err(error) = seccomp::install(ThreadKind::Vcpu) {
            around.events.send(Event::Ended(Exit::VmmError(error.to_string())));
            return around.gate.await_dismissal();
        }
        let mut round = 0;
        if self.wait(around, &mut round) == Go::Leave {
            return;
        }
        loop {
            match self.step(&around.bus) {
                Next::Run => {}
                Next::Gate => {
                    // Taken back before looking at the gate: a request that comes in between is
                    // for an order that the gate already knows.
                    self.fd.set_kvm_immediate_exit(0);
                    if self.wait(around, &mut round) == Go::Leave {
                        return;
                    }
                }
                Next::End(exit) => {
                    around.events.send(Event::Ended(exit));
                    around.gate.await_dismissal();
                    return;
                }
            }
        }
    }

    /// Stands at the gate until it may go on; tells its state when it is asked.
    fn wait(&self, around: &Surroundings, round: &mut u32) -> Go {
        loop {
            match around.gate.pass(round) {
                Pass::Run { waited } => {
                    self.after_wait(waited);
                    return Go::On;
                }
                // Full only when nobody took what was told before, and then nobody waits for this.
                Pass::Tell => _ = self.tell.try_send(VcpuState::read(&self.fd, &around.msrs)),
                Pass::Leave => return Go::Leave,
            }
        }
    }

    /// One stay in the guest, and what it came out for. The gate is only looked at when KVM_RUN
    /// was interrupted: then KVM has finished the instruction of the exit before.
    fn step(&mut self, bus: &Bus) -> Next {
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.counters.count_mmio();
                bus.read_memory(address, data);
                Next::Run
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.counters.count_mmio();
                bus.write_memory(address, data);
                Next::Run
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.counters.count_port_io();
                bus.read_port(port, data);
                Next::Run
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.counters.count_port_io();
                bus.write_port(port, data).map_or(Next::Run, Next::End)
            }
            Ok(other) => {
                self.counters.count_other();
                other_exit(self.index, &other)
            }
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => Next::Gate,
                _ => {
                    let reason = format!("vCPU {} cannot run: {error}", self.index);
                    Next::End(Exit::VmmError(reason))
                }
            },
        }
    }

    /// Tells the guest's clock that it was stopped, lest its watchdog takes the pause for a hang.
    fn after_wait(&self, waited: bool) {
        if waited {
            // Refused while the guest does not use the clock; then there is nothing to tell.
            let _ = self.fd.kvmclock_ctrl();
        }
    }
}

/// Exits that only come up when something ends or is wrong.
fn other_exit(index: u8, exit: &VcpuExit<'_>) -> Next {
    match exit {
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Next::Run,
        VcpuExit::Shutdown => Next::End(Exit::GuestFault(format!("triple fault on vCPU {index}"))),
        VcpuExit::Hlt => {
            Next::End(Exit::GuestFault(format!("vCPU {index} halted with nothing to wake it")))
        }
        VcpuExit::FailEntry(reason, _) => Next::End(Exit::GuestFault(format!(
            "vCPU {index} could not enter the guest: hardware reason {reason:#x}"
        ))),
        VcpuExit::InternalError => Next::End(Exit::GuestFault(format!(
            "vCPU {index} met an instruction that KVM cannot carry out"
        ))),
        other => Next::End(Exit::GuestFault(format!("vCPU {index} left the guest: {other:?}"))),
    }
}
