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
    ("holdfast-snapshot", &[]),
    ("holdfast-blob", &["holdfast-snapshot"]),
    ("holdfast-jail", &["holdfast-model"]),
    ("holdfast-oci", &["holdfast-model"]),
    ("holdfast-rootfs", &["holdfast-model"]),
    ("holdfast-store", &["holdfast-model", "holdfast-netpolicy"]),
    ("holdfast-nft", &["holdfast-netpolicy"]),
    ("holdfast-vmm", &["holdfast-wire"]),
    ("holdfast-guest", &["holdfast-wire"]),
    ("holdfast-pager", &["holdfast-wire", "holdfast-snapshot"]),
    ("holdfast-egress", &["holdfast-wire", "holdfast-netpolicy"]),
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
            "holdfast-nft",
            "holdfast-snapshot",
            "holdfast-blob",
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

/// Code spans of a document, whole.
fn code_spans(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The folder of each crate of ours, by name.
fn crate_folders() -> BTreeMap<String, PathBuf> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .current_dir(top())
        .no_deps()
        .exec()
        .expect("cargo metadata runs");
    let folder = |path: &Path| path.parent().expect("a manifest lies in a folder").to_owned();
    let of = |package: &cargo_metadata::Package| {
        (package.name.to_string(), folder(package.manifest_path.as_std_path()))
    };
    metadata.packages.iter().map(of).collect()
}

/// Names of the test functions of a crate: not of crates in folders below its own.
fn tests_of(name: &str, folders: &BTreeMap<String, PathBuf>) -> BTreeSet<String> {
    let own = &folders[name];
    let inner: Vec<_> = folders.values().filter(|f| f.starts_with(own) && *f != own).collect();
    let mut tests = BTreeSet::new();
    for file in files(".rs") {
        if !file.starts_with(own) || inner.iter().any(|folder| file.starts_with(folder)) {
            continue;
        }
        let mut marked = false;
        for line in lines(&file) {
            let line = line.trim_start();
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                marked = true;
            } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| marked) {
                tests.insert(rest.split('(').next().unwrap_or_default().to_owned());
                marked = false;
            }
        }
    }
    tests
}

#[test]
fn every_test_that_the_threat_model_or_the_list_of_attacks_names_exists() {
    let read = |name| fs_err::read_to_string(top().join(name)).expect("it is there");
    let text = ["docs/threat-model.md", "docs/egress-attacks.md"].map(read).concat();
    let folders = crate_folders();
    let named: Vec<(&str, &str)> = code_spans(&text)
        .into_iter()
        .filter_map(|span| span.split_once(' '))
        .filter(|(name, _)| folders.contains_key(*name))
        .collect();
    assert!(named.len() > 40, "{} tests named", named.len());
    let tests: BTreeMap<&str, BTreeSet<String>> =
        named.iter().map(|(name, _)| (*name, tests_of(name, &folders))).collect();
    let missing: Vec<_> =
        named.iter().filter(|(name, test)| !tests[name].contains(*test)).collect();
    assert!(
        missing.is_empty(),
        "named in docs/threat-model.md or docs/egress-attacks.md and not in the tree: {missing:#?}"
    );
}

#[test]
fn every_constant_in_the_document_of_limits_has_the_value_it_says() {
    let text = fs_err::read_to_string(top().join("docs/limits.md")).expect("it is there");
    let mut wrong = Vec::new();
    let mut checked = 0;
    for row in text.lines().filter(|line| line.starts_with("| `")) {
        let spans = code_spans(row);
        let [name, file, value, ..] = spans[..] else { continue };
        if !file.ends_with(".rs") {
            continue;
        }
        checked += 1;
        let source = fs_err::read_to_string(top().join(file)).unwrap_or_default();
        let declared = source.split(&format!("const {name}: ")).nth(1);
        let found = declared
            .and_then(|rest| rest.split_once(" = "))
            .and_then(|(_, rest)| rest.split_once(';'))
            .map(|(found, _)| found);
        if found != Some(value) {
            wrong.push(format!("{file}: {name} is {found:?}, not {value:?}"));
        }
    }
    assert!(checked > 30, "{checked} constants checked");
    assert!(wrong.is_empty(), "docs/limits.md says otherwise: {wrong:#?}");
}
