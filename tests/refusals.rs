//! Bad input to a booted node: each is a typed error with name, reason and remedy, nothing
//! half-made stays, and the agent lives. One of them fills the node's disk, so they run one after
//! another: `--test-threads=1`.

use std::{env, time::Duration};

use anyhow::{Context, Result, ensure};
use holdfast_harness::{GROUP, Node, Outcome, Registry, top, wait_for};

/// Bytes of output in the short sample; `scripts/soak output` asks for 2 GB.
const OUTPUT_BYTES: u64 = 64 * 1024 * 1024;

/// A refusal names the thing and what to do; the agent answers afterwards.
fn refused(node: &Node, outcome: &Outcome, words: &[&str]) -> Result<()> {
    ensure!(outcome.code == Some(1) || outcome.code == Some(3), "{outcome:?}");
    for word in words {
        ensure!(outcome.stderr.contains(word), "{word:?} is not in {}", outcome.stderr);
    }
    ensure!(outcome.stderr.contains("hint:"), "no remedy: {outcome:?}");
    let images = node.holdfast(&["--output", "json", "image", "list"])?.ok()?;
    ensure!(!images.contains("\"Creating\"") && !images.contains("\"Failed\""), "{images}");
    ensure!(node.api()?.get("/readyz")?.status == 200, "the agent does not serve");
    Ok(())
}

/// A registry where the node looks for one, with the test image in it.
fn registry(folder: &std::path::Path) -> Result<Registry> {
    let port = env::var("HOLDFAST_TEST_REGISTRY_PORT")
        .context("HOLDFAST_TEST_REGISTRY_PORT is not set: use `scripts/test node`")?;
    Registry::start(port.parse()?, folder.to_owned())
}

fn test_image() -> Result<String> {
    let output = std::process::Command::new(top().join("scripts/test-image")).output()?;
    Outcome::from(output).ok()
}

/// Digests of the manifest's layers, by skopeo.
fn layers(layout: &str) -> Result<Vec<String>> {
    let image = format!("oci:{layout}");
    let output =
        std::process::Command::new("skopeo").args(["inspect", "--raw", &image]).output()?;
    let manifest: serde_json::Value = serde_json::from_str(&Outcome::from(output).ok()?)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    Ok(layers.iter().filter_map(|l| l["digest"].as_str().map(str::to_owned)).collect())
}

// One test, since they share the registry's port: a good pull comes last and shows that nothing of
// the bad ones was kept.
#[test]
fn images_that_cannot_be_had_are_refused_and_leave_nothing() -> Result<()> {
    let node = Node::from_env()?;
    let folder = tempfile::tempdir()?;
    let layout = test_image()?;
    let registry = registry(folder.path())?;
    let reference = registry.push(&layout, "a/b:1")?;
    // Layers that another test left on the node would not be fetched again.
    let images = node.api()?.read(&format!("{GROUP}/diskimages"))?;
    for image in images["value"].as_array().context("no list")? {
        node.holdfast(&["image", "delete", image["id"].as_str().context("no id")?])?.ok()?;
    }
    node.holdfast(&["image", "gc"])?.ok()?;
    let pull = |reference: &str| node.holdfast(&["image", "pull", reference]);

    let host = format!("10.0.2.2:{}", registry.port);
    refused(&node, &pull(&format!("{host}/none/such:1"))?, &["none/such"])?;
    refused(&node, &pull(&format!("{host}/a/b:none"))?, &["a/b:none"])?;
    refused(&node, &pull(&format!("{host}/a/../b:1"))?, &[".."])?;

    let layer = layers(&layout)?.pop().context("no layer")?;
    let blob = registry.blob(&layer);
    let good = fs_err::read(&blob)?;
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs_err::write(&blob, &bad)?;
    refused(&node, &pull(&reference)?, &[&layer])?;
    fs_err::write(&blob, &good[..good.len() / 2])?;
    refused(&node, &pull(&reference)?, &["sha256:"])?;
    fs_err::write(&blob, &good)?;

    // The registry dies while the image comes in.
    let child = node.command(&["image", "pull", &reference]).spawn()?;
    std::thread::sleep(Duration::from_millis(1500));
    drop(registry);
    let outcome = Outcome::from(child.wait_with_output()?);
    if outcome.code != Some(0) {
        refused(&node, &outcome, &[&host])?;
    }
    refused(&node, &pull(&format!("{host}/a/b:2"))?, &[&host])?;

    let registry = crate::registry(&folder.path().join("again"))?;
    let reference = registry.push(&layout, "a/b:3")?;
    let run = ["run", "--cpu", "250m", "--memory", "512Mi", &reference];
    ensure!(node.holdfast(&run)?.ok()?.contains("says hello"), "the good image does not run");
    Ok(())
}

