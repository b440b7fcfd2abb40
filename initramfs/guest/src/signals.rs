//! Signals by the names an OCI image config gives them.

/// What stops a workload whose image names no signal.
pub(crate) const DEFAULT_STOP: i32 = libc::SIGTERM;

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`. `None`: no such signal.
pub(crate) fn parse(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse() {
        return is_signal(number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = bare.strip_prefix("RTMIN") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse().ok()? };
        return libc::SIGRTMIN().checked_add(offset).filter(|&number| is_signal(number));
    }
    NAMES.iter().find(|(known, _)| *known == bare).map(|(_, number)| *number)
}

/// Whether the kernel has this signal.
pub(crate) fn is_signal(number: i32) -> bool {
    (1..=64).contains(&number)
}

const NAMES: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_signal_is_understood() {
        for name in ["SIGQUIT", "QUIT", "sigquit", "3"] {
            assert_eq!(parse(name), Some(3), "{name}");
        }
        assert_eq!(parse("SIGRTMIN+3"), Some(libc::SIGRTMIN() + 3));
        assert_eq!(parse("RTMIN"), Some(libc::SIGRTMIN()));
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for name in ["", "SIG", "0", "65", "-9", "SIGNOPE", "RTMIN+99", "RTMIN-1"] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
