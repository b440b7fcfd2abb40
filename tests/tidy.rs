//! Holds the tree to its own rules: which crate may use which, how long a file may be, that every
//! unsafe block argues its case, and that nothing is left unfinished or switched off.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Lines a file must not pass. Most should stay under 300.
const LINES_MAX: usize = 800;
/// Nine files in ten must stay under this.
const LINES_P90: usize = 350;

/// The arrows: a crate and those of ours it may use. `docs/architecture.md` draws the same table.
const ARROWS: &[(&str, &[&str])] = &[
    ("holdfast-model", &[]),
    ("holdfast-wire", &[]),
    ("holdfast-initramfs", &[]),
    ("holdfast-host", &[]),
    ("holdfast-netpolicy", &["holdfast-model"]),
    ("holdfast-api", &["holdfast-model", "holdfast-netpolicy"]),
    ("holdfast-scheduler", &["holdfast-model"]),
    ("holdfast-jail", &["holdfast-model"]),
    ("holdfast-oci", &["holdfast-model"]),
    ("holdfast-rootfs", &["holdfast-model"]),
    ("holdfast-store", &["holdfast-model", "holdfast-netpolicy"]),
    ("holdfast-vmm", &["holdfast-wire"]),
    ("holdfast-guest", &["holdfast-wire"]),
    ("holdfast-convert", &["holdfast-model", "holdfast-wire", "holdfast-oci", "holdfast-rootfs"]),
    ("holdfast", &["holdfast-api"]),
    ("holdfast-harness", &["holdfast-api"]),
    ("holdfast-image", &["holdfast-initramfs"]),
    (
        "holdfastd",
        &[
            "holdfast-model",
            "holdfast-wire",
            "holdfast-netpolicy",
            "holdfast-api",
            "holdfast-scheduler",
            "holdfast-jail",
            "holdfast-oci",
            "holdfast-rootfs",
            "holdfast-store",
        ],
    ),
    ("holdfast-tests", &["holdfast-harness", "holdfast-api"]),
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the tree").to_owned()
}

/// Files git tracks or would track, by their ending.
fn files(ending: &str) -> Vec<PathBuf> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "--",
            &format!("*{ending}"),
        ])
        .current_dir(top())
        .output()
        .expect("git runs");
    assert!(output.status.success(), "git ls-files failed");
    let list = String::from_utf8(output.stdout).expect("file names are UTF-8");
    let files: Vec<_> = list.lines().map(|line| top().join(line)).filter(|f| f.exists()).collect();
    assert!(!files.is_empty(), "git lists no {ending} file");
    files
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs_err::read_to_string(path).expect("a source file is UTF-8");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn no_crate_uses_another_without_an_arrow() {
    let arrows: BTreeMap<_, BTreeSet<_>> =
        ARROWS.iter().map(|(from, to)| (*from, to.iter().copied().collect())).collect();
    let metadata = cargo_metadata::MetadataCommand::new()
        .current_dir(top())
        .no_deps()
        .exec()
        .expect("cargo metadata runs");
    let ours: BTreeSet<_> = metadata.packages.iter().map(|p| p.name.to_string()).collect();
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        let Some(allowed) = arrows.get(package.name.as_str()) else {
            wrong.push(format!("{} has no row", package.name));
            continue;
        };
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            if ours.contains(to) && !allowed.contains(to) {
                wrong.push(format!("{} -> {to}", package.name));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows missing from the table: {wrong:#?}");
}

#[test]
fn files_stay_readable_in_one_sitting() {
    let mut lengths: Vec<_> = files(".rs").into_iter().map(|f| (lines(&f).len(), f)).collect();
    lengths.sort();
    let over: Vec<_> = lengths.iter().filter(|(length, _)| *length > LINES_MAX).collect();
    assert!(over.is_empty(), "over {LINES_MAX} lines: {over:#?}");
    let (p90, file) = &lengths[lengths.len() * 9 / 10];
    assert!(*p90 <= LINES_P90, "the 90th of a hundred files has {p90} lines: {}", file.display());
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let silent: Vec<_> = files(".rs")
        .into_iter()
        .filter(|file| !lines(file).first().is_some_and(|line| line.starts_with("//!")))
        .collect();
    assert!(silent.is_empty(), "files that do not open with //!: {silent:#?}");
}

#[test]
fn every_unsafe_block_argues_its_case_in_a_file_for_it() {
    let mut wrong = Vec::new();
    for file in files(".rs") {
        // This file names the words it looks for.
        if file.ends_with("tests/tidy.rs") {
            continue;
        }
        let lines = lines(&file);
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            let named = file.file_name().is_some_and(|name| name == "sys.rs");
            let above = &lines[number.saturating_sub(8)..number];
            let argued = above.iter().any(|line| line.trim_start().starts_with("// SAFETY:"));
            if !named || !argued {
                wrong.push(format!("{}:{}", file.display(), number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "unsafe outside sys.rs or without a SAFETY comment: {wrong:#?}");
}

#[test]
fn nothing_is_left_unfinished_or_switched_off() {
    let words = ["todo!(", "unimplemented!(", "#[ignore", "FIXME", "XXX"];
    let mut found = Vec::new();
    for file in files(".rs") {
        if file.ends_with("tests/tidy.rs") {
            continue;
        }
        for (number, line) in lines(&file).iter().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{}", file.display(), number + 1));
            }
        }
    }
    assert!(found.is_empty(), "unfinished: {found:#?}");
}

#[test]
fn scripts_say_how_they_are_used_and_stay_short() {
    let folder = top().join("scripts");
    let mut wrong = Vec::new();
    for entry in fs_err::read_dir(folder).expect("scripts/ is there") {
        let path = entry.expect("a folder entry").path();
        if !path.is_file() {
            continue;
        }
        let lines = lines(&path);
        let helps = lines.iter().any(|line| line.contains("--help"));
        if lines.len() > 120 || !helps {
            wrong.push(format!("{} ({} lines, --help: {helps})", path.display(), lines.len()));
        }
    }
    assert!(wrong.is_empty(), "scripts without --help or over 120 lines: {wrong:#?}");
}
