//! DNS messages (RFC 1035, 6891, 9460) as far as we speak them: one question, and answers of four
//! types. Bytes of guests and of servers are read here, once; what goes out is written anew.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Longest name in bytes of text, the dots between labels included.
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
/// Pointers followed in one name: each goes back in the message, so this only bounds the work.
const POINTERS_MAX: usize = 16;
/// Records read of one answer. The rest is ignored.
const RECORDS_MAX: usize = 256;
/// Parameters read of one HTTPS record.
const PARAMETERS_MAX: usize = 16;
const HEADER_BYTES: usize = 12;

const FLAG_RESPONSE: u16 = 1 << 15;
const FLAG_TRUNCATED: u16 = 1 << 9;
const FLAG_RECURSION_DESIRED: u16 = 1 << 8;
const FLAG_RECURSION_AVAILABLE: u16 = 1 << 7;
const OPCODE_MASK: u16 = 0xf << 11;

pub(crate) const CLASS_IN: u16 = 1;
const TYPE_OPT: u16 = 41;

/// Types that we answer. Others have no data.
pub(crate) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const CNAME: u16 = 5;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const SVCB: u16 = 64;
    pub(crate) const HTTPS: u16 = 65;
}

/// Keys of HTTPS parameters that we pass on. `ech` would hide the name from us; the address hints
/// would be addresses that nobody checked.
const KEYS_KEPT: [u16; 4] =
    [0 /* mandatory */, 1 /* alpn */, 2 /* no-default-alpn */, 3 /* port */];

/// Why bytes are not a message we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadMessage {
    #[error("the message ends in the middle")]
    Short,
    #[error("the message is not of the kind expected")]
    Kind,
    #[error("a name in the message is too long or goes in circles")]
    Name,
}

/// What a response says of how it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    NoError,
    FormErr,
    ServFail,
    NxDomain,
    NotImp,
    Refused,
    Other(u8),
}

impl Code {
    const fn number(self) -> u8 {
        match self {
            Self::NoError => 0,
            Self::FormErr => 1,
            Self::ServFail => 2,
            Self::NxDomain => 3,
            Self::NotImp => 4,
            Self::Refused => 5,
            Self::Other(code) => code,
        }
    }

    const fn of(flags: u16) -> Self {
        match flags & 0xf {
            0 => Self::NoError,
            1 => Self::FormErr,
            2 => Self::ServFail,
            3 => Self::NxDomain,
            4 => Self::NotImp,
            5 => Self::Refused,
            other => Self::Other(other.to_le_bytes()[0]),
        }
    }
}

/// A guest's question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) id: u16,
    pub(crate) recursion_desired: bool,
    /// As it came, letters in the guest's case; `None`: it holds bytes that no host name has.
    pub(crate) name: Option<String>,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    /// Bytes of a UDP answer that the guest takes: 512 without EDNS.
    pub(crate) answer_bytes_max: usize,
    pub(crate) edns: bool,
    /// The question as it came, for the answer.
    question: Vec<u8>,
}

/// A record of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// In lower case.
    pub(crate) name: String,
    pub(crate) ttl_seconds: u32,
    pub(crate) data: Data,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Data {
    Address(IpAddr),
    Cname(String),
    Service(Service),
    Other(Other),
}

/// A record of one of the types that a rule may add.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Other {
    kind: u16,
    /// Bytes, names and bytes again: every one of these types is laid out so.
    head: Vec<u8>,
    names: Vec<String>,
    tail: Vec<u8>,
}

impl Service {
    pub(crate) const fn kind(&self) -> u16 {
        self.kind
    }

    /// Bytes of its target and parameters.
    pub(crate) fn bytes(&self) -> usize {
        self.target.len() + self.parameters.iter().map(|(_, value)| value.len()).sum::<usize>()
    }
}

impl Other {
    pub(crate) const fn kind(&self) -> u16 {
        self.kind
    }

    /// Bytes of its data.
    pub(crate) fn bytes(&self) -> usize {
        self.head.len() + self.names.iter().map(String::len).sum::<usize>() + self.tail.len()
    }
}

