//! What a command runs as, and how its end is told.

use std::time::{Duration, Instant};

use holdfast_wire::{
    frame::read_frame,
    guest::{Call, Command, Exec, Exited, FailureKind, Input, Output, Start},
};

use crate::{
    client::{Client, argv, eventually, exec, shell},
    sandbox::Sandbox,
};

#[test]
fn stdout_stderr_and_the_exit_code_come_apart() {
    let done = Sandbox::started().shell("echo out; echo err >&2; exit 7");
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(done.exited, Some(Exited::Code(7)));
}

#[test]
fn a_command_is_found_in_path_and_gets_its_words_as_they_are() {
    let done = Sandbox::started().exec(argv(&["printf", "[%s]", "a b", "", "$HOME"])).unwrap();
    assert_eq!(done.stdout, "[a b][][$HOME]");
}

#[test]
fn what_cannot_be_run_is_refused_by_kind() {
    let sandbox = Sandbox::started();
    let as_nobody = Exec { user: Some("nobody-here".to_owned()), ..argv(&["true"]) };
    let nowhere = Exec { cwd: Some("/nowhere".to_owned()), ..argv(&["true"]) };
    let cases = [
        (argv(&["nope"]), FailureKind::NotFound, "nope"),
        (argv(&["/bin/data"]), FailureKind::Denied, "/bin/data"),
        (argv(&["/bin"]), FailureKind::Denied, "/bin"),
        (argv(&[]), FailureKind::Invalid, "no command"),
        (argv(&["true", "a\0b"]), FailureKind::Invalid, "NUL"),
        (as_nobody, FailureKind::NotFound, "nobody-here"),
        (nowhere, FailureKind::NotFound, "/nowhere"),
    ];
    for (exec, kind, name) in cases {
        let refused = sandbox.exec(exec).unwrap_err();
        assert_eq!(refused.kind, kind, "{refused:?}");
        assert!(refused.message.contains(name), "{refused:?}");
    }
}

#[test]
fn an_executable_file_that_is_no_program_is_refused_by_what_the_kernel_says() {
    let sandbox = Sandbox::started();
    sandbox.shell("echo '#!/no/such/interpreter' > /tmp/a; echo junk > /tmp/b; chmod 755 /tmp/*");
    assert_eq!(sandbox.exec(argv(&["/tmp/a"])).unwrap_err().kind, FailureKind::NotFound);
    assert_eq!(sandbox.exec(argv(&["/tmp/b"])).unwrap_err().kind, FailureKind::Denied);
}

#[test]
fn environment_folder_and_user_of_an_exec_replace_the_sandboxs() {
    let sandbox = Sandbox::new();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let env = vec![pair("A", "image"), pair("B", "image")];
    let start = Start { env, cwd: "/made/for/it".to_owned(), ..Start::default() };
    sandbox.start(start).unwrap();
    let script = "echo $A $B $HOME $(pwd) $(id -u):$(id -g) $PATH";
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(
        sandbox.shell(script).stdout,
        format!("image image /root /made/for/it 0:0 {path}\n")
    );
    let exec = Exec {
        env: vec![pair("B", "exec")],
        cwd: Some("/tmp".to_owned()),
        user: Some("web".to_owned()),
        ..shell(script)
    };
    let done = sandbox.exec(exec).unwrap();
    assert_eq!(done.stdout, format!("image exec /home/web /tmp 1000:1000 {path}\n"));
}

#[test]
fn a_user_has_its_groups_and_may_open_its_own_stdout() {
    let exec = Exec {
        user: Some("web".to_owned()),
        ..shell("id -G; echo again > /dev/stdout; cat /etc/shadow /proc/1/environ; true")
    };
    let done = Sandbox::started().exec(exec).unwrap();
    assert_eq!(done.stdout, "1000 2000\nagain\n");
    assert!(done.stderr.contains("Permission denied"), "{}", done.stderr);
}

#[test]
fn the_sandbox_sees_its_own_processes_devices_and_root_only() {
    let sandbox = Sandbox::started();
    let script = "echo $$; cat /proc/1/comm; ls /dev/fd/; [ -c /dev/null ] && \
                  echo x > /dev/null && [ -d /dev/pts ] && cd /.. && ls -d bin root socket 2>&1";
    let done = sandbox.shell(script);
    let lines: Vec<_> = done.stdout.lines().collect();
    assert_eq!(lines[..2], [done.pid.to_string().as_str(), "sandbox-init"], "{done:?}");
    // 3 is the folder that ls itself reads: nothing of PID 1's is left open.
    assert_eq!(lines[2..6], ["0", "1", "2", "3"], "{done:?}");
    assert!(done.stdout.contains("socket: No such file"), "{done:?}");
    assert_eq!(sandbox.shell("cat /proc/self/cgroup | grep ^0").stdout.trim(), "0::/exec-1");
}

