//! Loads kernel modules: a few always, the rest for the devices the buses show.
//!
//! `/modules` holds uncompressed modules as `NAME.ko`, `alias` (lines `PATTERN NAME`) and `dep`
//! (lines `NAME: FIRST SECOND …`, what must be there before NAME, in that order).

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CStr,
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::{complain, modalias};

/// Needed whatever the hardware is. erofs asks for crc32c while it mounts, when no helper could
/// load it.
pub(crate) const ALWAYS: [&str; 2] = ["crc32c_generic", "erofs"];

const NO_PARAMETERS: &CStr = c"";

#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error("cannot read module {name}")]
    Read {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("the kernel refused module {name}")]
    Refused {
        name: String,
        #[source]
        source: Errno,
    },
}

#[derive(Debug)]
pub(crate) struct Modules {
    folder: PathBuf,
    aliases: Vec<(String, String)>,
    needs: BTreeMap<String, Vec<String>>,
    /// Tried before, with whatever outcome: a module that failed once is not tried every 10 ms.
    tried: BTreeSet<String>,
    /// Modaliases looked up before.
    seen: BTreeSet<String>,
}

impl Modules {
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        let aliases = fs_err::read_to_string(folder.join("alias"))?;
        let needs = fs_err::read_to_string(folder.join("dep"))?;
        Ok(Self {
            folder: folder.to_owned(),
            aliases: aliases.lines().filter_map(alias_line).collect(),
            needs: needs.lines().filter_map(need_line).collect(),
            tried: BTreeSet::new(),
            seen: BTreeSet::new(),
        })
    }

    /// Loads `name` and before it what it needs. Done once, however often it is asked for; a
    /// module the kernel has built in, or has already, is no error.
    pub(crate) fn load(&mut self, name: &str) -> Result<(), ModuleError> {
        for name in self.order(name) {
            if !self.tried.insert(name.clone()) {
                continue;
            }
            let path = self.folder.join(format!("{name}.ko"));
            let image = match fs_err::read(&path) {
                Ok(image) => image,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(ModuleError::Read { name, source }),
            };
            match rustix::system::init_module(&image, NO_PARAMETERS) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(source) => return Err(ModuleError::Refused { name, source }),
            }
        }
        Ok(())
    }

    /// Loads what the devices under `buses` ask for. A driver that refuses to start is reported
    /// and left alone: the root may be on another device.
    pub(crate) fn load_for_devices(&mut self, buses: &Path) {
        for modalias in modaliases(buses) {
            if !self.seen.insert(modalias.clone()) {
                continue;
            }
            for name in self.drivers(&modalias) {
                if let Err(error) = self.load(&name) {
                    complain(&format!("{error} ({modalias})"));
                }
            }
        }
    }

    fn drivers(&self, modalias: &str) -> Vec<String> {
        let fits = |pattern: &str| modalias::fits(pattern.as_bytes(), modalias.as_bytes());
        self.aliases.iter().filter(|(p, _)| fits(p)).map(|(_, name)| name.clone()).collect()
    }

    /// `name` preceded by what it needs.
    fn order(&self, name: &str) -> Vec<String> {
        let mut order = self.needs.get(name).cloned().unwrap_or_default();
        order.push(name.to_owned());
        order
    }
}

fn alias_line(line: &str) -> Option<(String, String)> {
    let (pattern, name) = line.split_once(' ')?;
    Some((pattern.to_owned(), name.to_owned()))
}

fn need_line(line: &str) -> Option<(String, Vec<String>)> {
    let (name, needs) = line.split_once(':')?;
    Some((name.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
}

/// The modalias of every device of every bus. What vanishes meanwhile is not missed.
fn modaliases(buses: &Path) -> Vec<String> {
    let folders = |path: PathBuf| {
        let entries = fs_err::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let devices =
        folders(buses.to_owned()).into_iter().flat_map(|bus| folders(bus.join("devices")));
    let texts = devices.filter_map(|device| fs_err::read_to_string(device.join("modalias")).ok());
    texts.map(|text| text.trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(alias: &str, dep: &str) -> (tempfile::TempDir, Modules) {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join("alias"), alias).unwrap();
        fs_err::write(folder.path().join("dep"), dep).unwrap();
        let modules = Modules::open(folder.path()).unwrap();
        (folder, modules)
    }

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let (_folder, modules) = modules("", "virtio_pci: virtio virtio_ring\nvirtio:\n");
        assert_eq!(modules.order("virtio_pci"), ["virtio", "virtio_ring", "virtio_pci"]);
        assert_eq!(modules.order("unheard_of"), ["unheard_of"]);
    }

    #[test]
    fn a_device_is_given_every_driver_whose_pattern_fits() {
        let alias = "virtio:d00000002v* virtio_blk\nvirtio:d00000008v* virtio_scsi\n";
        let (_folder, modules) = modules(alias, "");
        assert_eq!(modules.drivers("virtio:d00000002v00001AF4"), ["virtio_blk"]);
        assert!(modules.drivers("virtio:d00000001v00001AF4").is_empty());
    }

    #[test]
    fn a_module_that_is_not_in_the_initramfs_is_taken_for_built_in() {
        let (_folder, mut modules) = modules("", "");
        assert!(modules.load("crc32c_generic").is_ok());
    }

    #[test]
    fn modaliases_come_from_every_bus() {
        let buses = tempfile::tempdir().unwrap();
        for (device, text) in [("pci/devices/0", "pci:a\n"), ("virtio/devices/0", "virtio:b\n")] {
            fs_err::create_dir_all(buses.path().join(device)).unwrap();
            fs_err::write(buses.path().join(device).join("modalias"), text).unwrap();
        }
        fs_err::create_dir_all(buses.path().join("empty/devices/0")).unwrap();
        let mut found = modaliases(buses.path());
        found.sort();
        assert_eq!(found, ["pci:a", "virtio:b"]);
    }
}
