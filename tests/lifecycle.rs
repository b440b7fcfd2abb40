//! The life of a sandbox on a booted node, as its users see it.

use std::{
    io::{BufRead, BufReader, Read},
    thread,
};

use anyhow::{Context, Result, ensure};
use holdfast_harness::{GROUP, Node, Outcome};

/// Sandboxes made at once. The dev node's memory factor lets them fit.
const CROWD: usize = 20;

fn run(node: &Node, options: &[&str], command: &[&str]) -> Result<Outcome> {
    let size = ["run", "--cpu", "250m", "--memory", "512Mi"];
    node.holdfast(&[&size[..], options, &["debian", "--"], command].concat())
}

#[test]
fn a_command_keeps_its_streams_apart_and_its_exit_code() -> Result<()> {
    let node = Node::from_env()?;
    let outcome = run(&node, &[], &["sh", "-c", "echo out; echo err >&2; exit 7"])?;
    assert_eq!(outcome.stdout, "out\n");
    assert_eq!(outcome.stderr, "err\n");
    assert_eq!(outcome.code, Some(7));
    Ok(())
}

#[test]
fn a_command_gets_its_environment_folder_user_and_stdin() -> Result<()> {
    let node = Node::from_env()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("env");
    fs_err::write(&file, "FROM_FILE=a b\n")?;
    let file = file.to_string_lossy().into_owned();
    let options = ["-i", "-e", "NAME=value", "--env-file", &file, "-w", "/tmp", "-u", "nobody"];
    let script = "cat; echo $NAME-$FROM_FILE; pwd; id -un";
    let size = ["run", "--cpu", "250m", "--memory", "512Mi"];
    let arguments = [&size[..], &options, &["debian", "--", "sh", "-c", script]].concat();
    let outcome = node.holdfast_fed(&arguments, b"fed\n")?;
    assert_eq!(outcome.ok()?, "fed\nvalue-a b\n/tmp\nnobody");
    Ok(())
}

#[test]
fn a_command_over_its_time_is_killed_and_says_so() -> Result<()> {
    let node = Node::from_env()?;
    // On an emulated node a program may take seconds to be loaded, and one that was not in time is
    // another error: it never ran.
    let outcome = run(&node, &["--timeout", "15"], &["sleep", "1000"])?;
    assert_eq!(outcome.code, Some(124), "{outcome:?}");
    Ok(())
}

#[test]
fn a_command_that_is_not_there_is_a_typed_error() -> Result<()> {
    let node = Node::from_env()?;
    let outcome = run(&node, &[], &["no-such-program"])?;
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    ensure!(outcome.stderr.contains("no-such-program"), "not named: {}", outcome.stderr);
    Ok(())
}

#[test]
fn python_runs_on_a_real_kernel_of_its_own() -> Result<()> {
    let node = Node::from_env()?;
    let script = "import os; print(os.uname().release, sum(range(10)))";
    let output = run(&node, &[], &["python3", "-c", script])?.ok()?;
    ensure!(output.ends_with("-holdfast 45"), "{output}");
    ensure!(!output.starts_with(&node.inside("uname -r")?), "the node's own kernel: {output}");
    Ok(())
}

#[test]
fn a_sandbox_keeps_its_files_from_one_exec_to_the_next_and_is_gone_when_deleted() -> Result<()> {
    let node = Node::from_env()?;
    let api = node.api()?;
    let size = ["--cpu", "250m", "--memory", "512Mi", "--name", "keeper", "-l", "for=lifecycle"];
    let id = node.holdfast(&[&["sandbox", "create"], &size[..], &["debian"]].concat())?.ok()?;

    let exec = |script: &str| node.holdfast(&["sandbox", "exec", &id, "--", "sh", "-c", script]);
    exec("echo kept > /var/note")?.ok()?;
    assert_eq!(exec("cat /var/note")?.ok()?, "kept");

    // The files API sees the same root.
    let files = format!("{GROUP}/sandboxes/{id}/files");
    let path = format!("{files}?path=/srv/a/b.txt&createDirs=true&mode=0640");
    ensure!(api.send("PUT", &path, b"by the API".to_vec())?.status < 300, "file not written");
    assert_eq!(exec("stat -c %a /srv/a/b.txt; cat /srv/a/b.txt")?.ok()?, "640\nby the API");
    let missing = api.get(&format!("{files}?path=/srv/none"))?;
    assert_eq!((missing.status, missing.error_code()?), (404, "FileNotFound".to_owned()));

    let listed = api.read(&format!("{GROUP}/sandboxes?labels=for=lifecycle,name=keeper"))?;
    assert_eq!(listed["value"].as_array().map(Vec::len), Some(1), "{listed}");
    let none = api.read(&format!("{GROUP}/sandboxes?labels=for=other"))?;
    assert_eq!(none["value"].as_array().map(Vec::len), Some(0), "{none}");

    let details = api.read(&format!("/v1{GROUP}/sandboxes/{id}/details"))?;
    let pid = details["vmm"]["pid"].as_u64().context("no pid")?;
    let name = node.inside(&format!("cat /proc/{pid}/comm"))?;
    assert_eq!(name, "holdfast-vmm");

    node.delete(&id)?;
    assert_eq!(api.get(&format!("{GROUP}/sandboxes/{id}"))?.status, 404);
    let left = node.leftovers()?;
    ensure!(!left.contains(&id), "left over: {left}");
    Ok(())
}

