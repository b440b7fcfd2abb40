//! Sandboxes in real microVMs: our VMM, kernel and PID 1, a busybox image; in `api` over HTTP, else
//! without.
//! Needs KVM, cgroup v2, root, mke2fs; where there is none, `scripts/l1` runs it.
//!
//! Environment: `HOLDFAST_VMM`, `HOLDFAST_VMLINUX`, `HOLDFAST_INITRAMFS`, `HOLDFAST_BUSYBOX` (static).

#[path = "microvm/api.rs"]
mod api;
#[path = "microvm/clones.rs"]
mod clones;
#[path = "microvm/crowd.rs"]
mod crowd;
#[path = "microvm/many.rs"]
mod many;
#[path = "microvm/neighbours.rs"]
mod neighbours;
#[path = "microvm/node.rs"]
mod node;
#[path = "microvm/rounds.rs"]
mod rounds;
#[path = "microvm/stopped.rs"]
mod stopped;
#[path = "microvm/suspended.rs"]
mod suspended;

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use holdfast_model::{MilliCpu, SandboxId, State};
use holdfast_wire::guest::{self, Exited, Input, Output};
use holdfastd::sandbox::{Ending, ExecError};
use node::{Node, alive, shell, spec};

/// Set for the agent that is going to be killed.
const STATE_OF_AGENT: &str = "HOLDFAST_TEST_STATE";

/// Of a metric.
fn counted(node: &Node, series: &str) -> f64 {
    let text = node.metrics.text().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(series)).unwrap();
    line.trim().parse().unwrap()
}

#[derive(Debug, Default, PartialEq)]
struct Heard {
    stdout: String,
    stderr: String,
    exited: Option<Exited>,
}

