//! A connection to the kernel's netfilter (nfnetlink), and transactions over it.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{GenAttribute, GenMessage, NfTablesMessage},
    none::ControlMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::{
    net::sockopt::set_socket_send_buffer_size_force,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::{NftError, sys};

/// `NFNL_SUBSYS_NFTABLES`: whom a transaction is for.
const NFTABLES: u16 = 10;

/// Bytes of one read. The kernel fills at most this much at once when it lists something.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Bytes of one transaction: the longest policy takes 260 KiB. Linux doubles it for what it needs itself.
const BATCH_BYTES_MAX: usize = 512 * 1024;

/// `MSG_DONTWAIT`: the kernel has answered before the call that asks it returns.
const NO_WAIT: i32 = 0x40;

/// A connection to nftables of the network namespace of the thread that made it.
pub struct Nft {
    socket: Socket,
}

impl Nft {
    pub fn open() -> Result<Self, NftError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // An error without the request that it answers, which is the longer one.
            socket.set_cap_ack(true)?;
            // A transaction is one packet.
            set_socket_send_buffer_size_force(&socket, BATCH_BYTES_MAX)?;
            Ok(Self { socket })
        };
        open().map_err(NftError::Talk)
    }

    /// Carries a transaction out, or nothing of it.
    pub(crate) fn commit(&self, what: &'static str, batch: Batch) -> Result<(), NftError> {
        let Some(last) = batch.messages.len().checked_sub(2).filter(|last| *last > 0) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        for (sequence, message) in (0_u32..).zip(&batch.messages) {
            let mut message = message.clone();
            message.header.sequence_number = sequence;
            let wants_answer = usize::try_from(sequence).is_ok_and(|it| it == last);
            message.header.flags |= NLM_F_REQUEST | if wants_answer { NLM_F_ACK } else { 0 };
            append(&mut bytes, message);
        }
        self.forget_answers();
        self.socket.send(&bytes, 0).map_err(NftError::Talk)?;
        let mut refused = None;
        loop {
            let (mut ended, mut count) = (false, 0);
            for answer in self.receive::<NetfilterMessage>()? {
                count += 1;
                let NetlinkPayload::Error(error) = answer.payload else { continue };
                let sequence = usize::try_from(answer.header.sequence_number).unwrap_or(0);
                // The first message of all stands for the whole.
                ended |= sequence == last || sequence == 0;
                if error.code.is_some() {
                    refused.get_or_insert(error.to_io());
                }
            }
            if ended {
                break;
            }
            if count == 0 {
                return Err(NftError::Answer);
            }
        }
        refused.map_or(Ok(()), |source| Err(NftError::Refused { what, source }))
    }

    /// How often the ruleset was changed, by whomever.
    pub fn generation(&self) -> Result<u32, NftError> {
        let mut ask = NetlinkMessage::from(message(NfTablesMessage::GetGen(GenMessage {
            attributes: Vec::new(),
        })));
        ask.header.flags = NLM_F_REQUEST;
        let mut bytes = Vec::new();
        append(&mut bytes, ask);
        self.forget_answers();
        self.socket.send(&bytes, 0).map_err(NftError::Talk)?;
        for answer in self.receive::<NetfilterMessage>()? {
            let NetlinkPayload::InnerMessage(answer) = answer.payload else { continue };
            let NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(answer)) = answer.inner
            else {
                continue;
            };
            for attribute in answer.attributes {
                if let GenAttribute::Id(id) = attribute {
                    return Ok(id);
                }
            }
        }
        Err(NftError::Answer)
    }

    /// Asks for a list of something.
    pub(crate) fn list<T: NetlinkDeserializable>(
        &self,
        what: &'static str,
        ask: NfTablesMessage,
    ) -> Result<Vec<T>, NftError> {
        self.list_message(what, message(ask))
    }

    pub(crate) fn list_message<T: NetlinkDeserializable>(
        &self,
        what: &'static str,
        ask: NetfilterMessage,
    ) -> Result<Vec<T>, NftError> {
        let mut ask = NetlinkMessage::from(ask);
        ask.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut bytes = Vec::new();
        append(&mut bytes, ask);
        self.forget_answers();
        self.socket.send(&bytes, 0).map_err(NftError::Talk)?;
        let mut all = Vec::new();
        loop {
            let answers = self.receive::<T>()?;
            if answers.is_empty() {
                return Err(NftError::Answer);
            }
            for answer in answers {
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(all),
                    NetlinkPayload::Error(error) => {
                        return Err(NftError::Refused { what, source: error.to_io() });
                    }
                    NetlinkPayload::InnerMessage(message) => all.push(message),
                    _ => return Err(NftError::Answer),
                }
            }
        }
    }

    /// Asks for one thing, and waits until it is done. The error is the kernel's.
    pub(crate) fn demand(&self, message: NetfilterMessage) -> io::Result<()> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut bytes = Vec::new();
        append(&mut bytes, message);
        self.forget_answers();
        self.socket.send(&bytes, 0)?;
        for answer in self.receive::<NetfilterMessage>().map_err(io::Error::other)? {
            if let NetlinkPayload::Error(error) = answer.payload {
                return if error.code.is_none() { Ok(()) } else { Err(error.to_io()) };
            }
        }
        Err(io::Error::other(NftError::Answer))
    }

    /// One read's worth of messages.
    fn receive<T: NetlinkDeserializable>(&self) -> Result<Vec<NetlinkMessage<T>>, NftError> {
        let mut buffer = Vec::with_capacity(ANSWER_BYTES_MAX);
        self.socket.recv(&mut buffer, NO_WAIT).map_err(NftError::Talk)?;
        split(&buffer)
    }

    /// Of a request that failed half way there may be some left.
    fn forget_answers(&self) {
        let mut buffer = Vec::with_capacity(ANSWER_BYTES_MAX);
        while self.socket.recv(&mut buffer, NO_WAIT).is_ok() {
            buffer.clear();
        }
    }
}

