//! A quiet sandbox beside hostile ones, and beside as many that are busy and well-behaved: its
//! commands must not take much longer. A short sample; `HOLDFAST_NEIGHBOURS` says how many commands
//! else (`scripts/soak neighbours`), and only then the times are compared.
#![expect(clippy::print_stdout, reason = "the soak test shows its figures")]

use std::{
    env,
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_model::{SandboxId, State};
use holdfast_wire::guest::Exited;

use super::{crowd::extra_small, node::Node, run, shell};

/// Commands beside each kind of neighbours, as a sample.
const COMMANDS: usize = 8;
/// Turns in which the kinds of neighbours change places.
const TURNS: usize = 3;
/// What neighbours do is in full swing after this.
const WARM_UP: Duration = Duration::from_secs(5);
/// Of the slowest hundredth of the commands, beside hostile neighbours against busy ones.
const RATIO_MAX: f64 = 2.0;

/// Written into each sandbox that knocks at the host.
const FLOOD: &str = "/tmp/vsock_flood";

const HOSTILE: [(&str, &str); 7] = [
    ("fork bomb", "while :; do bomb() { bomb | bomb & }; bomb; sleep 1; done"),
    ("memory hog", "while :; do tail /dev/zero; done"),
    ("disk filler", "while :; do dd if=/dev/zero of=/tmp/full bs=1M; sync; rm /tmp/full; done"),
    ("console flood", "mknod /tmp/console c 4 64; while :; do yes > /tmp/console; done"),
    ("output flood", "yes; yes >&2"),
    ("busy loop", "while :; do :; done"),
    ("vsock flood", "for n in 1 2 3 4; do /tmp/vsock_flood & done; wait"),
];
const BUSY: (&str, &str) = ("busy", "while :; do :; done");

#[tokio::test(flavor = "multi_thread")]
async fn hostile_neighbours_are_no_worse_than_busy_ones() {
    let full = env::var("HOLDFAST_NEIGHBOURS").ok().map(|count| count.parse().unwrap());
    let (commands, turns) = full.map_or((COMMANDS, 1), |count: usize| (count / TURNS, TURNS));
    let node = Node::start_as(|config| {
        config.capacity.memory_factor = 100.0;
        config.capacity.cpu_factor = 100.0;
    })
    .await;
    let quiet = node.running(extra_small()).await;
    let (mut beside_busy, mut beside_hostile) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        beside_busy.extend(beside(&node, &quiet, &[BUSY; HOSTILE.len()], commands).await);
        beside_hostile.extend(beside(&node, &quiet, &HOSTILE, commands).await);
    }
    node.registry.delete(&quiet).await.unwrap();
    assert_eq!(node.registry.free(), node.registry.limits());

    let [busy_p50, busy_p99] = percentiles(beside_busy);
    let [hostile_p50, hostile_p99] = percentiles(beside_hostile);
    let ratio = hostile_p99 / busy_p99;
    println!("commands: {}", commands * turns);
    println!("ratio_p50: {:.2}", hostile_p50 / busy_p50);
    println!("busy_p99_ms: {busy_p99:.1}");
    println!("hostile_p99_ms: {hostile_p99:.1}");
    println!("ratio_p99: {ratio:.2}");
    assert!(full.is_none() || ratio <= RATIO_MAX, "{ratio:.2} times as slow");
}

/// Makes the neighbours, times commands in the quiet sandbox, deletes the neighbours.
async fn beside(
    node: &Node,
    quiet: &SandboxId,
    neighbours: &[(&str, &str)],
    commands: usize,
) -> Vec<Duration> {
    let mut ids = Vec::new();
    for (name, script) in neighbours {
        let id = node.running(extra_small()).await;
        if script.contains(FLOOD) {
            let program = fs::read(env::var("HOLDFAST_VSOCK_FLOOD").unwrap()).unwrap();
            let written =
                node.registry.write_file(&id, FLOOD.to_owned(), Some(0o755), true, &program[..]);
            written.await.unwrap();
        }
        let mut session = node.registry.exec(&id, shell(script)).await.unwrap();
        // Somebody reads what it says, as the command line would.
        tokio::spawn(async move { while let Ok(Some(_)) = session.next().await {} });
        ids.push((id, *name));
    }
    tokio::time::sleep(WARM_UP).await;
    let mut times = Vec::new();
    for _ in 0..commands {
        let began = Instant::now();
        let heard = run(node, quiet, shell("true"), b"").await;
        times.push(began.elapsed());
        assert_eq!(heard.exited, Some(Exited::Code(0)), "{heard:?}");
    }
    for (id, name) in &ids {
        let record = node.registry.get(id).unwrap().unwrap();
        // Whoever ruins its own sandbox finds it ended, for a reason.
        assert!(record.state == State::Running || record.failure.is_some(), "{name}: {record:?}");
        if let Some(failure) = record.failure {
            println!("{name}: {failure}");
        }
        node.registry.delete(id).await.unwrap();
        assert_eq!(node.traces(id), Vec::<String>::new());
    }
    times
}

/// The median and the slowest hundredth, in milliseconds.
fn percentiles(mut times: Vec<Duration>) -> [f64; 2] {
    times.sort();
    [times.len() / 2, (times.len() * 99).div_ceil(100) - 1].map(|at| times[at].as_secs_f64() * 1e3)
}
