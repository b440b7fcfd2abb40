//! The header in front of every frame (`struct virtio_net_hdr_v1`): what of its checksum and its
//! cutting into segments is left to do. Written by the guest, it goes to the host's kernel, so it
//! is read once and only passed on when it makes sense.

use virtio_bindings::virtio_net::*;

pub(super) const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header, the shortest frame a tap takes.
pub(super) const ETHERNET_BYTES: usize = 14;
/// Place of the number of buffers a frame to the guest lies in.
const BUFFERS_AT: usize = 10;

const NEEDS_CHECKSUM: u8 = byte(VIRTIO_NET_HDR_F_NEEDS_CSUM);
const GSO_NONE: u8 = byte(VIRTIO_NET_HDR_GSO_NONE);
const GSO_TCPV4: u8 = byte(VIRTIO_NET_HDR_GSO_TCPV4);
const GSO_TCPV6: u8 = byte(VIRTIO_NET_HDR_GSO_TCPV6);
const GSO_UDP: u8 = byte(VIRTIO_NET_HDR_GSO_UDP_L4);
const GSO_ECN: u8 = byte(VIRTIO_NET_HDR_GSO_ECN);
/// Bytes of a checksum.
const CHECKSUM_BYTES: usize = 2;

const fn byte(value: u32) -> u8 {
    // All of them are below 256.
    value.to_le_bytes()[0]
}

/// What the guest's header asks for that was not agreed on, or cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Nonsense {
    #[error("a frame's header has unknown flags")]
    UnknownFlag,
    #[error("a frame's header asks for what was not agreed on")]
    NotAgreed,
    #[error("a frame shall be cut into segments without checksums or without bytes")]
    Segments,
    #[error("a frame's checksum lies behind its end")]
    Checksum,
}

/// Checks the header of a frame of `frame_bytes` from the guest; gives it as the tap wants it.
pub(super) fn from_guest(
    header: [u8; HEADER_BYTES],
    frame_bytes: usize,
    agreed: u64,
) -> Result<[u8; HEADER_BYTES], Nonsense> {
    let [flags, kind, _, _, size @ .., start0, start1, offset0, offset1, _, _] = header;
    let has = |feature: u32| agreed & 1 << feature != 0;
    if flags & !NEEDS_CHECKSUM != 0 {
        return Err(Nonsense::UnknownFlag);
    }
    let needs_checksum = flags & NEEDS_CHECKSUM != 0;
    if needs_checksum && !has(VIRTIO_NET_F_CSUM) {
        return Err(Nonsense::NotAgreed);
    }
    let place = usize::from(u16::from_le_bytes([start0, start1]))
        + usize::from(u16::from_le_bytes([offset0, offset1]));
    if needs_checksum && place + CHECKSUM_BYTES > frame_bytes {
        return Err(Nonsense::Checksum);
    }
    let feature = match kind & !GSO_ECN {
        GSO_NONE if kind == GSO_NONE => None,
        GSO_TCPV4 => Some(VIRTIO_NET_F_HOST_TSO4),
        GSO_TCPV6 => Some(VIRTIO_NET_F_HOST_TSO6),
        GSO_UDP => Some(VIRTIO_NET_F_HOST_USO),
        _ => return Err(Nonsense::NotAgreed),
    };
    if let Some(feature) = feature {
        if !has(feature) || kind & GSO_ECN != 0 && !has(VIRTIO_NET_F_HOST_ECN) {
            return Err(Nonsense::NotAgreed);
        }
        if !needs_checksum || size == [0, 0] {
            return Err(Nonsense::Segments);
        }
    }
    let mut passed = header;
    set_buffers(&mut passed, 0);
    Ok(passed)
}

/// Sets the number of buffers in which a header and its frame lie.
pub(super) fn set_buffers(header_and_frame: &mut [u8], buffers: u16) {
    if let Some(place) = header_and_frame.get_mut(BUFFERS_AT..HEADER_BYTES) {
        place.copy_from_slice(&buffers.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_ECN
        | 1 << VIRTIO_NET_F_HOST_USO;

    /// Flags and kind; a segment of 1448 bytes; a checksum at 34 + 16; 7 buffers.
    fn header(flags: u8, kind: u8) -> [u8; HEADER_BYTES] {
        [flags, kind, 54, 0, 0xa8, 5, 34, 0, 16, 0, 7, 0]
    }

    #[test]
    fn a_large_segment_passes_with_all_but_its_number_of_buffers() {
        let passed = from_guest(header(1, GSO_TCPV4), 9000, ALL).unwrap();
        assert_eq!(passed, [1, GSO_TCPV4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
    }

    #[test]
    fn nothing_passes_that_was_not_agreed_on() {
        for (kind, feature) in [
            (GSO_NONE, VIRTIO_NET_F_CSUM),
            (GSO_TCPV4, VIRTIO_NET_F_HOST_TSO4),
            (GSO_TCPV4 | GSO_ECN, VIRTIO_NET_F_HOST_ECN),
            (GSO_TCPV6, VIRTIO_NET_F_HOST_TSO6),
            (GSO_UDP, VIRTIO_NET_F_HOST_USO),
        ] {
            assert!(from_guest(header(1, kind), 9000, ALL).is_ok(), "kind {kind}");
            let less = ALL & !(1 << feature);
            let refused = from_guest(header(1, kind), 9000, less);
            assert_eq!(refused, Err(Nonsense::NotAgreed), "kind {kind}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(from_guest(header(2, 0), 60, ALL), Err(Nonsense::UnknownFlag));
        assert_eq!(from_guest(header(1, GSO_ECN), 60, ALL), Err(Nonsense::NotAgreed));
        // The old fragmentation of UDP, which is not offered.
        assert_eq!(from_guest(header(1, 3), 60, ALL), Err(Nonsense::NotAgreed));
        assert_eq!(from_guest(header(0, GSO_TCPV4), 9000, ALL), Err(Nonsense::Segments));
        let mut empty_segments = header(1, GSO_TCPV4);
        empty_segments[4..6].fill(0);
        assert_eq!(from_guest(empty_segments, 9000, ALL), Err(Nonsense::Segments));
        assert_eq!(from_guest(header(1, 0), 51, ALL), Err(Nonsense::Checksum));
        assert!(from_guest(header(1, 0), 52, ALL).is_ok());
    }

    proptest! {
        #[test]
        fn whatever_passes_asks_for_work_inside_its_frame(
            bytes: [u8; HEADER_BYTES],
            frame_bytes in 0..70_000usize,
            agreed: u64,
        ) {
            if let Ok(passed) = from_guest(bytes, frame_bytes, agreed) {
                prop_assert_eq!(&passed[..BUFFERS_AT], &bytes[..BUFFERS_AT]);
                prop_assert!(passed[0] <= 1);
                let place = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                prop_assert!(passed[0] == 0 || place(6) + place(8) + 2 <= frame_bytes);
                prop_assert!(passed[1] == 0 || passed[0] == 1);
            }
        }
    }
}
