//! Every disk image of this node: makes them, finds them, removes them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_jail::CgroupTree;
use holdfast_model::{Digest, DiskImageId, GroupKey, SandboxSpec, Secret, sandbox::ImageSource};
use holdfast_oci::Reference;
use holdfast_store::{DiskImageRecord, DiskImageState, Put, Store, StoreError};
use holdfast_wire::convert::{Failure, FailureKind, Progress};
use log::{info, warn};
use tokio::{
    sync::{RwLock, RwLockReadGuard, Semaphore},
    time::sleep,
};
use tokio_util::task::TaskTracker;

use super::{
    CONVERT_CGROUP_PREFIX, GcError, GcReport, ImageError, Located, PublicImage,
    convert::{Converter, Input},
    flight::{Boarding, Departure, FLIGHTS_MAX, FlightKey, Flights},
    gc, public,
    store::{self, Stores, as_owner},
};
use crate::{
    blocking::off_thread, config::Config, error_chain::error_chain, metrics::Metrics,
    random::random_id, sandbox::now_ms,
};

/// Conversions at once. Each keeps a CPU busy and the disk too: more would only take turns.
const CONVERSIONS_MAX: usize = 2;

/// How often the fill of the disk is looked at.
const WATCH_EVERY: Duration = Duration::from_secs(60);

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub secret: Secret,
}

/// A disk image to be made.
#[derive(Debug, Clone)]
pub struct NewImage {
    pub group: GroupKey,
    /// The image reference, or what an archive is called.
    pub base: String,
    pub labels: BTreeMap<String, String>,
    /// `None`: the image's own.
    pub entrypoint: Option<Vec<String>>,
    /// `None`: the image's own.
    pub cmd: Option<Vec<String>>,
    pub request_id: Option<String>,
}

pub struct Images {
    store: Arc<Store>,
    stores: Stores,
    public: Vec<PublicImage>,
    converter: Converter,
    flights: Mutex<Flights>,
    turns: Semaphore,
    /// Held by whoever is about to write a record that names an image which nothing names yet, for
    /// a moment. Writing: collection, deletion.
    naming: RwLock<()>,
    /// Held by conversions until their records are written. Writing: collection.
    converting: Arc<RwLock<()>>,
    stopping: AtomicBool,
    tasks: TaskTracker,
    gc_above_percent: u8,
    metrics: Arc<Metrics>,
}

