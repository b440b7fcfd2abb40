//! An agent that is killed at every step of create, fork, suspend, resume, snapshot, exec and delete,
//! and its successors: no sandbox is lost, none is there twice, nothing is left behind, and commands
//! that run go on under the clients that watch them.
//!
//! Needs what `microvm` needs, and `HOLDFAST_CLI`, the command line. `HOLDFAST_KILLS` is how many
//! kills there are to be; fewer than one at each step are not possible.

mod agent;
#[path = "../microvm/node.rs"]
#[allow(dead_code)]
mod node;
mod power;
mod stream;
mod world;

use std::collections::BTreeMap;

use agent::{Agent, Answer, Place, runs};
use holdfastd::fault::Point;
use serde_json::json;
use stream::{Counter, Echo};
use world::World;

/// Kills when nobody says how many.
const KILLS_DEFAULT: usize = 40;

/// How often an agent dies at each step, where so many kills are asked for.
const AT_EACH_STEP: usize = 5;

/// What the soak does. The other operations have tests without a microVM, in the agent itself.
const OPERATIONS: [&str; 7] = ["create", "fork", "suspend", "resume", "snapshot", "exec", "delete"];

/// The points of one operation, in the order in which it comes to them.
fn points(operation: &str) -> Vec<Point> {
    let of = |point: &&Point| point.name().split('.').next() == Some(operation);
    Point::ALL.iter().filter(of).copied().collect()
}

/// What is the same through all kills.
struct Soak {
    place: Place,
    /// A sandbox that outlives every agent, and its VMM.
    resident: String,
    vmm_pid: u64,
    kills: BTreeMap<&'static str, usize>,
}

impl Soak {
    fn count(&mut self, point: Point) {
        *self.kills.entry(point.name()).or_default() += 1;
    }

    fn kills_at(&self, point: Point) -> usize {
        self.kills.get(point.name()).copied().unwrap_or_default()
    }

    fn total(&self) -> usize {
        self.kills.values().sum()
    }

    /// An agent started after a kill, once the world is as it should be.
    async fn restarted(&self, fault: Option<Point>, others: &[&str]) -> Agent {
        let agent = Agent::start(&self.place, fault).await;
        let details = agent.get(&agent.details(&self.resident)).await.json();
        let pid = details["vmm"]["pid"].as_u64();
        assert_eq!(pid, Some(self.vmm_pid), "the resident was not taken over: {details}");
        let expected: Vec<&str> = [self.resident.as_str()].iter().chain(others).copied().collect();
        World::settled(&agent, &self.place, &expected, &[], 0).await;
        agent
    }

    /// A suspend whose agent dies at `point`: its successor finds the sandbox as it was or
    /// Suspended, and in the end has it Suspended.
    async fn suspend(&mut self, agent: Agent, id: &str, point: Point, next: Point) -> Agent {
        agent.look(id, "echo kept > /tmp/marker").await;
        let _ = agent.order(id, "stop").await;
        agent.dies().await;
        self.count(point);
        let agent = Agent::start(&self.place, Some(next)).await;
        let state = agent.state(id).await;
        let expected = if point == Point::SuspendCommitted { "Suspended" } else { "Running" };
        assert_eq!(state, expected, "after a kill at {}", point.name());
        if state == "Running" {
            assert_eq!(agent.look(id, "cat /tmp/marker").await, "kept\n");
            assert_eq!(agent.order(id, "stop").await.status, 204);
        }
        World::settled(&agent, &self.place, &[&self.resident], &[id], 1).await;
        agent
    }

    /// A call that wakes the sandbox, whose agent dies at `point`.
    async fn resume(&mut self, agent: Agent, id: &str, point: Point, next: Point) -> Agent {
        let _ = agent.execute(id, "true", &format!("resume-{}", self.total())).await;
        agent.dies().await;
        self.count(point);
        let agent = Agent::start(&self.place, Some(next)).await;
        let expected = if point == Point::ResumeRunning { "Running" } else { "Suspended" };
        assert_eq!(agent.state(id).await, expected, "after a kill at {}", point.name());
        assert_eq!(agent.look(id, "cat /tmp/marker").await, "kept\n");
        World::settled(&agent, &self.place, &[&self.resident, id], &[], 1).await;
        agent
    }

