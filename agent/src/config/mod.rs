//! The one configuration of the daemon, from one TOML file. Defaults live here only; every key is
//! described in `docs/config.md`, which a test holds against this file.

mod checks;
mod egress;
mod node;
mod storage;

use std::path::{Path, PathBuf};

use fs_err as fs;
use serde::{Deserialize, Serialize};

pub use egress::{Egress, Identity};
pub use node::{Api, Capacity, Host, Limits, Paths, Smt};
pub use storage::{Images, Registries, Remote, Snapshots};

/// Where the configuration is looked for when no `--config` is given. A missing file means
/// defaults.
pub const DEFAULT_PATH: &str = "/var/lib/holdfast/config.toml";

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

        let document = include_str!("../../../docs/config.md");
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
