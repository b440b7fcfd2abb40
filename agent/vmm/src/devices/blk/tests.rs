//! A disk as its driver sees it, over real files.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use fs_err::{File, os::unix::fs::FileExt};
use holdfast_wire::vmm::{Disk, IoLimits, Rate};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;

use crate::devices::testing::*;

const DISK: usize = 0;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const BLOCK: u64 = 4096;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A file of `bytes` bytes, each telling its place and `salt`.
fn file(salt: u8, bytes: u64) -> File {
    let file = File::from_parts(tempfile::tempfile().unwrap(), "a test's file");
    let content: Vec<u8> = (0..bytes).map(|at| (at / 7 % 251) as u8 ^ salt).collect();
    file.write_all_at(&content, 0).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A started disk with its one queue.
struct Drive {
    rig: Rig,
    queue: DriverQueue,
}

impl Drive {
    fn new(disk: Disk) -> Self {
        let rig = Rig::new(vec![disk]);
        let queue = rig.start(DISK, VERSION_1).remove(0);
        Self { rig, queue }
    }

    /// A writable disk of `blocks` blocks, and its file.
    fn writable(blocks: u64) -> (Self, File) {
        let file = file(0, blocks * BLOCK);
        let disk = disk("vdb", false, vec![(file.try_clone().unwrap(), blocks * BLOCK)]);
        (Self::new(disk), file)
    }

    /// Sends one request with `data` between header and status; its status.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.rig.store(HEADER, &header);
        self.rig.store(STATUS, &[0xee]);
        let mut pieces = vec![(HEADER, 16, 0)];
        pieces.extend(data);
        pieces.push((STATUS, 1, WRITE));
        assert!(self.queue.ask(&pieces) >= 1);
        self.rig.bytes(STATUS, 1)[0]
    }

    /// Sends a discard or write-zeroes of one range.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.rig.store(DATA, &range);
        self.request(kind, 0, &[(DATA, 16, 0)])
    }
}

#[test]
fn segments_read_as_one_disk_also_across_their_borders() {
    let files = [file(1, BLOCK), file(2, 2 * BLOCK), file(3, BLOCK)];
    let whole: Vec<u8> = files.iter().flat_map(content).collect();
    let parts = files.map(|file| {
        let bytes = file.metadata().unwrap().len();
        (file, bytes)
    });
    let mut drive = Drive::new(disk("vda", true, parts.into()));
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 16384, WRITE)]), OK);
    assert_eq!(drive.rig.bytes(DATA, 16384), whole);
    // Three pieces whose borders are not those of the segments.
    let pieces = [(DATA, 512, WRITE), (DATA + 0x8000, 5000, WRITE), (DATA + 0xa000, 632, WRITE)];
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 7, &pieces), OK);
    let mut read = drive.rig.bytes(DATA, 512);
    read.extend(drive.rig.bytes(DATA + 0x8000, 5000));
    read.extend(drive.rig.bytes(DATA + 0xa000, 632));
    assert_eq!(read, whole[3584..3584 + 6144]);
    assert_eq!(drive.rig.devices.stats().disks[0].read_bytes, 16384 + 6144);
}

#[test]
fn what_is_written_is_in_the_file_and_nothing_beside_it() {
    let (mut drive, file) = Drive::writable(4);
    let mut expected = content(&file);
    drive.rig.store(DATA, &[0x5a; 1024]);
    assert_eq!(drive.request(VIRTIO_BLK_T_OUT, 3, &[(DATA, 512, 0), (DATA + 512, 512, 0)]), OK);
    assert_eq!(drive.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    expected[1536..2560].fill(0x5a);
    assert_eq!(content(&file), expected);
}

#[test]
fn the_last_sector_is_there_and_the_one_behind_it_is_not() {
    let (mut drive, file) = Drive::writable(2);
    let before = content(&file);
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 15, &[(DATA, 512, WRITE)]), OK);
    for (sector, bytes) in [(16, 512), (15, 1024), (u64::MAX, 512), (u64::MAX / 512, 512)] {
        let read = drive.request(VIRTIO_BLK_T_IN, sector, &[(DATA, bytes, WRITE)]);
        let write = drive.request(VIRTIO_BLK_T_OUT, sector, &[(DATA, bytes, 0)]);
        assert_eq!((read, write), (IO_ERROR, IO_ERROR), "sector {sector}, {bytes} bytes");
    }
    assert_eq!(content(&file), before);
    assert_eq!(drive.rig.devices.stats().disks[0].errors, 8);
}

