//! A layer, from the registry into a draft: hashed as it comes, gone on with where it was cut.

use std::{
    io::Read,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use holdfast_model::Digest;
use reqwest::{
    Method, StatusCode,
    blocking::Response,
    header::{CONTENT_RANGE, HeaderValue, RANGE},
};
use sha2::{Digest as _, Sha256};

use super::Registry;
use crate::{Draft, Error, Layer};

/// Bytes taken from the connection at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// How far one layer has come.
struct Progress<'a> {
    hasher: Sha256,
    have: u64,
    /// Some of the bytes are from an earlier run, or the registry is not consistent: if the
    /// digest is wrong, it is worth beginning anew, once.
    doubtful: bool,
    seen: &'a AtomicU64,
}

impl Progress<'_> {
    fn restart(&mut self, draft: &mut Draft) -> Result<(), Error> {
        draft.restart()?;
        self.hasher = Sha256::new();
        self.have = 0;
        self.doubtful = false;
        self.seen.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn take(&mut self, bytes: &[u8], draft: &mut Draft) -> Result<(), Error> {
        draft.append(bytes)?;
        self.hasher.update(bytes);
        self.have += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.seen.store(self.have, Ordering::Relaxed);
        Ok(())
    }
}

impl Registry {
    /// Brings the draft to the layer's whole, verified content. `seen` tells how many bytes are
    /// there. On an error the draft keeps what is good of it.
    pub fn download(
        &self,
        layer: &Layer,
        draft: &mut Draft,
        seen: &AtomicU64,
    ) -> Result<(), Error> {
        let (hasher, have) = draft.resume(layer.size)?;
        let mut progress = Progress { hasher, have, doubtful: have > 0, seen };
        seen.store(have, Ordering::Relaxed);
        let mut barren = 0;
        loop {
            if progress.have == layer.size {
                let found = Digest::from_sha256(progress.hasher.clone().finalize().into());
                if found == layer.digest {
                    return Ok(());
                }
                let doubtful = progress.doubtful;
                progress.restart(draft)?;
                if doubtful {
                    continue;
                }
                return Err(Error::Digest {
                    what: self.name(layer),
                    expected: layer.digest,
                    found,
                });
            }
            let before = progress.have;
            if let Err(cut) = self.stretch(layer, draft, &mut progress)? {
                barren = if progress.have > before { 1 } else { barren + 1 };
                let Some(wait) = self.transport.patience.wait(barren, None) else {
                    let host = self.transport.host().to_owned();
                    let what = self.name(layer);
                    return Err(Error::Cut { host, what, got: progress.have, size: layer.size });
                };
                log::warn!(layer:% = layer.digest, got = progress.have, error:% = cut;
                    "layer was cut; going on from there");
                thread::sleep(wait);
            }
        }
    }

    /// One request for all that is missing. The inner error: the connection ended before that.
    fn stretch(
        &self,
        layer: &Layer,
        draft: &mut Draft,
        progress: &mut Progress<'_>,
    ) -> Result<Result<(), String>, Error> {
        let text = layer.digest.to_string();
        let mut ask = self.ask(Method::GET, format!("blobs/{text}"), "layer", &text);
        if progress.have > 0 {
            let range = HeaderValue::from_str(&format!("bytes={}-", progress.have));
            ask.headers.extend(range.ok().map(|range| (RANGE, range)));
        }
        let mut response = self.transport.send(&ask)?;
        match response.status() {
            StatusCode::RANGE_NOT_SATISFIABLE => {
                // The registry has no more: what it has is too short.
                let error =
                    Error::Size { what: ask.what, expected: layer.size, found: progress.have };
                let doubtful = progress.doubtful;
                progress.restart(draft)?;
                return if doubtful { Ok(Ok(())) } else { Err(error) };
            }
            StatusCode::PARTIAL_CONTENT if begins_at(&response, progress.have) => {}
            // It sends all of it, or another part: what we have is of no use then.
            StatusCode::OK if progress.have == 0 => {}
            StatusCode::OK => progress.restart(draft)?,
            status => {
                let host = self.transport.host().to_owned();
                return Err(Error::Answer { host, what: ask.what, status: status.as_u16() });
            }
        }
        let mut buffer = vec![0; CHUNK_BYTES];
        while progress.have < layer.size {
            match response.read(&mut buffer) {
                Ok(0) => return Ok(Err("the connection ended".to_owned())),
                Ok(count) => {
                    let missing = layer.size - progress.have;
                    if u64::try_from(count).unwrap_or(u64::MAX) > missing {
                        progress.restart(draft)?;
                        let found = layer.size + 1;
                        return Err(Error::Size { what: ask.what, expected: layer.size, found });
                    }
                    progress.take(&buffer[..count], draft)?;
                }
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
        Ok(Ok(()))
    }

    fn name(&self, layer: &Layer) -> String {
        let (registry, repository) = (self.reference.registry(), self.reference.repository());
        format!("layer {registry}/{repository}@{}", layer.digest)
    }
}

fn begins_at(response: &Response, offset: u64) -> bool {
    let header = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let first = header.and_then(|range| range.strip_prefix("bytes ")?.split('-').next());
    first.and_then(|first| first.parse().ok()) == Some(offset)
}
