//! Debian's docker-registry on a free port of loopback, with a folder of its own.

use std::{
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use fs_err as fs;

use super::{at, tool};

/// Longest wait for a registry to listen.
const START_MAX: Duration = Duration::from_secs(20);

/// `me` with password `secret`, as htpasswd writes it.
const HTPASSWD: &str = "me:$2y$05$e/g6IvUpswB7jv3YrPLiPOCdhjzMFEpV1gPKNTfApL4f6SRXnEELS\n";

/// Ended on drop.
pub struct DockerRegistry {
    child: Child,
    folder: tempfile::TempDir,
    host: String,
    credentials: Option<&'static str>,
}

impl DockerRegistry {
    pub fn open() -> Self {
        Self::start(None)
    }

    /// One that `me` alone may use, with password `secret`.
    pub fn guarded() -> Self {
        Self::start(Some("me:secret"))
    }

    fn start(credentials: Option<&'static str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (config, log) = (at(folder.path(), "config.yml"), at(folder.path(), "log"));
        let data = at(folder.path(), "data");
        let users = at(folder.path(), "users");
        fs::write(&users, HTPASSWD).unwrap();
        let guard = format!("auth: {{htpasswd: {{realm: r, path: {users}}}}}\n");
        // Port 0: the registry takes a free one and says in its log which.
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {data}}}}}\n\
             http: {{addr: \"127.0.0.1:0\", secret: s}}\n{}",
            credentials.map(|_| guard).unwrap_or_default()
        );
        fs::write(&config, text).unwrap();
        let output = fs::File::create(&log).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", &config])
            .env_clear()
            .stdout(Stdio::from(output.try_clone().unwrap().into_parts().0))
            .stderr(Stdio::from(output.into_parts().0))
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry: {error}: run scripts/setup"));
        let mut registry = Self { child, folder, host: String::new(), credentials };
        let deadline = Instant::now() + START_MAX;
        while registry.host.is_empty() {
            assert!(Instant::now() < deadline, "registry does not start: {}", registry.log());
            let log = registry.log();
            let said = log.split("listening on ").nth(1).and_then(|rest| rest.split('"').next());
            registry.host = said.unwrap_or_default().to_owned();
            thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Pushes an image named as skopeo names it, and gives its reference.
    pub fn push(&self, image: &str, name: &str) -> String {
        let reference = format!("{}/{name}", self.host);
        let target = format!("docker://{reference}");
        let mut arguments = vec!["copy", "--quiet", "--all", "--dest-tls-verify=false"];
        let credentials = self.credentials.map(|own| ["--dest-creds", own]);
        arguments.extend(credentials.iter().flatten());
        arguments.extend([image, &target]);
        tool("skopeo", &arguments);
        reference
    }

    /// How many requests of this method had this in their path, by the registry's own log.
    pub fn count(&self, method: &str, part: &str) -> usize {
        let start = format!("\"{method} /v2/");
        let log = self.log();
        let lines = log.lines().filter_map(|line| line.split_once(&start));
        lines.filter(|(_, rest)| rest.split(' ').next().is_some_and(|p| p.contains(part))).count()
    }

    /// The file that holds a blob.
    pub fn blob(&self, digest: &holdfast_model::Digest) -> std::path::PathBuf {
        let hex = digest.hex();
        let blobs = self.folder.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    /// Ends the process now, as a crash would.
    pub fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
