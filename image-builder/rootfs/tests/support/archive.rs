//! Writes tar archives as no honest program would, block by block.

/// An archive being made. Every method appends.
#[derive(Clone, Default)]
pub(crate) struct Archive(Vec<u8>);

pub(crate) const EPOCH: u64 = 1_700_000_000;

impl Archive {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// With the two blank blocks that end an archive.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }

    /// Without them.
    pub(crate) fn cut(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Bytes filled up to whole blocks.
    pub(crate) fn data(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A header of mode 644, owner 0:0, at [`EPOCH`]; `change` sees it before its checksum is made.
    pub(crate) fn header(
        mut self,
        flag: u8,
        path: impl AsRef<[u8]>,
        size: u64,
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        let path = path.as_ref();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path);
        header.as_mut_bytes()[156] = flag;
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size);
        header.set_mtime(EPOCH);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self
    }

    pub(crate) fn file(self, path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        let data = data.as_ref();
        self.header(b'0', path, data.len() as u64, |_| {}).data(data)
    }

    pub(crate) fn folder(self, path: impl AsRef<[u8]>) -> Self {
        self.header(b'5', path, 0, |header| header.set_mode(0o755))
    }

    pub(crate) fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.header(b'2', path, 0, |header| set_link(header, target.as_ref()))
    }

    pub(crate) fn hard_link(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.header(b'1', path, 0, |header| set_link(header, target.as_ref()))
    }

    pub(crate) fn device(self, flag: u8, path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        self.header(flag, path, 0, |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    /// An extended header for the next entry.
    pub(crate) fn pax<K: AsRef<[u8]>, V: AsRef<[u8]>>(self, records: &[(K, V)]) -> Self {
        self.extended(b'x', records)
    }

    pub(crate) fn global_pax<K: AsRef<[u8]>, V: AsRef<[u8]>>(self, records: &[(K, V)]) -> Self {
        self.extended(b'g', records)
    }

    fn extended<K: AsRef<[u8]>, V: AsRef<[u8]>>(self, flag: u8, records: &[(K, V)]) -> Self {
        let all = records.iter().flat_map(|(key, value)| record(key.as_ref(), value.as_ref()));
        let all: Vec<u8> = all.collect();
        self.header(flag, "PaxHeaders/any", all.len() as u64, |_| {}).data(&all)
    }

    /// A GNU long name (`L`) or long link target (`K`) for the next entry.
    pub(crate) fn gnu_long(self, flag: u8, name: impl AsRef<[u8]>) -> Self {
        let name = [name.as_ref(), b"\0"].concat();
        self.header(flag, "././@LongLink", name.len() as u64, |_| {}).data(&name)
    }
}

pub(crate) fn set_link(header: &mut tar::Header, target: &[u8]) {
    header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target);
}

/// A record with its length, which counts its own digits.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let length = (body..).find(|length| body + length.to_string().len() == *length).unwrap();
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}
