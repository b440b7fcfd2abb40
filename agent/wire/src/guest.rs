//! RPC with PID 1 of the microVM, over vsock. One connection per request: the host sends one
//! [`Request`], the guest answers with a stream of [`Output`] frames and closes. What the host
//! sends after the request is [`Input`].
//!
//! The guest is hostile: the host caps frames, counts and time, and believes no length.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// vsock port PID 1 listens on.
pub const RPC_PORT: u32 = 1024;

/// First frame of a connection, host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub version: u16,
    pub call: Call,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Answered by [`Output::Info`].
    Info,
    /// Sent once after boot, before anything else: settings of the image and the sandbox. Answered
    /// by [`Output::Done`] when the root is joined and the entrypoint, if any, has been started; by
    /// [`Output::Failed`] when either could not be. An entrypoint that cannot be run leaves the
    /// root joined: execs work.
    Start(Start),
    /// Answered by [`Output::Started`], any number of Stdout and Stderr, then one
    /// [`Output::Exited`]; or by [`Output::Failed`]. Of a kept exec [`Output::Taken`] may come in
    /// between.
    Exec(Exec),
    /// Answered by [`Output::File`], then [`Output::Data`]…, then [`Output::Done`].
    ReadFile { path: String },
    /// Followed by [`Input::Data`]… and [`Input::End`]. Written beside and renamed into place.
    /// Answered by [`Output::Done`].
    WriteFile { path: String, mode: Option<u32>, create_dirs: bool },
    /// Answered by [`Output::Processes`].
    Processes,
    /// Answered by [`Output::Data`]…, then [`Output::Done`]: the last of what the entrypoint wrote
    /// to stdout and stderr, as one stream.
    Log,
    /// Stop the workload (SIGTERM, then SIGKILL after the grace), sync, power off. Answered by
    /// [`Output::Done`] before the power goes.
    PowerOff { grace_ms: u32 },
    /// Goes on with a kept exec, in place of whatever connection it has: answered as
    /// [`Call::Exec`], from byte `from` of its output on. What the guest no longer has of that is
    /// told by [`Output::Gap`]. Input goes on behind the bytes that `Started` says were taken.
    Attach { key: ExecKey, from: u64 },
    /// The first call after a restore: the time is now this, in nanoseconds since 1970. Answered by
    /// [`Output::WentOn`].
    Resumed { unix_ns: u64 },
    /// After [`Call::Resumed`], to a guest that is not the one that was saved but a clone of it:
    /// random numbers and names are to be its own from here on. Answered by [`Output::Done`].
    Renew { host_name: String, seed: [u8; 32] },
    /// Before [`Call::Start`], and again after every restore: the guest's link to the outside.
    /// Answered by [`Output::Done`].
    Network(Network),
    /// The machine is about to be stopped and copied. Answered by [`Output::Done`] when what was to
    /// be done first is done. A guest of an older release answers [`Output::Failed`].
    Quiesce(Quiesce),
    /// The machine goes on after all: the disk is let go, if it was held still. Answered by
    /// [`Output::Done`].
    Thaw,
}

/// What is to be done before a machine is stopped. What is to be written is written in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesce {
    /// Pages of files that are on the disks as they are go: they are neither copied nor there when
    /// the machine goes on.
    pub drop_caches: bool,
    /// The disk's file system is closed as if it were unmounted, and held so until [`Call::Thaw`],
    /// or for this long: whoever writes waits.
    pub hold_ms: Option<u32>,
}

/// The guest's link to the outside, and whom it meets there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub address: Ipv4Addr,
    pub prefix_bits: u8,
    /// Default route, and the only name server.
    pub gateway: Ipv4Addr,
    /// Certificate of who opens TLS for the sandbox's group, for programs to trust. PEM, at most
    /// [`CA_BYTES_MAX`]. Empty: nobody does.
    pub ca_pem: String,
}

/// Longest certificate of a group, in bytes of PEM.
pub const CA_BYTES_MAX: usize = 16 * 1024;

/// Name of a kept exec, given by the host: nobody else can guess it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExecKey(pub [u8; 16]);

impl std::fmt::Debug for ExecKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// An exec that outlives the connection it was started on.
///
/// Its output is counted in bytes of stdout and stderr together, in the order in which they were
/// read, and at least the last [`REPLAY_BYTES_MIN`] are kept for whoever attaches. Once it has
/// ended it is forgotten when the host says [`Input::Collect`], or after [`COLLECT_MS_MAX`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    pub key: ExecKey,
    /// Everything of it is killed when it was without a connection for this long.
    pub alone_ms_max: u32,
}

/// Output of a kept exec that can be had again, in bytes. An exec that changes between stdout and
/// stderr more often than [`REPLAY_TURNS_MAX`] times within that has less.
pub const REPLAY_BYTES_MIN: usize = 1024 * 1024;

