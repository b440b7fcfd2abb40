//! Sandboxes that are suspended and resumed again and again while they check themselves. A few rounds
//! as a sample; `HOLDFAST_ROUNDS` says how many else (`scripts/soak resume`).

use std::{
    env,
    time::{Duration, Instant, UNIX_EPOCH},
};

use holdfast_model::{SandboxId, State};
use holdfast_wire::guest::{ExecKey, Keep};

use super::{
    node::{Node, spec},
    shell,
    suspended::{line, stdout},
};

/// A sample.
const ROUNDS: u32 = 4;

/// Sandboxes that take turns, but no more than there are rounds for two each.
const SANDBOXES: u32 = 10;

/// What a guest's clock may be off by after a resume.
const DRIFT_MAX: Duration = Duration::from_millis(50);

/// How often a clock is looked at: the quickest answer says most.
const LOOKS: u32 = 3;

/// Each tick of a sleeping timer adds a line to a log on the disk and to a file that is open and has
/// no name, changes a part of what it keeps in memory, and checks all three of them.
const WORKLOAD: &str = r#"
exec 3<>/tmp/open; rm /tmp/open
dd if=/dev/urandom of=/dev/shm/kept bs=4k count=32 2>/dev/null
dd if=/dev/urandom of=/dev/shm/still bs=64k count=64 2>/dev/null
md5sum < /dev/shm/still > /tmp/still.sum
i=0
echo begun
while :; do
  sum=$(md5sum < /dev/shm/kept)
  usleep 200000
  [ "$(md5sum < /dev/shm/kept)" = "$sum" ] || echo "memory at $i" >> /tmp/wrong
  i=$((i + 1))
  dd if=/dev/urandom of=/dev/shm/kept bs=4k count=1 seek=$((i % 32)) conv=notrunc 2>/dev/null
  echo $i >> /tmp/log
  echo $i >&3
  [ "$(wc -l < /proc/$$/fd/3)" = $i ] || echo "open file at $i" >> /tmp/wrong
done
"#;

/// Prints how far the workload is, how many lines its log has, and whatever is wrong.
const LOOK: &str = "cat /tmp/log > /tmp/look; tail -n 1 /tmp/look; wc -l < /tmp/look; \
                    md5sum < /dev/shm/still > /tmp/now.sum; \
                    [ \"$(cat /tmp/now.sum)\" = \"$(cat /tmp/still.sum)\" ] || echo still memory; \
                    if [ -e /tmp/wrong ]; then cat /tmp/wrong; fi";

/// What time it is. This busybox's `date` knows no fraction of a second, but a file's time has one.
const CLOCK: &str = "echo > /dev/shm/clock; stat -c '%Y %y' /dev/shm/clock";

async fn begin(node: &Node) -> SandboxId {
    let id = node.running(spec(128)).await;
    let keep = Some(Keep { key: ExecKey([1; 16]), alone_ms_max: u32::MAX });
    let workload = holdfast_wire::guest::Exec { keep, ..shell(WORKLOAD) };
    let mut session = node.registry.exec(&id, workload).await.unwrap();
    assert_eq!(line(&mut session).await, "begun\n");
    id
}

/// How far the workload is. It is whole.
async fn ticks(node: &Node, id: &SandboxId) -> u64 {
    let look = stdout(node, id, LOOK).await;
    let lines: Vec<_> = look.lines().collect();
    let [last, count] = lines[..] else { panic!("{id}: {look}") };
    assert_eq!(last, count, "{id} lost a line of its log");
    last.parse().unwrap()
}

/// How far the guest's clock is from the host's, as far as the time an answer takes lets one say.
async fn drift(node: &Node, id: &SandboxId) -> Duration {
    let now = || UNIX_EPOCH.elapsed().unwrap();
    let mut looks = Vec::new();
    for _ in 0..LOOKS {
        let before = now();
        let clock = stdout(node, id, CLOCK).await;
        let after = now();
        // Seconds since 1970, then the time as people read it, whose fraction is to the nanosecond.
        let (seconds, time) = clock.split_once(' ').unwrap();
        let fraction = time.split_once('.').and_then(|(_, rest)| rest.get(..9)).unwrap();
        let clock = Duration::new(seconds.parse().unwrap(), fraction.parse().unwrap());
        let off = before.saturating_sub(clock).max(clock.saturating_sub(after));
        looks.push((after - before, off));
    }
    looks.into_iter().min().unwrap().1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_checks_itself_is_suspended_and_resumed_again_and_again() {
    let rounds = env::var("HOLDFAST_ROUNDS").map_or(ROUNDS, |count| count.parse().unwrap());
    let node = Node::start().await;
    let mut sandboxes = Vec::new();
    for _ in 0..SANDBOXES.min(rounds.div_ceil(2)) {
        let id = begin(&node).await;
        node.registry.suspend(&id, None).await.unwrap();
        sandboxes.push((id, 0));
    }
    let (began, mut drift_max) = (Instant::now(), Duration::ZERO);
    let turns = sandboxes.len();
    for round in 0..rounds {
        let (id, before) = &mut sandboxes[round as usize % turns];
        node.registry.resume(id).await.unwrap();
        let off = drift(&node, id).await;
        assert!(off <= DRIFT_MAX, "round {round}: {id} is off by {off:?}");
        drift_max = drift_max.max(off);
        // Its timer goes on; the first tick may be due only now.
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut now = ticks(&node, id).await;
        while now <= *before {
            assert!(Instant::now() < deadline, "round {round}: {id} stands still at {now}");
            now = ticks(&node, id).await;
        }
        *before = now;
        node.registry.suspend(id, None).await.unwrap();
        assert_eq!(node.registry.get(id).unwrap().unwrap().state, State::Suspended);
        if (round + 1) % 50 == 0 {
            println!("{} rounds after {:?}", round + 1, began.elapsed());
        }
    }
    for (id, ticks) in &sandboxes {
        println!("{id}: {ticks} ticks");
        let snapshot = node.registry.snapshot(id, Default::default(), None).await.unwrap();
        node.registry.verify_snapshot(snapshot.clone()).await.unwrap();
        node.registry.delete_snapshot(snapshot).await.unwrap();
        node.registry.delete(id).await.unwrap();
        assert_eq!(node.traces(id), Vec::<String>::new());
    }
    println!("sandboxes: {turns}");
    println!("clock_off_ms_max: {}", drift_max.as_millis());
    println!("rounds: {rounds}");
}
