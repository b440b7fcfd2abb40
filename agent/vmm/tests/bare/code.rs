//! Machine code for bare guests, 32-bit.

/// Writes `value` to the port: `mov dx, port; mov al, value; out dx, al`.
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Writes `text` to the first serial port.
pub(crate) fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// Stays here for ever: `jmp $`.
pub(crate) fn stay() -> Vec<u8> {
    vec![0xeb, 0xfe]
}

/// Writes `byte` to the first serial port for ever: `mov dx, 0x3f8; mov al, byte; out dx, al;
/// jmp` back to the `out`.
pub(crate) fn print_for_ever(byte: u8) -> Vec<u8> {
    let mut code = out(0x3f8, byte);
    code.extend_from_slice(&[0xeb, 0xfd]);
    code
}

/// An undefined instruction; without an interrupt table that is a triple fault: `ud2`.
pub(crate) fn crash() -> Vec<u8> {
    vec![0x0f, 0x0b]
}

/// Skips `code` unless EBX points at the magic of the PVH start info:
/// `cmp dword [ebx], magic; jne` over it.
pub(crate) fn if_start_info(code: &[u8]) -> Vec<u8> {
    let mut all = vec![0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75];
    all.push(u8::try_from(code.len()).unwrap());
    all.extend_from_slice(code);
    all
}

/// Pieces one behind the other.
pub(crate) fn all(pieces: &[Vec<u8>]) -> Vec<u8> {
    pieces.concat()
}

/// Counts for ever in EAX from `from` on, and writes the low byte of each number to the first
/// serial port: `mov eax, from; mov dx, 0x3f8; out dx, al; inc eax; jmp` back to the `out`.
pub(crate) fn count_for_ever(from: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(from.to_le_bytes());
    code.extend_from_slice(&[0x66, 0xba, 0xf8, 0x03, 0xee, 0x40, 0xeb, 0xfc]);
    code
}

/// Adds one to the byte in memory at `address` and writes it to the first serial port, for ever:
/// `mov dx, 0x3f8; inc byte [address]; mov al, [address]; out dx, al; jmp` back to the `inc`.
pub(crate) fn count_in_memory(address: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xfe, 0x05];
    code.extend(address.to_le_bytes());
    code.push(0xa0);
    code.extend(address.to_le_bytes());
    code.extend_from_slice(&[0xee, 0xeb, 0xf2]);
    code
}
