//! The one configuration of the daemon, from one TOML file. Defaults live here only; every key is
//! described in `docs/config.md`, which a test holds against this file.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use fs_err as fs;
use holdfast_blob::{BadLocation, Location, Secrets};
use holdfast_model::Secret;
use holdfast_netpolicy::Cidr;
use holdfast_wire::egress::{self, ProxyKind, UpstreamProxy};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::{
    egress::{EGRESS_OWN_UIDS, parse_resolver},
    tls::host_name,
};

/// Where the configuration is looked for when no `--config` is given. A missing file means
/// defaults.
pub const DEFAULT_PATH: &str = "/var/lib/holdfast/config.toml";

/// Shortest admin token taken from the configuration: shorter ones can be guessed.
const ADMIN_TOKEN_BYTES_MIN: usize = 16;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub api: Api,
    pub paths: Paths,
    pub capacity: Capacity,
    pub host: Host,
    pub registries: Registries,
    pub images: Images,
    pub snapshots: Snapshots,
    pub remote: Remote,
    pub egress: Egress,
    pub identity: Identity,
    pub limits: Limits,
}

/// The public listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    pub listen: SocketAddr,
    /// Names and addresses added to the node's certificate besides the ones found on the node.
    pub server_names: Vec<String>,
    /// `None`: one is made at first boot and left in `admin-token` in the state folder.
    #[serde(skip_serializing)]
    pub admin_token: Option<Secret>,
}

/// Folders and programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    pub state: PathBuf,
    pub run: PathBuf,
    /// Cgroup that holds a sub-cgroup per sandbox; made if it is missing.
    pub cgroups: PathBuf,
    /// Read-only image store that came with the host image; may be missing.
    pub baked_images: PathBuf,
    pub vmm: PathBuf,
    /// The tiny parent of each VMM.
    pub shim: PathBuf,
    pub convert: PathBuf,
    /// Fills guest memory of cold resumes.
    pub pager: PathBuf,
    /// What carries sandboxes' connections on, one a group.
    pub egress: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// What the scheduler may give away, as factors of what the node has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capacity {
    pub memory_factor: f64,
    pub cpu_factor: f64,
    /// MiB of memory kept for the host itself.
    pub host_memory_mib: u32,
}

/// How the host keeps sandboxes from each other's traces in its hardware.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    pub smt: Smt,
}

/// What runs on the other hardware threads of a core while a guest runs on one of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Smt {
    /// The same sandbox, or nothing. Closes the way between sandboxes at the price of idle threads.
    /// No sandbox starts on a kernel that cannot do it, and Debian's cannot.
    CoreScheduling,
    /// Nothing ever: the agent switches the threads off at its start. The default: it works on
    /// every kernel, and closes the way to the host's kernel too.
    #[default]
    Off,
    /// Whatever the kernel puts there.
    Ignore,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registries {
    /// `host[:port]` spoken to over plain http; loopback ones always may be.
    pub plain_http: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Images {
    /// Percent of the state file system in use above which unreferenced images are removed. 0 turns
    /// this off.
    pub gc_above_percent: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snapshots {
    /// MiB of memory files, from which sandboxes go on at once. 0 is a quarter of the file system.
    pub hot_mib: u32,
    /// Booted guests kept for later sandboxes of the same image and size. 0: every one boots.
    pub templates_max: u32,
    /// Whether guests drop clean pages of files before they are saved: less is stored, and the first
    /// commands after a resume read their programs from the disk again.
    pub drop_caches: bool,
}

/// The object store that snapshots are kept in besides the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Remote {
    /// `s3://BUCKET/PREFIX` or `azure://ACCOUNT/CONTAINER/PREFIX`. Empty: there is none.
    pub url: String,
    /// Who serves it. Empty: the vendor.
    pub endpoint: String,
    pub region: String,
    pub key_id: String,
    #[serde(skip_serializing)]
    pub key: Option<Secret>,
    /// 64 hex digits, the same on each node of a site: keys of groups come from it.
    #[serde(skip_serializing)]
    pub site_key: Option<Secret>,
    /// Names of the groups whose snapshots go there; `*` is all.
    pub groups: Vec<String>,
    /// MiB a second of uploads. 0 is no limit.
    pub upload_mib_per_second: u32,
}

/// How what sandboxes' policies allow goes out, and how much of it one may have at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// Name servers that are asked, `ADDRESS` or `ADDRESS:PORT`. Empty: the host's own.
    pub resolvers: Vec<String>,
    /// Roots that servers outside may be verified by, besides the host's: PEM, or the path of a file
    /// of it. Empty: none.
    pub extra_roots: String,
    /// `http://`, `https://` or `socks5://`, then `USER:PASSWORD@` if need be, `HOST:PORT`: through
    /// which everything goes out. None: nothing is in between.
    #[serde(skip_serializing)]
    pub upstream_proxy: Option<Secret>,
    /// Ranges by a group's name, `*` for all, that are not refused for being private or reserved.
    pub lifted: BTreeMap<String, Vec<String>>,
    /// Open connections of one sandbox.
    pub connections: u32,
    /// Of those, ones whose TLS handshake is under way.
    pub handshakes: u32,
    /// MiB of one sandbox's buffers.
    pub buffer_mib: u32,
    /// Questions of one sandbox to name servers.
    pub dns_per_second: u32,
    /// Different names under one wildcard in ten minutes.
    pub dns_names: u32,
    /// Certificates made for one sandbox.
    pub mints_per_minute: u32,
    /// Seconds after which a connection ends that says nothing.
    pub idle_seconds: u32,
}

