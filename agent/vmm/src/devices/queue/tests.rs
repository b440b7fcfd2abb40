//! Rings and chains as a hostile driver makes them, shown on the rng device.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::testing::{
    BUFFERS, MEMORY_BYTES, NEXT, QUEUE_SIZE, Rig, VERSION_1, WRITE, memory,
};

const RNG: usize = 0;
const INDIRECT: u16 = 4;
const CHAIN_END: &str = "a chain ends in a descriptor that does not exist, loops or is too long";

/// Offers one chain of descriptors just as they are given and returns why the device stopped.
fn stopped_by(descriptors: &[(u64, u32, u16, u16)], head: u16) -> String {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
        queues[0].describe(index, (*address, *len, *flags), *next);
    }
    queues[0].publish(head);
    queues[0].kick();
    rig.stopped(RNG)
}

#[test]
fn a_chain_that_loops_stops_the_device() {
    let told = stopped_by(&[(BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 1, WRITE | NEXT, 0)], 0);
    assert_eq!(told, CHAIN_END);
}

#[test]
fn a_next_descriptor_outside_of_the_table_stops_the_device() {
    assert_eq!(stopped_by(&[(BUFFERS, 1, WRITE | NEXT, QUEUE_SIZE)], 0), CHAIN_END);
}

#[test]
fn a_head_outside_of_the_table_stops_the_device() {
    assert_eq!(stopped_by(&[], u16::MAX), CHAIN_END);
}

#[test]
fn indirect_tables_are_not_offered_and_a_bad_one_stops_the_device() {
    for (address, len) in [(BUFFERS, 15), (BUFFERS, 0), (u64::MAX - 3, 16), (MEMORY_BYTES, 32)] {
        assert_eq!(stopped_by(&[(address, len, INDIRECT, 0)], 0), CHAIN_END, "{address:#x} {len}");
    }
}

#[test]
fn a_buffer_outside_of_memory_stops_the_device() {
    for (address, len) in [(MEMORY_BYTES, 1), (MEMORY_BYTES - 1, 2), (u64::MAX, 2), (0, u32::MAX)] {
        let told = stopped_by(&[(address, len, WRITE, 0)], 0);
        assert!(told.starts_with("a descriptor names bytes outside of memory"), "{told}");
    }
}

#[test]
fn a_readable_buffer_behind_a_writable_one_stops_the_device() {
    let told = stopped_by(&[(BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 1, 0, 0)], 0);
    assert_eq!(told, "a chain has buffers of the wrong direction");
}

#[test]
fn an_index_further_than_the_queue_is_long_stops_the_device() {
    let rig = Rig::new(Vec::new());
    let queues = rig.start(RNG, VERSION_1);
    queues[0].announce(QUEUE_SIZE + 1);
    queues[0].kick();
    assert!(rig.stopped(RNG).starts_with("ring: "));
}

#[test]
fn a_stopped_device_works_again_after_a_reset() {
    let rig = Rig::new(Vec::new());
    let queues = rig.start(RNG, VERSION_1);
    queues[0].announce(QUEUE_SIZE + 1);
    queues[0].kick();
    rig.stopped(RNG);
    let mut queues = rig.start(RNG, VERSION_1);
    assert_eq!(queues[0].ask(&[(BUFFERS, 8, WRITE)]), 8);
}

#[test]
fn a_buffer_may_span_two_regions_of_memory() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    assert_eq!(queues[0].ask(&[(MEMORY_BYTES / 2 - 8, 16, WRITE)]), 16);
}

#[test]
fn of_two_things_to_do_the_earlier_decides() {
    let soon = Instant::now();
    let later = soon + std::time::Duration::from_secs(1);
    use Progress::{At, Idle, More};
    for (one, two, both) in [
        (Idle, Idle, Idle),
        (Idle, At(soon), At(soon)),
        (At(later), At(soon), At(soon)),
        (At(soon), More, More),
        (More, Idle, More),
    ] {
        assert_eq!((one.or(two), two.or(one)), (both, both));
    }
}

fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0..2 * MEMORY_BYTES, any::<u64>()];
    let len = prop_oneof![0..8192u32, any::<u32>()];
    (address, len, prop_oneof![0..8u16, any::<u16>()], 0..QUEUE_SIZE + 2)
}

proptest! {
    #[test]
    fn no_ring_and_no_descriptors_make_reading_panic_or_run_on(
        descriptors in prop::collection::vec(any_descriptor(), 16),
        available: [u16; 20],
    ) {
        let memory = memory();
        for (at, (address, len, flags, next)) in (0x1000..).step_by(16).zip(descriptors) {
            let place = GuestAddress(at);
            memory.write_obj(address, place).unwrap();
            memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        for (at, entry) in (0x2000..).step_by(2).zip(available) {
            memory.write_obj(entry % 20, GuestAddress(at)).unwrap();
        }
        let setup = RingSetup {
            size: QUEUE_SIZE.into(),
            ready: true,
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
        };
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let mut ring = Ring::new(0, &setup, QUEUE_SIZE, true, &memory, interrupt).unwrap();
        let mut chains = 0;
        // Broken or not, it ends: there are no more chains than entries.
        let (throttle, now) = (&mut Throttle::default(), Instant::now());
        let _ = ring.serve(&memory, 100, throttle, now, |chain| {
            chains += 1;
            Ok(chain.writable.len())
        });
        prop_assert!(chains <= QUEUE_SIZE);
    }
}
