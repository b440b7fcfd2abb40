//! Execs that outlive their connection: replay, gaps, input that goes on, and their end.

use std::os::unix::net::UnixStream;

use holdfast_wire::{
    frame::{read_frame, write_frame},
    guest::{Call, Exec, ExecKey, Exited, FailureKind, Input, Keep, Output, REPLAY_BYTES_MIN},
};

use crate::{
    client::{Client, eventually, shell},
    sandbox::Sandbox,
};

/// Longer than any test.
const LONG_MS: u32 = 600_000;

const REPLAY: u64 = REPLAY_BYTES_MIN as u64;

fn key(number: u8) -> ExecKey {
    ExecKey([number; 16])
}

fn kept(number: u8, script: &str) -> Exec {
    Exec { keep: Some(Keep { key: key(number), alone_ms_max: LONG_MS }), ..shell(script) }
}

/// The first answer of a started or attached exec.
#[derive(Debug, PartialEq)]
struct Started {
    kept: bool,
    stdin_taken: u64,
}

fn started(stream: &mut UnixStream) -> Started {
    match next(stream) {
        Some(Output::Started { kept, stdin_taken, .. }) => Started { kept, stdin_taken },
        other => panic!("an exec began with {other:?}"),
    }
}

fn begin(sandbox: &Sandbox, exec: Exec) -> UnixStream {
    let mut stream = sandbox.call(Call::Exec(exec));
    assert!(started(&mut stream).kept);
    stream
}

fn attach(sandbox: &Sandbox, number: u8, from: u64) -> UnixStream {
    let mut stream = sandbox.call(Call::Attach { key: key(number), from });
    assert!(started(&mut stream).kept);
    stream
}

fn next(stream: &mut UnixStream) -> Option<Output> {
    read_frame(stream).unwrap()
}

fn send(stream: &mut UnixStream, input: Input) {
    write_frame(stream, &input).unwrap();
}

/// What came up to the end, which is collected.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    gap: u64,
    output: Vec<u8>,
    exited: Option<Exited>,
}

fn hear(stream: &mut UnixStream) -> Heard {
    let mut heard = Heard::default();
    while heard.exited.is_none() {
        match next(stream).expect("the end of the exec") {
            Output::Stdout(bytes) | Output::Stderr(bytes) => heard.output.extend(bytes),
            Output::Gap { bytes } => heard.gap += bytes,
            Output::Exited(exited) => heard.exited = Some(exited),
            Output::Taken { .. } => {}
            other => panic!("an exec said {other:?}"),
        }
    }
    send(stream, Input::Collect);
    assert_eq!(next(stream), None, "a collected exec closes the connection");
    heard
}

fn refusal(sandbox: &Sandbox, call: Call) -> FailureKind {
    sandbox.simple(call).unwrap_err().kind
}

#[test]
fn a_kept_exec_goes_on_without_its_connection_and_is_heard_from_any_byte_on() {
    let sandbox = Sandbox::started();
    let script = "echo one; echo two >&2; until [ -e /tmp/go ]; do sleep 0.05; done; echo three";
    let mut stream = begin(&sandbox, kept(1, script));
    let mut before = Vec::new();
    while before.len() < 8 {
        match next(&mut stream) {
            Some(Output::Stdout(bytes) | Output::Stderr(bytes)) => before.extend(bytes),
            other => panic!("{other:?}"),
        }
    }
    drop(stream);
    // Both streams are there in the order in which they were read.
    let mut stream = attach(&sandbox, 1, 0);
    let again = [next(&mut stream).unwrap(), next(&mut stream).unwrap()];
    let bytes = again.iter().map(|output| match output {
        Output::Stdout(bytes) | Output::Stderr(bytes) => bytes.clone(),
        other => panic!("{other:?}"),
    });
    assert_eq!(bytes.collect::<Vec<_>>().concat(), before);
    drop(stream);
    sandbox.shell("touch /tmp/go");
    let heard = hear(&mut attach(&sandbox, 1, 4));
    assert_eq!(heard.output[..4], before[4..]);
    assert_eq!((heard.gap, &heard.output[4..]), (0, &b"three\n"[..]));
    assert_eq!(heard.exited, Some(Exited::Code(0)));
}

#[test]
fn alone_a_command_is_not_held_up_and_what_was_overwritten_is_counted() {
    let sandbox = Sandbox::started();
    let script = "sleep 0.1; head -c 3145728 /dev/zero; touch /tmp/done; echo end";
    drop(begin(&sandbox, kept(1, script)));
    eventually("the command is through", || sandbox.shell("ls /tmp").stdout == "done\n");
    eventually("the command has ended", || sandbox.process_names().is_empty());
    let heard = hear(&mut attach(&sandbox, 1, 100));
    assert_eq!(heard.exited, Some(Exited::Code(0)));
    assert_eq!(heard.gap, 3 * 1024 * 1024 + 4 - REPLAY - 100);
    assert_eq!(heard.output.len(), REPLAY_BYTES_MIN);
    assert!(heard.output.ends_with(b"\0\0end\n"));
}

#[test]
fn a_reader_that_is_there_and_slow_holds_the_command_up() {
    let sandbox = Sandbox::started();
    let script = "head -c 8388608 /dev/zero; touch /tmp/done";
    let mut stream = begin(&sandbox, kept(1, script));
    eventually("it writes", || sandbox.process_names().contains(&"head".to_owned()));
    // It cannot be through: nobody holds eight megabytes.
    assert_eq!(sandbox.shell("ls /tmp").stdout, "");
    let heard = hear(&mut stream);
    assert_eq!((heard.gap, heard.output.len()), (0, 8 << 20));
}

