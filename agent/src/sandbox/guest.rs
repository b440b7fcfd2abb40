//! The link to PID 1 of one microVM: a vsock connection per call. The guest is hostile: frames are
//! bounded by the framing, waits by time, and a strange answer ends the call.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use holdfast_model::link::{GATEWAY_ADDRESS, GUEST_ADDRESS, PREFIX_BITS};
use holdfast_wire::{
    WIRE_VERSION,
    frame::CHUNK_BYTES_MAX,
    guest::{
        Call, Exec, ExecKey, FailureKind, Info, Input, Network, Output, Quiesce, RPC_PORT, Request,
        Start,
    },
};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::UnixStream,
    time::timeout,
};

use super::{ExecError, GuestError, Mended, activity::Busy};
use crate::{
    auth::hex,
    frames::{Frames, send},
};

/// How long a guest may take to accept a connection, to begin an answer, and to take a piece of a
/// file. Its CPU may be held to
/// a quarter, on an emulated machine, while others boot beside it.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// A guest that was told the time within this is as far off as that at most.
const CLOCK_LATE_MAX: Duration = Duration::from_millis(25);
/// How often it is told. On a host where no answer is as quick its clock stays as it is then.
const CLOCK_TELLS_MAX: u32 = 4;

/// Longest `OK <port>\n`: a `u32` has ten digits.
const GREETING_BYTES_MAX: usize = 16;

/// The link that every guest has, with whom to trust there.
pub(super) fn network_of(ca_pem: String) -> Network {
    Network { address: GUEST_ADDRESS, prefix_bits: PREFIX_BITS, gateway: GATEWAY_ADDRESS, ca_pem }
}

/// By what a link that a guest was told of is known again.
pub(super) fn digest_of(network: &Network) -> String {
    let Network { address, prefix_bits, gateway, ca_pem } = network;
    hex(&Sha256::digest(format!("{address}/{prefix_bits} {gateway}\n{ca_pem}")))
}

/// How to reach the guest: the VMM's vsock socket.
#[derive(Debug, Clone)]
pub(super) struct GuestLink {
    socket: PathBuf,
}

impl GuestLink {
    pub(super) fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Connects and sends the call.
    async fn call(&self, call: Call) -> Result<Exchange, GuestError> {
        let request = Request { version: WIRE_VERSION, call };
        patiently(async {
            let stream = connect(&self.socket, RPC_PORT).await.map_err(GuestError::Connect)?;
            let (reader, mut writer) = tokio::io::split(stream);
            send(&mut writer, &request).await?;
            Ok(Exchange { output: Frames::new(reader), input: writer })
        })
        .await
    }

    /// Sets the sandbox up. The inner error is the guest's refusal.
    pub(super) async fn start(&self, start: Start) -> Result<(), ExecError> {
        self.call(Call::Start(start)).await?.done().await
    }

    /// Tells the guest, which has just gone on, what time it is. Gives what it mended, as it says.
    ///
    /// The first message waits until the guest has its pages and its CPU. By then it is late, by as
    /// much as its answer: it is told again until it is told in time.
    pub(super) async fn resumed(&self) -> Result<Mended, ExecError> {
        let mut mended = Mended::default();
        for _ in 0..CLOCK_TELLS_MAX {
            let told = Instant::now();
            let now = self.tell_the_time().await?;
            mended.skew_ns += now.skew_ns;
            mended.connections_reset = match (mended.connections_reset, now.connections_reset) {
                (Some(before), Some(now)) => Some(before + now),
                (before, now) => before.or(now),
            };
            if told.elapsed() <= CLOCK_LATE_MAX {
                break;
            }
        }
        Ok(mended)
    }