/// Who the node says it is in the tokens of groups' identities.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Identity {
    /// `https://HOST[:PORT][/PATH]`, below which whoever verifies tokens finds what the node serves
    /// for that. Empty: the first of the API's names, and its port.
    pub issuer: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections to the API. More wait in the kernel's queue.
    pub connections_max: u32,
    /// Sandboxes on this node, in whatever state.
    pub sandboxes_max: u32,
    /// Snapshots that clients asked for and that are there.
    pub snapshots_max: u32,
    /// MiB of one file written through the API.
    pub file_mib_max: u32,
    /// MiB of one imported image archive.
    pub archive_mib_max: u32,
    /// MiB a second that a sandbox of one CPU may read from the disk below the state folder, and as
    /// many write; others in proportion to their CPU. 0 is no limit.
    pub io_mib_per_second: u32,
    /// Reads a second, and as many writes, in the same way. 0 is no limit.
    pub io_operations_per_second: u32,
    /// MiB a second that a sandbox of one CPU may send, and as many receive; others in proportion
    /// to their CPU. 0 is no limit.
    pub network_mib_per_second: u32,
    /// Frames a second each way, in the same way. 0 is no limit.
    pub network_frames_per_second: u32,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8443)),
            server_names: Vec::new(),
            admin_token: None,
        }
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            state: "/var/lib/holdfast".into(),
            run: "/run/holdfast".into(),
            cgroups: "/sys/fs/cgroup/holdfast.slice/holdfast-sandboxes.service".into(),
            baked_images: "/usr/share/holdfast/images".into(),
            vmm: "/usr/lib/holdfast/holdfast-vmm".into(),
            shim: "/usr/lib/holdfast/holdfast-shim".into(),
            convert: "/usr/lib/holdfast/holdfast-convert".into(),
            pager: "/usr/lib/holdfast/holdfast-pager".into(),
            egress: "/usr/lib/holdfast/holdfast-egress".into(),
            kernel: "/usr/lib/holdfast/guest/vmlinux".into(),
            initramfs: "/usr/lib/holdfast/guest/initramfs.cpio".into(),
        }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        // Memory that is not there kills a neighbour, CPU that is not there slows one down.
        Self { memory_factor: 1.0, cpu_factor: 4.0, host_memory_mib: 512 }
    }
}

impl Default for Images {
    fn default() -> Self {
        Self { gc_above_percent: 85 }
    }
}

impl Default for Snapshots {
    fn default() -> Self {
        // Some tens of MiB of disk each, and as much page cache while it is used.
        Self { hot_mib: 0, templates_max: 16, drop_caches: false }
    }
}

