//! The guest's one link to the outside: an address, and everything by the gateway.

use holdfast_wire::guest::{Failure, Network};

use crate::{failure::from_io, sys};

/// The first network device there is; nothing renames it.
pub const DEVICE: &str = "eth0";

/// Sets the device up, or leaves it as it is when it is so already.
pub fn set_up(device: &str, network: &Network) -> Result<(), Failure> {
    let failed = |what| move |error| from_io(format_args!("cannot {what} {device}"), &error);
    // Nobody speaks it there. A kernel may be without it.
    let _ = fs_err::write(format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1");
    sys::set_address(device, network.address, network.prefix_bits)
        .map_err(failed("give an address to"))?;
    sys::interface_up(device).map_err(failed("turn on"))?;
    sys::add_default_route(network.gateway).map_err(failed("have everything go by"))
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread};

    use holdfast_wire::guest::FailureKind;
    use rustix::thread::UnshareFlags;

    use super::*;

    /// In a network namespace of its own, with a device that leads nowhere.
    fn with_a_device(test: impl FnOnce() + Send) {
        thread::scope(|scope| {
            let run = || {
                sys::unshare(UnshareFlags::NEWNET).unwrap();
                ip("link add eth9 type veth peer name far");
                ip("link set far up");
                test();
            };
            scope.spawn(run).join().unwrap();
        });
    }

    fn ip(line: &str) -> String {
        let output = Command::new("ip").args(line.split(' ')).output().unwrap();
        assert!(output.status.success(), "ip {line}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn network() -> Network {
        Network {
            address: [192, 168, 127, 2].into(),
            prefix_bits: 30,
            gateway: [192, 168, 127, 1].into(),
            ca_pem: String::new(),
        }
    }

    #[test]
    fn a_device_has_the_address_and_everything_goes_by_the_gateway_however_often_it_is_said() {
        with_a_device(|| {
            for _ in 0..2 {
                set_up("eth9", &network()).unwrap();
                let address = ip("-o -4 address show dev eth9");
                assert!(address.contains(" 192.168.127.2/30 "), "{address}");
                let routes = ip("-4 route");
                let lines: Vec<_> = routes.lines().map(str::trim).collect();
                let ways = [
                    "default via 192.168.127.1 dev eth9",
                    "192.168.127.0/30 dev eth9 proto kernel scope link src 192.168.127.2",
                ];
                assert_eq!(lines, ways);
            }
            assert_eq!(ip("-6 address show dev eth9"), "");
        });
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        with_a_device(|| {
            let refused = set_up("eth8", &network()).unwrap_err();
            assert!(refused.message.contains("eth8"), "{refused:?}");
            assert_ne!(refused.kind, FailureKind::WrongState);
        });
    }
}
