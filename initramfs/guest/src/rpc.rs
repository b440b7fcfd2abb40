//! Serves the host: one thread a connection, one call a connection.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use holdfast_wire::{
    WIRE_VERSION,
    frame::{self, CHUNK_BYTES_MAX, FrameError},
    guest::{Call, Failure, FailureKind, Output, Request},
};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};

use crate::{
    clock::poll_until,
    connection::Connection,
    connections, exec,
    failure::{failure, from_io, invalid},
    files,
    guest::Guest,
    info,
    link::Link,
    processes, resumed,
};

/// Connections served at once. Each may hold some hundred KiB, which must fit PID 1's reserve.
const CONNECTIONS_MAX: usize = 128;

/// Stack of a thread of PID 1. The deepest holds one 16 KiB buffer.
pub const THREAD_STACK_BYTES: usize = 128 * 1024;

/// How long the host may take to send its request.
const REQUEST_MAX: Duration = Duration::from_secs(10);

/// How long the host may take to close the connection on which it asked for the power-off.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Pause after a connection could not be accepted: the reason (memory, descriptors) takes time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Where connections come from.
pub trait Listener {
    /// Readable when a connection waits.
    fn readable(&self) -> BorrowedFd<'_>;
    /// `None`: the connection is not the host's and has been closed.
    fn accept(&self) -> io::Result<Option<OwnedFd>>;
}

/// Serves until the power-off is asked for and the workload has been stopped.
pub fn serve(listener: &impl Listener, guest: &Arc<Guest>) -> io::Result<()> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(listener.readable(), PollFlags::IN),
            PollFd::new(&guest.off, PollFlags::IN),
        ];
        poll_until(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        match listener.accept() {
            Ok(Some(socket)) => dispatch(socket, guest),
            Ok(None) => {}
            // One connection that failed must not end all others.
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
    }
}

/// One of the connections served at once. Given back on drop.
#[derive(Debug)]
pub(crate) struct Slot(Arc<Guest>);

impl Slot {
    fn take(guest: &Arc<Guest>) -> Option<Self> {
        let slot = Self(Arc::clone(guest));
        let taken = guest.connections.fetch_add(1, Ordering::AcqRel);
        // Dropping the slot takes the addition back.
        (taken < CONNECTIONS_MAX).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

fn dispatch(socket: OwnedFd, guest: &Arc<Guest>) {
    let mut connection = Connection::new(socket);
    let Some(slot) = Slot::take(guest) else {
        let message = format!("{CONNECTIONS_MAX} calls are being served already");
        // A few dozen bytes into an empty socket do not wait.
        let _ = connection.send(&Output::Failed(failure(FailureKind::Exhausted, message)));
        return;
    };
    // Without a thread the connection is closed, which the host takes as a failure of the call.
    let _ = thread::Builder::new()
        .name("call".to_owned())
        .stack_size(THREAD_STACK_BYTES)
        .spawn(move || serve_one(connection, slot));
}

fn serve_one(mut connection: Connection, slot: Slot) {
    let guest = Arc::clone(&slot.0);
    let answer = match read_request(&mut connection) {
        // These may give the connection to another thread, and its place with it.
        Ok(Some(Call::Exec(exec))) => {
            return exec::run(&guest, &exec, Link::new(connection, slot, 0));
        }
        Ok(Some(Call::Attach { key, from })) => match guest.keeper.find(key) {
            Ok(kept) => return kept.enter(key, Link::new(connection, slot, from)),
            Err(refused) => Err(refused),
        },
        Ok(Some(call)) => carry_out(call, &mut connection, &guest),
        Ok(None) => return,
        Err(refused) => Err(refused),
    };
    if let Err(refused) = answer {
        // The host may have gone; then nobody is left to tell.
        let _ = connection.set_blocking();
        let _ = connection.send(&Output::Failed(refused));
    }
}

fn read_request(connection: &mut Connection) -> Result<Option<Call>, Failure> {
    let limited = connection.limit_reads(Some(REQUEST_MAX));
    limited.map_err(|error| from_io("cannot limit the connection", &error))?;
    let request: Request = match frame::read_frame(connection) {
        Ok(Some(request)) => request,
        Ok(None) | Err(FrameError::Cut | FrameError::Io(_)) => return Ok(None),
        Err(error) => return Err(invalid(format!("this is not a request: {error}"))),
    };
    let unlimited = connection.limit_reads(None);
    unlimited.map_err(|error| from_io("cannot unlimit the connection", &error))?;
    if request.version != WIRE_VERSION {
        let asked = request.version;
        let message = format!("version {asked} was asked for; this guest speaks {WIRE_VERSION}");
        return Err(invalid(message));
    }
    Ok(Some(request.call))
}

/// Does what was asked. `Err` is the answer still to be sent.
fn carry_out(call: Call, connection: &mut Connection, guest: &Guest) -> Result<(), Failure> {
    match call {
        Call::Info => {
            let exited = guest.entrypoint_exited();
            let execs = guest.keeper.running();
            let info = info::info(&guest.site.root, guest.ready_ns, exited, execs);
            say(connection, &Output::Info(info));
            Ok(())
        }
        Call::Start(start) => done(connection, guest.start(&start)),
        // Carried out with the connection itself, by the caller.
        Call::Exec(_) | Call::Attach { .. } => Ok(()),
        Call::ReadFile { path } => {
            let complete = files::read(&*guest.workload()?, &path, connection)?;
            done_if(complete, connection)
        }
        Call::WriteFile { path, mode, create_dirs } => {
            let workload = guest.workload()?;
            let complete = files::write(&workload, &path, mode, create_dirs, connection)?;
            done_if(complete, connection)
        }
        Call::Processes => {
            say(connection, &Output::Processes(processes::list(&*guest.workload()?)?));
            Ok(())
        }
        Call::Log => {
            let log = guest.workload()?.entrypoint().map(|main| main.log()).unwrap_or_default();
            for piece in log.chunks(CHUNK_BYTES_MAX) {
                say(connection, &Output::Data(piece.to_vec()));
            }
            done_if(true, connection)
        }
        Call::Resumed { unix_ns } => {
            let skew_ns = resumed::set_clock(unix_ns)?;
            let connections_reset = connections::reset();
            say(connection, &Output::WentOn { skew_ns, connections_reset });
            Ok(())
        }
        Call::Network(network) => done(connection, guest.connect(network)),
        Call::Quiesce(wanted) => {
            done(connection, guest.frost.quiesce(guest.site.disk.as_deref(), wanted))
        }
        Call::Thaw => done(connection, guest.frost.thaw()),
        Call::Renew { host_name, seed } => done(connection, guest.renew(&host_name, &seed)),
        Call::PowerOff { grace_ms } => {
            let grace = Duration::from_millis(u64::from(grace_ms));
            done(connection, guest.power_off(grace))?;
            connection.finish(FAREWELL_MAX);
            match rustix::io::write(&guest.off, &1_u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => Ok(()),
                Err(error) => Err(from_io("cannot power off", &error.into())),
            }
        }
    }
}

/// The host may have gone; what was done stays done, so that nothing follows from it.
fn say(connection: &mut Connection, output: &Output) {
    let _ = connection.send(output);
}

fn done(connection: &mut Connection, outcome: Result<(), Failure>) -> Result<(), Failure> {
    outcome?;
    done_if(true, connection)
}

fn done_if(complete: bool, connection: &mut Connection) -> Result<(), Failure> {
    if complete {
        say(connection, &Output::Done);
    }
    Ok(())
}

impl Listener for std::os::unix::net::UnixListener {
    fn readable(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        Ok(Some(Self::accept(self)?.0.into()))
    }
}
