//! The smallest PID 1: a static program of a few instructions, in an initramfs of two entries.

/// What it prints before it ends the microVM.
pub(crate) const HELLO: &str = "hello from PID 1\n";

/// How it ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    PowerOff,
    Restart,
    /// PID 1 exits, which panics the kernel.
    Exit,
}

const LOAD_ADDRESS: u64 = 0x40_0000;
const HEADERS_BYTES: u64 = 64 + 56;
/// Modes of a regular file and of a character device, with their permissions.
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
const FOLDER: u32 = 0o040_755;

/// An initramfs (cpio, newc) with this PID 1 and the console it writes to.
pub(crate) fn initramfs(end: End) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "dev", FOLDER, (0, 0), b"");
    entry(&mut archive, "dev/console", CHARACTER_DEVICE, (5, 1), b"");
    entry(&mut archive, "init", EXECUTABLE, (0, 0), &program(end));
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), b"");
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let length = content.len();
    let name_bytes = name.len() + 1;
    let (major, minor) = device;
    let head = format!(
        "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{length:08x}{:08x}{:08x}{major:08x}\
         {minor:08x}{name_bytes:08x}{:08x}",
        0, 0, 0, 1, 0, 0, 0, 0
    );
    archive.extend_from_slice(head.as_bytes());
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A static ELF program: write(1, hello), then reboot(2) or exit(3).
fn program(end: End) -> Vec<u8> {
    let length = u32::try_from(HELLO.len()).unwrap();
    let mut code = vec![0xbf, 1, 0, 0, 0]; // mov edi, 1
    code.extend_from_slice(&[0x48, 0x8d, 0x35]); // lea rsi, [rip + distance]
    let distance_at = code.len();
    code.extend_from_slice(&[0; 4]);
    code.push(0xba); // mov edx, length
    code.extend_from_slice(&length.to_le_bytes());
    code.extend_from_slice(&[0xb8, 1, 0, 0, 0, 0x0f, 0x05]); // mov eax, 1; syscall
    match end {
        End::PowerOff => code.extend_from_slice(&reboot(0x4321_fedc)),
        End::Restart => code.extend_from_slice(&reboot(0x0123_4567)),
        End::Exit => {}
    }
    code.extend_from_slice(&[0xbf, 3, 0, 0, 0]); // mov edi, 3
    code.extend_from_slice(&[0xb8, 60, 0, 0, 0, 0x0f, 0x05]); // mov eax, 60; syscall
    let distance = u32::try_from(code.len() - distance_at - 4).unwrap();
    code[distance_at..distance_at + 4].copy_from_slice(&distance.to_le_bytes());
    code.extend_from_slice(HELLO.as_bytes());
    [headers(code.len() as u64), code].concat()
}

/// reboot(2) with its two magic numbers and `command`.
fn reboot(command: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for (register, value) in [(0xbf_u8, 0xfee1_dead_u32), (0xbe, 0x2812_1969), (0xba, command)] {
        code.push(register);
        code.extend_from_slice(&value.to_le_bytes());
    }
    code.extend_from_slice(&[0xb8, 169, 0, 0, 0, 0x0f, 0x05]); // mov eax, 169; syscall
    code
}

/// ELF header and one program header that maps the whole file.
fn headers(code_bytes: u64) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for value in [LOAD_ADDRESS + HEADERS_BYTES, 64, 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    let bytes = HEADERS_BYTES + code_bytes;
    for value in [0, LOAD_ADDRESS, LOAD_ADDRESS, bytes, bytes, 0x1000] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file
}
