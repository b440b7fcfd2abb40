//! Fills the memory of one guest that goes on already (userfaultfd(2)). The library is the whole
//! program, so that tests reach its parts; `main.rs` only calls [`run`].
//!
//! Two threads: one answers faults, the other brings the rest in the order in which it was wanted
//! last time. Each page is put at most once, whoever comes first: the kernel refuses the second.

mod confine;
mod error;
mod faults;
mod fill;
mod pieces;
#[allow(unsafe_code)]
mod sys;

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use holdfast_wire::{
    WIRE_VERSION, frame,
    pager::{Report, Request},
};
use log::error;

pub use error::PagerError;

/// The request was none.
const EXIT_BAD_REQUEST: u8 = 1;
/// Filling failed; the report says why.
const EXIT_FAILED: u8 = 3;

/// Serves one request and ends.
pub fn run() -> ExitCode {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).parse_default_env().init();
    if io::stdin().is_terminal() {
        // Nobody types frames: somebody wants to know what this program is.
        let help = "holdfast-pager fills the memory of a microVM that is resumed from its snapshot.\n\
                    The agent starts it, with a request on stdin; there is nothing to run by hand.\n";
        let _ = io::stderr().write_all(help.as_bytes());
        return ExitCode::from(EXIT_BAD_REQUEST);
    }
    let request: Request = match frame::read_frame(&mut io::stdin().lock()) {
        Ok(Some(request)) => request,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            error!(error:%; "request cannot be read");
            return ExitCode::from(EXIT_BAD_REQUEST);
        }
    };
    let (report, code) = match serve(request) {
        Ok(filled) => (Report::Filled(filled), ExitCode::SUCCESS),
        Err(error) => {
            let message = chain(&error);
            error!(reason:% = message; "guest memory is not filled");
            (Report::Failed { damaged: error.is_damage(), message }, ExitCode::from(EXIT_FAILED))
        }
    };
    match frame::write_frame(&mut io::stdout().lock(), &report) {
        Ok(()) => code,
        // The agent is gone; the guest has its memory all the same.
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

fn serve(request: Request) -> Result<holdfast_wire::pager::Filled, PagerError> {
    if request.version != WIRE_VERSION {
        return Err(PagerError::Version { found: request.version });
    }
    let job = fill::Job::take(request)?;
    job.run()
}

/// An error with what lies beneath it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut beneath = error.source();
    while let Some(error) = beneath {
        text.push_str(": ");
        text.push_str(&error.to_string());
        beneath = error.source();
    }
    text
}
