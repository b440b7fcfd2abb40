//! Images in folders and archives, in every form that tools write.

mod support;

use std::{os::fd::AsRawFd, path::Path, process::Command};

use fs_err as fs;
use holdfast_wire::convert::{FailureKind, Source};
use support::{
    Outcome, Store, at,
    image::{Layout, damage, diff_ids},
    layout, tool,
};

/// Hands an archive over as the agent does: open, on an inherited descriptor.
fn convert_archive(store: &Store, path: &Path, name: Option<&str>) -> Outcome {
    let file = fs::File::open(path).unwrap();
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    store.convert(Source::Archive { fd: file.as_raw_fd(), name: name.map(str::to_owned) })
}

#[test]
fn a_layout_becomes_an_image_with_its_settings_and_nothing_else_is_left() {
    let (image, store) = (Layout::new(), Store::new());
    let outcome = store.convert(layout(&image.path(), Some("v1")));
    let digest = outcome.digest();
    assert_eq!(digest, image.digest());
    let record = store.record(&digest);
    assert_eq!(record.layers, diff_ids(&image.image()));
    assert_eq!(record.architecture, "amd64");
    assert_eq!(record.settings.cmd, ["/bin/sh"]);
    assert_eq!(record.settings.user.as_deref(), Some("7:8"));
    assert!(record.settings.env.contains(&"A=b".to_owned()), "{:?}", record.settings.env);
    for segment in &record.segments {
        let file = fs::metadata(store.path().join(&segment.path)).unwrap();
        assert_eq!(file.len(), segment.bytes, "{}", segment.path);
    }
    // Manifest and config are kept, packed layers are not.
    assert_eq!(store.names("blobs/sha256").len(), 2);
    store.assert_tidy();
}

#[test]
fn every_packing_and_archive_form_gives_the_same_layers() {
    let image = Layout::new();
    let expected = diff_ids(&image.image());
    let store = Store::new();
    store.convert(layout(&image.path(), None)).digest();
    let layers = store.names("layers");
    let zstd = ["--dest-compress", "--dest-compress-format", "zstd"];
    let zstd = image.copy(&zstd, "oci", "zstd:v1");
    let plain = image.copy(&["--dest-decompress"], "oci", "plain:v1");
    for folder in [&zstd, &plain] {
        let own = Store::new();
        let digest = own.convert(layout(folder, None)).digest();
        assert_eq!(own.record(&digest).layers, expected, "{}", folder.display());
        assert_eq!(own.names("layers"), layers, "{}", folder.display());
    }
    let packed = image.copy(&[], "oci-archive", "oci.tar:v1");
    assert_eq!(convert_archive(&store, &packed, Some("v1")).digest(), image.digest());
    let saved = image.copy(&[], "docker-archive", "docker.tar:registry.example/app:1");
    let digest = convert_archive(&store, &saved, Some("registry.example/app:1")).digest();
    assert_eq!(store.record(&digest).layers, expected);
    assert_eq!(store.record(&digest).settings, store.record(&image.digest()).settings);
    // All of them share the layers.
    assert_eq!(store.names("layers"), layers);
    store.assert_tidy();
}

#[test]
fn a_docker_archive_has_the_config_and_layers_that_skopeo_sees_in_it() {
    let (image, store) = (Layout::new(), Store::new());
    let saved = image.copy(&[], "docker-archive", "docker.tar:app:1");
    let digest = convert_archive(&store, &saved, None).digest();
    let seen = format!("docker-archive:{}", saved.display());
    assert_eq!(store.record(&digest).layers, diff_ids(&seen));
    let kept = fs::read(store.path().join("blobs/sha256").join(digest.hex())).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&kept).unwrap();
    let raw: serde_json::Value =
        serde_json::from_str(&tool("skopeo", &["inspect", "--raw", &seen])).unwrap();
    assert_eq!(manifest["config"]["digest"], raw["config"]["digest"]);
    for (ours, theirs) in
        manifest["layers"].as_array().unwrap().iter().zip(raw["layers"].as_array().unwrap())
    {
        assert_eq!((&ours["digest"], &ours["size"]), (&theirs["digest"], &theirs["size"]));
    }
    // The same archive has the same digest anywhere.
    assert_eq!(convert_archive(&Store::new(), &saved, None).digest(), digest);
}

#[test]
fn a_docker_archive_with_layers_in_folders_and_links_between_them_is_read() {
    let (image, store) = (Layout::new(), Store::new());
    let saved = image.copy(&[], "docker-archive", "docker.tar:app:1");
    let folder = tempfile::tempdir().unwrap();
    tool("tar", &["-C", &at(folder.path(), ""), "-xf", &saved.display().to_string()]);
    let path = folder.path().join("manifest.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (number, layer) in manifest[0]["Layers"].as_array_mut().unwrap().iter_mut().enumerate() {
        let name = format!("{number}/layer.tar");
        fs::create_dir(folder.path().join(number.to_string())).unwrap();
        let link = format!("../{}", layer.as_str().unwrap());
        std::os::unix::fs::symlink(link, folder.path().join(&name)).unwrap();
        *layer = name.into();
    }
    fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    let again = at(folder.path(), "../again.tar");
    let again = format!("{again}-{}", std::process::id());
    tool("tar", &["-C", &at(folder.path(), ""), "-cf", &again, "."]);
    let outcome = convert_archive(&store, Path::new(&again), Some("app:1"));
    fs::remove_file(&again).unwrap();
    assert_eq!(store.record(&outcome.digest()).layers, diff_ids(&image.image()));
}

