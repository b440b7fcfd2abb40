//! The place an image comes from, once it is known which image it is.

use std::{io::Read, time::SystemTime};

use holdfast_oci::{Archive, ContentStore, Image, Layer, Layout, Registry};

use crate::{
    error::Error,
    job::{Job, Place},
};

/// Gives the layers of the image that was found there.
#[derive(Debug)]
pub(crate) enum Origin {
    Remote(Box<Registry>),
    Local(Local),
}

/// A place whose layers can be read as they lie there.
#[derive(Debug)]
pub(crate) enum Local {
    Layout(Layout),
    Archive(Archive),
}

impl Origin {
    /// Finds the image. Its manifest and config are in the store after it.
    pub(crate) fn find(job: Job, store: &ContentStore) -> Result<(Image, Self), Error> {
        let platform = &job.platform;
        let (image, local) = match job.source {
            Place::Registry { reference, options } => {
                let registry = Registry::new(&reference, *options)?;
                let resolved = registry.resolve(store, platform, SystemTime::now())?;
                if let Some(stale) = resolved.stale {
                    log::warn!(image:% = reference, age_seconds = stale.age.as_secs(),
                        reason:% = stale.reason; "registry in trouble; its last answer is used");
                }
                return Ok((resolved.image, Self::Remote(Box::new(registry))));
            }
            Place::Layout { path, name } => {
                let mut layout = Layout::open(&path);
                (layout.resolve(name.as_deref(), platform)?, Local::Layout(layout))
            }
            Place::Archive { file, name } => {
                let mut archive = Archive::open(file)?;
                (archive.resolve(name.as_deref(), platform)?, Local::Archive(archive))
            }
        };
        image.keep(store)?;
        Ok((image, Self::Local(local)))
    }
}

impl Local {
    pub(crate) fn layer(&self, layer: &Layer) -> Result<Box<dyn Read>, Error> {
        Ok(match self {
            Self::Layout(layout) => Box::new(layout.layer(layer)?),
            Self::Archive(archive) => Box::new(archive.layer(layer)?),
        })
    }
}