impl Images {
    /// Repairs what an earlier agent left, then is ready.
    pub async fn start(
        config: &Config,
        store: Arc<Store>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, ImageError> {
        let paths = &config.paths;
        let images = Arc::new(Self {
            stores: Stores { baked: paths.baked_images.clone(), writable: paths.images() },
            public: public::load(&paths.baked_images).map_err(ImageError::Public)?,
            converter: Converter {
                program: paths.convert.clone(),
                store: paths.images(),
                cgroups: CgroupTree::new(&paths.cgroups),
                plain_http: config.registries.plain_http.clone(),
                runs: AtomicU64::new(0),
            },
            store,
            flights: Mutex::default(),
            turns: Semaphore::new(CONVERSIONS_MAX),
            naming: RwLock::default(),
            converting: Arc::default(),
            stopping: AtomicBool::new(false),
            tasks: TaskTracker::new(),
            gc_above_percent: config.images.gc_above_percent,
            metrics,
        });
        let own = Arc::clone(&images);
        off_thread(move || own.recover()).await?;
        let watched = Arc::downgrade(&images);
        tokio::spawn(async move {
            loop {
                sleep(WATCH_EVERY).await;
                let Some(images) = watched.upgrade() else { return };
                images.collect_if_full().await;
            }
        });
        Ok(images)
    }

    fn recover(&self) -> Result<(), ImageError> {
        let swept = self.converter.cgroups.sweep(|name| name.starts_with(CONVERT_CGROUP_PREFIX));
        if let Err(error) = swept {
            warn!(error:% = error_chain(&error); "conversions left over not ended");
        }
        store::prepare(&self.stores.writable).map_err(ImageError::Folder)?;
        for mut record in self.store.all_disk_images()? {
            if record.state == DiskImageState::Creating {
                record.state = DiskImageState::Failed;
                record.message =
                    Some("the agent was restarted while the image was being made".to_owned());
                record.hint = Some("delete it and make it again".to_owned());
                self.store.put_disk_image(&record)?;
                warn!(id:% = record.id; "disk image lost by a restart of the agent");
            }
        }
        Ok(())
    }

    /// Makes a disk image of an image in a registry, in the background.
    pub async fn create(
        self: &Arc<Self>,
        new: NewImage,
        credentials: Option<Credentials>,
    ) -> Result<DiskImageRecord, ImageError> {
        let reference: Reference = new.base.parse()?;
        let reference = reference.to_string();
        let key = FlightKey { reference: reference.clone(), credentials: credentials.clone() };
        self.accept(new, Some(key), Input::Registry { reference, credentials }).await
    }

    /// Makes a disk image of an OCI or docker archive, in the background. `name` chooses among
    /// several in one archive.
    pub async fn import(
        self: &Arc<Self>,
        new: NewImage,
        archive: fs::File,
        name: Option<String>,
    ) -> Result<DiskImageRecord, ImageError> {
        self.accept(new, None, Input::Archive { file: archive, name }).await
    }

    async fn accept(
        self: &Arc<Self>,
        new: NewImage,
        key: Option<FlightKey>,
        input: Input,
    ) -> Result<DiskImageRecord, ImageError> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(ImageError::Stopping);
        }
        let record = DiskImageRecord {
            id: DiskImageId::from_random(random_id().map_err(ImageError::Random)?),
            group: new.group,
            base: new.base,
            labels: new.labels,
            entrypoint: new.entrypoint,
            cmd: new.cmd,
            state: DiskImageState::Creating,
            message: None,
            hint: None,
            digest: None,
            created_at_ms: now_ms(),
            request_id: new.request_id,
        };
        let (store, stored) = (Arc::clone(&self.store), record.clone());
        match off_thread(move || store.create_disk_image(&stored)).await? {
            Put::New => {}
            Put::Existing(known) => return Ok(known),
        }
        let boarding = self.flights().board(key, record.id.clone());
        match boarding {
            Boarding::Joined => {}
            Boarding::First(departure) => {
                let images = Arc::clone(self);
                self.tasks.spawn(async move { images.fly(departure, input).await });
            }
            Boarding::Full => {
                self.store.remove_disk_image(&record.id)?;
                return Err(ImageError::Busy { max: FLIGHTS_MAX });
            }
        }
        Ok(record)
    }

    /// One conversion, to its records.
    async fn fly(&self, departure: Departure, input: Input) {
        let Departure { number, progress, cancel } = departure;
        let began = Instant::now();
        let _converting = self.converting.read().await;
        let work = async {
            // The semaphore is never closed, and without a turn there is only less order.
            let _turn = self.turns.acquire().await.ok();
            self.convert(input, &progress).await
        };
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = cancel.cancelled() => Err(Failure {
                kind: FailureKind::Internal,
                message: "the agent was stopped while the image was being made".to_owned(),
                hint: "delete it and make it again".to_owned(),
            }),
        };
        self.metrics.converted(outcome.is_ok(), began.elapsed());
        let members = self.flights().land(number);
        for id in members {
            self.finish(&id, outcome.clone()).await;
        }
    }

    async fn convert(
        &self,
        input: Input,
        progress: &tokio::sync::watch::Sender<Progress>,
    ) -> Result<Digest, Failure> {
        let digest = self.converter.run(input, progress).await?;
        // The process says so; the store must say the same.
        let missing = |why: String| Failure {
            kind: FailureKind::Internal,
            message: format!("image {digest} was made and is not in the store: {why}"),
            hint: "see the node's log".to_owned(),
        };
        match self.locate(digest).await {
            Ok(Some(_)) => Ok(digest),
            Ok(None) => Err(missing("no record".to_owned())),
            Err(error) => Err(missing(error_chain(&error))),
        }
    }

    async fn finish(&self, id: &DiskImageId, outcome: Result<Digest, Failure>) {
        match &outcome {
            Ok(digest) => info!(id:%, digest:%; "disk image ready"),
            Err(failure) => {
                warn!(id:%, kind:? = failure.kind, message:% = failure.message; "disk image failed");
            }
        }
        let (store, own) = (Arc::clone(&self.store), id.clone());
        let stored = off_thread(move || {
            store.update_disk_image(&own, |record| match outcome {
                Ok(digest) => {
                    record.state = DiskImageState::Ready;
                    record.digest = Some(digest);
                }
                Err(failure) => {
                    record.state = DiskImageState::Failed;
                    record.message = Some(failure.message);
                    record.hint = Some(failure.hint);
                }
            })
        });
        if let Err(error) = stored.await {
            warn!(id:%, error:% = error_chain(&error); "outcome of a disk image not stored");
        }
    }

    pub fn get(&self, id: &DiskImageId) -> Result<Option<DiskImageRecord>, StoreError> {
        self.store.disk_image(id)
    }

    /// The group's disk images in the order of their ids.
    pub fn list(&self, group: &GroupKey) -> Result<Vec<DiskImageRecord>, StoreError> {
        self.store.disk_images(group)
    }

    /// How far a disk image that is Creating has come.
    pub fn progress(&self, id: &DiskImageId) -> Option<Progress> {
        self.flights().progress(id)
    }

    /// Removes a disk image that no sandbox and no snapshot uses. Its content goes with the next
    /// collection.
    pub async fn delete(&self, id: &DiskImageId) -> Result<(), ImageError> {
        let _alone = self.naming.write().await;
        let made_of =
            |spec: &SandboxSpec| matches!(&spec.image, ImageSource::Disk(own) if own == id);
        let sandboxes = self.store.all_sandboxes()?.into_iter();
        let sandboxes =
            sandboxes.filter(|it| made_of(&it.spec)).map(|it| format!("sandbox {}", it.id));
        let snapshots = self.store.all_snapshots()?.into_iter();
        let snapshots =
            snapshots.filter(|it| made_of(&it.spec)).map(|it| format!("snapshot {}", it.id));
        if let Some(user) = sandboxes.chain(snapshots).next() {
            return Err(ImageError::InUse { id: id.clone(), user });
        }
        let (store, own) = (Arc::clone(&self.store), id.clone());
        let existed = off_thread(move || store.remove_disk_image(&own)).await?;
        self.flights().leave(id);
        if existed { Ok(()) } else { Err(ImageError::NotFound { id: id.clone() }) }
    }

    /// In the order of their names.
    pub fn list_public(&self) -> &[PublicImage] {
        &self.public
    }

    pub fn get_public(&self, name: &str) -> Option<&PublicImage> {
        self.public.iter().find(|image| image.name == name)
    }

    /// The files of an image, if they are on this node.
    pub async fn locate(
        &self,
        digest: Digest,
    ) -> Result<Option<Located>, holdfast_rootfs::StoreError> {
        let stores = self.stores.clone();
        off_thread(move || stores.locate(digest)).await
    }

    /// While this is held, no image is collected and no disk image deleted.
    pub(crate) async fn keep(&self) -> RwLockReadGuard<'_, ()> {
        self.naming.read().await
    }

    /// Removes what no disk image and no sandbox needs. Refused while an image is being made.
    pub async fn gc(&self) -> Result<GcReport, GcError> {
        let _no_conversion = self.converting.try_write().map_err(|_| GcError::Busy)?;
        let _no_naming = self.naming.write().await;
        let (store, writable) = (Arc::clone(&self.store), self.stores.writable.clone());
        let collected = off_thread(move || {
            let keep = gc::referenced(&store)?;
            as_owner(move || gc::collect(&writable, &keep)).map_err(GcError::Owner)?
        });
        let report = collected.await?;
        info!(
            images = report.images, layers = report.layers, blobs = report.blobs,
            bytes = report.bytes; "unreferenced images removed"
        );
        Ok(report)
    }

    async fn collect_if_full(&self) {
        match gc::is_over(&self.stores.writable, self.gc_above_percent) {
            Ok(true) => match self.gc().await {
                // The next look comes soon enough.
                Ok(_) | Err(GcError::Busy) => {}
                Err(error) => {
                    warn!(error:% = error_chain(&error); "images not collected");
                }
            },
            Ok(false) => {}
            Err(error) => warn!(error:%; "cannot measure the image store's disk"),
        }
    }

    /// Ends every conversion. None is begun any more.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.flights().cancel_all();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        // Nothing that holds the lock can panic half way through a change.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
