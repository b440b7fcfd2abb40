//! Reads and checks the configuration. What passes here is not checked again.

use std::io;

use holdfast_wire::{
    WIRE_VERSION,
    frame::{self, FrameError},
    vmm::{BURST_MS_MIN, CONFIG_FD, Config, IoLimits, Network, Rate, WRITTEN_MAX},
};

use crate::{inherited, layout::COMMAND_LINE_BYTES_MAX, limits::config::*, sys};

/// Shortest bursts that fit into a second.
const BURSTS_PER_SECOND: u64 = 1000 / BURST_MS_MIN;

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
    #[error("{found} runs of written pages told; {WRITTEN_MAX} are possible")]
    Written { found: usize },
    #[error("written pages are told of memory that is no private copy of a file")]
    WrittenNotPrivate,
    #[error("command line has {bytes} bytes; {COMMAND_LINE_BYTES_MAX} are possible")]
    CommandLineTooLong { bytes: usize },
    #[error("command line holds a NUL")]
    CommandLineNul,
    #[error("network {index} has MTU {found}; {MTU_MIN} to 65535 are possible")]
    Mtu { index: usize, found: u16 },
    #[error("network {index} has a MAC address that is not one of a single station")]
    Mac { index: usize },
    #[error(
        "{device} has a burst of {} at {} a second; one of {BURST_MS_MIN} ms and of 1 is needed",
        rate.burst, rate.per_second
    )]
    Burst { device: String, rate: Rate },
}

/// Reads the configuration from the start of the inherited fd [`CONFIG_FD`]. The fd stays open as
/// long as the second value lives, so that its number means nothing else meanwhile.
pub(crate) fn read() -> Result<(Config, impl Sized), ConfigError> {
    let fd = sys::claim_fd(CONFIG_FD).map_err(ConfigError::Read)?;
    let file = fs_err::File::from_parts(fd.into(), "configuration");
    let bytes = inherited::read_start(&file, CONFIG_BYTES_MAX).map_err(ConfigError::Read)?;
    Ok((parse(&bytes)?, file))
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
    if config.written.len() > WRITTEN_MAX {
        return Err(ConfigError::Written { found: config.written.len() });
    }
    if !config.written.is_empty() && !config.memory_private {
        return Err(ConfigError::WrittenNotPrivate);
    }
    if line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(ConfigError::CommandLineTooLong { bytes: line.len() });
    }
    if line.contains(&0) {
        return Err(ConfigError::CommandLineNul);
    }
    for disk in &config.disks {
        check_limits(&format!("disk {}", disk.name), disk.limits)?;
    }
    config
        .networks
        .iter()
        .enumerate()
        .try_for_each(|(index, network)| check_network(index, network))
}

fn check_network(index: usize, network: &Network) -> Result<(), ConfigError> {
    if network.mtu < MTU_MIN {
        return Err(ConfigError::Mtu { index, found: network.mtu });
    }
    // The lowest bit of the first byte is a group's.
    if network.mac[0] & 1 != 0 || network.mac == [0; 6] {
        return Err(ConfigError::Mac { index });
    }
    let device = format!("network {index}");
    check_limits(&device, network.to_guest)?;
    check_limits(&device, network.from_guest)
}

fn check_limits(device: &str, limits: IoLimits) -> Result<(), ConfigError> {
    let too_small = |rate: &Rate| {
        rate.per_second == 0 || rate.burst == 0 || rate.burst < rate.per_second / BURSTS_PER_SECOND
    };
    match [limits.bytes, limits.operations].into_iter().flatten().find(too_small) {
        Some(rate) => Err(ConfigError::Burst { device: device.to_owned(), rate }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_wire::vmm::{CpuTemplate, Disk, PageRun, Serial};

    use super::*;

    fn good() -> Config {
        Config {
            version: WIRE_VERSION,
            vcpus: 1,
            memory_mib: 64,
            memory_fd: 4,
            memory_private: false,
            userfault_fd: None,
            written: Vec::new(),
            kvm_fd: 5,
            kernel_fd: 6,
            initramfs_fd: 7,
            command_line: "quiet".to_owned(),
            control_fd: 8,
            vsock_fd: 9,
            serial: Serial { log_fd: 10, bytes_max: 1 },
            disks: Vec::new(),
            networks: Vec::new(),
            balloon: false,
            cpu: CpuTemplate::Host,
            state_fd: None,
        }
    }

    fn network() -> Network {
        let free = IoLimits::default();
        let mac = [2, 0, 0, 0, 0, 1];
        Network { tap_fd: 11, mac, mtu: 1500, to_guest: free, from_guest: free }
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
        let run = PageRun { page: 7, count: 1 };
        assert!(refusal(|config| config.written = vec![run; 2049]).contains("2049 runs"));
        assert!(refusal(|config| config.written = vec![run]).contains("no private copy"));
        assert!(refusal(|config| config.command_line = "a".repeat(2048)).contains("2048 bytes"));
        assert!(refusal(|config| config.command_line = "a\0b".to_owned()).contains("NUL"));
    }

    #[test]
    fn a_network_needs_an_address_of_its_own_and_a_sound_mtu() {
        let with = |change: fn(&mut Network)| {
            refusal(|config| {
                config.networks = vec![network(), network()];
                change(&mut config.networks[1]);
            })
        };
        assert!(with(|network| network.mtu = 1279).contains("network 1 has MTU 1279"));
        assert!(with(|network| network.mac[0] = 1).contains("network 1 has a MAC"));
        assert!(with(|network| network.mac = [0; 6]).contains("network 1 has a MAC"));
    }

    #[test]
    fn a_burst_too_short_for_its_rate_is_refused_wherever_it_is_set() {
        let limits = |per_second, burst| IoLimits {
            bytes: Some(Rate { per_second, burst }),
            operations: None,
        };
        for (per_second, burst) in [(0, 1), (1, 0), (1000, 9)] {
            let disk = Disk {
                name: "vda".to_owned(),
                read_only: true,
                segments: Vec::new(),
                limits: limits(per_second, burst),
            };
            assert!(refusal(|config| config.disks.push(disk)).contains("disk vda has a burst"));
            let network = Network { from_guest: limits(per_second, burst), ..network() };
            let refused = refusal(|config| config.networks.push(network));
            assert!(refused.contains("network 0 has a burst"), "{refused}");
        }
        let mut config = good();
        config.networks.push(Network { to_guest: limits(1000, 10), ..network() });
        assert_eq!(check(&config).err().map(|error| error.to_string()), None);
    }

    #[test]
    fn a_configuration_cut_anywhere_is_refused() {
        let whole = frame::encode(&good()).unwrap();
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }
}
