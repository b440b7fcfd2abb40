//! What fuzz targets call: one function a target, each with the bytes that somebody hostile wrote.

use std::{io::Write, os::unix::net::UnixStream};

use holdfast_wire::{
    frame,
    vmm::{Event, Reply, ToAgent, ToVmm},
};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

pub use crate::devices::fuzzing::{Kind, Step, input, run, steps};
use crate::{
    control::connection::Connection,
    devices::{
        DeviceState,
        testing::{DriverQueue, Rig},
    },
    saved::MachineState,
};

/// What an agent, or whoever got hold of its socket, says.
pub fn control(input: &[u8]) {
    let Ok((mut agent, ours)) = UnixStream::pair() else { return };
    let Ok(mut connection) = Connection::new(ours) else { return };
    let mut requests = Vec::new();
    // In two parts, so that a request may arrive in pieces.
    for part in input.chunks(input.len().div_ceil(2).max(1)) {
        if agent.write_all(part).is_err() || connection.receive(&mut requests).is_err() {
            return;
        }
    }
    for request in requests {
        let mut again = Vec::new();
        frame::write_frame(&mut again, &request).unwrap();
        assert_eq!(frame::read_frame::<ToVmm>(&mut &again[..]).unwrap(), Some(request));
        let reply = ToAgent::Reply(Reply::Refused { reason: "not now".to_owned() });
        if connection.queue(&reply).and_then(|()| connection.send()).is_err() {
            return;
        }
    }
    let last = ToAgent::Event(Event::GuestReady);
    if !connection.has_unsent() && connection.finish(&last).is_ok() {
        // The other direction has the same form, and is read by the agent.
        while let Ok(Some(_)) = frame::read_frame::<ToAgent>(&mut agent) {}
    }
    let mut rest = input;
    while let Ok(Some(_)) = frame::read_frame::<ToAgent>(&mut rest) {}
}

/// What a snapshot brings: the parts of a whole state, or states of devices, by the first byte.
pub fn state(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else { return };
    if which & 1 == 0 {
        let Ok(file) = memfd_create("state", MemfdFlags::CLOEXEC) else { return };
        if rustix::io::write(&file, bytes) == Ok(bytes.len()) {
            let _ = MachineState::read(file);
        }
        if let Ok((state, _)) = postcard::take_from_bytes::<MachineState>(bytes)
            && let Ok(again) = state.encode()
        {
            MachineState::decode(&again).unwrap();
        }
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
        let _ = MachineState::decode(&crate::saved::with_head(&[&length, bytes].concat()));
        return;
    }
    let Ok((states, _)) = postcard::take_from_bytes::<Vec<DeviceState>>(bytes) else { return };
    let rig = Rig::with(Vec::new(), Vec::new(), true);
    rig.devices.pause();
    if rig.devices.restore(&states).is_ok() {
        // What was taken up is told again as it was, and runs.
        let again = rig.devices.save().unwrap();
        assert_eq!(again.len(), states.len());
        rig.devices.resume();
        rig.devices.pause();
    }
}

/// States of devices that were used, as an input of [`state`].
pub fn state_seed() -> Vec<u8> {
    let rig = Rig::with(Vec::new(), Vec::new(), true);
    for device in 0..3 {
        rig.start(device, 1 << 32 | 1 << 29 | 1 << 5);
    }
    rig.devices.pause();
    let mut seed = vec![1];
    seed.extend(postcard::to_allocvec(&rig.devices.save().unwrap()).unwrap());
    seed
}

/// What a guest does to the registers of its devices, and when it is paused and saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Access {
    Read {
        device: u8,
        offset: u16,
        bytes: u8,
    },
    Write {
        device: u8,
        offset: u16,
        bytes: Vec<u8>,
    },
    /// Outside of all windows.
    Stray {
        address: u64,
        bytes: u8,
    },
    /// As a driver should.
    Start {
        device: u8,
        features: u64,
    },
    /// A good request of the queue that was started last.
    Ask {
        queue: u8,
        len: u32,
        write: bool,
    },
    Pause,
    Resume,
    Restore,
    Balloon {
        mib: u32,
    },
}

const ACCESSES_MAX: usize = 64;

/// Registers of every device, with its thread behind it.
pub fn mmio(mut input: &[u8]) {
    let rig = Rig::with(Vec::new(), Vec::new(), true);
    let count = rig.devices.windows().len();
    let mut queues: Vec<DriverQueue> = Vec::new();
    for _ in 0..ACCESSES_MAX {
        let Ok((access, rest)) = postcard::take_from_bytes(input) else { return };
        input = rest;
        let base = |device: u8| rig.devices.windows()[usize::from(device) % count].base;
        match access {
            Access::Read { device, offset, bytes } => {
                let mut data = vec![0xff; usize::from(bytes % 9)];
                rig.devices.read(base(device), offset.into(), &mut data);
            }
            Access::Write { device, offset, mut bytes } => {
                bytes.truncate(8);
                rig.devices.write(base(device), offset.into(), &bytes);
            }
            Access::Stray { address, bytes } => {
                let mut data = vec![0; usize::from(bytes % 9)];
                rig.devices.read(address, 0, &mut data);
                rig.devices.write(address, 0, &data);
            }
            Access::Start { device, features } => {
                queues = rig.start(usize::from(device) % count, features);
            }
            Access::Ask { queue, len, write } => {
                let count = queues.len().max(1);
                if let Some(queue) = queues.get_mut(usize::from(queue) % count) {
                    queue.offer(&[(1 << 20, len, if write { 2 } else { 0 })]);
                    queue.kick();
                }
            }
            Access::Pause => rig.devices.pause(),
            Access::Resume => rig.devices.resume(),
            Access::Restore => {
                rig.devices.pause();
                let states = rig.devices.save().unwrap();
                let other = Rig::with(Vec::new(), Vec::new(), true);
                other.devices.pause();
                other.devices.restore(&states).unwrap();
                other.devices.resume();
                rig.devices.resume();
            }
            Access::Balloon { mib } => {
                let _ = rig.devices.set_balloon(mib);
            }
        }
    }
}

/// An input of these accesses.
pub fn accesses(accesses: &[Access]) -> Vec<u8> {
    accesses.iter().flat_map(|access| postcard::to_allocvec(access).unwrap()).collect()
}
