//! The root tree: Debian's packages, pruned, and over them what is ours.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use holdfast_initramfs::guest;
use sha2::{Digest as _, Sha256};

use crate::{
    Args, Variant,
    cache::Cache,
    command::run,
    debian::{Sources, bootstrap},
    kernel::Kernel,
};

const PACKAGES: [&str; 14] = [
    "ca-certificates",
    "dbus-broker",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "nftables",
    "systemd",
    "systemd-repart",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
    "util-linux",
    "xfsprogs",
];
/// Counted up when a list below changes, so that caches are made anew.
const RECIPE: &str = "2";

/// Gone from every image: package managers, interpreters, what only they use, what is made at run
/// time. Shell patterns below the root.
const PRUNED: &str = "boot/* home/* media/* srv/* tmp/* var/* etc/apt etc/dpkg etc/cron.* \
    etc/systemd/system/* etc/machine-id etc/resolv.conf etc/hostname etc/fstab etc/motd \
    etc/update-motd.d etc/init.d etc/rc?.d etc/python3* etc/perl etc/default etc/logrotate.d \
    usr/bin/apt* usr/bin/dpkg* usr/bin/deb* usr/bin/perl* usr/bin/python* usr/bin/py3* \
    usr/bin/pydoc* usr/bin/pygettext* usr/bin/sqv usr/bin/openssl usr/lib/apt usr/lib/dpkg \
    usr/lib/python3* usr/lib/systemd/user usr/lib/systemd/user-* usr/lib/init \
    usr/lib/udev/hwdb.d usr/lib/udev/hwdb.bin usr/lib/x86_64-linux-gnu/gconv \
    usr/lib/x86_64-linux-gnu/libapt* usr/lib/x86_64-linux-gnu/libicu* \
    usr/lib/x86_64-linux-gnu/perl* usr/lib/x86_64-linux-gnu/libsqlite3* \
    usr/sbin/xfs_scrub* usr/sbin/dpkg* usr/share/bug usr/share/debconf usr/share/dpkg \
    usr/share/gcc usr/share/gdb usr/share/icu usr/share/perl* usr/share/python* usr/share/zoneinfo";

/// Of Debian's programs, those a release image keeps: what systemd, udev and the agent start, and
/// no shell. Names below `usr/bin` and `usr/sbin`.
const RELEASE_PROGRAMS: [&str; 38] = [
    "blkid",
    "dbus-broker",
    "dbus-broker-launch",
    "e2fsck",
    "false",
    "halt",
    "init",
    "insmod",
    "ip",
    "journalctl",
    "kmod",
    "mke2fs",
    "mkfs.ext4",
    "mkfs.xfs",
    "modprobe",
    "mount",
    "networkctl",
    "nft",
    "poweroff",
    "reboot",
    "resize2fs",
    "resolvectl",
    "shutdown",
    "sleep",
    "ss",
    "systemctl",
    "systemd-cat",
    "systemd-creds",
    "systemd-detect-virt",
    "systemd-escape",
    "systemd-id128",
    "systemd-notify",
    "systemd-repart",
    "systemd-tmpfiles",
    "udevadm",
    "umount",
    "xfs_growfs",
    "xfs_repair",
];

/// Our programs on the node.
#[derive(Debug, clap::Args)]
pub(crate) struct Programs {
    /// The agent
    #[arg(long)]
    pub(crate) holdfastd: PathBuf,
    /// The command line
    #[arg(long)]
    pub(crate) holdfast: PathBuf,
    /// The microVM process
    #[arg(long)]
    pub(crate) vmm: PathBuf,
    /// The parent of each microVM process
    #[arg(long)]
    pub(crate) shim: PathBuf,
    /// The image converter
    #[arg(long)]
    pub(crate) convert: PathBuf,
    /// What fills the memory of cold resumes
    #[arg(long)]
    pub(crate) pager: PathBuf,
    /// The way out of sandboxes
    #[arg(long)]
    pub(crate) egress: PathBuf,
}

/// Debian's part of the root.
pub(crate) fn ensure_base(cache: &Cache, sources: &Sources, variant: Variant) -> Result<PathBuf> {
    let kind = match variant {
        Variant::Dev => "root-dev",
        Variant::Release => "root-release",
    };
    let inputs = [&[RECIPE, PRUNED], &PACKAGES[..], &RELEASE_PROGRAMS[..]].concat();
    cache.ensure(kind, &inputs, |draft| {
        let tree = draft.join("tree");
        bootstrap(sources, "minbase", &PACKAGES, &tree)?;
        // Nobody logs in on a node: a program that gives root to its caller serves no one.
        let prune = format!(
            "cd \"$1\" && rm -rf {PRUNED} && find . -perm /6000 -type f -exec chmod ug-s {{}} +"
        );
        run(Command::new("sh").args(["-euc", &prune, "prune"]).arg(&tree))?;
        if variant == Variant::Release {
            for folder in ["usr/bin", "usr/sbin"] {
                keep_only(&tree.join(folder), &RELEASE_PROGRAMS)?;
            }
        }
        Ok(())
    })
}

