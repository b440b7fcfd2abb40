//! Egress processes as the agent looks after them: the real program, slots of sandboxes in the
//! kernel, and in the place of guests this test, which writes frames to their taps. Needs root.

#[path = "../slot/frames.rs"]
#[allow(dead_code, reason = "shared with the tests of slots")]
mod frames;
#[path = "../slot/guest.rs"]
#[allow(dead_code, reason = "shared with the tests of slots")]
mod guest;
#[path = "../slot/sys.rs"]
#[allow(dead_code, reason = "shared with the tests of slots")]
mod sys;
mod world;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use holdfast_jail::Slot;
use holdfast_model::{GroupKey, SandboxId};
use holdfast_netpolicy::{Policy, SANDBOX_RULESET};
use holdfastd::{
    credentials::{KeyError, Vault},
    egress::{Credentials, EgressError, Values, Way},
    tls::Authority,
};

use crate::world::{Answer, World, deny, local, needs_secret, rules, sandbox};

/// Why a request is denied whose rule refers to a secret that is not there.
const MISSING: &str = "secret_missing";

/// What a process that ended may take to be back, as it was promised.
const BACK: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_served_by_its_policy_and_what_was_decided_is_told() {
    let world = World::new();
    let egress = world.agent();
    let (guest, way) = world::guest();
    let id = sandbox(1);
    egress.put(&local(), &id, way, deny(1)).await.unwrap();
    assert_eq!(guest.ask("evil.test"), Answer::Refused);
    let told = world.told(|decision| decision.host == "evil.test").await;
    assert_eq!((told.sandbox.as_str(), told.generation), (id.as_str(), 1));

    // Nobody is behind the name server: it is asked, and does not answer.
    let allow = rules(
        2,
        r#"{"defaultAction":"Deny","rules":[{"match":{"host":"fine.test"},"action":{"type":"Allow"}}]}"#,
    );
    egress.change(&local(), &id, allow).await.unwrap();
    assert_eq!(guest.ask("fine.test"), Answer::Failed);
    assert_eq!(guest.ask("evil.test"), Answer::Refused);
    let told = world.told(|decision| decision.host == "fine.test").await;
    assert_eq!(told.generation, 2);

    egress.remove(&local(), &id).await;
    assert_eq!(guest.ask("evil.test"), Answer::Nothing);
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f4_a_process_that_was_killed_is_back_with_every_policy_before_it_serves_anybody() {
    let world = World::new();
    let egress = world.agent();
    let mut guests = Vec::new();
    for number in 0..20 {
        let (guest, way) = world::guest();
        egress.put(&local(), &sandbox(number), way, deny(7)).await.unwrap();
        guests.push(guest);
    }
    let first = world.pid().unwrap();
    world.kill(first);
    let killed = Instant::now();
    // Its sockets stay with the agent: a question waits there.
    while guests[0].ask("evil.test") != Answer::Refused {
        assert!(killed.elapsed() < BACK, "it is not back");
    }
    assert_ne!(world.pid().unwrap(), first);
    for guest in &guests {
        world::eventually("one is not served", || guest.ask("evil.test") == Answer::Refused);
    }
    let told = world.told(|decision| decision.sandbox == sandbox(19).as_str()).await;
    assert_eq!(told.generation, 7);
    assert!(world.metrics().contains("holdfast_egress_restarts_total 1\n"));
    assert_eq!(egress.counts(), (1, 20));
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_agent_takes_the_process_over_and_what_nobody_asks_for_again_goes() {
    let world = World::new();
    let before = world.agent();
    let (kept, way) = world::guest();
    before.put(&local(), &sandbox(1), way, deny(3)).await.unwrap();
    let (lost, way) = world::guest();
    before.put(&local(), &sandbox(2), way, deny(3)).await.unwrap();
    let pid = world.pid().unwrap();
    before.stop().await;
    drop(before);
    assert_eq!(kept.ask("evil.test"), Answer::Refused, "it did not go on without its agent");

    let after = world.agent();
    after.put(&local(), &sandbox(1), Way::Tap(kept.tap()), deny(3)).await.unwrap();
    assert_eq!(lost.ask("evil.test"), Answer::Refused, "not everything was asked for yet");
    after.settle().await;
    assert_eq!(world.pid(), Some(pid));
    assert_eq!(kept.ask("evil.test"), Answer::Refused);
    world::eventually("it is still served", || lost.ask("evil.test") == Answer::Nothing);

    // The sockets are with the process alone: they are made again when it is killed.
    world.kill(pid);
    world::eventually("it is not back", || kept.ask("evil.test") == Answer::Refused);
    after.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_and_process_killed_together_are_both_made_up_for() {
    let world = World::new();
    let before = world.agent();
    let (guest, way) = world::guest();
    before.put(&local(), &sandbox(1), way, deny(3)).await.unwrap();
    let pid = world.pid().unwrap();
    before.stop().await;
    drop(before);
    world.kill(pid);
    assert_eq!(guest.ask("evil.test"), Answer::Nothing);

    let after = world.agent();
    after.put(&local(), &sandbox(1), Way::Tap(guest.tap()), deny(3)).await.unwrap();
    assert_eq!(guest.ask("evil.test"), Answer::Refused);
    after.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_refused_leaves_the_one_before_also_in_the_next_process() {
    let world = World::new();
    let egress = world.agent();
    let (guest, way) = world::guest();
    egress.put(&local(), &sandbox(1), way, deny(1)).await.unwrap();
    let refused = egress.change(&local(), &sandbox(1), rules(2, "{")).await.unwrap_err();
    assert!(matches!(refused, EgressError::Refused { .. }), "{refused}");
    assert_eq!(guest.ask("evil.test"), Answer::Refused);
    world.kill(world.pid().unwrap());
    world::eventually("it is not back", || guest.ask("evil.test") == Answer::Refused);
    let unknown = egress.change(&local(), &sandbox(2), deny(2)).await.unwrap_err();
    assert!(matches!(unknown, EgressError::NotHeld { .. }), "{unknown}");
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_not_there_is_named_and_its_sandboxes_are_served_once_it_is() {
    let world = World::new();
    world.hide_program();
    let egress = world.agent();
    let (guest, way) = world::guest();
    let refused = egress.put(&local(), &sandbox(1), way, deny(1)).await.unwrap_err();
    assert!(refused.to_string().contains("cannot start"), "{refused}");
    assert_eq!(guest.ask("evil.test"), Answer::Nothing);
    world.show_program();
    world::eventually("it is not served", || guest.ask("evil.test") == Answer::Refused);
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_have_processes_and_authorities_of_their_own() {
    let world = World::new();
    let egress = world.agent();
    let other = GroupKey::new("local", "default", "other").unwrap();
    let (one, way) = world::guest();
    egress.put(&local(), &sandbox(1), way, deny(1)).await.unwrap();
    let (two, way) = world::guest();
    egress.put(&other, &sandbox(2), way, deny(1)).await.unwrap();
    let pids = world.pids();
    assert_eq!(pids.len(), 2, "{pids:?}");
    let ca = egress.ca_pem(&local()).await.unwrap();
    assert!(ca.starts_with("-----BEGIN CERTIFICATE-----"), "{ca}");
    assert_ne!(ca, egress.ca_pem(&other).await.unwrap());
    egress.stop().await;
    // The same one ever after.
    let egress = world.agent();
    assert_eq!(ca, egress.ca_pem(&local()).await.unwrap());

    world.kill(pids[0]);
    let served = [&one, &two].map(|guest| guest.ask("evil.test") == Answer::Refused);
    assert_eq!(served.iter().filter(|served| **served).count(), 1, "{served:?}");
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_is_put_again_is_served_in_its_new_slot_alone() {
    let world = World::new();
    let egress = world.agent();
    let (before, way) = world::guest();
    egress.put(&local(), &sandbox(1), way, deny(5)).await.unwrap();
    let (after, way) = world::guest();
    egress.put(&local(), &sandbox(1), way, deny(5)).await.unwrap();
    assert_eq!(after.ask("evil.test"), Answer::Refused);
    assert_eq!(before.ask("evil.test"), Answer::Nothing);
    egress.stop().await;

    // Also when an earlier agent had put it.
    let egress = world.agent();
    let Slot { tap, sockets } = Slot::make(SANDBOX_RULESET).unwrap();
    let third = world::GuestOf::new(tap);
    egress.put(&local(), &sandbox(1), Way::Sockets(sockets), deny(5)).await.unwrap();
    assert_eq!(third.ask("evil.test"), Answer::Refused);
    assert_eq!(after.ask("evil.test"), Answer::Nothing);
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e9_a_secret_that_is_gone_is_withdrawn_before_that_is_answered_also_from_a_process_of_before()
 {
    let world = World::new();
    let egress = world.agent();
    let (guest, way) = world::guest();
    world.put_secret("one");
    egress.put(&local(), &sandbox(1), way, needs_secret()).await.unwrap();
    guest.get("had.svc.test");
    assert_ne!(world.reason("had.svc.test").await, MISSING);

    world.remove_secret();
    egress.revalue(&local()).await.unwrap();
    guest.get("gone.svc.test");
    assert_eq!(world.reason("gone.svc.test").await, MISSING);

    world.put_secret("two");
    egress.revalue(&local()).await.unwrap();
    guest.get("again.svc.test");
    assert_ne!(world.reason("again.svc.test").await, MISSING);

    // An agent that was killed between the two: the next one makes up for it.
    egress.stop().await;
    drop(egress);
    world.remove_secret();
    let egress = world.agent();
    egress.put(&local(), &sandbox(1), Way::Tap(guest.tap()), needs_secret()).await.unwrap();
    guest.get("found.svc.test");
    assert_eq!(world.reason("found.svc.test").await, MISSING);
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e9_a_process_that_was_killed_or_does_not_answer_keeps_no_withdrawn_secret() {
    let world = World::new();
    let egress = world.agent();
    let (guest, way) = world::guest();
    world.put_secret("one");
    egress.put(&local(), &sandbox(1), way, needs_secret()).await.unwrap();
    world.kill(world.pid().unwrap());
    world.remove_secret();
    egress.revalue(&local()).await.unwrap();
    world::eventually("it is not back", || world.pid().is_some());
    guest.get("killed.svc.test");
    assert_eq!(world.reason("killed.svc.test").await, MISSING);

    world.put_secret("two");
    egress.revalue(&local()).await.unwrap();
    let silent = world.pid().unwrap();
    world.halt(silent);
    world.remove_secret();
    egress.revalue(&local()).await.unwrap();
    assert!(!world.pids().contains(&silent), "it has the secret still");
    guest.get("halted.svc.test");
    assert_eq!(world.reason("halted.svc.test").await, MISSING);
    egress.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_whose_time_is_nearly_over_are_brought_anew_by_themselves() {
    /// Has everything be renewed soon, as tokens are every ten minutes.
    struct Soon(Arc<Vault>);

    impl Credentials for Soon {
        fn authority(&self, group: &GroupKey) -> Result<Authority, KeyError> {
            self.0.authority(group)
        }

        fn values(&self, group: &GroupKey, sandbox: &SandboxId, policy: &Policy) -> Values {
            let renew_at_ms = Some(holdfastd::sandbox::now_ms() + 100);
            Values { renew_at_ms, ..self.0.values(group, sandbox, policy) }
        }
    }

    let world = World::new();
    let egress = world.agent_with(Arc::new(Soon(Arc::clone(&world.vault))));
    let (guest, way) = world::guest();
    egress.put(&local(), &sandbox(1), way, needs_secret()).await.unwrap();
    guest.get("before.svc.test");
    assert_eq!(world.reason("before.svc.test").await, MISSING);
    world.put_secret("one");
    let began = Instant::now();
    for number in 0.. {
        let host = format!("after-{number}.svc.test");
        guest.get(&host);
        if world.reason(&host).await != MISSING {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "nobody brought it");
    }
    egress.stop().await;
}
