//! A real image and one with every oddity on top of it, mounted by the kernel and compared file by
//! file with what umoci makes of the same layers. Needs root, loop devices and what
//! `scripts/setup` installs.

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/archive.rs"]
mod archive;
#[path = "support/layout.rs"]
mod layout;
#[path = "support/survey.rs"]
mod survey;

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    process::Command,
};

use archive::Archive;
use fs_err as fs;
use holdfast_model::Digest;
use holdfast_rootfs::{
    Compression, Fault, LayerDescriptor, Limits, Segment, convert_layer, load_record,
};
use sha2::{Digest as _, Sha256};
use survey::{Mounted, differences, survey};
use tempfile::TempDir;

#[test]
fn a_real_image_with_every_oddity_mounts_as_umoci_unpacks_it() {
    let work = TempDir::new().unwrap();
    let layout = layout_with(work.path(), &oddities());
    let store = work.path().join("store");
    fs::create_dir(&store).unwrap();
    let record = layout::convert(&layout, &store);
    assert_eq!(load_record(&store, &record.digest).unwrap().as_ref(), Some(&record));
    let disk = disk_of(&store, &record.segments, work.path());
    run("fsck.erofs", [disk.as_os_str()]);
    let mounted = Mounted::new(&disk, work.path().join("mounted"));
    let ours = survey(mounted.folder());
    drop(mounted);

    let bundle = work.path().join("bundle");
    let image = format!("{}:odd", layout.display());
    run("umoci", ["unpack", "--image", &image, bundle.to_str().unwrap()].map(OsStr::new));
    let theirs = survey(&bundle.join("rootfs"));

    assert!(ours.len() > 10_000, "only {} files", ours.len());
    let differences = differences(&theirs, &ours);
    assert!(differences.is_empty(), "umoci - and + ours:\n{}", differences.join("\n"));
    for path in ["/odd/sparse", "/odd/\\xff\\xfe", "/odd/capable", "/odd/lower-link"] {
        assert!(ours.contains_key(path), "{path} is missing");
    }
}

#[test]
fn a_full_disk_is_told_from_a_bad_image_and_nothing_half_made_stays() {
    let work = TempDir::new().unwrap();
    let store = work.path().join("store");
    fs::create_dir(&store).unwrap();
    let small = ["-t", "tmpfs", "-o", "size=2m", "small", store.to_str().unwrap()];
    run("mount", small.map(OsStr::new));
    let _mounted = Mounted::at(store.clone());
    let tar = Archive::new().file("large", vec![b'x'; 4 << 20]).end();
    let sha256 = Digest::from_sha256(Sha256::digest(&tar).into());
    let layer = LayerDescriptor {
        digest: sha256,
        size: tar.len() as u64,
        diff_id: sha256,
        compression: Compression::Detect,
    };
    let error = convert_layer(&store, &tar[..], &layer, &Limits::default(), &mut |_| {});
    let error = error.unwrap_err();
    assert_eq!(error.fault(), Fault::NoSpace, "{error}");
    assert!(error.hint().starts_with("free space"), "{}", error.hint());
    for folder in ["layers", "tmp"] {
        assert_eq!(fs::read_dir(store.join(folder)).unwrap().count(), 0, "in {folder}");
    }
}

