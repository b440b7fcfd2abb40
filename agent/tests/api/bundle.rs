//! The support bundle, made by the command line from a node that holds secrets wherever secrets
//! can be.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use holdfast_api::path;
use holdfast_model::{Digest, Resources, SandboxId, SandboxSpec, State, sandbox::ImageSource};
use holdfast_store::{SandboxRecord, Store};
use holdfastd::config::Config;

use crate::server::{Server, TOKEN, group};

const ENVIRONMENT: &str = "environment-value-4711";
const KEY: &str = "-----BEGIN KEY-----\nprivate-key-line-one\nprivate-key-line-two";
const ARGUMENT: &str = "argument-secret-4712";
const LABEL: &str = "label-value-4713";
const KEPT_TOKEN: &str = "hf_00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const REGISTRY_TOKEN: &str = "registry-token-4714";
const REGISTRY_USER: &str = "registry-user-4715";
const OF_GUEST: &str = "guest-console-4716";
const BEARER: &str = "unknown-bearer-4717";
const USER_PART: &str = "user-part-4718";
const HEADER: &str = "header-value-4719";

const SECRETS: [&str; 13] = [
    TOKEN,
    ENVIRONMENT,
    "private-key-line-one",
    "private-key-line-two",
    ARGUMENT,
    LABEL,
    KEPT_TOKEN,
    REGISTRY_TOKEN,
    REGISTRY_USER,
    OF_GUEST,
    BEARER,
    USER_PART,
    HEADER,
];

/// The command line, built once: cargo names only the programs of a test's own crate.
fn command_line() -> PathBuf {
    let cargo = Command::new(env!("CARGO")).args(["build", "--quiet", "-p", "holdfast"]).status();
    assert!(cargo.unwrap().success());
    let here = std::env::current_exe().unwrap();
    here.parent().and_then(Path::parent).unwrap().join("holdfast")
}

fn plant(config: &mut Config) {
    let state = &config.paths.state;
    fs_err::write(state.join("admin-token"), format!("{KEPT_TOKEN}\n")).unwrap();
    let store = Store::open(&state.join("store.redb")).unwrap();
    let failure = format!(
        "could not start: sent {ENVIRONMENT} with Bearer {BEARER} to https://{USER_PART}@host/x"
    );
    let record = SandboxRecord {
        id: SandboxId::from_random([7; 20]),
        group: group(),
        spec: SandboxSpec {
            image: ImageSource::Public("debian".to_owned()),
            resources: Resources::DEFAULT,
            labels: [("name".to_owned(), LABEL.to_owned())].into(),
            environment: [
                ("PASSWORD".to_owned(), ENVIRONMENT.to_owned()),
                ("KEY".to_owned(), KEY.to_owned()),
            ]
            .into(),
            entrypoint: Some(vec!["/bin/run".to_owned(), format!("--password={ARGUMENT}")]),
            cmd: None,
            lifecycle_json: None,
            egress_json: Some(format!(
                r#"{{"defaultAction":"Deny","rules":[{{"match":{{"host":"a.test"}},"action":{{"type":"Transform",
                    "headers":[{{"operation":"Set","name":"X-Key","value":"{HEADER}"}}]}}}}]}}"#
            )),
            skip_egress_proxy: false,
        },
        state: State::Failed,
        uid: None,
        saved: None,
        from_snapshot: None,
        egress_generation: 0,
        failure: Some(failure),
        image: Digest::from_sha256([3; 32]),
        created_at_ms: 1_767_323_045_000,
        request_id: None,
    };
    store.put_sandbox(&record).unwrap();
}

async fn doctor(server: &Server, bundle: &Path) -> Output {
    let ca = server.folder().join("ca.pem");
    fs_err::write(&ca, server.ca_pem()).unwrap();
    let mut command = Command::new(command_line());
    command
        .args(["doctor", "--bundle"])
        .arg(bundle)
        .env("HOLDFAST_ENDPOINT", format!("https://{}", server.host()))
        .env("HOLDFAST_TOKEN", TOKEN)
        .env("HOLDFAST_CA", ca);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn unpacked(bundle: &Path) -> Vec<(String, String)> {
    let file = fs_err::File::open(bundle).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let read = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        (name, text)
    };
    archive.entries().unwrap().map(read).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_holds_what_helps_and_no_secret_that_was_planted() {
    let server = Server::prepared(plant).await;
    let body = format!(
        r#"{{"image":{{"base":"localhost:1/none"}},
            "registryCredentials":{{"username":"{REGISTRY_USER}","token":"{REGISTRY_TOKEN}"}}}}"#
    );
    let made = server.put(&path::disk_images(&group()), body).await.json();
    let image = path::disk_image(&group(), made["id"].as_str().unwrap());
    while server.get(&image).await.json()["status"]["state"] == "Creating" {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    log::warn!(serial = OF_GUEST, vmm = OF_GUEST; "last words of a planted microVM");
    log::warn!(
        argument = ARGUMENT, header = HEADER, key = KEY, token = KEPT_TOKEN, again = TOKEN;
        "planted {ENVIRONMENT}"
    );

    let bundle = server.folder().join("bundle.tar.gz");
    let output = doctor(&server, &bundle).await;
    // The test's node has no cgroups, which is a check that fails: the bundle is made all the same.
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{printed}{output:?}");
    let files = unpacked(&bundle);
    let text = |name: &str| {
        let found = files.iter().find(|(known, _)| known == name);
        found.map(|(_, text)| text.as_str()).unwrap_or_else(|| panic!("no {name}"))
    };
    let expected = [
        ("about.json", "\"complete\": true"),
        ("doctor.json", "\"mitigations\""),
        ("node.json", "\"kernel\""),
        ("config.toml", "# api.admin_token is set"),
        ("log.txt", "last words of a planted microVM"),
        ("log.txt", "planted (struck out)"),
        ("sandboxes.json", "\"PASSWORD\""),
        ("sandboxes.json", "could not start: sent (struck out) with Bearer (struck out)"),
        ("host.json", "\"kernel-command-line\""),
        ("checks.json", "\"cgroups\""),
        ("status.json", "\"refusals\""),
        ("metrics.txt", "# TYPE holdfast_sandboxes gauge"),
    ];
    for (name, part) in expected {
        assert!(text(name).contains(part), "{name} without {part}:\n{}", text(name));
    }
    for secret in SECRETS {
        for (name, text) in &files {
            assert!(!text.contains(secret), "{secret} in {name}:\n{text}");
        }
        assert!(!printed.contains(secret), "{secret} printed");
    }
}
