//! Images put together: what the record says, what stays, what may go.

use std::path::Path;

use fs_err as fs;
use holdfast_model::Digest;

use super::{archive::Archive, chain, convert_within, files_in, fresh_store, sha256};
use crate::{
    AssembleError, Collected, ImageRecord, Limits, Settings, StoreError, assemble, collect, erofs,
    hold, layer_info, list_records, load_record, remove_record, sweep_drafts, tree::Tree,
};

fn layer(store: &Path, name: &str) -> Digest {
    let tar = Archive::new().file(name, "x").end();
    convert_within(store, &tar, &Limits::default()).unwrap().diff_id
}

fn image(store: &Path, name: &[u8], layers: &[Digest]) -> ImageRecord {
    let settings = Settings {
        cmd: vec!["sh".to_owned()],
        env: vec!["A=b".to_owned()],
        user: Some("1000:1000".to_owned()),
        ..Settings::default()
    };
    assemble(store, &sha256(name), layers, settings, "amd64").unwrap()
}

#[test]
fn the_record_of_an_image_is_read_back_as_it_was_made() {
    let store = fresh_store();
    let (a, b) = (layer(store.path(), "a"), layer(store.path(), "b"));
    let record = image(store.path(), b"image", &[a, b]);
    assert_eq!(load_record(store.path(), &record.digest).unwrap(), Some(record.clone()));
    assert_eq!(list_records(store.path()).unwrap(), std::slice::from_ref(&record));
    assert_eq!(load_record(store.path(), &sha256(b"another")).unwrap(), None);
    let expected = [
        format!("images/{}.erofs", sha256(b"image").hex()),
        format!("layers/{}.data", a.hex()),
        format!("layers/{}.data", b.hex()),
    ];
    assert!(record.segments.iter().map(|segment| &segment.path).eq(&expected));
    for segment in &record.segments {
        let file = fs::metadata(store.path().join(&segment.path)).unwrap();
        assert_eq!((file.len(), file.len() % 4096), (segment.bytes, 0), "{}", segment.path);
    }
    assert_eq!(record.bytes, record.segments.iter().map(|segment| segment.bytes).sum::<u64>());
    assert_eq!(files_in(&store.path().join("tmp")), Vec::<String>::new());
}

#[test]
fn a_record_has_this_form() {
    let store = fresh_store();
    let a = layer(store.path(), "a");
    let record = image(store.path(), b"image", &[a]);
    let (digest, layer) = (sha256(b"image"), a.hex());
    let expected = serde_json::json!({
        "digest": digest.to_string(),
        "architecture": "amd64",
        "segments": [
            {"path": format!("images/{}.erofs", digest.hex()), "bytes": 8192},
            {"path": format!("layers/{layer}.data"), "bytes": 4096},
        ],
        "layers": [a.to_string()],
        "settings": {
            "entrypoint": [], "cmd": ["sh"], "env": ["A=b"], "workingDir": null,
            "user": "1000:1000", "stopSignal": null, "exposedPorts": [], "volumes": [],
        },
        "bytes": 12288,
    });
    assert_eq!(serde_json::to_value(&record).unwrap(), expected);
}

#[test]
fn layers_without_data_and_layers_met_twice_make_no_segment_of_their_own() {
    let store = fresh_store();
    let a = layer(store.path(), "a");
    let empty = Archive::new().folder("d").end();
    let empty = convert_within(store.path(), &empty, &Limits::default()).unwrap();
    assert_eq!(empty.data_bytes, 0);
    let record = image(store.path(), b"image", &[a, empty.diff_id, a]);
    assert_eq!(record.segments.len(), 2);
    assert_eq!(record.layers, [a, empty.diff_id, a]);
}

#[test]
fn equal_layers_give_equal_bytes_in_any_store_and_in_any_order_of_making() {
    let made = |names: [&str; 2]| {
        let store = fresh_store();
        for name in names {
            layer(store.path(), name);
        }
        let layers = ["a", "b"].map(|name| layer(store.path(), name));
        let record = image(store.path(), b"image", &layers);
        let read = |segment: &crate::Segment| fs::read(store.path().join(&segment.path)).unwrap();
        (record.segments.iter().map(read).collect::<Vec<_>>(), record)
    };
    assert!(made(["a", "b"]) == made(["b", "a"]));
}

#[test]
fn an_image_without_one_of_its_layers_is_not_made() {
    let store = fresh_store();
    let missing = sha256(b"missing");
    let error = assemble(store.path(), &sha256(b"image"), &[missing], Settings::default(), "amd64")
        .unwrap_err();
    assert_eq!(error.to_string(), format!("layer {missing} is not in the store"));
    assert_eq!(error.hint(), "pull the image again: the layer was removed meanwhile");
    assert_eq!(files_in(&store.path().join("images")), Vec::<String>::new());
}

