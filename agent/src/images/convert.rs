//! One run of the conversion process: request in, progress out, its log into ours.

use std::{
    path::PathBuf,
    process::Stdio,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use fs_err as fs;
use holdfast_jail::{Cgroup, CgroupTree, Handover};
use holdfast_model::{Digest, Mib};
use holdfast_wire::{
    WIRE_VERSION,
    convert::{Failure, FailureKind, Progress, Report, Request, Source},
};
use log::{info, warn};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    sync::watch,
    time::timeout,
};

use super::{CONVERT_CGROUP_PREFIX, store::OWNER};
use crate::{
    blocking::off_thread,
    confined::{self, Share},
    error_chain::error_chain,
    frames::Frames,
};

/// A conversion that takes longer hangs.
const CONVERSION_PATIENCE: Duration = Duration::from_secs(2 * 60 * 60);

/// Memory of a conversion, page cache of its writes included: a hostile layer ends its own pull.
const MEMORY: Mib = Mib(512);

/// Half of what a sandbox of one CPU has: somebody waits for those more than for an image.
const CPU_WEIGHT: u32 = 50;

/// Threads of a conversion: a few per layer under way.
const PIDS_MAX: u32 = 128;

const SHARE: Share = Share { cpu_weight: CPU_WEIGHT, memory: MEMORY, pids: PIDS_MAX };

/// Bytes of a conversion's log that are kept. It is said once when there is more.
const LOG_BYTES_MAX: usize = 64 * 1024;

/// What every conversion shares.
#[derive(Debug)]
pub(super) struct Converter {
    pub(super) program: PathBuf,
    pub(super) store: PathBuf,
    pub(super) cgroups: CgroupTree,
    pub(super) plain_http: Vec<String>,
    pub(super) runs: AtomicU64,
}

/// What is to be converted. The archive is open, since the process may open little.
#[derive(Debug)]
pub(super) enum Input {
    Registry { reference: String, credentials: Option<super::Credentials> },
    Archive { file: fs::File, name: Option<String> },
}

impl Converter {
    /// Runs one conversion. Dropping the future kills it.
    pub(super) async fn run(
        &self,
        input: Input,
        progress: &watch::Sender<Progress>,
    ) -> Result<Digest, Failure> {
        match timeout(CONVERSION_PATIENCE, self.run_unbounded(input, progress)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(internal(format!(
                "the conversion did not end within {} s",
                CONVERSION_PATIENCE.as_secs()
            ))),
        }
    }

    async fn run_unbounded(
        &self,
        input: Input,
        progress: &watch::Sender<Progress>,
    ) -> Result<Digest, Failure> {
        let mut handover = Handover::default();
        let source = self.source(input, &mut handover)?;
        let request = Request {
            version: WIRE_VERSION,
            source,
            store: self.store.to_string_lossy().into_owned(),
            platform: platform(),
        };
        let frame = holdfast_wire::frame::encode(&request).map_err(|e| internal(e.to_string()))?;
        let (mut child, cgroup) = self.spawn(handover)?;
        let outcome = converse(&mut child, &frame, progress).await;
        let reaped = child.wait().await;
        // Emptying a cgroup, which its drop does, may take a moment.
        let out_of_memory =
            off_thread(move || cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)).await;
        match outcome {
            Ok(Some(report)) => report,
            _ if out_of_memory => Err(Failure {
                kind: FailureKind::BadImage,
                message: format!("the conversion used up its {MEMORY} of memory"),
                hint: "the image breaks every limit an honest one keeps".to_owned(),
            }),
            Ok(None) => Err(internal(match reaped {
                Ok(status) => {
                    format!("the conversion ended with {}", holdfast_jail::in_words(status))
                }
                Err(error) => format!("the conversion cannot be waited for: {error}"),
            })),
            Err(error) => Err(internal(error)),
        }
    }

    fn source(&self, input: Input, handover: &mut Handover) -> Result<Source, Failure> {
        Ok(match input {
            Input::Registry { reference, credentials } => Source::Registry {
                reference,
                credentials: credentials.map(|own| holdfast_wire::convert::Credentials {
                    username: own.username,
                    secret: own.secret.reveal().to_owned(),
                }),
                plain_http: self.plain_http.clone(),
            },
            Input::Archive { file, name } => {
                let fd = handover.give(file.file()).map_err(|e| internal(e.to_string()))?;
                Source::Archive { fd, name }
            }
        })
    }

    fn spawn(&self, handover: Handover) -> Result<(Child, Option<Cgroup>), Failure> {
        let failed = |error: holdfast_jail::JailError| internal(error_chain(&error));
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let cgroup =
            confined::cgroup(&self.cgroups, &format!("{CONVERT_CGROUP_PREFIX}{number}"), SHARE);
        let command = confined::command(&self.program, handover, OWNER, cgroup.as_ref());
        let command = command.map_err(failed)?;
        let child = Command::from(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let child = child.map_err(|error| {
            internal(format!("cannot start {}: {error}", self.program.display()))
        })?;
        Ok((child, cgroup))
    }
}

/// Sends the request and takes reports until the last. `None`: the process ended without one.
async fn converse(
    child: &mut Child,
    request: &[u8],
    progress: &watch::Sender<Progress>,
) -> Result<Option<Result<Digest, Failure>>, String> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("the conversion has no streams".to_owned());
    };
    tokio::spawn(log_of_conversion(stderr));
    if let Err(error) = stdin.write_all(request).await {
        warn!(error:%; "a conversion does not read its request");
    }
    drop(stdin);
    let mut reports = Frames::<_, Report>::new(stdout);
    loop {
        match reports.next().await.map_err(|error| error_chain(&error))? {
            Some(Report::Progress(now)) => {
                progress.send_replace(now);
            }
            Some(Report::Done { digest }) => {
                return match digest.parse() {
                    Ok(digest) => Ok(Some(Ok(digest))),
                    Err(error) => Err(format!("the conversion answered nonsense: {error}")),
                };
            }
            Some(Report::Failed(failure)) => return Ok(Some(Err(failure))),
            None => return Ok(None),
        }
    }
}

async fn log_of_conversion(mut stderr: impl AsyncRead + Unpin) {
    let mut kept = 0;
    let mut piece = vec![0; 4096];
    // Read to the end even when nothing more is kept: a full pipe would stop the process.
    while let Ok(count @ 1..) = stderr.read(&mut piece).await {
        if kept < LOG_BYTES_MAX {
            let text = String::from_utf8_lossy(&piece[..count]);
            for line in text.lines().filter(|line| !line.is_empty()) {
                info!(line:%; "conversion says");
            }
            kept += count;
            if kept >= LOG_BYTES_MAX {
                warn!("the rest of this conversion's log is dropped");
            }
        }
    }
}

/// As the OCI image specification names this machine.
fn platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{architecture}")
}

fn internal(message: String) -> Failure {
    Failure { kind: FailureKind::Internal, message, hint: "see the node's log".to_owned() }
}
