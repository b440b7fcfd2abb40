//! A node's folders, its egress program, and what its processes tell.

use std::{
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_jail::Slot;
use holdfast_model::{GroupKey, SandboxId, Secret};
use holdfast_netpolicy::{Passing, Policy, SANDBOX_RULESET};
use holdfast_store::Store;
use holdfast_wire::egress::{Decision, Kind};
use holdfastd::{
    config::Config,
    credentials::Vault,
    egress::{Credentials, Egress, Rules, Way},
    metrics::Metrics,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{
    frames::{ACK, OUTSIDE, Packet, UDP},
    guest::Guest,
};

/// Longest wait for anything that must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A name server of anybody's: ours answers in its place.
const NAME_SERVER: [u8; 4] = [8, 8, 8, 8];

pub(super) struct World {
    folder: TempDir,
    /// Secrets, keys of groups, tokens.
    pub(super) vault: Arc<Vault>,
    metrics: Arc<Metrics>,
    told: Arc<Mutex<Vec<Decision>>>,
}

/// A secret of the group.
pub(super) const SECRET: &str = "s";

/// A guest whose sockets are with the agent.
pub(super) struct GuestOf(Guest);

/// What became of a question to a name server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Nothing,
    /// It may not be asked.
    Refused,
    /// It may, and nobody knew.
    Failed,
    Other(u8),
}

impl World {
    pub(super) fn new() -> Self {
        let folder = TempDir::new().unwrap();
        // The program runs as another user.
        fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let state = folder.path().join("state");
        fs::create_dir(&state).unwrap();
        let store = Arc::new(Store::open(&state.join("store.redb")).unwrap());
        let vault = Vault::open(&config(folder.path()), store).unwrap();
        let metrics = Arc::new(Metrics::new().unwrap());
        let world = Self { folder, vault, metrics, told: Arc::default() };
        world.show_program();
        world
    }

    /// An agent's part of egress.
    pub(super) fn agent(&self) -> Arc<Egress> {
        self.agent_with(Arc::clone(&self.vault) as Arc<dyn Credentials>)
    }

    pub(super) fn agent_with(&self, credentials: Arc<dyn Credentials>) -> Arc<Egress> {
        let config = config(self.folder.path());
        let told = Arc::clone(&self.told);
        let sink = move |_: &GroupKey, batch: holdfast_wire::egress::Decisions| {
            told.lock().unwrap().extend(batch.entries);
        };
        Egress::open(&config, Arc::clone(&self.metrics), credentials, Arc::new(sink)).unwrap()
    }

    /// Has the group have this secret, with this value.
    pub(super) fn put_secret(&self, value: &str) {
        let values = [("key".to_owned(), Secret::new(value))].into();
        self.vault.put_secret(local(), SECRET.to_owned(), values, 10).unwrap().unwrap();
    }

    pub(super) fn remove_secret(&self) {
        assert!(self.vault.remove_secret(&local(), SECRET).unwrap());
    }

    /// Why a request to this host was decided as it was.
    pub(super) async fn reason(&self, host: &str) -> String {
        let told = self.told(|it| it.host == host && it.kind == Kind::Http).await;
        assert_eq!(told.generation, 1);
        told.reason
    }

    /// A copy of the world's own, so that its processes are known from others'.
    fn program(&self) -> PathBuf {
        self.folder.path().join("holdfast-egress")
    }

    pub(super) fn hide_program(&self) {
        fs::remove_file(self.program()).unwrap();
    }

    pub(super) fn show_program(&self) {
        fs::copy(built(), self.program()).unwrap();
    }

    pub(super) fn pids(&self) -> Vec<u32> {
        let program = self.program();
        let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            entry.unwrap().file_name().to_str().and_then(|name| name.parse().ok())
        });
        let is_one =
            |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
        numbers.filter(is_one).collect()
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match self.pids()[..] {
            [] => None,
            [pid] => Some(pid),
            ref several => panic!("{several:?} run"),
        }
    }

    /// Kills, and waits until it is gone.
    pub(super) fn kill(&self, pid: u32) {
        let process = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(process, Signal::KILL).unwrap();
        eventually("it does not end", || !self.pids().contains(&pid));
    }

    /// Has it stand still.
    pub(super) fn halt(&self, pid: u32) {
        let process = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(process, Signal::STOP).unwrap();
    }

    /// The first decision of this kind that is told.
    pub(super) async fn told(&self, wanted: impl Fn(&Decision) -> bool) -> Decision {
        let end = Instant::now() + PATIENCE;
        loop {
            let found = self.told.lock().unwrap().iter().find(|it| wanted(it)).cloned();
            if let Some(found) = found {
                return found;
            }
            assert!(Instant::now() < end, "told: {:?}", self.told.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) fn metrics(&self) -> String {
        self.metrics.text().unwrap()
    }
}

/// Of a node that has this folder.
fn config(folder: &Path) -> Config {
    let mut config = Config::default();
    config.paths.state = folder.join("state");
    config.paths.run = folder.join("run");
    config.paths.cgroups = folder.join("no-cgroups");
    config.paths.egress = folder.join("holdfast-egress");
    config.egress.resolvers = vec!["127.0.0.1:1".to_owned()];
    config
}

impl Drop for World {
    fn drop(&mut self) {
        // Processes outlive their agents.
        for pid in self.pids() {
            let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let _ = process.map(|process| kill_process(process, Signal::KILL));
        }
    }
}

/// The program, built if that was not done yet.
fn built() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let folder = here.parent().and_then(std::path::Path::parent).unwrap();
    static BUILT: std::sync::Once = std::sync::Once::new();
    BUILT.call_once(|| {
        let status = std::process::Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "holdfast-egress"])
            .status()
            .unwrap();
        assert!(status.success());
    });
    folder.join("holdfast-egress")
}

