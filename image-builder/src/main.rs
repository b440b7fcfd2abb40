//! Assembles the host image: a disk to flash or to boot in a virtual machine, and beside it the
//! kernel, initramfs and command line that boot the same root without firmware.
//!
//! It compiles nothing of ours (`scripts/image` does) and changes nothing outside its cache and
//! output folders. No loop device and no mount is needed; it runs as root, for files of any owner.
#![forbid(unsafe_code)]

mod cache;
mod command;
mod debian;
mod disk;
mod initrd;
mod kernel;
mod public;
mod root;
mod tools;

use std::{io::Write as _, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};

use crate::{cache::Cache, disk::Disk, kernel::Kernel, root::Programs, tools::Tools};

/// Assembles the Holdfast host image.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Folder for the results: disk.raw, vmlinuz, initrd, cmdline, root.erofs
    #[arg(long)]
    out: PathBuf,
    /// Folder that keeps what is slow to make, by the digest of its inputs
    #[arg(long, env = "HOLDFAST_CACHE")]
    cache: PathBuf,
    /// Folder laid over the Debian root as it is
    #[arg(long)]
    files: PathBuf,
    /// Folder laid over that in the dev variant
    #[arg(long)]
    dev_files: PathBuf,
    /// The host's nftables ruleset
    #[arg(long)]
    ruleset: PathBuf,
    /// What the image is for
    #[arg(long, value_enum, default_value = "dev")]
    variant: Variant,
    #[command(flatten)]
    programs: Programs,
    /// PID 1 of the host's initramfs
    #[arg(long)]
    host_init: PathBuf,
    /// Kernel of the microVMs
    #[arg(long)]
    guest_kernel: PathBuf,
    /// PID 1 of the microVMs
    #[arg(long)]
    guest_init: PathBuf,
    /// Leave out the public disk images
    #[arg(long)]
    no_public_images: bool,
}

/// What the image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Variant {
    /// Made in seconds, with a shell's tools inside
    Dev,
    /// Small, without shell, interpreter or package manager
    Release,
}

fn main() -> ExitCode {
    match build(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where stderr is closed nobody reads it.
            let _ = writeln!(std::io::stderr().lock(), "holdfast-image: {error:#}");
            ExitCode::from(3)
        }
    }
}

fn build(args: &Args) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("needs to be root: the image holds files of several owners");
    }
    fs_err::create_dir_all(&args.out)?;
    let cache = Cache::open(&args.cache.join("host"))?;
    let clock = Instant::now();
    let say = |stage: &str| {
        let seconds = clock.elapsed().as_secs_f32();
        let _ = writeln!(std::io::stderr().lock(), "{seconds:6.1} s  {stage}");
    };

    let sources = debian::sources()?;
    let tools = Tools::ensure(&cache, &sources).context("the tools tree")?;
    say("tools");
    let base = root::ensure_base(&cache, &sources, args.variant).context("the Debian root")?;
    say("Debian root");
    let kernel = Kernel::ensure(&cache, &tools).context("the host kernel")?;
    say("host kernel");
    let images = if args.no_public_images {
        None
    } else {
        let convert = &args.programs.convert;
        Some(public::ensure(&cache, &sources, convert).context("the public disk images")?)
    };
    say("public disk images");

    let work = tools.workspace()?;
    let staged = root::Staging { work: work.path(), base: &base, args, kernel: &kernel };
    staged.assemble(images.as_deref()).context("the root tree")?;
    say("root tree");
    let initrd = initrd::pack(&args.host_init, &kernel).context("the initramfs")?;
    say("initramfs");
    let disk = Disk { tools: &tools, work: &work, variant: args.variant };
    disk.write(&kernel, &initrd, &args.out)?;
    say(&format!("image in {}", args.out.display()));
    Ok(())
}
