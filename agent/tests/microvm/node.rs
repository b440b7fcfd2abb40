//! A node of its own for one test: folders, a baked image of busybox, registry and images.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use fs_err as fs;
use holdfast_model::{
    Digest, GroupKey, Mib, MilliCpu, Resources, SandboxId, SandboxSpec, State, sandbox::ImageSource,
};
use holdfast_rootfs::{Compression, LayerDescriptor, Limits, Settings, assemble, convert_layer};
use holdfast_store::{SandboxRecord, Store};
use holdfast_wire::guest::{Command, Exec};
use holdfastd::{
    config::{Config, Smt},
    images::Images,
    metrics::Metrics,
    sandbox::{Parts, Registry},
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sha2::{Digest as _, Sha256};

/// Far beyond what a boot takes on an emulated machine under load.
const LONG: Duration = Duration::from_secs(120);

/// For each of those that boot before it.
const EACH: Duration = Duration::from_secs(10);

pub(crate) struct Node {
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Arc<Metrics>,
    config: Config,
    /// `None`: the folder is the caller's.
    _folder: Option<tempfile::TempDir>,
}

pub(crate) fn group() -> GroupKey {
    GroupKey::local_default()
}

/// A sandbox of one CPU. The amounts are not held to the tiers, which is the API's affair.
pub(crate) fn spec(memory_mib: u32) -> SandboxSpec {
    SandboxSpec {
        image: ImageSource::Public("busybox".to_owned()),
        resources: Resources { cpu: MilliCpu(1000), memory: Mib(memory_mib), disk: Mib(1024) },
        labels: Default::default(),
        environment: [("OF_SPEC".to_owned(), "spec".to_owned())].into(),
        entrypoint: None,
        cmd: None,
        lifecycle_json: None,
        egress_json: None,
        skip_egress_proxy: false,
    }
}

/// A command line for a sandbox's shell.
pub(crate) fn shell(script: &str) -> Exec {
    Exec {
        command: Command::Shell(script.to_owned()),
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        timeout_ms: None,
        keep: None,
    }
}

impl Node {
    pub(crate) async fn start() -> Self {
        Self::start_as(|_| ()).await
    }

    /// Starts a node whose configuration is changed first.
    pub(crate) async fn start_as(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config_in(folder.path());
        change(&mut config);
        let node = Self::start_with(config).await;
        Self { _folder: Some(folder), ..node }
    }

    /// Starts an agent's parts in a folder, which an earlier one may have used.
    pub(crate) async fn start_in(folder: PathBuf) -> Self {
        Self::start_with(config_in(&folder)).await
    }

    async fn start_with(config: Config) -> Self {
        let store = Arc::new(Store::open(&config.paths.state.join("store.redb")).unwrap());
        let metrics = Arc::new(Metrics::new().unwrap());
        let images =
            Images::start(&config, Arc::clone(&store), Arc::clone(&metrics)).await.unwrap();
        let parts = Parts { config: &config, store, images, metrics: Arc::clone(&metrics) };
        let registry = Registry::start(parts).await.unwrap();
        Self { registry, metrics, config, _folder: None }
    }

    /// Creates a sandbox and waits until it runs.
    pub(crate) async fn running(&self, spec: SandboxSpec) -> SandboxId {
        let record = self.registry.create(group(), spec, None).await.unwrap();
        let record = self.settled(&record.id, |state| state != State::Creating).await;
        assert_eq!(record.state, State::Running, "{:?}", record.failure);
        record.id
    }

    pub(crate) async fn settled(
        &self,
        id: &SandboxId,
        wanted: impl Fn(State) -> bool,
    ) -> SandboxRecord {
        self.settled_among(id, 1, wanted).await
    }

    /// Waits for one of so many that boot side by side: they take turns, and the last waits for all.
    pub(crate) async fn settled_among(
        &self,
        id: &SandboxId,
        crowd: u32,
        wanted: impl Fn(State) -> bool,
    ) -> SandboxRecord {
        let settled = async {
            loop {
                let record = self.registry.get(id).unwrap().unwrap();
                if wanted(record.state) {
                    return record;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let patience = LONG + crowd * EACH;
        tokio::time::timeout(patience, settled).await.unwrap()
    }

    pub(crate) fn cgroup(&self, id: &SandboxId) -> PathBuf {
        self.config.paths.cgroups.join(id.as_str())
    }

    pub(crate) fn state(&self) -> &Path {
        &self.config.paths.state
    }

    /// What there is of a sandbox on the host.
    pub(crate) fn traces(&self, id: &SandboxId) -> Vec<String> {
        let paths = &self.config.paths;
        [paths.cgroups.clone(), paths.run.join("sandboxes"), paths.state.join("sandboxes")]
            .into_iter()
            .map(|folder| folder.join(id.as_str()))
            .filter(|path| path.exists())
            .map(|path| path.display().to_string())
            .collect()
    }
}

/// The configuration of a node in `folder`, which has a public image `busybox` after this.
pub(crate) fn config_in(folder: &Path) -> Config {
    // The owner of the image store must be able to come here.
    fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
    let program = |name: &str| PathBuf::from(std::env::var(name).unwrap());
    let mut config = Config::default();
    let name = folder.file_name().unwrap().to_str().unwrap();
    config.paths.state = folder.join("state");
    config.paths.run = folder.join("run");
    config.paths.cgroups = format!("/sys/fs/cgroup/holdfast-{name}").into();
    config.paths.baked_images = folder.join("baked");
    config.paths.vmm = program("HOLDFAST_VMM");
    config.paths.shim = program("HOLDFAST_SHIM");
    config.paths.pager = program("HOLDFAST_PAGER");
    config.paths.egress = program("HOLDFAST_EGRESS");
    config.paths.kernel = program("HOLDFAST_VMLINUX");
    config.paths.initramfs = program("HOLDFAST_INITRAMFS");
    // The machine that runs the tests keeps its hardware threads.
    // The L1 may have one CPU, and the tests make several sandboxes of one.
    config.capacity.cpu_factor = 8.0;
    config.host.smt = Smt::Ignore;
    config.capacity.host_memory_mib = 64;
    fs::create_dir_all(&config.paths.state).unwrap();
    if !config.paths.baked_images.exists() {
        bake(&config.paths.baked_images, &program("HOLDFAST_BUSYBOX"));
    }
    config
}

/// Names of busybox in the image.
const NAMES: [&str; 20] = [
    "sh", "cat", "date", "dd", "echo", "head", "hostname", "ifconfig", "md5sum", "mknod", "ping",
    "rm", "sleep", "stat", "sync", "tail", "true", "usleep", "wc", "yes",
];

/// Makes a store with one public image: busybox and its names.
fn bake(store: &Path, busybox: &Path) {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    for folder in ["bin/", "srv/", "tmp/", "proc/", "sys/", "dev/", "etc/", "root/"] {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        layer.append_data(&mut header, folder, std::io::empty()).unwrap();
    }
    let program = fs::read(busybox).unwrap();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(u64::try_from(program.len()).unwrap());
    layer.append_data(&mut header, "bin/busybox", program.as_slice()).unwrap();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    for name in NAMES {
        layer.append_link(&mut header, format!("bin/{name}"), "busybox").unwrap();
    }
    let layer = layer.into_inner().unwrap();
    let diff_id = Digest::from_sha256(Sha256::digest(&layer).into());
    let descriptor = LayerDescriptor {
        digest: diff_id,
        size: u64::try_from(layer.len()).unwrap(),
        diff_id,
        compression: Compression::None,
    };
    convert_layer(store, layer.as_slice(), &descriptor, &Limits::default(), &mut |_| ()).unwrap();
    let settings = Settings {
        env: vec!["PATH=/bin".to_owned(), "OF_IMAGE=image".to_owned()],
        working_dir: Some("/srv".to_owned()),
        ..Settings::default()
    };
    let manifest = Digest::from_sha256([9; 32]);
    assemble(store, &manifest, &[diff_id], settings, "amd64").unwrap();
    let list = format!(r#"[{{"name":"busybox","digest":"{manifest}"}}]"#);
    fs::write(store.join("public.json"), list).unwrap();
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
}

/// Whether there is such a process, and it is no zombie of a killed agent.
pub(crate) fn alive(number: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    test_kill_process(pid(number)).is_ok() && state != Some('Z')
}

pub(crate) fn kill(number: u32) {
    kill_process(pid(number), Signal::KILL).unwrap();
}

/// What a VMM has for itself alone, its guest's changed pages among it.
pub(crate) fn own_kib(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let value = |part: &str| -> u64 {
        let rest = smaps.lines().find_map(|line| line.strip_prefix(part)).unwrap();
        rest.trim().trim_end_matches(" kB").parse().unwrap()
    };
    ["Private_Clean:", "Private_Dirty:"].map(value).iter().sum()
}
