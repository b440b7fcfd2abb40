//! A tap as this device uses it: one interface, Ethernet frames, each behind a header.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::*;

use super::{header::HEADER_BYTES, sys};
use crate::devices::chain::Buffer;

/// What the interface must have been made with.
const FLAGS_NEEDED: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// What it must not: frames would come out at queues we do not have.
const FLAGS_UNFIT: i32 = libc::IFF_MULTI_QUEUE;

#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    #[error("its fd is not a tap with an interface")]
    NoTap(#[source] io::Error),
    #[error(
        "its tap has flags {found:#x}; tap, no packet information, header and one queue needed"
    )]
    Flags { found: i32 },
    #[error("its tap cannot be set to {what}")]
    Set {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// The host's kernel can cut large UDP segments (6.2 and later).
    cuts_udp: bool,
}

impl Tap {
    /// Checks the tap, and prepares it as a driver finds it that agreed on nothing.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let found = sys::interface_flags(fd.as_fd()).map_err(TapError::NoTap)?;
        if found & FLAGS_NEEDED != FLAGS_NEEDED || found & FLAGS_UNFIT != 0 {
            return Err(TapError::Flags { found });
        }
        let set = |what| move |source| TapError::Set { what, source };
        let flags = fcntl_getfl(&fd).map_err(|error| set("non-blocking")(error.into()))?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
            .map_err(|error| set("non-blocking")(error.into()))?;
        let header_bytes = i32::try_from(HEADER_BYTES).unwrap_or(i32::MAX);
        sys::set_header_bytes(fd.as_fd(), header_bytes).map_err(set("a header of 12 bytes"))?;
        let udp = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let cuts_udp = sys::set_offload(fd.as_fd(), udp).is_ok();
        sys::set_offload(fd.as_fd(), 0).map_err(set("no offload"))?;
        Ok(Self { fd, cuts_udp })
    }

    /// Features that can be offered for this tap.
    pub(super) fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ];
        let udp = [VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6];
        let udp = udp.into_iter().filter(|_| self.cuts_udp);
        always.into_iter().chain(udp).fold(0, |features, feature| features | 1 << feature)
    }

    /// Tells the tap what the driver that agreed on `features` takes.
    pub(super) fn agree(&self, features: u64) -> io::Result<()> {
        sys::set_offload(self.fd.as_fd(), offload(features))
    }

    /// Reads one frame with its header. 0 bytes and `WouldBlock`: there is none.
    pub(super) fn read(&self, target: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, target)?)
    }

    pub(super) fn send(&self, header: &[u8; HEADER_BYTES], frame: &Buffer<'_>) -> io::Result<()> {
        sys::send(self.fd.as_fd(), header, frame)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Features of the driver as flags of the tap, which refuses what hangs in the air: cutting
/// without checksums, and UDP over one version of IP alone.
fn offload(features: u64) -> u32 {
    let has = |feature: u32| features & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    if has(VIRTIO_NET_F_GUEST_TSO4) {
        flags |= libc::TUN_F_TSO4;
    }
    if has(VIRTIO_NET_F_GUEST_TSO6) {
        flags |= libc::TUN_F_TSO6;
    }
    if flags != libc::TUN_F_CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
        flags |= libc::TUN_F_TSO_ECN;
    }
    if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
        flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    flags
}

#[cfg(test)]
mod tests {
    use fs_err::File;

    use super::*;

    #[test]
    fn offload_is_what_the_driver_takes_and_nothing_without_checksums() {
        let tso4 = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_ECN;
        let checksum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        let uso4 = 1 << VIRTIO_NET_F_GUEST_USO4;
        let uso6 = 1 << VIRTIO_NET_F_GUEST_USO6;
        for (features, flags) in [
            (tso4 | uso4 | uso6, 0),
            (checksum, libc::TUN_F_CSUM),
            (checksum | 1 << VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_CSUM),
            (checksum | tso4, libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO_ECN),
            (checksum | uso4, libc::TUN_F_CSUM),
            (checksum | uso4 | uso6, libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ] {
            assert_eq!(offload(features), flags, "features {features:#x}");
        }
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = File::open("/dev/null").unwrap().into_parts().0.into();
        assert!(matches!(Tap::new(file), Err(TapError::NoTap(_))));
    }
}
