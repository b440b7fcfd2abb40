//! `holdfast-egress`: started by the agent, once for each sandbox group.

use std::process::ExitCode;

use clap::Parser;
use holdfast_egress::{Options, run};

/// Serves the sandboxes of one group: names, TLS and requests, as their policies say.
///
/// The agent starts it with its own socket on descriptor 3 and a listening one on 4.
#[derive(Parser)]
#[command(name = "holdfast-egress", version)]
struct Arguments {
    /// User to become. Needs --gid.
    #[arg(long, requires = "gid")]
    uid: Option<u32>,
    /// Group to become. Needs --uid.
    #[arg(long, requires = "uid")]
    gid: Option<u32>,
    /// Threads that serve.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: u8,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let arguments = Arguments::parse();
    let user = arguments.uid.zip(arguments.gid);
    match run(Options { user, threads: usize::from(arguments.threads) }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                text.push_str(&format!(": {error}"));
                source = error.source();
            }
            log::error!("{text}");
            ExitCode::from(3)
        }
    }
}