#[test]
fn a_signal_reaches_the_whole_group_and_is_told() {
    let sandbox = Sandbox::started();
    let mut running = sandbox.begin(shell("sleep 100 & wait")).unwrap();
    eventually("both processes", || sandbox.process_names().len() == 2);
    running.send(Input::Signal(15));
    assert_eq!(running.finish().unwrap().exited, Some(Exited::Signal(15)));
    eventually("no process is left", || sandbox.process_names().is_empty());
}

#[test]
fn a_time_out_kills_even_what_left_the_session() {
    let sandbox = Sandbox::started();
    let exec = Exec { timeout_ms: Some(300), ..shell("setsid sleep 100 & sleep 100") };
    let began = Instant::now();
    assert_eq!(sandbox.exec(exec).unwrap().exited, Some(Exited::TimedOut));
    assert!(began.elapsed() >= Duration::from_millis(300));
    eventually("no process is left", || sandbox.process_names().is_empty());
}

#[test]
fn a_time_that_is_over_before_the_program_runs_is_a_time_out_too() {
    let sandbox = Sandbox::started();
    let exec = Exec { timeout_ms: Some(0), ..shell("sleep 100") };
    assert_eq!(sandbox.exec(exec).unwrap().exited, Some(Exited::TimedOut));
    eventually("no process is left", || sandbox.process_names().is_empty());
}

#[test]
fn the_longest_time_out_is_no_time_out() {
    let exec = Exec { timeout_ms: Some(u64::MAX), ..argv(&["true"]) };
    assert_eq!(Sandbox::started().exec(exec).unwrap().exited, Some(Exited::Code(0)));
}

#[test]
fn a_closed_connection_kills_the_command_and_its_children() {
    let sandbox = Sandbox::started();
    let running = sandbox.begin(shell("setsid sleep 100 & sleep 100")).unwrap();
    let sleeps = || sandbox.process_names().iter().filter(|name| *name == "sleep").count();
    eventually("the processes", || sleeps() == 2);
    drop(running);
    eventually("no process is left", || sandbox.process_names().is_empty());
}

#[test]
fn children_in_the_background_live_on_and_do_not_hold_the_answer_up() {
    let sandbox = Sandbox::started();
    let began = Instant::now();
    let done = sandbox.shell("sleep 100 & echo started");
    assert_eq!((done.stdout.as_str(), done.exited), ("started\n", Some(Exited::Code(0))));
    assert!(began.elapsed() < Duration::from_secs(30), "waited for the background");
    assert_eq!(sandbox.process_names(), ["sleep"]);
}

#[test]
fn orphans_are_reaped() {
    let sandbox = Sandbox::started();
    sandbox.shell("for i in 1 2 3 4 5; do (sleep 0.1 &) ; done");
    eventually("no process is left, not even a zombie", || sandbox.process_names().is_empty());
}

#[test]
fn an_exec_may_run_the_images_entrypoint_with_its_words_or_others() {
    let sandbox = Sandbox::new();
    let entrypoint = vec!["printf".to_owned(), "<%s>".to_owned()];
    let cmd = vec!["own".to_owned()];
    sandbox.start(Start { entrypoint, cmd, ..Start::default() }).unwrap();
    let done = sandbox.exec(exec(Command::Entrypoint(vec!["x".to_owned()]))).unwrap();
    assert_eq!(done.stdout, "<x>");
    let done = sandbox.exec(exec(Command::Entrypoint(Vec::new()))).unwrap();
    assert_eq!(done.stdout, "<own>");
}

#[test]
fn calls_out_of_turn_and_nonsense_are_refused() {
    let sandbox = Sandbox::new();
    let early = sandbox.exec(argv(&["true"])).unwrap_err();
    assert_eq!(early.kind, FailureKind::WrongState);
    sandbox.start(Start::default()).unwrap();
    let again = sandbox.start(Start::default()).unwrap_err();
    assert_eq!(again.kind, FailureKind::WrongState);
    let mut stream = sandbox.connect();
    std::io::Write::write_all(&mut stream, &[4, 0, 0, 0, 255, 255, 255, 255]).unwrap();
    let answer = read_frame(&mut stream).unwrap();
    assert!(
        matches!(answer, Some(Output::Failed(failure)) if failure.kind == FailureKind::Invalid)
    );
}

#[test]
fn one_connection_too_many_is_told_so_and_the_others_go_on() {
    let sandbox = Sandbox::started();
    let mut held: Vec<_> = (0..128).map(|_| sandbox.connect()).collect();
    let refused = || sandbox.simple(Call::Info).unwrap_err().kind;
    assert_eq!(refused(), FailureKind::Exhausted);
    held.truncate(64);
    eventually("room again", || sandbox.simple(Call::Info).is_ok());
}