#[test]
fn a_read_only_disk_is_never_changed() {
    let file = file(9, BLOCK);
    let before = content(&file);
    let mut drive = Drive::new(disk("vda", true, vec![(file.try_clone().unwrap(), BLOCK)]));
    assert_eq!(drive.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0)]), IO_ERROR);
    assert_eq!(drive.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IO_ERROR);
    assert_eq!(drive.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), IO_ERROR);
    assert_eq!(drive.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(content(&file), before);
}

#[test]
fn a_discard_reads_as_zeros_and_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    let (mut drive, file) = Drive::writable(64);
    let before = file.metadata().unwrap().blocks();
    assert_eq!(drive.range(VIRTIO_BLK_T_DISCARD, 8, 400, 0), OK);
    let bytes = content(&file);
    assert!(bytes[4096..4096 + 400 * 512].iter().all(|byte| *byte == 0));
    assert_ne!(bytes[..4096], [0; 4096]);
    assert_eq!(bytes.len(), 64 * 4096, "the file keeps its length");
    assert!(file.metadata().unwrap().blocks() + 392 <= before);
}

#[test]
fn written_zeros_read_as_zeros_with_and_without_unmapping() {
    let (mut drive, file) = Drive::writable(8);
    assert_eq!(drive.range(VIRTIO_BLK_T_WRITE_ZEROES, 3, 5, 0), OK);
    assert_eq!(drive.range(VIRTIO_BLK_T_WRITE_ZEROES, 16, 8, 1), OK);
    let bytes = content(&file);
    assert_eq!(bytes[1536..4096], [0; 2560]);
    assert_eq!(bytes[8192..12288], [0; 4096]);
    assert_ne!(bytes[..1536], [0; 1536]);
}

#[test]
fn bad_ranges_are_refused_before_anything_is_done() {
    let (mut drive, file) = Drive::writable(2);
    let before = content(&file);
    for (sector, sectors, flags, status) in [
        (0, 17, 0, IO_ERROR),
        (16, 1, 0, IO_ERROR),
        (u64::MAX, 1, 0, IO_ERROR),
        (0, u32::MAX, 0, IO_ERROR),
        (0, 8, 1, UNSUPPORTED),
        (0, 8, 2, UNSUPPORTED),
    ] {
        let answer = drive.range(VIRTIO_BLK_T_DISCARD, sector, sectors, flags);
        assert_eq!(answer, status, "sector {sector}, {sectors} sectors, flags {flags}");
    }
    // The second range is bad, so the first is not carried out either.
    let mut ranges = vec![0; 32];
    ranges[8] = 8;
    ranges[24] = 200;
    drive.rig.store(DATA, &ranges);
    assert_eq!(drive.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 32, 0)]), IO_ERROR);
    for bytes in [0, 15, 17, 16 * 17] {
        let answer = drive.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, bytes, 0)]);
        assert_eq!(answer, IO_ERROR, "{bytes} bytes of ranges");
    }
    assert_eq!(content(&file), before);
}

#[test]
fn the_serial_number_is_the_name() {
    let (mut drive, _file) = Drive::writable(1);
    drive.rig.store(DATA, &[0xff; 20]);
    assert_eq!(drive.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]), OK);
    assert_eq!(drive.rig.bytes(DATA, 20), *b"vdb\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn unknown_requests_partial_sectors_and_data_the_wrong_way_are_refused() {
    let (mut drive, _file) = Drive::writable(1);
    assert_eq!(drive.request(99, 0, &[]), UNSUPPORTED);
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 511, WRITE)]), IO_ERROR);
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, 0)]), IO_ERROR);
    assert_eq!(drive.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, WRITE)]), IO_ERROR);
}

/// Has the host forget the content of `file`, which it has on its disk.
fn forget(file: &File) {
    file.sync_all().unwrap();
    let whole = rustix::fs::Advice::DontNeed;
    rustix::fs::fadvise(file, 0, None, whole).unwrap();
}

#[test]
fn reads_that_wait_side_by_side_get_each_its_own() {
    let source = file(3, 256 * BLOCK);
    let whole = content(&source);
    let mut drive = Drive::new(disk("vda", true, vec![(source.try_clone().unwrap(), 256 * BLOCK)]));
    // The ring of a test has 16 entries: a chain of two pieces for each read.
    for round in 0..8 {
        forget(&source);
        let places: Vec<u64> = (0..8).map(|read| (read * 37 + round * 11) % 255).collect();
        for (read, block) in (0..).zip(&places) {
            drive.rig.store(HEADER + 16 * read, &[0; 8]);
            drive.rig.store(HEADER + 16 * read + 8, &(block * 8).to_le_bytes());
            let (header, target) = (HEADER + 16 * read, DATA + 0x2000 * read);
            drive.queue.offer(&[(header, 16, 0), (target, 4097, WRITE)]);
        }
        drive.queue.kick();
        (0..8).for_each(|_| assert_eq!(drive.queue.take().1, 4097));
        for (read, block) in (0..).zip(&places) {
            let at = usize::try_from(block * BLOCK).unwrap();
            assert!(drive.rig.bytes(DATA + 0x2000 * read, 4096) == whole[at..at + 4096], "{block}");
        }
    }
    assert_eq!(drive.rig.devices.stats().disks[0].read_bytes, 64 * BLOCK);
}

