//! From the root tree to a disk: erofs, boot image, partitions.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::{
    Variant,
    command::run,
    kernel::Kernel,
    tools::{Tools, Workspace},
};

/// Size of a root slot, for ever: see the partition definitions in the files folder.
const SLOT_BYTES_MAX: u64 = 512 << 20;
/// For all ids that need not differ from node to node, so that equal inputs give equal bytes.
const SEED: &str = "6f0ac0f3-1e2b-4c35-9b83-0b1f0b6c1d5a";
/// Time stamp of every file in the root: 2025-01-01, after the oldest certificate's first day.
const FILE_TIME: &str = "1735689600";
/// What every node boots with. The machine's id is the firmware's: `/etc` cannot hold one.
const CMDLINE: &str = "ro console=tty0 console=ttyS0,115200 quiet panic=10 systemd.gpt_auto=no \
                       systemd.machine_id=firmware mitigations=auto";

pub(crate) struct Disk<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) work: &'a Workspace,
    pub(crate) variant: Variant,
}

impl Disk<'_> {
    /// Makes the disk of the tree `root` in the work folder, and moves the results to `out`.
    pub(crate) fn write(&self, kernel: &Kernel, initrd: &[u8], out: &Path) -> Result<()> {
        self.root_image()?;
        let uuid = uuid_of(&self.work.path().join("root.erofs"))?;
        let cmdline = format!("root=PARTUUID={uuid} {CMDLINE}");
        fs_err::write(self.work.path().join("cmdline"), &cmdline)?;
        fs_err::write(self.work.path().join("initrd"), initrd)?;
        fs_err::copy(&kernel.vmlinuz, self.work.path().join("vmlinuz"))?;
        self.boot_image(&cmdline, &kernel.release)?;
        self.partitions(&uuid)?;
        for name in ["vmlinuz", "initrd", "cmdline", "root.erofs", "disk.raw"] {
            // mv goes over file system borders and keeps holes.
            run(Command::new("mv").arg("--force").arg(self.work.path().join(name)).arg(out))?;
        }
        Ok(())
    }

    fn root_image(&self) -> Result<()> {
        let compression = match self.variant {
            Variant::Dev => "-zlz4",
            Variant::Release => "-zzstd,level=6",
        };
        let args = [
            "--quiet",
            compression,
            "-T",
            FILE_TIME,
            "-U",
            SEED,
            &self.work.seen("root.erofs"),
            &self.work.seen("root"),
        ];
        self.tools.run("mkfs.erofs", &args).context("the root file system")?;
        let bytes = fs_err::metadata(self.work.path().join("root.erofs"))?.len();
        anyhow::ensure!(
            bytes <= SLOT_BYTES_MAX,
            "the root file system has {bytes} bytes, a slot only {SLOT_BYTES_MAX}"
        );
        Ok(())
    }

    /// The unified kernel image, and the boot loader that counts its tries.
    fn boot_image(&self, cmdline: &str, release: &str) -> Result<()> {
        let esp = self.work.path().join("esp");
        for folder in ["EFI/BOOT", "EFI/Linux", "EFI/systemd", "loader"] {
            fs_err::create_dir_all(esp.join(folder))?;
        }
        fs_err::write(esp.join("loader/loader.conf"), "timeout 0\neditor no\n")?;
        let image = format!("esp/EFI/Linux/holdfast_{}.efi", env!("CARGO_PKG_VERSION"));
        let args = [
            "build",
            &format!("--linux={}", self.work.seen("vmlinuz")),
            &format!("--initrd={}", self.work.seen("initrd")),
            &format!("--cmdline={cmdline}"),
            &format!("--uname={release}"),
            &format!("--os-release=@{}", self.work.seen("root/usr/lib/os-release")),
            &format!("--output={}", self.work.seen(&image)),
        ];
        self.tools.run("ukify", &args).context("the boot image")?;
        let loader = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi";
        for name in ["esp/EFI/BOOT/BOOTX64.EFI", "esp/EFI/systemd/systemd-bootx64.efi"] {
            self.tools.run("cp", &[loader, &self.work.seen(name)])?;
        }
        Ok(())
    }

    /// The partitions that a node's own systemd-repart finds at first boot, less those it makes:
    /// one list serves both.
    fn partitions(&self, root_uuid: &str) -> Result<()> {
        let lists = self.work.path().join("root/usr/lib/repart.d");
        let ours = self.work.path().join("repart.d");
        fs_err::create_dir_all(&ours)?;
        for entry in fs_err::read_dir(lists)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut text = fs_err::read_to_string(entry.path())?;
            match name.as_str() {
                "10-esp.conf" => text.push_str(&format!("CopyFiles={}:/\n", self.work.seen("esp"))),
                "20-root-a.conf" => {
                    let image = self.work.seen("root.erofs");
                    text.push_str(&format!("CopyBlocks={image}\nUUID={root_uuid}\n"));
                }
                "90-var.conf" => continue,
                _ => {}
            }
            fs_err::write(ours.join(name), text)?;
        }
        let args = [
            "--offline=yes",
            "--empty=create",
            "--size=auto",
            "--dry-run=no",
            "--pretty=no",
            &format!("--seed={SEED}"),
            &format!("--definitions={}", self.work.seen("repart.d")),
            &self.work.seen("disk.raw"),
        ];
        self.tools.run("systemd-repart", &args).context("the partitions")?;
        Ok(())
    }
}

/// A partition id that follows from its content, so that a slot and its boot image belong
/// together and no other version's does.
fn uuid_of(image: &Path) -> Result<String> {
    let mut sha = Sha256::new();
    std::io::copy(&mut fs_err::File::open(image)?, &mut sha)?;
    let mut id: Vec<u8> = sha.finalize().to_vec();
    // RFC 9562: version 8, an id made as its maker likes.
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    let hex = |range: std::ops::Range<usize>| -> String {
        id[range].iter().map(|byte| format!("{byte:02x}")).collect()
    };
    Ok([hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16)].join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roots_id_follows_from_its_content_alone() {
        let folder = tempfile::tempdir().unwrap();
        let id = |name: &str, content: &[u8]| {
            fs_err::write(folder.path().join(name), content).unwrap();
            uuid_of(&folder.path().join(name)).unwrap()
        };
        assert_eq!(id("a", b"1"), id("b", b"1"));
        assert_ne!(id("a", b"1"), id("b", b"2"));
        assert_eq!(id("a", b"1").len(), 36);
    }
}