/// A layer of what archives can hold, as far as umoci agrees on its meaning. What it does not, or
/// refuses, is among the unit tests.
fn oddities() -> Vec<u8> {
    let deep = (0..8).map(|n| format!("{n}{}", "n".repeat(98))).collect::<Vec<_>>().join("/");
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let sparse = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "odd/sparse"),
        ("GNU.sparse.realsize", "52428800"),
    ];
    let mut sparse_data = b"3\n0\n5\n8190\n4\n52428799\n1\n".to_vec();
    sparse_data.resize(512, 0);
    sparse_data.extend(b"abcdefghij");
    let many = (0..3000).fold(Archive::new().folder("odd").folder("odd/many"), |tar, n| {
        tar.file(format!("odd/many/file-{n:05}"), format!("{n}"))
    });
    // umoci gives parents that are left out the time of its run.
    let parents = deep.match_indices('/').map(|(at, _)| &deep[..at]).chain([&deep[..]]);
    let many = parents
        .fold(many, |tar, parent| tar.pax(&[("path", format!("odd/{parent}"))]).folder("short"));
    many.file("odd/empty", "")
        .file("odd/a block", [b'x'; 4096])
        .file("odd/more than a block", [b'y'; 4097])
        .file(b"odd/\xff\xfe", "not text")
        .file("odd/a\nb", "newline")
        .pax(&[("SCHILY.xattr.security.capability", capability)])
        .file("odd/capable", "x")
        .pax(&[("SCHILY.xattr.user.a", &[b'v'; 3000][..]), ("SCHILY.xattr.user.b", b"w\n=\0")])
        .file("odd/attributes", "x")
        .pax(&[("SCHILY.xattr.user.folder", "yes")])
        .folder("odd/folder with attributes")
        .pax(&[("SCHILY.xattr.user.many", [b'v'; 4000])])
        .folder("odd/folder with attributes that fill a block")
        .pax(&[("uid", "3000000000"), ("gid", "4000000000"), ("mtime", "1234567890.123456789")])
        .file("odd/far owner", "x")
        .pax(&[("mtime", "-86400")])
        .file("odd/before 1970", "x")
        .pax(&[("path", format!("odd/{deep}/file"))])
        .file("short", "deep")
        .gnu_long(b'L', format!("odd/{deep}/gnu"))
        .file("short", "deep")
        .pax(&[("linkpath", "t".repeat(4000))])
        .symlink("odd/long target", "short")
        .symlink("odd/symlink", "../../outside")
        .hard_link("odd/second name", "odd/a block")
        .hard_link("odd/lower-link", "usr/bin/python-again")
        .hard_link("odd/symlink again", "odd/symlink")
        .device(b'3', "odd/character", 10, 200)
        .device(b'4', "odd/block", 259, 70_000)
        .header(b'6', "odd/fifo", 0, |header| header.set_mode(0o4640))
        .header(b'0', "odd/set-id", 0, |header| header.set_mode(0o6755))
        .header(b'5', "odd/sticky", 0, |header| header.set_mode(0o1777))
        .pax(&sparse)
        .file("GNUSparseFile.0/sparse", sparse_data)
        .file("odd/twice", "first")
        .file("odd/twice", "last")
        .file("etc/.wh.debian_version", "")
        .file("usr/lib/python3/.wh..wh..opq", "")
        .folder("usr/lib/python3")
        .file("usr/lib/python3/new", "alone")
        .hard_link("var/.wh.opt", "var/lib")
        .end()
}

/// The real image's layout with one more image, `odd`: the real one and `last` on top.
fn layout_with(work: &Path, last: &[u8]) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/test-image");
    let made = Command::new(script).stderr(std::process::Stdio::inherit()).output().unwrap();
    assert!(made.status.success(), "the test image could not be made");
    let original = String::from_utf8(made.stdout).unwrap();
    let layout = work.join("layout");
    run("cp", ["-r", original.trim(), layout.to_str().unwrap()].map(OsStr::new));
    let tar = work.join("last.tar");
    fs::write(&tar, last).unwrap();
    let image = format!("{}:test", layout.display());
    let tar = tar.to_str().unwrap();
    run("umoci", ["raw", "add-layer", "--image", &image, "--tag", "odd", tar].map(OsStr::new));
    layout
}

/// The disk as the VMM shows it, in one file.
fn disk_of(store: &Path, segments: &[Segment], work: &Path) -> PathBuf {
    let path = work.join("disk");
    let mut disk = fs::File::create(&path).unwrap();
    for segment in segments {
        let mut part = fs::File::open(store.join(&segment.path)).unwrap();
        assert_eq!(io::copy(&mut part, &mut disk).unwrap(), segment.bytes);
        assert_eq!(segment.bytes % 4096, 0);
    }
    path
}

fn run<'a>(program: &str, arguments: impl IntoIterator<Item = &'a OsStr>) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} failed: {said}");
}
