//! Filling, with this process in the VMM's place: memory that is watched, touched while the real
//! pager fills it.

mod watched;

use std::{
    io::Write,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    process::{Child, Command, Stdio},
};

use fs_err as fs;
use holdfast_snapshot::{Draft, Folder, Key, Kind, Pages, Snapshot, Source};
use holdfast_wire::{
    WIRE_VERSION, frame,
    pager::{Filled, Piece, PieceKind, Report, Request},
};
use rustix::io::{FdFlags, fcntl_setfd};
use tempfile::TempDir;
use watched::Watched;

const PAGE: usize = 4096;
const MEMORY: &str = "memory";
const KEY: [u8; 32] = [7; 32];

/// Zero but for the second half of every 64 pages; compresses to a half or so.
struct Image(Vec<u8>);

impl Image {
    fn of(pages: usize) -> Self {
        let mut bytes = vec![0; pages * PAGE];
        for (page, text) in bytes.chunks_mut(PAGE).enumerate() {
            if page % 64 >= 32 {
                let mut state = u32::try_from(page).unwrap() | 1;
                for byte in text.iter_mut().step_by(2) {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    *byte = state.to_be_bytes()[0];
                }
                text[0] = 1;
            }
        }
        Self(bytes)
    }
}

impl Source for Image {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn used(&self) -> std::io::Result<Pages> {
        Ok(std::iter::once(0..(self.0.len() / PAGE) as u64).collect())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> std::io::Result<()> {
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&self.0[at..at + into.len()]);
        Ok(())
    }
}

/// A snapshot of two layers, in a folder, and what it shows.
fn saved(pages: usize) -> (TempDir, Snapshot, Image) {
    let folder = tempfile::tempdir().unwrap();
    let store = Folder::open(folder.path()).unwrap();
    let key = Key::new(KEY);
    let mut image = Image::of(pages);
    let mut draft = Draft::new(&store, &key, "a", None).unwrap();
    draft.image(MEMORY, &image, None, &[]).unwrap();
    let below = draft.commit(1).unwrap();
    // One page more, and one less.
    image.0[PAGE..2 * PAGE].fill(9);
    image.0[33 * PAGE..34 * PAGE].fill(0);
    let changed: Pages = [1..2, 33..34].into_iter().collect();
    let mut draft = Draft::new(&store, &key, "b", Some(&below)).unwrap();
    draft.image(MEMORY, &image, Some(&changed), &[]).unwrap();
    (folder, draft.commit(2).unwrap(), image)
}

/// A pager, with what it was handed.
struct Pager {
    child: Child,
    copy: fs::File,
}

impl Pager {
    fn start(folder: &TempDir, snapshot: &Snapshot, memory: &Watched, first: Vec<u64>) -> Self {
        let image = &snapshot.manifest.images[MEMORY];
        let mut handed = Vec::new();
        let mut hand = |file: fs::File| {
            fcntl_setfd(&file, FdFlags::empty()).unwrap();
            handed.push(file);
            handed.last().unwrap().as_raw_fd()
        };
        let open = |kind: Kind, name: &dyn std::fmt::Display| {
            fs::File::open(folder.path().join(kind.folder()).join(name.to_string())).unwrap()
        };
        let mut pieces = Vec::new();
        for layer in &image.layers {
            let (kind, fd) = (PieceKind::Layer, hand(open(Kind::Layer, &layer.name)));
            pieces.push(Piece { kind, name: *layer.name.bytes(), fd });
            for segment in &layer.segments {
                let (kind, fd) = (PieceKind::Segment, hand(open(Kind::Segment, segment)));
                pieces.push(Piece { kind, name: *segment.bytes(), fd });
            }
        }
        let path = folder.path().join("copy");
        let _ = fs::remove_file(&path);
        let copy =
            fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        let request = Request {
            version: WIRE_VERSION,
            faults_fd: memory.faults.as_raw_fd(),
            regions: memory.regions(),
            bytes: image.bytes,
            layers: image.layers.iter().map(|layer| *layer.name.bytes()).collect(),
            pieces,
            key: KEY,
            copy_fd: hand(copy.try_clone().unwrap()),
            first,
        };
        fcntl_setfd(memory.faults.as_fd(), FdFlags::empty()).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_holdfast-pager"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let frame = frame::encode(&request).unwrap();
        child.stdin.take().unwrap().write_all(&frame).unwrap();
        Self { child, copy }
    }

