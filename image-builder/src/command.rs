//! Runs other programs; a failure says which, and what they said.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Bytes of a failed program's messages that are passed on: the last ones tell.
const MESSAGE_BYTES_MAX: usize = 4096;

/// Runs `command` to its end and gives its standard output.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}: is it installed?"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let from = message.len().saturating_sub(MESSAGE_BYTES_MAX);
        let tail = message.get(from..).unwrap_or(&message).trim_end();
        bail!("{name} failed ({}): {tail}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} wrote what is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_program_and_repeats_what_it_said() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh failed") && text.contains("broken"), "{text}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run(&mut Command::new("holdfast-no-such-program")).unwrap_err();
        assert!(format!("{error:#}").contains("holdfast-no-such-program"));
    }
}