#[test]
fn a_read_of_which_the_host_has_the_front_in_memory_is_whole() {
    let files = [file(1, 4 * BLOCK), file(2, 4 * BLOCK)];
    let whole: Vec<u8> = files.iter().flat_map(content).collect();
    let parts = files.iter().map(|file| (file.try_clone().unwrap(), 4 * BLOCK));
    let mut drive = Drive::new(disk("vda", true, parts.collect()));
    for known in 0..8 {
        files.iter().for_each(forget);
        assert_eq!(drive.request(VIRTIO_BLK_T_IN, 0, &[(DATA, known * 4096 + 512, WRITE)]), OK);
        let pieces = [(DATA, 5000, WRITE), (DATA + 0x8000, 8 * 4096 - 5000, WRITE)];
        assert_eq!(drive.request(VIRTIO_BLK_T_IN, 0, &pieces), OK);
        let mut read = drive.rig.bytes(DATA, 5000);
        read.extend(drive.rig.bytes(DATA + 0x8000, 8 * 4096 - 5000));
        assert!(read == whole, "after {known} blocks");
    }
}

#[test]
fn a_file_cut_short_behind_our_back_is_an_error_and_not_the_end() {
    let file = file(0, 2 * BLOCK);
    let mut drive = Drive::new(disk("vda", true, vec![(file.try_clone().unwrap(), 2 * BLOCK)]));
    file.set_len(BLOCK).unwrap();
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 8, &[(DATA, 512, WRITE)]), IO_ERROR);
    assert_eq!(drive.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]), OK);
}

#[test]
fn header_and_status_may_lie_in_any_pieces() {
    let (mut drive, file) = Drive::writable(1);
    drive.rig.store(HEADER, &[0; 16]);
    let pieces = [(HEADER, 3, 0), (HEADER + 3, 13, 0), (DATA, 500, WRITE), (DATA + 500, 13, WRITE)];
    assert_eq!(drive.queue.ask(&pieces), 513);
    assert_eq!(drive.rig.bytes(DATA, 512), content(&file)[..512]);
    assert_eq!(drive.rig.bytes(DATA + 512, 1), [OK]);
}

#[test]
fn a_request_without_header_or_status_stops_the_device() {
    for (pieces, reason) in [
        (vec![(HEADER, 15, 0), (STATUS, 1, WRITE)], "too short for a disk request's header"),
        (vec![(HEADER, 16, 0)], "too short for a disk request's status"),
    ] {
        let (mut drive, _file) = Drive::writable(1);
        drive.queue.offer(&pieces);
        drive.queue.kick();
        let told = drive.rig.stopped(DISK);
        assert!(told.ends_with(reason), "{told}");
    }
}

#[test]
fn disks_that_make_no_sense_are_refused_with_the_reason() {
    use super::backing::{Backing, DiskError};
    let part = |bytes| (file(0, BLOCK).into(), bytes);
    let refusal = |name, parts, read_only| Backing::new(name, parts, read_only).err().unwrap();
    assert!(matches!(refusal("", vec![part(BLOCK)], true), DiskError::Name));
    assert!(matches!(refusal("123456789012345678901", vec![], true), DiskError::Name));
    assert!(matches!(refusal("a", vec![], true), DiskError::NoSegments));
    let two = vec![part(BLOCK), part(BLOCK)];
    assert!(matches!(refusal("a", two, false), DiskError::WritableParts { segments: 2 }));
    assert!(matches!(refusal("a", vec![part(512)], true), DiskError::Length { .. }));
    assert!(matches!(refusal("a", vec![part(0)], true), DiskError::Length { .. }));
    assert!(matches!(refusal("a", vec![part(2 * BLOCK)], true), DiskError::FileTooShort { .. }));
    let device = (File::open("/dev/zero").unwrap().into(), BLOCK);
    assert!(matches!(refusal("a", vec![device], true), DiskError::Unfit { .. }));
}

#[test]
fn pausing_waits_for_what_is_in_flight() {
    let (mut drive, file) = Drive::writable(16);
    drive.rig.store(HEADER, &1u64.to_le_bytes());
    drive.rig.store(HEADER + 8, &0u64.to_le_bytes());
    drive.rig.store(DATA, &[0x77; 65536]);
    drive.queue.offer(&[(HEADER, 16, 0), (DATA, 65536, 0), (STATUS, 1, WRITE)]);
    drive.queue.kick();
    drive.rig.devices.pause();
    // Either it was done before the pause, whole, or it was not begun.
    let done = drive.queue.try_take().is_some();
    assert_eq!(content(&file)[65535] == 0x77, done);
    let during = content(&file);
    drive.rig.devices.pause();
    assert_eq!(content(&file), during, "nothing moved while paused");
}