/// The messages of one read.
pub(crate) fn split<T: NetlinkDeserializable>(
    mut bytes: &[u8],
) -> Result<Vec<NetlinkMessage<T>>, NftError> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkMessage::deserialize(bytes).map_err(|_| NftError::Answer)?;
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
        let length = length.checked_next_multiple_of(4).filter(|length| *length > 0);
        bytes = length.and_then(|length| bytes.get(length..)).unwrap_or_default();
        messages.push(message);
    }
    Ok(messages)
}

/// Waits until every CPU has run this thread. Packets are judged where no thread is run in between:
/// those that were judged by what was before a transaction have gone on their way then.
///
/// Ahead of everybody else who wants a CPU: behind them it would take milliseconds for each.
pub(crate) fn pass_every_cpu() -> io::Result<()> {
    let _ahead = sys::Ahead::begin();
    let before = sched_getaffinity(None)?;
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu)) {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one)?;
    }
    Ok(sched_setaffinity(None, &before)?)
}

fn append(bytes: &mut Vec<u8>, mut message: NetlinkMessage<NetfilterMessage>) {
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

fn message(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0), message)
}

/// Changes that are made together.
pub(crate) struct Batch {
    messages: Vec<NetlinkMessage<NetfilterMessage>>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        let mut batch = Self { messages: Vec::new() };
        batch.border(ControlMessage::BatchBegin);
        batch
    }

    pub(crate) fn create(&mut self, what: NfTablesMessage) {
        self.push(what, NLM_F_CREATE);
    }

    /// Behind what is there.
    pub(crate) fn append(&mut self, what: NfTablesMessage) {
        self.push(what, NLM_F_CREATE | NLM_F_APPEND);
    }

    pub(crate) fn delete(&mut self, what: NfTablesMessage) {
        self.push(what, 0);
    }

    /// Nothing comes behind this.
    pub(crate) fn end(mut self) -> Self {
        self.border(ControlMessage::BatchEnd);
        self
    }

    fn push(&mut self, what: NfTablesMessage, flags: u16) {
        let mut message = NetlinkMessage::from(message(what));
        message.header.flags = flags;
        self.messages.push(message);
    }

    fn border(&mut self, border: ControlMessage) {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES);
        self.messages.push(NetlinkMessage::from(NetfilterMessage::new(header, border)));
    }
}
