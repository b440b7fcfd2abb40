//! Debian's kernel for the host: the image and the modules a server needs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{cache::Cache, command::run, debian::SUITE, tools::Tools};

/// The general kernel: the cloud one has no drivers for physical machines.
const PACKAGE: &str = "linux-image-amd64";
/// Counted up when the lists below or the steps change, so that caches are made anew.
const RECIPE: &str = "2";

/// Below `kernel/`, what no server of ours uses.
const LEFT_OUT: [&str; 46] = [
    "drivers/atm",
    "drivers/auxdisplay",
    "drivers/bluetooth",
    "drivers/comedi",
    "drivers/counter",
    "drivers/extcon",
    "drivers/firewire",
    "drivers/fpga",
    "drivers/gnss",
    "drivers/gpu",
    "drivers/greybus",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/input/joystick",
    "drivers/input/misc",
    "drivers/input/tablet",
    "drivers/input/touchscreen",
    "drivers/isdn",
    "drivers/leds",
    "drivers/media",
    "drivers/memstick",
    "drivers/mtd",
    "drivers/net/can",
    "drivers/net/fddi",
    "drivers/net/hamradio",
    "drivers/net/ieee802154",
    "drivers/net/plip",
    "drivers/net/ppp",
    "drivers/net/slip",
    "drivers/net/usb",
    "drivers/net/wan",
    "drivers/net/wireless",
    "drivers/net/wwan",
    "drivers/nfc",
    "drivers/parport",
    "drivers/pcmcia",
    "drivers/platform",
    "drivers/power",
    "drivers/soundwire",
    "drivers/staging",
    "drivers/usb/gadget",
    "drivers/usb/misc",
    "drivers/usb/serial",
    "drivers/video",
    "drivers/w1",
    "sound",
];
/// Protocols kept below `kernel/net`: the rest is attack surface.
const NET_KEPT: [&str; 15] = [
    "802",
    "8021q",
    "bridge",
    "core",
    "ipv4",
    "ipv6",
    "llc",
    "netfilter",
    "netlink",
    "packet",
    "psample",
    "sched",
    "tls",
    "vmw_vsock",
    "xfrm",
];
/// File systems kept below `kernel/fs`.
const FS_KEPT: [&str; 16] = [
    "autofs",
    "configfs",
    "efivarfs",
    "erofs",
    "exfat",
    "ext4",
    "fat",
    "fuse",
    "isofs",
    "jbd2",
    "mbcache.ko",
    "netfs",
    "nls",
    "overlayfs",
    "pstore",
    "xfs",
];

#[derive(Debug)]
pub(crate) struct Kernel {
    /// As in `uname -r`.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
    /// The folder to be `/usr/lib/modules/RELEASE`: modules uncompressed (the root is), indexed.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    pub(crate) fn ensure(cache: &Cache, tools: &Tools) -> Result<Self> {
        let wanted = format!("{PACKAGE}/{SUITE}");
        let depends = run(Command::new("apt-cache").args(["depends", &wanted]))?;
        let package = image_package(&depends)
            .with_context(|| format!("{wanted} is not in the package lists: run scripts/setup"))?;
        let shown = format!("{package}/{SUITE}");
        let version = run(Command::new("apt-cache").args(["show", &shown]))?;
        let version = version.lines().find(|line| line.starts_with("Version: "));
        let inputs = [RECIPE, &package, version.unwrap_or_default()];
        let folder = cache.ensure("kernel", &inputs, |draft| make(&shown, tools, draft))?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        Ok(Self { release, vmlinuz: folder.join("vmlinuz"), modules: folder.join("modules") })
    }
}

/// The package that `linux-image-amd64` stands for.
fn image_package(depends: &str) -> Option<String> {
    let mut names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names.find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

fn make(package: &str, tools: &Tools, draft: &Path) -> Result<()> {
    let work = tools.workspace()?;
    run(Command::new("apt-get")
        .args(["download", "--quiet", "-o", "APT::Sandbox::User=root", package])
        .current_dir(work.path()))?;
    let archive = files_in(work.path())?.pop().context("apt-get downloaded nothing")?;
    let root = work.path().join("root");
    run(Command::new("dpkg-deb").arg("--extract").args([&archive, &root]))?;

    let modules = root.join("usr/lib/modules");
    let modules = files_in(&modules)?.pop().context("the kernel package has no modules")?;
    prune(&modules.join("kernel"))?;
    let name = modules.file_name().and_then(|name| name.to_str()).context("odd kernel release")?;
    let seen = work.seen("root");
    let unpack =
        format!("find {seen}/usr/lib/modules -name '*.ko.xz' -print0 | xargs -0r -P4 -n64 unxz");
    tools.run("sh", &["-c", &unpack])?;
    std::os::unix::fs::symlink("usr/lib", root.join("lib"))?;
    tools.run("depmod", &["--basedir", &seen, name])?;
    for index in ["build", "source"] {
        let _ = fs_err::remove_file(modules.join(index));
    }
    fs_err::rename(&modules, draft.join("modules"))?;
    let vmlinuz = files_in(&root.join("boot"))?;
    let is_it = |path: &&PathBuf| path.to_string_lossy().contains("/vmlinuz-");
    let vmlinuz = vmlinuz.iter().find(is_it).context("the kernel package has no vmlinuz")?;
    fs_err::rename(vmlinuz, draft.join("vmlinuz"))?;
    Ok(())
}

/// Removes below `kernel` what the lists leave out.
fn prune(kernel: &Path) -> Result<()> {
    for path in LEFT_OUT {
        let path = kernel.join(path);
        // Debian moves things between releases: what is gone needs no removing.
        if path.exists() {
            fs_err::remove_dir_all(path)?;
        }
    }
    for (folder, kept) in [("net", &NET_KEPT[..]), ("fs", &FS_KEPT[..])] {
        for path in files_in(&kernel.join(folder))? {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            if kept.contains(&name.trim_end_matches(".xz")) {
                continue;
            }
            if path.is_dir() { fs_err::remove_dir_all(&path)? } else { fs_err::remove_file(&path)? }
        }
    }
    Ok(())
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs_err::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_package_is_read_from_what_the_meta_package_depends_on() {
        let depends =
            "linux-image-amd64\n  Depends: linux-base\n  Depends: linux-image-6.12.1-amd64\n";
        assert_eq!(image_package(depends).as_deref(), Some("linux-image-6.12.1-amd64"));
        assert_eq!(image_package("linux-image-amd64\n"), None);
    }

    #[test]
    fn pruning_keeps_storage_and_netfilter_and_drops_sound_and_wireless() {
        let kernel = tempfile::tempdir().unwrap();
        let path = |name: &str| kernel.path().join(name);
        let kept = [
            "net/netfilter/nf_tables.ko.xz",
            "fs/xfs/xfs.ko.xz",
            "fs/mbcache.ko.xz",
            "drivers/nvme/a.ko.xz",
        ];
        let dropped = [
            "sound/a.ko.xz",
            "drivers/net/wireless/a.ko.xz",
            "net/tipc/a.ko.xz",
            "fs/ntfs3/a.ko.xz",
        ];
        for name in kept.iter().chain(&dropped) {
            fs_err::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs_err::write(path(name), b"").unwrap();
        }
        prune(kernel.path()).unwrap();
        assert!(kept.iter().all(|name| path(name).exists()));
        assert!(!dropped.iter().any(|name| path(name).exists()));
    }
}
