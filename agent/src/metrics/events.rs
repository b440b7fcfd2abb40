//! The doors by which the parts count what happens.

use std::time::Duration;

use holdfast_wire::vmm::Stats;

use super::{Metrics, as_f64, list::*};
use crate::sandbox::{BootPhases, ResumeReport};

/// How a microVM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    PowerOff,
    Reset,
    GuestPanic,
    GuestFault,
    Killed,
    VmmError,
    OutOfMemory,
    /// Killed by its system call filter.
    Seccomp,
    Signal,
    Unknown,
    Deleted,
    AgentStopped,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            Self::PowerOff => "power_off",
            Self::Reset => "reset",
            Self::GuestPanic => "guest_panic",
            Self::GuestFault => "guest_fault",
            Self::Killed => "killed",
            Self::VmmError => "vmm_error",
            Self::OutOfMemory => "out_of_memory",
            Self::Seccomp => "seccomp",
            Self::Signal => "signal",
            Self::Unknown => "unknown",
            Self::Deleted => "deleted",
            Self::AgentStopped => "agent_stopped",
        }
    }
}

/// What became of a sandbox that an earlier agent left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// It goes on.
    Running,
    /// Its microVM had ended meanwhile.
    Ended,
    /// It was lost: half made, or its VMM cannot be reached.
    Failed,
    /// What was found belonged to no sandbox and was removed.
    Swept,
}

impl Adoption {
    fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ended => "ended",
            Self::Failed => "failed",
            Self::Swept => "swept",
        }
    }
}

impl Metrics {
    /// A launch came to Running.
    pub fn booted(&self, phases: &BootPhases) {
        self.add(&BOOTS, &["done"], 1);
        for (phase, us) in phases.list() {
            self.observe(&BOOT_PHASES, &[phase], Duration::from_micros(us));
        }
    }

    pub fn boot_failed(&self) {
        self.add(&BOOTS, &["failed"], 1);
    }

    /// A suspend was committed.
    pub fn suspended(&self) {
        self.add(&SUSPENDS, &["done"], 1);
    }

    pub fn suspend_failed(&self) {
        self.add(&SUSPENDS, &["failed"], 1);
    }

    /// A resume came to Running.
    pub fn resumed(&self) {
        self.add(&RESUMES, &["done"], 1);
    }

    /// A sandbox went on from something that was kept.
    pub fn went_on(&self, report: &ResumeReport) {
        let from = report.fetched.warmth.as_str();
        for (phase, us) in report.phases.list() {
            self.observe(&RESUME_PHASE, &[from, phase], Duration::from_micros(us));
        }
        self.add(&RESUME_READ, &[], report.fetched.bytes);
    }

    pub fn resume_failed(&self) {
        self.add(&RESUMES, &["failed"], 1);
    }

    /// A sandbox was saved while it went on.
    pub fn snapshot(&self, done: bool) {
        self.add(&SNAPSHOTS, &[outcome(done)], 1);
    }

    /// A guest stood still for so long to be saved, and went on.
    pub fn stood_still(&self, us: u64) {
        self.observe(&SNAPSHOT_PAUSE, &[], Duration::from_micros(us));
    }

    /// A snapshot was put into the remote store, or was not.
    pub fn uploaded(&self, done: bool) {
        self.add(&UPLOADS, &[outcome(done)], 1);
    }

    /// It was decided about a flow.
    pub fn egress_decided(&self, allowed: bool) {
        self.add(&EGRESS_DECISIONS, &[if allowed { "allowed" } else { "denied" }], 1);
    }

    /// Decisions were pushed out by others, or nothing but their number is known.
    pub fn egress_dropped(&self, count: u64) {
        self.add(&EGRESS_DROPPED, &[], count);
    }

    /// A guest was to be kept for later launches.
    pub fn template_made(&self, done: bool) {
        self.add(&TEMPLATES, &[if done { "made" } else { "not_made" }], 1);
    }

