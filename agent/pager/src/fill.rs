//! The two threads that fill guest memory, and what they share.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_snapshot::{Fill, Frame, FrameReader, Key, Kind, Name, Unpacked};
use holdfast_wire::pager::{FIRST_MAX, Filled, PIECES_MAX, Piece, PieceKind, Request};
use log::warn;
use rustix::{event::Timespec, process::setpriority_process};

use crate::{
    PagerError, confine,
    faults::{Guest, Memory},
    pieces::Pieces,
    sys,
};

const PAGE_BYTES: u64 = 4096;
const ZERO: [u8; 4096] = [0; 4096];

/// The answering thread looks this often whether all is there, when nobody asks.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// The guest itself comes before what it has not asked for.
const NICENESS: i32 = 19;

/// Frames that were unpacked and are not all put yet, 64 KiB each. What is asked for beyond that is
/// put as a whole.
const HELD_MAX: usize = 256;

/// What nobody has asked for is brought from so long on, unless the guest still asks.
const EARLIEST: Duration = Duration::from_millis(30);
/// A guest that asks for nothing for so long has what it needs just now.
const QUIET: Duration = Duration::from_millis(5);
/// From then on in any case: the sooner all is there, the sooner nobody has to ask.
const LATEST: Duration = Duration::from_millis(250);

/// What was asked for, with everything that was handed over.
#[derive(Debug)]
pub(crate) struct Job {
    memory: Memory,
    pieces: Pieces,
    key: Key,
    bytes: u64,
    layers: Vec<Name>,
    copy: fs::File,
    first: Vec<u64>,
}

impl Job {
    /// Claims the descriptors of a request. Nothing was opened before.
    pub(crate) fn take(request: Request) -> Result<Self, PagerError> {
        if request.pieces.len() > PIECES_MAX {
            return Err(PagerError::Pieces { found: request.pieces.len() });
        }
        let mut taken = BTreeSet::new();
        let mut claim = |what, fd| {
            let fresh = taken.insert(fd).then(|| sys::claim(fd)).flatten();
            fresh.ok_or(PagerError::Fd { what, fd })
        };
        let faults = claim("faults", request.faults_fd)?;
        let copy: OwnedFd = claim("the memory file", request.copy_fd)?;
        let mut pieces = Pieces::default();
        for Piece { kind, name, fd } in request.pieces {
            let kind = match kind {
                PieceKind::Segment => Kind::Segment,
                PieceKind::Layer => Kind::Layer,
            };
            let file = fs::File::from_parts(claim("a piece", fd)?.into(), kind.to_string());
            pieces.add(kind, Name::from_bytes(name), file);
        }
        Ok(Self {
            memory: Memory::new(faults, request.regions, request.bytes)?,
            pieces,
            key: Key::new(request.key),
            bytes: request.bytes,
            layers: request.layers.into_iter().map(Name::from_bytes).collect(),
            copy: fs::File::from_parts(copy.into(), "the memory file"),
            first: request.first.into_iter().take(FIRST_MAX).map(paged).collect(),
        })
    }