    async fn tell_the_time(&self) -> Result<Mended, ExecError> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let unix_ns = since.map_or(0, |it| u64::try_from(it.as_nanos()).unwrap_or(u64::MAX));
        match self.call(Call::Resumed { unix_ns }).await?.first().await? {
            Output::WentOn { skew_ns, connections_reset } => {
                Ok(Mended { skew_ns, connections_reset: Some(connections_reset) })
            }
            // A guest of an older release.
            Output::Resumed { skew_ns } => Ok(Mended { skew_ns, connections_reset: None }),
            other => Err(unexpected(other, "Resumed")),
        }
    }

    /// Tells the guest that it is a clone: to be called so, with random numbers of its own.
    pub(super) async fn renew(&self, host_name: String, seed: [u8; 32]) -> Result<(), ExecError> {
        self.call(Call::Renew { host_name, seed }).await?.done().await
    }

    /// Tells the guest of its link to the outside, and whom to trust there. False: it is one that was
    /// saved before there was any, and goes on without.
    pub(super) async fn network(&self, network: Network) -> Result<bool, ExecError> {
        match self.call(Call::Network(network)).await?.done().await {
            Ok(()) => Ok(true),
            // It does not know the call.
            Err(ExecError::Refused(failure)) if failure.kind == FailureKind::Invalid => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Has the guest bring what it has in memory only to its disk, before it is stopped.
    pub(super) async fn quiesce(&self, wanted: Quiesce) -> Result<(), ExecError> {
        self.call(Call::Quiesce(wanted)).await?.done().await
    }

    /// Has the guest, which goes on after all, let its disk go.
    pub(super) async fn thaw(&self) -> Result<(), ExecError> {
        self.call(Call::Thaw).await?.done().await
    }

    /// Asks the guest to stop its workload and power off.
    pub(super) async fn power_off(&self, grace: Duration) -> Result<(), ExecError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.call(Call::PowerOff { grace_ms }).await?.done().await
    }

    pub(super) async fn info(&self) -> Result<Info, ExecError> {
        match self.call(Call::Info).await?.first().await? {
            Output::Info(info) => Ok(info),
            other => Err(unexpected(other, "Info")),
        }
    }

    /// Starts a command. An answer means that it runs.
    pub(super) async fn exec(&self, exec: Exec) -> Result<ExecSession, ExecError> {
        self.call(Call::Exec(exec)).await?.session().await
    }

    /// Goes on with a kept command, from byte `from` of its output on.
    pub(super) async fn attach(&self, key: ExecKey, from: u64) -> Result<ExecSession, ExecError> {
        self.call(Call::Attach { key, from }).await?.session().await
    }

    pub(super) async fn read_file(&self, path: String) -> Result<FileReader, ExecError> {
        let mut exchange = self.call(Call::ReadFile { path }).await?;
        match exchange.first().await? {
            Output::File { size, mode } => Ok(FileReader { size, mode, exchange, busy: None }),
            other => Err(unexpected(other, "File")),
        }
    }

    pub(super) async fn write_file(
        &self,
        path: String,
        mode: Option<u32>,
        create_dirs: bool,
        mut body: impl AsyncRead + Unpin,
    ) -> Result<(), ExecError> {
        let mut exchange = self.call(Call::WriteFile { path, mode, create_dirs }).await?;
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES_MAX);
        loop {
            chunk.clear();
            // The guest may refuse at any time, and then reads no further.
            tokio::select! {
                biased;
                answer = exchange.output.next() => return finished(answer.map_err(GuestError::from)?),
                read = body.read_buf(&mut chunk) => {
                    if read.map_err(ExecError::Body)? == 0 {
                        break;
                    }
                }
            }
            let data = chunk.split_off(0);
            for piece in data.chunks(CHUNK_BYTES_MAX) {
                let piece = Input::Data(piece.to_vec());
                tokio::select! {
                    biased;
                    answer = exchange.output.next() => return finished(answer.map_err(GuestError::from)?),
                    sent = patiently(async { Ok(send(&mut exchange.input, &piece).await?) }) => sent?,
                }
            }
            chunk = BytesMut::with_capacity(CHUNK_BYTES_MAX);
        }
        patiently(async { Ok(send(&mut exchange.input, &Input::End).await?) }).await?;
        exchange.done().await
    }
}

/// One call under way. Dropping it closes the connection.
#[derive(Debug)]
struct Exchange {
    output: Frames<ReadHalf<UnixStream>, Output>,
    input: WriteHalf<UnixStream>,
}

impl Exchange {
    /// The first answer, within a time. A refusal becomes an error.
    async fn first(&mut self) -> Result<Output, ExecError> {
        match patiently(async { Ok(self.output.next().await?) }).await? {
            Some(Output::Failed(failure)) => Err(ExecError::Refused(failure)),
            Some(output) => Ok(output),
            None => Err(GuestError::Ended.into()),
        }
    }

    async fn session(mut self) -> Result<ExecSession, ExecError> {
        match self.first().await? {
            Output::Started { pid, kept, stdin_taken } => Ok(ExecSession {
                pid,
                kept,
                stdin_taken,
                output: ExecOutput { frames: self.output, ended: false, busy: None },
                input: ExecInput { input: self.input },
            }),
            other => Err(unexpected(other, "Started")),
        }
    }

    async fn done(mut self) -> Result<(), ExecError> {
        match self.first().await? {
            Output::Done => Ok(()),
            other => Err(unexpected(other, "Done")),
        }
    }
}

fn finished(answer: Option<Output>) -> Result<(), ExecError> {
    match answer {
        Some(Output::Done) => Ok(()),
        Some(Output::Failed(failure)) => Err(ExecError::Refused(failure)),
        Some(other) => Err(unexpected(other, "Done")),
        None => Err(GuestError::Ended.into()),
    }
}

/// A command that runs in a sandbox. Dropping it kills the command, if it is not kept.
#[derive(Debug)]
pub struct ExecSession {
    pid: u32,
    kept: bool,
    stdin_taken: u64,
    output: ExecOutput,
    input: ExecInput,
}

impl ExecSession {
    /// The process id as the sandbox sees it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it outlives this session, and can be attached to.
    pub fn kept(&self) -> bool {
        self.kept
    }

    /// Bytes of stdin that earlier sessions brought to it.
    pub fn stdin_taken(&self) -> u64 {
        self.stdin_taken
    }

