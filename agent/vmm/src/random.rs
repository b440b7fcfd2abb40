//! Random bytes of the host's kernel, by its system call and no other way: in a static program the
//! usual crate looks for the C library's function, finds none, and opens `/dev/urandom`. Here no path
//! leads anywhere.

use std::io;

use rustix::{
    io::retry_on_intr,
    rand::{GetRandomFlags, getrandom},
};

/// Fills all of `bytes`.
pub(crate) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += retry_on_intr(|| getrandom(&mut bytes[filled..], GetRandomFlags::empty()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_buffer_is_filled_to_its_end() {
        let mut bytes = vec![0; 100_000];
        fill(&mut bytes).unwrap();
        assert!(bytes.chunks(32).all(|piece| piece.iter().any(|byte| *byte != 0)));
    }
}
