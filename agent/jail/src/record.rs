//! The two files by which a shim tells whoever comes later of itself and its VMM: `pids` while they
//! run, `exit` afterwards. Each is written once and at once: it is whole or not there.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
};

use rustix::{
    fs::{Mode, OFlags, openat},
    io::{Errno, pread, pwrite, retry_on_intr},
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Names of the files in the run folder.
pub(crate) const PIDS: &str = "pids";
pub(crate) const EXIT: &str = "exit";

/// Of either file: two lines of two numbers.
const RECORD_BYTES_MAX: usize = 256;
/// `/proc/PID/stat` has 52 numbers and a name of 15 bytes.
const STAT_BYTES_MAX: usize = 2048;
/// Place of the start time behind the name's closing parenthesis: field 22, and the name is 2.
const START_AFTER_NAME: usize = 22 - 3;

/// One process for all time: numbers are used again, but not with the same start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) pid: i32,
    /// When it started, in clock ticks since the machine did.
    pub(crate) start_ticks: u64,
}

impl Instance {
    /// The process that has this number now; `proc` is `/proc`, opened.
    pub(crate) fn now(proc: impl AsFd, pid: Pid) -> io::Result<Self> {
        let number = pid.as_raw_nonzero().get();
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let stat = openat(proc, format!("{number}/stat"), flags, Mode::empty())?;
        let text = read_text(&stat, STAT_BYTES_MAX)?;
        let start_ticks = start_ticks(&text)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time"))?;
        Ok(Self { pid: number, start_ticks })
    }

    /// A handle of this process if it is still there, be it only as a zombie.
    pub(crate) fn handle(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let handle = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // Looked at with the handle open: if it is the same now, the handle is of the same.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", flags, Mode::empty())?;
        match Self::now(proc, pid) {
            Ok(now) if now == self => Ok(Some(handle)),
            Ok(_) => Ok(None),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The process ended while its file was opened, or read.
fn gone(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::SRCH))
}

/// The start time in the text of `/proc/PID/stat`. The name may hold anything, also parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_whitespace().nth(START_AFTER_NAME)?.parse().ok()
}

/// A shim and its VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pids {
    pub(crate) shim: Instance,
    pub(crate) vmm: Instance,
}

impl Pids {
    pub(crate) fn write(&self, file: impl AsFd) -> io::Result<()> {
        let Self { shim, vmm } = self;
        let text = format!(
            "shim {} {}\nvmm {} {}\n",
            shim.pid, shim.start_ticks, vmm.pid, vmm.start_ticks
        );
        write_whole(file, &text)
    }

    /// `None`: nothing was written yet.
    pub(crate) fn read(file: impl AsFd) -> io::Result<Option<Self>> {
        let text = read_text(file, RECORD_BYTES_MAX)?;
        let Some((shim, vmm)) = text.strip_suffix('\n').and_then(|text| text.split_once('\n'))
        else {
            return Ok(None);
        };
        let instance = |line: &str, name: &str| {
            let mut words = line.strip_prefix(name)?.split_whitespace();
            let (pid, start_ticks) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            Some(Instance { pid, start_ticks })
        };
        Ok(instance(shim, "shim ").zip(instance(vmm, "vmm ")).map(|(shim, vmm)| Self { shim, vmm }))
    }
}

/// Records how the VMM ended.
pub(crate) fn write_exit(file: impl AsFd, wait_status: i32) -> io::Result<()> {
    write_whole(file, &format!("{wait_status}\n"))
}

/// How the VMM ended. `None`: nothing was recorded.
pub(crate) fn read_exit(file: impl AsFd) -> io::Result<Option<ExitStatus>> {
    let text = read_text(file, RECORD_BYTES_MAX)?;
    let raw = text.strip_suffix('\n').and_then(|number| number.parse().ok());
    Ok(raw.map(ExitStatus::from_raw))
}

/// One call: the kernel shows the new length after the bytes.
fn write_whole(file: impl AsFd, text: &str) -> io::Result<()> {
    let written = retry_on_intr(|| pwrite(&file, text.as_bytes(), 0))?;
    if written == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn read_text(file: impl AsFd, bytes_max: usize) -> io::Result<String> {
    let mut bytes = vec![0; bytes_max];
    let mut filled = 0;
    while filled < bytes.len() {
        let at = u64::try_from(filled).map_err(io::Error::other)?;
        match retry_on_intr(|| pread(&file, &mut bytes[filled..], at))? {
            0 => break,
            count => filled += count,
        }
    }
    bytes.truncate(filled);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_is_found_behind_any_name() {
        let numbers: Vec<String> = (4..=52).map(|number| number.to_string()).collect();
        let stat = format!("17 (a) S (b) S {}", numbers.join(" "));
        assert_eq!(start_ticks(&stat), Some(22));
        assert_eq!(start_ticks("17 (cut) S 4 5"), None);
    }

    #[test]
    fn pids_are_read_back_and_a_file_cut_anywhere_is_none() {
        let shim = Instance { pid: 17, start_ticks: 400 };
        let vmm = Instance { pid: 18, start_ticks: 401 };
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Pids::read(&file).unwrap(), None);
        Pids { shim, vmm }.write(&file).unwrap();
        assert_eq!(Pids::read(&file).unwrap(), Some(Pids { shim, vmm }));
        for cut in 0.."shim 17 400\nvmm 18 401\n".len() {
            file.set_len(cut as u64).unwrap();
            assert_eq!(Pids::read(&file).unwrap(), None, "cut at {cut}");
        }
    }

    #[test]
    fn an_exit_is_read_back_and_an_empty_file_is_none() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(read_exit(&file).unwrap(), None);
        write_exit(&file, 10 << 8).unwrap();
        assert_eq!(read_exit(&file).unwrap().and_then(|status| status.code()), Some(10));
    }

    #[test]
    fn a_process_that_is_another_or_gone_has_no_handle() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", flags, Mode::empty()).unwrap();
        let own = Instance::now(&proc, rustix::process::getpid()).unwrap();
        assert!(own.handle().unwrap().is_some());
        let earlier = Instance { start_ticks: own.start_ticks - 1, ..own };
        assert!(earlier.handle().unwrap().is_none());
        assert!(Instance { pid: i32::MAX, ..own }.handle().unwrap().is_none());
    }
}
