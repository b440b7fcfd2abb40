//! The daemon on every node: puts the parts together, holds no rules of its own.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser;
use holdfastd::{
    config::{self, Config},
    daemon::Daemon,
    logging, notify,
    sandbox::Ending,
};
use log::{error, info, warn};
use tokio::signal::unix::{SignalKind, signal};

/// How long systemd may take to say whether the node is being shut down.
const SYSTEMD_PATIENCE: Duration = Duration::from_secs(5);

/// The Holdfast node daemon.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; a missing one means defaults.
    #[arg(long, default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Err(error) = logging::install() {
        let _ = writeln!(io::stderr().lock(), "holdfastd: no logger: {error:#}");
        return ExitCode::FAILURE;
    }
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config).map_err(|error| {
        let hint = error.hint();
        anyhow::Error::new(error).context(format!("the configuration cannot be used ({hint})"))
    })?;
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let daemon = Daemon::start(config).await?;
    greet(&daemon.greeting());
    tell_systemd("READY=1");
    tokio::select! {
        _ = terminate.recv() => info!("asked to stop"),
        _ = interrupt.recv() => info!("interrupted"),
    }
    tell_systemd("STOPPING=1");
    let ending = if node_stops().await { Ending::Suspend } else { Ending::Detach };
    info!(ending:?; "stopping");
    daemon.stop(ending).await;
    Ok(())
}

/// Whether it is the node that stops, and not the daemon alone. Where there is no systemd to ask,
/// the daemon alone.
async fn node_stops() -> bool {
    let asked = tokio::process::Command::new("systemctl")
        .arg("is-system-running")
        .stdin(std::process::Stdio::null())
        .output();
    match tokio::time::timeout(SYSTEMD_PATIENCE, asked).await {
        Ok(Ok(answer)) => answer.stdout.trim_ascii() == b"stopping",
        Ok(Err(error)) => {
            warn!(error:%; "systemd cannot be asked whether the node stops");
            false
        }
        Err(_) => false,
    }
}

/// Says on stdout, and on the machine's console, where the node is reached. Neither need be there.
fn greet(greeting: &str) {
    let _ = writeln!(io::stdout().lock(), "{greeting}");
    if let Ok(mut console) = fs_err::OpenOptions::new().write(true).open("/dev/console") {
        let _ = write!(console, "\r\n{greeting}\r\n");
    }
}

fn tell_systemd(state: &str) {
    if let Err(error) = notify::notify(state) {
        warn!(state, error:%; "systemd not told");
    }
}