impl Default for Egress {
    fn default() -> Self {
        let limits = egress::Limits::default();
        Self {
            resolvers: Vec::new(),
            extra_roots: String::new(),
            upstream_proxy: None,
            lifted: BTreeMap::new(),
            connections: limits.connections,
            handshakes: limits.handshakes,
            buffer_mib: limits.buffer_bytes >> 20,
            dns_per_second: limits.dns_per_second,
            dns_names: limits.dns_names,
            mints_per_minute: limits.mints_per_minute,
            idle_seconds: limits.idle_seconds,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            sandboxes_max: 1000,
            snapshots_max: 1000,
            file_mib_max: 1024,
            archive_mib_max: 16 * 1024,
            // A quarter of a slow NVMe drive's bandwidth: four busy sandboxes of one CPU fill it,
            // and one alone leaves most of it to others.
            io_mib_per_second: 400,
            io_operations_per_second: 10_000,
            // A gigabit a second, in frames of a usual size.
            network_mib_per_second: 125,
            network_frames_per_second: 100_000,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration")]
    Read(#[source] std::io::Error),
    #[error("{} is not a valid configuration: {reason}", path.display())]
    Form { path: PathBuf, reason: String },
    #[error("{}: {key} {problem}", path.display())]
    Value { path: PathBuf, key: &'static str, problem: String },
}

impl ConfigError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read(_) => "check that the file exists and that the daemon may read it",
            Self::Form { .. } | Self::Value { .. } => "docs/config.md lists every key",
        }
    }
}

impl Config {
    /// Reads `path`; a missing file is a configuration of defaults.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(ConfigError::Read(error)),
        };
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Form {
            path: path.to_owned(),
            reason: error.to_string().trim_end().to_owned(),
        })?;
        match config.problem() {
            Some((key, problem)) => {
                Err(ConfigError::Value { path: path.to_owned(), key, problem: problem.to_owned() })
            }
            None => Ok(config),
        }
    }

    /// The first key whose value cannot be worked with, and why.
    fn problem(&self) -> Option<(&'static str, &'static str)> {
        let factor = |value: f64| value.is_finite() && (0.1..=100.0).contains(&value);
        let token_fits = |token: &Secret| {
            token.reveal().len() >= ADMIN_TOKEN_BYTES_MIN
                && token.reveal().bytes().all(|b| b.is_ascii_graphic())
        };
        let name_fits = |name: &String| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
        };
        let remote = &self.remote;
        let checks = [
            (
                "api.admin_token",
                self.api.admin_token.as_ref().is_none_or(token_fits),
                "must be at least 16 printable ASCII characters without spaces",
            ),
            (
                "api.server_names",
                self.api.server_names.iter().all(name_fits),
                "must hold host names and addresses",
            ),
            ("paths.state", self.paths.state.is_absolute(), "must be an absolute path"),
            ("paths.run", self.paths.run.is_absolute(), "must be an absolute path"),
            ("paths.cgroups", self.paths.cgroups.is_absolute(), "must be an absolute path"),
            ("capacity.memory_factor", factor(self.capacity.memory_factor), "must be 0.1 to 100"),
            ("capacity.cpu_factor", factor(self.capacity.cpu_factor), "must be 0.1 to 100"),
            ("images.gc_above_percent", self.images.gc_above_percent < 100, "must be 0 to 99"),
            (
                "egress.resolvers",
                self.egress.resolvers.iter().all(|text| parse_resolver(text).is_some()),
                "must be addresses, with or without a port",
            ),
            (
                "egress.lifted",
                self.egress.ranges_fit(),
                "must be ranges, as 10.0.0.0/8, by group, of 512 at most",
            ),
            (
                "egress.upstream_proxy",
                self.egress.upstream_proxy.is_none() || self.egress.upstream_proxy().is_some(),
                "must be http://, https:// or socks5://, and HOST:PORT behind it",
            ),
            ("egress.buffer_mib", (1..4096).contains(&self.egress.buffer_mib), "must be 1 to 4095"),
            (
                "identity.issuer",
                self.identity.issuer.is_empty() || self.identity.is_an_issuer(),
                "must be https://HOST[:PORT][/PATH], without a slash at its end",
            ),
            ("limits.connections_max", self.limits.connections_max > 0, "must be at least 1"),
            (
                "remote.url",
                remote.url.is_empty() || remote.location().is_ok(),
                "must be s3://BUCKET/PREFIX or azure://ACCOUNT/CONTAINER/PREFIX, and \
                 remote.endpoint an http or https address",
            ),
            ("remote.key", remote.url.is_empty() || remote.key.is_some(), "must be given"),
            (
                "remote.key_id",
                !remote.url.starts_with("s3:") || !remote.key_id.is_empty(),
                "must be given",
            ),
            (
                "remote.site_key",
                remote.url.is_empty() || remote.site_key_bytes().is_some(),
                "must be 64 hex digits, the same on each node that shares the store",
            ),
        ];
        checks.into_iter().find(|(_, fits, _)| !fits).map(|(key, _, problem)| (key, problem))
    }
}

