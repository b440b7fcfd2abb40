//! Entropy requests, good and bad.

use crate::devices::testing::*;

const RNG: usize = 0;

#[test]
fn a_buffer_is_filled_over_all_its_pieces() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    let pieces = [(BUFFERS, 40, WRITE), (BUFFERS + 0x1000, 60, WRITE)];
    assert_eq!(queues[0].ask(&pieces), 100);
    let (bytes, more) = (rig.bytes(BUFFERS, 40), rig.bytes(BUFFERS + 0x1000, 60));
    assert_ne!(bytes, [0; 40]);
    assert_ne!(bytes, more[..40]);
    assert_ne!(more[40..], [0; 20]);
}

#[test]
fn one_request_gets_a_page_at_most() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    assert_eq!(queues[0].ask(&[(BUFFERS, 1 << 20, WRITE)]), 4096);
}

#[test]
fn many_requests_in_one_kick_all_come_back() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1 | 1 << 29);
    for _ in 0..50 {
        (0..QUEUE_SIZE).for_each(|_| _ = queues[0].offer(&[(BUFFERS, 16, WRITE)]));
        queues[0].kick();
        (0..QUEUE_SIZE).for_each(|_| assert_eq!(queues[0].take().1, 16));
    }
}

#[test]
fn a_buffer_of_the_wrong_direction_stops_the_device() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    queues[0].offer(&[(BUFFERS, 16, 0)]);
    queues[0].kick();
    assert_eq!(rig.stopped(RNG), "a chain has buffers of the wrong direction");
}

#[test]
fn a_buffer_without_bytes_stops_the_device() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    queues[0].offer(&[(BUFFERS, 0, WRITE)]);
    queues[0].kick();
    assert_eq!(rig.stopped(RNG), "a chain of 0 bytes is too short for random bytes");
}
