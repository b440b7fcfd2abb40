//! The image's own program, and the end of the sandbox.

use fs_err as fs;
use holdfast_wire::guest::{Call, Exited, FailureKind, Output, Start};

use crate::{
    client::{Client, eventually},
    sandbox::Sandbox,
};

fn start(script: &str) -> Start {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    Start { argv, ..Start::default() }
}

fn log(sandbox: &Sandbox) -> String {
    let outputs = sandbox.simple(Call::Log).unwrap();
    let bytes = outputs.into_iter().flat_map(|output| match output {
        Output::Data(bytes) => bytes,
        _ => Vec::new(),
    });
    String::from_utf8(bytes.collect()).unwrap()
}

fn exited(sandbox: &Sandbox) -> Option<Exited> {
    match sandbox.simple(Call::Info).unwrap().as_slice() {
        [Output::Info(info)] => info.entrypoint_exited,
        other => panic!("info was answered by {other:?}"),
    }
}

#[test]
fn the_entrypoint_runs_and_its_words_and_end_are_kept() {
    let sandbox = Sandbox::new();
    sandbox.start(start("echo one; echo two >&2; read line; exit 3")).unwrap();
    eventually("its end", || exited(&sandbox) == Some(Exited::Code(3)));
    eventually("its words", || log(&sandbox) == "one\ntwo\n");
    assert_eq!(sandbox.shell("echo still here").stdout, "still here\n");
}

#[test]
fn an_entrypoint_that_cannot_run_is_told_and_the_sandbox_serves() {
    let sandbox = Sandbox::new();
    let argv = vec!["no-such-program".to_owned()];
    let refused = sandbox.start(Start { argv, ..Start::default() }).unwrap_err();
    assert_eq!(refused.kind, FailureKind::NotFound);
    assert_eq!(sandbox.shell("echo here").stdout, "here\n");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let wrong = [
        Start { cwd: "relative".to_owned(), ..Start::default() },
        Start { stop_signal: "SIGNOPE".to_owned(), ..Start::default() },
        Start { env: vec![("A=B".to_owned(), String::new())], ..Start::default() },
    ];
    for start in wrong {
        let refused = Sandbox::new().start(start.clone()).unwrap_err();
        assert_eq!(refused.kind, FailureKind::Invalid, "{start:?}");
    }
}

#[test]
fn the_power_off_asks_before_it_kills() {
    let mut sandbox = Sandbox::new();
    let script = "trap 'echo asked > /asked; exit 0' USR1; while :; do sleep 0.05; done";
    let stop_signal = "SIGUSR1".to_owned();
    sandbox.start(Start { stop_signal, ..start(script) }).unwrap();
    eventually("the loop", || sandbox.process_names().contains(&"sleep".to_owned()));
    sandbox.power_off(5000);
    assert_eq!(fs::read_to_string(sandbox.root().join("asked")).unwrap(), "asked\n");
}

#[test]
fn the_power_off_kills_what_does_not_listen() {
    let mut sandbox = Sandbox::new();
    sandbox.start(start("trap '' TERM; while :; do sleep 1; done")).unwrap();
    eventually("the loop", || sandbox.process_names().contains(&"sleep".to_owned()));
    sandbox.power_off(50);
}

#[test]
fn files_that_tell_the_machine_its_name_are_made_where_they_are_missing() {
    let sandbox = Sandbox::started();
    assert!(sandbox.shell("cat /etc/hosts").stdout.contains("127.0.0.1\tlocalhost"));
    assert!(sandbox.shell("cat /etc/resolv.conf").stdout.contains("nameserver"));
}

#[test]
fn an_image_with_a_pipe_for_a_file_does_not_hold_the_start_up() {
    let sandbox = Sandbox::new();
    for name in ["hosts", "hostname", "resolv.conf", "group"] {
        let path = sandbox.root().join("etc").join(name);
        let _ = fs::remove_file(&path);
        let made = std::process::Command::new("mkfifo").arg(path).status().unwrap();
        assert!(made.success());
    }
    sandbox.start(Start::default()).unwrap();
    // Users cannot be looked up in a pipe; whoever runs the command is told so.
    let refused = sandbox.exec(crate::client::argv(&["true"])).unwrap_err();
    assert_eq!(refused.kind, FailureKind::Invalid, "{refused:?}");
}
