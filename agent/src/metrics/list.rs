//! Every metric and its unit, in one list.

use crate::sandbox::ResumePhases;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// What one of it is; for seconds and bytes the name says it too.
    pub unit: &'static str,
    pub help: &'static str,
    pub labels: &'static [Label],
}

/// A label, and what bounds its values.
#[derive(Debug, Clone, Copy)]
pub struct Label {
    pub name: &'static str,
    pub values: Values,
}

#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// These and no other.
    Of(&'static [&'static str]),
    /// Whatever comes, of which there are at most so many.
    AtMost(usize),
}

const fn label(name: &'static str, values: &'static [&'static str]) -> Label {
    Label { name, values: Values::Of(values) }
}

const fn metric(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    help: &'static str,
    labels: &'static [Label],
) -> Metric {
    Metric { name, kind, unit, help, labels }
}

use Kind::{Counter, Gauge, Histogram};

pub(super) const STATES: &[&str] =
    &["creating", "running", "stopping", "suspended", "resuming", "deleting", "failed"];
const ENDS: &[&str] = &[
    "power_off",
    "reset",
    "guest_panic",
    "guest_fault",
    "killed",
    "vmm_error",
    "out_of_memory",
    "seccomp",
    "signal",
    "unknown",
    "deleted",
    "agent_stopped",
];
const PHASES: &[&str] = &["turn", "prepare", "spawn", "boot", "start"];
const RESUME_PHASES: &[&str] = &ResumePhases::NAMES;
pub(super) const WARMTHS: &[&str] = &["hot", "cold", "booted"];
const OUTCOMES: &[&str] = &["done", "failed"];
pub(super) const METHODS: &[&str] =
    &["GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH", "other"];

/// Routes of the API, and `none` for what has no route or no token.
const ROUTES_MAX: usize = 80;
/// Statuses that the daemon answers with.
const STATUSES_MAX: usize = 24;

macro_rules! metrics {
    ($($constant:ident = $metric:expr;)*) => {
        $(pub(super) const $constant: Metric = $metric;)*
        /// Every metric.
        pub const LIST: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    BUILD = metric("holdfast_build_info", Gauge, "1",
        "Version of the daemon, as a label.",
        &[Label { name: "version", values: Values::AtMost(1) }]);
    SANDBOXES = metric("holdfast_sandboxes", Gauge, "sandboxes",
        "Sandboxes of this node by state.", &[label("state", STATES)]);
    BOOTS = metric("holdfast_boots_total", Counter, "launches",
        "Launches of microVMs by outcome.", &[label("outcome", OUTCOMES)]);
    SUSPENDS = metric("holdfast_suspends_total", Counter, "suspends",
        "Suspends of sandboxes by outcome.", &[label("outcome", OUTCOMES)]);
    RESUMES = metric("holdfast_resumes_total", Counter, "resumes",
        "Resumes of sandboxes by outcome.", &[label("outcome", OUTCOMES)]);
    SNAPSHOTS = metric("holdfast_snapshots_total", Counter, "snapshots",
        "Snapshots of sandboxes that went on, by outcome.", &[label("outcome", OUTCOMES)]);
    SNAPSHOT_PAUSE = metric("holdfast_snapshot_pause_seconds", Histogram, "seconds",
        "How long guests stood still for snapshots and forks, after which they went on.", &[]);
    UPLOADS = metric("holdfast_uploads_total", Counter, "uploads",
        "Attempts to put a snapshot into the remote store, by outcome.",
        &[label("outcome", OUTCOMES)]);
    TEMPLATES = metric("holdfast_templates_total", Counter, "templates",
        "Guests kept for later launches of their kind, and launches that began from one.",
        &[label("event", &["made", "not_made", "used"])]);
    BOOT_PHASES = metric("holdfast_boot_phase_seconds", Histogram, "seconds",
        "Phases of launches that came to Running.", &[label("phase", PHASES)]);
    RESUME_PHASE = metric("holdfast_resume_phase_seconds", Histogram, "seconds",
        "Phases of resumes, and of clones' launches, that came to Running, by where the memory came \
         from.",
        &[label("from", WARMTHS), label("phase", RESUME_PHASES)]);
    RESUME_READ = metric("holdfast_resume_read_bytes_total", Counter, "bytes",
        "Stored bytes that were read before a guest went on.", &[]);
    EXITS = metric("holdfast_exits_total", Counter, "microVMs",
        "Ends of microVMs by reason.", &[label("reason", ENDS)]);
    VMM_RESIDENT = metric("holdfast_vmm_resident_bytes", Gauge, "bytes",
        "Resident memory of VMMs beyond their guests': of all, and of the largest.",
        &[label("of", &["all", "largest"])]);
    VM_EXITS = metric("holdfast_vm_exits_total", Counter, "exits",
        "Exits of guests to the VMM by kind.", &[label("kind", &["mmio", "port_io", "other"])]);
    DEVICE_BYTES = metric("holdfast_device_bytes_total", Counter, "bytes",
        "Bytes through devices, as the guest sees their direction.",
        &[
            label("device", &["disk", "network", "vsock", "serial"]),
            label("direction", &["in", "out"]),
        ]);
    DEVICE_REQUESTS = metric("holdfast_device_requests_total", Counter, "requests",
        "Requests to devices, or frames.", &[label("device", &["disk", "network"])]);
    DEVICE_ERRORS = metric("holdfast_device_errors_total", Counter, "errors",
        "Requests that a device answered with an error, or frames that it dropped.",
        &[label("device", &["disk", "network"])]);
    GIVEN_BACK = metric("holdfast_memory_given_back_bytes_total", Counter, "bytes",
        "Memory that guests had used and gave back: free pages, and the balloon.", &[]);
    DEVICE_STOPS = metric("holdfast_device_stops_total", Counter, "devices",
        "Devices stopped because a guest broke their protocol.", &[]);
    SECCOMP_KILLS = metric("holdfast_seccomp_kills_total", Counter, "processes",
        "VMMs killed by their system call filter.", &[]);
    REFUSALS = metric("holdfast_admission_refusals_total", Counter, "creates",
        "Creates refused by what was short.",
        &[label("short", &["memory", "cpu", "disk", "count"])]);
    ADOPTIONS = metric("holdfast_adoptions_total", Counter, "sandboxes",
        "Sandboxes found at the agent's start by what became of them.",
        &[label("outcome", &["running", "ended", "failed", "swept"])]);
    CONVERSIONS = metric("holdfast_image_conversions_total", Counter, "images",
        "Images converted by outcome.", &[label("outcome", OUTCOMES)]);
    CONVERSION_TIME = metric("holdfast_image_conversion_seconds", Histogram, "seconds",
        "How long conversions took, waiting for their turn included.", &[]);
    API_REQUESTS = metric("holdfast_api_requests_total", Counter, "requests",
        "Answered calls. Without a token or a path that is served the route is `none`.",
        &[
            label("method", METHODS),
            Label { name: "route", values: Values::AtMost(ROUTES_MAX) },
            Label { name: "status", values: Values::AtMost(STATUSES_MAX) },
        ]);
    EXECS = metric("holdfast_execs_total", Counter, "commands",
        "Commands handed to guests by outcome; `failed` ones did not start.",
        &[label("outcome", OUTCOMES)]);
    EGRESS_DECISIONS = metric("holdfast_egress_decisions_total", Counter, "decisions",
        "Decisions about flows of sandboxes, DNS included.",
        &[label("outcome", &["allowed", "denied"])]);
    EGRESS_DROPPED = metric("holdfast_egress_decisions_dropped_total", Counter, "decisions",
        "Decisions that are counted above, or were counted elsewhere, and are not kept any more.",
        &[]);
    STORE_ERRORS = metric("holdfast_store_errors_total", Counter, "calls",
        "Calls to the records that failed.", &[]);
    MEMORY = metric("holdfast_memory_bytes", Gauge, "bytes",
        "Memory that may be promised to sandboxes, and that is.",
        &[label("what", &["capacity", "reserved"])]);
    CPUS = metric("holdfast_cpus", Gauge, "CPUs",
        "CPUs that may be promised to sandboxes, and that are.",
        &[label("what", &["capacity", "reserved"])]);
    STATE_DISK = metric("holdfast_state_disk_bytes", Gauge, "bytes",
        "The file system of the state folder.", &[label("what", &["total", "available"])]);
    SLOTS_READY = metric("holdfast_slots_ready", Gauge, "slots",
        "Network slots made ahead; one that is always 0 means that they cannot be made.", &[]);
    EGRESS_RESTARTS = metric("holdfast_egress_restarts_total", Counter, "processes",
        "Egress processes that took the place of one that had ended.", &[]);
    EGRESS_PROCESSES = metric("holdfast_egress_processes", Gauge, "processes",
        "Egress processes that serve.", &[]);
    EGRESS_SANDBOXES = metric("holdfast_egress_sandboxes", Gauge, "sandboxes",
        "Sandboxes that are to be served by them.", &[]);
    BYWAYS = metric("holdfast_egress_byways", Gauge, "sandboxes",
        "Sandboxes whose policies let flows pass their proxies by.", &[]);
    BYWAY_BYTES = metric("holdfast_egress_byway_bytes", Gauge, "bytes",
        "What passed proxies by since the host's rules were loaded.",
        &[label("direction", &["out", "in"])]);
    UNRECORDED = metric("holdfast_egress_unrecorded", Gauge, "packets",
        "Packets that the rules at taps let past, less what is on record of them: questions to name \
         servers without a decision (over a limit, or not to be read), and packets on ways past \
         proxies that the host's rules have not judged. Below 0: more is on record.",
        &[label("what", &["questions", "byways"])]);
    AGENT_RESIDENT = metric("holdfast_agent_resident_bytes", Gauge, "bytes",
        "Resident memory of the daemon.", &[]);
    AGENT_FILES = metric("holdfast_agent_open_files", Gauge, "descriptors",
        "Descriptors that the daemon has open.", &[]);
    HOST_WARNINGS = metric("holdfast_host_warnings", Gauge, "checks",
        "Checks of the host that were not well at the daemon's start.", &[]);
}

/// Every combination of label values that is known beforehand. None when one label's are not.
pub(super) fn known_labels(labels: &[Label]) -> Vec<Vec<&'static str>> {
    let mut all = vec![Vec::new()];
    for label in labels {
        let Values::Of(values) = label.values else { return Vec::new() };
        all = all
            .iter()
            .flat_map(|before: &Vec<&'static str>| {
                values.iter().map(|value| before.iter().copied().chain([*value]).collect())
            })
            .collect();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_named_after_its_kind_and_unit() {
        for metric in LIST {
            assert!(metric.name.starts_with("holdfast_"), "{}", metric.name);
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Counter, "{}", metric.name);
            for unit in ["seconds", "bytes"] {
                let named = metric.name.contains(unit);
                assert_eq!(named, metric.unit == unit, "{}: {}", metric.name, metric.unit);
            }
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }
}
