//! Every metric of the node and its unit, in one list, and the doors by which the parts count.
//!
//! No label names a sandbox, group, image or client: those come and go, and every one would be a
//! series for ever. What each sandbox uses is in `holdfast node status`.

use std::{collections::BTreeMap, time::Duration};

use holdfast_wire::vmm::Stats;
use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::{
    egress::Unrecorded,
    sandbox::{BootPhases, ResumePhases, ResumeReport},
};

/// The form of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

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

const STATES: &[&str] =
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
const WARMTHS: &[&str] = &["hot", "cold", "booted"];
const OUTCOMES: &[&str] = &["done", "failed"];
const METHODS: &[&str] = &["GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "PATCH", "other"];

/// Routes of the API, and `none` for what has no route or no token.
const ROUTES_MAX: usize = 80;
/// Statuses that the daemon answers with.
const STATUSES_MAX: usize = 24;

macro_rules! metrics {
    ($($constant:ident = $metric:expr;)*) => {
        $(const $constant: Metric = $metric;)*
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

/// Seconds; from a hot restore to a conversion of gigabytes.
const BUCKETS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 600.0];

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

/// What is measured when somebody asks, not when it happens.
#[derive(Debug, Clone, Default)]
pub struct Now {
    /// By the name of the state, in lower case.
    pub sandboxes: BTreeMap<&'static str, u64>,
    pub vmm_resident_bytes: u64,
    pub vmm_resident_largest_bytes: u64,
    pub memory_capacity_bytes: u64,
    pub memory_reserved_bytes: u64,
    pub cpus_capacity: f64,
    pub cpus_reserved: f64,
    pub disk_total_bytes: u64,
    pub disk_available_bytes: u64,
    pub slots_ready: u64,
    pub egress_processes: u64,
    pub egress_sandboxes: u64,
    pub byways: u64,
    /// From sandboxes, and to them.
    pub byway_bytes: (u64, u64),
    pub unrecorded: Unrecorded,
    pub agent_resident_bytes: u64,
    pub agent_open_files: u64,
    /// Since the daemon started, by what was short.
    pub refusals: [(&'static str, u64); 4],
    /// Since the daemon started.
    pub store_errors: u64,
}

/// The metrics of one daemon.
pub struct Metrics {
    registry: Registry,
    counters: BTreeMap<&'static str, IntCounterVec>,
    gauges: BTreeMap<&'static str, GaugeVec>,
    histograms: BTreeMap<&'static str, HistogramVec>,
}

impl Metrics {
    /// Every metric of [`LIST`], the ones with known labels at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let mut metrics = Self {
            registry: Registry::new(),
            counters: BTreeMap::new(),
            gauges: BTreeMap::new(),
            histograms: BTreeMap::new(),
        };
        for metric in LIST {
            metrics.register(metric)?;
        }
        metrics.set(&BUILD, &[env!("CARGO_PKG_VERSION")], 1.0);
        Ok(metrics)
    }

    fn register(&mut self, metric: &Metric) -> Result<(), prometheus::Error> {
        let names: Vec<&str> = metric.labels.iter().map(|label| label.name).collect();
        let known = known_labels(metric.labels);
        match metric.kind {
            Kind::Counter => {
                let vec = IntCounterVec::new(Opts::new(metric.name, metric.help), &names)?;
                known.iter().for_each(|values| drop(vec.with_label_values(values)));
                self.registry.register(Box::new(vec.clone()))?;
                self.counters.insert(metric.name, vec);
            }
            Kind::Gauge => {
                let vec = GaugeVec::new(Opts::new(metric.name, metric.help), &names)?;
                known.iter().for_each(|values| drop(vec.with_label_values(values)));
                self.registry.register(Box::new(vec.clone()))?;
                self.gauges.insert(metric.name, vec);
            }
            Kind::Histogram => {
                let options =
                    HistogramOpts::new(metric.name, metric.help).buckets(BUCKETS.to_vec());
                let vec = HistogramVec::new(options, &names)?;
                known.iter().for_each(|values| drop(vec.with_label_values(values)));
                self.registry.register(Box::new(vec.clone()))?;
                self.histograms.insert(metric.name, vec);
            }
        }
        Ok(())
    }

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

    /// Sets what is measured on demand.
    pub fn measured(&self, now: &Now) {
        for state in STATES {
            let count = now.sandboxes.get(state).copied().unwrap_or(0);
            self.set(&SANDBOXES, &[state], as_f64(count));
        }
        for (short, count) in now.refusals {
            if !short.is_empty() {
                self.raise(&REFUSALS, &[short], count);
            }
        }
        self.raise(&STORE_ERRORS, &[], now.store_errors);
        let bytes = [
            (&VMM_RESIDENT, "all", now.vmm_resident_bytes),
            (&VMM_RESIDENT, "largest", now.vmm_resident_largest_bytes),
            (&MEMORY, "capacity", now.memory_capacity_bytes),
            (&MEMORY, "reserved", now.memory_reserved_bytes),
            (&STATE_DISK, "total", now.disk_total_bytes),
            (&STATE_DISK, "available", now.disk_available_bytes),
        ];
        for (metric, label, value) in bytes {
            self.set(metric, &[label], as_f64(value));
        }
        self.set(&CPUS, &["capacity"], now.cpus_capacity);
        self.set(&CPUS, &["reserved"], now.cpus_reserved);
        self.set(&SLOTS_READY, &[], as_f64(now.slots_ready));
        self.set(&EGRESS_PROCESSES, &[], as_f64(now.egress_processes));
        self.set(&EGRESS_SANDBOXES, &[], as_f64(now.egress_sandboxes));
        self.set(&BYWAYS, &[], as_f64(now.byways));
        self.set(&BYWAY_BYTES, &["out"], as_f64(now.byway_bytes.0));
        self.set(&BYWAY_BYTES, &["in"], as_f64(now.byway_bytes.1));
        let signed = |count: i64| as_f64(count.unsigned_abs()) * if count < 0 { -1.0 } else { 1.0 };
        self.set(&UNRECORDED, &["questions"], signed(now.unrecorded.questions));
        self.set(&UNRECORDED, &["byways"], signed(now.unrecorded.by));
        self.set(&AGENT_RESIDENT, &[], as_f64(now.agent_resident_bytes));
        self.set(&AGENT_FILES, &[], as_f64(now.agent_open_files));
    }

    /// Everything, in Prometheus's text form 0.0.4.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }

    fn add(&self, metric: &Metric, labels: &[&str], count: u64) {
        if let Some(vec) = self.counters.get(metric.name) {
            vec.with_label_values(labels).inc_by(count);
        }
    }

    /// Brings a counter up to what another part has counted. One caller at a time.
    fn raise(&self, metric: &Metric, labels: &[&str], total: u64) {
        if let Some(vec) = self.counters.get(metric.name) {
            let counter = vec.with_label_values(labels);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    fn set(&self, metric: &Metric, labels: &[&str], value: f64) {
        if let Some(vec) = self.gauges.get(metric.name) {
            vec.with_label_values(labels).set(value);
        }
    }

    fn observe(&self, metric: &Metric, labels: &[&str], took: Duration) {
        if let Some(vec) = self.histograms.get(metric.name) {
            vec.with_label_values(labels).observe(took.as_secs_f64());
        }
    }
}

fn outcome(done: bool) -> &'static str {
    if done { "done" } else { "failed" }
}

/// Exact up to 2^53, which no count here reaches.
#[expect(clippy::cast_precision_loss, reason = "counts and bytes far below 2^53")]
fn as_f64(number: u64) -> f64 {
    number as f64
}

/// Every combination of label values that is known beforehand. None when one label's are not.
fn known_labels(labels: &[Label]) -> Vec<Vec<&'static str>> {
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
    use holdfast_wire::vmm::{BalloonStats, DiskStats, Exits, NetworkStats};

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
