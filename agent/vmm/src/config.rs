//! Reads and checks the configuration. What passes here is not checked again.

use std::{io, os::unix::fs::FileExt};

use holdfast_wire::{
    WIRE_VERSION,
    frame::{self, FrameError},
    vmm::{CONFIG_FD, Config},
};

use crate::{layout::COMMAND_LINE_BYTES_MAX, sys};

/// vCPUs of one microVM. The largest tier has 4; APIC ids and one thread each set no tighter limit.
const VCPUS_MAX: u8 = 32;
/// Below this a kernel with its initramfs does not fit.
const MEMORY_MIB_MIN: u32 = 64;
/// Guest memory ends where a 40-bit physical address does, which every host has.
const MEMORY_MIB_MAX: u32 = 1 << 19;
/// Largest configuration frame: some dozens of disk segments and one command line.
const CONFIG_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("configuration cannot be read from fd {CONFIG_FD}")]
    Read(#[source] io::Error),
    #[error("configuration ends before its frame does")]
    Cut,
    #[error("configuration is not one frame of it")]
    Frame(#[source] FrameError),
    #[error("configuration is of version {found}, this VMM speaks {WIRE_VERSION}")]
    Version { found: u16 },
    #[error("{found} vCPUs asked for; 1 to {VCPUS_MAX} are possible")]
    Vcpus { found: u8 },
    #[error("{found} MiB of memory asked for; {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} are possible")]
    Memory { found: u32 },
    #[error("command line has {bytes} bytes; {COMMAND_LINE_BYTES_MAX} are possible")]
    CommandLineTooLong { bytes: usize },
    #[error("command line holds a NUL")]
    CommandLineNul,
}

/// Reads the configuration from the start of the inherited fd [`CONFIG_FD`]. The fd stays open as
/// long as the second value lives, so that its number means nothing else meanwhile.
pub(crate) fn read() -> Result<(Config, impl Sized), ConfigError> {
    let fd = sys::claim_fd(CONFIG_FD).map_err(ConfigError::Read)?;
    let file = fs_err::File::from_parts(fd.into(), "configuration");
    let mut bytes = vec![0; CONFIG_BYTES_MAX];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.file().read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ConfigError::Read(error)),
        }
    }
    Ok((parse(&bytes[..filled])?, file))
}

fn parse(bytes: &[u8]) -> Result<Config, ConfigError> {
    let split = frame::split_frame(bytes).map_err(ConfigError::Frame)?.ok_or(ConfigError::Cut)?;
    let config: Config = frame::decode(split.frame).map_err(ConfigError::Frame)?;
    check(&config)?;
    Ok(config)
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let line = config.command_line.as_bytes();
    if config.version != WIRE_VERSION {
        return Err(ConfigError::Version { found: config.version });
    }
    if !(1..=VCPUS_MAX).contains(&config.vcpus) {
        return Err(ConfigError::Vcpus { found: config.vcpus });
    }
    if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&config.memory_mib) {
        return Err(ConfigError::Memory { found: config.memory_mib });
    }
    if line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(ConfigError::CommandLineTooLong { bytes: line.len() });
    }
    if line.contains(&0) {
        return Err(ConfigError::CommandLineNul);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use holdfast_wire::vmm::Serial;

    use super::*;

    fn good() -> Config {
        Config {
            version: WIRE_VERSION,
            vcpus: 1,
            memory_mib: 64,
            memory_fd: 4,
            kvm_fd: 5,
            kernel_fd: 6,
            initramfs_fd: 7,
            command_line: "quiet".to_owned(),
            control_fd: 8,
            vsock_fd: 9,
            serial: Serial { log_fd: 10, bytes_max: 1 },
            disks: Vec::new(),
        }
    }

    fn refusal(change: impl FnOnce(&mut Config)) -> String {
        let mut config = good();
        change(&mut config);
        parse(&frame::encode(&config).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_sound_configuration_is_read_back() {
        assert_eq!(parse(&frame::encode(&good()).unwrap()).unwrap(), good());
    }

    #[test]
    fn each_limit_is_refused_by_name() {
        assert!(refusal(|config| config.version = 99).contains("version 99"));
        assert!(refusal(|config| config.vcpus = 0).contains("0 vCPUs"));
        assert!(refusal(|config| config.vcpus = 33).contains("33 vCPUs"));
        assert!(refusal(|config| config.memory_mib = 63).contains("63 MiB"));
        assert!(refusal(|config| config.command_line = "a".repeat(2048)).contains("2048 bytes"));
        assert!(refusal(|config| config.command_line = "a\0b".to_owned()).contains("NUL"));
    }

    #[test]
    fn a_configuration_cut_anywhere_is_refused() {
        let whole = frame::encode(&good()).unwrap();
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }
}
