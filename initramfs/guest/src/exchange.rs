//! The streams between the host and one running command.
//!
//! One thread carries them all, because a thread inside the sandbox cannot start others. Nothing
//! held here grows: output is read only when the host has taken what came before, and input is taken
//! from the host only while the command reads it. A kept command without a connection is not held
//! up: what it says is remembered as far as [`Replay`] goes.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use holdfast_wire::{
    frame::CHUNK_BYTES_MAX,
    guest::{COLLECT_MS_MAX, Exited, Failure, Input, Output},
};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};

use crate::{
    clock::poll_until,
    failure::{from_errno, from_io, invalid},
    kept::Seat,
    link::Link,
    process::Process,
    replay::{Replay, Stream},
    signals,
};

/// How long output of background children is waited for after the command has ended.
const GRACE: Duration = Duration::from_millis(200);

/// How long the end of a kept command waits to be collected.
const COLLECT_MAX: Duration = Duration::from_millis(COLLECT_MS_MAX);

/// Input held for a command that does not read it, in bytes. Beyond it the host is made to wait,
/// signals behind the input included.
const STDIN_HELD_MAX: usize = 256 * 1024;

/// A started command and the near ends of its streams.
#[derive(Debug)]
pub(crate) struct Running {
    pub process: Process,
    pub deadline: Option<Instant>,
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// A running command and the streams between it and the host.
pub(crate) struct Exchange {
    process: Process,
    deadline: Option<Instant>,
    /// Everything of it was killed by us already.
    killed: bool,
    timed_out: bool,
    ended: Option<Ended>,
    stdin: Stdin,
    /// stdout and stderr, until they are closed.
    streams: [Option<OwnedFd>; 2],
    replay: Replay,
    /// Who is there to be told. `None`: nobody, which a kept command outlives.
    link: Option<Link>,
    /// `None`: it is not kept.
    seat: Option<Seat>,
    /// Since when there has been no connection.
    alone_since: Instant,
    /// Its end was collected, or its seat was given to another.
    forgotten: bool,
}

/// The command's stdin and what it has not read yet.
struct Stdin {
    pipe: Option<OwnedFd>,
    held: Vec<u8>,
    /// Close once what is held has been written.
    last: bool,
    /// Bytes taken from the host.
    taken: u64,
}

struct Ended {
    exited: Exited,
    at: Instant,
    /// Bytes that were in the streams at the end: the command's own, to be delivered.
    owed: [u64; 2],
    /// Everything that is its own was read.
    complete: bool,
}

/// What one wait was for.
#[derive(Clone, Copy)]
enum Source {
    Door,
    Host(PollFlags),
    Stdin,
    Stream(usize),
    Process,
}

impl Exchange {
    pub(crate) fn new(running: Running, link: Link, seat: Option<Seat>) -> Result<Self, Errno> {
        let Running { process, deadline, stdin, stdout, stderr } = running;
        let streams = [Some(stdout), Some(stderr)];
        for fd in stdin.iter().chain(streams.iter().flatten()) {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        let replay = if seat.is_some() { Replay::kept() } else { Replay::passing() };
        Ok(Self {
            process,
            deadline,
            killed: false,
            timed_out: false,
            ended: None,
            stdin: Stdin { pipe: stdin, held: Vec::new(), last: false, taken: 0 },
            streams,
            replay,
            link: Some(link),
            seat,
            alone_since: Instant::now(),
            forgotten: false,
        })
    }

    /// Carries the streams until there is nothing more to tell, or nobody to tell it.
    pub(crate) fn run(mut self) {
        if let Err(refused) = self.carry()
            && let Some(link) = self.link.take()
        {
            link.refuse(refused);
        }
        // Dropping the process kills it and all its children, if it runs.
    }

    fn carry(&mut self) -> Result<(), Failure> {
        self.greet()?;
        loop {
            self.advance()?;
            if self.is_over() {
                return Ok(());
            }
            for source in self.wait()? {
                self.serve(source)?;
            }
            self.enforce_time();
        }
    }

    /// The first answer on a connection.
    fn greet(&mut self) -> Result<(), Failure> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.set_nonblocking()
            .map_err(|error| from_errno("cannot carry the command's streams", error))?;
        link.taken_told = self.stdin.taken;
        link.queue(&Output::Started {
            pid: self.process.inner_pid,
            kept: self.seat.is_some(),
            stdin_taken: self.stdin.taken,
        })
    }