    /// Has the sandbox be in use until this session ends.
    pub(super) fn using(mut self, busy: Busy) -> Self {
        self.output.busy = Some(busy);
        self
    }

    /// Has a kept command forgotten. One that runs is killed first.
    pub async fn dismiss(mut self) {
        let dismissed = async {
            self.send(&Input::Kill).await?;
            while self.next().await?.is_some() {}
            self.send(&Input::Collect).await
        };
        // A guest that does not do it in time forgets the command later by itself.
        let _ = timeout(ANSWER_PATIENCE, dismissed).await;
    }

    /// The two directions apart, for two tasks. The command is killed when both are dropped, if it
    /// is not kept.
    pub fn split(self) -> (ExecOutput, ExecInput) {
        (self.output, self.input)
    }

    /// As [`ExecOutput::next`].
    pub async fn next(&mut self) -> Result<Option<Output>, GuestError> {
        self.output.next().await
    }

    /// As [`ExecInput::send`].
    pub async fn send(&mut self, input: &Input) -> Result<(), GuestError> {
        self.input.send(input).await
    }
}

/// What a command says.
#[derive(Debug)]
pub struct ExecOutput {
    frames: Frames<ReadHalf<UnixStream>, Output>,
    /// The last word was said.
    ended: bool,
    /// While it is open the sandbox is in use.
    busy: Option<Busy>,
}

impl ExecOutput {
    /// The next of Stdout, Stderr, of a kept command Gap and Taken too, then one Exited or Failed.
    /// `None` after that. Cancelling the call loses nothing.
    pub async fn next(&mut self) -> Result<Option<Output>, GuestError> {
        if self.ended {
            return Ok(None);
        }
        match self.frames.next().await? {
            Some(last @ (Output::Exited(_) | Output::Failed(_))) => {
                self.ended = true;
                Ok(Some(last))
            }
            Some(
                data @ (Output::Stdout(_)
                | Output::Stderr(_)
                | Output::Gap { .. }
                | Output::Taken { .. }),
            ) => Ok(Some(data)),
            Some(other) => Err(GuestError::Unexpected { got: name(&other), wanted: "Stdout" }),
            None => Err(GuestError::Ended),
        }
    }
}

/// What a command is told.
#[derive(Debug)]
pub struct ExecInput {
    input: WriteHalf<UnixStream>,
}

impl ExecInput {
    /// Data is at most [`CHUNK_BYTES_MAX`] long. Waits while the command does not read.
    pub async fn send(&mut self, input: &Input) -> Result<(), GuestError> {
        Ok(send(&mut self.input, input).await?)
    }
}

/// A file of a sandbox, being read.
#[derive(Debug)]
pub struct FileReader {
    /// What the file system said: not to be relied on.
    pub size: u64,
    pub mode: u32,
    exchange: Exchange,
    busy: Option<Busy>,
}

impl FileReader {
    /// Has the sandbox be in use until the reader is dropped.
    pub(super) fn using(mut self, busy: Busy) -> Self {
        self.busy = Some(busy);
        self
    }

    /// The next bytes. `None`: that was all of it.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ExecError> {
        match patiently(async { Ok(self.exchange.output.next().await?) }).await? {
            Some(Output::Data(bytes)) => Ok(Some(bytes)),
            Some(Output::Done) => Ok(None),
            Some(Output::Failed(failure)) => Err(ExecError::Refused(failure)),
            Some(other) => Err(unexpected(other, "Data")),
            None => Err(GuestError::Ended.into()),
        }
    }
}

async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what follows the line belongs to the call.
    let mut greeting = Vec::new();
    while greeting.last() != Some(&b'\n') {
        if greeting.len() == GREETING_BYTES_MAX {
            return Err(io::Error::other("the VMM's greeting is too long"));
        }
        match stream.read_u8().await {
            Ok(byte) => greeting.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Err(error) => return Err(error),
        }
    }
    if greeting.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::Error::other("the VMM's greeting is not OK"))
    }
}

async fn patiently<T>(work: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
    match timeout(ANSWER_PATIENCE, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(GuestError::Silent { waited: ANSWER_PATIENCE }),
    }
}

fn unexpected(output: Output, wanted: &'static str) -> ExecError {
    match output {
        Output::Failed(failure) => ExecError::Refused(failure),
        other => GuestError::Unexpected { got: name(&other), wanted }.into(),
    }
}

fn name(output: &Output) -> &'static str {
    match output {
        Output::Info(_) => "Info",
        Output::Started { .. } => "Started",
        Output::Stdout(_) => "Stdout",
        Output::Stderr(_) => "Stderr",
        Output::Exited(_) => "Exited",
        Output::File { .. } => "File",
        Output::Data(_) => "Data",
        Output::Processes(_) => "Processes",
        Output::Done => "Done",
        Output::Failed(_) => "Failed",
        Output::Gap { .. } => "Gap",
        Output::Taken { .. } => "Taken",
        Output::Resumed { .. } => "Resumed",
        Output::WentOn { .. } => "WentOn",
    }
}
