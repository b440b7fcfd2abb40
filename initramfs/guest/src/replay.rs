//! What a command has said, as far back as it is kept: bytes of stdout and stderr in the order in
//! which they were read, counted from the command's start.

use std::collections::VecDeque;

use holdfast_wire::{
    frame::CHUNK_BYTES_MAX,
    guest::{REPLAY_BYTES_MIN, REPLAY_TURNS_MAX},
};

/// One of a command's two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// From here on the bytes are of this stream, up to the next turn.
#[derive(Debug, Clone, Copy)]
struct Turn {
    at: u64,
    stream: Stream,
}

/// The last bytes of both streams.
#[derive(Debug)]
pub(crate) struct Replay {
    bytes: VecDeque<u8>,
    turns: VecDeque<Turn>,
    /// Count of the first byte that is here.
    start: u64,
    /// Bytes kept although everybody has them.
    kept_max: usize,
}

impl Replay {
    /// For a command that can be attached to again.
    pub(crate) fn kept() -> Self {
        Self::new(REPLAY_BYTES_MIN)
    }

    /// For one whose output is gone once it is sent.
    pub(crate) fn passing() -> Self {
        Self::new(0)
    }

    fn new(kept_max: usize) -> Self {
        Self { bytes: VecDeque::new(), turns: VecDeque::new(), start: 0, kept_max }
    }

    /// Count of the first byte that can be had.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Count of the byte that comes next.
    pub(crate) fn end(&self) -> u64 {
        self.start + count(self.bytes.len())
    }

    pub(crate) fn push(&mut self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.turns.back().is_none_or(|turn| turn.stream != stream) {
            self.turns.push_back(Turn { at: self.end(), stream });
        }
        self.grow(bytes.len());
        self.bytes.extend(bytes);
    }

    /// Makes room without taking twice what can ever be needed: this is PID 1's memory.
    fn grow(&mut self, more: usize) {
        let (len, most) = (self.bytes.len(), self.kept_max + CHUNK_BYTES_MAX);
        if len + more > self.bytes.capacity() {
            let wanted = (2 * len).min(most).max(len + more);
            self.bytes.reserve_exact(wanted - len);
        }
    }

    /// The piece of one stream that begins at `at`, which is not before [`Self::start`]. `None`: all
    /// there is has been had.
    pub(crate) fn piece(&self, at: u64) -> Option<(Stream, Vec<u8>)> {
        let behind = self.turns.partition_point(|turn| turn.at <= at);
        let stream = self.turns.get(behind.checked_sub(1)?)?.stream;
        let until = self.turns.get(behind).map_or(self.end(), |turn| turn.at);
        let offset = |at: u64| usize::try_from(at.saturating_sub(self.start)).ok();
        let (first, last) = (offset(at)?, offset(until)?);
        let last = last.min(first.saturating_add(CHUNK_BYTES_MAX));
        let piece: Vec<u8> = self.bytes.range(first..last).copied().collect();
        (!piece.is_empty()).then_some((stream, piece))
    }

    /// Lets go of what is too long ago, but of nothing from `sent` on.
    pub(crate) fn forget(&mut self, sent: u64) {
        let many = self.turns.len().saturating_sub(REPLAY_TURNS_MAX);
        let by_turns = self.turns.get(many).filter(|_| many > 0).map_or(0, |turn| turn.at);
        let by_bytes = self.end().saturating_sub(count(self.kept_max));
        let start = by_turns.max(by_bytes).min(sent).max(self.start);
        let gone = usize::try_from(start - self.start).unwrap_or(usize::MAX);
        self.bytes.drain(..gone.min(self.bytes.len()));
        self.start = start;
        while self.turns.get(1).is_some_and(|next| next.at <= start) {
            self.turns.pop_front();
        }
    }
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything from `at` on, piece by piece.
    fn read(replay: &Replay, mut at: u64) -> Vec<(Stream, Vec<u8>)> {
        let mut pieces = Vec::new();
        while let Some((stream, piece)) = replay.piece(at) {
            at += count(piece.len());
            pieces.push((stream, piece));
        }
        assert_eq!(at, replay.end());
        pieces
    }

    #[test]
    fn both_streams_come_back_in_their_order_from_any_byte_on() {
        let mut replay = Replay::kept();
        replay.push(Stream::Stdout, b"ab");
        replay.push(Stream::Stdout, b"c");
        replay.push(Stream::Stderr, b"de");
        replay.push(Stream::Stdout, b"f");
        let all = [(Stream::Stdout, "abc"), (Stream::Stderr, "de"), (Stream::Stdout, "f")];
        let flat: Vec<_> = all.iter().flat_map(|(s, t)| t.bytes().map(|b| (*s, b))).collect();
        for at in 0..=6 {
            let read = read(&replay, at);
            let read: Vec<_> =
                read.iter().flat_map(|(s, piece)| piece.iter().map(|b| (*s, *b))).collect();
            assert_eq!(read, flat[usize::try_from(at).unwrap()..], "from {at}");
        }
    }

    #[test]
    fn the_last_mebibyte_is_kept_and_memory_is_bounded() {
        let mut replay = Replay::kept();
        for number in 0..100_u8 {
            replay.push(Stream::Stdout, &[number; CHUNK_BYTES_MAX]);
            replay.forget(replay.end());
        }
        assert_eq!(replay.end() - replay.start(), count(REPLAY_BYTES_MIN));
        assert!(replay.bytes.capacity() <= REPLAY_BYTES_MIN + CHUNK_BYTES_MAX);
        assert_eq!(read(&replay, replay.start()).first().unwrap().1[0], 84);
    }

    #[test]
    fn nothing_that_was_not_sent_is_let_go_of_and_what_passes_is_not_kept() {
        let mut replay = Replay::passing();
        replay.push(Stream::Stderr, b"abc");
        replay.forget(1);
        assert_eq!(read(&replay, 1), [(Stream::Stderr, b"bc".to_vec())]);
        replay.forget(3);
        assert_eq!((replay.start(), replay.end()), (3, 3));
        replay.push(Stream::Stdout, b"d");
        assert_eq!(read(&replay, 3), [(Stream::Stdout, b"d".to_vec())]);
    }

    #[test]
    fn a_command_that_changes_streams_with_every_byte_fills_no_memory() {
        let mut replay = Replay::kept();
        for _ in 0..REPLAY_TURNS_MAX {
            replay.push(Stream::Stdout, b"o");
            replay.push(Stream::Stderr, b"e");
            replay.forget(replay.end());
        }
        assert_eq!(replay.turns.len(), REPLAY_TURNS_MAX);
        assert_eq!(replay.end() - replay.start(), count(REPLAY_TURNS_MAX));
        assert_eq!(replay.piece(replay.start()), Some((Stream::Stdout, b"o".to_vec())));
    }
}
