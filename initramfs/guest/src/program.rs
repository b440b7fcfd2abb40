//! Finds the program of a command as `execvp` would, in the sandbox's own root.

use holdfast_wire::guest::{Failure, FailureKind};
use rustix::fs::{AtFlags, CWD, FileType, Mode};

use crate::{
    failure::{failure, from_errno, not_found},
    workload::Inside,
};

/// What a path holds, for a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Program,
    /// There, but a folder or without any execute bit.
    NotExecutable,
    Nothing,
}

/// Path to execute for `name`. A name with a slash is taken as it is; others are searched in
/// `path`, whose relative folders are skipped: what runs must not depend on the working directory.
pub(crate) fn find(name: &str, path: &str, _inside: &Inside) -> Result<String, Failure> {
    search(name, path, look)
}

fn search(name: &str, path: &str, look: impl Fn(&str) -> Found) -> Result<String, Failure> {
    let denied = |at: &str| {
        let message = format!("cannot run {name:?}: {at} is not an executable file");
        failure(FailureKind::Denied, message)
    };
    if name.contains('/') {
        return match look(name) {
            Found::Program => Ok(name.to_owned()),
            Found::NotExecutable => Err(denied(name)),
            Found::Nothing => Err(not_found(format!("cannot run {name:?}: no such file"))),
        };
    }
    let mut passed_over = None;
    for folder in path.split(':').filter(|folder| folder.starts_with('/')) {
        let candidate = format!("{}/{name}", folder.trim_end_matches('/'));
        match look(&candidate) {
            Found::Program => return Ok(candidate),
            Found::NotExecutable => passed_over = Some(candidate),
            Found::Nothing => {}
        }
    }
    match passed_over {
        Some(candidate) => Err(denied(&candidate)),
        None => Err(not_found(format!("cannot run {name:?}: no such file in PATH ({path})"))),
    }
}

fn look(path: &str) -> Found {
    let Ok(stat) = rustix::fs::statat(CWD, path, AtFlags::empty()) else { return Found::Nothing };
    let mode = Mode::from_raw_mode(stat.st_mode);
    let executable = mode.intersects(Mode::XUSR | Mode::XGRP | Mode::XOTH);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if executable => Found::Program,
        _ => Found::NotExecutable,
    }
}

/// What a failed `execve` of a file that is there means.
pub(crate) fn exec_failure(program: &str, error: rustix::io::Errno) -> Failure {
    use rustix::io::Errno;
    match error {
        Errno::NOENT => not_found(format!("cannot run {program:?}: its interpreter is missing")),
        Errno::NOEXEC => failure(
            FailureKind::Denied,
            format!("cannot run {program:?}: not a program for this machine, and no #! line"),
        ),
        error => from_errno(format_args!("cannot run {program:?}"), error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(path: &str) -> Found {
        match path {
            "/bin/ls" | "/opt/ls" | "./run" => Found::Program,
            "/opt/data" | "/bin/folder" => Found::NotExecutable,
            _ => Found::Nothing,
        }
    }

    #[test]
    fn the_first_folder_that_has_it_wins() {
        assert_eq!(search("ls", "/none:/opt/:/bin", world).unwrap(), "/opt/ls");
    }

    #[test]
    fn relative_folders_of_path_are_skipped() {
        let refused = search("run", ":.:/bin", world).unwrap_err();
        assert_eq!(refused.kind, FailureKind::NotFound);
        assert_eq!(search("./run", "", world).unwrap(), "./run");
    }

    #[test]
    fn missing_and_not_executable_are_told_apart() {
        let cases = [
            ("nope", FailureKind::NotFound),
            ("", FailureKind::NotFound),
            ("/nope", FailureKind::NotFound),
            ("data", FailureKind::Denied),
            ("/bin/folder", FailureKind::Denied),
        ];
        for (name, kind) in cases {
            assert_eq!(search(name, "/bin:/opt", world).unwrap_err().kind, kind, "{name:?}");
        }
    }
}