    /// Fills all of it. Afterwards the memory is watched no longer.
    pub(crate) fn run(self) -> Result<Filled, PagerError> {
        // It needs a stack and a priority of its own: before the rights for that are given up.
        let streamer = Streamer::start()?;
        confine::confine()?;
        self.copy.set_len(self.bytes).map_err(PagerError::Copy)?;
        // It stays until the process ends, which is when this is done.
        let pieces: &'static Pieces = Box::leak(Box::new(self.pieces));
        let fill = Fill::open(pieces, &self.key, self.bytes, &self.layers)?;
        let work = Arc::new(Work {
            there: (0..fill.count()).map(|_| AtomicBool::new(false)).collect(),
            fill,
            memory: self.memory,
            copy: self.copy,
            wanted: self.first.iter().copied().collect(),
            held: Mutex::default(),
            began: Instant::now(),
            asked_us: AtomicU64::new(0),
            quiet: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let streaming = streamer.give(Arc::clone(&work), self.first)?;
        let answered = work.answer();
        // Whatever it came to, the other is not left alone.
        work.ended.store(true, Ordering::SeqCst);
        streaming.join().map_err(|_| PagerError::Thread)??;
        let (faults, missed) = answered?;
        work.finish()?;
        work.memory.release()?;
        Ok(Filled { faults, bytes: work.memory.put.load(Ordering::Relaxed), missed })
    }
}

/// The page that byte `at` is in.
fn paged(at: u64) -> u64 {
    at - at % PAGE_BYTES
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The thread that brings what nobody has asked for yet.
struct Streamer {
    work: mpsc::Sender<(Arc<Work>, Vec<u64>)>,
    thread: JoinHandle<Result<(), PagerError>>,
}

impl Streamer {
    fn start() -> Result<Self, PagerError> {
        let (work, given) = mpsc::channel::<(Arc<Work>, Vec<u64>)>();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::Builder::new().name("stream".to_owned()).spawn(move || {
            if let Err(error) = setpriority_process(Some(rustix::thread::gettid()), NICENESS) {
                warn!(error:%; "memory is streamed at usual priority");
            }
            let _ = ready.send(());
            match given.recv() {
                Ok((work, first)) => work.stream(&first),
                // There was nothing to do.
                Err(_) => Ok(()),
            }
        });
        let thread = thread.map_err(|_| PagerError::Thread)?;
        is_ready.recv().map_err(|_| PagerError::Thread)?;
        Ok(Self { work, thread })
    }

    fn give(
        self,
        work: Arc<Work>,
        first: Vec<u64>,
    ) -> Result<JoinHandle<Result<(), PagerError>>, PagerError> {
        self.work.send((work, first)).map_err(|_| PagerError::Thread)?;
        Ok(self.thread)
    }
}

/// What both threads work on.
struct Work {
    fill: Fill<'static>,
    /// Of each frame: all of it was put.
    there: Vec<AtomicBool>,
    memory: Memory,
    copy: fs::File,
    /// Bytes of the image that are put as soon as their frame is unpacked: those touched first the
    /// last time.
    wanted: HashSet<u64>,
    /// What somebody waited for a part of. The rest is put, and all of it written to the memory
    /// file, when nobody waits.
    held: Mutex<BTreeMap<Frame, Arc<Unpacked>>>,
    began: Instant,
    /// When a page was asked for last, in microseconds after that.
    asked_us: AtomicU64,
    /// The guest has what it needs just now: from here on a frame is put as a whole.
    quiet: AtomicBool,
    /// One of the threads is done, well or badly.
    ended: AtomicBool,
}

impl Work {
    /// Answers faults until everything is there. How many there were, and where.
    fn answer(&self) -> Result<(u64, Vec<u64>), PagerError> {
        let mut reader = FrameReader::new()?;
        let (mut count, mut missed) = (0, Vec::new());
        while !self.ended.load(Ordering::SeqCst) {
            for at in self.memory.wait(PATIENCE)? {
                count += 1;
                self.asked_us.store(micros(self.began.elapsed()), Ordering::Relaxed);
                let at = paged(at);
                if missed.len() < FIRST_MAX {
                    missed.push(at);
                }
                self.answer_one(&mut reader, at)?;
            }
        }
        Ok((count, missed))
    }

    /// Puts the page at `at`, whatever else comes with it.
    fn answer_one(&self, reader: &mut FrameReader, at: u64) -> Result<(), PagerError> {
        let Some(frame) = self.fill.frame_at(at) else {
            return self.put(at, &ZERO);
        };
        if self.is_there(frame) {
            // It was put just now, or the guest has given it back since.
            return self.put(at, &ZERO);
        }
        let held = self.held().get(&frame).cloned();
        if let Some(unpacked) = held {
            return self.put_those(&unpacked, |page| page == at);
        }
        // Maybe the other thread is just about it: who waits does not wait for one of low priority.
        let unpacked = self.fill.unpack(reader, frame)?;
        self.put_wanted(frame, unpacked, Some(at))
    }

    /// Of a frame that was unpacked just now, puts what is wanted at once, and holds it for the rest:
    /// a frame may have one such page and 15 that nobody needs soon.
    fn put_wanted(
        &self,
        frame: Frame,
        unpacked: Unpacked,
        asked: Option<u64>,
    ) -> Result<(), PagerError> {
        if self.quiet.load(Ordering::SeqCst) || self.held().len() >= HELD_MAX {
            return self.bring(frame, &unpacked);
        }
        self.put_those(&unpacked, |page| Some(page) == asked || self.wanted.contains(&page))?;
        self.held().insert(frame, Arc::new(unpacked));
        Ok(())
    }

    /// Brings everything that is not there.
    fn stream(&self, first: &[u64]) -> Result<(), PagerError> {
        let streamed = self.try_to_stream(first);
        self.ended.store(true, Ordering::SeqCst);
        streamed
    }

    fn try_to_stream(&self, first: &[u64]) -> Result<(), PagerError> {
        let mut reader = FrameReader::new()?;
        self.stream_first(&mut reader, first)?;
        self.wait_for_quiet();
        self.quiet.store(true, Ordering::SeqCst);
        self.stream_all(&mut reader)
    }

    /// The guest's CPUs may be this thread's too, and its cgroup is another: priorities do not hold
    /// between them.
    fn wait_for_quiet(&self) {
        loop {
            let now = self.began.elapsed();
            let asked = Duration::from_micros(self.asked_us.load(Ordering::Relaxed));
            let quiet = now >= EARLIEST && now.saturating_sub(asked) >= QUIET;
            if quiet || now >= LATEST || self.has_ended() {
                return;
            }
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// Puts the pages that were touched first the last time.
    fn stream_first(&self, reader: &mut FrameReader, first: &[u64]) -> Result<(), PagerError> {
        for at in first {
            if self.has_ended() {
                break;
            }
            let Some(frame) = self.fill.frame_at(*at) else {
                self.put(*at, &ZERO)?;
                continue;
            };
            // Held: its wanted pages were put when it was unpacked.
            if self.is_there(frame) || self.held().contains_key(&frame) {
                continue;
            }
            let unpacked = self.fill.unpack(reader, frame)?;
            self.put_wanted(frame, unpacked, None)?;
        }
        Ok(())
    }

    fn stream_all(&self, reader: &mut FrameReader) -> Result<(), PagerError> {
        for frame in self.fill.frames() {
            // The other thread gave up.
            if self.has_ended() {
                break;
            }
            if !self.is_there(frame) {
                let held = self.held().remove(&frame);
                let unpacked = match held {
                    Some(unpacked) => unpacked,
                    None => Arc::new(self.fill.unpack(reader, frame)?),
                };
                self.bring(frame, &unpacked)?;
            }
        }
        Ok(())
    }

    /// Puts what is still held. Both threads are done.
    fn finish(&self) -> Result<(), PagerError> {
        let held = std::mem::take(&mut *self.held());
        held.iter().try_for_each(|(frame, unpacked)| self.bring(*frame, unpacked))
    }

    /// Puts all of a frame where the guest has it, and writes it to the memory file.
    fn bring(&self, frame: Frame, unpacked: &Unpacked) -> Result<(), PagerError> {
        for (at, text) in unpacked.runs() {
            self.put(at, text)?;
        }
        self.there[self.fill.place(frame)].store(true, Ordering::SeqCst);
        for (at, text) in unpacked.runs() {
            self.copy.file().write_all_at(text, at).map_err(PagerError::Copy)?;
        }
        Ok(())
    }

    /// Puts those of its pages.
    fn put_those(
        &self,
        unpacked: &Unpacked,
        those: impl Fn(u64) -> bool,
    ) -> Result<(), PagerError> {
        unpacked.runs_of(those).into_iter().try_for_each(|(at, text)| self.put(at, text))
    }

    fn put(&self, at: u64, text: &[u8]) -> Result<(), PagerError> {
        match self.memory.put(at, text)? {
            Guest::There => Ok(()),
            Guest::Gone => Err(PagerError::GuestGone),
        }
    }

    fn is_there(&self, frame: Frame) -> bool {
        self.there[self.fill.place(frame)].load(Ordering::SeqCst)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<Frame, Arc<Unpacked>>> {
        // A thread that panicked left a map that is whole; the process ends for that in any case.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
