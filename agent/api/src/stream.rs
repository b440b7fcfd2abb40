//! Exec with streams, over one WebSocket.
//!
//! The client's first message is text, a [`ClientMessage::Start`]. After it, binary messages carry
//! bytes of one stream: a tag byte, then the bytes. Text messages carry the rest. The server's last
//! message is [`ServerMessage::Exited`], [`ServerMessage::TimedOut`] or [`ServerMessage::Failed`],
//! then it closes. A client that goes away kills its command, unless the command has an id.
//!
//! A command with an id outlives the connection, and the daemon. Its output is counted in bytes of
//! stdout and stderr together. A client that lost the connection opens another one, and its first
//! message there is [`ClientMessage::Attach`] with the count of what it has; it is sent the rest, as
//! far as it is kept (the last 1 MiB): what is missing is told by [`ServerMessage::Gap`]. Stdin goes
//! on behind the bytes that [`ServerMessage::Started`] counts. Once the client has the end it says
//! [`ClientMessage::Collect`].
//!
//! Back-pressure is that of the connection: who does not read is not sent more.

use serde::{Deserialize, Serialize};

use crate::{
    decode::BadBody, error::ErrorDetail, exec::check_path, exec_id::ExecId,
    sandbox::check_arguments,
};

/// Largest message either side sends, in bytes. Larger ones end the connection.
pub const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// Most bytes of a stream a client should put in one message.
pub const DATA_BYTES: usize = 32 * 1024;

