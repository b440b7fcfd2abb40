//! What is killed: a VMM, the agent in the middle of its work. These tests take the node's agent
//! down, so they run one after another: `--test-threads=1`.

use anyhow::{Context, Result, ensure};
use holdfast_harness::{GROUP, Node, wait_for};

fn state(node: &Node, id: &str) -> Result<(String, String)> {
    let sandbox = node.api()?.read(&format!("{GROUP}/sandboxes/{id}"))?;
    let failure = sandbox["stateDetails"]["failure"].as_str().unwrap_or_default().to_owned();
    Ok((sandbox["state"].as_str().unwrap_or_default().to_owned(), failure))
}

/// Kills the agent the hard way and waits until its successor serves.
fn kill_agent(node: &Node) -> Result<()> {
    let before = node.inside("systemctl show -p MainPID --value holdfastd")?;
    node.inside(&format!("kill -9 {before}"))?;
    wait_for("the agent to come back", || {
        let now = node.inside("systemctl show -p MainPID --value holdfastd")?;
        let serves = node.api()?.get("/readyz").is_ok_and(|answer| answer.status == 200);
        Ok((now != before && now != "0" && serves).then_some(()))
    })
}

#[test]
fn a_killed_vmm_fails_its_sandbox_with_the_reason_and_no_other() -> Result<()> {
    let node = Node::from_env()?;
    let (victim, other) = (node.create("debian")?, node.create("debian")?);
    let details = node.api()?.read(&format!("/v1{GROUP}/sandboxes/{victim}/details"))?;
    let pid = details["vmm"]["pid"].as_u64().context("no pid")?;
    node.inside(&format!("kill -9 {pid}"))?;
    let failure = wait_for("the sandbox to fail", || {
        let (state, failure) = state(&node, &victim)?;
        Ok((state == "Failed").then_some(failure))
    })?;
    ensure!(failure.contains("killed by signal 9"), "the reason is {failure:?}");
    let alive = node.holdfast(&["sandbox", "exec", &other, "--", "echo", "alive"])?.ok()?;
    assert_eq!(alive, "alive");
    let refused = node.holdfast(&["sandbox", "exec", &victim, "--", "true"])?;
    ensure!(refused.code == Some(1) && refused.stderr.contains("SandboxNotRunning"), "{refused:?}");
    node.delete(&victim)?;
    node.delete(&other)?;
    assert_eq!(node.leftovers()?, "");
    Ok(())
}

fn vmm_pid(node: &Node, id: &str) -> Result<u64> {
    let details = node.api()?.read(&format!("/v1{GROUP}/sandboxes/{id}/details"))?;
    details["vmm"]["pid"].as_u64().context("no pid")
}

#[test]
fn an_agent_killed_or_restarted_under_running_sandboxes_takes_them_over() -> Result<()> {
    let node = Node::from_env()?;
    let id = node.create("debian")?;
    let pid = vmm_pid(&node, &id)?;
    kill_agent(&node)?;
    assert_eq!(vmm_pid(&node, &id)?, pid);
    node.inside("systemctl restart holdfastd")?;
    assert_eq!(vmm_pid(&node, &id)?, pid);
    let alive = node.holdfast(&["sandbox", "exec", &id, "--", "echo", "alive"])?.ok()?;
    assert_eq!(alive, "alive");
    node.delete(&id)?;
    assert_eq!(node.leftovers()?, "");
    Ok(())
}

#[test]
fn a_command_under_the_command_line_does_not_notice_a_killed_agent() -> Result<()> {
    let node = Node::from_env()?;
    let id = node.create("debian")?;
    let script = "for i in $(seq 100); do echo $i; sleep 0.1; done";
    let output = std::thread::scope(|scope| {
        let watched =
            scope.spawn(|| node.holdfast(&["sandbox", "exec", &id, "--", "sh", "-c", script]));
        std::thread::sleep(std::time::Duration::from_secs(2));
        kill_agent(&node)?;
        watched.join().expect("a thread ends")?.ok()
    })?;
    let expected: Vec<String> = (1..=100).map(|number| number.to_string()).collect();
    assert_eq!(output.lines().collect::<Vec<_>>(), expected);
    node.delete(&id)
}

#[test]
fn an_agent_killed_in_the_middle_of_creates_finishes_them_and_leaves_nothing() -> Result<()> {
    let node = Node::from_env()?;
    let body = br#"{"sourcesRef":{"diskImage":{"name":"debian","isPublic":true}},
        "resources":{"cpu":"250m","memory":"512Mi"},"labels":{"for":"crash"}}"#;
    // Killed at different moments of a create; each is answered or cut off.
    for moment_ms in [20_u64, 150, 600, 1500] {
        let (api, body) = (node.api()?, body.to_vec());
        let create =
            std::thread::spawn(move || api.send("PUT", &format!("{GROUP}/sandboxes"), body));
        std::thread::sleep(std::time::Duration::from_millis(moment_ms));
        kill_agent(&node)?;
        let answered = create.join().expect("a thread ends");
        let list = node.api()?.read(&format!("{GROUP}/sandboxes?labels=for=crash"))?;
        let listed = list["value"].as_array().context("no list")?;
        if let Ok(answer) = answered
            && let Some(id) = answer.body["id"].as_str()
        {
            ensure!(listed.iter().any(|sandbox| sandbox["id"] == id), "{id} was lost");
        }
        for sandbox in listed {
            let id = sandbox["id"].as_str().context("no id")?;
            let state = wait_for("the sandbox to be made", || {
                let (state, _) = state(&node, id)?;
                Ok((state != "Creating").then_some(state))
            })?;
            assert_eq!(state, "Running", "killed after {moment_ms} ms");
            node.delete(id)?;
        }
        assert_eq!(node.leftovers()?, "", "killed after {moment_ms} ms");
    }
    let id = node.create("debian")?;
    node.delete(&id)
}
