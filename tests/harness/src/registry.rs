//! A real registry on this machine's loopback, which an emulated node sees as 10.0.2.2.

use std::{
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::wait_for;

/// Debian's docker-registry with a storage folder of its own; ended on drop.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    pub port: u16,
    folder: PathBuf,
}

impl Registry {
    /// `port` is one the node was told it may speak plain http to.
    pub fn start(port: u16, folder: PathBuf) -> Result<Self> {
        // Said here, since the registry itself would only end.
        TcpListener::bind(("127.0.0.1", port)).with_context(|| format!("port {port} is taken"))?;
        fs_err::create_dir_all(&folder)?;
        let config = folder.join("registry.yml");
        let root = folder.join("data");
        fs_err::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
                 http: {{addr: \"127.0.0.1:{port}\"}}\n",
                root.display()
            ),
        )?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start docker-registry: run scripts/setup")?;
        let registry = Self { child, port, folder };
        wait_for("the registry", || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
        Ok(registry)
    }

    /// Pushes an image of an OCI layout, `FOLDER:TAG`, and gives the reference as the node sees it.
    pub fn push(&self, layout: &str, name: &str) -> Result<String> {
        let target = format!("docker://127.0.0.1:{}/{name}", self.port);
        let status = Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false", &format!("oci:{layout}"), &target])
            .status()?;
        ensure!(status.success(), "skopeo copy to {target} failed");
        Ok(format!("10.0.2.2:{}/{name}", self.port))
    }

    /// The file that holds a blob, to damage it.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = self.folder.join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
