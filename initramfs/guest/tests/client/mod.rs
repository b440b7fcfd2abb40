//! PID 1's calls as the host makes them, over whatever stream leads to it.

use std::{os::unix::net::UnixStream, time::Duration};

use holdfast_wire::{
    WIRE_VERSION,
    frame::{read_frame, write_frame},
    guest::{Call, Command, Exec, Exited, Failure, Input, Output, Request, Start},
};

/// Longest wait for any one answer: a hang must end as a failure.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(60);

/// What an exec said and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    pub(crate) pid: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) exited: Option<Exited>,
}

/// One exec under way.
pub(crate) struct Running {
    pub(crate) stream: UnixStream,
    pub(crate) pid: u32,
}

/// Whatever has a PID 1 in it.
pub(crate) trait Client {
    fn connect(&self) -> UnixStream;

    fn start(&self, start: Start) -> Result<(), Failure> {
        self.simple(Call::Start(start)).map(|outputs| assert_eq!(outputs, [Output::Done]))
    }

    fn call(&self, call: Call) -> UnixStream {
        let mut stream = self.connect();
        write_frame(&mut stream, &Request { version: WIRE_VERSION, call }).unwrap();
        stream
    }

    /// A call without input: all answers, or the failure.
    fn simple(&self, call: Call) -> Result<Vec<Output>, Failure> {
        collect(&mut self.call(call))
    }

    fn begin(&self, exec: Exec) -> Result<Running, Failure> {
        let mut stream = self.call(Call::Exec(exec));
        match read_frame(&mut stream).unwrap() {
            Some(Output::Started { pid, .. }) => Ok(Running { stream, pid }),
            Some(Output::Failed(failure)) => Err(failure),
            other => panic!("an exec began with {other:?}"),
        }
    }

    fn exec(&self, exec: Exec) -> Result<Finished, Failure> {
        self.begin(exec)?.finish()
    }

    fn shell(&self, script: &str) -> Finished {
        self.exec(shell(script)).unwrap()
    }

    /// Names of the sandbox's processes but the first.
    fn process_names(&self) -> Vec<String> {
        match self.simple(Call::Processes).unwrap().as_slice() {
            [Output::Processes(all)] => {
                all.iter().filter(|one| one.pid != 1).map(|one| one.name.clone()).collect()
            }
            other => panic!("processes were answered by {other:?}"),
        }
    }

    fn write(&self, call: Call, content: &[u8]) -> Result<(), Failure> {
        let mut stream = self.call(call);
        for piece in content.chunks(60_000) {
            // A refused write closes the connection while we send.
            if write_frame(&mut stream, &Input::Data(piece.to_vec())).is_err() {
                break;
            }
        }
        let _ = write_frame(&mut stream, &Input::End);
        collect(&mut stream).map(|outputs| assert_eq!(outputs, [Output::Done]))
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, Failure> {
        let outputs = self.simple(Call::ReadFile { path: path.to_owned() })?;
        assert!(matches!(outputs.first(), Some(Output::File { .. })), "{outputs:?}");
        assert_eq!(outputs.last(), Some(&Output::Done));
        let data = outputs.into_iter().filter_map(|output| match output {
            Output::Data(bytes) => Some(bytes),
            _ => None,
        });
        Ok(data.flatten().collect())
    }
}

impl Running {
    pub(crate) fn send(&mut self, input: Input) {
        write_frame(&mut self.stream, &input).unwrap();
    }

    pub(crate) fn finish(mut self) -> Result<Finished, Failure> {
        let mut finished = Finished { pid: self.pid, ..Finished::default() };
        for output in collect(&mut self.stream)? {
            match output {
                Output::Stdout(bytes) => finished.stdout += &String::from_utf8_lossy(&bytes),
                Output::Stderr(bytes) => finished.stderr += &String::from_utf8_lossy(&bytes),
                Output::Exited(exited) => finished.exited = Some(exited),
                other => panic!("an exec said {other:?}"),
            }
        }
        Ok(finished)
    }
}

pub(crate) fn argv(words: &[&str]) -> Exec {
    exec(Command::Argv(words.iter().map(|&word| word.to_owned()).collect()))
}

pub(crate) fn shell(script: &str) -> Exec {
    exec(Command::Shell(script.to_owned()))
}

pub(crate) fn exec(command: Command) -> Exec {
    Exec {
        command,
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        timeout_ms: None,
        keep: None,
    }
}

/// Waits for a condition, not for a duration.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let give_up = std::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(std::time::Instant::now() < give_up, "never came: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn collect(stream: &mut UnixStream) -> Result<Vec<Output>, Failure> {
    let mut outputs = Vec::new();
    while let Some(output) = read_frame(stream).unwrap() {
        match output {
            Output::Failed(failure) => return Err(failure),
            output => outputs.push(output),
        }
    }
    Ok(outputs)
}