    /// Sends what the host has not got yet, as far as it takes it.
    fn advance(&mut self) -> Result<(), Failure> {
        self.note_completeness();
        while let Some(link) = self.link.as_mut().filter(|link| link.is_idle() && !link.lost) {
            if link.at < self.replay.start() {
                let bytes = self.replay.start() - link.at;
                link.at = self.replay.start();
                link.queue(&Output::Gap { bytes })?;
            } else if let Some((stream, bytes)) = self.replay.piece(link.at) {
                link.at += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                link.queue(&match stream {
                    Stream::Stdout => Output::Stdout(bytes),
                    Stream::Stderr => Output::Stderr(bytes),
                })?;
            } else if self.seat.is_some() && link.taken_told < self.stdin.taken {
                link.taken_told = self.stdin.taken;
                link.queue(&Output::Taken { stdin: self.stdin.taken })?;
            } else if let Some(ended) = self.ended.as_ref().filter(|ended| ended.complete)
                && !link.told_end
            {
                link.told_end = true;
                link.queue(&Output::Exited(ended.exited))?;
            } else {
                break;
            }
        }
        if self.link.as_ref().is_some_and(|link| link.lost) {
            self.link = None;
            self.alone_since = Instant::now();
        }
        self.replay.forget(self.link.as_ref().map_or(self.replay.end(), |link| link.at));
        Ok(())
    }

    /// Once everything of the command's own was read, the background's output is nobody's.
    fn note_completeness(&mut self) {
        let Some(ended) = self.ended.as_mut().filter(|ended| !ended.complete) else { return };
        let delivered = ended.owed == [0, 0] && Instant::now() >= ended.at + GRACE;
        if delivered || self.streams.iter().all(Option::is_none) {
            ended.complete = true;
            self.streams = [None, None];
            if let Some(seat) = &self.seat {
                seat.has_ended(ended.at);
            }
        }
    }

    fn is_over(&self) -> bool {
        match (&self.seat, &self.link) {
            (Some(_), _) => self.forgotten,
            (None, Some(link)) => link.told_end && link.is_idle(),
            (None, None) => true,
        }
    }

    /// Waits for whatever can go on now.
    fn wait(&self) -> Result<Vec<Source>, Failure> {
        let mut sources = Vec::with_capacity(6);
        let mut fds = Vec::with_capacity(6);
        let mut wait_for = |source, fd, flags| {
            sources.push(source);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        if let Some(seat) = &self.seat {
            wait_for(Source::Door, seat.bell(), PollFlags::IN);
        }
        if let Some(link) = &self.link {
            // The end of a kept command is collected by a message.
            let listens = self.ended.is_none() || self.seat.is_some();
            let mut host = PollFlags::empty();
            host.set(PollFlags::OUT, !link.is_idle());
            host.set(PollFlags::IN, listens && self.stdin.has_room());
            wait_for(Source::Host(host), link.as_fd(), host);
        }
        if let Some(pipe) = self.stdin.pipe.as_ref().filter(|_| !self.stdin.held.is_empty()) {
            wait_for(Source::Stdin, pipe.as_fd(), PollFlags::OUT);
        }
        // What is idle after `advance` has got everything.
        if self.link.as_ref().is_none_or(Link::is_idle) {
            for (index, stream) in self.streams.iter().enumerate() {
                if let Some(stream) = stream {
                    wait_for(Source::Stream(index), stream.as_fd(), PollFlags::IN);
                }
            }
        }
        if self.ended.is_none() {
            wait_for(Source::Process, self.process.pidfd(), PollFlags::IN);
        }
        poll_until(&mut fds, self.next_instant())
            .map_err(|error| from_errno("cannot wait for the command", error))?;
        let ready = sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready
            .map(|(source, fd)| match source {
                Source::Host(_) => Source::Host(fd.revents()),
                source => source,
            })
            .collect())
    }

    fn next_instant(&self) -> Option<Instant> {
        match &self.ended {
            None => {
                let deadline = self.deadline.filter(|_| !self.timed_out);
                deadline.into_iter().chain(self.alone_until().filter(|_| !self.killed)).min()
            }
            Some(Ended { complete: true, at, .. }) => {
                self.seat.as_ref().map(|_| at.max(&self.alone_since).to_owned() + COLLECT_MAX)
            }
            Some(Ended { owed: [0, 0], at, .. }) => Some(*at + GRACE),
            // Only the streams, or the host that is behind, can change anything.
            Some(_) => None,
        }
    }

    /// When the command has been alone for too long.
    fn alone_until(&self) -> Option<Instant> {
        let seat = self.seat.as_ref().filter(|_| self.link.is_none())?;
        self.alone_since.checked_add(seat.alone_max)
    }

    fn serve(&mut self, source: Source) -> Result<(), Failure> {
        match source {
            Source::Door => self.answer_door(),
            Source::Host(events) => {
                let Some(link) = &mut self.link else { return Ok(()) };
                link.write_out();
                if events.contains(PollFlags::IN) {
                    link.read();
                    return self.take_inputs();
                }
                // Reported without being asked for.
                link.lost |= events.intersects(PollFlags::HUP | PollFlags::ERR);
                Ok(())
            }
            Source::Stdin => {
                self.stdin.write();
                // There may be room now for frames that came long ago.
                self.take_inputs()
            }
            Source::Stream(index) => self.read_stream(index),
            Source::Process => self.note_end(),
        }
    }