    /// A snapshot whose agent dies at `point`: the sandbox goes on, and the same call made again
    /// gives the one snapshot there is.
    async fn snapshot(&mut self, agent: Agent, id: &str, point: Point, next: Point) -> Agent {
        let name = format!("snapshot-{}", self.total());
        let _ = agent.snapshot(id, &name).await;
        agent.dies().await;
        self.count(point);
        let agent = Agent::start(&self.place, Some(next)).await;
        assert_eq!(agent.state(id).await, "Running", "after a kill at {}", point.name());
        let there = usize::from(point == Point::SnapshotRecorded);
        assert_eq!(agent.snapshots().await.len(), there, "after a kill at {}", point.name());
        let snapshot = agent.snapshot(id, &name).await.id();
        assert_eq!(agent.snapshots().await, [snapshot.as_str()]);
        // The sandbox's own, of its suspend, and this one.
        World::settled(&agent, &self.place, &[&self.resident, id], &[], 2).await;
        assert_eq!(agent.look(id, "cat /tmp/marker").await, "kept\n");
        assert_eq!(agent.delete_snapshot(&snapshot).await.status, 204);
        World::settled(&agent, &self.place, &[&self.resident, id], &[], 1).await;
        agent
    }

    /// A create whose agent dies at `point`; its successor, which is to die at `next`, has it run.
    async fn create(&mut self, agent: Agent, point: Point, next: Point) -> (Agent, String) {
        let name = format!("create-{}", self.total());
        let _ = agent.create(&name).await;
        agent.dies().await;
        self.count(point);
        let agent = Agent::start(&self.place, Some(next)).await;
        let id = agent.create(&name).await.id();
        agent.runs(&id).await;
        let again = agent.create(&name).await.id();
        assert_eq!(again, id, "the same create made another sandbox");
        let list = agent.list().await;
        assert_eq!(list.len(), 2, "after a kill at {}: {list:?}", point.name());
        World::settled(&agent, &self.place, &[&self.resident, &id], &[], 0).await;
        let hello = agent.execute(&id, "echo hello", &format!("hello-{name}")).await;
        assert_eq!(hello.stdout(), "hello\n");
        (agent, id)
    }

    /// A fork whose agent dies at `point`: the same call made again gives as many as were asked for,
    /// each of what the sandbox was.
    async fn fork(&mut self, agent: Agent, id: &str, point: Point, next: Point) -> Agent {
        const COUNT: u32 = 2;
        let name = format!("fork-{}", self.total());
        agent.look(id, "echo forked > /tmp/forked").await;
        let _ = agent.fork(id, COUNT, &name).await;
        agent.dies().await;
        self.count(point);
        let agent = Agent::start(&self.place, Some(next)).await;
        assert_eq!(agent.state(id).await, "Running", "after a kill at {}", point.name());
        let answer = agent.fork(id, COUNT, &name).await.json();
        let forks = answer["value"].as_array().unwrap().iter();
        let forks: Vec<&str> = forks.map(|fork| fork["id"].as_str().unwrap()).collect();
        assert_eq!(forks.len(), 2, "after a kill at {}: {answer}", point.name());
        for fork in forks {
            agent.runs(fork).await;
            assert_eq!(agent.look(fork, "cat /tmp/forked").await, "forked\n");
            assert_eq!(agent.delete(fork).await.status, 204);
        }
        World::settled(&agent, &self.place, &[&self.resident, id], &[], 0).await;
        agent
    }

    /// A delete whose agent dies at `point`.
    async fn delete(&mut self, agent: Agent, id: &str, point: Point, next: Point) -> Agent {
        let _ = agent.delete(id).await;
        agent.dies().await;
        self.count(point);
        let agent = self.restarted(Some(next), &[]).await;
        assert_eq!(agent.delete(id).await.status, 404, "after a kill at {}", point.name());
        agent
    }

    /// A command whose agent dies at `point`.
    async fn exec(&mut self, agent: Agent, point: Point, next: Option<Point>) -> Agent {
        let name = format!("exec-{}", self.total());
        let command = format!("echo x >> /tmp/{name}; sleep 0.3; cat /tmp/{name}");
        let _ = agent.execute(&self.resident, &command, &name).await;
        agent.dies().await;
        self.count(point);
        let agent = self.restarted(next, &[]).await;
        let again = agent.execute(&self.resident, &command, &name).await;
        let look = format!("cat /tmp/{name}; true");
        if point == Point::ExecBegun {
            // Nobody can tell that it did not begin; it must not be begun now.
            assert_eq!((again.status, again.code()), (409, "OutcomeUnknown".to_owned()));
            assert_eq!(agent.look(&self.resident, &look).await, "");
        } else {
            assert_eq!(again.stdout(), "x\n", "after a kill at {}", point.name());
            assert_eq!(agent.look(&self.resident, &look).await, "x\n");
        }
        agent
    }
}