    fn report(mut self) -> Report {
        let report = frame::read_frame(&mut self.child.stdout.take().unwrap()).unwrap();
        self.child.wait().unwrap();
        report.expect("a report")
    }

    fn filled(self) -> Filled {
        match self.report() {
            Report::Filled(filled) => filled,
            failed @ Report::Failed { .. } => panic!("{failed:?}"),
        }
    }
}

fn assert_shows(memory: &Watched, image: &Image, but: &[usize]) {
    for (page, text) in image.0.chunks(PAGE).enumerate() {
        if !but.contains(&page) {
            assert!(memory.page(page) == text, "page {page}");
        }
    }
}

#[test]
fn memory_is_right_whoever_touches_it_and_when() {
    let (folder, snapshot, image) = saved(4096);
    let memory = Watched::of(4096);
    let pager = Pager::start(&folder, &snapshot, &memory, Vec::new());
    // Backwards, against the stream; a page of the upper layer, one that is zero, and a write.
    for page in (0..4096).rev().step_by(97) {
        assert!(memory.page(page) == image.0[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
    memory.write(40, b"mine");
    let copy = pager.copy.try_clone().unwrap();
    let filled = pager.filled();
    assert!(filled.faults > 0 && !filled.missed.is_empty(), "{filled:?}");
    assert!(filled.missed.len() as u64 <= filled.faults, "{filled:?}");
    assert!(filled.missed.iter().all(|at| at.is_multiple_of(PAGE as u64)), "{filled:?}");
    // Nobody answers any more: what is missing is zero.
    assert_shows(&memory, &image, &[40]);
    assert_eq!(memory.page(40)[..4], *b"mine");
    assert_eq!(memory.page(40)[4..], image.0[40 * PAGE + 4..41 * PAGE]);
    let mut copied = vec![0; image.0.len()];
    copy.file().read_exact_at(&mut copied, 0).unwrap();
    assert!(copied == image.0, "the copy is another image");

    // The same again, with what was touched brought first.
    let again = Watched::of(4096);
    Pager::start(&folder, &snapshot, &again, filled.missed).filled();
    assert_shows(&again, &image, &[]);
}

#[test]
fn a_pager_that_is_killed_is_followed_by_another_and_no_page_is_lost() {
    let (folder, snapshot, image) = saved(2048);
    let memory = Watched::of(2048);
    std::thread::scope(|scope| {
        // It waits for a page for as long as it takes.
        let reader = scope.spawn(|| memory.page(2047));
        for _ in 0..5 {
            let mut pager = Pager::start(&folder, &snapshot, &memory, Vec::new());
            std::thread::sleep(std::time::Duration::from_millis(3));
            pager.child.kill().unwrap();
            pager.child.wait().unwrap();
        }
        Pager::start(&folder, &snapshot, &memory, Vec::new()).filled();
        assert!(reader.join().unwrap() == image.0[2047 * PAGE..]);
    });
    assert_shows(&memory, &image, &[]);
}

#[test]
fn stored_bytes_that_were_changed_are_never_put() {
    let (folder, snapshot, image) = saved(2048);
    let segment = snapshot.manifest.images[MEMORY].layers[1].segments[0];
    let path = folder.path().join("segments").join(segment.to_string());
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let memory = Watched::of(2048);
    match Pager::start(&folder, &snapshot, &memory, Vec::new()).report() {
        Report::Failed { damaged: true, message } => {
            assert!(message.contains("changed"), "{message}")
        }
        other => panic!("{other:?}"),
    }
    // What was put is right, and the rest is not zero but missing still.
    let there = memory.present();
    assert!(there.len() < 2048, "all of it is there");
    for page in there {
        assert!(memory.page(page) == image.0[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
}

#[test]
fn a_request_that_cannot_be_is_refused_by_name() {
    let (folder, snapshot, _) = saved(64);
    let memory = Watched::of(128);
    match Pager::start(&folder, &snapshot, &memory, Vec::new()).report() {
        Report::Failed { damaged: false, message } => {
            assert!(message.contains("regions of 524288 bytes"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}
