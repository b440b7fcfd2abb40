//! The first message of a TLS client, read without answering it: which name it asks for. The bytes
//! go on as they came, so whatever two readers could read differently is refused.

/// Bytes of a ClientHello with the records around it. Key shares of post-quantum groups and padding
/// make some 2 KiB, and nobody sends 16.
pub(crate) const HELLO_BYTES_MAX: usize = 16 * 1024;
/// Records it may be cut into.
const RECORDS_MAX: usize = 1024;

const RECORD_HANDSHAKE: u8 = 22;
const RECORD_HEAD_BYTES: usize = 5;
const RECORD_BYTES_MAX: usize = 1 << 14;
const CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_ALPN: u16 = 16;
const EXTENSION_SUPPORTED_VERSIONS: u16 = 43;
const TLS_1_2: u16 = 0x0303;
const TLS_1_3: u16 = 0x0304;

/// What a ClientHello says that matters to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    /// As it came; `None`: it names no server. Not checked to be a host name.
    pub(crate) server_name: Option<String>,
    pub(crate) offers_h2: bool,
}

/// Why the bytes are no ClientHello that we let pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadHello {
    #[error("the first record is not a TLS handshake")]
    NotTls,
    #[error("the ClientHello is longer than {HELLO_BYTES_MAX} bytes or cut into too many records")]
    TooLong,
    #[error("the ClientHello is malformed")]
    Malformed,
    #[error("the ClientHello names more than one server, or one in an odd form")]
    Name,
    #[error("the client speaks neither TLS 1.2 nor 1.3")]
    Version,
}

/// Reads a ClientHello. `None`: not all of it has arrived yet.
pub(crate) fn read(bytes: &[u8]) -> Result<Option<Hello>, BadHello> {
    let mut rest = bytes;
    let mut message = Vec::new();
    for _ in 0..RECORDS_MAX {
        let [kind, major, _, ..] = *rest else {
            return begun(bytes, rest);
        };
        if kind != RECORD_HANDSHAKE || major != 3 {
            return Err(BadHello::NotTls);
        }
        let Some((head, after)) = rest.split_first_chunk::<RECORD_HEAD_BYTES>() else {
            return begun(bytes, rest);
        };
        let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
        // RFC 8446 5.1: handshake records are not empty.
        if length == 0 || length > RECORD_BYTES_MAX {
            return Err(BadHello::Malformed);
        }
        let part = &after[..length.min(after.len())];
        message.extend_from_slice(part);
        let Some(announced) = announced(&message)? else {
            if after.len() < length {
                return begun(bytes, rest);
            }
            rest = &after[length..];
            continue;
        };
        if let Some(whole) = message.get(4..4 + announced) {
            return hello(whole).map(Some);
        }
        if after.len() < length {
            return begun(bytes, rest);
        }
        rest = &after[length..];
    }
    Err(BadHello::TooLong)
}

/// What there is so far is the beginning of one, unless it is too long already.
fn begun(bytes: &[u8], rest: &[u8]) -> Result<Option<Hello>, BadHello> {
    match rest.first() {
        Some(&kind) if kind != RECORD_HANDSHAKE => Err(BadHello::NotTls),
        _ if bytes.len() >= HELLO_BYTES_MAX => Err(BadHello::TooLong),
        _ => Ok(None),
    }
}

/// Length that the handshake message announces. `None`: its head has not arrived yet.
fn announced(message: &[u8]) -> Result<Option<usize>, BadHello> {
    match message.first() {
        Some(&kind) if kind != CLIENT_HELLO => return Err(BadHello::Malformed),
        _ => {}
    }
    let Some(head) = message.first_chunk::<4>() else { return Ok(None) };
    let length = usize::from(head[1]) << 16 | usize::from(head[2]) << 8 | usize::from(head[3]);
    if length > HELLO_BYTES_MAX - RECORD_HEAD_BYTES - 4 {
        return Err(BadHello::TooLong);
    }
    Ok(Some(length))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], BadHello> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(BadHello::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<usize, BadHello> {
        Ok(usize::from(self.take(1)?[0]))
    }

    fn u16(&mut self) -> Result<u16, BadHello> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// Bytes behind their length in two bytes.
    fn vector16(&mut self) -> Result<Reader<'a>, BadHello> {
        let length = usize::from(self.u16()?);
        self.take(length).map(Reader)
    }

    fn vector8(&mut self) -> Result<Reader<'a>, BadHello> {
        let length = self.u8()?;
        self.take(length).map(Reader)
    }
}

