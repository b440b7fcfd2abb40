//! Real children: what they are handed, what they are not, and their end.

use std::{
    io::{Seek, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, Stdio},
};

use holdfast_jail::{Confinement, Handover, Identity, confine};

/// Runs a shell script confined, and gives what it wrote.
fn run(script: impl FnOnce(&mut Handover) -> String, identity: Option<Identity>) -> String {
    let mut handover = Handover::default();
    let script = script(&mut handover);
    let mut command = Command::new("/bin/sh");
    confine(&mut command, Confinement::new(handover, identity));
    let output = command.args(["-c", &script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_child_reads_what_it_was_handed_at_the_number_it_was_told() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"handed over").unwrap();
    file.rewind().unwrap();
    let text = run(
        |handover| {
            let number = handover.give(&file).unwrap();
            format!("cat /proc/self/fd/{number}")
        },
        None,
    );
    assert_eq!(text, "handed over");
}

#[test]
fn a_child_has_no_descriptor_besides_the_standard_ones_and_those_handed_over() {
    // One that survives exec, as a careless library would leave it.
    let leaked = tempfile::tempfile().unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let mut given = 0;
    let text = run(
        |handover| {
            given = handover.give(&leaked).unwrap();
            "ls /proc/$$/fd; true".to_owned()
        },
        None,
    );
    let mut numbers: Vec<i32> = text.lines().map(|line| line.parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1, 2, given]);
}

#[test]
fn a_child_has_an_empty_environment_its_own_group_and_no_way_to_rights_or_core_dumps() {
    let text = run(
        |_| {
            "cat /proc/$$/environ; grep NoNewPrivs /proc/$$/status; \
             read pid rest < /proc/$$/stat; set -- $rest; test $4 = $pid && echo leader; ulimit -c"
                .to_owned()
        },
        None,
    );
    assert_eq!(text, "NoNewPrivs:\t1\nleader\n0\n");
}

#[test]
fn a_child_runs_as_whom_it_is_told_without_supplementary_groups() {
    assert!(rustix::process::geteuid().is_root(), "this test changes users");
    let identity = Identity { uid: 200_017, gid: 200_017 };
    let text =
        run(|_| "grep -E '^(Uid|Gid|Groups|CapEff)' /proc/$$/status".to_owned(), Some(identity));
    let ids = "\t200017\t200017\t200017\t200017\n";
    assert_eq!(text, format!("Uid:{ids}Gid:{ids}Groups:\t \nCapEff:\t0000000000000000\n"));
}

#[test]
fn a_program_that_is_not_there_is_an_error_of_the_spawn() {
    let mut command = Command::new("/nonexistent/vmm");
    confine(&mut command, Confinement::new(Handover::default(), None));
    assert_eq!(command.spawn().unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn the_words_for_an_end_tell_a_code_from_a_signal() {
    let mut child = Command::new("/bin/sleep").arg("60").process_group(0).spawn().unwrap();
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(9));
    assert_eq!(holdfast_jail::in_words(status), "signal 9");
}
