//! What a sandbox runs: the image's settings, overridden by the disk image's, overridden by the
//! sandbox's.

use holdfast_model::sandbox::ImageSource;
use holdfast_rootfs::Settings;
use holdfast_store::SandboxRecord;
use holdfast_wire::guest::Start;

use super::node::Node;

/// What a disk image says instead of its OCI image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Overrides {
    pub(super) entrypoint: Option<Vec<String>>,
    pub(super) cmd: Option<Vec<String>>,
}

/// Looks the overrides up. A public image has none; a disk image cannot go while it is in use.
pub(super) async fn disk_image_overrides(node: &Node, record: &SandboxRecord) -> Overrides {
    let ImageSource::Disk(id) = &record.spec.image else { return Overrides::default() };
    match node.store.disk_image(id) {
        Ok(Some(image)) => Overrides { entrypoint: image.entrypoint, cmd: image.cmd },
        Ok(None) => Overrides::default(),
        Err(error) => {
            log::warn!(id:% = record.id, error:%; "disk image record not readable");
            Overrides::default()
        }
    }
}

/// Merges them. A sandbox whose own entrypoint and cmd are both empty starts nothing; a command run
/// later by the image's entrypoint still finds the one below.
pub(super) fn start(record: &SandboxRecord, image: &Settings, disk: &Overrides) -> Start {
    let spec = &record.spec;
    let below = Program::default()
        .overridden(Some(&image.entrypoint), Some(&image.cmd))
        .overridden(disk.entrypoint.as_ref(), disk.cmd.as_ref());
    let started = below.clone().overridden(spec.entrypoint.as_ref(), spec.cmd.as_ref());
    let argv = started.entrypoint.iter().chain(&started.cmd).cloned().collect::<Vec<_>>();
    let Program { entrypoint, cmd } = if argv.is_empty() { below } else { started };
    Start {
        host_name: record.id.as_str().to_owned(),
        argv,
        entrypoint,
        cmd,
        env: environment(record, image),
        cwd: image.working_dir.clone().unwrap_or_default(),
        user: image.user.clone().unwrap_or_default(),
        stop_signal: image.stop_signal.clone().unwrap_or_default(),
        volumes: image.volumes.clone(),
    }
}

/// A program and its arguments, as one level or several have it.
#[derive(Debug, Clone, Default)]
struct Program {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
}

impl Program {
    /// Whoever names an entrypoint of its own drops the cmd from below it, as with other container
    /// tools: arguments of one program make no sense for another.
    fn overridden(mut self, entrypoint: Option<&Vec<String>>, cmd: Option<&Vec<String>>) -> Self {
        if let Some(own) = entrypoint {
            self = Self { entrypoint: own.clone(), cmd: Vec::new() };
        }
        if let Some(own) = cmd {
            self.cmd = own.clone();
        }
        self
    }
}

fn environment(record: &SandboxRecord, image: &Settings) -> Vec<(String, String)> {
    let own = &record.spec.environment;
    image
        .env
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .filter(|(name, _)| !own.contains_key(*name))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain(own.iter().map(|(name, value)| (name.clone(), value.clone())))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use holdfast_model::{Digest, GroupKey, SandboxId, SandboxSpec};

    use super::*;

    fn list(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn record(entrypoint: Option<&str>, cmd: Option<&str>) -> SandboxRecord {
        SandboxRecord::accepted(
            SandboxId::from_random([0; 20]),
            GroupKey::local_default(),
            SandboxSpec {
                environment: BTreeMap::from([("B".to_owned(), "own".to_owned())]),
                entrypoint: entrypoint.map(list),
                cmd: cmd.map(list),
                ..SandboxSpec::of_image(ImageSource::Public("debian".to_owned()))
            },
            Digest::from_sha256([0; 32]),
            0,
        )
    }

    #[test]
    fn what_runs_follows_the_nearest_entrypoint_and_cmd() {
        let image = Settings { entrypoint: list("e"), cmd: list("c"), ..Settings::default() };
        let cases = [
            ((None, None), (None, None), "e c"),
            ((None, None), (None, Some("x y")), "e x y"),
            ((None, None), (Some("f"), None), "f"),
            ((None, None), (Some(""), None), ""),
            ((None, None), (Some(""), Some("x")), "x"),
            ((Some("d"), None), (None, None), "d"),
            ((Some("d"), Some("g")), (None, None), "d g"),
            ((Some("d"), Some("g")), (None, Some("x")), "d x"),
            ((None, Some("g")), (None, None), "e g"),
        ];
        for ((disk_entrypoint, disk_cmd), (entrypoint, cmd), argv) in cases {
            let disk = Overrides { entrypoint: disk_entrypoint.map(list), cmd: disk_cmd.map(list) };
            let start = start(&record(entrypoint, cmd), &image, &disk);
            assert_eq!(start.argv, list(argv));
        }
    }

    #[test]
    fn a_sandbox_that_starts_nothing_keeps_the_images_program_for_later() {
        let image = Settings { entrypoint: list("e"), cmd: list("c"), ..Settings::default() };
        let disk = Overrides { entrypoint: None, cmd: Some(list("d")) };
        let nothing = start(&record(Some(""), Some("")), &image, &disk);
        assert_eq!(
            (nothing.argv, nothing.entrypoint, nothing.cmd),
            (list(""), list("e"), list("d"))
        );
        let own = start(&record(Some("f"), Some("g")), &image, &disk);
        assert_eq!((own.argv, own.entrypoint, own.cmd), (list("f g"), list("f"), list("g")));
    }

    #[test]
    fn the_sandboxs_environment_replaces_the_images() {
        let image = Settings { env: list("A=1 B=image C=x=y broken"), ..Settings::default() };
        let start = start(&record(None, None), &image, &Overrides::default());
        let expected = [("A", "1"), ("C", "x=y"), ("B", "own")];
        assert_eq!(start.env, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
    }
}
