//! One vCPU and its thread: runs the guest, carries each exit to the bus, stops at the gate.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
};

use holdfast_wire::vmm::Exit;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{self, Killable};

use super::{
    exits::ExitCounters,
    gate::{Gate, Pass},
};
use crate::{
    bus::Bus,
    event::{Event, EventSender},
    seccomp::{self, ThreadKind},
    sys::ImmediateExit,
};

/// Stack of a vCPU's thread. Its deepest call is a device register access; a guard page follows.
const STACK_BYTES: usize = 64 * 1024;

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
}

/// A vCPU in its thread.
pub(crate) struct RunningVcpu {
    thread: JoinHandle<()>,
    immediate_exit: ImmediateExit,
    pub(crate) counters: Arc<ExitCounters>,
}

impl RunningVcpu {
    /// Starts the thread; the vCPU runs as soon as it passes the gate.
    pub(crate) fn start(index: u8, fd: VcpuFd, around: Arc<Surroundings>) -> io::Result<Self> {
        let immediate_exit = ImmediateExit::of(&fd)?;
        let counters = Arc::new(ExitCounters::default());
        let vcpu = Vcpu { index, fd, counters: Arc::clone(&counters) };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || vcpu.run(&around))?;
        Ok(Self { thread, immediate_exit, counters })
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
    counters: Arc<ExitCounters>,
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
        if around.gate.pass() == Pass::Leave {
            return;
        }
        loop {
            match self.step(&around.bus) {
                Next::Run => {}
                Next::Gate => {
                    // Taken back before looking at the gate: a request that comes in between is
                    // for an order that the gate already knows.
                    self.fd.set_kvm_immediate_exit(0);
                    match around.gate.pass() {
                        Pass::Run { waited } => self.after_wait(waited),
                        Pass::Leave => return,
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
