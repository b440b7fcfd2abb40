//! The peer of the resume bench: QEMU saves a guest to a file with its memory at fixed places
//! (`mapped-ram`), and another QEMU goes on from it. The guest says `ready` once, then `tick` again
//! and again, on its serial port, which is standard output.

use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};

#[derive(Debug, Parser)]
#[command(about = "Times of QEMU's save to a file and of going on from it")]
struct Options {
    /// Folder for the saved guest and the monitor's socket
    #[arg(long)]
    folder: std::path::PathBuf,
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// QEMU and its arguments, without monitor
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let mut out = io::stdout().lock();
    for _ in 0..options.rounds {
        let saved = options.folder.join("saved");
        let (mut qemu, mut monitor) = start(&options, &[])?;
        wait_for(&mut qemu, b"ready")?;
        wait_for(&mut qemu, b"tick")?;
        monitor.set_mapped_ram()?;
        let began = Instant::now();
        monitor.ask("stop", &json!({}))?;
        monitor.ask("migrate", &json!({"uri": format!("file:{}", saved.display())}))?;
        monitor.migrated()?;
        writeln!(out, "qemu_save_us: {}", began.elapsed().as_micros())?;
        writeln!(out, "qemu_stored_kib: {}", saved.metadata()?.blocks() / 2)?;
        qemu.kill()?;
        qemu.wait()?;

        let began = Instant::now();
        let (mut qemu, mut monitor) = start(&options, &["-incoming", "defer"])?;
        monitor.set_mapped_ram()?;
        let asked = Instant::now();
        let uri = json!({"uri": format!("file:{}", saved.display())});
        monitor.ask("migrate-incoming", &uri)?;
        monitor.migrated()?;
        // It was saved standing still, and so it is back.
        monitor.ask("cont", &json!({}))?;
        wait_for(&mut qemu, b"tick")?;
        writeln!(out, "qemu_restore_us: {}", asked.elapsed().as_micros())?;
        writeln!(out, "qemu_resume_us: {}", began.elapsed().as_micros())?;
        std::thread::sleep(Duration::from_millis(300));
        let status = fs_err::read_to_string(format!("/proc/{}/status", qemu.id()))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|rest| rest.trim().strip_suffix(" kB"));
        writeln!(out, "qemu_resident_kib: {}", resident.context("no resident memory told")?)?;
        qemu.kill()?;
        qemu.wait()?;
        fs_err::remove_file(&saved)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn start(options: &Options, more: &[&str]) -> Result<(Child, Monitor)> {
    let socket = options.folder.join("monitor.sock");
    let _ = fs_err::remove_file(&socket);
    let child = Command::new(&options.command[0])
        .args(&options.command[1..])
        .args(more)
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", options.command[0].display()))?;
    Ok((child, Monitor::connect(&socket)?))
}

fn wait_for(child: &mut Child, text: &[u8]) -> Result<()> {
    let mut output = child.stdout.take().context("no standard output")?;
    let mut seen = Vec::new();
    let mut piece = [0; 256];
    while !seen.windows(text.len()).any(|window| window == text) {
        match output.read(&mut piece)? {
            0 => bail!("QEMU ended with: {}", String::from_utf8_lossy(&seen)),
            count => seen.extend_from_slice(&piece[..count]),
        }
    }
    child.stdout = Some(output);
    Ok(())
}

struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    fn connect(socket: &Path) -> Result<Self> {
        let began = Instant::now();
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > Duration::from_secs(30) => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        let mut monitor = Self { reader: BufReader::new(writer.try_clone()?), writer };
        let mut greeting = String::new();
        monitor.reader.read_line(&mut greeting)?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.writer, "{request}")?;
        loop {
            let mut line = String::new();
            ensure!(self.reader.read_line(&mut line)? > 0, "QEMU's monitor is closed");
            let answer: Value = serde_json::from_str(&line)?;
            if answer.get("return").is_some() {
                return Ok(answer["return"].clone());
            }
            // The rest are events.
            ensure!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }

    fn set_mapped_ram(&mut self) -> Result<()> {
        let on = json!({"capabilities": [{"capability": "mapped-ram", "state": true}]});
        self.ask("migrate-set-capabilities", &on).map(drop)
    }

    fn migrated(&mut self) -> Result<()> {
        loop {
            let status = self.ask("query-migrate", &json!({}))?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("{status}"),
                _ => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }
}
