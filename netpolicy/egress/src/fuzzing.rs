//! What fuzz targets reach of the parsers.

use crate::{
    dns::message::{Query, Response},
    tls::hello,
};

/// Reads the bytes as a guest's query and as a resolver's answer.
pub fn dns(bytes: &[u8]) {
    let _ = Query::read(bytes);
    let _ = Response::read(bytes);
    // And with a head that lets more of it be read.
    let head = [0, 0, 0x81, 0x80, 0, 1, 0, 8, 0, 0, 0, 0];
    let _ = Response::read(&[&head, bytes].concat());
}

/// Reads the bytes as the first message of a TLS client, as they are and as one record's content.
/// What was read of a part is never another thing than what is read of the whole.
pub fn first_message(bytes: &[u8]) {
    let whole = hello::read(bytes);
    if let Ok(Some(read)) = hello::read(&bytes[..bytes.len() / 2]) {
        assert_eq!(whole, Ok(Some(read)), "more bytes make no other message");
    }
    if let Ok(length) = u16::try_from(bytes.len()) {
        let [high, low] = length.to_be_bytes();
        let _ = hello::read(&[&[22, 3, 1, high, low], bytes].concat());
    }
}
