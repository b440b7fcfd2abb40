//! What the tests share: the built program, driven as the agent drives it, and a real image.
#![allow(dead_code, unreachable_pub, reason = "each test uses its own part of it")]

pub mod image;
pub mod registry;

use std::{
    collections::BTreeSet,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use holdfast_model::Digest;
use holdfast_rootfs::ImageRecord;
use holdfast_wire::{
    WIRE_VERSION,
    convert::{Credentials, Failure, FailureKind, Progress, Report, Request, Source},
    frame,
};

/// An image store in a folder of its own.
pub struct Store {
    folder: tempfile::TempDir,
}

/// How one conversion ended, and what it reported before.
#[derive(Debug)]
pub struct Outcome {
    pub progress: Vec<Progress>,
    pub result: Result<Digest, Failure>,
}

impl Outcome {
    #[track_caller]
    pub fn digest(self) -> Digest {
        self.result.unwrap()
    }

    /// The failure, checked to be of one kind, to name what it is about and to say what to do.
    #[track_caller]
    pub fn failure(self, kind: FailureKind, names: &str) -> Failure {
        let failure = self.result.unwrap_err();
        assert_eq!(failure.kind, kind, "{failure:?}");
        assert!(failure.message.contains(names), "{failure:?}");
        assert!(!failure.hint.is_empty(), "{failure:?}");
        failure
    }
}

impl Store {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a conversion into this store.
    pub fn start(&self, source: Source) -> Running {
        self.start_for("linux/amd64", source)
    }

    pub fn start_for(&self, platform: &str, source: Source) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_holdfast-convert"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let store = self.path().display().to_string();
        let platform = platform.to_owned();
        let request = Request { version: WIRE_VERSION, source, store, platform };
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&frame::encode(&request).unwrap()).unwrap();
        Running { child }
    }

    pub fn convert(&self, source: Source) -> Outcome {
        self.start(source).outcome()
    }

    #[track_caller]
    pub fn record(&self, digest: &Digest) -> ImageRecord {
        let record = holdfast_rootfs::load_record(self.path(), digest).unwrap();
        record.expect("a record of the image")
    }

    /// Names of files in one folder of the store.
    pub fn names(&self, folder: &str) -> BTreeSet<String> {
        let Ok(entries) = fs_err::read_dir(self.path().join(folder)) else {
            return BTreeSet::new();
        };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Nothing half-made is left: no drafts, no layer that is not whole, no image without record.
    #[track_caller]
    pub fn assert_tidy(&self) {
        assert_eq!(self.names("tmp"), BTreeSet::new());
        let stems = |folder: &str, suffix: &str| -> BTreeSet<String> {
            let names = self.names(folder).into_iter();
            names.filter_map(|name| name.strip_suffix(suffix).map(str::to_owned)).collect()
        };
        assert_eq!(stems("layers", ".data"), stems("layers", ".tree"));
        assert_eq!(stems("images", ".erofs"), stems("images", ".json"));
    }
}

/// One running `holdfast-convert`, ended on drop.
pub struct Running {
    child: Child,
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next report. `None`: it has said all.
    pub fn next(&mut self) -> Option<Report> {
        frame::read_frame(self.child.stdout.as_mut().unwrap()).ok().flatten()
    }

    /// Ends it as the kernel would, in the middle of whatever it does.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops listening, and waits for it to end by itself.
    pub fn abandon(mut self) -> std::process::ExitStatus {
        drop(self.child.stdout.take());
        self.child.wait().unwrap()
    }

    pub fn outcome(mut self) -> Outcome {
        let mut progress = Vec::new();
        loop {
            let result = match self.next().expect("a last report") {
                Report::Progress(report) => {
                    progress.push(report);
                    continue;
                }
                Report::Done { digest } => Ok(digest.parse().unwrap()),
                Report::Failed(failure) => Err(failure),
            };
            assert!(self.next().is_none(), "a report after the last one");
            assert_eq!(self.child.wait().unwrap().success(), result.is_ok());
            return Outcome { progress, result };
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn layout(path: &Path, name: Option<&str>) -> Source {
    Source::Layout { path: path.display().to_string(), name: name.map(str::to_owned) }
}

pub fn remote(reference: &str, credentials: Option<(&str, &str)>) -> Source {
    let credentials = credentials.map(|(username, secret)| Credentials {
        username: username.to_owned(),
        secret: secret.to_owned(),
    });
    let reference = reference.to_owned();
    Source::Registry { reference, credentials, plain_http: Vec::new() }
}

/// Runs a tool, and gives what it wrote.
#[track_caller]
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}: run scripts/setup"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// `folder/name` as text, for a tool's argument.
pub fn at(folder: &Path, name: &str) -> String {
    let path: PathBuf = folder.join(name);
    path.display().to_string()
}
