//! pvpanic: by this port a guest's kernel says that it panicked, so that a panic is told from a
//! reset.

use holdfast_wire::vmm::Exit;

const PANICKED: u8 = 1 << 0;
/// What the guest may report: a panic. A crash that its own kernel handles (kexec) is not our affair.
pub(crate) const SUPPORTED: u8 = PANICKED;

/// `Some` when `value` reports a panic.
pub(crate) fn written(value: u8) -> Option<Exit> {
    (value & PANICKED != 0).then_some(Exit::GuestPanic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_panic_bit_ends_the_microvm() {
        assert_eq!(written(PANICKED), Some(Exit::GuestPanic));
        assert_eq!(written(0x2), None);
    }
}
