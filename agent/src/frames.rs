//! Framed messages of our own processes on async streams.

use std::{io, marker::PhantomData};

use bytes::{Buf, BytesMut};
use holdfast_wire::frame::{self, CHUNK_BYTES_MAX, FrameError};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Reads frames of one message. [`Frames::next`] may be cancelled at any time: bytes wait in the
/// buffer.
#[derive(Debug)]
pub(crate) struct Frames<R, T> {
    reader: R,
    buffer: BytesMut,
    message: PhantomData<fn() -> T>,
}

impl<R: AsyncRead + Unpin, T: DeserializeOwned> Frames<R, T> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, buffer: BytesMut::new(), message: PhantomData }
    }

    /// `None`: the peer closed the connection between two frames.
    pub(crate) async fn next(&mut self) -> Result<Option<T>, FrameError> {
        loop {
            if let Some(split) = frame::split_frame(&self.buffer)? {
                let message = frame::decode(split.frame)?;
                let used = self.buffer.len() - split.rest.len();
                self.buffer.advance(used);
                return Ok(Some(message));
            }
            self.buffer.reserve(CHUNK_BYTES_MAX);
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(FrameError::Cut),
                Ok(_) => {}
                // A peer that was killed resets the connection: an end like any other.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(FrameError::Io(error)),
            }
        }
    }
}

pub(crate) async fn send<T: Serialize>(
    writer: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), FrameError> {
    let bytes = frame::encode(message)?;
    writer.write_all(&bytes).await.map_err(FrameError::Io)?;
    writer.flush().await.map_err(FrameError::Io)
}

#[cfg(test)]
mod tests {
    use holdfast_wire::guest::Output;

    use super::*;

    #[tokio::test]
    async fn frames_come_out_whole_however_the_bytes_come_in() {
        let messages = [Output::Stdout(vec![1; 5]), Output::Stderr(vec![2; 70_000]), Output::Done];
        let bytes: Vec<u8> = messages.iter().flat_map(|m| frame::encode(m).unwrap()).collect();
        let (mut writer, reader) = tokio::io::duplex(7);
        let writing = tokio::spawn(async move { writer.write_all(&bytes).await });
        let mut frames = Frames::<_, Output>::new(reader);
        for message in messages {
            assert_eq!(frames.next().await.unwrap(), Some(message));
        }
        writing.await.unwrap().unwrap();
        assert_eq!(frames.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn an_end_in_the_middle_of_a_frame_is_an_error() {
        let cut = &frame::encode(&Output::Stdout(vec![1; 5])).unwrap()[..6];
        assert!(matches!(Frames::<_, Output>::new(cut).next().await, Err(FrameError::Cut)));
    }
}
