//! One conversion from name to record: find the image, make the layers that are missing, put them
//! together. The record comes last, so an image with a record is whole.

use std::{
    collections::{BTreeSet, VecDeque},
    io::{self, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use holdfast_model::Digest;
use holdfast_oci::{Compression, ContentStore, Layer};
use holdfast_rootfs::{self as rootfs, LayerDescriptor, Limits, StoreError};
use holdfast_wire::convert::Progress;

use crate::{
    error::Error,
    fetch::{Arrivals, fetch},
    job::Job,
    origin::{Local, Origin},
    settings,
};

/// How long a draft nobody writes is kept for another try.
const DRAFT_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// How far the conversion is, for whoever wants to know.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    layers: AtomicU32,
    layers_done: AtomicU32,
    bytes: AtomicU64,
    /// Of layers that are through.
    bytes_done: AtomicU64,
    /// Of the layer that is under way.
    bytes_current: AtomicU64,
    /// Whoever asked is gone: end soon.
    pub(crate) gone: AtomicBool,
}

impl Counters {
    pub(crate) fn progress(&self) -> Progress {
        let (done, current) = (&self.bytes_done, &self.bytes_current);
        let bytes = self.bytes.load(Ordering::Relaxed);
        let bytes_done = done.load(Ordering::Relaxed) + current.load(Ordering::Relaxed);
        Progress {
            layers: self.layers.load(Ordering::Relaxed),
            layers_done: self.layers_done.load(Ordering::Relaxed),
            bytes,
            // The two are not read in one instant.
            bytes_done: bytes_done.min(bytes),
        }
    }

    /// Where the layer under way says how many of its bytes are there.
    pub(crate) fn current(&self) -> &AtomicU64 {
        &self.bytes_current
    }

    /// A layer's bytes are all there.
    pub(crate) fn add_bytes(&self, bytes: u64) {
        self.bytes_current.store(0, Ordering::Relaxed);
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }
}

pub(crate) fn run(job: Job, counters: &Arc<Counters>) -> Result<Digest, Error> {
    let store = ContentStore::open(&job.store)?;
    let _pulling = store.pulling()?;
    let _hold = rootfs::hold(store.root())?;
    if let Some(before) = SystemTime::now().checked_sub(DRAFT_AGE_MAX) {
        store.sweep(before)?;
    }
    let (image, origin) = Origin::find(job, &store)?;
    if is_here(store.root(), &image.digest)? {
        log::info!(image:% = image.digest; "image is here already");
        return Ok(image.digest);
    }
    let settings = settings::of(&image)?;
    let missing = missing(store.root(), &image.layers)?;
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    counters.layers.store(count(image.layers.len()), Ordering::Relaxed);
    counters.layers_done.store(count(image.layers.len() - missing.len()), Ordering::Relaxed);
    counters.bytes.store(missing.iter().map(|layer| layer.size).sum(), Ordering::Relaxed);
    match origin {
        Origin::Local(local) => from_local(&local, store.root(), &missing, counters)?,
        Origin::Remote(registry) => {
            let number = missing.len();
            let arrivals = fetch(*registry, store.clone(), missing, Arc::clone(counters));
            from_registry(&arrivals, store.root(), number, counters)?;
        }
    }
    let layers: Vec<_> = image.layers.iter().map(|layer| layer.diff_id).collect();
    rootfs::assemble(store.root(), &image.digest, &layers, settings, &image.architecture)?;
    log::info!(image:% = image.digest; "image is converted");
    Ok(image.digest)
}

/// A record that cannot be understood is as good as none: the image is made anew.
fn is_here(store: &Path, digest: &Digest) -> Result<bool, Error> {
    match rootfs::load_record(store, digest) {
        Ok(record) => Ok(record.is_some()),
        Err(error @ (StoreError::BadRecord { .. } | StoreError::WrongRecord { .. })) => {
            log::warn!(image:% = digest, error:%; "image record is made anew");
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Layers that are not in the store, each once.
fn missing(store: &Path, layers: &[Layer]) -> Result<VecDeque<Layer>, Error> {
    let mut seen = BTreeSet::new();
    let mut missing = VecDeque::new();
    for layer in layers {
        if seen.insert(layer.digest) && rootfs::layer_info(store, &layer.diff_id)?.is_none() {
            missing.push_back(layer.clone());
        }
    }
    Ok(missing)
}

/// Layers that lie in a folder or archive are read from there, once: their digest is checked while
/// they are converted, and no copy of the packed bytes is made.
fn from_local(
    local: &Local,
    store: &Path,
    layers: &VecDeque<Layer>,
    counters: &Counters,
) -> Result<(), Error> {
    for layer in layers {
        let reader = local.layer(layer)?;
        let current = counters.current();
        convert(store, reader, layer, counters, &mut |bytes| {
            current.store(bytes, Ordering::Relaxed);
        })?;
        counters.add_bytes(layer.size);
    }
    Ok(())
}

/// Each layer's packed bytes go as soon as it is converted. They would take another third of the
/// disk for a push alone, which can fetch or make them again; what a running machine reads is the
/// layer's data. Manifest and config stay, so the image can be found while its registry is down.
fn from_registry(
    arrivals: &Arrivals,
    store: &Path,
    number: usize,
    counters: &Counters,
) -> Result<(), Error> {
    for _ in 0..number {
        let (layer, draft) = arrivals.next(counters)?;
        let Some(mut draft) = draft else {
            counters.layers_done.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let made = draft
            .reader()
            .map_err(Error::from)
            .and_then(|reader| convert(store, reader, &layer, counters, &mut |_| {}));
        // Good or bad, another try would not need these bytes.
        draft.discard()?;
        if let Err(error) = made {
            // Above all on a full disk, layers that wait must not stay for nothing. One that is
            // under way stays as a draft: another try goes on with it, or sweeps it.
            arrivals.discard();
            return Err(error);
        }
    }
    Ok(())
}

/// Ends the reading when nobody waits for the outcome any more.
struct Watched<'a, R> {
    reader: R,
    gone: &'a AtomicBool,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.gone.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::BrokenPipe.into()),
            false => self.reader.read(buffer),
        }
    }
}

fn convert(
    store: &Path,
    reader: impl Read,
    layer: &Layer,
    counters: &Counters,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let descriptor = LayerDescriptor {
        digest: layer.digest,
        size: layer.size,
        diff_id: layer.diff_id,
        compression: match layer.compression {
            Compression::Plain => rootfs::Compression::None,
            Compression::Gzip => rootfs::Compression::Gzip,
            Compression::Zstd => rootfs::Compression::Zstd,
        },
    };
    let reader = Watched { reader, gone: &counters.gone };
    rootfs::convert_layer(store, reader, &descriptor, &Limits::default(), progress)?;
    counters.layers_done.fetch_add(1, Ordering::Relaxed);
    Ok(())
}