fn hello(message: &[u8]) -> Result<Hello, BadHello> {
    let mut reader = Reader(message);
    let version = reader.u16()?;
    let _random = reader.take(32)?;
    let _session = reader.vector8()?;
    let _ciphers = reader.vector16()?;
    let _compression = reader.vector8()?;
    let mut hello = Hello { server_name: None, offers_h2: false };
    let (mut seen, mut modern) = (Vec::new(), version == TLS_1_2);
    // A hello without extensions ends here.
    if !reader.0.is_empty() {
        let mut extensions = reader.vector16()?;
        while !extensions.0.is_empty() {
            let kind = extensions.u16()?;
            let mut content = extensions.vector16()?;
            // RFC 8446 4.2: not twice. Two names, of which another reader takes the other, would be
            // a way past every rule.
            if seen.contains(&kind) {
                return Err(BadHello::Malformed);
            }
            seen.push(kind);
            match kind {
                EXTENSION_SERVER_NAME => hello.server_name = Some(server_name(&mut content)?),
                EXTENSION_ALPN => hello.offers_h2 = offers(&mut content, b"h2")?,
                EXTENSION_SUPPORTED_VERSIONS => modern = speaks(&mut content)?,
                _ => {}
            }
        }
    }
    match (modern, reader.0) {
        (true, []) => Ok(hello),
        (false, []) => Err(BadHello::Version),
        _ => Err(BadHello::Malformed),
    }
}

fn server_name(content: &mut Reader<'_>) -> Result<String, BadHello> {
    let mut list = content.vector16()?;
    let kind = list.u8()?;
    let name = list.vector16()?.0;
    if kind != 0 || !list.0.is_empty() || !content.0.is_empty() || name.is_empty() {
        return Err(BadHello::Name);
    }
    // 253 bytes of name, and the dot that some write behind it.
    let printable = name.iter().all(u8::is_ascii_graphic);
    if name.len() > 254 || !printable {
        return Err(BadHello::Name);
    }
    Ok(name.iter().map(|byte| char::from(*byte)).collect())
}

fn offers(content: &mut Reader<'_>, wanted: &[u8]) -> Result<bool, BadHello> {
    let mut list = content.vector16()?;
    let mut found = false;
    while !list.0.is_empty() {
        found |= list.vector8()?.0 == wanted;
    }
    Ok(found)
}

fn speaks(content: &mut Reader<'_>) -> Result<bool, BadHello> {
    let mut list = content.vector8()?;
    let mut found = false;
    while !list.0.is_empty() {
        found |= matches!(list.u16()?, TLS_1_2 | TLS_1_3);
    }
    Ok(found)
}

/// A fatal alert, for whoever sent a hello that does not pass.
pub(crate) fn alert(description: u8) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description]
}

/// RFC 8446 6.2: the policy does not let it go on.
pub(crate) const ALERT_ACCESS_DENIED: u8 = 49;
pub(crate) const ALERT_DECODE_ERROR: u8 = 50;
pub(crate) const ALERT_PROTOCOL_VERSION: u8 = 70;
pub(crate) const ALERT_INTERNAL_ERROR: u8 = 80;
pub(crate) const ALERT_UNRECOGNIZED_NAME: u8 = 112;

impl BadHello {
    /// Why, for the record.
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::NotTls | Self::Malformed => "bad_hello",
            Self::TooLong => "hello_too_long",
            Self::Name => "no_name",
            Self::Version => "tls_version",
        }
    }

    /// The alert that says so.
    pub(crate) const fn alert(self) -> u8 {
        match self {
            Self::Name => ALERT_UNRECOGNIZED_NAME,
            Self::Version => ALERT_PROTOCOL_VERSION,
            Self::NotTls | Self::TooLong | Self::Malformed => ALERT_DECODE_ERROR,
        }
    }
}

#[cfg(test)]
mod tests;