#[test]
fn a_sandbox_is_suspended_and_goes_on_when_it_is_told_to_or_needed() -> Result<()> {
    let node = Node::from_env()?;
    let size = ["--cpu", "250m", "--memory", "512Mi"];
    let id = node.holdfast(&[&["sandbox", "create"], &size[..], &["debian"]].concat())?.ok()?;
    let sandbox = |what: &str| node.holdfast(&["sandbox", what, &id])?.ok();
    let read = || node.holdfast(&["sandbox", "exec", &id, "--", "cat", "/dev/shm/note"])?.ok();
    let write = ["sandbox", "exec", &id, "--", "sh", "-c", "echo kept > /dev/shm/note"];
    node.holdfast(&write)?.ok()?;

    // Asked twice it is what was asked for.
    for _ in 0..2 {
        assert_eq!(sandbox("suspend")?, id);
        ensure!(sandbox("get")?.contains("state    Suspended"), "{}", sandbox("get")?);
    }
    for _ in 0..2 {
        assert_eq!(sandbox("resume")?, id);
        ensure!(sandbox("get")?.contains("state    Running"), "{}", sandbox("get")?);
    }
    // In memory alone, so the memory came back.
    assert_eq!(read()?, "kept");
    sandbox("suspend")?;
    assert_eq!(read()?, "kept");

    node.delete(&id)?;
    let gone = node.holdfast(&["sandbox", "suspend", &id])?;
    assert_eq!(gone.code, Some(1), "{gone:?}");
    ensure!(gone.stderr.contains(&id), "not named: {}", gone.stderr);
    Ok(())
}

#[test]
fn cpu_and_memory_of_a_sandbox_are_held_by_its_cgroup() -> Result<()> {
    let node = Node::from_env()?;
    let id = node.create("debian")?;
    let folder = format!("/sys/fs/cgroup/holdfast.slice/holdfast-sandboxes.service/{id}");
    let limits = node.inside(&format!(
        "cd $(find /sys/fs/cgroup -type d -name {id} | head -n 1) && cat cpu.max memory.max memory.swap.max pids.max"
    ))?;
    let lines: Vec<_> = limits.lines().collect();
    assert_eq!(lines[0], "25000 100000", "{folder}");
    let memory: u64 = lines[1].parse()?;
    let guest = 512 * 1024 * 1024;
    ensure!(memory > guest && memory < guest + guest / 4, "memory.max is {memory}");
    assert_eq!(lines[2], "0");
    ensure!(lines[3] != "max", "pids.max is not set");
    node.delete(&id)
}

#[test]
fn a_workload_out_of_memory_or_forking_without_end_does_not_take_its_sandbox_with_it() -> Result<()>
{
    let node = Node::from_env()?;
    let id = node.create("debian")?;
    let exec = |script: &str| {
        let arguments = ["sandbox", "exec", "--timeout", "60", &id, "--", "sh", "-c", script];
        node.holdfast(&arguments)
    };
    let eater = exec("python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'")?;
    ensure!(eater.code != Some(0), "the sandbox has no end of memory: {eater:?}");
    assert_eq!(exec("echo alive")?.ok()?, "alive");
    let bomb = exec(":() { : | : & }; :; sleep 3; exit 3")?;
    ensure!(bomb.code != Some(0), "{bomb:?}");
    assert_eq!(exec("echo alive")?.ok()?, "alive");
    node.delete(&id)
}

#[test]
fn an_interrupted_run_leaves_no_sandbox() -> Result<()> {
    let node = Node::from_env()?;
    let arguments =
        ["run", "--cpu", "250m", "--memory", "512Mi", "--name", "interrupted", "debian", "--"];
    let command =
        ["sh", "-c", "trap 'echo caught; exit 5' INT; echo on; while :; do sleep 0.1; done"];
    let mut child = node.command(&[&arguments[..], &command].concat()).spawn()?;
    let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    assert_eq!(line, "on\n");
    let killed =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
    ensure!(killed.success(), "kill failed");
    let mut rest = String::new();
    stdout.read_to_string(&mut rest)?;
    let outcome = Outcome::from(child.wait_with_output()?);
    assert_eq!((outcome.code, rest.as_str()), (Some(5), "caught\n"), "{outcome:?}");
    let path = format!("{GROUP}/sandboxes?labels=name=interrupted");
    let list = node.api()?.read(&path)?;
    assert_eq!(list["value"].as_array().map(Vec::len), Some(0), "{list}");
    Ok(())
}

#[test]
fn a_crowd_of_small_sandboxes_is_made_used_and_deleted_at_once() -> Result<()> {
    let node = Node::from_env()?;
    let made: Vec<_> = thread::scope(|scope| {
        let one = || -> Result<String> {
            let id = node.create("debian")?;
            let arguments = ["sandbox", "exec", &id, "--", "sh", "-c", "echo $((6 * 7))"];
            let answer = node.holdfast(&arguments)?.ok()?;
            ensure!(answer == "42", "{id} answered {answer}");
            Ok(id)
        };
        let threads: Vec<_> = (0..CROWD).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread ends")).collect()
    });
    let ids = made.into_iter().collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let threads: Vec<_> = ids.iter().map(|id| scope.spawn(|| node.delete(id))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread ends"))
    })?;
    let left = node.leftovers()?;
    for id in &ids {
        ensure!(!left.contains(id.as_str()), "left over of {id}: {left}");
    }
    Ok(())
}