    /// A launch began from one.
    pub fn template_used(&self) {
        self.add(&TEMPLATES, &["used"], 1);
    }

    /// A microVM ended.
    pub fn ended(&self, end: End) {
        self.add(&EXITS, &[end.as_str()], 1);
        if end == End::Seccomp {
            self.add(&SECCOMP_KILLS, &[], 1);
        }
    }

    /// A sandbox, or a trace of one, was found at the agent's start.
    pub fn adopted(&self, outcome: Adoption) {
        self.add(&ADOPTIONS, &[outcome.as_str()], 1);
    }

    pub fn egress_restarted(&self) {
        self.add(&EGRESS_RESTARTS, &[], 1);
    }

    pub fn device_stopped(&self) {
        self.add(&DEVICE_STOPS, &[], 1);
    }

    /// What a VMM has counted since it was last asked.
    pub fn counted(&self, before: &Stats, now: &Stats) {
        let since = |part: fn(&Stats) -> u64| part(now).saturating_sub(part(before));
        let exits = [
            ("mmio", since(|s| s.exits.mmio)),
            ("port_io", since(|s| s.exits.port_io)),
            ("other", since(|s| s.exits.other)),
        ];
        for (kind, count) in exits {
            self.add(&VM_EXITS, &[kind], count);
        }
        let bytes = [
            (["disk", "in"], since(|s| s.disks.iter().map(|disk| disk.read_bytes).sum())),
            (["disk", "out"], since(|s| s.disks.iter().map(|disk| disk.written_bytes).sum())),
            (["network", "in"], since(|s| s.networks.iter().map(|net| net.received_bytes).sum())),
            (["network", "out"], since(|s| s.networks.iter().map(|net| net.sent_bytes).sum())),
            (["vsock", "in"], since(|s| s.vsock_rx_bytes)),
            (["vsock", "out"], since(|s| s.vsock_tx_bytes)),
            (["serial", "out"], since(|s| s.serial_bytes)),
        ];
        for (labels, count) in bytes {
            self.add(&DEVICE_BYTES, &labels, count);
        }
        let requests = since(|s| s.disks.iter().map(|disk| disk.requests).sum());
        self.add(&DEVICE_REQUESTS, &["disk"], requests);
        let frames = since(|s| {
            s.networks.iter().map(|net| net.received_frames.saturating_add(net.sent_frames)).sum()
        });
        self.add(&DEVICE_REQUESTS, &["network"], frames);
        let errors = since(|s| s.disks.iter().map(|disk| disk.errors).sum());
        self.add(&DEVICE_ERRORS, &["disk"], errors);
        let dropped = since(|s| s.networks.iter().map(|net| net.dropped_frames).sum());
        self.add(&DEVICE_ERRORS, &["network"], dropped);
        let given_back = since(|s| s.balloon.map_or(0, |balloon| balloon.given_back_bytes));
        self.add(&GIVEN_BACK, &[], given_back);
    }

    /// A conversion ended.
    pub fn converted(&self, done: bool, took: Duration) {
        self.add(&CONVERSIONS, &[outcome(done)], 1);
        self.observe(&CONVERSION_TIME, &[], took);
    }

    /// A command was handed to a guest.
    pub fn exec(&self, started: bool) {
        self.add(&EXECS, &[outcome(started)], 1);
    }

    /// A call was answered. `route`: the path's pattern; `None` where there is none.
    pub fn answered(&self, method: &str, route: Option<&str>, status: u16) {
        let method = METHODS.iter().find(|known| **known == method).unwrap_or(&"other");
        let status = status.to_string();
        // Whoever has no token cannot make series but these.
        let route = route.filter(|_| status != "401").unwrap_or("none");
        self.add(&API_REQUESTS, &[method, route, &status], 1);
    }

    pub fn host_warnings(&self, count: usize) {
        self.set(&HOST_WARNINGS, &[], as_f64(count.try_into().unwrap_or(u64::MAX)));
    }
}

fn outcome(done: bool) -> &'static str {
    if done { "done" } else { "failed" }
}