/// How the data of a type that a rule may add is laid out: bytes before names, names. What follows
/// is bytes. `None`: we do not know the type.
const fn layout(kind: u16) -> Option<(usize, usize)> {
    match kind {
        2 /* NS */ => Some((0, 1)),
        6 /* SOA */ => Some((0, 2)),
        15 /* MX */ => Some((2, 1)),
        16 /* TXT */ | 257 /* CAA */ => Some((0, 0)),
        33 /* SRV */ => Some((6, 1)),
        _ => None,
    }
}

/// What is left of an HTTPS or SVCB record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Service {
    kind: u16,
    priority: u16,
    target: String,
    /// Key and value, by key.
    parameters: Vec<(u16, Vec<u8>)>,
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) id: u16,
    pub(crate) truncated: bool,
    pub(crate) code: Code,
    /// Name of the question, in the case it came back in.
    pub(crate) name: String,
    pub(crate) kind: u16,
    pub(crate) records: Vec<Record>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], BadMessage> {
        let end = self.at.checked_add(count).ok_or(BadMessage::Short)?;
        let taken = self.bytes.get(self.at..end).ok_or(BadMessage::Short)?;
        self.at = end;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, BadMessage> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, BadMessage> {
        Ok(u32::from(self.u16()?) << 16 | u32::from(self.u16()?))
    }

    /// Reads a name. `None`: it has bytes that no host name has.
    fn name(&mut self) -> Result<Option<String>, BadMessage> {
        let mut text = String::new();
        let mut odd = false;
        // Where reading goes on behind the first pointer, and the place each pointer must lie before.
        let (mut resume, mut limit, mut pointers) = (None, self.at, 0);
        loop {
            let length = usize::from(self.take(1)?[0]);
            match length >> 6 {
                0 if length == 0 => break,
                0 => {
                    let label = self.take(length)?;
                    if length > LABEL_BYTES_MAX || text.len() + 1 + length > NAME_BYTES_MAX {
                        return Err(BadMessage::Name);
                    }
                    if !text.is_empty() {
                        text.push('.');
                    }
                    for &byte in label {
                        odd |= !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
                        text.push(char::from(byte));
                    }
                }
                3 => {
                    let low = self.take(1)?[0];
                    let place = (length & 0x3f) << 8 | usize::from(low);
                    pointers += 1;
                    if place >= limit || pointers > POINTERS_MAX {
                        return Err(BadMessage::Name);
                    }
                    resume.get_or_insert(self.at);
                    limit = place;
                    self.at = place;
                }
                _ => return Err(BadMessage::Name),
            }
        }
        if let Some(place) = resume {
            self.at = place;
        }
        Ok((!odd).then_some(text))
    }
}

impl Query {
    /// Reads a query. Fails on what cannot even be answered with an error.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, BadMessage> {
        let mut reader = Reader { bytes, at: 0 };
        let (id, flags) = (reader.u16()?, reader.u16()?);
        let [questions, _, _, additional] = counts(&mut reader)?;
        if flags & (FLAG_RESPONSE | OPCODE_MASK) != 0 || questions != 1 {
            return Err(BadMessage::Kind);
        }
        let name = reader.name()?;
        let (kind, class) = (reader.u16()?, reader.u16()?);
        // A pointer in a question could only point into the header: `name` has refused it.
        let question = bytes[HEADER_BYTES..reader.at].to_vec();
        let edns = if additional > 0 { edns_size(&mut reader) } else { None };
        Ok(Self {
            id,
            recursion_desired: flags & FLAG_RECURSION_DESIRED != 0,
            name,
            kind,
            class,
            // More than this is cut on its way.
            answer_bytes_max: usize::from(edns.unwrap_or(512)).clamp(512, 1232),
            edns: edns.is_some(),
            question,
        })
    }

    /// The answer to it. What does not fit into `bytes_max` is left out, and the answer says so.
    pub(crate) fn answer(&self, code: Code, records: &[Record], bytes_max: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.extend(self.id.to_be_bytes());
        let desired = if self.recursion_desired { FLAG_RECURSION_DESIRED } else { 0 };
        let flags =
            FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | desired | u16::from(code.number() & 0xf);
        out.extend(flags.to_be_bytes());
        for count in [1, 0, 0, u16::from(self.edns)] {
            out.extend(count.to_be_bytes());
        }
        out.extend(&self.question);
        let room = bytes_max.saturating_sub(if self.edns { 11 } else { 0 });
        let (mut count, mut cut) = (0_u16, false);
        for record in records {
            let before = out.len();
            record.write(&mut out);
            if out.len() > room {
                out.truncate(before);
                cut = true;
                break;
            }
            count += 1;
        }
        if self.edns {
            out.push(0);
            out.extend(TYPE_OPT.to_be_bytes());
            out.extend(1232_u16.to_be_bytes());
            out.extend([0; 6]);
        }
        out[6..8].copy_from_slice(&count.to_be_bytes());
        if cut {
            out[2..4].copy_from_slice(&(flags | FLAG_TRUNCATED).to_be_bytes());
        }
        out
    }

    /// The answer with an error.
    pub(crate) fn error(&self, code: Code) -> Vec<u8> {
        self.answer(code, &[], 512)
    }
}