    /// A new connection replaces the one there is: it is the host started anew.
    fn answer_door(&mut self) -> Result<(), Failure> {
        let Some(seat) = &self.seat else { return Ok(()) };
        match seat.answer_door() {
            Ok(Some(link)) if link.at > self.replay.end() => {
                let (from, end) = (link.at, self.replay.end());
                link.refuse(invalid(format!("byte {from} was asked for; there are {end}")));
                Ok(())
            }
            Ok(Some(link)) => {
                self.link = Some(link);
                self.greet()
            }
            Ok(None) => Ok(()),
            Err(_) => {
                self.forgotten = true;
                Ok(())
            }
        }
    }

    fn enforce_time(&mut self) {
        let now = Instant::now();
        if let Some(ended) = &self.ended {
            let waited_since = ended.at.max(self.alone_since);
            self.forgotten |= ended.complete && now >= waited_since + COLLECT_MAX;
            return;
        }
        if !self.timed_out && self.deadline.is_some_and(|deadline| now >= deadline) {
            self.timed_out = true;
            self.kill();
        }
        if !self.killed && self.alone_until().is_some_and(|until| now >= until) {
            self.kill();
        }
    }

    fn kill(&mut self) {
        self.killed = true;
        // The cgroup is there as long as the process is; it cannot refuse.
        let _ = self.process.kill();
    }

    fn note_end(&mut self) -> Result<(), Failure> {
        let exited = self
            .process
            .wait()
            .map_err(|error| from_io("cannot learn how the command ended", &error))?;
        let exited = if self.timed_out { Exited::TimedOut } else { exited };
        let owed = [0, 1].map(|index| {
            let stream: Option<&OwnedFd> = self.streams[index].as_ref();
            stream.and_then(|stream| rustix::io::ioctl_fionread(stream).ok()).unwrap_or_default()
        });
        self.ended = Some(Ended { exited, at: Instant::now(), owed, complete: false });
        // Nobody reads it any more.
        self.stdin.close();
        Ok(())
    }

    /// Reads one piece of output, if the host has taken the one before.
    fn read_stream(&mut self, index: usize) -> Result<(), Failure> {
        let behind = |link: &Link| !link.is_idle() || link.at < self.replay.end();
        if self.link.as_ref().is_some_and(behind) {
            return Ok(());
        }
        let Some(stream) = &self.streams[index] else { return Ok(()) };
        let mut bytes = vec![0; CHUNK_BYTES_MAX];
        let count = match rustix::io::read(stream, &mut bytes) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(from_errno("cannot read the command's output", error)),
        };
        if let Some(ended) = &mut self.ended {
            let owed = &mut ended.owed[index];
            *owed = owed.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        }
        if count == 0 {
            self.streams[index] = None;
            return Ok(());
        }
        let stream = if index == 0 { Stream::Stdout } else { Stream::Stderr };
        self.replay.push(stream, &bytes[..count]);
        self.advance()
    }

    /// Takes what the host sent and can be taken now. A kept command outlives a host that does not
    /// keep to the protocol; another does not.
    fn take_inputs(&mut self) -> Result<(), Failure> {
        let outcome = self.take_all_inputs();
        self.stdin.write();
        match outcome {
            Err(refused) if self.seat.is_some() => {
                if let Some(link) = self.link.take() {
                    link.refuse(refused);
                    self.alone_since = Instant::now();
                }
                Ok(())
            }
            outcome => outcome,
        }
    }

    fn take_all_inputs(&mut self) -> Result<(), Failure> {
        while self.stdin.has_room() {
            let Some(link) = &mut self.link else { return Ok(()) };
            let Some(input) = link.take_input()? else { return Ok(()) };
            match input {
                Input::Data(bytes) => self.stdin.hold(&bytes),
                Input::End => self.stdin.last = true,
                Input::Signal(number) if signals::is_signal(number) => {
                    // The process may have ended a moment ago, which is no error.
                    let _ = self.process.signal(number);
                }
                Input::Signal(number) => {
                    return Err(invalid(format!("there is no signal {number}")));
                }
                Input::Kill if self.ended.is_none() => self.kill(),
                Input::Kill => {}
                Input::Collect => self.forgotten |= link.told_end,
            }
        }
        Ok(())
    }
}

impl Stdin {
    fn has_room(&self) -> bool {
        self.held.len() < STDIN_HELD_MAX
    }

    /// Input for a command that has no stdin, or has closed it, is dropped, as by a shell's pipe.
    fn hold(&mut self, bytes: &[u8]) {
        self.taken += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.pipe.is_some() && !self.last {
            self.held.extend_from_slice(bytes);
        }
    }

    fn write(&mut self) {
        let mut written = 0;
        while let Some(pipe) = self.pipe.as_ref().filter(|_| written < self.held.len()) {
            match rustix::io::write(pipe, &self.held[written..]) {
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.pipe = None;
                    written = self.held.len();
                }
            }
        }
        self.held.drain(..written);
        if self.last && self.held.is_empty() {
            self.pipe = None;
        }
    }

    fn close(&mut self) {
        self.pipe = None;
        self.held = Vec::new();
        self.last = true;
    }
}
