//! The few devices of a PC that a microVM needs: a serial port to log to, and the registers by
//! which a guest says that it is over.

pub(crate) mod panic;
pub(crate) mod power;
pub(crate) mod serial;
