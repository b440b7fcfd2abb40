//! Devices that are saved in one machine and go on in another.

use std::io::{Read, Write};

use virtio_bindings::virtio_mmio::*;

use super::{
    saved::{DeviceState, RingState, WorkerState},
    testing::*,
};

const RNG: usize = 0;
const VSOCK: usize = 1;
const RECEIVE: usize = 0;
const EVENTS: usize = 2;
const SIXTEEN: Piece = (BUFFERS, 16, WRITE);

fn rig() -> Rig {
    Rig::new(Vec::new())
}

fn saved(rig: &Rig) -> Vec<DeviceState> {
    rig.devices.pause();
    rig.devices.save().unwrap()
}

/// A rig whose entropy device has answered some requests, with its queue.
fn used() -> (Rig, Vec<DriverQueue>) {
    let rig = rig();
    let mut queues = rig.start(RNG, VERSION_1 | 1 << 29);
    for _ in 0..5 {
        assert_eq!(queues[0].ask(&[SIXTEEN]), 16);
    }
    (rig, queues)
}

#[test]
fn a_queue_goes_on_where_it_stood_and_a_request_nobody_had_looked_at_is_answered() {
    let (first, mut queues) = used();
    first.devices.pause();
    // Its kick is lost with the first machine.
    let head = queues[0].offer(&[SIXTEEN]);
    let states = first.devices.save().unwrap();
    let second = rig();
    second.take_over(&first, RNG, &mut queues);
    second.devices.restore(&states).unwrap();
    assert!(queues[0].try_take().is_none(), "answered while paused");
    assert_eq!(second.read(RNG, VIRTIO_MMIO_STATUS), STARTED);
    second.devices.resume();
    assert_eq!(queues[0].take(), (head.into(), 16));
    for _ in 0..20 {
        assert_eq!(queues[0].ask(&[SIXTEEN]), 16);
    }
}

