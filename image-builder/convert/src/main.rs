//! `holdfast-convert`: gets one image and makes it a root file system in the image store, then
//! ends. The agent runs one a pull, as a user of its own; people and the image build run it by
//! hand. It parses what strangers made, so it first gives up every right it does not need.
#![forbid(unsafe_code)]

mod cli;
mod confine;
mod error;
mod fetch;
mod job;
mod origin;
mod public;
mod report;
mod settings;
mod work;

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
    sync::Arc,
};

use clap::{CommandFactory, Parser};
use holdfast_wire::{
    convert::{Failure, Report, Request},
    frame,
};

use crate::{
    cli::Arguments,
    error::Error,
    job::Job,
    report::{Reporter, Ticker},
    work::Counters,
};

/// What a process that found its input wrong ends with, as the command line tools do.
const EXIT_BAD_REQUEST: u8 = 1;
/// The conversion itself failed.
const EXIT_FAILED: u8 = 3;

fn main() -> ExitCode {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).parse_default_env().init();
    if std::env::args_os().len() > 1 {
        by_hand(Arguments::parse())
    } else if io::stdin().is_terminal() {
        // Nobody types frames: somebody wants to know what this program is.
        let _ = Arguments::command().print_help();
        ExitCode::from(EXIT_BAD_REQUEST)
    } else {
        for_agent()
    }
}

/// One request on stdin, reports on stdout.
fn for_agent() -> ExitCode {
    let request: Request = match frame::read_frame(&mut io::stdin().lock()) {
        Ok(Some(request)) => request,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            log::error!(error:%; "request cannot be read");
            return ExitCode::from(EXIT_BAD_REQUEST);
        }
    };
    let counters = Arc::new(Counters::default());
    let ticker = Ticker::start(Reporter::Frames, &counters);
    let outcome = Job::from_request(request).and_then(|job| run(job, &counters));
    ticker.stop();
    let (report, code) = match outcome {
        Ok(digest) => (Report::Done { digest: digest.to_string() }, ExitCode::SUCCESS),
        Err(error) => (Report::Failed(Failure::from(&error)), ExitCode::from(EXIT_FAILED)),
    };
    match report::send(&report) {
        Ok(()) => code,
        // The agent is gone; what was converted is in the store all the same.
        Err(_) => ExitCode::from(EXIT_FAILED),
    }
}

/// Arguments instead of a request; progress for eyes on stderr, the digest on stdout.
fn by_hand(arguments: Arguments) -> ExitCode {
    let counters = Arc::new(Counters::default());
    let ticker = Ticker::start(Reporter::Lines, &counters);
    let listing = arguments.listing();
    let outcome = Job::from_arguments(arguments).and_then(|job| {
        let store = job.store.clone();
        let digest = run(job, &counters)?;
        if let Some(listing) = listing {
            public::list(&store, listing, digest)?;
        }
        Ok(digest)
    });
    ticker.stop();
    match outcome {
        Ok(digest) => match writeln!(io::stdout().lock(), "{digest}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(EXIT_FAILED),
        },
        Err(error) => {
            let failure = Failure::from(&error);
            let mut stderr = io::stderr().lock();
            // Nowhere else to say it.
            let _ = writeln!(stderr, "error: {}\nhint: {}", failure.message, failure.hint);
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(job: Job, counters: &Arc<Counters>) -> Result<holdfast_model::Digest, Error> {
    confine::confine()?;
    work::run(job, counters)
}
