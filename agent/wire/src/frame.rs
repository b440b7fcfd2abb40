//! Framing: a `u32` little-endian length, then that many bytes of postcard.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// Largest payload of one frame in bytes. Streams cut their data well below it
/// ([`CHUNK_BYTES_MAX`]); what is larger is an error of the peer, never an allocation.
pub const FRAME_BYTES_MAX: usize = 256 * 1024;

/// Largest piece of stream data (stdout, a file's content) put into one frame, in bytes.
pub const CHUNK_BYTES_MAX: usize = 64 * 1024;

/// Why bytes are not a frame of the wanted message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("frame of {announced} bytes is over the limit of {FRAME_BYTES_MAX}")]
    TooLong { announced: usize },
    #[error("frame does not hold the expected message")]
    Malformed(#[source] postcard::Error),
    #[error("connection ended in the middle of a frame")]
    Cut,
    #[error("frame could not be read or written")]
    Io(#[source] io::Error),
}

/// The first frame of a buffer and what follows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Split<'a> {
    pub frame: &'a [u8],
    pub rest: &'a [u8],
}

/// Reads the announced length. `None`: the head is not complete yet.
fn announced(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(head) = bytes.first_chunk::<4>() else { return Ok(None) };
    let announced = usize::try_from(u32::from_le_bytes(*head)).unwrap_or(usize::MAX);
    if announced > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { announced });
    }
    Ok(Some(announced))
}

/// Splits the first frame's payload off `bytes`. `None`: not all of it has arrived yet.
pub fn split_frame(bytes: &[u8]) -> Result<Option<Split<'_>>, FrameError> {
    let Some(length) = announced(bytes)? else { return Ok(None) };
    Ok(bytes[4..].split_at_checked(length).map(|(frame, rest)| Split { frame, rest }))
}

/// Encodes one message with its length in front.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let bytes = postcard::to_extend(message, vec![0; 4]).map_err(FrameError::Malformed)?;
    finish(bytes)
}

fn finish(mut bytes: Vec<u8>) -> Result<Vec<u8>, FrameError> {
    let announced = bytes.len() - 4;
    match u32::try_from(announced) {
        Ok(length) if announced <= FRAME_BYTES_MAX => {
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            Ok(bytes)
        }
        _ => Err(FrameError::TooLong { announced }),
    }
}

/// Decodes one frame's payload. Bytes left over are an error: a message has one form.
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(frame) {
        Ok((message, [])) => Ok(message),
        Ok((_, _)) => Err(FrameError::Malformed(postcard::Error::SerdeDeCustom)),
        Err(error) => Err(FrameError::Malformed(error)),
    }
}

/// Writes one message as one frame in one `write_all`.
pub fn write_frame<T: Serialize>(writer: &mut impl Write, message: &T) -> Result<(), FrameError> {
    writer.write_all(&encode(message)?).map_err(FrameError::Io)
}

/// Reads one message. `None`: the peer closed the connection between two frames.
pub fn read_frame<T: DeserializeOwned>(reader: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut head = [0; 4];
    let mut filled = 0;
    while filled < head.len() {
        match reader.read(&mut head[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Cut),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Io(error)),
        }
    }
    let length = announced(&head)?.unwrap_or_default();
    let mut frame = vec![0; length];
    reader.read_exact(&mut frame).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => FrameError::Cut,
        _ => FrameError::Io(error),
    })?;
    decode(&frame).map(Some)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::Output;

    #[test]
    fn a_frame_cut_anywhere_asks_for_more_and_never_panics() {
        let whole = encode(&Output::Stdout(b"abc".to_vec())).unwrap();
        for cut in 0..whole.len() {
            assert_eq!(split_frame(&whole[..cut]).unwrap(), None, "cut at {cut}");
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_is_stored() {
        let head = u32::MAX.to_le_bytes();
        assert!(matches!(split_frame(&head), Err(FrameError::TooLong { .. })));
        assert!(matches!(
            read_frame::<Output>(&mut head.as_slice()),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn a_reader_tells_a_clean_end_from_a_cut_frame() {
        assert!(matches!(read_frame::<Output>(&mut [].as_slice()), Ok(None)));
        let cut = &encode(&Output::Stdout(vec![7; 9])).unwrap()[..6];
        assert!(matches!(read_frame::<Output>(&mut { cut }), Err(FrameError::Cut)));
    }

    #[test]
    fn bytes_behind_a_message_are_refused() {
        let mut payload = encode(&Output::Stdout(vec![1])).unwrap()[4..].to_vec();
        payload.push(0);
        assert!(matches!(decode::<Output>(&payload), Err(FrameError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_a_message_or_an_error(bytes: Vec<u8>) {
            let _ = split_frame(&bytes);
            let _ = decode::<Output>(&bytes);
            let _ = decode::<crate::guest::Request>(&bytes);
            let _ = decode::<crate::vmm::ToAgent>(&bytes);
        }

        #[test]
        fn what_was_written_is_read_back(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let message = Output::Stderr(bytes);
            let framed = encode(&message).unwrap();
            prop_assert_eq!(read_frame::<Output>(&mut framed.as_slice()).unwrap(), Some(message));
        }
    }
}