#[test]
fn a_hostile_archive_is_refused_by_layer_and_entry() -> Result<()> {
    let node = Node::from_env()?;
    let folder = tempfile::tempdir()?;
    let archive = folder.path().join("hostile.tar");
    fs_err::write(&archive, hostile_archive()?)?;
    let outcome = node.holdfast(&["image", "import", &archive.to_string_lossy()])?;
    refused(&node, &outcome, &["escape"])?;
    let nonsense = folder.path().join("nonsense.tar");
    fs_err::write(&nonsense, b"this is no archive")?;
    refused(&node, &node.holdfast(&["image", "import", &nonsense.to_string_lossy()])?, &[])?;
    Ok(())
}

/// A docker archive whose one layer writes outside its root.
fn hostile_archive() -> Result<Vec<u8>> {
    let entry = |builder: &mut tar::Builder<Vec<u8>>, name: &[u8], bytes: &[u8]| -> Result<()> {
        let mut header = tar::Header::new_ustar();
        // Written as it is: the crate's own setter refuses such a path.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_size(u64::try_from(bytes.len())?);
        header.set_mode(0o644);
        header.set_cksum();
        Ok(builder.append(&header, bytes)?)
    };
    let mut layer = tar::Builder::new(Vec::new());
    entry(&mut layer, b"a/../../../escape", b"out")?;
    let layer = layer.into_inner()?;
    let config = r#"{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:DIFF"]}}"#;
    let diff = sha256(&layer)?;
    let config = config.replace("DIFF", &diff);
    let name = format!("{}.json", sha256(config.as_bytes())?);
    let manifest =
        format!(r#"[{{"Config":"{name}","RepoTags":["x:1"],"Layers":["l/layer.tar"]}}]"#);
    let mut archive = tar::Builder::new(Vec::new());
    entry(&mut archive, name.as_bytes(), config.as_bytes())?;
    entry(&mut archive, b"l/layer.tar", &layer)?;
    entry(&mut archive, b"manifest.json", manifest.as_bytes())?;
    Ok(archive.into_inner()?)
}

fn sha256(bytes: &[u8]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("bytes");
    fs_err::write(&file, bytes)?;
    let output = std::process::Command::new("sha256sum").arg(&file).output()?;
    Ok(Outcome::from(output).ok()?.chars().take(64).collect())
}

#[test]
fn output_without_end_is_cut_and_costs_the_agent_no_memory() -> Result<()> {
    let node = Node::from_env()?;
    let id = node.create("debian")?;
    let bytes: u64 = env::var("HOLDFAST_OUTPUT_BYTES").map_or(Ok(OUTPUT_BYTES), |n| n.parse())?;
    let agent_kib = || -> Result<u64> {
        let pid = node.inside("systemctl show -p MainPID --value holdfastd")?;
        Ok(node
            .inside(&format!("sed -n 's/^VmHWM:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/{pid}/status"))?
            .parse()?)
    };
    let before = agent_kib()?;
    let path = format!("{GROUP}/sandboxes/{id}/executeShellCommand");
    let body = format!(r#"{{"command":"head -c {bytes} /dev/zero | tr '\\0' x; exit 3"}}"#);
    // Even an emulated node under load moves a MiB a second.
    let api = node.api()?.with_more_patience(Duration::from_secs(bytes / (1024 * 1024)));
    let answer = api.send("POST", &path, body.into_bytes())?;
    assert_eq!(answer.body["exitCode"], 3);
    let stdout = answer.body["stdout"].as_str().context("no stdout")?.len();
    let stderr = answer.body["stderr"].as_str().context("no stderr")?;
    ensure!(stdout < 32 * 1024 * 1024 && stderr.contains("bytes"), "{stdout} bytes; {stderr}");
    let grown = agent_kib()?.saturating_sub(before);
    ensure!(grown < 160 * 1024, "the agent grew by {grown} KiB");
    node.delete(&id)
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() -> Result<()> {
    let node = Node::from_env()?;
    let api = node.api()?;
    let sandboxes = format!("{GROUP}/sandboxes");
    let large = vec![b' '; 2 * 1024 * 1024];
    let cases: [(&str, &str, &[u8], u16, &str); 9] = [
        ("PUT", &sandboxes, b"{", 400, "MalformedJson"),
        ("PUT", &sandboxes, b"{\"color\":1}", 400, "InvalidRequest"),
        ("PUT", &sandboxes, &large, 413, "BodyTooLarge"),
        ("GET", &format!("{sandboxes}/..%2f..%2fetc"), b"", 404, "SandboxNotFound"),
        ("GET", &format!("{sandboxes}/aaaaaaaaaaaaaaaaaaaa"), b"", 404, "SandboxNotFound"),
        ("POST", &sandboxes, b"", 405, "MethodNotAllowed"),
        ("GET", "/nowhere", b"", 404, "RouteNotFound"),
        (
            "PUT",
            &sandboxes,
            br#"{"sourcesRef":{"diskImage":{"name":"debian","isPublic":true}},"ports":[{"port":80}]}"#,
            400,
            "UnsupportedField",
        ),
        (
            "PUT",
            &sandboxes,
            br#"{"sourcesRef":{"diskImage":{"name":"debian","isPublic":true}},"egressPolicy":{"defaultAction":"allow"}}"#,
            400,
            "InvalidRequest",
        ),
    ];
    for (method, path, body, status, code) in cases {
        let answer = api.send(method, path, body.to_vec())?;
        assert_eq!(
            (answer.status, answer.error_code()?.as_str()),
            (status, code),
            "{method} {path}"
        );
    }
    for token in [None, Some("hf_wrong"), Some("x")] {
        let answer = node.api()?.with_token(token).get(&sandboxes)?;
        assert_eq!((answer.status, answer.error_code()?.as_str()), (401, "Unauthorized"));
    }
    Ok(())
}

#[test]
fn a_node_without_room_on_its_disk_says_so_and_recovers() -> Result<()> {
    let node = Node::from_env()?;
    let folder = tempfile::tempdir()?;
    let archive = folder.path().join("image.tar");
    let target = format!("oci-archive:{}", archive.display());
    let source = format!("oci:{}", test_image()?);
    let status = std::process::Command::new("skopeo")
        .args(["copy", "--quiet", &source, &target])
        .status()?;
    ensure!(status.success(), "skopeo failed");
    node.inside("avail=$(df --output=avail -B1M /var/lib/holdfast | tail -n 1); fallocate -l $((avail - 40))M /var/lib/holdfast/filler")?;
    let outcome = node.holdfast(&["image", "import", &archive.to_string_lossy()]);
    node.inside("rm /var/lib/holdfast/filler")?;
    refused(&node, &outcome?, &["space"])?;
    let id = wait_for("an import with room", || {
        Ok(node.holdfast(&["image", "import", &archive.to_string_lossy()])?.ok().ok())
    })?;
    node.holdfast(&["image", "delete", &id])?.ok()?;
    Ok(())
}