fn counts(reader: &mut Reader<'_>) -> Result<[u16; 4], BadMessage> {
    Ok([reader.u16()?, reader.u16()?, reader.u16()?, reader.u16()?])
}

/// The size in an OPT record, where it is the first additional one, as everybody sends it.
fn edns_size(reader: &mut Reader<'_>) -> Option<u16> {
    let root = reader.take(1).ok()?;
    let (kind, size) = (reader.u16().ok()?, reader.u16().ok()?);
    (root == [0] && kind == TYPE_OPT).then_some(size)
}

impl Record {
    fn write(&self, out: &mut Vec<u8>) {
        write_name(&self.name, out);
        let kind = match &self.data {
            Data::Address(IpAddr::V4(_)) => kind::A,
            Data::Address(IpAddr::V6(_)) => kind::AAAA,
            Data::Cname(_) => kind::CNAME,
            Data::Service(service) => service.kind,
            Data::Other(other) => other.kind,
        };
        out.extend(kind.to_be_bytes());
        out.extend(CLASS_IN.to_be_bytes());
        out.extend(self.ttl_seconds.to_be_bytes());
        let at = out.len();
        out.extend([0; 2]);
        match &self.data {
            Data::Address(IpAddr::V4(v4)) => out.extend(v4.octets()),
            Data::Address(IpAddr::V6(v6)) => out.extend(v6.octets()),
            Data::Cname(name) => write_name(name, out),
            Data::Service(service) => {
                out.extend(service.priority.to_be_bytes());
                write_name(&service.target, out);
                for (key, value) in &service.parameters {
                    out.extend(key.to_be_bytes());
                    out.extend(u16::try_from(value.len()).unwrap_or(0).to_be_bytes());
                    out.extend(value);
                }
            }
            Data::Other(other) => {
                out.extend(&other.head);
                for name in &other.names {
                    write_name(name, out);
                }
                out.extend(&other.tail);
            }
        }
        let length = u16::try_from(out.len() - at - 2).unwrap_or(u16::MAX);
        out[at..at + 2].copy_from_slice(&length.to_be_bytes());
    }
}

/// Writes a name whose labels were checked when it was read.
fn write_name(name: &str, out: &mut Vec<u8>) {
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let label = &label.as_bytes()[..label.len().min(LABEL_BYTES_MAX)];
        out.push(u8::try_from(label.len()).unwrap_or(0));
        out.extend(label);
    }
    out.push(0);
}

/// A query to a resolver. `name` may have letters of both cases, which must come back.
pub(crate) fn write_query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + 32);
    out.extend(id.to_be_bytes());
    out.extend(FLAG_RECURSION_DESIRED.to_be_bytes());
    for count in [1_u16, 0, 0, 1] {
        out.extend(count.to_be_bytes());
    }
    write_name(name, &mut out);
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out.push(0);
    out.extend(TYPE_OPT.to_be_bytes());
    out.extend(1232_u16.to_be_bytes());
    out.extend([0; 6]);
    out
}

