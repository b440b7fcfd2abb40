//! A container engine inside a sandbox: Debian's, with an image made from a layout, without a
//! network.

use std::{env, process::Command};

use anyhow::{Context, Result};
use holdfast_harness::{Node, Outcome, Registry, top};

/// Returns once the engine answers; says what it logged if it never does.
const START: &str = "dockerd > /var/log/dockerd.log 2>&1 &
    for _ in $(seq 200); do docker version > /dev/null 2>&1 && exit; sleep 1; done
    tail -n 40 /var/log/dockerd.log >&2; exit 1";

#[test]
fn a_container_engine_runs_containers_in_a_sandbox() -> Result<()> {
    let node = Node::from_env()?;
    let port = env::var("HOLDFAST_TEST_REGISTRY_PORT")
        .context("HOLDFAST_TEST_REGISTRY_PORT is not set: run this by scripts/test node")?;
    let folder = tempfile::tempdir()?;
    let registry = Registry::start(port.parse()?, folder.path().join("registry"))?;
    let image = Command::new(top().join("scripts/test-image")).arg("docker").output()?;
    let image = registry.push(&Outcome::from(image).ok()?, "docker:1")?;
    let size = ["--cpu", "1000m", "--memory", "2048Mi"];
    node.holdfast(&["image", "pull", &image])?.ok()?;
    let id = node.holdfast(&[&["sandbox", "create"], &size[..], &[&image]].concat())?.ok()?;
    let exec = |script: &str| {
        node.holdfast(&["sandbox", "exec", &id, "--", "sh", "-c", script])?
            .ok()
            .with_context(|| script.to_owned())
    };

    exec(START)?;
    // On a disk of its own, or the engine would copy every layer whole.
    assert_eq!(exec("docker info --format '{{.Driver}} {{.CgroupVersion}}'")?, "overlay2 2");
    exec("docker load --quiet --input /srv/inner.tar")?;
    let inner = |options: &str, script: &str| {
        exec(&format!("docker run --rm {options} inner:1 busybox sh -c '{script}'"))
    };
    assert_eq!(inner("", "echo $((6 * 7)) of $(busybox id -u)")?, "42 of 0");
    let limit = "busybox cat /sys/fs/cgroup/memory.max";
    assert_eq!(inner("--memory 64m --network none", limit)?, (64 << 20).to_string());
    // Two containers speak over the engine's bridge; from there nothing leads out of the sandbox.
    exec(
        "docker run --detach --name web inner:1 busybox nc -l -p 80 -e busybox echo over the bridge",
    )?;
    let address = exec("docker inspect --format '{{.NetworkSettings.IPAddress}}' web")?;
    assert_eq!(inner("", &format!("busybox nc {address} 80 < /dev/null"))?, "over the bridge");
    assert_eq!(exec("docker ps --quiet --all")?.lines().count(), 1);
    node.delete(&id)
}