/// Changes between the two streams that the guest remembers of the kept output.
pub const REPLAY_TURNS_MAX: usize = 64 * 1024;

/// How long the end of a kept exec waits to be collected: longer than any client retries.
pub const COLLECT_MS_MAX: u64 = 15 * 60 * 1000;

/// What a sandbox runs with unless an exec says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub host_name: String,
    /// Started with the sandbox: entrypoint and cmd joined. Empty: nothing is started.
    pub argv: Vec<String>,
    /// What [`Command::Entrypoint`] begins with; given also where nothing is started.
    pub entrypoint: Vec<String>,
    /// What [`Command::Entrypoint`] goes on with when it has no arguments of its own.
    pub cmd: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Made if it is missing. Empty: `/`.
    pub cwd: String,
    /// `user`, `uid`, `user:group`, `uid:gid` as in the OCI image config. Empty: root.
    pub user: String,
    /// Name of the signal that stops the entrypoint. Empty: SIGTERM.
    pub stop_signal: String,
    /// Folders to be of the disk's own file system, instead of the overlay.
    pub volumes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    pub command: Command,
    /// Added to the sandbox's environment; the same name replaces.
    pub env: Vec<(String, String)>,
    /// `None`: the sandbox's.
    pub cwd: Option<String>,
    /// `None`: the sandbox's.
    pub user: Option<String>,
    /// False: stdin is /dev/null. True: [`Input::Data`] until [`Input::End`].
    pub stdin: bool,
    /// Everything of the exec, background children too, is killed after this. `None`: no limit.
    pub timeout_ms: Option<u64>,
    /// `None`: a lost connection kills it.
    pub keep: Option<Keep>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Run as given; the first is looked up in the sandbox's PATH.
    Argv(Vec<String>),
    /// Run by `/bin/sh -c`.
    Shell(String),
    /// The image's entrypoint followed by these, or by the image's cmd if there are none.
    Entrypoint(Vec<String>),
}

/// Host to guest, after the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// At most [`crate::frame::CHUNK_BYTES_MAX`] bytes.
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// No more data: stdin is closed, the file is complete.
    End,
    /// To the exec's process group. A closed connection is SIGKILL to everything of an exec that
    /// is not kept: keep the sending half open until the answer is complete.
    Signal(i32),
    /// SIGKILL to everything of the exec, background children too.
    Kill,
    /// The end of a kept exec has arrived: it can be forgotten.
    Collect,
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    Info(Info),
    Started {
        /// The process id as the sandbox sees it. 0: its time was over before it ran.
        pid: u32,
        /// Whether a lost connection leaves it running. False although it was asked for: the guest
        /// keeps as many as it can.
        kept: bool,
        /// Bytes of stdin taken before this connection.
        stdin_taken: u64,
    },
    Stdout(#[serde(with = "serde_bytes")] Vec<u8>),
    Stderr(#[serde(with = "serde_bytes")] Vec<u8>),
    Exited(Exited),
    /// The size is what the file system says: 0 for files that are made while they are read.
    File {
        size: u64,
        mode: u32,
    },
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    Processes(Vec<Process>),
    Done,
    Failed(Failure),
    /// This many bytes of a kept exec's output were overwritten before they were sent.
    Gap {
        bytes: u64,
    },
    /// Bytes of stdin taken from all connections so far, of a kept exec: a host that attaches anew
    /// sends what comes after them.
    Taken {
        stdin: u64,
    },
    /// How far the clock was set forward, in nanoseconds. Said by guests of older releases, in place
    /// of [`Output::WentOn`].
    Resumed {
        skew_ns: i64,
    },
    WentOn {
        /// How far the clock was set forward, in nanoseconds.
        skew_ns: i64,
        /// TCP connections to others that were ended: these have forgotten them, or hold them for
        /// somebody else's.
        connections_reset: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exited {
    Code(i32),
    Signal(i32),
    /// Killed because `timeout_ms` was over.
    TimedOut,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    pub version: u16,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Nanoseconds of the guest's monotonic clock when PID 1 began to serve.
    pub ready_ns: u64,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    pub disk_total_bytes: u64,
    pub disk_available_bytes: u64,
    /// The entrypoint's state: `None` if none was started or it runs still.
    pub entrypoint_exited: Option<Exited>,
    /// Kept execs that run.
    pub execs: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub name: String,
}

/// Why a call did nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// Names the thing and the reason: `cannot run "nope": no such file in PATH`.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The command, file, user or folder does not exist.
    NotFound,
    /// It exists and cannot be run, read or written.
    Denied,
    /// The request makes no sense (empty argv, NUL in a name, a folder where a file is needed).
    Invalid,
    /// Memory, disk, processes or descriptors of the sandbox are used up.
    Exhausted,
    /// `Start` was not sent yet, or was sent twice.
    WrongState,
    /// PID 1's own failure.
    Internal,
    /// There is one of this name already.
    Exists,
}
