//! Drives a booted node from outside: through its API, through the command line, and, since the dev
//! node lets its owner in, by looking at its insides.
//!
//! The node is the one of `scripts/node start`, whose exports say where it is.
#![forbid(unsafe_code)]

mod api;
mod registry;

use std::{
    env,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

pub use api::{Answer, Api};
pub use registry::Registry;

/// Longest wait for something a test waits for. The node may be emulated and busy.
const PATIENCE: Duration = Duration::from_secs(240);

/// Paths of the group that exists from first boot.
pub const GROUP: &str = "/subscriptions/local/resourceGroups/default/sandboxGroups/default";

/// A node that serves.
#[derive(Debug, Clone)]
pub struct Node {
    pub endpoint: String,
    pub token: String,
    pub ca: PathBuf,
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

impl Outcome {
    /// stdout of a command that must have succeeded.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == Some(0), "exit code {:?}: {}{}", self.code, self.stdout, self.stderr);
        Ok(self.stdout.trim_end().to_owned())
    }
}

/// The top of the tree.
pub fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Node {
    /// The node the environment names.
    pub fn from_env() -> Result<Self> {
        let get = |name: &str| {
            env::var(name)
                .with_context(|| format!("{name} is not set: eval \"$(scripts/node start)\" first"))
        };
        Ok(Self {
            endpoint: get("HOLDFAST_ENDPOINT")?,
            token: get("HOLDFAST_TOKEN")?,
            ca: get("HOLDFAST_CA")?.into(),
        })
    }

    pub fn api(&self) -> Result<Api> {
        Api::new(self)
    }

    /// The command line, ready to run against this node.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(top().join("target/release/holdfast"));
        command
            .args(arguments)
            .env("HOLDFAST_ENDPOINT", &self.endpoint)
            .env("HOLDFAST_TOKEN", &self.token)
            .env("HOLDFAST_CA", &self.ca)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `holdfast` with these arguments.
    pub fn holdfast(&self, arguments: &[&str]) -> Result<Outcome> {
        let output = self.command(arguments).output().context("cannot run holdfast")?;
        Ok(output.into())
    }

    /// The same with bytes on stdin.
    pub fn holdfast_fed(&self, arguments: &[&str], input: &[u8]) -> Result<Outcome> {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("stdin is piped")?;
        let input = input.to_owned();
        // Beside the wait: the command may answer before it has read everything.
        let feeder = thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output()?;
        let _ = feeder.join();
        Ok(output.into())
    }

    /// Makes a sandbox of the smallest tier and gives its id.
    pub fn create(&self, image: &str) -> Result<String> {
        let size = ["--cpu", "250m", "--memory", "512Mi"];
        let arguments = [&["sandbox", "create"], &size[..], &[image]].concat();
        self.holdfast(&arguments)?.ok()
    }

    pub fn delete(&self, id: &str) -> Result<()> {
        self.holdfast(&["sandbox", "delete", id])?.ok().map(|_| ())
    }

    /// Runs a command as root on the node itself: the dev variant's debug port.
    pub fn inside(&self, command: &str) -> Result<String> {
        let output = Command::new(top().join("scripts/node")).args(["sh", command]).output()?;
        Outcome::from(output).ok()
    }

    /// What is on the node for the sake of sandboxes; empty when there is none. Processes, mounts,
    /// cgroups, run folders, disks and sockets, one a line.
    pub fn leftovers(&self) -> Result<String> {
        // The agent's own cgroup lies beside those of sandboxes, which have ids of 20 characters.
        self.inside(
            "grep -l '^holdfast-[vs]' /proc/[0-9]*/comm 2>/dev/null; grep /sandboxes/ /proc/mounts; \
             ls -d /run/holdfast/sandboxes/* /var/lib/holdfast/sandboxes/* 2>/dev/null; \
             find /sys/fs/cgroup/holdfast.slice -mindepth 2 -maxdepth 2 -type d \
             | grep -E '/[a-z0-9]{20}$'; grep /sandboxes/ /proc/net/unix; true",
        )
    }
}

/// Waits until `check` gives something.
pub fn wait_for<T>(what: &str, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let begun = Instant::now();
    loop {
        let last = match check() {
            Ok(Some(thing)) => return Ok(thing),
            Ok(None) => String::new(),
            Err(error) => format!(": {error:#}"),
        };
        if begun.elapsed() > PATIENCE {
            bail!("waited {PATIENCE:?} for {what}{last}");
        }
        thread::sleep(Duration::from_millis(300));
    }
}
