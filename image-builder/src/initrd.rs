//! The host's initramfs: our PID 1 and the modules on the way to the root.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use holdfast_initramfs::host::{self, Module};

use crate::kernel::Kernel;

/// Modules any disk of a server, or the root on it, may need. What they need comes along.
const WANTED: [&str; 32] = [
    "aacraid",
    "ahci",
    "arcmsr",
    "ata_piix",
    "crc32c_generic",
    "crc32c_intel",
    "dm_verity",
    "ehci_pci",
    "erofs",
    "hpsa",
    "hv_storvsc",
    "megaraid_sas",
    "mmc_block",
    "mpi3mr",
    "mpt3sas",
    "mptsas",
    "mptspi",
    "nvme",
    "pm80xx",
    "sd_mod",
    "sdhci_acpi",
    "sdhci_pci",
    "smartpqi",
    "uas",
    "usb_storage",
    "virtio_blk",
    "virtio_pci",
    "virtio_scsi",
    "vmd",
    "vmw_pvscsi",
    "xen_blkfront",
    "xhci_pci",
];
/// Fast to make and to unpack; the modules are a few megabytes.
const ZSTD_LEVEL: i32 = 9;

/// The initramfs, compressed.
pub(crate) fn pack(init: &Path, kernel: &Kernel) -> Result<Vec<u8>> {
    let index = Index::read(&kernel.modules)?;
    let mut names = BTreeSet::new();
    for wanted in WANTED {
        for name in index.closure(wanted)? {
            names.insert(name);
        }
    }
    let module = |name: &String| -> Result<Module> {
        let (path, needs) = &index.modules[name];
        let content = fs_err::read(kernel.modules.join(path))?;
        let aliases = index.aliases.get(name).cloned().unwrap_or_default();
        Ok(Module { name: name.clone(), content, needs: needs.clone(), aliases })
    };
    let modules = names.iter().map(module).collect::<Result<Vec<_>>>()?;
    let archive = host::initramfs(&fs_err::read(init)?, &modules)?;
    zstd::encode_all(&archive[..], ZSTD_LEVEL).context("cannot compress the initramfs")
}

/// What depmod found out.
#[derive(Debug)]
struct Index {
    /// By name: the file, and the names of what must be loaded before it, in that order.
    modules: BTreeMap<String, (String, Vec<String>)>,
    aliases: BTreeMap<String, Vec<String>>,
    builtin: BTreeSet<String>,
}

impl Index {
    fn read(folder: &Path) -> Result<Self> {
        let text = |name: &str| fs_err::read_to_string(folder.join(name));
        Ok(Self::parse(&text("modules.dep")?, &text("modules.alias")?, &text("modules.builtin")?))
    }

    fn parse(dep: &str, alias: &str, builtin: &str) -> Self {
        let modules = dep.lines().filter_map(|line| line.split_once(':')).map(|(path, needs)| {
            // depmod names the nearest first; loading begins with the farthest.
            let needs = needs.split_whitespace().rev().map(module_name).collect();
            (module_name(path), (path.to_owned(), needs))
        });
        let mut aliases = BTreeMap::<String, Vec<String>>::new();
        for line in alias.lines() {
            if let ["alias", pattern, name] = line.split(' ').collect::<Vec<_>>()[..] {
                aliases.entry(name.replace('-', "_")).or_default().push(pattern.to_owned());
            }
        }
        let builtin = builtin.lines().map(module_name).collect();
        Self { modules: modules.collect(), aliases, builtin }
    }

    /// `name` and what it needs; nothing when it is part of the kernel.
    fn closure(&self, name: &str) -> Result<Vec<String>> {
        match self.modules.get(name) {
            Some((_, needs)) => Ok(needs.iter().cloned().chain([name.to_owned()]).collect()),
            None if self.builtin.contains(name) => Ok(Vec::new()),
            None => bail!("the kernel has no module {name}"),
        }
    }
}

/// `kernel/fs/erofs/erofs.ko` is called `erofs`; names have no dashes.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/a/virtio-blk.ko: kernel/b/near.ko kernel/c/far.ko\nkernel/b/near.ko: kernel/c/far.ko\nkernel/c/far.ko:\n";

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let index = Index::parse(DEP, "", "");
        assert_eq!(index.closure("virtio_blk").unwrap(), ["far", "near", "virtio_blk"]);
    }

    #[test]
    fn a_built_in_module_needs_no_file_and_an_unknown_one_is_an_error() {
        let index = Index::parse(DEP, "", "kernel/drivers/virtio/virtio_pci.ko\n");
        assert!(index.closure("virtio_pci").unwrap().is_empty());
        assert!(index.closure("virtio_scsi").is_err());
    }

    #[test]
    fn aliases_belong_to_the_module_whatever_its_dashes() {
        let index = Index::parse(DEP, "# Aliases\nalias virtio:d2v* virtio-blk\n", "");
        assert_eq!(index.aliases["virtio_blk"], ["virtio:d2v*"]);
    }
}
