//! What a sandbox knows of the outside: its name server and whom it trusts.

use fs_err as fs;
use holdfast_wire::guest::{CA_BYTES_MAX, Call, FailureKind, Network, Output, Start};

use crate::{client::Client, sandbox::Sandbox};

const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const OWN: &str = "/etc/ssl/certs/adc-egress-proxy-ca.crt";

fn network(ca_pem: &str) -> Call {
    Call::Network(Network {
        address: [192, 168, 127, 2].into(),
        prefix_bits: 30,
        gateway: [192, 168, 127, 1].into(),
        ca_pem: ca_pem.to_owned(),
    })
}

/// With files at these paths of its image, and told of its network.
fn sandbox(files: &[(&str, &str)], ca_pem: &str, start: Start) -> Sandbox {
    let sandbox = Sandbox::new();
    for (path, content) in files {
        let path = sandbox.root().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    assert_eq!(sandbox.simple(network(ca_pem)), Ok(vec![Output::Done]));
    sandbox.start(start).unwrap();
    sandbox
}

#[test]
fn programs_find_the_name_server_and_the_certificate_in_the_images_own_bundle() {
    let files = [(BUNDLE, "theirs\n"), ("/etc/resolv.conf", "nameserver 127.0.0.53\n")];
    let sandbox = sandbox(&files, "ours\n", Start::default());
    let said = |script: &str| sandbox.shell(script).stdout;
    assert_eq!(said("cat /etc/resolv.conf"), "nameserver 192.168.127.1\n");
    let bundle = said("cat $SSL_CERT_FILE");
    assert!(bundle.starts_with("theirs\n") && bundle.contains("\nours\n"), "{bundle}");
    assert_eq!(said("cat $NODE_EXTRA_CA_CERTS"), "ours\n");
    assert_eq!(said("cat /usr/local/share/ca-certificates/*.crt"), "ours\n");
    let variables = said(
        "echo $SSL_CERT_FILE $CURL_CA_BUNDLE $REQUESTS_CA_BUNDLE $GIT_SSL_CAINFO \
         $CARGO_HTTP_CAINFO; echo $NODE_EXTRA_CA_CERTS $DENO_CERT",
    );
    assert_eq!(variables, format!("{}\n{OWN} {OWN}\n", [BUNDLE; 5].join(" ")));
}

#[test]
fn a_bundle_is_made_where_there_is_none_and_found_where_a_distribution_has_it() {
    let slim = sandbox(&[], "ours\n", Start::default());
    assert!(slim.shell(&format!("cat {BUNDLE}")).stdout.contains("ours\n"));
    assert_eq!(slim.shell("echo $SSL_CERT_FILE").stdout, format!("{BUNDLE}\n"));

    let other = "/etc/pki/tls/certs/ca-bundle.crt";
    let fedora = sandbox(&[(other, "theirs\n")], "ours\n", Start::default());
    assert_eq!(fedora.shell("echo $SSL_CERT_FILE").stdout, format!("{other}\n"));
    assert!(fedora.shell(&format!("cat {other}")).stdout.contains("ours\n"));
    assert_eq!(fedora.shell(&format!("ls {BUNDLE}")).stdout, "");
}

#[test]
fn the_image_and_the_sandbox_may_say_otherwise() {
    let pair = ("SSL_CERT_FILE".to_owned(), "/mine".to_owned());
    let start = Start { env: vec![pair], ..Start::default() };
    let sandbox = sandbox(&[], "ours\n", start);
    assert_eq!(sandbox.shell("echo $SSL_CERT_FILE").stdout, "/mine\n");
}

#[test]
fn another_certificate_takes_the_place_of_the_one_before_while_the_sandbox_runs() {
    let sandbox = sandbox(&[(BUNDLE, "theirs\n")], "ours\n", Start::default());
    sandbox.shell(&format!("echo added >> {BUNDLE}"));
    sandbox.simple(network("another\n")).unwrap();
    let bundle = sandbox.shell(&format!("cat {BUNDLE}")).stdout;
    assert!(bundle.contains("another\n") && !bundle.contains("ours\n"), "{bundle}");
    assert!(bundle.starts_with("theirs\nadded\n"), "{bundle}");
    assert_eq!(sandbox.shell(&format!("cat {OWN}")).stdout, "another\n");
}

#[test]
fn without_a_certificate_nothing_of_the_image_changes() {
    let sandbox = sandbox(&[(BUNDLE, "theirs\n")], "", Start::default());
    assert_eq!(
        sandbox.shell(&format!("cat {BUNDLE}; ls {OWN}; env")).stdout.lines().next(),
        Some("theirs")
    );
    assert!(!sandbox.shell("env").stdout.contains("CERT"));
    assert!(!sandbox.shell(&format!("ls {OWN}")).stdout.contains("crt"));
}

#[test]
fn an_image_with_other_things_for_its_bundles_starts_all_the_same() {
    let new = Sandbox::new();
    for path in ["etc/ssl/certs/ca-certificates.crt", "etc/ssl/cert.pem"] {
        let path = new.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    }
    fs::create_dir_all(new.root().join("etc/pki/tls/certs/ca-bundle.crt")).unwrap();
    fs::write(new.root().join("usr"), "no folder").unwrap();
    new.simple(network("ours\n")).unwrap();
    new.start(Start::default()).unwrap();
    assert_eq!(new.shell(&format!("cat {OWN}")).stdout, "ours\n");
}

#[test]
fn a_certificate_that_is_too_long_is_refused() {
    let sandbox = Sandbox::started();
    let refused = sandbox.simple(network(&"x".repeat(CA_BYTES_MAX + 1))).unwrap_err();
    assert_eq!(refused.kind, FailureKind::Invalid);
}
