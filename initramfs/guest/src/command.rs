//! Makes a command ready to run: who, where, with which environment, which file. Everything is
//! looked up in the sandbox's root.

use std::ffi::CString;

use holdfast_wire::guest::{Command, Failure};
use rustix::{
    fs::{AtFlags, CWD, FileType},
    process::chdir,
};

use crate::{
    failure::{from_errno, invalid},
    files, program,
    user::{Databases, User},
    workload::{Inside, Workload},
};

/// Largest user or group database that is read, in bytes.
const DATABASE_BYTES_MAX: usize = 1 << 20;

/// What an exec may say beside its command.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Overrides<'a> {
    pub env: &'a [(String, String)],
    pub cwd: Option<&'a str>,
    pub user: Option<&'a str>,
}

/// A command with nothing left to look up.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub program: CString,
    /// The program as text, for messages.
    pub name: String,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    pub user: User,
}

/// The words of a command.
pub(crate) fn words(command: &Command, workload: &Workload) -> Vec<String> {
    match command {
        Command::Argv(words) => words.clone(),
        Command::Shell(script) => ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        Command::Entrypoint(words) => {
            let settings = &workload.settings;
            let words = if words.is_empty() { &settings.cmd } else { words };
            [settings.entrypoint.as_slice(), words].concat()
        }
    }
}

impl Prepared {
    /// Also makes the thread's working directory the command's: a child inherits it.
    pub(crate) fn new(
        words: &[String],
        overrides: Overrides<'_>,
        workload: &Workload,
        inside: &Inside,
    ) -> Result<Self, Failure> {
        let settings = &workload.settings;
        let name = match words.first() {
            Some(name) if !name.is_empty() => name.clone(),
            _ => return Err(invalid("there is no command to run")),
        };
        let spec = overrides.user.unwrap_or(&settings.user);
        let user = User::resolve(spec, &databases(inside)?)?;
        let mut environment = settings.environment.clone();
        environment.extend(overrides.env)?;
        environment.set_default("HOME", &user.home);
        enter_folder(&settings.cwd)?;
        if let Some(cwd) = overrides.cwd.filter(|cwd| !cwd.is_empty()) {
            enter_folder(cwd)?;
        }
        let program = program::find(&name, environment.path(), inside)?;
        let argv = words.iter().map(|word| c_string(word)).collect::<Result<Vec<_>, _>>()?;
        let env = environment.to_c_strings()?;
        Ok(Self { program: c_string(&program)?, name, argv, env, user })
    }
}

fn databases(inside: &Inside) -> Result<Databases, Failure> {
    let read = |path| files::read_small(path, DATABASE_BYTES_MAX, inside);
    Ok(Databases { passwd: read("/etc/passwd")?, group: read("/etc/group")? })
}

fn enter_folder(cwd: &str) -> Result<(), Failure> {
    let what = format_args!("cannot use working directory {cwd:?}").to_string();
    let stat = rustix::fs::statat(CWD, cwd, AtFlags::empty());
    let stat = stat.map_err(|error| from_errno(&what, error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(invalid(format!("{what}: it is not a folder")));
    }
    chdir(cwd).map_err(|error| from_errno(&what, error))
}

fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| invalid(format!("argument {text:?} has a NUL in it")))
}