impl Response {
    /// Reads a server's answer. Records of other types are left out.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, BadMessage> {
        let mut reader = Reader { bytes, at: 0 };
        let (id, flags) = (reader.u16()?, reader.u16()?);
        let [questions, answers, _, _] = counts(&mut reader)?;
        if flags & FLAG_RESPONSE == 0 || flags & OPCODE_MASK != 0 || questions != 1 {
            return Err(BadMessage::Kind);
        }
        let name = reader.name()?.ok_or(BadMessage::Name)?;
        let (kind, class) = (reader.u16()?, reader.u16()?);
        if class != CLASS_IN {
            return Err(BadMessage::Kind);
        }
        let mut records = Vec::new();
        for _ in 0..usize::from(answers).min(RECORDS_MAX) {
            // What came before the cut stands; the caller asks again by TCP.
            match record(&mut reader) {
                Ok(record) => records.extend(record),
                Err(BadMessage::Short) if flags & FLAG_TRUNCATED != 0 => break,
                Err(error) => return Err(error),
            }
        }
        let truncated = flags & FLAG_TRUNCATED != 0;
        Ok(Self { id, truncated, code: Code::of(flags), name, kind, records })
    }
}

/// Reads one record. `None`: of a type or with a name that we pass on to nobody.
fn record(reader: &mut Reader<'_>) -> Result<Option<Record>, BadMessage> {
    let name = reader.name()?;
    let (kind, class) = (reader.u16()?, reader.u16()?);
    let ttl = reader.u32()?;
    let length = usize::from(reader.u16()?);
    let start = reader.at;
    let bytes = reader.take(length)?;
    let Some(name) = name else { return Ok(None) };
    // Seen from within the message, since a name may point back into it, but not beyond its record.
    let mut inner = Reader { bytes: &reader.bytes[..start + length], at: start };
    let data = match kind {
        _ if class != CLASS_IN => None,
        kind::A => <[u8; 4]>::try_from(bytes).ok().map(|b| Data::Address(Ipv4Addr::from(b).into())),
        kind::AAAA => {
            <[u8; 16]>::try_from(bytes).ok().map(|b| Data::Address(Ipv6Addr::from(b).into()))
        }
        kind::CNAME => inner.name()?.map(|name| Data::Cname(name.to_ascii_lowercase())),
        kind::HTTPS | kind::SVCB => service(kind, &mut inner)?.map(Data::Service),
        _ => other(kind, &mut inner)?.map(Data::Other),
    };
    // The highest bit of a TTL is a mistake (RFC 2181): zero.
    let ttl_seconds = if ttl >> 31 == 0 { ttl } else { 0 };
    Ok(data.map(|data| Record { name: name.to_ascii_lowercase(), ttl_seconds, data }))
}

fn other(kind: u16, reader: &mut Reader<'_>) -> Result<Option<Other>, BadMessage> {
    let Some((head, count)) = layout(kind) else { return Ok(None) };
    let head = reader.take(head)?.to_vec();
    let mut names = Vec::new();
    for _ in 0..count {
        let Some(name) = reader.name()? else { return Ok(None) };
        names.push(name);
    }
    let tail = reader.bytes[reader.at..].to_vec();
    Ok(Some(Other { kind, head, names, tail }))
}

fn service(kind: u16, reader: &mut Reader<'_>) -> Result<Option<Service>, BadMessage> {
    let priority = reader.u16()?;
    let Some(target) = reader.name()? else { return Ok(None) };
    let mut parameters = Vec::new();
    while reader.at < reader.bytes.len() {
        let (key, length) = (reader.u16()?, usize::from(reader.u16()?));
        let value = reader.take(length)?;
        if KEYS_KEPT.contains(&key) && parameters.len() < PARAMETERS_MAX {
            parameters.push((key, value.to_vec()));
        }
    }
    // What is mandatory and was stripped would make the record one that nobody may use.
    for (_, value) in parameters.iter_mut().filter(|(key, _)| *key == 0) {
        let keys = value
            .chunks_exact(2)
            .filter(|key| KEYS_KEPT.contains(&u16::from_be_bytes([key[0], key[1]])));
        *value = keys.flatten().copied().collect();
    }
    parameters.retain(|(key, value)| *key != 0 || !value.is_empty());
    Ok(Some(Service { kind, priority, target: target.to_ascii_lowercase(), parameters }))
}

#[cfg(test)]
mod tests;