/// Removes all programs in `folder` but the named ones.
fn keep_only(folder: &Path, names: &[&str]) -> Result<()> {
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        if !names.contains(&&*entry.file_name().to_string_lossy()) {
            fs_err::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// What one root tree is put together from.
#[derive(Debug)]
pub(crate) struct Staging<'a> {
    pub(crate) work: &'a Path,
    pub(crate) base: &'a Path,
    pub(crate) args: &'a Args,
    pub(crate) kernel: &'a Kernel,
}

impl Staging<'_> {
    /// Makes the tree in the work folder. Cached parts are hard-linked: nothing here writes into
    /// an existing file.
    pub(crate) fn assemble(&self, images: Option<&Path>) -> Result<()> {
        let tree = self.work.join("root");
        link(&self.base.join("tree"), &tree)?;
        fs_err::create_dir_all(tree.join("usr/lib/modules"))?;
        link(&self.kernel.modules, &tree.join("usr/lib/modules").join(&self.kernel.release))?;
        lay_over(&tree, &self.args.files)?;
        if self.args.variant == Variant::Dev {
            lay_over(&tree, &self.args.dev_files)?;
        }

        let programs = &self.args.programs;
        for (from, to) in [
            (&programs.holdfastd, "usr/bin/holdfastd"),
            (&programs.holdfast, "usr/bin/holdfast"),
            (&programs.vmm, "usr/lib/holdfast/holdfast-vmm"),
            (&programs.shim, "usr/lib/holdfast/holdfast-shim"),
            (&programs.convert, "usr/lib/holdfast/holdfast-convert"),
            (&programs.pager, "usr/lib/holdfast/holdfast-pager"),
            (&programs.egress, "usr/lib/holdfast/holdfast-egress"),
        ] {
            install(from, &tree.join(to), "0755")?;
        }
        let guest = tree.join("usr/lib/holdfast/guest");
        install(&self.args.guest_kernel, &guest.join("vmlinux"), "0644")?;
        let initramfs = guest::initramfs(&fs_err::read(&self.args.guest_init)?, &[])?;
        fs_err::write(guest.join("initramfs.cpio"), initramfs)?;
        install(&self.args.ruleset, &tree.join("etc/nftables.conf"), "0644")?;
        let shared = tree.join("usr/share/holdfast");
        fs_err::create_dir_all(&shared)?;
        match images {
            Some(images) => link(images, &shared.join("images"))?,
            None => {
                fs_err::create_dir_all(shared.join("images"))?;
                fs_err::write(shared.join("images/public.json"), "[]\n")?;
            }
        }
        self.name_it(&tree)
    }

    /// `os-release` says what runs here and which Debian it is made of.
    fn name_it(&self, tree: &Path) -> Result<()> {
        let path = tree.join("usr/lib/os-release");
        let debian = fs_err::read_to_string(&path)?;
        let build = build_id(&self.args.programs, &debian, &self.kernel.release)?;
        fs_err::remove_file(&path)?;
        fs_err::write(&path, os_release(&debian, env!("CARGO_PKG_VERSION"), &build))?;
        Ok(())
    }
}

/// Copies `files` over the tree, everything owned by root.
fn lay_over(tree: &Path, files: &Path) -> Result<()> {
    let mut from = files.to_owned().into_os_string();
    from.push("/.");
    run(Command::new("cp")
        .args(["--recursive", "--no-dereference", "--remove-destination", "--preserve=links"])
        .arg(from)
        .arg(tree))?;
    Ok(())
}

/// Which build this is: the digest of our programs, Debian's release and the kernel's.
fn build_id(programs: &Programs, debian: &str, kernel: &str) -> Result<String> {
    let mut sha = Sha256::new();
    let Programs { holdfastd, holdfast, vmm, shim, convert, pager, egress } = programs;
    for program in [holdfastd, holdfast, vmm, shim, convert, pager, egress] {
        sha.update(fs_err::read(program)?);
    }
    sha.update(debian);
    sha.update(kernel);
    Ok(sha.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}

fn os_release(debian: &str, version: &str, build: &str) -> String {
    let field = |key: &str| {
        let line = debian.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    format!(
        "NAME=\"Holdfast\"\nID=holdfast\nID_LIKE=debian\nVERSION_ID={version}\n\
         PRETTY_NAME=\"Holdfast {version} ({})\"\nBUILD_ID={build}\nVERSION_CODENAME={}\n",
        field("PRETTY_NAME"),
        field("VERSION_CODENAME"),
    )
}

/// Copies the tree `from` as hard links.
fn link(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").args(["--archive", "--link"]).arg(from).arg(to))
        .with_context(|| format!("cannot link {}", from.display()))?;
    Ok(())
}

fn install(from: &Path, to: &Path, mode: &str) -> Result<()> {
    run(Command::new("install").args(["-D", "--mode", mode]).arg(from).arg(to))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_names_holdfast_and_the_debian_it_is_made_of() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nVERSION_CODENAME=trixie\n";
        let text = os_release(debian, "0.1.0", "abc");
        assert!(text.contains("PRETTY_NAME=\"Holdfast 0.1.0 (Debian GNU/Linux 13 (trixie))\"\n"));
        assert!(text.contains("ID=holdfast\n") && text.contains("VERSION_CODENAME=trixie\n"));
    }

    #[test]
    fn only_the_named_programs_stay() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["init", "bash"] {
            fs_err::write(folder.path().join(name), b"").unwrap();
        }
        keep_only(folder.path(), &RELEASE_PROGRAMS).unwrap();
        assert!(folder.path().join("init").exists() && !folder.path().join("bash").exists());
    }

    #[test]
    fn linked_trees_share_files_and_not_folders() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs_err::create_dir(&from).unwrap();
        fs_err::write(from.join("a"), b"1").unwrap();
        link(&from, &to).unwrap();
        fs_err::write(to.join("b"), b"2").unwrap();
        assert_eq!(fs_err::read(to.join("a")).unwrap(), b"1");
        assert!(!from.join("b").exists());
    }
}