#[test]
fn of_an_index_the_image_of_the_platform_is_taken() {
    let (image, store) = (Layout::new().with_index(), Store::new());
    let digest = store.convert(layout(&image.path(), Some("multi"))).digest();
    assert_eq!(store.record(&digest).architecture, "amd64");
    let arm = store.start_for("linux/arm64", layout(&image.path(), None)).outcome().digest();
    assert_eq!(store.record(&arm).architecture, "arm64");
    assert_ne!(digest, arm);
    let outcome = store.start_for("linux/riscv64", layout(&image.path(), None)).outcome();
    let failure = outcome.failure(FailureKind::BadImage, "linux/riscv64");
    assert!(failure.message.contains("linux/arm64, linux/amd64"), "{failure:?}");
}

#[test]
fn an_image_that_is_here_is_answered_at_once_even_if_its_layers_are_gone() {
    let (image, store) = (Layout::new(), Store::new());
    let digest = store.convert(layout(&image.path(), None)).digest();
    fs::remove_file(image.blob(&image.layer(0))).unwrap();
    assert_eq!(store.convert(layout(&image.path(), None)).digest(), digest);
}

#[test]
fn a_damaged_or_truncated_layer_is_refused_by_name_and_leaves_nothing() {
    let image = Layout::new();
    let layer = image.blob(&image.layer(1));
    let whole = fs::read(&layer).unwrap();
    let store = Store::new();
    damage(&layer);
    let name = image.layer(1).to_string();
    store.convert(layout(&image.path(), None)).failure(FailureKind::BadImage, &name);
    fs::write(&layer, &whole[..whole.len() / 2]).unwrap();
    store.convert(layout(&image.path(), None)).failure(FailureKind::BadImage, &name);
    fs::remove_file(&layer).unwrap();
    store
        .convert(layout(&image.path(), None))
        .failure(FailureKind::NotFound, &image.layer(1).hex());
    store.assert_tidy();
    assert!(store.names("images").is_empty());
    fs::write(&layer, &whole).unwrap();
    store.convert(layout(&image.path(), None)).digest();
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    let (image, store, folder) = (Layout::new(), Store::new(), tempfile::tempdir().unwrap());
    let absent = folder.path().join("absent");
    store
        .convert(layout(&absent, None))
        .failure(FailureKind::NotFound, &absent.display().to_string());
    store.convert(layout(&image.path(), Some("v2"))).failure(FailureKind::NotFound, "v2");
    let archive = folder.path().join("archive");
    for (bytes, kind, names) in [
        (&b"not a tar archive, whatever its name says"[..], FailureKind::BadImage, "the archive"),
        (&[0x1f; 2000][..], FailureKind::BadImage, "the archive"),
        (&[0; 1024][..], FailureKind::NotFound, "manifest.json"),
    ] {
        fs::write(&archive, bytes).unwrap();
        convert_archive(&store, &archive, None).failure(kind, names);
    }
    store.convert(Source::Archive { fd: 777, name: None }).failure(FailureKind::Internal, "777");
    store.assert_tidy();
}

#[test]
fn a_full_disk_is_said_with_what_to_do_and_nothing_half_made_stays() {
    let (image, folder) = (Layout::new(), tempfile::tempdir().unwrap());
    // A file system too small for the layers, in a mount namespace that ends with the command.
    let script = r#"mount -t tmpfs -o size=1m tmpfs "$1" || exit 9
        "$2" --store "$1" --layout "$3"; code=$?
        find "$1/tmp" "$1/layers" "$1/images" -type f; exit $code"#;
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(folder.path())
        .arg(env!("CARGO_BIN_EXE_holdfast-convert"))
        .arg(image.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("No space left") && stderr.contains("hint: free space"), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
}

#[test]
fn by_hand_it_prints_the_digest_and_lists_the_image() {
    let (image, store) = (Layout::new(), Store::new());
    let run = |arguments: &[&str]| {
        let program = env!("CARGO_BIN_EXE_holdfast-convert");
        Command::new(program).args(arguments).output().unwrap()
    };
    let (folder, path) = (at(store.path(), ""), image.path().display().to_string());
    let arguments = ["--store", &folder, "--layout", &path, "--public", "debian"];
    let output = run(&[&arguments[..], &["--description", "trixie"]].concat());
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", image.digest()));
    let list = fs::read(store.path().join("public.json")).unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    let digest = image.digest().to_string();
    let expected =
        serde_json::json!([{ "name": "debian", "digest": digest, "description": "trixie" }]);
    assert_eq!(list, expected);
    let output = run(&["--store", &folder, "--registry", "r.io/../x"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr.contains(r#"error: image reference "r.io/../x""#), "{stderr}");
    assert!(stderr.contains("hint: write the image as"), "{stderr}");
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    assert!(help.contains("--store <DIR>") && help.contains("--plain-http"), "{help}");
    assert_eq!(run(&["--store", &folder]).status.code(), Some(2));
}
