//! Streams of any size pass, at the speed of whoever is slower.

use holdfast_wire::{
    frame::read_frame,
    guest::{Exec, Exited, Input, Output},
};

use crate::{
    client::{Client, argv, eventually, shell},
    sandbox::Sandbox,
};

/// Resident memory of this process in bytes: PID 1's part runs in it.
fn resident_bytes() -> u64 {
    let statm = fs_err::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_hundred_megabytes_pass_whole_and_are_never_held() {
    const BYTES: usize = 100 << 20;
    let sandbox = Sandbox::started();
    let exec = shell("head -c 104857600 /dev/zero; echo done >&2");
    let mut running = sandbox.begin(exec).unwrap();
    // While nothing is read the command must wait, not be buffered.
    eventually("head waits for a reader", || sandbox.process_names().contains(&"head".to_owned()));
    let before = resident_bytes();
    let (mut stdout, mut stderr, mut exited) = (0, Vec::new(), None);
    let mut peak = before;
    while let Some(output) = read_frame(&mut running.stream).unwrap() {
        match output {
            Output::Stdout(bytes) => stdout += bytes.len(),
            Output::Stderr(bytes) => stderr.extend(bytes),
            Output::Exited(how) => exited = Some(how),
            other => panic!("an exec said {other:?}"),
        }
        peak = peak.max(resident_bytes());
    }
    assert_eq!((stdout, stderr.as_slice()), (BYTES, b"done\n".as_slice()));
    assert_eq!(exited, Some(Exited::Code(0)));
    // Other tests run in this process too; the output itself would show.
    assert!(peak - before < 50 << 20, "{} bytes more than before", peak - before);
}

#[test]
fn the_last_words_of_a_command_reach_a_slow_host() {
    let sandbox = Sandbox::started();
    let mut running = sandbox.begin(shell("head -c 200000 /dev/zero; sleep 100 &")).unwrap();
    eventually("only the background is left", || sandbox.process_names() == ["sleep"]);
    let mut stdout = 0;
    while let Some(output) = read_frame(&mut running.stream).unwrap() {
        if let Output::Stdout(bytes) = output {
            stdout += bytes.len();
        }
    }
    assert_eq!(stdout, 200_000);
}

#[test]
fn input_is_passed_on_and_its_end_is_seen() {
    let sandbox = Sandbox::started();
    let mut running = sandbox.begin(Exec { stdin: true, ..argv(&["md5sum"]) }).unwrap();
    for _ in 0..64 {
        running.send(Input::Data(vec![b'x'; 50_000]));
    }
    running.send(Input::End);
    let done = running.finish().unwrap();
    assert_eq!(done.exited, Some(Exited::Code(0)));
    let expected = sandbox.shell("head -c 3200000 /dev/zero | tr '\\0' x | md5sum").stdout;
    assert_eq!(done.stdout, expected);
}

#[test]
fn input_that_nobody_reads_neither_blocks_nor_fails() {
    let sandbox = Sandbox::started();
    let mut running = sandbox.begin(Exec { stdin: true, ..shell("exec <&-; sleep 0.2") }).unwrap();
    running.send(Input::Data(vec![b'x'; 50_000]));
    running.send(Input::End);
    assert_eq!(running.finish().unwrap().exited, Some(Exited::Code(0)));
    let mut running = sandbox.begin(argv(&["sleep", "0.2"])).unwrap();
    running.send(Input::Data(b"no stdin was asked for".to_vec()));
    assert_eq!(running.finish().unwrap().exited, Some(Exited::Code(0)));
}

#[test]
fn without_stdin_a_reader_sees_the_end_at_once() {
    let done = Sandbox::started().exec(argv(&["cat"])).unwrap();
    assert_eq!((done.stdout.as_str(), done.exited), ("", Some(Exited::Code(0))));
}

#[test]
fn many_commands_run_side_by_side() {
    let sandbox = Sandbox::started();
    let running: Vec<_> = (0..20)
        .map(|number| sandbox.begin(shell(&format!("sleep 0.1; echo {number}"))).unwrap())
        .collect();
    for (number, running) in running.into_iter().enumerate() {
        assert_eq!(running.finish().unwrap().stdout, format!("{number}\n"));
    }
}
