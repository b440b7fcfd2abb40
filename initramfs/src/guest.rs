//! What the microVM's initramfs holds: PID 1, and for kernels that are not ours their modules.

use crate::{Cpio, CpioError};

/// Folders PID 1 mounts on.
const MOUNT_POINTS: [&str; 4] = ["dev", "proc", "run", "sys"];

/// A kernel module, uncompressed.
#[derive(Debug)]
pub struct Module {
    /// File name, `virtio_blk.ko`.
    pub name: String,
    pub content: Vec<u8>,
}

/// Packs the guest's initramfs.
///
/// `modules` are loaded by PID 1 in this order, as `/modules.list` says. Our own kernel has
/// everything built in and needs none.
pub fn initramfs(init: &[u8], modules: &[Module]) -> Result<Vec<u8>, CpioError> {
    let mut archive = Cpio::bootable(&MOUNT_POINTS, init)?;
    if !modules.is_empty() {
        let mut list = String::new();
        for module in modules {
            let path = format!("modules/{}", module.name);
            archive.file(&path, 0o644, &module.content)?;
            list.push_str(&format!("/{path}\n"));
        }
        archive.file("modules.list", 0o644, list.as_bytes())?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_listed_in_the_order_they_must_be_loaded() {
        let module = |name: &str| Module { name: name.to_owned(), content: vec![1] };
        let bytes = initramfs(b"init", &[module("b.ko"), module("a.ko")]).unwrap();
        let list = b"/modules/b.ko\n/modules/a.ko\n";
        assert!(bytes.windows(list.len()).any(|window| window == list));
    }
}
