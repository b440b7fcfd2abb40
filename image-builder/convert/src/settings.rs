//! How an image wants to be run, from its config.

use std::collections::BTreeMap;

use holdfast_oci::{self as oci, Image};
use holdfast_rootfs::Settings;
use serde::{Deserialize, de::IgnoredAny};

/// The fields of a config that say how to run the image. Absent and null mean the same: tools
/// write either.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Run {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    volumes: Option<BTreeMap<String, IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
struct Config {
    config: Option<Run>,
}

pub(crate) fn of(image: &Image) -> Result<Settings, oci::Error> {
    let config: Config =
        serde_json::from_slice(&image.config).map_err(|error| oci::Error::Malformed {
            what: format!("config of image {}", image.digest),
            reason: error.to_string(),
        })?;
    let run = config.config.unwrap_or_default();
    let said = |text: Option<String>| text.filter(|text| !text.is_empty());
    Ok(Settings {
        entrypoint: run.entrypoint.unwrap_or_default(),
        cmd: run.cmd.unwrap_or_default(),
        env: run.env.unwrap_or_default(),
        working_dir: said(run.working_dir),
        user: said(run.user),
        stop_signal: said(run.stop_signal),
        exposed_ports: run.exposed_ports.unwrap_or_default().into_keys().collect(),
        volumes: run.volumes.unwrap_or_default().into_keys().collect(),
    })
}

#[cfg(test)]
mod tests {
    use holdfast_model::Digest;

    use super::*;

    fn settings(config: &str) -> Result<Settings, oci::Error> {
        of(&Image {
            digest: Digest::from_sha256([0; 32]),
            architecture: "amd64".to_owned(),
            manifest: Vec::new(),
            config: config.as_bytes().to_vec(),
            layers: Vec::new(),
        })
    }

    #[test]
    fn every_setting_is_read_and_null_is_absent() {
        let text = r#"{"config":{"Entrypoint":["/bin/sh","-c"],"Cmd":null,"Env":["A=b"],
            "WorkingDir":"/srv","User":"1000:1000","StopSignal":"SIGINT",
            "ExposedPorts":{"80/tcp":{}},"Volumes":{"/var/lib/data":{}},"Labels":{"x":"y"}}}"#;
        let expected = Settings {
            entrypoint: vec!["/bin/sh".to_owned(), "-c".to_owned()],
            cmd: Vec::new(),
            env: vec!["A=b".to_owned()],
            working_dir: Some("/srv".to_owned()),
            user: Some("1000:1000".to_owned()),
            stop_signal: Some("SIGINT".to_owned()),
            exposed_ports: vec!["80/tcp".to_owned()],
            volumes: vec!["/var/lib/data".to_owned()],
        };
        assert_eq!(settings(text).unwrap(), expected);
        for empty in ["{}", r#"{"config":null}"#, r#"{"config":{"User":""}}"#] {
            assert_eq!(settings(empty).unwrap(), Settings::default(), "{empty}");
        }
    }

    #[test]
    fn a_config_of_another_form_is_malformed() {
        let error = settings(r#"{"config":{"Cmd":"not a list"}}"#).unwrap_err();
        assert!(matches!(error, oci::Error::Malformed { .. }));
    }
}
