//! The streams between the host and one running command.
//!
//! One thread carries them all, because a thread inside the sandbox cannot start others. Nothing
//! held here grows: output is read only when the host has taken what came before, and input is taken
//! from the host only while the command reads it.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use holdfast_wire::{
    frame::{self, CHUNK_BYTES_MAX, FrameError},
    guest::{Exited, Failure, FailureKind, Input, Output},
};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};

use crate::{
    clock::poll_until,
    connection::Connection,
    failure::{failure, from_errno, from_io, invalid},
    process::Process,
    signals,
};

/// How long output of background children is waited for after the command has ended.
const GRACE: Duration = Duration::from_millis(200);

/// Input held for a command that does not read it, in bytes. Beyond it the host is made to wait,
/// signals behind the input included.
const STDIN_HELD_MAX: usize = 256 * 1024;

/// A running command and the streams between it and the host.
pub(crate) struct Exchange<'a> {
    connection: &'a mut Connection,
    process: Process,
    deadline: Option<Instant>,
    timed_out: bool,
    ended: Option<Ended>,
    stdin: Stdin,
    /// stdout and stderr, until they are closed.
    streams: [Option<OwnedFd>; 2],
    /// Frames on their way to the host: at most one piece of output and a few small answers.
    out: Vec<u8>,
    out_sent: usize,
    /// Bytes from the host that are not a whole frame yet.
    inbox: Vec<u8>,
    /// The host has gone: there is nobody to tell.
    lost: bool,
}

/// The command's stdin and what it has not read yet.
struct Stdin {
    pipe: Option<OwnedFd>,
    held: Vec<u8>,
    /// Close once what is held has been written.
    last: bool,
}

struct Ended {
    exited: Exited,
    at: Instant,
    /// Bytes that were in the streams at the end: the command's own, to be delivered.
    owed: [u64; 2],
}

/// What one wait was for.
#[derive(Clone, Copy)]
enum Source {
    Host(PollFlags),
    Stdin,
    Stream(usize),
    Process,
}

