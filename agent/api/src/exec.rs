//! `POST …/executeShellCommand`: one command, its whole output in one answer.

use serde::{Deserialize, Serialize};

use crate::decode::BadBody;

/// Bytes kept of each stream; what comes after is counted and thrown away, and `stderr` ends with a
/// note that says so. The streaming exec (see [`crate::stream`]) has no such limit.
pub const OUTPUT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Longest command, in bytes: Linux takes no longer argument.
const COMMAND_BYTES_MAX: usize = 128 * 1024 - 1;

/// Longest path of a folder or file, in bytes: what Linux takes, with its NUL.
pub const PATH_BYTES_MAX: usize = 4095;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExecuteShellCommand {
    /// Run by `/bin/sh -c`.
    pub command: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
}

impl ExecuteShellCommand {
    /// What the types do not say.
    pub fn check(&self) -> Result<(), BadBody> {
        let command = &self.command;
        if command.is_empty() || command.contains('\0') || command.len() > COMMAND_BYTES_MAX {
            let reason = format!("has 1 to {COMMAND_BYTES_MAX} bytes and no NUL");
            return Err(BadBody::shape("command", reason));
        }
        match &self.working_directory {
            Some(path) => check_path(path).map_err(|why| BadBody::shape("workingDirectory", why)),
            None => Ok(()),
        }
    }
}

/// Whether `path` can name a file in a sandbox.
pub fn check_path(path: &str) -> Result<(), String> {
    if path.starts_with('/') && !path.contains('\0') && path.len() <= PATH_BYTES_MAX {
        return Ok(());
    }
    Err(format!("must begin with '/' and have at most {PATH_BYTES_MAX} bytes and no NUL"))
}

/// What came of it. Bytes that are not UTF-8 are replaced by U+FFFD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecuteResult {
    /// 128 + n for a command that signal n ended.
    pub exit_code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Exit code of a command that a signal ended, as shells say it.
pub const fn exit_code_of_signal(signal: i32) -> i32 {
    128 + signal
}

/// Exit code of a command that was stopped because its time was over, as `timeout` says it.
pub const EXIT_CODE_TIMED_OUT: i32 = 124;

/// Exit code when what came of a command is not known: its sandbox ended, or broke its protocol,
/// after the answer had begun. `stderr` says which.
pub const EXIT_CODE_LOST: i32 = 255;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    #[test]
    fn what_cannot_be_run_is_refused_by_its_field() {
        let long = format!(r#"{{"command":"{}"}}"#, "x".repeat(COMMAND_BYTES_MAX + 1));
        let cases = [
            (r#"{"command":""}"#, "command: "),
            ("{\"command\":\"a\\u0000\"}", "command: "),
            (&long, "command: "),
            (r#"{"command":"a","workingDirectory":"tmp"}"#, "workingDirectory: "),
            (r#"{"command":"a","workingDirectory":""}"#, "workingDirectory: "),
            (r#"{"command":"a","timeout":1}"#, "timeout: unknown field"),
            (r#"{"command":["a"]}"#, "command: "),
            ("{}", "body: "),
        ];
        for (text, start) in cases {
            let outcome = decode::<ExecuteShellCommand>(text.as_bytes()).and_then(|r| r.check());
            let error = outcome.unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }

    #[test]
    fn the_answer_has_the_form_the_sdk_reads() {
        let (stdout, stderr) = ("a".to_owned(), String::new());
        let text = serde_json::to_string(&ExecuteResult { exit_code: 0, stdout, stderr }).unwrap();
        assert_eq!(text, r#"{"exitCode":0,"stdout":"a","stderr":""}"#);
    }
}
