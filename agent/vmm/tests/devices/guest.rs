//! The guest's side: this same program, run inside the microVM by `init`.

#[path = "vsock/sys.rs"]
mod sys;

use std::{
    env,
    io::{Read, Write},
    os::unix::net::UnixStream,
    thread,
};

use holdfast_wire::vmm::READY_PORT;

/// Ports of the guest's side of these tests.
pub(crate) const ECHO: u32 = 5000;
pub(crate) const COUNT: u32 = 5001;
pub(crate) const POUR: u32 = 5002;
pub(crate) const STOP: u32 = 5003;
/// Bytes poured out by [`POUR`].
pub(crate) const POURED_BYTES: usize = 3 << 20;

pub(crate) fn rest(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes in which a missing, doubled or moved one shows.
pub(crate) fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// Run inside the guest by `init`; anywhere else it has nothing to do.
#[test]
fn serves_as_the_guest() {
    if env::var_os("HOLDFAST_GUEST_ROLE").is_none() {
        return;
    }
    // To the standard library one stream socket is like another.
    let serve = |port, talk: fn(UnixStream)| {
        let listener = sys::listen(port).unwrap();
        thread::spawn(move || {
            loop {
                let stream = sys::accept(&listener).unwrap();
                thread::spawn(move || talk(stream.into()));
            }
        });
    };
    serve(ECHO, |mut stream| {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            stream.write_all(&bytes[..count]).unwrap();
        }
    });
    serve(COUNT, |mut stream| {
        let bytes = rest(&mut stream);
        let verdict = if bytes == pattern(bytes.len()) { "as expected" } else { "garbled" };
        stream.write_all(format!("{} {verdict}", bytes.len()).as_bytes()).unwrap();
    });
    serve(POUR, |mut stream| stream.write_all(&pattern(POURED_BYTES)).unwrap());
    let stop = sys::listen(STOP).unwrap();
    let refused = |port| sys::connect(port).unwrap_err().raw_os_error() == Some(libc::ECONNRESET);
    assert!(refused(READY_PORT + 1));
    println!("another port of the host was refused");
    assert!(refused(READY_PORT));
    sys::accept(&stop).unwrap();
}