/// The agents that are killed. Does nothing in an ordinary run.
#[tokio::test(flavor = "multi_thread")]
async fn agent_process() {
    agent::serve_if_asked().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_at_every_step_loses_nothing_and_leaves_nothing() {
    let kills = std::env::var("HOLDFAST_KILLS").map_or(KILLS_DEFAULT, |n| n.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    let (creates, execs, deletes) = (points("create"), points("exec"), points("delete"));
    let (suspends, resumes) = (points("suspend"), points("resume"));
    let (snapshots, forks) = (points("snapshot"), points("fork"));
    let pick = |points: &[Point], round: usize| points[round % points.len()];

    let agent = Agent::start(&place, None).await;
    let resident = agent.create("resident").await.id();
    agent.runs(&resident).await;
    let details = agent.get(&agent.details(&resident)).await.json();
    let vmm_pid = details["vmm"]["pid"].as_u64().unwrap();
    let mut soak = Soak { place, resident, vmm_pid, kills: BTreeMap::new() };
    let mut counter = Counter::start(&agent, &soak.resident);
    let mut echo = Echo::start(&agent, &soak.resident);
    counter.goes_on().await;
    // An upgrade is a stop in good order: everything goes on as after a kill.
    agent.stops().await;
    let mut agent = soak.restarted(Some(creates[0]), &[]).await;

    let all_points: Vec<Point> = OPERATIONS.into_iter().flat_map(points).collect();
    // A create has the most steps: a round comes to one of each operation's.
    let least = (kills / all_points.len()).clamp(1, AT_EACH_STEP);
    for round in 0.. {
        let (delete, exec) = (pick(&deletes, round), pick(&execs, round));
        let (suspend, resume) = (pick(&suspends, round), pick(&resumes, round));
        let fork = pick(&forks, round);
        let (next, id) = soak.create(agent, pick(&creates, round), fork).await;
        let next = soak.fork(next, &id, fork, suspend).await;
        let next = soak.suspend(next, &id, suspend, resume).await;
        let snapshot = pick(&snapshots, round);
        let next = soak.resume(next, &id, resume, snapshot).await;
        let next = soak.snapshot(next, &id, snapshot, delete).await;
        agent = soak.delete(next, &id, delete, exec).await;
        counter.goes_on().await;
        echo.answers(&format!("line {round}")).await;
        let all = all_points.iter().all(|point| soak.kills_at(*point) >= least);
        if soak.total() + 1 >= kills && (all || round + 1 >= least * creates.len()) {
            agent = soak.exec(agent, exec, None).await;
            break;
        }
        agent = soak.exec(agent, exec, Some(pick(&creates, round + 1))).await;
        println!("{} kills so far", soak.total());
    }
    for point in &all_points {
        println!("{}: {}", point.name(), soak.kills_at(*point));
    }
    println!("kills: {}", soak.total());
    for point in &all_points {
        assert!(soak.kills_at(*point) >= least, "fewer than {least} kills at {}", point.name());
    }

    counter.goes_on().await;
    println!("numbers under one client: {}", counter.ends().await);
    echo.ends().await;
    assert_eq!(agent.delete(&soak.resident).await.status, 204);
    assert!(!runs(soak.vmm_pid), "the resident's VMM goes with it");
    World::settled(&agent, &soak.place, &[], &[], 0).await;
    agent.stops().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_ends_while_the_agent_is_away_fails_its_sandbox_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    let agent = Agent::start(&place, None).await;
    let id = agent.create("victim").await.id();
    agent.runs(&id).await;
    let details = agent.get(&agent.details(&id)).await.json();
    agent.stops().await;
    node::kill(u32::try_from(details["vmm"]["pid"].as_u64().unwrap()).unwrap());
    while !world::processes("holdfast-shim").is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let agent = Agent::start(&place, None).await;
    let sandbox = agent.get(&agent.sandbox(&id)).await.json();
    assert_eq!(sandbox["state"], json!("Failed"), "{sandbox}");
    let failure = sandbox["stateDetails"]["failure"].to_string();
    assert!(failure.contains("while the agent was away"), "{failure}");
    assert!(failure.contains("killed by signal 9"), "{failure}");
    assert_eq!(agent.delete(&id).await.status, 204);
    World::settled(&agent, &place, &[], &[], 0).await;
    agent.stops().await;
}

impl Answer {
    /// The id of the sandbox in it.
    fn id(&self) -> String {
        let id = self.json()["id"].as_str().map(str::to_owned);
        id.unwrap_or_else(|| panic!("no sandbox: {self:?}"))
    }

    /// What a command that ended well said.
    fn stdout(&self) -> String {
        let result = self.json();
        assert_eq!(result["exitCode"], json!(0), "{self:?}");
        result["stdout"].as_str().unwrap().to_owned()
    }

    fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}
