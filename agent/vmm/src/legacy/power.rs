//! ACPI's sleep control register (hardware-reduced): the guest's power switch.

use holdfast_wire::vmm::Exit;

/// Sleep type that the `_S5` object of our DSDT names: soft off.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
const TYPE_SHIFT: u8 = 2;
const TYPE_MASK: u8 = 0x7;
const ENABLE: u8 = 1 << 5;

/// `Some` when `value` switches off. Other sleep types are not told to the guest and do nothing.
pub(crate) fn sleep_control_written(value: u8) -> Option<Exit> {
    let sleep_type = value >> TYPE_SHIFT & TYPE_MASK;
    (value & ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF).then_some(Exit::PowerOff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_with_the_enable_bit_switches_off() {
        for value in 0..=u8::MAX {
            let off = value & 0b0011_1100 == 0b0011_0100;
            assert_eq!(sleep_control_written(value).is_some(), off, "value {value:#x}");
        }
    }
}