#[test]
fn what_is_restored_is_what_was_saved() {
    let (first, mut queues) = used();
    // Not acknowledged: the interrupt of the last answer.
    assert_eq!(first.read(RNG, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    let states = saved(&first);
    let second = rig();
    second.take_over(&first, RNG, &mut queues);
    second.devices.restore(&states).unwrap();
    assert_eq!(second.devices.save().unwrap(), states);
    // It may not have come through.
    second.wait_interrupt(RNG);
}

#[test]
fn a_guest_is_told_that_its_connections_are_gone_once_it_offers_a_buffer_for_it() {
    let first = rig();
    let mut queues = first.start(VSOCK, VERSION_1 | 1 << 29);
    let states = saved(&first);
    let second = rig();
    second.take_over(&first, VSOCK, &mut queues);
    second.store(BUFFERS, &[0xff; 8]);
    second.devices.restore(&states).unwrap();
    second.devices.resume();
    let event = (BUFFERS, 8, WRITE);
    assert_eq!(queues[EVENTS].ask(&[event]), 4);
    assert_eq!(second.bytes(BUFFERS, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    // Once.
    queues[EVENTS].offer(&[event]);
    queues[EVENTS].kick();
    second.devices.pause();
    second.devices.resume();
    second.devices.pause();
    assert!(queues[EVENTS].try_take().is_none());
}

#[test]
fn a_client_waits_until_the_guest_has_dealt_with_the_loss_of_its_connections() {
    let first = rig();
    let mut queues = first.start(VSOCK, VERSION_1 | 1 << 29);
    let states = saved(&first);
    let second = rig();
    second.take_over(&first, VSOCK, &mut queues);
    queues[RECEIVE].offer(&[(BUFFERS, 4096, WRITE)]);
    for slot in 1..=3 {
        queues[EVENTS].offer(&[(BUFFERS + slot * 4096, 8, WRITE)]);
    }
    second.devices.restore(&states).unwrap();
    second.devices.resume();
    assert_eq!(queues[EVENTS].take(), (0, 4));

    let mut client = second.connect();
    client.write_all(b"CONNECT 5\n").unwrap();
    for _ in 0..3 {
        second.devices.pause();
        second.devices.resume();
    }
    assert!(queues[RECEIVE].try_take().is_none(), "the guest would drop this one too");

    queues[EVENTS].offer(&[(BUFFERS + 4096, 8, WRITE)]);
    queues[EVENTS].kick_if_wanted();
    assert_eq!(queues[RECEIVE].take(), (0, 44));
}

#[test]
fn a_driver_that_starts_anew_owes_no_answer_to_a_loss() {
    let first = rig();
    let mut queues = first.start(VSOCK, VERSION_1 | 1 << 29);
    let states = saved(&first);
    let second = rig();
    second.take_over(&first, VSOCK, &mut queues);
    second.devices.restore(&states).unwrap();
    second.devices.resume();
    let mut waiting = second.connect();
    second.write(VSOCK, VIRTIO_MMIO_STATUS, 0);
    assert_eq!(waiting.read(&mut [0]).unwrap(), 0, "a client of the driver that is gone");
    let mut queues = second.start(VSOCK, VERSION_1 | 1 << 29);
    queues[RECEIVE].offer(&[(BUFFERS, 4096, WRITE)]);
    let mut client = second.connect();
    client.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(queues[RECEIVE].take(), (0, 44));
}

#[test]
fn a_device_that_never_ran_or_was_broken_stays_so_until_a_driver_starts_it() {
    let first = rig();
    first.break_queue(RNG);
    let states = saved(&first);
    let second = rig();
    second.devices.restore(&states).unwrap();
    second.devices.resume();
    assert_eq!(second.read(RNG, VIRTIO_MMIO_STATUS), STARTED | 64, "NEEDS_RESET");
    assert_eq!(second.read(VSOCK, VIRTIO_MMIO_STATUS), 0);
    let mut queues = second.start(RNG, VERSION_1 | 1 << 29);
    assert_eq!(queues[0].ask(&[SIXTEEN]), 16);
}

#[test]
fn what_a_driver_wrote_before_anything_was_agreed_on_keeps_no_snapshot_from_going_on() {
    let first = rig();
    first.write(RNG, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    first.write(RNG, VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    let states = saved(&first);
    let second = rig();
    second.devices.restore(&states).unwrap();
    assert_eq!(second.devices.save().unwrap(), states);
}

/// What a rig says to the states of [`used`] after a change.
fn refusal(change: impl FnOnce(&mut Vec<DeviceState>)) -> String {
    let (first, mut queues) = used();
    let mut states = saved(&first);
    change(&mut states);
    let second = rig();
    second.take_over(&first, RNG, &mut queues);
    second.devices.restore(&states).unwrap_err().to_string()
}

#[test]
fn states_that_do_not_fit_are_refused_by_device_and_reason() {
    let too_few = refusal(|states| drop(states.pop()));
    assert_eq!(too_few, "the state has 1 devices, the machine 2");
    let swapped = refusal(|states| states.swap(0, 1));
    assert_eq!(swapped, "device rng is vsock in the state");
    let feature = refusal(|states| states[0].registers.driver_features |= 1 << 40);
    assert!(feature.starts_with("device rng was told a feature"), "{feature}");
    let kind = refusal(|states| states[0].run.worker = states[1].run.worker.clone());
    assert!(kind.starts_with("device rng was Vsock("), "{kind}");
    for change in [
        (|state| state.registers.queues.clear()) as fn(&mut DeviceState),
        |state| state.registers.queues.push(state.registers.queues[0]),
        |state| state.registers.status &= !8,
        |state| state.registers.driver_features = 0,
        |state| state.run.rings.push(state.run.rings[0]),
    ] {
        let refused = refusal(|states| change(&mut states[0]));
        assert!(refused.contains("registers that no driver"), "{refused}");
    }
    let place = refusal(|states| states[0].registers.queues[0].descriptors = 1 << 40);
    assert!(place.contains("outside of memory"), "{place}");
}

#[test]
fn a_ring_that_stands_nowhere_breaks_the_device_and_nothing_else() {
    let (first, mut queues) = used();
    let mut states = saved(&first);
    states[0].run.rings[0] = RingState { next_available: 40_000, next_used: 7, untold: 9 };
    assert!(matches!(states[0].run.worker, WorkerState::Rng(_)));
    let second = rig();
    second.take_over(&first, RNG, &mut queues);
    second.devices.restore(&states).unwrap();
    second.devices.resume();
    assert!(!second.stopped(RNG).is_empty());
    let mut queues = second.start(RNG, VERSION_1 | 1 << 29);
    assert_eq!(queues[0].ask(&[SIXTEEN]), 16);
}