impl<'a> Exchange<'a> {
    pub(crate) fn new(
        connection: &'a mut Connection,
        process: Process,
        deadline: Option<Instant>,
        stdin: Option<OwnedFd>,
        streams: [Option<OwnedFd>; 2],
    ) -> Result<Self, Errno> {
        for fd in stdin.iter().chain(streams.iter().flatten()) {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        rustix::io::ioctl_fionbio(connection.as_fd(), true)?;
        let stdin = Stdin { pipe: stdin, held: Vec::new(), last: false };
        Ok(Self {
            connection,
            process,
            deadline,
            timed_out: false,
            ended: None,
            stdin,
            streams,
            out: Vec::new(),
            out_sent: 0,
            inbox: Vec::new(),
            lost: false,
        })
    }

    /// Returns how the command ended; `None`: the host has gone before that.
    pub(crate) fn run(mut self) -> Result<Option<Exited>, Failure> {
        let pid = self.process.inner_pid;
        self.queue(&Output::Started { pid })?;
        while !self.is_over() {
            let ready = self.wait()?;
            for source in ready {
                self.serve(source)?;
            }
            if self.lost && self.ended.is_none() {
                // Dropping the process kills it and all its children.
                return Ok(None);
            }
            self.enforce_deadline();
        }
        let Some(Ended { exited, .. }) = self.ended else { return Ok(None) };
        self.queue(&Output::Exited(exited))?;
        while !self.lost && !self.out.is_empty() {
            let mut fds = [PollFd::new(&*self.connection, PollFlags::OUT)];
            poll_until(&mut fds, None).map_err(|error| from_errno("cannot wait", error))?;
            self.write_out();
        }
        Ok(Some(exited))
    }

    fn is_over(&self) -> bool {
        let Some(ended) = &self.ended else { return false };
        let delivered = ended.owed == [0, 0] && Instant::now() >= ended.at + GRACE;
        let closed = self.streams.iter().all(Option::is_none);
        self.lost || (self.out.is_empty() && (closed || delivered))
    }

    /// Waits for whatever can go on now.
    fn wait(&self) -> Result<Vec<Source>, Failure> {
        let mut sources = Vec::with_capacity(5);
        let mut fds = Vec::with_capacity(5);
        let mut wait_for = |source, fd, flags| {
            sources.push(source);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        let mut host = PollFlags::empty();
        host.set(PollFlags::OUT, !self.out.is_empty());
        host.set(PollFlags::IN, self.ended.is_none() && self.stdin.held.len() < STDIN_HELD_MAX);
        wait_for(Source::Host(host), self.connection.as_fd(), host);
        if let Some(pipe) = self.stdin.pipe.as_ref().filter(|_| !self.stdin.held.is_empty()) {
            wait_for(Source::Stdin, pipe.as_fd(), PollFlags::OUT);
        }
        if self.out.is_empty() {
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
            // With the host behind there is nothing to do at the end of the grace but wait for it.
            Some(_) if !self.out.is_empty() => None,
            Some(ended) => Some(ended.at + GRACE),
            None => self.deadline.filter(|_| !self.timed_out),
        }
    }

    fn serve(&mut self, source: Source) -> Result<(), Failure> {
        match source {
            Source::Host(events) => {
                self.write_out();
                if events.contains(PollFlags::IN) {
                    return self.read_host();
                }
                // Reported without being asked for.
                self.lost |= events.intersects(PollFlags::HUP | PollFlags::ERR);
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

    fn enforce_deadline(&mut self) {
        let over = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if over && !self.timed_out && self.ended.is_none() {
            self.timed_out = true;
            // The cgroup is there as long as the process is; it cannot refuse.
            let _ = self.process.kill();
        }
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
        self.ended = Some(Ended { exited, at: Instant::now(), owed });
        // Nobody reads it any more.
        self.stdin = Stdin { pipe: None, held: Vec::new(), last: true };
        Ok(())
    }

    /// Reads one piece of output, if the host has taken the one before.
    fn read_stream(&mut self, index: usize) -> Result<(), Failure> {
        let Some(stream) = self.streams[index].as_ref().filter(|_| self.out.is_empty()) else {
            return Ok(());
        };
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
        bytes.truncate(count);
        let piece = if index == 0 { Output::Stdout(bytes) } else { Output::Stderr(bytes) };
        self.queue(&piece)
    }

    /// Takes what the host sent and can be taken now.
    fn read_host(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 16 * 1024];
        match rustix::net::recv(
            self.connection.as_fd(),
            &mut bytes,
            rustix::net::RecvFlags::empty(),
        ) {
            Ok((_, 0)) => self.lost = true,
            Ok((_, count)) => self.inbox.extend_from_slice(&bytes[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.lost = true,
        }
        self.take_inputs()
    }

    fn take_inputs(&mut self) -> Result<(), Failure> {
        let mut taken = 0;
        while self.stdin.held.len() < STDIN_HELD_MAX {
            let split = frame::split_frame(&self.inbox[taken..]).map_err(|error| bad(&error))?;
            let Some(split) = split else { break };
            let input = frame::decode(split.frame).map_err(|error| bad(&error))?;
            taken = self.inbox.len() - split.rest.len();
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
            }
        }
        self.inbox.drain(..taken);
        self.stdin.write();
        Ok(())
    }

    fn queue(&mut self, output: &Output) -> Result<(), Failure> {
        let framed = frame::encode(output)
            .map_err(|error| failure(FailureKind::Internal, error.to_string()))?;
        self.out.extend_from_slice(&framed);
        self.write_out();
        Ok(())
    }

    fn write_out(&mut self) {
        let flags = rustix::net::SendFlags::NOSIGNAL;
        while self.out_sent < self.out.len() {
            match rustix::net::send(self.connection.as_fd(), &self.out[self.out_sent..], flags) {
                Ok(count) => self.out_sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.lost = true;
                    break;
                }
            }
        }
        self.out.clear();
        self.out_sent = 0;
    }
}

impl Stdin {
    /// Input for a command that has no stdin, or has closed it, is dropped, as by a shell's pipe.
    fn hold(&mut self, bytes: &[u8]) {
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
}

fn bad(error: &FrameError) -> Failure {
    invalid(format!("what followed the request is not input: {error}"))
}
