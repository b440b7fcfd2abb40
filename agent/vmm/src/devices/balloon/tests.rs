//! A balloon as its driver sees it, over memory whose blocks can be counted.

use std::os::unix::fs::MetadataExt;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{devices::testing::*, vm::memory::PAGE_BYTES};

/// With no disks, rng and vsock come first.
const BALLOON: usize = 2;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;
const REPORTING: u64 = 1 << 5;
const CONFIG: u32 = 0x100;
const NAMES: u64 = BUFFERS;
/// A page that holds nothing else, and its neighbours.
const PAGE: u64 = (BUFFERS >> 12) + 16;

struct Fixture {
    rig: Rig,
    queues: Vec<DriverQueue>,
}

impl Fixture {
    fn new() -> Self {
        let rig = Rig::with(Vec::new(), Vec::new(), true);
        let queues = rig.start(BALLOON, VERSION_1 | REPORTING);
        Self { rig, queues }
    }

    /// Pages of the host under all guest memory.
    fn held_pages(&self) -> u64 {
        let region = self.rig.memory.find_region(GuestAddress(0)).unwrap();
        region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512 / PAGE_BYTES
    }

    fn fill(&self, page: u64, count: u64) {
        let bytes = vec![0x5a; usize::try_from(count * PAGE_BYTES).unwrap()];
        self.rig.store(page * PAGE_BYTES, &bytes);
    }

    fn is_empty(&self, page: u64) -> bool {
        self.rig.bytes(page * PAGE_BYTES, 4096) == [0; 4096]
    }

    /// Names `pages` on `queue`; returns once they are answered.
    fn name(&mut self, queue: usize, pages: &[u32]) {
        let names: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.rig.store(NAMES, &names);
        self.queues[queue].ask(&[(NAMES, u32::try_from(names.len()).unwrap(), 0)]);
    }

    /// Offers a list of pages or ranges, and returns why the device stopped.
    fn breaks(mut self, queue: usize, pieces: &[Piece]) -> String {
        self.queues[queue].offer(pieces);
        self.queues[queue].kick();
        self.rig.stopped(BALLOON)
    }
}

fn page(number: u64) -> u32 {
    u32::try_from(number).unwrap()
}

#[test]
fn pages_given_up_are_the_hosts_and_others_stay() {
    let mut fixture = Fixture::new();
    fixture.fill(PAGE, 8);
    // So that the list of pages lies in a page that is held already.
    fixture.name(INFLATE, &[]);
    fixture.rig.store(NAMES, &[0; 16]);
    let before = fixture.held_pages();
    fixture.name(INFLATE, &[page(PAGE + 2), page(PAGE + 1), page(PAGE + 5)]);
    assert_eq!(before - fixture.held_pages(), 3);
    let empty: Vec<u64> = (0..8).filter(|at| fixture.is_empty(PAGE + at)).collect();
    assert_eq!(empty, [1, 2, 5]);
    let told = fixture.rig.devices.stats().balloon.unwrap();
    assert_eq!(told.given_back_bytes, 3 * PAGE_BYTES);
}

#[test]
fn a_page_taken_back_can_be_used() {
    let mut fixture = Fixture::new();
    fixture.fill(PAGE, 1);
    fixture.name(INFLATE, &[page(PAGE)]);
    fixture.name(DEFLATE, &[page(PAGE)]);
    fixture.fill(PAGE, 1);
    assert!(!fixture.is_empty(PAGE));
}

#[test]
fn reported_ranges_are_given_back_but_never_a_part_of_a_page() {
    let mut fixture = Fixture::new();
    fixture.fill(PAGE, 8);
    let at = |offset: u64| PAGE * PAGE_BYTES + offset;
    let before = fixture.held_pages();
    // Two pages; a page and a half on either side of a whole one; less than a page.
    let ranges = [(at(0), 8192, WRITE), (at(0x2800), 8192, WRITE), (at(0x6000), 4095, WRITE)];
    fixture.queues[REPORT].ask(&ranges);
    assert_eq!(before - fixture.held_pages(), 3);
    let empty: Vec<u64> = (0..8).filter(|at| fixture.is_empty(PAGE + at)).collect();
    assert_eq!(empty, [0, 1, 3]);
}

