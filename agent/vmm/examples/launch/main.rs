//! Starts one microVM without an agent: for the bench, for experiments and for looking closely.
//! Boots it, prints its events and its serial output, ends with the VMM's exit code.

mod sys;
#[path = "../../src/devices/net/stand/sys.rs"]
#[allow(dead_code)]
mod tap;
mod vmm;

use std::{
    env,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use holdfast_wire::vmm::{Event, IoLimits, Network, Reply, ToVmm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::{DiskFiles, Launch, Saved, Vmm};

/// How often the serial log is looked at. Short against a boot, long against a look.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// VM exits of all machines that run now, as the kernel counts them.
const EXITS: &str = "/sys/kernel/debug/kvm/exits";

#[derive(Debug, Parser)]
#[command(about = "Start one microVM without an agent")]
struct Options {
    /// The VMM; else `holdfast-vmm` beside this program's folder
    #[arg(long, env = "HOLDFAST_VMM")]
    vmm: Option<PathBuf>,
    /// Uncompressed ELF kernel with a PVH note
    #[arg(long, env = "HOLDFAST_VMLINUX")]
    kernel: PathBuf,
    #[arg(long, env = "HOLDFAST_INITRAMFS")]
    initramfs: Option<PathBuf>,
    #[arg(long, default_value = "console=ttyS0 quiet loglevel=0 panic=-1 reboot=k pci=off")]
    cmdline: String,
    #[arg(long, default_value_t = 128)]
    memory_mib: u32,
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// PATH[+PATH…][:ro]: files laid end to end as one disk; several are read-only by nature
    #[arg(long = "disk")]
    disks: Vec<String>,
    /// Give the microVM a network device on this tap, which is made if it is missing
    #[arg(long)]
    tap: Option<String>,
    /// Give the microVM a balloon with free-page reporting
    #[arg(long)]
    balloon: bool,
    /// Serial output over this many bytes is dropped
    #[arg(long, default_value_t = 1 << 20)]
    serial_bytes_max: u64,
    /// Tell the statistics and kill the microVM once its serial output holds this text
    #[arg(long)]
    until: Option<String>,
    /// Tell the statistics and kill the microVM once PID 1 has reported
    #[arg(long)]
    until_ready: bool,
    /// Save the microVM into this folder instead of killing it at once, and say what that cost
    #[arg(long)]
    save: Option<PathBuf>,
    /// Go on from what was saved in this folder instead of booting
    #[arg(long)]
    restore: Option<PathBuf>,
    /// Kill the microVM after this many seconds, and fail
    #[arg(long, default_value_t = 300)]
    timeout_s: u64,
}

impl Options {
    fn launch(&self) -> Result<Launch> {
        let vmm = match &self.vmm {
            Some(path) => path.clone(),
            None => {
                let program = env::current_exe()?;
                let folder = program.parent().and_then(|folder| folder.parent());
                folder.context("this program has no folder above its own")?.join("holdfast-vmm")
            }
        };
        Ok(Launch {
            initramfs: self.initramfs.clone(),
            command_line: self.cmdline.clone(),
            memory_mib: self.memory_mib,
            vcpus: self.cpus,
            disks: self.disks.iter().map(|text| disk(text)).collect(),
            serial_bytes_max: self.serial_bytes_max,
            stream_serial: self.until.is_some(),
            balloon: self.balloon,
            networks: self.tap.iter().map(|name| network(name)).collect::<Result<_>>()?,
            saved: self.restore.as_deref().map(Saved::in_folder).transpose()?,
            ..Launch::new(vmm, self.kernel.clone())
        })
    }
}

fn network(name: &str) -> Result<(Arc<OwnedFd>, Network)> {
    let tap = tap::tap(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    let (to_guest, from_guest) = (IoLimits::default(), IoLimits::default());
    let network = Network { tap_fd: 0, mac: MAC, mtu: 1500, to_guest, from_guest };
    Ok((Arc::new(tap), network))
}

fn disk(text: &str) -> DiskFiles {
    let (paths, read_only) = match text.strip_suffix(":ro") {
        Some(paths) => (paths, true),
        None => (text, text.contains('+')),
    };
    let files = paths.split('+').map(PathBuf::from).collect();
    DiskFiles { files, read_only, limits: IoLimits::default() }
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let mut vmm = options.launch()?.start()?;
    let started = vmm.started;
    let limit = started + Duration::from_secs(options.timeout_s);
    let greeted = started.elapsed();
    let mut out = io::stdout().lock();
    writeln!(out, "[vmm pid {}]", vmm.pid())?;
    writeln!(out, "[control {}]", vmm.control_path().display())?;
    writeln!(out, "[vsock {}]", vmm.vsock_path().display())?;
    let begin: &[ToVmm] = match options.restore {
        None => &[ToVmm::Boot],
        Some(_) => &[ToVmm::Restore, ToVmm::RenewGeneration, ToVmm::Resume],
    };
    for request in begin {
        match vmm.ask(request)? {
            Reply::Done => {}
            other => bail!("{request:?} was answered by {other:?}"),
        }
    }
    let loaded = started.elapsed();
    writeln!(out, "greeted_us: {}\nloaded_us: {}", greeted.as_micros(), loaded.as_micros())?;
    if let Some(text) = &options.until {
        await_text(&mut vmm, text, limit, &mut out)?;
        tell(&mut vmm, started, &mut out)?;
        return finish(&mut vmm, &options, &mut out);
    }
    let mut shown = 0;
    loop {
        shown = show_serial(&vmm, shown, &mut out)?;
        let event = vmm.event_within(LOOK_INTERVAL)?;
        if let Some(event) = &event {
            writeln!(out, "[{} ms: {event:?}]", started.elapsed().as_millis())?;
        }
        if options.until_ready && event == Some(Event::GuestReady) {
            tell(&mut vmm, started, &mut out)?;
            return finish(&mut vmm, &options, &mut out);
        }
        if let Some(Event::Exited(exit)) = event {
            show_serial(&vmm, shown, &mut out)?;
            vmm.wait()?;
            return Ok(ExitCode::from(exit.code()));
        }
        if Instant::now() > limit {
            tell(&mut vmm, started, &mut out)?;
            bail!("the microVM did not end within {} s", options.timeout_s);
        }
    }
}

/// Ends the microVM, saved first if that was asked for.
fn finish(vmm: &mut Vmm, options: &Options, out: &mut impl Write) -> Result<ExitCode> {
    if let Some(folder) = &options.save {
        fs_err::create_dir_all(folder)?;
        let begun = Instant::now();
        let saved = vmm.save(&Saved::memory_in(folder))?;
        fs_err::write(Saved::state_in(folder), &saved.state)?;
        writeln!(out, "state_bytes: {}", saved.state.len())?;
        writeln!(out, "save_with_memory_us: {}", begun.elapsed().as_micros())?;
    }
    vmm.ask(&ToVmm::Kill)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the guest's output until it holds `text`. Looking only when there is something new costs
/// the bench nothing.
fn await_text(vmm: &mut Vmm, text: &str, limit: Instant, out: &mut impl Write) -> Result<()> {
    let mut stream = vmm.serial_stream.take().context("serial output is not streamed")?;
    let mut seen = Vec::new();
    let mut piece = [0; 1024];
    while !seen.windows(text.len()).any(|window| window == text.as_bytes()) {
        let left = Timespec::try_from(limit.saturating_duration_since(Instant::now()))?;
        if poll(&mut [PollFd::new(&stream, PollFlags::IN)], Some(&left))? == 0 {
            bail!("the text did not come in time");
        }
        match stream.read(&mut piece)? {
            0 => bail!("the VMM ended before the text came: {:?}", vmm.next_event()?),
            count => {
                out.write_all(&piece[..count])?;
                seen.extend_from_slice(&piece[..count]);
            }
        }
    }
    vmm.serial_stream = Some(stream);
    Ok(())
}

/// Prints what is new in the serial log; returns how much of it is printed now.
fn show_serial(vmm: &Vmm, shown: usize, out: &mut impl Write) -> Result<usize> {
    let log = vmm.serial()?;
    out.write_all(log.get(shown..).unwrap_or_default().as_bytes())?;
    out.flush()?;
    Ok(log.len())
}

/// Tells how long it took, what it cost, and what the VMM holds, in lines `name: value`.
fn tell(vmm: &mut Vmm, started: Instant, out: &mut impl Write) -> Result<()> {
    let wall = started.elapsed();
    let (overhead_kib, anonymous_kib) = (vmm.overhead_kib()?, vmm.anonymous_kib()?);
    let Reply::Stats(stats) = vmm.ask(&ToVmm::Stats)? else { bail!("no statistics") };
    writeln!(out, "wall_us: {}", wall.as_micros())?;
    if let Ok(exits) = fs_err::read_to_string(EXITS) {
        writeln!(out, "kvm_exits: {}", exits.trim())?;
    }
    writeln!(out, "exits_mmio: {}", stats.exits.mmio)?;
    writeln!(out, "exits_port_io: {}", stats.exits.port_io)?;
    writeln!(out, "exits_other: {}", stats.exits.other)?;
    writeln!(out, "serial_bytes: {}", stats.serial_bytes)?;
    writeln!(out, "vmm_rss_kib: {overhead_kib}")?;
    writeln!(out, "vmm_anon_kib: {anonymous_kib}")?;
    writeln!(out, "guest_kib: {}", vmm.guest_bytes()? / 1024)?;
    for thread in fs_err::read_dir(format!("/proc/{}/task", vmm.pid()))? {
        let thread = thread?.path();
        let name = fs_err::read_to_string(thread.join("comm"))?;
        // Nanoseconds on a CPU are the first of its numbers.
        let times = fs_err::read_to_string(thread.join("schedstat"))?;
        let ns = times.split(' ').next().unwrap_or_default();
        writeln!(out, "thread_{}_ns: {ns}", name.trim())?;
    }
    Ok(())
}
