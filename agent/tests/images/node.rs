//! The images' part of an agent, in folders of one test's own.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::Duration,
};

use fs_err as fs;
use holdfast_model::{DiskImageId, GroupKey};
use holdfast_store::{DiskImageRecord, DiskImageState, Store};
use holdfastd::{
    config::Config,
    images::{GcError, Images, NewImage},
    metrics::Metrics,
};

/// Far beyond what anything here takes.
const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Node {
    pub(crate) images: Arc<Images>,
    pub(crate) store: Arc<Store>,
    folder: tempfile::TempDir,
}

pub(crate) fn new_image(base: &str) -> NewImage {
    NewImage {
        group: GroupKey::local_default(),
        base: base.to_owned(),
        labels: Default::default(),
        entrypoint: None,
        cmd: None,
        request_id: None,
    }
}

/// The conversion program, built once: cargo names only the programs of a test's own crate.
fn convert() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let cargo = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "holdfast-convert"])
            .status()
            .unwrap();
        assert!(cargo.success());
        let here = std::env::current_exe().unwrap();
        here.parent().and_then(Path::parent).unwrap().join("holdfast-convert")
    };
    BUILT.get_or_init(build).clone()
}

async fn start_in(folder: &Path) -> (Arc<Images>, Arc<Store>) {
    let mut config = Config::default();
    config.paths.state = folder.join("state");
    config.paths.baked_images = folder.join("baked");
    config.paths.cgroups = folder.join("no-cgroups");
    config.paths.convert = convert();
    fs::create_dir_all(&config.paths.state).unwrap();
    let store = Arc::new(Store::open(&config.paths.state.join("store.redb")).unwrap());
    let metrics = Arc::new(Metrics::new().unwrap());
    (Images::start(&config, Arc::clone(&store), metrics).await.unwrap(), store)
}

impl Node {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // The owner of the image store must be able to come here.
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let (images, store) = start_in(folder.path()).await;
        Self { images, store, folder }
    }

    /// Ends this agent, lets the store be changed, and starts another on what is left.
    pub(crate) async fn restarted_after(self, change: impl FnOnce(&Store)) -> Self {
        let Self { images, store, folder } = self;
        images.stop().await;
        drop(images);
        change(&store);
        assert_eq!(Arc::strong_count(&store), 1, "the earlier agent still has the store");
        drop(store);
        let (images, store) = start_in(folder.path()).await;
        Self { images, store, folder }
    }

    /// Waits until the image is Ready or Failed.
    pub(crate) async fn settled(&self, id: &DiskImageId) -> DiskImageRecord {
        self.until(|| {
            self.store.disk_image(id).unwrap().unwrap().state != DiskImageState::Creating
        })
        .await;
        self.until_gc_may_run().await;
        self.store.disk_image(id).unwrap().unwrap()
    }

    pub(crate) async fn until(&self, condition: impl Fn() -> bool) {
        let met = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LONG, met).await.unwrap();
    }

    /// Collects, as soon as the last conversion has let go.
    pub(crate) async fn until_gc(&self) {
        let collected = async {
            while let Err(error) = self.images.gc().await {
                assert!(matches!(error, GcError::Busy), "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LONG, collected).await.unwrap();
    }

    /// A record is written a moment before its conversion has let go.
    async fn until_gc_may_run(&self) {
        self.until(|| self.conversions() == 0).await;
    }

    /// Process ids of this test's conversions: their store is in its folder.
    fn conversion_pids(&self) -> Vec<String> {
        let me = std::process::id().to_string();
        let parent = |pid: &str| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let rest = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            rest.split(' ').nth(1).map(str::to_owned)
        };
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let mine = |pid: &str| {
            let pipe = format!("/proc/{pid}/fd");
            let in_folder = fs::read_dir(pipe).into_iter().flatten().flatten().any(|fd| {
                fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(self.folder.path()))
            });
            parent(pid).as_deref() == Some(&me)
                && name(pid).trim() == "holdfast-conver"
                && in_folder
        };
        let pids = fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && mine(pid))
            .collect()
    }

    pub(crate) fn conversions(&self) -> usize {
        self.conversion_pids().len()
    }

    pub(crate) fn environment_and_arguments_of_conversions(&self) -> String {
        let files = self
            .conversion_pids()
            .into_iter()
            .flat_map(|pid| ["environ", "cmdline"].map(|file| format!("/proc/{pid}/{file}")));
        files.map(|file| fs::read_to_string(file).unwrap_or_default()).collect()
    }

    /// Every file of the image store that is not a lock.
    pub(crate) fn files_in_store(&self) -> Vec<String> {
        let store = self.folder.path().join("state/images");
        let mut folders = vec![store.clone()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(&store).unwrap().display().to_string();
                if path.is_dir() {
                    folders.push(path);
                } else if !name.ends_with("lock") {
                    files.push(name);
                }
            }
        }
        files
    }
}
