//! Many clones of one snapshot, made at once. A handful as a sample; `HOLDFAST_CLONES` says how many
//! else (`scripts/soak clones`).

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use holdfast_model::{
    SandboxId, SnapshotId, State,
    sandbox::{CloneSpec, NewSandbox},
};

use super::{
    node::{Node, group, own_kib, spec},
    suspended::stdout,
};

/// A sample.
const CLONES: u32 = 6;
const MEMORY_MIB: u32 = 256;
const DIRTY_MIB: u32 = 96;

/// Of each clone, beyond what all of them share.
const OWN_KIB_MAX: u64 = 8 * 1024;

/// After the last has answered.
const SETTLE: Duration = Duration::from_millis(300);

/// What no two machines have alike, a line each: names, random numbers of the kernel, a UUID.
const IDENTITY: &str = "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | md5sum; \
                        cat /proc/sys/kernel/random/uuid";

#[tokio::test(flavor = "multi_thread")]
async fn many_clones_made_at_once_answer_share_their_memory_and_are_all_different() {
    let clones = env::var("HOLDFAST_CLONES").map_or(CLONES, |text| text.parse().unwrap());
    // What they share is promised to each of them.
    let node = Node::start_as(|config| {
        config.capacity.memory_factor = 4.0;
        config.capacity.cpu_factor = 100.0;
    })
    .await;
    let id = node.running(spec(MEMORY_MIB)).await;
    let fill = format!("head -c {DIRTY_MIB}m /dev/urandom > /dev/shm/x; md5sum < /dev/shm/x");
    let sum = stdout(&node, &id, &fill).await;
    let snapshot = node.registry.snapshot(&id, BTreeMap::new(), None).await.unwrap();

    let began = Instant::now();
    let made = join_all((0..clones).map(|_| cloned(&node, &snapshot.id, clones))).await;
    let created = began.elapsed();
    let identities = join_all(made.iter().map(|clone| stdout(&node, clone, IDENTITY))).await;
    println!("{clones} clones ran after {created:?}, had answered after {:?}", began.elapsed());
    tokio::time::sleep(SETTLE).await;
    let mut own = Vec::new();
    for clone in &made {
        own.push(own_kib(node.registry.details(clone).await.unwrap().vmm_pid));
    }
    own.sort_unstable();
    println!("own_kib_median: {}\nown_kib_max: {}", own[own.len() / 2], own[own.len() - 1]);
    assert!(own[own.len() - 1] <= OWN_KIB_MAX, "{own:?}");

    let seen: BTreeSet<_> = identities.iter().flat_map(|text| text.lines()).collect();
    assert_eq!(seen.len(), identities.len() * 4, "{identities:#?}");
    // Each has the memory it was made of.
    for clone in [&made[0], &made[made.len() - 1]] {
        assert_eq!(stdout(&node, clone, "md5sum < /dev/shm/x").await, sum);
    }
    for sandbox in made.iter().chain([&id]) {
        node.registry.delete(sandbox).await.unwrap();
        assert_eq!(node.traces(sandbox), Vec::<String>::new());
    }
    node.registry.delete_snapshot(snapshot).await.unwrap();
}

async fn cloned(node: &Node, snapshot: &SnapshotId, crowd: u32) -> SandboxId {
    let clone = NewSandbox::OfSnapshot(CloneSpec {
        snapshot: snapshot.clone(),
        labels: BTreeMap::new(),
        lifecycle_json: None,
        egress_json: None,
    });
    let record = node.registry.create(group(), clone, None).await.unwrap();
    let record = node.settled_among(&record.id, crowd, |state| state != State::Creating).await;
    assert_eq!(record.state, State::Running, "{:?}", record.failure);
    record.id
}