#[test]
fn input_goes_on_where_the_lost_connection_left_it() {
    let sandbox = Sandbox::started();
    let mut stream = begin(&sandbox, Exec { stdin: true, ..kept(1, "cat") });
    send(&mut stream, Input::Data(b"abc".to_vec()));
    let mut taken = 0;
    while taken < 3 {
        match next(&mut stream).unwrap() {
            Output::Taken { stdin } => taken = stdin,
            Output::Stdout(_) => {}
            other => panic!("{other:?}"),
        }
    }
    drop(stream);
    let mut stream = sandbox.call(Call::Attach { key: key(1), from: 0 });
    assert_eq!(started(&mut stream), Started { kept: true, stdin_taken: 3 });
    send(&mut stream, Input::Data(b"def".to_vec()));
    send(&mut stream, Input::End);
    let heard = hear(&mut stream);
    assert_eq!((heard.output.as_slice(), heard.exited), (&b"abcdef"[..], Some(Exited::Code(0))));
}

#[test]
fn signals_reach_an_attached_command_and_kill_takes_all_of_it() {
    let sandbox = Sandbox::started();
    drop(begin(&sandbox, kept(1, "sleep 100")));
    let mut stream = attach(&sandbox, 1, 0);
    send(&mut stream, Input::Signal(15));
    assert_eq!(hear(&mut stream).exited, Some(Exited::Signal(15)));

    drop(begin(&sandbox, kept(2, "setsid sleep 100 & sleep 100")));
    eventually("the processes", || sandbox.process_names().len() >= 2);
    let mut stream = attach(&sandbox, 2, 0);
    send(&mut stream, Input::Kill);
    assert_eq!(hear(&mut stream).exited, Some(Exited::Signal(9)));
    eventually("no process is left", || sandbox.process_names().is_empty());
}

#[test]
fn alone_for_too_long_it_is_killed_and_its_end_is_kept() {
    let sandbox = Sandbox::started();
    let keep = Some(Keep { key: key(1), alone_ms_max: 200 });
    drop(begin(&sandbox, Exec { keep, ..kept(1, "echo said; sleep 100") }));
    eventually("no process is left", || sandbox.process_names().is_empty());
    let heard = hear(&mut attach(&sandbox, 1, 0));
    assert_eq!((heard.output.as_slice(), heard.exited), (&b"said\n"[..], Some(Exited::Signal(9))));
}

#[test]
fn an_end_is_told_until_it_is_collected_and_then_nobody_knows_the_exec() {
    let sandbox = Sandbox::started();
    let mut stream = begin(&sandbox, kept(1, "exit 7"));
    assert_eq!(next(&mut stream), Some(Output::Exited(Exited::Code(7))));
    drop(stream);
    let again = kept(1, "exit 8");
    assert_eq!(refusal(&sandbox, Call::Exec(again.clone())), FailureKind::Exists);
    assert_eq!(hear(&mut attach(&sandbox, 1, 0)).exited, Some(Exited::Code(7)));
    let call = Call::Attach { key: key(1), from: 0 };
    eventually("it is forgotten", || {
        sandbox.simple(call.clone()).err().is_some_and(|e| e.kind == FailureKind::NotFound)
    });
    assert_eq!(hear(&mut begin(&sandbox, again)).exited, Some(Exited::Code(8)));
}

#[test]
fn a_new_connection_replaces_the_old_and_nonsense_ends_only_the_connection() {
    let sandbox = Sandbox::started();
    let mut first = begin(&sandbox, kept(1, "sleep 100"));
    let mut second = attach(&sandbox, 1, 0);
    assert_eq!(next(&mut first), None);
    send(&mut second, Input::Signal(99));
    assert!(
        matches!(next(&mut second), Some(Output::Failed(failure)) if failure.kind == FailureKind::Invalid)
    );
    let beyond = Call::Attach { key: key(1), from: 1 };
    assert_eq!(refusal(&sandbox, beyond), FailureKind::Invalid);
    let mut third = attach(&sandbox, 1, 0);
    send(&mut third, Input::Kill);
    assert_eq!(hear(&mut third).exited, Some(Exited::Signal(9)));
}

#[test]
fn one_too_many_is_told_that_it_is_not_kept_and_dies_with_its_connection() {
    let sandbox = Sandbox::started();
    let mut held = Vec::new();
    let last = loop {
        let number = u8::try_from(held.len()).unwrap();
        let mut stream = sandbox.call(Call::Exec(kept(number, "sleep 100")));
        if !started(&mut stream).kept {
            break stream;
        }
        held.push(stream);
        assert!(held.len() <= 32, "as many as are wanted are kept");
    };
    assert!(held.len() >= 8, "{} are kept", held.len());
    eventually("all run", || sandbox.process_names().len() == held.len() + 1);
    drop(last);
    eventually("one is gone", || sandbox.process_names().len() == held.len());
    // One that ended makes room.
    let ended = held.remove(0);
    let mut ended = {
        drop(ended);
        attach(&sandbox, 0, 0)
    };
    send(&mut ended, Input::Kill);
    assert_eq!(next(&mut ended), Some(Output::Exited(Exited::Signal(9))));
    let mut stream = sandbox.call(Call::Exec(kept(200, "true")));
    assert!(started(&mut stream).kept);
    let call = Call::Attach { key: key(0), from: 0 };
    assert_eq!(refusal(&sandbox, call), FailureKind::NotFound);
}
