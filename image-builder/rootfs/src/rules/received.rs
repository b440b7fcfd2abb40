//! The bytes as received: digests, compression, ends, and what is kept when something is wrong.

use std::io::{self, Read, Write};

use flate2::{Compression as Level, write::GzEncoder};
use fs_err as fs;
use tempfile::TempDir;

use super::{archive::Archive, chain, convert_within, describe, files_in, fresh_store, sha256};
use crate::{Compression, Fault, LayerDescriptor, LayerError, Limits, convert_layer};

fn tar() -> Vec<u8> {
    let noise: Vec<u8> =
        (0..300_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1]).collect();
    Archive::new().file("a", "x").file("noise", noise).end()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn convert(received: &[u8], layer: &LayerDescriptor) -> Result<TempDir, LayerError> {
    let store = fresh_store();
    let converted = convert_layer(store.path(), received, layer, &Limits::default(), &mut |_| {});
    if converted.is_err() {
        assert_eq!(files_in(&store.path().join("layers")), Vec::<String>::new());
        assert_eq!(files_in(&store.path().join("tmp")), Vec::<String>::new());
    }
    converted.map(|_| store)
}

/// Both files of the one layer in a store.
fn stored(store: &TempDir, tar: &[u8]) -> [Vec<u8>; 2] {
    let layers = store.path().join("layers");
    ["data", "tree"].map(|e| fs::read(layers.join(format!("{}.{e}", sha256(tar).hex()))).unwrap())
}

#[test]
fn a_layer_is_the_same_however_it_was_compressed_and_cut_into_members() {
    let tar = tar();
    let (one, two) = tar.split_at(100_000);
    let plain = stored(&convert(&tar, &describe(&tar, &tar)).unwrap(), &tar);
    let received = [
        gzip(&tar),
        [gzip(one), gzip(two)].concat(),
        [gzip(one), gzip(b""), gzip(two)].concat(),
        zstd(&tar),
        [zstd(one), zstd(two)].concat(),
    ];
    for (case, received) in received.iter().enumerate() {
        let store = convert(received, &describe(received, &tar)).unwrap();
        assert!(stored(&store, &tar) == plain, "case {case} differs");
    }
}

#[test]
fn compressed_bytes_cut_anywhere_are_refused_even_when_the_digest_fits() {
    let tar = tar();
    for received in [gzip(&tar), zstd(&tar), [gzip(&tar), gzip(b"")].concat()] {
        for cut in [1, 5, 100, received.len() / 2, received.len() - 9, received.len() - 1] {
            let cut = &received[..cut];
            let mut layer = describe(cut, &tar);
            let known = if received[0] == 0x1f { Compression::Gzip } else { Compression::Zstd };
            layer.compression = known;
            let error = convert(cut, &layer).unwrap_err();
            assert!(matches!(error, LayerError::Compression { .. }), "{}", chain(&error));
        }
    }
}

#[test]
fn bytes_after_the_compressed_ones_are_refused() {
    let tar = tar();
    for compressed in [gzip(&tar), zstd(&tar)] {
        let received = [&compressed[..], b"more"].concat();
        let error = convert(&received, &describe(&received, &tar)).unwrap_err();
        assert!(matches!(error, LayerError::Compression { .. }), "{}", chain(&error));
    }
}

#[test]
fn received_bytes_that_are_not_what_the_digest_says_are_refused_for_that() {
    let tar = tar();
    let good = gzip(&tar);
    let mut bad = good.clone();
    bad[1000] ^= 1;
    let error = convert(&bad, &describe(&good, &tar)).unwrap_err();
    let expected = format!(
        "layer {} is not what its digest says: the bytes have digest {}",
        sha256(&good),
        sha256(&bad)
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(error.fault(), Fault::Image);
}

#[test]
fn fewer_or_more_bytes_than_the_descriptor_says_are_refused_for_that() {
    let tar = tar();
    let good = gzip(&tar);
    let short = convert(&good[..good.len() - 1], &describe(&good, &tar)).unwrap_err();
    assert!(matches!(short, LayerError::Size { .. }), "{}", chain(&short));
    let long = [&good[..], &[0; 10]].concat();
    let long = convert(&long, &describe(&good, &tar)).unwrap_err();
    assert!(matches!(long, LayerError::Size { .. }), "{}", chain(&long));
}

#[test]
fn a_tar_that_is_not_what_the_config_says_is_refused() {
    let tar = tar();
    let mut layer = describe(&tar, &tar);
    layer.diff_id = sha256(b"another");
    let error = convert(&tar, &layer).unwrap_err();
    let (expected, found) = (sha256(b"another"), sha256(&tar));
    assert_eq!(
        error.to_string(),
        format!("layer {found} uncompresses to {found}, but the image's config says {expected}")
    );
}

#[test]
fn a_reader_that_fails_is_not_taken_for_a_bad_image() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(io::ErrorKind::ConnectionReset, "the line went dead"))
        }
    }
    let tar = tar();
    let whole = gzip(&tar);
    let store = fresh_store();
    let reader = whole[..5000].chain(Broken);
    let layer = describe(&whole, &tar);
    let error =
        convert_layer(store.path(), reader, &layer, &Limits::default(), &mut |_| {}).unwrap_err();
    assert_eq!(error.fault(), Fault::Source);
    assert!(chain(&error).ends_with("the line went dead"), "{}", chain(&error));
}

#[test]
fn progress_counts_the_bytes_received() {
    let tar = tar();
    let received = gzip(&tar);
    let store = fresh_store();
    let mut seen = Vec::new();
    let layer = describe(&received, &tar);
    convert_layer(store.path(), &received[..], &layer, &Limits::default(), &mut |n| seen.push(n))
        .unwrap();
    assert!(seen.is_sorted());
    assert_eq!(seen.last(), Some(&(received.len() as u64)));
}

#[test]
fn a_layer_that_is_here_is_not_read_again_unless_it_is_damaged() {
    let tar = tar();
    let store = fresh_store();
    let first = convert_within(store.path(), &tar, &Limits::default()).unwrap();
    let layer = describe(&tar, &tar);
    let again = |reader: &[u8]| {
        convert_layer(store.path(), reader, &layer, &Limits::default(), &mut |_| {})
    };
    assert_eq!(again(b"").unwrap(), first);
    let tree = store.path().join(format!("layers/{}.tree", layer.diff_id.hex()));
    let whole = fs::read(&tree).unwrap();
    fs::write(&tree, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(again(b"").unwrap_err(), LayerError::Size { .. }));
    assert_eq!(again(&tar).unwrap(), first);
    assert_eq!(fs::read(&tree).unwrap(), whole);
}

#[test]
fn of_many_that_want_one_layer_one_reads_it_and_the_others_wait() {
    struct Counted<'a>(&'a [u8], &'a std::sync::atomic::AtomicU64);
    impl Read for Counted<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(into)?;
            self.1.fetch_add(read as u64, std::sync::atomic::Ordering::Relaxed);
            Ok(read)
        }
    }
    let tar = tar();
    let store = fresh_store();
    let read = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let layer = describe(&tar, &tar);
                let reader = Counted(&tar, &read);
                convert_layer(store.path(), reader, &layer, &Limits::default(), &mut |_| {})
                    .unwrap();
            });
        }
    });
    assert_eq!(read.into_inner(), tar.len() as u64);
    assert_eq!(files_in(&store.path().join("tmp")), Vec::<String>::new());
}
