//! What the host's initramfs holds: PID 1, and the modules on the way to the root.

use crate::{Cpio, CpioError};

/// Folders PID 1 mounts on.
const MOUNT_POINTS: [&str; 5] = ["dev", "proc", "run", "sys", "sysroot"];

/// A kernel module, uncompressed.
#[derive(Debug)]
pub struct Module {
    /// As the kernel calls it: no dashes, no `.ko`.
    pub name: String,
    pub content: Vec<u8>,
    /// Modules to load before it, in this order.
    pub needs: Vec<String>,
    /// Patterns of the devices it drives.
    pub aliases: Vec<String>,
}

/// Packs the host's initramfs.
///
/// PID 1 reads `/modules/alias` (lines `PATTERN NAME`) and `/modules/dep` (lines
/// `NAME: FIRST SECOND …`).
pub fn initramfs(init: &[u8], modules: &[Module]) -> Result<Vec<u8>, CpioError> {
    let mut archive = Cpio::bootable(&MOUNT_POINTS, init)?;
    let (mut aliases, mut needs) = (String::new(), String::new());
    for module in modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.content)?;
        needs.push_str(&format!("{}: {}\n", module.name, module.needs.join(" ")));
        for pattern in &module.aliases {
            aliases.push_str(&format!("{pattern} {}\n", module.name));
        }
    }
    archive.file("modules/alias", 0o644, aliases.as_bytes())?;
    archive.file("modules/dep", 0o644, needs.as_bytes())?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_with_what_they_need_and_drive() {
        let module = Module {
            name: "virtio_blk".to_owned(),
            content: vec![1],
            needs: vec!["virtio".to_owned(), "virtio_ring".to_owned()],
            aliases: vec!["virtio:d2v*".to_owned()],
        };
        let bytes = initramfs(b"init", &[module]).unwrap();
        for expected in [
            "virtio_blk: virtio virtio_ring\n",
            "virtio:d2v* virtio_blk\n",
            "modules/virtio_blk.ko",
        ] {
            let found = bytes.windows(expected.len()).any(|window| window == expected.as_bytes());
            assert!(found, "{expected}");
        }
    }
}
