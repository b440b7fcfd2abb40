//! The two threads that fill guest memory, and what they share.

use std::{
    collections::BTreeSet,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
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

/// Frames that were asked for and are not in the memory file yet. What is asked for beyond that is
/// written there before the next is answered.
const UNWRITTEN_MAX: usize = 64;

/// What nobody has asked for is brought from so long on, unless the guest still asks.
const EARLIEST: Duration = Duration::from_millis(30);
/// A guest that asks for nothing for so long has what it needs just now.
const QUIET: Duration = Duration::from_millis(5);
/// From then on in any case: the sooner all is there, the sooner nobody has to ask.
const LATEST: Duration = Duration::from_millis(250);

/// State of a frame.
const UNTOUCHED: u8 = 0;
const CLAIMED: u8 = 1;
const THERE: u8 = 2;

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
            first: request.first.into_iter().take(FIRST_MAX).collect(),
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
            states: (0..fill.count()).map(|_| AtomicU8::new(UNTOUCHED)).collect(),
            fill,
            memory: self.memory,
            copy: self.copy,
            unwritten: Mutex::default(),
            began: Instant::now(),
            asked_us: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let streaming = streamer.give(Arc::clone(&work), self.first.clone())?;
        let answered = work.answer();
        // Whatever it came to, the other is not left alone.
        work.ended.store(true, Ordering::SeqCst);
        streaming.join().map_err(|_| PagerError::Thread)??;
        let (faults, missed) = answered?;
        work.write_rest()?;
        work.memory.release()?;
        let mut first = self.first;
        first.extend(missed);
        first.truncate(FIRST_MAX);
        Ok(Filled { faults, bytes: work.memory.put.load(Ordering::Relaxed), first })
    }
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
    /// Of each frame.
    states: Vec<AtomicU8>,
    memory: Memory,
    copy: fs::File,
    /// What somebody waited for: the memory file, for which nobody does, gets it from the other
    /// thread.
    unwritten: Mutex<Vec<Unpacked>>,
    began: Instant,
    /// When a page was asked for last, in microseconds after that.
    asked_us: AtomicU64,
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
                let Some(frame) = self.fill.frame_at(at) else {
                    self.memory.put(at - at % PAGE_BYTES, &ZERO)?;
                    continue;
                };
                missed.push(at);
                // Claimed or not: who waits does not wait for a thread of low priority.
                if self.state(frame).swap(CLAIMED, Ordering::SeqCst) == THERE {
                    self.state(frame).store(THERE, Ordering::SeqCst);
                    continue;
                }
                let unpacked = self.bring(&mut reader, frame)?;
                let mut unwritten = self.unwritten();
                if unwritten.len() < UNWRITTEN_MAX {
                    unwritten.push(unpacked);
                } else {
                    drop(unwritten);
                    self.write(&unpacked)?;
                }
            }
        }
        Ok((count, missed))
    }

    /// Brings every frame that is not there.
    fn stream(&self, first: &[u64]) -> Result<(), PagerError> {
        let streamed = self.try_to_stream(first);
        self.ended.store(true, Ordering::SeqCst);
        streamed
    }

    fn try_to_stream(&self, first: &[u64]) -> Result<(), PagerError> {
        let mut reader = FrameReader::new()?;
        self.stream_all(&mut reader, first.iter().filter_map(|at| self.fill.frame_at(*at)))?;
        self.wait_for_quiet();
        self.stream_all(&mut reader, self.fill.frames())
    }

    /// The guest's CPUs may be this thread's too, and its cgroup is another: priorities do not hold
    /// between them.
    fn wait_for_quiet(&self) {
        loop {
            let now = self.began.elapsed();
            let asked = Duration::from_micros(self.asked_us.load(Ordering::Relaxed));
            let quiet = now >= EARLIEST && now.saturating_sub(asked) >= QUIET;
            if quiet || now >= LATEST || self.ended.load(Ordering::SeqCst) {
                return;
            }
            thread::park_timeout(Duration::from_millis(1));
        }
    }

    fn stream_all(
        &self,
        reader: &mut FrameReader,
        frames: impl Iterator<Item = Frame>,
    ) -> Result<(), PagerError> {
        for frame in frames {
            // The other thread gave up.
            if self.ended.load(Ordering::SeqCst) {
                break;
            }
            let state = self.state(frame);
            if state
                .compare_exchange(UNTOUCHED, CLAIMED, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
            {
                let unpacked = self.bring(reader, frame)?;
                self.write(&unpacked)?;
            }
            self.write_rest()?;
        }
        Ok(())
    }

    fn state(&self, frame: Frame) -> &AtomicU8 {
        &self.states[self.fill.place(frame)]
    }

    /// Puts a frame where the guest has it.
    fn bring(&self, reader: &mut FrameReader, frame: Frame) -> Result<Unpacked, PagerError> {
        let unpacked = self.fill.unpack(reader, frame)?;
        for (at, text) in unpacked.runs() {
            if self.memory.put(at, text)? == Guest::Gone {
                return Err(PagerError::GuestGone);
            }
        }
        self.state(frame).store(THERE, Ordering::SeqCst);
        Ok(unpacked)
    }

    /// Into the memory file.
    fn write(&self, unpacked: &Unpacked) -> Result<(), PagerError> {
        for (at, text) in unpacked.runs() {
            self.copy.file().write_all_at(text, at).map_err(PagerError::Copy)?;
        }
        Ok(())
    }

    fn write_rest(&self) -> Result<(), PagerError> {
        let unwritten = std::mem::take(&mut *self.unwritten());
        unwritten.iter().try_for_each(|unpacked| self.write(unpacked))
    }

    fn unwritten(&self) -> MutexGuard<'_, Vec<Unpacked>> {
        // A thread that panicked left a list that is whole; the process ends for that in any case.
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
