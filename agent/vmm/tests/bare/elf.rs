//! The smallest kernel: an ELF file with a PVH note and some bytes of code.

/// Where the code lies in the guest: the lowest address the VMM takes a kernel at.
const CODE_ADDRESS: u64 = 0x10_0000;
const ELF_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const NOTE_OFFSET: usize = 0x100;
const NOTE_BYTES: u64 = 20;
const CODE_OFFSET: usize = 0x200;

/// Kinds of program header.
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// The note that names the 32-bit entry point.
const PHYS32_ENTRY: u32 = 18;

/// An ELF file that starts `code`, which is 32-bit and position-bound to nothing.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    image(code, PHYS32_ENTRY)
}

/// The same with a note of another kind, so without an entry point.
pub(crate) fn kernel_without_entry(code: &[u8]) -> Vec<u8> {
    image(code, PHYS32_ENTRY + 1)
}

fn image(code: &[u8], note_kind: u32) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1.
    half(&mut file, &[2, 62]);
    word(&mut file, &[1]);
    long(&mut file, &[CODE_ADDRESS, ELF_HEADER_BYTES.into(), 0]);
    word(&mut file, &[0]);
    half(&mut file, &[ELF_HEADER_BYTES, PROGRAM_HEADER_BYTES, 2, 0, 0, 0]);
    let length = code.len() as u64;
    program_header(&mut file, LOAD, CODE_OFFSET, CODE_ADDRESS, length);
    program_header(&mut file, NOTE, NOTE_OFFSET, 0, NOTE_BYTES);
    file.resize(NOTE_OFFSET, 0);
    word(&mut file, &[4, 4, note_kind]);
    file.extend_from_slice(b"Xen\0");
    word(&mut file, &[u32::try_from(CODE_ADDRESS).unwrap()]);
    file.resize(CODE_OFFSET, 0);
    file.extend_from_slice(code);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, offset: usize, address: u64, length: u64) {
    word(file, &[kind, 7]);
    long(file, &[offset as u64, address, address, length, length, 4]);
}

fn half(file: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
}

fn word(file: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
}

fn long(file: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| file.extend_from_slice(&value.to_le_bytes()));
}