impl Remote {
    pub fn location(&self) -> Result<Location, BadLocation> {
        Location::parse(&self.url, &self.endpoint, &self.region)
    }

    pub fn secrets(&self) -> Secrets {
        let key = self.key.as_ref().map(|key| key.reveal().to_owned()).unwrap_or_default();
        Secrets { key_id: self.key_id.clone(), key }
    }

    /// `None`: it is none.
    pub fn site_key_bytes(&self) -> Option<[u8; 32]> {
        let text = self.site_key.as_ref()?.reveal();
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if text.len() != 64 || !digits {
            return None;
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
        }
        Some(bytes)
    }
}

impl Egress {
    pub fn limits(&self) -> egress::Limits {
        egress::Limits {
            connections: self.connections,
            handshakes: self.handshakes,
            buffer_bytes: self.buffer_mib.saturating_mul(1 << 20),
            dns_per_second: self.dns_per_second,
            dns_names: self.dns_names,
            mints_per_minute: self.mints_per_minute,
            idle_seconds: self.idle_seconds,
        }
    }

    /// `None`: there is none, or it is none.
    pub fn upstream_proxy(&self) -> Option<UpstreamProxy> {
        let url = Url::parse(self.upstream_proxy.as_ref()?.reveal()).ok()?;
        let (kind, usual_port) = match url.scheme() {
            "http" => (ProxyKind::Http, 80),
            "https" => (ProxyKind::Https, 443),
            "socks5" => (ProxyKind::Socks5, 1080),
            _ => return None,
        };
        let plain = matches!(url.path(), "" | "/") && url.query().is_none();
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Some(UpstreamProxy {
            kind,
            host: given(url.host_str().filter(|_| plain)?)?,
            port: url.port().unwrap_or(usual_port),
            username: given(url.username()),
            password: url.password().and_then(given),
        })
    }

    fn ranges_fit(&self) -> bool {
        self.lifted.len() <= EGRESS_OWN_UIDS.len()
            && self.lifted.values().flatten().all(|text| text.parse::<Cidr>().is_ok())
    }
}

impl Config {
    /// The issuer of the node's tokens (OpenID Connect Discovery 1.0, section 3).
    pub fn issuer_url(&self) -> String {
        if !self.identity.issuer.is_empty() {
            return self.identity.issuer.clone();
        }
        let host = self.api.server_names.first().cloned().unwrap_or_else(host_name);
        let host = match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => host,
        };
        match self.api.listen.port() {
            443 => format!("https://{host}"),
            port => format!("https://{host}:{port}"),
        }
    }
}

impl Identity {
    fn is_an_issuer(&self) -> bool {
        let plain = |url: Url| {
            url.scheme() == "https"
                && url.has_host()
                && url.username().is_empty()
                && url.query().is_none()
                && url.fragment().is_none()
        };
        !self.issuer.ends_with('/') && Url::parse(&self.issuer).is_ok_and(plain)
    }
}

