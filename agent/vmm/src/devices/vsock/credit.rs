//! Flow control of one connection (virtio 1.2, section 5.10.6.3): neither side sends more than the
//! other has room for. All counts wrap at 2^32.

use super::packet::Header;
use crate::limits::vsock::ROOM_BYTES;

/// An update is sent once this much became free since the guest was last told.
const UPDATE_BYTES: u32 = ROOM_BYTES / 2;

#[derive(Debug, Default)]
pub(super) struct Credit {
    /// Bytes that came from the guest.
    received: u32,
    /// Of those, bytes that went on to the host side.
    forwarded: u32,
    /// `forwarded` as the guest was last told.
    told: u32,
    /// Bytes sent to the guest.
    sent: u32,
    guest_room: u32,
    guest_forwarded: u32,
    /// The guest asked to be told.
    asked: bool,
}

/// The guest sent more than it was given room for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

impl Credit {
    /// Every packet of the guest brings its own side's numbers.
    pub(super) fn heard(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// Bytes the guest has room for.
    pub(super) fn available(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        // A guest that claims to have taken more than it was sent gets nothing.
        self.guest_room.saturating_sub(under_way)
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    pub(super) fn received(&mut self, bytes: u32) -> Result<(), Overrun> {
        let held = self.received.wrapping_sub(self.forwarded);
        if bytes > ROOM_BYTES.saturating_sub(held) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    pub(super) fn forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    pub(super) fn owe_update(&mut self) {
        self.asked = true;
    }

    /// Whether the guest should hear of room that became free.
    pub(super) fn update_due(&self) -> bool {
        self.asked || self.forwarded.wrapping_sub(self.told) >= UPDATE_BYTES
    }

    /// Fills in our side's numbers.
    pub(super) fn tell(&mut self, header: &mut Header) {
        self.told = self.forwarded;
        self.asked = false;
        header.buf_alloc = ROOM_BYTES;
        header.fwd_cnt = self.forwarded;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(room: u32, forwarded: u32) -> Header {
        Header { buf_alloc: room, fwd_cnt: forwarded, ..Header::default() }
    }

    #[test]
    fn no_more_is_available_than_the_guest_has_room_for_also_when_counts_wrap() {
        let mut credit = Credit { sent: u32::MAX - 9, ..Credit::default() };
        credit.heard(&guest(100, u32::MAX - 9));
        assert_eq!(credit.available(), 100);
        credit.sent(30);
        assert_eq!(credit.available(), 70);
        credit.heard(&guest(100, 20));
        assert_eq!(credit.available(), 100);
    }

    #[test]
    fn a_guest_that_claims_to_have_taken_more_than_was_sent_gets_nothing() {
        let mut credit = Credit::default();
        credit.heard(&guest(u32::MAX, 1));
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn the_guest_may_fill_its_room_and_not_one_byte_more() {
        let mut credit = Credit::default();
        assert_eq!(credit.received(ROOM_BYTES), Ok(()));
        assert_eq!(credit.received(1), Err(Overrun));
        credit.forwarded(1);
        assert_eq!(credit.received(1), Ok(()));
        assert_eq!(credit.received(u32::MAX), Err(Overrun));
    }

    #[test]
    fn an_update_is_due_when_half_the_room_became_free_and_not_again_once_told() {
        let mut credit = Credit::default();
        credit.received(ROOM_BYTES).unwrap();
        credit.forwarded(ROOM_BYTES / 2 - 1);
        assert!(!credit.update_due());
        credit.forwarded(1);
        assert!(credit.update_due());
        let mut header = Header::default();
        credit.tell(&mut header);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (ROOM_BYTES, ROOM_BYTES / 2));
        assert!(!credit.update_due());
    }
}
