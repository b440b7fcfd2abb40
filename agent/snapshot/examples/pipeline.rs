//! How fast the pages of an image become pieces and pages again, beside zstd alone on the same
//! frames (`scripts/bench suspend`). Arguments: rounds, then files whose bytes are taken for guest
//! memory. Prints lines `name: value`, one for each round. One thread on either side.
#![expect(clippy::print_stdout, reason = "it prints its figures")]

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use holdfast_snapshot::{
    Draft, Key, Kind, Name, PAGE_BYTES, Pages, PieceStore, Put, Snapshot, SnapshotError, Source,
};

const FRAME_BYTES: usize = 64 * 1024;
/// The pipeline's own.
const LEVEL: i32 = 1;

/// Keeps everything in memory: no figure is a disk's.
#[derive(Default)]
struct Memory {
    pieces: Mutex<BTreeMap<(Kind, Name), Vec<u8>>>,
    manifests: Mutex<BTreeMap<String, Vec<u8>>>,
}

fn missing() -> SnapshotError {
    SnapshotError::Store { what: "find it".to_owned(), source: io::ErrorKind::NotFound.into() }
}

impl PieceStore for Memory {
    fn put_piece(&self, kind: Kind, name: &Name, bytes: &[u8]) -> Result<Put, SnapshotError> {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.insert((kind, *name), bytes.to_vec());
        Ok(Put::Created)
    }

    fn read_piece(
        &self,
        kind: Kind,
        name: &Name,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, SnapshotError> {
        let pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = pieces.get(&(kind, *name)).ok_or_else(missing)?;
        let from = usize::try_from(offset).map_err(|_| missing())?;
        Ok(piece.get(from..from + length).ok_or_else(missing)?.to_vec())
    }

    fn piece_bytes(&self, kind: Kind, name: &Name) -> Result<u64, SnapshotError> {
        let pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pieces.get(&(kind, *name)).ok_or_else(missing)?.len() as u64)
    }

    fn put_manifest(&self, id: &str, bytes: &[u8]) -> Result<Put, SnapshotError> {
        let mut manifests = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        manifests.insert(id.to_owned(), bytes.to_vec());
        Ok(Put::Created)
    }

    fn read_manifest(&self, id: &str, _: u64) -> Result<Vec<u8>, SnapshotError> {
        let manifests = self.manifests.lock().unwrap_or_else(PoisonError::into_inner);
        manifests.get(id).cloned().ok_or_else(missing)
    }

    fn manifests(&self) -> Result<Vec<String>, SnapshotError> {
        Ok(Vec::new())
    }

    fn delete_manifest(&self, _: &str) -> Result<bool, SnapshotError> {
        Ok(false)
    }

    fn pieces(&self, _: Kind, _: u64) -> Result<Vec<Name>, SnapshotError> {
        Ok(Vec::new())
    }

    fn delete_piece(&self, _: Kind, _: &Name) -> Result<u64, SnapshotError> {
        Ok(0)
    }
}

struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn used(&self) -> io::Result<Pages> {
        Ok(std::iter::once(0..self.bytes() / PAGE_BYTES as u64).collect())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(at).map_err(io::Error::other)?;
        into.copy_from_slice(&self.0[from..from + into.len()]);
        Ok(())
    }
}

/// Nanoseconds of CPU that this thread has used: what else runs on the machine is not in it.
fn cpu_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn timed<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let (began, cpu) = (Instant::now(), cpu_ns());
    let outcome = work();
    println!("{name}_ns: {}", cpu_ns() - cpu);
    println!("{name}_wall_ns: {}", began.elapsed().as_nanos());
    outcome
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let rounds: u32 = arguments.next().ok_or("how many rounds?")?.parse()?;
    let mut memory = Vec::new();
    for path in arguments {
        memory.extend(fs_err::read(path)?);
        memory.resize(memory.len().next_multiple_of(PAGE_BYTES), 0);
    }
    // On both sides the same, for zstd has nothing to do with pages of zeros.
    let zero = [0; PAGE_BYTES];
    let used: Vec<u8> =
        memory.chunks(PAGE_BYTES).filter(|page| **page != zero).flatten().copied().collect();
    println!("pages: {}", used.len() / PAGE_BYTES);
    let source = Bytes(memory);
    let key = Key::new([7; 32]);
    for _ in 0..rounds {
        let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
        let mut room = vec![0; zstd::zstd_safe::compress_bound(FRAME_BYTES)];
        let frames = timed("zstd_pack", || {
            let pack = |frame| {
                let length = compressor.compress_to_buffer(frame, &mut room)?;
                Ok(room[..length].to_vec())
            };
            used.chunks(FRAME_BYTES).map(pack).collect::<io::Result<Vec<_>>>()
        })?;
        let store = Memory::default();
        timed("ours_pack", || {
            let mut draft = Draft::new(&store, &key, "a", None)?;
            draft.image("memory", &source, None, &[])?;
            draft.commit(1)
        })?;
        let stored: usize = frames.iter().map(Vec::len).sum();
        println!("zstd_bytes: {stored}");
        let ours: usize = {
            let pieces = store.pieces.lock().unwrap_or_else(PoisonError::into_inner);
            pieces.values().map(Vec::len).sum()
        };
        println!("ours_bytes: {ours}");

        let mut decompressor = zstd::bulk::Decompressor::new()?;
        let mut text = vec![0; FRAME_BYTES];
        let file = tempfile::tempfile_in("/dev/shm")?;
        timed("zstd_unpack", || {
            for (frame, at) in frames.iter().zip((0..).step_by(FRAME_BYTES)) {
                let length = decompressor.decompress_to_buffer(frame, &mut text)?;
                file.write_all_at(&text[..length], at)?;
            }
            io::Result::Ok(())
        })?;
        let file = tempfile::tempfile_in("/dev/shm")?;
        let snapshot = Snapshot::open(&store, &key, "a")?;
        timed("ours_unpack", || snapshot.image(&store, &key, "memory")?.restore(&file))?;
        let mut whole = vec![0; source.0.len()];
        file.read_exact_at(&mut whole, 0)?;
        assert!(whole == source.0, "what was unpacked is not what was packed");
    }
    Ok(())
}
