//! The output of a command, kept within limits, and the answer made of it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use holdfast_api::exec::{
    EXIT_CODE_TIMED_OUT, ExecuteResult, OUTPUT_BYTES_MAX, exit_code_of_signal,
};
use holdfast_wire::guest::Exited;

/// Bytes of output held for all commands at once. A command that finds it used up has the rest of
/// its output cut, as one over its own limit has.
const OUTPUT_BYTES_TOTAL_MAX: usize = 256 * 1024 * 1024;

/// What all commands may hold together.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    used: AtomicUsize,
}

impl Budget {
    /// Takes as much of `wanted` as is left.
    fn take(&self, wanted: usize) -> usize {
        let mut taken = 0;
        let update = |used: usize| {
            taken = wanted.min(OUTPUT_BYTES_TOTAL_MAX.saturating_sub(used));
            Some(used + taken)
        };
        // The closure always says yes.
        let _ = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, update);
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// One stream's bytes, as far as they fit.
#[derive(Debug)]
struct Kept {
    bytes: Vec<u8>,
    cut: u64,
    budget: Arc<Budget>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes.len());
    }
}

impl Kept {
    fn new(budget: &Arc<Budget>) -> Self {
        Self { bytes: Vec::new(), cut: 0, budget: Arc::clone(budget) }
    }

    fn push(&mut self, data: &[u8]) {
        // Once something was cut nothing follows: a hole would read as if it were not there.
        let room = if self.cut == 0 { OUTPUT_BYTES_MAX - self.bytes.len() } else { 0 };
        let taken = self.budget.take(data.len().min(room));
        let (fits, rest) = data.split_at(taken);
        self.bytes.extend_from_slice(fits);
        self.cut += rest.len() as u64;
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// What a reader of `stderr` must be told.
    fn note(&self, stream: &str) -> String {
        if self.cut == 0 {
            return String::new();
        }
        let (kept, cut) = (self.bytes.len(), self.cut);
        format!("\nholdfast: {stream} was cut after {kept} bytes; {cut} more were thrown away\n")
    }
}

/// Both streams of one command.
#[derive(Debug)]
pub(super) struct CommandOutput {
    stdout: Kept,
    stderr: Kept,
    /// Bytes of either stream that nobody kept.
    missed: u64,
}

impl CommandOutput {
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        Self { stdout: Kept::new(budget), stderr: Kept::new(budget), missed: 0 }
    }

    pub(super) fn push_stdout(&mut self, data: &[u8]) {
        self.stdout.push(data);
    }

    pub(super) fn push_stderr(&mut self, data: &[u8]) {
        self.stderr.push(data);
    }

    /// Output was overwritten while the daemon was away.
    pub(super) fn missed(&mut self, bytes: u64) {
        self.missed += bytes;
    }

    /// The answer's JSON. Works through megabytes: not for an async thread.
    pub(super) fn answer(&self, exited: Exited) -> Bytes {
        let (exit_code, end) = match exited {
            Exited::Code(code) => (code, ""),
            Exited::Signal(signal) => (exit_code_of_signal(signal), ""),
            Exited::TimedOut => (EXIT_CODE_TIMED_OUT, "\nholdfast: the command's time was over\n"),
        };
        let mut stderr = self.stderr.text();
        stderr.push_str(&self.stdout.note("stdout"));
        stderr.push_str(&self.stderr.note("stderr"));
        if self.missed > 0 {
            let missed = self.missed;
            let note = "bytes of output were lost while the node's agent was away";
            stderr.push_str(&format!("\nholdfast: {missed} {note}\n"));
        }
        stderr.push_str(end);
        result(&ExecuteResult { exit_code, stdout: self.stdout.text(), stderr })
    }
}

pub(super) fn result(result: &ExecuteResult) -> Bytes {
    // Two strings and a number always encode.
    serde_json::to_vec(result).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(answer: &[u8]) -> ExecuteResult {
        serde_json::from_slice(answer).unwrap()
    }

    #[test]
    fn bytes_that_are_not_text_are_replaced_and_the_rest_is_kept() {
        let mut output = CommandOutput::new(&Arc::default());
        output.push_stdout(b"a\xff\xc3");
        output.push_stdout(b"\xa4");
        let answer = read(&output.answer(Exited::Code(7)));
        assert_eq!((answer.exit_code, &*answer.stdout, &*answer.stderr), (7, "a\u{fffd}ä", ""));
    }

    #[test]
    fn output_over_the_limit_is_cut_and_counted() {
        let mut output = CommandOutput::new(&Arc::default());
        let block = vec![b'x'; 1024 * 1024];
        for _ in 0..20 {
            output.push_stdout(&block);
        }
        assert_eq!(output.stdout.bytes.len(), OUTPUT_BYTES_MAX);
        let answer = read(&output.answer(Exited::Code(0)));
        assert_eq!(answer.stdout.len(), OUTPUT_BYTES_MAX);
        let cut = 20 * block.len() - OUTPUT_BYTES_MAX;
        let note = format!("stdout was cut after {OUTPUT_BYTES_MAX} bytes; {cut} more were");
        assert!(answer.stderr.contains(&note), "{}", answer.stderr);
    }

    #[test]
    fn what_all_commands_hold_is_bounded_and_given_back() {
        let budget = Arc::default();
        let block = vec![0; OUTPUT_BYTES_MAX];
        let fits = OUTPUT_BYTES_TOTAL_MAX / OUTPUT_BYTES_MAX;
        let mut outputs: Vec<_> = (0..=fits).map(|_| CommandOutput::new(&budget)).collect();
        for output in &mut outputs {
            output.push_stdout(&block);
        }
        assert_eq!(outputs[fits].stdout.bytes.len(), 0);
        assert_eq!(outputs[fits].stdout.cut, block.len() as u64);
        drop(outputs);
        assert_eq!(budget.used.load(Ordering::Acquire), 0);
    }

    #[test]
    fn a_signal_and_a_timeout_have_the_exit_codes_of_shells() {
        let output = CommandOutput::new(&Arc::default());
        assert_eq!(read(&output.answer(Exited::Signal(9))).exit_code, 137);
        assert_eq!(read(&output.answer(Exited::TimedOut)).exit_code, 124);
    }
}
