//! The support bundle: what the node and this side know, as one archive without secrets.

use std::{
    io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, write::GzEncoder};
use fs_err::os::unix::fs::OpenOptionsExt;
use holdfast_api::node::{NodeBundle, NodeInfo};
use serde::Serialize;

use crate::error::CliError;

/// What goes in. Parts that the node did not give are left out.
pub(crate) struct Bundle<'a, C: Serialize> {
    /// Where the node was looked for.
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) checks: &'a [C],
    pub(crate) node: Option<&'a NodeInfo>,
    pub(crate) own: Option<&'a NodeBundle>,
}

#[derive(Serialize)]
struct About<'a> {
    cli: &'static str,
    host: &'a str,
    port: u16,
    /// Seconds since 1970, by this side's clock.
    made_at: u64,
    complete: bool,
}

impl<C: Serialize> Bundle<'_, C> {
    /// Writes the archive (tar, gzip) to a new file that only its owner can read.
    pub(crate) fn write(&self, path: &Path) -> Result<(), CliError> {
        let file =
            fs_err::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut archive =
            tar::Builder::new(GzEncoder::new(io::BufWriter::new(file), Compression::default()));
        for (name, text) in self.files()? {
            let mut header = tar::Header::new_gnu();
            header.set_size(u64::try_from(text.len()).map_err(io::Error::other)?);
            header.set_mode(0o600);
            header.set_entry_type(tar::EntryType::Regular);
            let name = format!("holdfast-bundle/{name}");
            archive.append_data(&mut header, name, text.as_bytes())?;
        }
        let file = archive.into_inner()?.finish()?.into_inner().map_err(io::Error::other)?;
        file.sync_all()?;
        Ok(())
    }

    fn files(&self) -> Result<Vec<(&'static str, String)>, CliError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let about = About {
            cli: env!("CARGO_PKG_VERSION"),
            host: self.host,
            port: self.port,
            made_at: since.map_or(0, |since| since.as_secs()),
            complete: self.own.is_some(),
        };
        let mut files = vec![("about.json", json(&about)?), ("doctor.json", json(self.checks)?)];
        if let Some(node) = self.node {
            files.push(("node.json", json(node)?));
        }
        if let Some(own) = self.own {
            files.extend([
                ("config.toml", own.config.clone()),
                ("log.txt", own.log.iter().map(|line| format!("{line}\n")).collect()),
                ("sandboxes.json", json(&own.sandboxes)?),
                ("host.json", json(&own.host)?),
                ("checks.json", json(&own.checks)?),
                ("status.json", json(&own.status)?),
                ("metrics.txt", own.metrics.clone()),
            ]);
        }
        Ok(files)
    }
}

fn json<T: Serialize + ?Sized>(value: &T) -> Result<String, CliError> {
    serde_json::to_string_pretty(value).map_err(|error| CliError::Answer(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_bundle_of_a_node_that_was_not_reached_holds_what_this_side_knows_and_replaces_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.tar.gz");
        let bundle = Bundle {
            host: "localhost",
            port: 1,
            checks: &["the connection failed"],
            node: None,
            own: None,
        };
        bundle.write(&path).unwrap();
        assert!(bundle.write(&path).is_err(), "a file that is there stays");
        assert_eq!(fs_err::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let file = fs_err::File::open(&path).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
        let mut texts = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            texts.push((name, text));
        }
        let [(about, about_text), (doctor, doctor_text)] = &texts[..] else { panic!("{texts:?}") };
        assert_eq!(about, "holdfast-bundle/about.json");
        assert!(about_text.contains("\"complete\": false"), "{about_text}");
        assert_eq!(doctor, "holdfast-bundle/doctor.json");
        assert!(doctor_text.contains("the connection failed"), "{doctor_text}");
    }
}
