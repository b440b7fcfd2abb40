//! From the boot to the power-off.

use holdfast_wire::{
    frame::read_frame,
    guest::{Call, Exited, Input, Output},
};

use crate::{
    client::{Client, argv, eventually, shell},
    machine::Disks,
};

#[test]
fn a_booted_machine_runs_commands_in_the_joined_root() {
    let machine = Disks::make().start(128);
    let info = machine.info();
    println!("ready_us: {}", info.ready_ns / 1000);
    println!("memory_available_kib: {}", info.memory_available_bytes / 1024);
    assert!(info.disk_total_bytes > 100 << 20, "{info:?}");
    let done = machine.shell("uname -s; hostname; cat /folder/deep/file; echo oops >&2; exit 7");
    assert_eq!(done.stdout, "Linux\nbox\nfrom the image\n");
    assert_eq!((done.stderr.as_str(), done.exited), ("oops\n", Some(Exited::Code(7))));
}

#[test]
fn the_root_is_an_overlay_with_the_pinned_options_and_the_world_is_complete() {
    let machine = Disks::make().start(128);
    let mounts = machine.shell("cat /proc/mounts").stdout;
    for pair in [
        "/ overlay",
        "/proc proc",
        "/sys sysfs",
        "/dev tmpfs",
        "/dev/pts devpts",
        "/dev/shm tmpfs",
        "/dev/mqueue mqueue",
        "/sys/fs/cgroup cgroup2",
    ] {
        assert!(mounts.contains(pair), "{pair} is missing in\n{mounts}");
    }
    let root = mounts.lines().find(|line| line.contains("/ overlay")).unwrap();
    assert!(!root.contains("redirect_dir=on") && !root.contains("metacopy=on"), "{root}");
    let script = "mv /folder /renamed && cat /renamed/deep/file && ip addr show lo && \
                  ls -d /image /disk /cgroup /sandbox /init; grep -c . /proc/self/cgroup";
    let done = machine.shell(script);
    assert!(done.stdout.starts_with("from the image\n"), "{done:?}");
    assert!(done.stdout.contains("127.0.0.1/8"), "{done:?}");
    assert_eq!(done.stderr.matches("No such file").count(), 5, "{done:?}");
}

#[test]
fn no_server_of_the_scheduler_wakes_an_idle_guest() {
    let machine = Disks::make().start(128);
    // What is not turned off has some milliseconds there.
    let script = "mkdir /debug && mount -t debugfs debugfs /debug && \
                  cat /debug/sched/fair_server/cpu*/runtime";
    let done = machine.shell(script);
    assert_eq!(done.stdout, "0\n", "{done:?}");
}

#[test]
fn what_was_written_is_there_after_a_power_off_and_a_boot() {
    let disks = Disks::make();
    let machine = disks.start(128);
    let call = Call::WriteFile { path: "/kept".to_owned(), mode: None, create_dirs: false };
    machine.write(call, b"kept").unwrap();
    machine.shell("rm /folder/deep/file; sleep 1000 & :");
    assert!(machine.power_off().success(), "the VMM did not see a power-off");
    let machine = disks.start(128);
    assert_eq!(machine.read("/kept").unwrap(), b"kept");
    assert_eq!(machine.shell("ls -A /folder/deep").stdout, "");
    assert!(machine.power_off().success());
}

#[test]
fn thirty_megabytes_pass_over_vsock_whole() {
    let machine = Disks::make().start(128);
    let mut running = machine.begin(shell("head -c 31457280 /dev/zero")).unwrap();
    let mut bytes = 0;
    while let Some(output) = read_frame(&mut running.stream).unwrap() {
        match output {
            Output::Stdout(piece) => bytes += piece.len(),
            Output::Exited(exited) => assert_eq!(exited, Exited::Code(0)),
            other => panic!("an exec said {other:?}"),
        }
    }
    assert_eq!(bytes, 30 << 20);
}

#[test]
fn a_signal_over_vsock_ends_a_command() {
    let machine = Disks::make().start(128);
    let mut running = machine.begin(argv(&["sleep", "100"])).unwrap();
    eventually("it runs", || machine.process_names() == ["sleep"]);
    running.send(Input::Signal(15));
    let done = running.finish().unwrap();
    assert!(done.pid > 1, "{done:?}");
    assert_eq!(done.exited, Some(Exited::Signal(15)));
}

#[test]
fn a_closed_connection_is_seen_over_vsock() {
    let machine = Disks::make().start(128);
    drop(machine.begin(shell("sleep 100 & sleep 100")).unwrap());
    eventually("no process is left", || machine.process_names().is_empty());
}