#[test]
fn an_image_larger_than_its_block_numbers_reach_is_refused() {
    let tree = Tree::new();
    let fits = erofs::Image::plan(&tree, &[u64::from(u32::MAX) - 10]);
    assert!(fits.is_ok());
    for blocks in [vec![u64::from(u32::MAX)], vec![1 << 31, 1 << 31], vec![u64::MAX, u64::MAX]] {
        let error = erofs::Image::plan(&tree, &blocks).err().unwrap();
        assert!(matches!(error, AssembleError::TooLarge { .. }), "{}", chain(&error));
    }
}

#[test]
fn a_collection_removes_what_no_record_names_and_nothing_else() {
    let store = fresh_store();
    let path = store.path();
    let [shared, one, other, kept] = ["shared", "one", "other", "kept"].map(|n| layer(path, n));
    let first = image(path, b"first", &[shared, one]);
    let second = image(path, b"second", &[shared, other]);
    assert_eq!(collect(path, &[kept]).unwrap(), Collected::default());
    assert!(remove_record(path, &first.digest).unwrap());
    assert!(!remove_record(path, &first.digest).unwrap());
    let collected = collect(path, &[kept]).unwrap();
    assert_eq!(collected.layers, 1);
    assert!(collected.bytes >= 8192, "{} bytes", collected.bytes);
    let here = |digest| layer_info(path, &digest).unwrap().is_some();
    assert_eq!([shared, one, other, kept].map(here), [true, false, true, true]);
    assert_eq!(list_records(path).unwrap(), [second]);
}

#[test]
fn metadata_that_a_crash_left_without_a_record_is_collected() {
    let store = fresh_store();
    let a = layer(store.path(), "a");
    let record = image(store.path(), b"image", &[a]);
    let images = store.path().join("images");
    fs::remove_file(images.join(format!("{}.json", record.digest.hex()))).unwrap();
    collect(store.path(), &[a]).unwrap();
    assert_eq!(files_in(&images), Vec::<String>::new());
}

#[test]
fn nothing_is_collected_or_swept_while_a_conversion_runs() {
    let store = fresh_store();
    let held = hold(store.path()).unwrap();
    let also = hold(store.path()).unwrap();
    assert!(matches!(collect(store.path(), &[]), Err(StoreError::Busy)));
    assert!(matches!(sweep_drafts(store.path()), Err(StoreError::Busy)));
    drop(held);
    assert!(matches!(collect(store.path(), &[]), Err(StoreError::Busy)));
    drop(also);
    assert_eq!(collect(store.path(), &[]).unwrap(), Collected::default());
}

#[test]
fn a_record_that_cannot_be_read_hides_no_other_and_keeps_everything() {
    let store = fresh_store();
    let a = layer(store.path(), "a");
    let record = image(store.path(), b"image", &[a]);
    let bad = store.path().join(format!("images/{}.json", sha256(b"bad").hex()));
    fs::write(&bad, "{}").unwrap();
    assert!(matches!(
        load_record(store.path(), &sha256(b"bad")),
        Err(StoreError::BadRecord { .. })
    ));
    assert_eq!(list_records(store.path()).unwrap(), std::slice::from_ref(&record));
    assert!(matches!(collect(store.path(), &[]), Err(StoreError::BadRecord { .. })));
    let another = store.path().join(format!("images/{}.json", record.digest.hex()));
    fs::copy(another, &bad).unwrap();
    assert!(matches!(
        load_record(store.path(), &sha256(b"bad")),
        Err(StoreError::WrongRecord { .. })
    ));
}

#[test]
fn what_a_killed_conversion_left_is_written_over_and_swept() {
    let store = fresh_store();
    drop(hold(store.path()).unwrap());
    let tmp = store.path().join("tmp");
    let tar = Archive::new().file("a", "x").end();
    for suffix in ["data", "tree", "lock"] {
        fs::write(tmp.join(format!("{}.{suffix}", sha256(&tar).hex())), [b'g'; 9000]).unwrap();
    }
    let info = convert_within(store.path(), &tar, &Limits::default()).unwrap();
    assert_eq!(info.data_bytes, 4096);
    assert_eq!(files_in(&tmp), Vec::<String>::new());
    fs::write(tmp.join(format!("{}.data", sha256(b"x").hex())), "left").unwrap();
    fs::write(tmp.join("not ours"), "").unwrap();
    sweep_drafts(store.path()).unwrap();
    assert_eq!(files_in(&tmp), ["not ours"]);
}