/// Which stream a binary message belongs to: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Command {
    /// Run as given; the first is looked up in the sandbox's PATH.
    Argv(Vec<String>),
    /// Run by `/bin/sh -c`.
    Shell(String),
    /// The image's entrypoint followed by these, or by the image's cmd if there are none.
    Entrypoint(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Start {
    pub command: Command,
    /// Added to the sandbox's; the same name replaces.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// False: the command reads nothing.
    #[serde(default)]
    pub stdin: bool,
    /// The command is killed after this. None: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Given by the client: the command outlives the connection, and can be attached to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ExecId>,
    /// A command with an id is killed when no client was there for this long. None:
    /// [`LINGER_MS_DEFAULT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linger_ms: Option<u32>,
}

/// How long a command goes on without a client, in milliseconds: longer than a restart of the
/// daemon on a slow node.
pub const LINGER_MS_DEFAULT: u32 = 2 * 60 * 1000;

/// The longest that can be asked for: a day.
pub const LINGER_MS_MAX: u32 = 24 * 60 * 60 * 1000;

/// Text messages of the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "type")]
pub enum ClientMessage {
    Start(Start),
    /// In place of Start: goes on with a command that was started with this id.
    Attach {
        id: ExecId,
        /// Bytes of its output that the client has.
        from: u64,
    },
    /// To the command's process group, by number.
    Signal {
        signal: i32,
    },
    /// No more stdin.
    StdinEnd,
    /// SIGKILL to everything of the command.
    Kill,
    /// The end of a command with an id has arrived: it can be forgotten.
    Collect,
}

/// Text messages of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "type")]
pub enum ServerMessage {
    Started {
        /// In the sandbox.
        pid: u32,
        /// It outlives the connection. Missing although an id was given: the sandbox keeps as many
        /// commands as it can already.
        #[serde(default, skip_serializing_if = "is_default")]
        kept: bool,
        /// Bytes of stdin that earlier connections brought to it.
        #[serde(default, skip_serializing_if = "is_default")]
        stdin_taken: u64,
    },
    /// Bytes of stdin that have reached a kept command, over all connections.
    StdinTaken {
        bytes: u64,
    },
    /// This many bytes of output are no longer kept. They count as sent.
    Gap {
        bytes: u64,
    },
    /// One of the two is there.
    Exited {
        #[serde(skip_serializing_if = "Option::is_none")]
        code: Option<i32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
    TimedOut,
    Failed {
        error: ErrorDetail,
    },
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("a binary message is empty; its first byte names the stream")]
    Empty,
    #[error("a binary message is for stream {0}; there are 0 (stdin), 1 (stdout) and 2 (stderr)")]
    Stream(u8),
}

/// A binary message of `stream` with `bytes`.
pub fn data_frame(stream: Stream, bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(1 + bytes.len());
    frame.push(stream as u8);
    frame.extend_from_slice(bytes);
    frame
}

/// The stream and the bytes of a binary message.
pub fn split_data_frame(frame: &[u8]) -> Result<(Stream, &[u8]), BadFrame> {
    let (tag, bytes) = frame.split_first().ok_or(BadFrame::Empty)?;
    let stream = match tag {
        0 => Stream::Stdin,
        1 => Stream::Stdout,
        2 => Stream::Stderr,
        other => return Err(BadFrame::Stream(*other)),
    };
    Ok((stream, bytes))
}

impl Start {
    /// What the types do not say.
    pub fn check(&self) -> Result<(), BadBody> {
        match &self.command {
            Command::Argv(argv) if argv.is_empty() => {
                return Err(BadBody::shape("command.argv", "must name a program"));
            }
            Command::Argv(argv) => check_arguments("command.argv", Some(argv))?,
            Command::Entrypoint(arguments) => {
                let nul = arguments.iter().any(|argument| argument.contains('\0'));
                if nul {
                    return Err(BadBody::shape("command.entrypoint", "an argument has no NUL"));
                }
            }
            Command::Shell(text) if text.is_empty() || text.contains('\0') => {
                return Err(BadBody::shape("command.shell", "must not be empty or have a NUL"));
            }
            Command::Shell(_) => {}
        }
        for (name, value) in &self.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                let field = format!("env.{}", name.chars().take(40).collect::<String>());
                return Err(BadBody::shape(field, "a name has no '=', and neither part has a NUL"));
            }
        }
        if let Some(cwd) = &self.cwd {
            check_path(cwd).map_err(|reason| BadBody::shape("cwd", reason))?;
        }
        if self.user.as_ref().is_some_and(|user| user.is_empty() || user.contains('\0')) {
            return Err(BadBody::shape("user", "must be a user, uid, user:group or uid:gid"));
        }
        if self.linger_ms.is_some_and(|ms| self.id.is_none() || ms > LINGER_MS_MAX) {
            let reason = format!("goes with an id, and is at most {LINGER_MS_MAX}");
            return Err(BadBody::shape("lingerMs", reason));
        }
        if self.timeout_ms == Some(0) {
            return Err(BadBody::shape(
                "timeoutMs",
                "must be at least 1; leave it out for no limit",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    #[test]
    fn a_frame_is_split_as_it_was_made() {
        for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
            let frame = data_frame(stream, b"ab");
            assert_eq!(split_data_frame(&frame), Ok((stream, &b"ab"[..])));
        }
    }

    #[test]
    fn a_frame_of_no_stream_is_refused() {
        assert_eq!(split_data_frame(b""), Err(BadFrame::Empty));
        assert_eq!(split_data_frame(&[3, 1]), Err(BadFrame::Stream(3)));
    }

    #[test]
    fn messages_have_the_forms_that_are_documented() {
        let start = Start {
            command: Command::Argv(vec!["ls".to_owned()]),
            env: vec![("A".to_owned(), "1".to_owned())],
            cwd: None,
            user: None,
            stdin: true,
            timeout_ms: Some(5),
            id: None,
            linger_ms: None,
        };
        let golden = r#"{"type":"start","command":{"argv":["ls"]},"env":[["A","1"]],"stdin":true,"timeoutMs":5}"#;
        assert_eq!(serde_json::to_string(&ClientMessage::Start(start.clone())).unwrap(), golden);
        assert_eq!(decode(golden.as_bytes()), Ok(ClientMessage::Start(start)));
        let golden = format!(r#"{{"type":"attach","id":"{}","from":9}}"#, "0".repeat(32));
        let attach = ClientMessage::Attach { id: ExecId::from_random([0; 16]), from: 9 };
        assert_eq!(decode(golden.as_bytes()), Ok(attach));
        let cases = [
            (
                ServerMessage::Started { pid: 7, kept: false, stdin_taken: 0 },
                r#"{"type":"started","pid":7}"#,
            ),
            (
                ServerMessage::Started { pid: 7, kept: true, stdin_taken: 5 },
                r#"{"type":"started","pid":7,"kept":true,"stdinTaken":5}"#,
            ),
            (ServerMessage::StdinTaken { bytes: 5 }, r#"{"type":"stdinTaken","bytes":5}"#),
            (ServerMessage::Gap { bytes: 9 }, r#"{"type":"gap","bytes":9}"#),
            (
                ServerMessage::Exited { code: Some(0), signal: None },
                r#"{"type":"exited","code":0}"#,
            ),
            (ServerMessage::TimedOut, r#"{"type":"timedOut"}"#),
        ];
        for (message, golden) in cases {
            assert_eq!(serde_json::to_string(&message).unwrap(), golden);
            assert_eq!(serde_json::from_str::<ServerMessage>(golden).unwrap(), message);
        }
    }

    #[test]
    fn a_start_that_cannot_be_carried_out_is_refused_by_its_field() {
        let cases = [
            (r#"{"command":{"argv":[]}}"#, "command.argv: "),
            (r#"{"command":{"argv":[""]}}"#, "command.argv: "),
            (r#"{"command":{"shell":""}}"#, "command.shell: "),
            ("{\"command\":{\"entrypoint\":[\"\\u0000\"]}}", "command.entrypoint: "),
            (r#"{"command":{"shell":"a"},"env":[["A=","1"]]}"#, "env.A=: "),
            (r#"{"command":{"shell":"a"},"cwd":"x"}"#, "cwd: "),
            (r#"{"command":{"shell":"a"},"user":""}"#, "user: "),
            (r#"{"command":{"shell":"a"},"timeoutMs":0}"#, "timeoutMs: "),
            (r#"{"command":{"shell":"a"},"lingerMs":1}"#, "lingerMs: "),
            (r#"{"command":{"shell":"a"},"id":"x"}"#, "id: "),
            (r#"{"command":{"shell":"a"},"tty":true}"#, "tty: unknown field"),
        ];
        for (text, start) in cases {
            let outcome = decode::<Start>(text.as_bytes()).and_then(|start| start.check());
            let error = outcome.unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }
}
