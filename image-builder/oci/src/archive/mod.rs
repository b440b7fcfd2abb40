//! Images in a tar archive: an OCI layout packed whole, or what `docker save` writes. The archive
//! is a plain file that is read in place; nothing of it is unpacked.

mod docker;
mod index;

use std::{
    io::{self, Read},
    os::unix::fs::FileExt,
    sync::Arc,
};

use fs_err as fs;
use holdfast_model::Digest;

use self::{
    docker::Saved,
    index::{Index, Piece},
};
use crate::{
    Error, Image, Layer, Platform,
    image::{Documents, Kind},
    layout::{blob_name, entry_of},
    store::read_document,
};

/// What stands in errors for the archive: it comes as an open file, its path is its sender's.
const PLACE: &str = "the archive";

/// An OCI or docker archive.
#[derive(Debug)]
pub struct Archive {
    file: Arc<fs::File>,
    index: Index,
    /// What is not in an archive of the older docker form, and was made from it.
    saved: Option<Saved>,
}

/// Reads one piece of the archive. The file's own position is not used: several may read.
#[derive(Debug)]
struct PieceReader {
    file: Arc<fs::File>,
    piece: Piece,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.piece.bytes).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.file().read_at(&mut buffer[..wanted], self.piece.offset)?;
        if count == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let step = u64::try_from(count).unwrap_or(u64::MAX);
        self.piece.offset += step;
        self.piece.bytes -= step;
        Ok(count)
    }
}

impl Archive {
    /// Reads where everything lies. The file must be a plain one.
    pub fn open(file: fs::File) -> Result<Self, Error> {
        let index = Index::read(&file)?;
        Ok(Self { file: Arc::new(file), index, saved: None })
    }

    /// Finds the image with this name, or the only one that fits the platform.
    pub fn resolve(&mut self, name: Option<&str>, platform: &Platform) -> Result<Image, Error> {
        // Newer docker archives are both; the layout in them has the image as it was pushed.
        if self.index.find("index.json").is_some() && self.index.find("oci-layout").is_some() {
            let bytes = self.read("index.json")?;
            let entry = entry_of(&bytes, name, platform, PLACE)?;
            return Image::find(self, entry.digest, platform);
        }
        if self.index.find("manifest.json").is_none() {
            let what = "index.json or manifest.json".to_owned();
            return Err(Error::NotFound { what, place: PLACE.to_owned() });
        }
        let saved = Saved::read(self, name)?;
        let digest = saved.digest();
        self.saved = Some(saved);
        Image::find(self, digest, platform)
    }

    /// A reader of a layer's bytes as they lie there. Whoever reads them checks them.
    pub fn layer(&self, layer: &Layer) -> Result<impl Read + Send + use<>, Error> {
        let saved = self.saved.as_ref().and_then(|saved| saved.layer(layer.digest));
        self.reader(saved.unwrap_or(&blob_name(layer.digest)))
    }

    fn reader(&self, name: &str) -> Result<PieceReader, Error> {
        let missing = || Error::NotFound { what: name.to_owned(), place: PLACE.to_owned() };
        let piece = self.index.find(name).ok_or_else(missing)?;
        Ok(PieceReader { file: Arc::clone(&self.file), piece })
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let what = format!("{name} in {PLACE}");
        read_document(self.reader(name)?).map_err(|source| Error::Read { what, source })
    }
}

impl Documents for Archive {
    fn document(&mut self, kind: Kind, digest: Digest) -> Result<Vec<u8>, Error> {
        match self.saved.as_ref().and_then(|saved| saved.document(kind)) {
            Some(bytes) => Ok(bytes.to_vec()),
            None => self.read(&blob_name(digest)),
        }
    }

    fn place(&self) -> String {
        PLACE.to_owned()
    }
}
