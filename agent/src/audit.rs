//! The admin audit log: one JSON line for every mutating call, on disk before its answer leaves.
//! Tokens and bodies are never in it. Bounded: full files are kept under a number, the oldest goes.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use fs_err::{self as fs, os::unix::fs::OpenOptionsExt};
use serde::Serialize;

/// Size at which a file is full, in bytes.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Full files kept besides the one written to: some hundreds of thousands of calls.
const FULL_FILES_MAX: u32 = 8;

/// One call.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// RFC 3339.
    pub time: String,
    /// Name of the token.
    pub who: String,
    /// Address of the caller.
    pub from: String,
    /// Method and route.
    pub what: String,
    /// The path, without its query.
    pub target: String,
    pub status: u16,
    /// Error code of a call that was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    pub duration_ms: u64,
}

#[derive(Debug)]
struct Open {
    file: fs::File,
    bytes: u64,
}

/// The log. Writing blocks.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    file_bytes_max: u64,
    open: Mutex<Open>,
}

impl AuditLog {
    /// Opens `admin.jsonl` in `folder`, which is made if it is missing.
    pub fn open(folder: &Path) -> io::Result<Self> {
        Self::with_limit(folder, FILE_BYTES_MAX)
    }

    fn with_limit(folder: &Path, file_bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join("admin.jsonl");
        let open = Mutex::new(open_file(&path)?);
        Ok(Self { path, file_bytes_max, open })
    }

    /// Appends a line and waits until it is on disk.
    pub fn append(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
        // The lock guards a position in a file: a panic under it leaves at worst half a line.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.bytes.saturating_add(length) > self.file_bytes_max && open.bytes > 0 {
            self.rotate()?;
            *open = open_file(&self.path)?;
        }
        open.bytes += length;
        open.file.write_all(&line)?;
        open.file.sync_data()
    }

    fn rotate(&self) -> io::Result<()> {
        let numbered = |number: u32| self.path.with_extension(format!("jsonl.{number}"));
        for number in (1..FULL_FILES_MAX).rev() {
            move_if_there(&numbered(number), &numbered(number + 1))?;
        }
        move_if_there(&self.path, &numbered(1))
    }
}

fn open_file(path: &Path) -> io::Result<Open> {
    let file = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let bytes = file.metadata()?.len();
    Ok(Open { file, bytes })
}

fn move_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(target: &str) -> Entry {
        Entry {
            time: "2026-01-02T03:04:05Z".to_owned(),
            who: "admin".to_owned(),
            from: "127.0.0.1:1".to_owned(),
            what: "DELETE sandboxes/{id}".to_owned(),
            target: target.to_owned(),
            status: 404,
            error: Some("SandboxNotFound".to_owned()),
            request_id: None,
            duration_ms: 1,
        }
    }

    #[test]
    fn a_call_is_one_line_that_reads_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        AuditLog::open(folder.path()).unwrap().append(&entry("/a\n")).unwrap();
        let text = fs::read_to_string(folder.path().join("admin.jsonl")).unwrap();
        let golden = r#"{"time":"2026-01-02T03:04:05Z","who":"admin","from":"127.0.0.1:1","what":"DELETE sandboxes/{id}","target":"/a\n","status":404,"error":"SandboxNotFound","durationMs":1}"#;
        assert_eq!(text, format!("{golden}\n"));
    }

    #[test]
    fn the_log_is_continued_after_a_restart_and_stays_bounded() {
        let folder = tempfile::tempdir().unwrap();
        for call in 0..100 {
            // Two lines fit a file.
            let log = AuditLog::with_limit(folder.path(), 400).unwrap();
            log.append(&entry(&call.to_string())).unwrap();
        }
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(Result::unwrap).collect();
        assert_eq!(files.len(), 9);
        assert!(files.iter().all(|file| file.metadata().unwrap().len() <= 400));
        let last = fs::read_to_string(folder.path().join("admin.jsonl")).unwrap();
        assert!(last.contains(r#""target":"99""#), "{last}");
    }
}
