//! Files are read and written where a program of the sandbox would find them.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use fs_err as fs;
use holdfast_wire::{
    frame::write_frame,
    guest::{Call, FailureKind, Input, Output, Start},
};

use crate::{
    client::{Client, eventually},
    sandbox::Sandbox,
};

fn write_call(path: &str) -> Call {
    Call::WriteFile { path: path.to_owned(), mode: None, create_dirs: false }
}

#[test]
fn what_is_written_is_read_back_with_its_mode() {
    let sandbox = Sandbox::started();
    let content: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.to_le_bytes()).collect();
    let path = "/new/deep/file".to_owned();
    let call = Call::WriteFile { path, mode: Some(0o750), create_dirs: true };
    sandbox.write(call, &content).unwrap();
    assert!(sandbox.read("/new/deep/file").unwrap() == content);
    let call = Call::ReadFile { path: "/new/deep/file".to_owned() };
    let answer = sandbox.simple(call).unwrap().swap_remove(0);
    assert_eq!(answer, Output::File { size: 4_000_000, mode: 0o750 });
}

#[test]
fn a_replaced_file_keeps_owner_and_mode_and_its_link() {
    let sandbox = Sandbox::started();
    sandbox.shell("echo old > /tmp/f; chown 5:6 /tmp/f; chmod 4701 /tmp/f; ln -s /tmp/f /l");
    sandbox.write(write_call("/l"), b"new").unwrap();
    let file = fs::metadata(sandbox.root().join("tmp/f")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.permissions().mode() & 0o7777), (5, 6, 0o4701));
    assert_eq!(sandbox.shell("readlink /l; cat /tmp/f").stdout, "/tmp/f\nnew");
}

#[test]
fn links_and_dots_stay_inside_the_sandbox() {
    let sandbox = Sandbox::started();
    sandbox.shell("ln -s /etc/passwd /a; ln -s ../../../../../../../etc/passwd /tmp/b");
    let inside = sandbox.read("/etc/passwd").unwrap();
    assert!(inside != fs::read("/etc/passwd").unwrap());
    for path in ["/a", "/tmp/b", "/../../../etc/passwd", "etc/passwd"] {
        assert_eq!(sandbox.read(path).unwrap(), inside, "{path}");
    }
    sandbox.write(write_call("/../../../../escaped"), b"x").unwrap();
    assert!(sandbox.root().join("escaped").exists() && !fs::exists("/escaped").unwrap());
}

#[test]
fn a_file_made_while_it_is_read_is_read_whole() {
    let sandbox = Sandbox::started();
    let status = String::from_utf8(sandbox.read("/proc/1/status").unwrap()).unwrap();
    // Whole: from the first line to one far behind it. Its name may be that of before it renamed
    // itself.
    assert!(status.starts_with("Name:\t") && status.contains("\nPid:\t1\n"), "{status}");
    assert!(status.contains("voluntary_ctxt_switches:"), "{status}");
}

#[test]
fn a_file_on_a_mount_of_the_workloads_own_is_found() {
    let sandbox = Sandbox::started();
    sandbox.shell("mkdir /m; mount -t tmpfs none /m; echo there > /m/f");
    assert_eq!(sandbox.read("/m/f").unwrap(), b"there\n");
}

#[test]
fn what_is_no_file_is_refused_by_kind() {
    let sandbox = Sandbox::started();
    sandbox.shell("mkfifo /tmp/pipe; ln -s loop /loop");
    let cases = [
        ("/missing", FailureKind::NotFound),
        ("/tmp", FailureKind::Invalid),
        ("/tmp/pipe", FailureKind::Invalid),
        ("/dev/zero", FailureKind::Invalid),
        ("/etc/passwd/x", FailureKind::Invalid),
        ("/loop", FailureKind::Invalid),
        ("", FailureKind::Invalid),
        ("/a\0b", FailureKind::Invalid),
    ];
    for (path, kind) in cases {
        let refused = sandbox.read(path).unwrap_err();
        assert_eq!(refused.kind, kind, "read {path:?}: {refused:?}");
    }
    let cases = [
        ("/missing/file", FailureKind::NotFound),
        ("/tmp", FailureKind::Invalid),
        ("/tmp/", FailureKind::Invalid),
        ("/tmp/..", FailureKind::Invalid),
        ("/tmp/pipe", FailureKind::Invalid),
        ("/dev/null", FailureKind::Invalid),
        ("/etc/passwd/x", FailureKind::Invalid),
        ("/", FailureKind::Invalid),
    ];
    for (path, kind) in cases {
        let refused = sandbox.write(write_call(path), b"x").unwrap_err();
        assert_eq!(refused.kind, kind, "write {path:?}: {refused:?}");
    }
}

#[test]
fn a_full_disk_is_told_as_such_and_leaves_nothing() {
    let sandbox = Sandbox::started();
    sandbox.shell("mkdir /small; mount -t tmpfs -o size=64k none /small");
    let refused = sandbox.write(write_call("/small/f"), &vec![1; 1 << 20]).unwrap_err();
    assert_eq!(refused.kind, FailureKind::Exhausted, "{refused:?}");
    assert_eq!(sandbox.shell("ls -A /small").stdout, "");
}

#[test]
fn a_write_cut_short_changes_nothing() {
    let sandbox = Sandbox::started();
    sandbox.shell("mkdir /d; echo old > /d/f");
    let mut stream = sandbox.call(write_call("/d/f"));
    write_frame(&mut stream, &Input::Data(b"half".to_vec())).unwrap();
    eventually("the draft", || sandbox.shell("ls -A /d").stdout.contains("draft"));
    drop(stream);
    eventually("the draft is gone", || sandbox.shell("ls -A /d").stdout == "f\n");
    assert_eq!(sandbox.shell("cat /d/f").stdout, "old\n");
}

#[test]
fn a_volume_is_of_the_disk_itself_unless_the_image_has_content_there() {
    let sandbox = Sandbox::new();
    let volumes = ["/bin", "/var/empty", "/var/lib/new"].map(str::to_owned).to_vec();
    sandbox.start(Start { volumes, ..Start::default() }).unwrap();
    let kinds = sandbox.shell("stat -f -c %t /bin /var/empty /var/lib/new; stat -c %a /var/empty");
    assert_eq!(kinds.stdout, "794c7630\n1021994\n1021994\n755\n", "{}", kinds.stderr);
    let kept =
        sandbox.shell("echo kept > /var/lib/new/note && cat /var/lib/new/note && ls /bin/sh");
    assert_eq!(kept.stdout, "kept\n/bin/sh\n");
}
