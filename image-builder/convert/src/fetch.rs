//! The thread that downloads, a few layers ahead of the conversion.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::Duration,
};

use holdfast_oci::{ContentStore, Draft, Layer, Registry};
use holdfast_rootfs as rootfs;

use crate::{error::Error, work::Counters};

/// Layers that wait whole for their conversion. It bounds the disk that packed layers take beside
/// the unpacked ones, and the conversion is the faster of the two on most lines.
const LAYERS_AHEAD: usize = 2;

/// How often the one who waits looks whether it still should.
const POLL: Duration = Duration::from_millis(200);

/// Layers as they arrive, in the order they were asked for.
pub(crate) struct Arrivals(Receiver<Result<(Layer, Option<Draft>), Error>>);

/// Starts to fetch. A draft is locked until its layer is converted, so whoever waits for the same
/// layer finds it made. Nobody waits in a circle: converting needs no lock of another layer.
pub(crate) fn fetch(
    registry: Registry,
    store: ContentStore,
    layers: VecDeque<Layer>,
    counters: Arc<Counters>,
) -> Arrivals {
    let (sender, receiver) = mpsc::sync_channel(LAYERS_AHEAD);
    thread::spawn(move || send_all(&registry, &store, layers, &counters, &sender));
    Arrivals(receiver)
}

fn send_all(
    registry: &Registry,
    store: &ContentStore,
    layers: VecDeque<Layer>,
    counters: &Counters,
    sender: &SyncSender<Result<(Layer, Option<Draft>), Error>>,
) {
    for layer in layers {
        let arrival = fetch_one(registry, store, &layer, counters);
        counters.add_bytes(layer.size);
        let failed = arrival.is_err();
        // Nobody listens any more: the conversion has failed.
        if sender.send(arrival.map(|draft| (layer, draft))).is_err() || failed {
            return;
        }
    }
}

/// `None`: somebody else has made the layer meanwhile.
fn fetch_one(
    registry: &Registry,
    store: &ContentStore,
    layer: &Layer,
    counters: &Counters,
) -> Result<Option<Draft>, Error> {
    let mut draft = store.draft(layer.digest)?;
    if rootfs::layer_info(store.root(), &layer.diff_id)?.is_some() {
        draft.discard()?;
        return Ok(None);
    }
    match registry.download(layer, &mut draft, counters.current()) {
        Ok(()) => Ok(Some(draft)),
        Err(error) => {
            // What the registry can still complete stays; on a full disk it would be in the way.
            if !error.is_outage() {
                draft.discard()?;
            }
            Err(error.into())
        }
    }
}

impl Arrivals {
    /// The next layer, with its bytes unless it is made already.
    pub(crate) fn next(&self, counters: &Counters) -> Result<(Layer, Option<Draft>), Error> {
        loop {
            match self.0.recv_timeout(POLL) {
                Ok(arrival) => return arrival,
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Fetcher),
                Err(RecvTimeoutError::Timeout) if counters.gone.load(Ordering::Relaxed) => {
                    return Err(Error::Gone);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Removes what has arrived and will not be used.
    pub(crate) fn discard(&self) {
        for (layer, draft) in self.0.try_iter().flatten() {
            if let Err(error) = draft.map_or(Ok(()), Draft::discard) {
                log::warn!(layer:% = layer.digest, error:%; "draft not removed");
            }
        }
    }
}
