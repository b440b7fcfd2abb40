//! Ways past proxies as the agent opens and closes them, with the real egress process.

use std::{
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_jail::{Slot, SlotSockets};
use holdfast_model::{GroupKey, SandboxId};
use holdfast_netpolicy::{Passing, Policy, SANDBOX_RULESET};
use holdfast_store::Store;
use holdfast_wire::egress::{Decision, Verdict};
use holdfastd::{
    config::Config,
    credentials::Vault,
    egress::{Credentials, Egress, EgressError, Rules, Way},
    metrics::Metrics,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::{
    guest::Guest,
    world::{self, ALLOWED, EVIL, World, udp_to},
};

/// What was taken away may take to be back, as it was promised.
const BACK: Duration = Duration::from_secs(2);

/// An agent's part of egress on the world's host.
struct Node {
    runtime: Runtime,
    folder: TempDir,
    vault: Arc<Vault>,
    told: Arc<Mutex<Vec<Decision>>>,
}

impl Node {
    fn new(world: &World) -> Self {
        let folder = TempDir::new().unwrap();
        fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = world::built("holdfast-egress");
        fs::copy(program, folder.path().join("holdfast-egress")).unwrap();
        let mut config = Config::default();
        config.paths.state = folder.path().join("state");
        fs::create_dir(&config.paths.state).unwrap();
        let store = Arc::new(Store::open(&config.paths.state.join("store.redb")).unwrap());
        let vault = Vault::open(&config, store).unwrap();
        Self { runtime: world.runtime(), folder, vault, told: Arc::default() }
    }

    fn agent(&self) -> Arc<Egress> {
        let path = |name: &str| self.folder.path().join(name);
        let mut config = Config::default();
        config.paths.state = path("state");
        config.paths.run = path("run");
        config.paths.cgroups = path("no-cgroups");
        config.paths.egress = path("holdfast-egress");
        config.egress.resolvers = vec!["127.0.0.1:1".to_owned()];
        let told = Arc::clone(&self.told);
        let sink = move |_: &GroupKey, batch: holdfast_wire::egress::Decisions| {
            told.lock().unwrap().extend(batch.entries);
        };
        let metrics = Arc::new(Metrics::new().unwrap());
        let vault = Arc::clone(&self.vault) as Arc<dyn Credentials>;
        let open = move || Egress::open(&config, metrics, vault, Arc::new(sink)).unwrap();
        self.runtime.block_on(self.runtime.spawn_blocking(open)).unwrap()
    }

    fn put(&self, egress: &Arc<Egress>, id: &SandboxId, way: Way, rules: Rules) {
        self.run(egress, |egress, group| {
            let id = id.clone();
            async move { egress.put(&group, &id, way, rules).await }
        })
        .unwrap();
    }

    fn change(
        &self,
        egress: &Arc<Egress>,
        id: &SandboxId,
        rules: Rules,
    ) -> Result<(), EgressError> {
        self.run(egress, |egress, group| {
            let id = id.clone();
            async move { egress.change(&group, &id, rules).await }
        })
    }

    fn stop(&self, egress: Arc<Egress>) {
        self.run(&egress, |egress, _| async move { egress.stop().await });
    }

    /// On a thread of the host's.
    fn run<F: Future<Output: Send + 'static> + Send + 'static>(
        &self,
        egress: &Arc<Egress>,
        work: impl FnOnce(Arc<Egress>, GroupKey) -> F,
    ) -> F::Output {
        let work = work(Arc::clone(egress), GroupKey::local_default());
        self.runtime.block_on(self.runtime.spawn(work)).unwrap()
    }

    fn told(&self, wanted: impl Fn(&Decision) -> bool) -> Decision {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let told = self.told.lock().unwrap();
            if let Some(found) = told.iter().find(|it| wanted(it)) {
                return found.clone();
            }
            assert!(Instant::now() < end, "told: {told:?}");
            drop(told);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Egress processes outlive their agents.
        world::kill_all_of(&self.folder.path().join("holdfast-egress"));
    }
}

fn rules(generation: u64, passing: Passing, policy: &str) -> Rules {
    Rules { generation, policy: policy.as_bytes().to_vec(), passing }
}

fn deny(generation: u64) -> Rules {
    rules(generation, Passing::Udp, &Policy::default().to_json())
}

/// A guest, whose sockets are with the agent.
fn guest() -> (Guest, SlotSockets) {
    let Slot { tap, sockets } = Slot::make(SANDBOX_RULESET).unwrap();
    // Those of another slot: its own are not this test's.
    let elsewhere = Slot::make(SANDBOX_RULESET).unwrap().sockets;
    (Guest { tap, sockets: elsewhere }, sockets)
}

fn sends(world: &World, guest: &Guest, to: std::net::Ipv4Addr) -> bool {
    world.outside.forget();
    guest.send(&crate::frames::Packet::udp(to, 99, b"x").frame());
    world.outside.saw(to)
}

#[test]
fn a_policy_opens_the_way_and_closes_it_and_what_it_let_pass_is_on_record() {
    let world = World::new();
    let node = Node::new(&world);
    let egress = node.agent();
    let (guest, sockets) = guest();
    let id = SandboxId::from_random([1; 20]);
    node.put(&egress, &id, Way::Sockets(sockets), deny(1));
    assert!(!sends(&world, &guest, ALLOWED));
    assert_eq!(egress.byways(), 0);
    assert!(!guest.inside("ip -o link").contains("up0"), "there is a way that nobody needs");

    node.change(&egress, &id, rules(2, Passing::Udp, &udp_to(ALLOWED, &[99]))).unwrap();
    assert!(sends(&world, &guest, ALLOWED));
    assert!(!sends(&world, &guest, EVIL));
    assert_eq!(egress.byways(), 1);
    let allowed = node.told(|it| it.verdict == Verdict::Allowed);
    assert_eq!((allowed.sandbox.as_str(), allowed.generation), (id.as_str(), 2));
    assert_eq!((allowed.address, allowed.port), (Some(ALLOWED.into()), 99));
    assert_eq!((allowed.rule.as_deref(), allowed.scheme.as_str()), (Some("cidrRules[0]"), "udp"));
    let denied = node.told(|it| it.verdict == Verdict::Denied);
    assert_eq!(
        (denied.address, denied.reason.as_str()),
        (Some(EVIL.into()), "udp_needs_cidr_rule")
    );

    // Another one, and then none.
    node.change(&egress, &id, rules(3, Passing::Udp, &udp_to(EVIL, &[]))).unwrap();
    assert!(!sends(&world, &guest, ALLOWED) && sends(&world, &guest, EVIL));
    node.change(&egress, &id, deny(4)).unwrap();
    assert!(!sends(&world, &guest, EVIL));
    assert!(!guest.inside("ip -o link").contains("up0"));
    node.change(&egress, &id, rules(5, Passing::Udp, &udp_to(EVIL, &[]))).unwrap();
    assert!(sends(&world, &guest, EVIL), "it does not open again");
    let gone = id.clone();
    node.run(&egress, |egress, group| async move { egress.remove(&group, &gone).await });
    assert!(!sends(&world, &guest, EVIL));
    assert!(world.nft().byways().unwrap().is_empty());
    node.stop(egress);
}

#[test]
fn a_policy_that_is_refused_changes_nothing_in_the_kernel_either() {
    let world = World::new();
    let node = Node::new(&world);
    let egress = node.agent();
    let (guest, sockets) = guest();
    let id = SandboxId::from_random([2; 20]);
    let first = rules(1, Passing::Udp, &udp_to(ALLOWED, &[]));
    node.put(&egress, &id, Way::Sockets(sockets), first);
    assert!(sends(&world, &guest, ALLOWED));
    let wrong = r#"{"defaultAction":"Deny","cidrRules":[{"cidr":"9.9.9.66/32","protocol":"udp","action":"Allow"}],
        "rules":[{"match":{"host":"*"},"action":{"type":"Nothing"}}]}"#;
    let refused = node.change(&egress, &id, rules(2, Passing::Udp, wrong)).unwrap_err();
    assert!(matches!(refused, EgressError::Refused { .. }), "{refused}");
    assert!(sends(&world, &guest, ALLOWED) && !sends(&world, &guest, EVIL));
    node.stop(egress);
}

#[test]
fn f4_an_agent_that_starts_anew_takes_a_way_over_that_was_never_wider_meanwhile() {
    let world = World::new();
    let node = Node::new(&world);
    let egress = node.agent();
    let (guest, sockets) = guest();
    let id = SandboxId::from_random([3; 20]);
    node.put(&egress, &id, Way::Sockets(sockets), rules(1, Passing::Udp, &udp_to(ALLOWED, &[])));
    assert!(sends(&world, &guest, ALLOWED));
    // Nothing is given back, as when it is killed.
    node.stop(egress);
    assert!(sends(&world, &guest, ALLOWED) && !sends(&world, &guest, EVIL));

    let egress = node.agent();
    let tap = Way::Tap(guest.tap.try_clone().unwrap());
    node.put(&egress, &id, tap, rules(2, Passing::Udp, &udp_to(EVIL, &[])));
    node.run(&egress, |egress, _| async move { egress.settle().await });
    assert!(!sends(&world, &guest, ALLOWED) && sends(&world, &guest, EVIL));
    assert_eq!(world.nft().byways().unwrap().len(), 1, "it has another one");
    // And one that finds a sandbox without a need for it closes it.
    node.stop(egress);
    let egress = node.agent();
    node.put(&egress, &id, Way::Tap(guest.tap.try_clone().unwrap()), deny(3));
    assert!(!sends(&world, &guest, EVIL));
    assert!(world.nft().byways().unwrap().is_empty());
    node.stop(egress);
}

#[test]
fn f5_rules_that_somebody_flushed_are_back_in_two_seconds_with_every_policy() {
    let world = World::new();
    let node = Node::new(&world);
    let egress = node.agent();
    let (guest, sockets) = guest();
    let id = SandboxId::from_random([4; 20]);
    node.put(&egress, &id, Way::Sockets(sockets), rules(1, Passing::Udp, &udp_to(ALLOWED, &[])));
    assert!(sends(&world, &guest, ALLOWED));
    world.in_host("nft flush ruleset");
    let flushed = Instant::now();
    assert!(!sends(&world, &guest, EVIL));
    while !sends(&world, &guest, ALLOWED) {
        assert!(flushed.elapsed() < BACK, "they are not back");
    }
    assert!(!sends(&world, &guest, EVIL));
    let servers = world.in_host("nft list set inet host servers4");
    assert!(servers.contains("127.0.0.1 . 1"), "{servers}");
    node.stop(egress);
}

#[test]
fn what_slots_let_past_is_reconciled_with_what_is_on_record_of_it() {
    let world = World::new();
    let node = Node::new(&world);
    let egress = node.agent();
    let (guest, sockets) = guest();
    let id = SandboxId::from_random([5; 20]);
    node.put(&egress, &id, Way::Sockets(sockets), rules(1, Passing::Udp, &udp_to(ALLOWED, &[])));
    let unrecorded = |egress: &Arc<Egress>| {
        node.run(egress, |egress, _| async move {
            tokio::task::spawn_blocking(move || {
                egress.reconcile();
                egress.unrecorded()
            })
            .await
            .unwrap()
        })
    };
    assert!(sends(&world, &guest, ALLOWED) && !sends(&world, &guest, EVIL));
    // A question that is judged, as RFC 1035 has it, and one that nobody can read.
    let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x04evil\x04test\0\0\x01\0\x01";
    guest.send(&crate::frames::Packet::udp(ALLOWED, 53, question).frame());
    node.told(|it| it.host == "evil.test");
    let now = unrecorded(&egress);
    assert_eq!((now.questions, now.by), (0, 0));
    guest.send(&crate::frames::Packet::udp(ALLOWED, 53, b"?").frame());
    let now = unrecorded(&egress);
    assert_eq!((now.questions, now.by), (1, 0));

    // What the host's rules do not see is missed.
    world.in_host("ip link set byway1 down");
    assert!(!sends(&world, &guest, ALLOWED));
    let now = unrecorded(&egress);
    assert_eq!((now.questions, now.by), (1, 1));
    node.stop(egress);
}