#[test]
fn a_run_over_two_regions_is_given_back_whole() {
    let mut fixture = Fixture::new();
    let border = MEMORY_BYTES / 2 / PAGE_BYTES;
    fixture.fill(border - 1, 2);
    fixture.rig.store(NAMES, &[0; 16]);
    let before = fixture.held_pages();
    fixture.name(INFLATE, &[page(border - 1), page(border)]);
    assert_eq!(before - fixture.held_pages(), 2);
}

#[test]
fn a_page_outside_of_memory_stops_the_device_before_any_is_given_back() {
    let fixture = Fixture::new();
    fixture.fill(PAGE, 1);
    let outside = page(MEMORY_BYTES / PAGE_BYTES);
    let names = [page(PAGE).to_le_bytes(), outside.to_le_bytes()].concat();
    fixture.rig.store(NAMES, &names);
    let held = fixture.held_pages();
    let memory = fixture.rig.memory.clone();
    let reason = fixture.breaks(INFLATE, &[(NAMES, 8, 0)]);
    assert_eq!(reason, "page 0x400 is not one of the guest's memory");
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let blocks = region.file_offset().unwrap().file().metadata().unwrap().blocks();
    assert_eq!(blocks * 512 / PAGE_BYTES, held);
}

#[test]
fn reports_of_what_is_no_memory_stop_the_device() {
    for address in [MEMORY_BYTES, MEMORY_BYTES - 4096, u64::MAX - 8192] {
        let reason = Fixture::new().breaks(REPORT, &[(address, 8192, WRITE)]);
        assert!(reason.ends_with("is not one of the guest's memory"), "{address:#x}: {reason}");
    }
}

#[test]
fn lists_of_the_wrong_direction_or_without_end_stop_the_device() {
    for (queue, piece, reason) in [
        (INFLATE, (NAMES, 4, WRITE), "a chain has buffers of the wrong direction"),
        (REPORT, (NAMES, 4096, 0), "a chain has buffers of the wrong direction"),
        (DEFLATE, (NAMES, 4100, 0), "a chain of 4100 bytes is too long for a list of pages"),
    ] {
        assert_eq!(Fixture::new().breaks(queue, &[piece]), reason);
    }
}

#[test]
fn a_target_reaches_the_driver_with_an_interrupt_and_its_answer_reaches_us() {
    let fixture = Fixture::new();
    let generation = fixture.rig.read(BALLOON, 0xfc);
    assert!(fixture.rig.devices.set_balloon(3));
    fixture.rig.wait_interrupt(BALLOON);
    // A change of configuration.
    assert_eq!(fixture.rig.read(BALLOON, 0x60), 2);
    assert_ne!(fixture.rig.read(BALLOON, 0xfc), generation);
    assert_eq!(fixture.rig.read(BALLOON, CONFIG), 768);
    fixture.rig.write(BALLOON, CONFIG, 0xffff);
    assert_eq!(fixture.rig.read(BALLOON, CONFIG), 768, "the target is ours");
    fixture.rig.write(BALLOON, CONFIG + 4, 512);
    let told = fixture.rig.devices.stats().balloon.unwrap();
    assert_eq!((told.target_mib, told.actual_mib), (3, 2));
    fixture.rig.start(BALLOON, VERSION_1 | REPORTING);
    assert_eq!(fixture.rig.devices.stats().balloon.unwrap().actual_mib, 0, "a new driver");
}

#[test]
fn a_driver_that_reports_nothing_is_not_taken() {
    let rig = Rig::with(Vec::new(), Vec::new(), true);
    rig.start(BALLOON, VERSION_1);
    assert_eq!(rig.read(BALLOON, 0x70), 3);
    assert!(!Rig::new(Vec::new()).devices.set_balloon(1), "no balloon, nothing to set");
}
