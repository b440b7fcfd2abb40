//! One process, one microVM: KVM, virtio, threads; no tokio. The library is the whole program, so
//! that tests and fuzz targets reach its parsers; `main.rs` only calls [`run`].

mod boot;
mod bus;
mod config;
mod control;
mod devices;
mod event;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod generation;
mod inherited;
mod layout;
mod legacy;
mod limits;
mod machine;
mod random;
mod saved;
pub mod seccomp;
mod session;
mod sys;
mod vm;

use std::{error::Error, io, panic, process::ExitCode};

use holdfast_wire::vmm::Exit;
use log::{LevelFilter, error, info};

use crate::{
    config::ConfigError,
    control::Control,
    inherited::{FdError, InheritedFds},
    machine::{Machine, MachineError},
    seccomp::SeccompError,
    session::Session,
};

/// Exit code of a VMM that panicked: none of [`Exit`]'s.
const PANIC_CODE: i32 = 101;

/// Why the VMM could not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Fd(#[from] FdError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("control socket cannot be served")]
    Control(#[source] io::Error),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

impl StartError {
    /// What the operator can do next.
    fn hint(&self) -> &'static str {
        match self {
            Self::Config(_) => "agent and VMM may be of different builds: install both anew",
            Self::Fd(_) => "this program is started by the agent, which passes its fds",
            Self::Machine(error) => error.hint(),
            Self::Control(_) => "the control fd must be a listening Unix stream socket",
            Self::Seccomp(_) => "this is a bug of this build: report it with this message",
        }
    }
}

/// Runs the VMM to its end and says how it ended.
pub fn run() -> ExitCode {
    env_logger::Builder::new().filter_level(LevelFilter::Info).parse_env("HOLDFAST_LOG").init();
    end_on_panic();
    // Started by descriptor, it would be called by that one's number.
    if let Err(error) = rustix::thread::set_name(c"holdfast-vmm") {
        log::debug!(error:%; "process keeps its name");
    }
    let exit = start().map_or_else(failed_start, Session::serve);
    info!(exit:? = exit; "microVM ended");
    ExitCode::from(exit.code())
}

/// A panic ends the process with the code that Rust's own end by panic has. An abort, which a
/// release build would do, is a signal, and the first process of a pid namespace gets none from
/// itself.
fn end_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        sys::end_at_once(PANIC_CODE);
    }));
}

fn start() -> Result<Session, StartError> {
    seccomp::compile()?;
    let (config, _still_open) = config::read()?;
    let mut fds = InheritedFds::claim(&config)?;
    let (sender, receiver) = event::channel().map_err(StartError::Control)?;
    let listener = fds.take(config.control_fd)?;
    let control = Control::new(listener, receiver.bell()).map_err(StartError::Control)?;
    let machine = Machine::new(&config, &mut fds, sender)?;
    Ok(Session::new(machine, control, receiver))
}

fn failed_start(failure: StartError) -> Exit {
    let hint = failure.hint();
    error!(reason:% = chain(&failure), hint:%; "VMM cannot start");
    Exit::VmmError(chain(&failure))
}

/// An error with what lies beneath it, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut beneath = error.source();
    while let Some(error) = beneath {
        text.push_str(": ");
        text.push_str(&error.to_string());
        beneath = error.source();
    }
    text
}
