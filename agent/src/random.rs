//! Where ids come from.

use std::io;

use holdfast_model::id::ID_BYTES;

/// What an id is made of.
pub(crate) fn random_id() -> io::Result<[u8; ID_BYTES]> {
    let mut random = [0; ID_BYTES];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(random)
}