#[cfg(test)]
mod tests {
    use holdfast_wire::vmm::{BalloonStats, DiskStats, Exits, NetworkStats};

    use super::*;

    #[test]
    fn what_a_vmm_counted_is_added_once_however_often_it_is_asked() {
        let metrics = Metrics::new().unwrap();
        let disk = DiskStats { read_bytes: 100, written_bytes: 7, requests: 3, errors: 1 };
        let exits = Exits { mmio: 5, port_io: 2, other: 1 };
        let network = NetworkStats {
            received_bytes: 60,
            received_frames: 1,
            sent_bytes: 80,
            sent_frames: 2,
            dropped_frames: 4,
        };
        let balloon = BalloonStats { target_mib: 0, actual_mib: 0, given_back_bytes: 4096 };
        let now = Stats {
            exits,
            disks: vec![disk, disk],
            networks: vec![network],
            balloon: Some(balloon),
            vsock_tx_bytes: 9,
            ..Stats::default()
        };
        metrics.counted(&Stats::default(), &now);
        metrics.counted(&now, &now);
        let text = metrics.text().unwrap();
        for line in [
            r#"holdfast_vm_exits_total{kind="mmio"} 5"#,
            r#"holdfast_device_bytes_total{device="disk",direction="in"} 200"#,
            r#"holdfast_device_bytes_total{device="vsock",direction="out"} 9"#,
            r#"holdfast_device_errors_total{device="disk"} 2"#,
            r#"holdfast_device_bytes_total{device="network",direction="in"} 60"#,
            r#"holdfast_device_requests_total{device="network"} 3"#,
            r#"holdfast_device_errors_total{device="network"} 4"#,
            "holdfast_memory_given_back_bytes_total 4096",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_resume_is_measured_by_phase_and_by_where_its_memory_came_from() {
        use crate::sandbox::{Fetched, Warmth};
        assert_eq!(Warmth::ALL.map(Warmth::as_str), *WARMTHS);
        let metrics = Metrics::new().unwrap();
        let mut report = ResumeReport::default();
        report.phases.total_us = 2_500;
        report.fetched = Fetched { warmth: Warmth::Cold, bytes: 4096, ..Fetched::default() };
        metrics.went_on(&report);
        let text = metrics.text().unwrap();
        for line in [
            r#"holdfast_resume_phase_seconds_sum{from="cold",phase="total"} 0.0025"#,
            r#"holdfast_resume_phase_seconds_count{from="cold",phase="tell"} 1"#,
            r#"holdfast_resume_phase_seconds_count{from="hot",phase="total"} 0"#,
            "holdfast_resume_read_bytes_total 4096",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}\n{text}");
        }
    }

    #[test]
    fn an_end_by_the_system_call_filter_is_a_seccomp_kill_too() {
        let metrics = Metrics::new().unwrap();
        metrics.ended(End::Seccomp);
        metrics.ended(End::Signal);
        let text = metrics.text().unwrap();
        assert!(text.contains("holdfast_seccomp_kills_total 1\n"), "{text}");
        assert!(text.contains("holdfast_exits_total{reason=\"signal\"} 1\n"), "{text}");
    }

    #[test]
    fn calls_that_nobody_is_known_to_have_made_are_one_series_a_method() {
        let metrics = Metrics::new().unwrap();
        metrics.answered("GET", Some("/v1/node"), 401);
        metrics.answered("BREW", Some("/v1/node"), 401);
        metrics.answered("GET", None, 404);
        metrics.answered("GET", Some("/v1/node"), 200);
        let text = metrics.text().unwrap();
        let series: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("holdfast_api_requests_total"))
            .collect();
        assert_eq!(
            series,
            [
                r#"{method="GET",route="/v1/node",status="200"} 1"#,
                r#"{method="GET",route="none",status="401"} 1"#,
                r#"{method="GET",route="none",status="404"} 1"#,
                r#"{method="other",route="none",status="401"} 1"#,
            ]
        );
    }
}
