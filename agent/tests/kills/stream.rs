//! Clients that watch a command over all kills: the command line itself, in processes of its own.

use std::{
    io::Write,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::unix::pipe::Receiver,
    task::spawn_blocking,
    time::timeout,
};

use crate::agent::{Agent, LONG, TOKEN};

/// How far the counter must come to have gone on.
const STEPS: u64 = 3;

/// `holdfast sandbox exec ID -- WORDS`.
pub(crate) fn cli(agent: &Agent, id: &str, words: &[&str]) -> Command {
    command(agent, id, &[], words)
}

fn command(agent: &Agent, id: &str, options: &[&str], words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var("HOLDFAST_CLI").unwrap());
    command
        .args(["sandbox", "exec"])
        .args(options)
        .arg(id)
        .arg("--")
        .args(words)
        .env("HOLDFAST_ENDPOINT", &agent.endpoint)
        .env("HOLDFAST_TOKEN", TOKEN)
        .env("HOLDFAST_CA", &agent.ca);
    command
}

fn lines(process: &mut Child) -> Lines<BufReader<Receiver>> {
    let stdout = process.stdout.take().unwrap();
    let receiver = Receiver::from_owned_fd(stdout.into()).unwrap();
    BufReader::new(receiver).lines()
}

async fn next(lines: &mut Lines<BufReader<Receiver>>) -> String {
    let line = timeout(LONG, lines.next_line()).await.expect("a line in time");
    line.unwrap().expect("the command goes on")
}

async fn exit_code(mut process: Child) -> Option<i32> {
    let status = spawn_blocking(move || process.wait().unwrap()).await.unwrap();
    assert_eq!(status.signal(), None);
    status.code()
}

/// A command that counts for ever.
pub(crate) struct Counter {
    process: Child,
    lines: Lines<BufReader<Receiver>>,
    next: u64,
}

impl Counter {
    pub(crate) fn start(agent: &Agent, id: &str) -> Self {
        let script = "i=0; while :; do echo $i; i=$((i + 1)); sleep 0.1; done";
        let mut process =
            cli(agent, id, &["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = lines(&mut process);
        Self { process, lines, next: 0 }
    }

    /// Not a number is missing or twice, and the command still counts.
    pub(crate) async fn goes_on(&mut self) {
        let mut live = 0;
        while live < STEPS {
            // What was said meanwhile comes at once; what has to be waited for is said now.
            let line = match timeout(Duration::from_millis(20), self.lines.next_line()).await {
                Ok(line) => line.unwrap().expect("the command goes on"),
                Err(_) => {
                    live += 1;
                    next(&mut self.lines).await
                }
            };
            assert_eq!(line, self.next.to_string());
            self.next += 1;
        }
    }

    /// How far it came.
    pub(crate) async fn ends(self) -> u64 {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        // The command's own end, passed on.
        assert_eq!(exit_code(self.process).await, Some(128 + 15));
        self.next
    }
}

/// A command that says what it is told.
pub(crate) struct Echo {
    process: Child,
    lines: Lines<BufReader<Receiver>>,
}

impl Echo {
    pub(crate) fn start(agent: &Agent, id: &str) -> Self {
        let mut process = command(agent, id, &["-i"], &["cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(&mut process);
        Self { process, lines }
    }

    pub(crate) async fn answers(&mut self, line: &str) {
        writeln!(self.process.stdin.as_ref().unwrap(), "{line}").unwrap();
        assert_eq!(next(&mut self.lines).await, line);
    }

    pub(crate) async fn ends(mut self) {
        drop(self.process.stdin.take());
        assert_eq!(exit_code(self.process).await, Some(0));
    }
}
