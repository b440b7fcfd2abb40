//! The first serial port: a 16550 of which only the output leads anywhere, into a bounded log.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
};

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::limits::serial::{ERRORS_LOGGED_MAX, LINE_BYTES_MAX};

/// Last line of a log that reached its limit.
const FULL: &[u8] = b"\n[serial log is full; further output is dropped]\n";

/// Registers of a 16550, as offsets. The first two are the divisor while its access bit is set.
const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const SCRATCH: u8 = 7;
const DIVISOR_ACCESS: u8 = 1 << 7;

/// What a snapshot keeps of the port. Its log is another one after a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
}

/// Raises the port's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The log behind the port. Writing never fails: a guest must not notice a full disk.
struct Log<W> {
    out: W,
    line: Vec<u8>,
    /// Bytes that may still be written.
    room: u64,
    full: bool,
    /// Bytes the guest sent, dropped ones included.
    received: u64,
    errors: u32,
}

impl<W: Write> Log<W> {
    fn new(out: W, bytes_max: u64) -> Self {
        let line = Vec::with_capacity(LINE_BYTES_MAX);
        Self { out, line, room: bytes_max, full: false, received: 0, errors: 0 }
    }

    fn push(&mut self, byte: u8) {
        self.received += 1;
        if self.full {
            return;
        }
        if self.room == 0 {
            self.full = true;
            self.line.extend_from_slice(FULL);
            self.drain();
            return;
        }
        self.room -= 1;
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LINE_BYTES_MAX {
            self.drain();
        }
    }

    fn drain(&mut self) {
        if let Err(error) = self.out.write_all(&self.line)
            && self.errors < ERRORS_LOGGED_MAX
        {
            self.errors += 1;
            log::warn!(error:%; "serial output lost");
        }
        self.line.clear();
    }
}

impl<W: Write> Write for Log<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.push(byte));
        Ok(bytes.len())
    }

    /// Called by the port after every byte, so it does not write the line out.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port with its log.
pub(crate) struct SerialPort {
    port: Serial<Line, vm_superio::serial::NoEvents, Log<fs_err::File>>,
}

impl SerialPort {
    /// Logs at most `bytes_max` bytes to `log`, which was opened for appending.
    pub(crate) fn new(interrupt: EventFd, log: OwnedFd, bytes_max: u64) -> Self {
        let file = fs_err::File::from_parts(log.into(), "serial log");
        Self { port: Serial::new(Line(interrupt), Log::new(file, bytes_max)) }
    }

    pub(crate) fn read(&mut self, register: u8) -> u8 {
        self.port.read(register)
    }

    pub(crate) fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.port.write(register, value) {
            log::warn!(error:%; "serial interrupt lost");
        }
    }

    /// What the guest wrote into the port's registers.
    pub(crate) fn save(&self) -> SerialState {
        let state = self.port.state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            line_control: state.line_control,
            modem_control: state.modem_control,
            scratch: state.scratch,
        }
    }

    /// Writes the same again, as the guest did. Its last byte counts as sent, of which the driver is
    /// told if it wants to be.
    pub(crate) fn restore(&mut self, state: &SerialState) {
        let [low, high] = state.divisor;
        for (register, value) in [
            (LINE_CONTROL, DIVISOR_ACCESS),
            (DATA, low),
            (INTERRUPT_ENABLE, high),
            (LINE_CONTROL, state.line_control & !DIVISOR_ACCESS),
            (MODEM_CONTROL, state.modem_control),
            (SCRATCH, state.scratch),
            (INTERRUPT_ENABLE, state.interrupt_enable),
            (LINE_CONTROL, state.line_control),
        ] {
            self.write(register, value);
        }
    }

    /// Writes out an unfinished line; returns the bytes received so far.
    pub(crate) fn flush(&mut self) -> u64 {
        let log = self.port.writer_mut();
        log.drain();
        log.received
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(sent: &[u8], bytes_max: u64) -> (String, u64) {
        let mut log = Log::new(Vec::new(), bytes_max);
        log.write_all(sent).unwrap();
        log.drain();
        (String::from_utf8(log.out).unwrap(), log.received)
    }

    #[test]
    fn a_restored_port_has_the_registers_that_were_saved() {
        let port = || {
            let log = tempfile::tempfile().unwrap();
            SerialPort::new(EventFd::new(0).unwrap(), log.into(), 10)
        };
        let mut first = port();
        let written =
            [(LINE_CONTROL, 0x83), (DATA, 1), (INTERRUPT_ENABLE, 2), (LINE_CONTROL, 0x03)];
        let more = [(INTERRUPT_ENABLE, 5), (MODEM_CONTROL, 0x0b), (SCRATCH, 0x5a)];
        written.iter().chain(&more).for_each(|&(register, value)| first.write(register, value));
        let mut second = port();
        assert_ne!(second.save(), first.save());
        second.restore(&first.save());
        assert_eq!(second.save(), first.save());
    }

    #[test]
    fn output_within_the_limit_is_logged_whole() {
        assert_eq!(logged(b"one\ntwo", 7), ("one\ntwo".to_owned(), 7));
    }

    #[test]
    fn output_over_the_limit_is_dropped_but_counted_and_the_log_says_so() {
        let (text, received) = logged(b"abcdef", 2);
        assert_eq!(text, format!("ab{}", String::from_utf8_lossy(FULL)));
        assert_eq!(received, 6);
    }

    #[test]
    fn output_that_cannot_be_written_is_told_a_few_times_whatever_the_guest_sends() {
        // Too small for any line.
        let mut log = Log::new(&mut [0_u8; 0][..], 1 << 20);
        log.write_all(&[b'\n'; 1000]).unwrap();
        assert_eq!((log.errors, log.received), (ERRORS_LOGGED_MAX, 1000));
    }

    #[test]
    fn a_line_without_end_is_written_out_in_pieces() {
        let mut log = Log::new(Vec::new(), 1000);
        log.write_all(&[b'x'; LINE_BYTES_MAX + 1]).unwrap();
        assert_eq!(log.out.len(), LINE_BYTES_MAX);
    }
}