async fn run(node: &Node, id: &SandboxId, exec: guest::Exec, stdin: &[u8]) -> Heard {
    let mut session = node.registry.exec(id, exec).await.unwrap();
    if !stdin.is_empty() {
        session.send(&Input::Data(stdin.to_vec())).await.unwrap();
        session.send(&Input::End).await.unwrap();
    }
    let mut heard = Heard::default();
    while let Some(output) = session.next().await.unwrap() {
        match output {
            Output::Stdout(bytes) => heard.stdout += &String::from_utf8(bytes).unwrap(),
            Output::Stderr(bytes) => heard.stderr += &String::from_utf8(bytes).unwrap(),
            Output::Exited(exited) => heard.exited = Some(exited),
            other => panic!("{other:?}"),
        }
    }
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_runs_commands_keeps_files_tells_of_itself_and_leaves_nothing() {
    let node = Node::start().await;
    let id = node.running(spec(512)).await;

    let heard = run(&node, &id, shell("echo out; echo err >&2; exit 7"), b"").await;
    let expected = Heard {
        stdout: "out\n".to_owned(),
        stderr: "err\n".to_owned(),
        exited: Some(Exited::Code(7)),
    };
    assert_eq!(heard, expected);

    let cat = guest::Exec { stdin: true, ..shell("cat; hostname; echo $OF_IMAGE $OF_SPEC; pwd") };
    let heard = run(&node, &id, cat, b"typed\n").await;
    assert_eq!(heard.stdout, format!("typed\n{id}\nimage spec\n/srv\n"));

    let content = "x".repeat(300_000);
    let body = content.as_bytes();
    let path = "/new/folder/file".to_owned();
    node.registry.write_file(&id, path.clone(), Some(0o640), true, body).await.unwrap();
    let mut reader = node.registry.read_file(&id, path).await.unwrap();
    let mut read = Vec::new();
    while let Some(piece) = reader.next().await.unwrap() {
        read.extend(piece);
    }
    assert_eq!((reader.size, read == body), (300_000, true));
    let missing = node.registry.read_file(&id, "/nope".to_owned()).await.unwrap_err();
    assert!(matches!(missing, ExecError::Refused(_)), "{missing}");

    let details = node.registry.details(&id).await.unwrap();
    println!("{details:?}");
    assert!(alive(details.vmm_pid));
    assert!(details.vmm.unwrap().exits.total() > 0);
    assert!(details.guest.unwrap().memory_total_bytes > 400 << 20);
    assert!(details.cgroup.cpu_us > 0 && details.cgroup.memory_bytes > 0);

    assert!(!node.traces(&id).is_empty());
    node.registry.delete(&id).await.unwrap();
    assert!(!alive(details.vmm_pid));
    assert_eq!(node.traces(&id), Vec::<String>::new());
    assert_eq!(node.registry.get(&id).unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_vmm_fails_its_sandbox_with_the_reason_and_no_other() {
    let node = Node::start().await;
    let (victim, other) = (node.running(spec(256)).await, node.running(spec(256)).await);
    let pid = node.registry.details(&victim).await.unwrap().vmm_pid;
    node::kill(pid);
    let record = node.settled(&victim, |state| state == State::Failed).await;
    assert_eq!(record.failure.as_deref(), Some("the VMM was killed by signal 9"));
    let refused = node.registry.exec(&victim, shell("true")).await.unwrap_err();
    assert!(matches!(refused, ExecError::NotRunning { state: State::Failed, .. }), "{refused}");
    assert_eq!(run(&node, &other, shell("echo on"), b"").await.stdout, "on\n");
    for id in [victim, other] {
        node.registry.delete(&id).await.unwrap();
        assert_eq!(node.traces(&id), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_shut_down_powers_its_guests_off_and_the_records_say_so() {
    let node = Node::start().await;
    let id = node.running(spec(256)).await;
    node.registry.stop(Ending::PowerOff).await;
    let record = node.registry.get(&id).unwrap().unwrap();
    assert_eq!(record.state, State::Failed);
    let failure = record.failure.unwrap();
    assert!(failure.contains("was powered off"), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_deleted_while_it_boots_leaves_nothing() {
    let node = Node::start().await;
    let create = node.registry.create(node::group(), spec(256), Some("r1".to_owned()));
    let record = create.await.unwrap();
    let again = node.registry.create(node::group(), spec(256), Some("r1".to_owned()));
    assert_eq!(again.await.unwrap().id, record.id);
    node.registry.delete(&record.id).await.unwrap();
    assert_eq!(node.traces(&record.id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_does_not_fit_is_refused_and_says_what_is_short() {
    let node = Node::start().await;
    let error = node.registry.create(node::group(), spec(65_536), None).await.unwrap_err();
    assert!(error.to_string().starts_with("no free memory for 66112Mi"), "{error}");
    assert_eq!(node.registry.list(&node::group()).unwrap(), []);
}

/// The agent that is killed by the test below. Does nothing in an ordinary run.
#[tokio::test(flavor = "multi_thread")]
async fn agent_process() {
    let Ok(state) = std::env::var(STATE_OF_AGENT) else { return };
    let node = Node::start_in(state.into()).await;
    let ran = node.running(spec(256)).await;
    let details = node.registry.details(&ran).await.unwrap();
    println!("\nran {ran} {}", details.vmm_pid);
    let registry = std::sync::Arc::clone(&node.registry);
    tokio::spawn(async move { registry.create(node::group(), spec(256), None).await });
    tokio::time::sleep(Duration::from_secs(3600)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_after_a_killed_one_takes_over_what_runs_and_makes_what_was_half_made() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent_process", "--nocapture"])
        .env(STATE_OF_AGENT, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find_map(|line| line.strip_prefix("ran ").map(str::to_owned)).unwrap();
    let (ran, pid) = line.split_once(' ').unwrap();
    let (ran, pid): (SandboxId, u32) = (ran.parse().unwrap(), pid.parse().unwrap());
    // In the midst of the second one's launch.
    tokio::time::sleep(Duration::from_millis(700)).await;
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert!(alive(pid), "the VMM is to be found by the next agent");

    let node = Node::start_in(folder.path().to_owned()).await;
    assert_eq!(node.registry.details(&ran).await.unwrap().vmm_pid, pid);
    let records = node.registry.list(&node::group()).unwrap();
    assert!(records.iter().any(|record| record.id == ran));
    for record in &records {
        let settled = node.settled(&record.id, |state| state != State::Creating).await;
        assert_eq!(settled.state, State::Running, "{settled:?}");
        let hostname = run(&node, &record.id, shell("hostname"), b"").await.stdout;
        assert_eq!(hostname, format!("{}\n", record.id));
    }
    for record in &records {
        node.registry.delete(&record.id).await.unwrap();
        assert_eq!(node.traces(&record.id), Vec::<String>::new());
    }
    assert!(!alive(pid));
    assert_eq!(node.registry.free(), node.registry.limits());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sandbox_is_held_to_its_cpu_and_memory_and_its_neighbour_is_not() {
    let node = Node::start().await;
    let mut small = spec(128);
    small.resources.cpu = MilliCpu(250);
    let id = node.running(small).await;
    let cgroup = node.cgroup(&id);
    let read = |file: &str| fs_err::read_to_string(cgroup.join(file)).unwrap();
    assert_eq!(read("cpu.max"), "25000 100000\n");
    assert_eq!(read("memory.max"), format!("{}\n", (128 + 65) << 20));
    assert_eq!(read("pids.max"), "96\n");
    assert_eq!(read("cpu.weight"), "25\n");
    let io = read("io.max");
    assert!(io.contains("rbps=104857600 wbps=104857600 riops=2500 wiops=2500"), "{io}");

    let used = async || node.registry.details(&id).await.unwrap().cgroup.cpu_us;
    let busy = node.registry.exec(&id, shell("while :; do :; done")).await.unwrap();
    let (before, began) = (used().await, std::time::Instant::now());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (after, took) = (used().await, began.elapsed());
    drop(busy);
    let share = (after - before) as f64 / took.as_micros() as f64;
    assert!(share < 0.35, "{share} of a CPU");
    node.registry.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sandbox_did_is_in_the_metrics_and_no_counter_counts_it_twice() {
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    run(&node, &id, shell("cat /bin/busybox > /tmp/copy"), b"").await;
    let usage = node.registry.usage(&id).unwrap();
    println!("{usage:?}");
    assert!(usage.pids > 1 && usage.memory_peak_bytes > 0, "{usage:?}");
    assert_eq!(node.registry.vmm_pids().len(), 1);
    node.registry.count().await;
    node.registry.delete(&id).await.unwrap();
    assert_eq!(node.registry.usage(&id), None);
    let value = |series: &str| counted(&node, series);
    let exact = [
        ("holdfast_boots_total{outcome=\"done\"}", 1.0),
        ("holdfast_boots_total{outcome=\"failed\"}", 0.0),
        ("holdfast_boot_phase_seconds_count{phase=\"boot\"}", 1.0),
        ("holdfast_exits_total{reason=\"deleted\"}", 1.0),
        ("holdfast_execs_total{outcome=\"done\"}", 1.0),
        ("holdfast_device_errors_total{device=\"disk\"}", 0.0),
        ("holdfast_seccomp_kills_total", 0.0),
    ];
    for (series, expected) in exact {
        assert_eq!(value(series), expected, "{series}");
    }
    let exits = value("holdfast_vm_exits_total{kind=\"mmio\"}");
    let read = value("holdfast_device_bytes_total{device=\"disk\",direction=\"in\"}");
    println!("{exits} exits, {read} bytes read");
    // Counted twice it would be far more than a boot takes.
    assert!(exits > 0.0 && exits < 20_000.0, "{exits}");
    assert!(read > 0.0 && read < 64e6, "{read}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_finds_a_gateway_that_refuses_it_everything_but_names() {
    let node = Node::start().await;
    let id = node.running(spec(128)).await;
    let up =
        "ifconfig eth0 192.168.127.2 netmask 255.255.255.252 up && cat /sys/class/net/eth0/mtu";
    let heard = run(&node, &id, shell(up), b"").await;
    assert_eq!(
        (heard.stdout.as_str(), heard.exited),
        ("1500\n", Some(Exited::Code(0))),
        "{heard:?}"
    );
    let ask = "ping -c 2 -W 1 192.168.127.1; ifconfig eth0";
    let heard = run(&node, &id, shell(ask), b"").await;
    assert!(heard.stdout.contains("100% packet loss"), "{heard:?}");
    node.registry.count().await;
    let moved = |direction| {
        let labels = format!("{{device=\"network\",direction=\"{direction}\"}}");
        counted(&node, &format!("holdfast_device_bytes_total{labels}"))
    };
    // The gateway was found, and says no.
    assert!(moved("out") > 0.0 && moved("in") > 0.0, "{} {}", moved("out"), moved("in"));
    node.registry.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_gives_the_memory_back_that_it_does_not_need_any_more() {
    const NEEDED_MIB: u64 = 96;
    let node = Node::start().await;
    let id = node.running(spec(256)).await;
    let held = || node.registry.usage(&id).unwrap().memory_bytes >> 20;
    let before = held();
    let need = format!("dd if=/dev/zero of=/dev/null bs={NEEDED_MIB}M count=1");
    run(&node, &id, shell(&need), b"").await;
    let peak = node.registry.usage(&id).unwrap().memory_peak_bytes >> 20;
    assert!(peak >= before + NEEDED_MIB * 3 / 4, "{before} MiB, at its peak {peak}");
    // The guest's kernel reports free blocks of 2 MiB and more, every two seconds. Smaller ones are
    // left, 12 MiB of them after this, as is what the kernel itself took meanwhile, 18 MiB.
    let mut waits = 0;
    while held() > before + NEEDED_MIB / 2 {
        waits += 1;
        assert!(waits < 300, "{before} MiB before, {peak} at the peak, {} held", held());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    node.registry.count().await;
    let given_back = counted(&node, "holdfast_memory_given_back_bytes_total");
    assert!(given_back >= (NEEDED_MIB << 20) as f64 / 2.0, "{given_back} bytes");
    node.registry.delete(&id).await.unwrap();
}
