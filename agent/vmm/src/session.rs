//! The life of one VMM after its start: requests of the agent and events of the machine, one at a
//! time, until the microVM is over.

use holdfast_wire::{
    WIRE_VERSION,
    vmm::{self, Exit, Reply, ToVmm},
};
use log::{Level, log, warn};

use crate::{
    chain,
    control::Control,
    event::{Event, EventReceiver},
    machine::{Machine, MachineError},
};

pub(crate) struct Session {
    machine: Machine,
    control: Control,
    events: EventReceiver,
}

impl Session {
    pub(crate) fn new(machine: Machine, control: Control, events: EventReceiver) -> Self {
        Self { machine, control, events }
    }

    /// Serves until the microVM is over; then stops what runs and tells the agent.
    pub(crate) fn serve(mut self) -> Exit {
        let exit = loop {
            if let Some(exit) = self.turn() {
                break exit;
            }
        };
        self.machine.stop();
        self.control.farewell(vmm::Event::Exited(exit.clone()));
        exit
    }

    /// One wait and what it brought. `Some` when the microVM is over.
    fn turn(&mut self) -> Option<Exit> {
        let wake = match self.control.wait() {
            Ok(wake) => wake,
            Err(error) => return Some(Exit::VmmError(format!("control wait failed: {error}"))),
        };
        let asked = wake.requests.into_iter().find_map(|request| self.answer(request));
        let happened = if wake.events { self.take_events() } else { None };
        happened.or(asked)
    }

    fn take_events(&mut self) -> Option<Exit> {
        for event in self.events.drain() {
            match event {
                Event::GuestReady => {
                    self.machine.note_ready();
                    self.control.event(vmm::Event::GuestReady);
                }
                Event::DeviceStopped { device, reason } => {
                    warn!(device:%, reason:%; "device stopped");
                    self.control.event(vmm::Event::DeviceStopped { device, reason });
                }
                Event::Ended(exit) => return Some(exit),
            }
        }
        None
    }

    fn answer(&mut self, request: ToVmm) -> Option<Exit> {
        if let ToVmm::Hello { version } = request {
            self.hello(version);
            return None;
        }
        if !self.control.greeted() {
            self.control.refuse("the first message must be Hello".to_owned());
            return None;
        }
        // Statistics are asked for all the time.
        let level = if request == ToVmm::Stats { Level::Debug } else { Level::Info };
        log!(level, request:?; "asked");
        let done = match request {
            ToVmm::Hello { .. } => Ok(()),
            ToVmm::Boot => self.machine.boot(),
            ToVmm::Pause => self.machine.pause(),
            ToVmm::Resume => self.machine.resume(),
            ToVmm::Balloon { target_mib } => self.machine.set_balloon(target_mib),
            ToVmm::RenewGeneration => self.machine.renew_generation(),
            ToVmm::Stats => {
                let stats = self.machine.stats();
                self.control.reply(Reply::Stats(stats));
                return None;
            }
            ToVmm::Restore => self.machine.restore(),
            ToVmm::Save => {
                let saved = self.machine.save();
                let reply = saved.map_or_else(refused, |state| Reply::Saved { state });
                self.control.reply(reply);
                return None;
            }
            ToVmm::Kill => {
                self.control.reply(Reply::Done);
                return Some(Exit::Killed);
            }
        };
        self.control.reply(done.map_or_else(refused, |()| Reply::Done));
        None
    }

    fn hello(&mut self, version: u16) {
        if version == WIRE_VERSION {
            let phase = self.machine.phase();
            self.control.greet(Reply::Hello { version: WIRE_VERSION, phase });
        } else {
            let reason = format!("version {version} asked for; this VMM speaks {WIRE_VERSION}");
            self.control.refuse(reason);
        }
    }
}

fn refused(error: MachineError) -> Reply {
    let hint = error.hint();
    warn!(reason:% = chain(&error), hint:%; "request refused");
    Reply::Refused { reason: chain(&error) }
}