impl Paths {
    /// The writable image store.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Disks of sandboxes, a folder each.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("config.toml"))
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_missing_file_is_the_defaults() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Config::load(&folder.path().join("none.toml")).unwrap(), Config::default());
    }

    #[test]
    fn a_key_or_section_that_does_not_exist_is_refused_by_name() {
        for (text, name) in [("[api]\nlisten_on = 'x'", "listen_on"), ("[sandbox]", "sandbox")] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn a_value_that_cannot_work_is_refused_by_its_key() {
        let cases = [
            ("[api]\nadmin_token = 'short'", "api.admin_token"),
            ("[api]\nserver_names = ['a b']", "api.server_names"),
            ("[paths]\nstate = 'here'", "paths.state"),
            ("[capacity]\nmemory_factor = nan", "capacity.memory_factor"),
            ("[capacity]\ncpu_factor = 0.0", "capacity.cpu_factor"),
            ("[images]\ngc_above_percent = 100", "images.gc_above_percent"),
            ("[limits]\nconnections_max = 0", "limits.connections_max"),
            ("[egress]\nresolvers = ['dns.test']", "egress.resolvers"),
            ("[egress]\nlifted = { default = ['10.0.0.0/8', 'all'] }", "egress.lifted"),
            ("[egress]\nupstream_proxy = 'ftp://proxy.test'", "egress.upstream_proxy"),
            ("[egress]\nupstream_proxy = 'http://proxy.test/path'", "egress.upstream_proxy"),
            ("[egress]\nbuffer_mib = 4096", "egress.buffer_mib"),
            ("[identity]\nissuer = 'http://node.test'", "identity.issuer"),
            ("[identity]\nissuer = 'https://node.test/'", "identity.issuer"),
            ("[identity]\nissuer = 'https://node.test?a'", "identity.issuer"),
            ("[host]\nsmt = 'on'", "smt"),
            ("[remote]\nurl = 'file:///srv'", "remote.url"),
            ("[remote]\nurl = 's3://b'\nendpoint = 'x'", "remote.url"),
            ("[remote]\nurl = 's3://b'", "remote.key"),
            ("[remote]\nurl = 's3://b'\nkey = 'k'", "remote.key_id"),
            ("[remote]\nurl = 's3://b'\nkey = 'k'\nkey_id = 'i'", "remote.site_key"),
            ("[remote]\nurl = 'azure://a/b'\nkey = 'k'\nsite_key = 'g0'", "remote.site_key"),
        ];
        for (text, key) in cases {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn the_issuer_is_the_one_named_or_the_apis_own_name() {
        let issuer = |text: &str| parse(text).unwrap().issuer_url();
        assert_eq!(issuer("[identity]\nissuer = 'https://id.test/x'"), "https://id.test/x");
        assert_eq!(issuer("[api]\nserver_names = ['a.test', 'b']"), "https://a.test:8443");
        let own = "[api]\nserver_names = ['2001:db8::1']\nlisten = '[::]:443'";
        assert_eq!(issuer(own), "https://[2001:db8::1]");
        assert_eq!(issuer(""), format!("https://{}:8443", host_name()));
    }

    #[test]
    fn the_document_names_every_key_with_its_default_and_no_other_key() {
        let written = toml::Table::try_from(Config::default()).unwrap();
        let value = |value: &toml::Value| format!("`{value}`");
        let mut expected: Vec<(String, String)> = written
            .iter()
            .flat_map(|(section, keys)| {
                let keys = keys.as_table().unwrap();
                keys.iter()
                    .map(move |(key, default)| (format!("`{section}.{key}`"), value(default)))
            })
            .collect();
        for secret in ["api.admin_token", "remote.key", "remote.site_key", "egress.upstream_proxy"]
        {
            expected.push((format!("`{secret}`"), "none".to_owned()));
        }
        expected.sort();

        let document = include_str!("../../docs/config.md");
        let rows = document.lines().filter(|line| line.starts_with("| `"));
        let mut found: Vec<(String, String)> = rows
            .map(|row| {
                let cells: Vec<&str> = row.split('|').map(str::trim).collect();
                (cells[1].to_owned(), cells[2].to_owned())
            })
            .collect();
        found.sort();
        assert_eq!(found, expected);
    }
}
