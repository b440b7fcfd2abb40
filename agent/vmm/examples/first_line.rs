//! How long a program takes until its standard output holds a text: the peer's side of the boot
//! bench, whose serial port is its standard output. Kills the program afterwards.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    process::{Child, Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Parser;

/// VM exits of all machines that run now, as the kernel counts them.
const EXITS: &str = "/sys/kernel/debug/kvm/exits";

#[derive(Debug, Parser)]
#[command(about = "Time until a program prints a text")]
struct Options {
    /// The text to wait for
    text: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let started = Instant::now();
    let mut child = Command::new(&options.command[0])
        .args(&options.command[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", options.command[0].display()))?;
    let waited = wait_for(&mut child, options.text.as_bytes()).and_then(|()| {
        let wall = started.elapsed();
        tell(&child, wall.as_micros())
    });
    child.kill()?;
    child.wait()?;
    waited.map(|()| ExitCode::SUCCESS)
}

fn wait_for(child: &mut Child, text: &[u8]) -> Result<()> {
    let mut output = child.stdout.take().context("no standard output")?;
    let mut seen = Vec::new();
    let mut piece = [0; 1024];
    while !seen.windows(text.len()).any(|window| window == text) {
        match output.read(&mut piece)? {
            0 => bail!("the program ended with: {}", String::from_utf8_lossy(&seen)),
            count => seen.extend_from_slice(&piece[..count]),
        }
    }
    // The program must not die of a closed pipe before it is looked at.
    child.stdout = Some(output);
    Ok(())
}

fn tell(child: &Child, wall_us: u128) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "wall_us: {wall_us}")?;
    if let Ok(exits) = fs_err::read_to_string(EXITS) {
        writeln!(out, "kvm_exits: {}", exits.trim())?;
    }
    let status = fs_err::read_to_string(format!("/proc/{}/status", child.id()))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.and_then(|rest| rest.trim().strip_suffix(" kB"));
    writeln!(out, "rss_kib: {}", resident.context("no resident memory told")?)?;
    Ok(())
}