impl GuestOf {
    pub(super) fn new(tap: OwnedFd) -> Self {
        // Sockets of another slot: its own are not this test's.
        let sockets = Slot::make(SANDBOX_RULESET).unwrap().sockets;
        Self(Guest { tap, sockets })
    }

    /// Another handle, as the agent has it from the VMM.
    pub(super) fn tap(&self) -> OwnedFd {
        self.0.tap.try_clone().unwrap()
    }

    /// Asks for a name's address (RFC 1035).
    pub(super) fn ask(&self, name: &str) -> Answer {
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mut question = id.to_vec();
        question.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.') {
            question.push(u8::try_from(label.len()).unwrap());
            question.extend(label.bytes());
        }
        question.extend([0, 0, 1, 0, 1]);
        self.0.send(&Packet::udp(NAME_SERVER.into(), 53, &question).frame());
        let ours = |it: &crate::frames::Received| {
            it.is(UDP) && it.ports().0 == 53 && it.inner()[8..10] == id
        };
        let Some(answer) = self.0.receive(ours) else { return Answer::Nothing };
        match answer.inner()[11] & 0xf {
            2 => Answer::Failed,
            5 => Answer::Refused,
            code => Answer::Other(code),
        }
    }

    /// Asks this host for a page without TLS, over a connection of its own. What became of it is
    /// told by the process.
    pub(super) fn get(&self, host: &str) {
        static NEXT: AtomicU16 = AtomicU16::new(20_000);
        let (to, port) = ((OUTSIDE, 80), NEXT.fetch_add(1, Ordering::Relaxed));
        let answer = self.0.connect(to, port).expect("nobody took the connection");
        let (_, number) = answer.segment();
        let mut segment = Packet::tcp(to.0, (port, to.1), ACK, (101, number.wrapping_add(1)));
        segment.payload.extend(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").bytes());
        self.0.send(&segment.frame());
    }
}

/// A guest in a slot of its own, and the sockets of that.
pub(super) fn guest() -> (GuestOf, Way) {
    let Slot { tap, sockets } = Slot::make(SANDBOX_RULESET).unwrap();
    (GuestOf::new(tap), Way::Sockets(sockets))
}

pub(super) fn local() -> GroupKey {
    GroupKey::local_default()
}

pub(super) fn sandbox(number: u8) -> SandboxId {
    SandboxId::from_random([number; 20])
}

pub(super) fn rules(generation: u64, policy: &str) -> Rules {
    Rules { generation, policy: policy.as_bytes().to_vec(), passing: Passing::Udp }
}

/// Requests to hosts below svc.test need the secret. Nobody is behind the name server, so none is
/// answered: whether one has the secret shows in why it fails.
pub(super) fn needs_secret() -> Rules {
    let policy = format!(
        r#"{{"defaultAction":"Deny","rules":[{{"match":{{"host":"*.svc.test"}},"action":{{
        "type":"Transform","allowPlainHttp":true,"headers":[{{"operation":"Set","name":"X-Key",
        "valueRef":{{"secretRef":{{"secretId":"{SECRET}"}}}}}}]}}}}]}}"#
    );
    rules(1, &policy)
}

/// Nothing leaves.
pub(super) fn deny(generation: u64) -> Rules {
    rules(generation, &Policy::default().to_json())
}

pub(super) fn eventually(otherwise: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{otherwise}");
        thread::sleep(Duration::from_millis(10));
    }
}