/// A disk with limits, and 8 reads of 512 bytes offered and kicked.
fn limited(limits: IoLimits) -> Drive {
    let disk = disk("vda", true, vec![(file(0, BLOCK), BLOCK)]);
    let mut drive = Drive::new(Disk { limits, ..disk });
    // The ring of a test has 16 entries: a chain of two pieces for each read.
    drive.rig.store(HEADER, &[0; 16]);
    for read in 0..8 {
        let target = DATA + 0x1000 * read;
        drive.queue.offer(&[(HEADER, 16, 0), (target, 513, WRITE)]);
    }
    drive.queue.kick();
    drive
}

#[test]
fn a_limited_disk_answers_every_request_and_none_before_its_time() {
    let started = Instant::now();
    let mut drive =
        limited(IoLimits { bytes: None, operations: Some(Rate { per_second: 50, burst: 2 }) });
    for read in 0..8u32 {
        let (_, written) = drive.queue.take();
        assert_eq!(written, 513);
        let earliest = Duration::from_millis(20) * read.saturating_sub(1);
        assert!(started.elapsed() >= earliest, "read {read} after {:?}", started.elapsed());
    }
}

#[test]
fn bytes_are_limited_too_and_a_request_larger_than_the_burst_passes() {
    let rate = Rate { per_second: 10_000, burst: 100 };
    let started = Instant::now();
    let mut drive = limited(IoLimits { bytes: Some(rate), operations: None });
    (0..8).for_each(|_| assert_eq!(drive.queue.take().1, 513));
    // Seven requests of 529 bytes were waited for, but for the burst.
    assert!(started.elapsed() >= Duration::from_millis(360), "{:?}", started.elapsed());
}

#[test]
fn a_held_disk_can_be_paused_resumed_reset_and_dropped() {
    let limits = IoLimits { bytes: Some(Rate { per_second: 1, burst: 1 }), operations: None };
    let mut drive = limited(limits);
    assert_eq!(drive.queue.take().1, 513);
    drive.rig.devices.pause();
    drive.rig.devices.resume();
    assert_eq!(drive.queue.try_take(), None, "nine minutes early");
    drive.rig.start(DISK, VERSION_1);
    assert_eq!(drive.rig.devices.stats().disks[0].requests, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_header_and_data_leave_the_device_alive_and_the_file_as_long(
        kind in prop_oneof![0..15u32, any::<u32>()],
        sector in prop_oneof![0..20u64, any::<u64>()],
        data: [u8; 32],
        len in 0..4096u32,
        writable: bool,
    ) {
        let (mut drive, mut file) = Drive::writable(2);
        drive.rig.store(DATA, &data);
        let status = drive.request(kind, sector, &[(DATA, len, if writable { WRITE } else { 0 })]);
        prop_assert!(status <= UNSUPPORTED);
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        prop_assert_eq!(bytes.len() as u64, 2 * BLOCK);
    }

    #[test]
    fn any_part_of_any_segments_reads_as_in_one_file(
        blocks in prop::collection::vec(1..4u64, 1..6),
        first in 0..160u64,
        count in 1..40u32,
        cut in 0..2048u32,
    ) {
        let total: u64 = blocks.iter().sum::<u64>() * 8;
        let sector = first % total;
        let bytes = count.min(u32::try_from(total - sector).unwrap()) * 512;
        let files: Vec<_> = (0..).zip(&blocks).map(|(n, blocks)| file(n, blocks * BLOCK)).collect();
        let whole: Vec<u8> = files.iter().flat_map(content).collect();
        let parts = files.into_iter().zip(&blocks).map(|(file, blocks)| (file, blocks * BLOCK));
        let mut drive = Drive::new(disk("vda", true, parts.collect()));
        let cut = cut.min(bytes);
        // The second piece is not where the first ends.
        let pieces = [(DATA, cut, WRITE), (DATA + 0x8000, bytes - cut, WRITE)];
        prop_assert_eq!(drive.request(VIRTIO_BLK_T_IN, sector, &pieces), OK);
        let mut read = drive.rig.bytes(DATA, usize::try_from(cut).unwrap());
        read.extend(drive.rig.bytes(DATA + 0x8000, usize::try_from(bytes - cut).unwrap()));
        let at = usize::try_from(sector * 512).unwrap();
        prop_assert_eq!(&read, &whole[at..at + read.len()]);
    }
}
