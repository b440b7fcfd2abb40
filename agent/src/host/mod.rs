//! The machine below the agent: what it must be for sandboxes to be safe from each other, checked
//! at the agent's start and by `holdfast doctor`. The host image sets it; elsewhere the operator
//! does, and each check says how.

mod checks;
mod facts;

use std::path::{Path, PathBuf};

use fs_err as fs;
use holdfast_api::node::{HostCheck, Verdict};
use holdfast_jail::{cores_can_be_kept_apart, landlock_version};
use log::{error, info, warn};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::config::Smt;

/// Where the kernel shows and takes whether hardware threads are used.
const SMT_CONTROL: &str = "sys/devices/system/cpu/smt/control";

/// The host, by its file system.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    root: PathBuf,
}

impl Host {
    /// This machine.
    pub(crate) fn here() -> Self {
        Self { root: "/".into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The text of a small file, without the white space around it. `None`: there is none.
    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    /// What the configuration asks of the host and the agent can do itself. What could not be done
    /// is found by [`Self::examine`].
    pub(crate) fn apply(&self, smt: Smt) {
        // A core dump of the agent would hold its secrets. Children have it from here.
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        if let Err(errno) = setrlimit(Resource::Core, none) {
            warn!(error:% = errno; "core dumps of the agent not switched off");
        }
        if smt == Smt::Off && self.read(SMT_CONTROL).as_deref() == Some("on") {
            match fs::write(self.path(SMT_CONTROL), "off") {
                Ok(()) => info!("hardware threads switched off"),
                Err(error) => warn!(error:%; "hardware threads not switched off"),
            }
        }
    }

    /// Every check, in the order in which they are told.
    pub(crate) fn examine(&self, smt: Smt) -> Vec<HostCheck> {
        vec![
            self.kvm(),
            checks::landlock(landlock_version()),
            self.core_dumps(),
            self.same_page_merging(),
            self.mitigations(),
            self.hardware_threads(smt, cores_can_be_kept_apart()),
            self.swap(),
        ]
    }
}

/// The file system that is read, for tests of parts.
impl From<&Path> for Host {
    fn from(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }
}

/// Tells the log of everything that is not as it should be.
pub(crate) fn report(checks: &[HostCheck]) {
    for HostCheck { name, verdict, detail, remedy } in checks {
        let remedy = remedy.as_deref().unwrap_or_default();
        match verdict {
            Verdict::Ok => {}
            Verdict::Warning => warn!(check = name.as_str(), detail:%, remedy; "host check"),
            Verdict::Failed => error!(check = name.as_str(), detail:%, remedy; "host check"),
        }
    }
}

pub(crate) fn ok(name: &str, detail: impl Into<String>) -> HostCheck {
    HostCheck { name: name.to_owned(), verdict: Verdict::Ok, detail: detail.into(), remedy: None }
}

pub(crate) fn warning(name: &str, detail: impl Into<String>, remedy: &str) -> HostCheck {
    let remedy = Some(remedy.to_owned());
    HostCheck { verdict: Verdict::Warning, remedy, ..ok(name, detail) }
}

pub(crate) fn failed(name: &str, detail: impl Into<String>, remedy: &str) -> HostCheck {
    HostCheck { verdict: Verdict::Failed, ..warning(name, detail, remedy) }
}
