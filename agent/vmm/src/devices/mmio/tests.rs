//! The registers as a driver sees them.

use crate::devices::testing::*;

use super::*;

/// The one device of these tests: with no disks, rng comes first.
const RNG: usize = 0;

#[test]
fn a_driver_finds_magic_version_and_kind() {
    let rig = Rig::new(Vec::new());
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_VERSION), 2);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(rig.read(RNG + 1, VIRTIO_MMIO_DEVICE_ID), 19);
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    let rig = Rig::new(Vec::new());
    for features in [VERSION_1 | 1 << 5, 0, 1 << 29] {
        rig.start(RNG, features);
        assert_eq!(rig.read(RNG, VIRTIO_MMIO_STATUS), 3, "features {features:#x}");
    }
    rig.start(RNG, VERSION_1 | 1 << 29);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_STATUS), STARTED);
}

#[test]
fn a_reset_forgets_status_and_queues() {
    let rig = Rig::new(Vec::new());
    rig.start(RNG, VERSION_1);
    rig.write(RNG, VIRTIO_MMIO_STATUS, 0);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_STATUS), 0);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_QUEUE_READY), 0);
    let mut queues = rig.start(RNG, VERSION_1);
    assert_eq!(queues[0].ask(&[(BUFFERS, 8, WRITE)]), 8);
}

#[test]
fn a_status_bit_is_only_taken_back_by_a_reset() {
    let rig = Rig::new(Vec::new());
    rig.start(RNG, VERSION_1);
    rig.write(RNG, VIRTIO_MMIO_STATUS, 1);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_STATUS), STARTED);
}

#[test]
fn a_queue_in_use_keeps_its_place() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    rig.write(RNG, VIRTIO_MMIO_QUEUE_SEL, 0);
    rig.write(RNG, VIRTIO_MMIO_QUEUE_READY, 0);
    rig.write(RNG, VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead_0000);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_QUEUE_READY), 1);
    assert_eq!(queues[0].ask(&[(BUFFERS, 8, WRITE)]), 8);
}

/// Starts rng with one register of its queue set to something else.
fn start_with(rig: &Rig, register: u32, value: u32) -> String {
    rig.start(RNG, VERSION_1);
    rig.write(RNG, VIRTIO_MMIO_STATUS, 0);
    rig.write(RNG, VIRTIO_MMIO_STATUS, 3);
    rig.write(RNG, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    rig.write(RNG, VIRTIO_MMIO_DRIVER_FEATURES, 1);
    rig.write(RNG, VIRTIO_MMIO_STATUS, 11);
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_NUM, 16),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000),
        (register, value),
        (VIRTIO_MMIO_QUEUE_READY, 1),
    ] {
        rig.write(RNG, register, value);
    }
    rig.write(RNG, VIRTIO_MMIO_STATUS, STARTED);
    rig.stopped(RNG)
}

#[test]
fn a_queue_outside_of_memory_misaligned_or_of_a_wrong_size_stops_the_device() {
    let end = u32::try_from(MEMORY_BYTES).unwrap();
    for (register, value, reason) in [
        (VIRTIO_MMIO_QUEUE_NUM, 0, "size 0"),
        (VIRTIO_MMIO_QUEUE_NUM, 3, "size 3"),
        (VIRTIO_MMIO_QUEUE_NUM, 32, "size 32"),
        (VIRTIO_MMIO_QUEUE_NUM, u32::MAX, "size 4294967295"),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0, "descriptor table at 0x0"),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008, "descriptor table"),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, end - 16, "descriptor table"),
        (VIRTIO_MMIO_QUEUE_DESC_HIGH, u32::MAX, "descriptor table"),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2001, "available ring"),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, end - 2, "available ring"),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3002, "used ring"),
        (VIRTIO_MMIO_QUEUE_USED_HIGH, 1, "used ring"),
    ] {
        let told = start_with(&Rig::new(Vec::new()), register, value);
        assert!(told.contains(reason), "{register:#x} = {value:#x}: {told}");
    }
}

#[test]
fn a_driver_that_breaks_its_device_again_and_again_is_reported_a_few_times() {
    let rig = Rig::new(Vec::new());
    let reports = (0..50).map(|_| rig.break_queue(RNG)).filter(|reported| *reported).count();
    assert_eq!(reports, 4);
}

#[test]
fn a_queue_that_was_not_set_up_stops_the_device() {
    let rig = Rig::new(Vec::new());
    rig.write(RNG, VIRTIO_MMIO_STATUS, 3);
    rig.write(RNG, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    rig.write(RNG, VIRTIO_MMIO_DRIVER_FEATURES, 1);
    rig.write(RNG, VIRTIO_MMIO_STATUS, 11);
    rig.write(RNG, VIRTIO_MMIO_STATUS, STARTED);
    assert_eq!(rig.stopped(RNG), "queue 0 was not set up");
}

#[test]
fn accesses_of_other_sizes_and_places_do_nothing() {
    let rig = Rig::new(Vec::new());
    let base = rig.devices.windows()[RNG].base;
    for bytes in [1, 2, 8] {
        let mut data = vec![0xaa; bytes];
        rig.devices.read(base, 0, &mut data);
        assert_eq!(data, vec![0; bytes]);
    }
    rig.devices.write(base, VIRTIO_MMIO_STATUS.into(), &[1]);
    rig.devices.write(base, u64::MAX, &[1; 4]);
    rig.devices.write(u64::MAX, 0, &[1; 4]);
    assert_eq!(rig.read(RNG, VIRTIO_MMIO_STATUS), 0);
    let mut data = [0; 4];
    rig.devices.read(0x1000, 0, &mut data);
    assert_eq!(data, [0xff; 4], "no device there");
}

#[test]
fn configuration_is_read_in_any_size_and_ends_in_zeros() {
    let rig = Rig::new(Vec::new());
    let base = rig.devices.windows()[1].base;
    let mut cid = [0xaa; 8];
    rig.devices.read(base, 0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
    let mut edge = [0xaa; 4];
    rig.devices.read(base, 0x106, &mut edge);
    assert_eq!(edge, [0; 4]);
}

#[test]
fn nothing_is_begun_while_paused_and_nothing_is_lost() {
    let rig = Rig::new(Vec::new());
    let mut queues = rig.start(RNG, VERSION_1);
    rig.devices.pause();
    queues[0].offer(&[(BUFFERS, 8, WRITE)]);
    queues[0].kick();
    // A second pause is answered after the kick was seen.
    rig.devices.pause();
    assert_eq!(queues[0].try_take(), None);
    rig.devices.resume();
    assert_eq!(queues[0].take(), (0, 8));
}
