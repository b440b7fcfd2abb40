//! What is to be converted, checked once, whichever way it was asked for.

use std::{os::fd::AsFd, path::PathBuf};

use fs_err as fs;
use holdfast_model::Secret;
use holdfast_oci::{self as oci, Platform, Reference, RegistryOptions};
use holdfast_wire::{
    WIRE_VERSION,
    convert::{Request, Source},
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::{cli::Arguments, error::Error};

#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) store: PathBuf,
    pub(crate) platform: Platform,
    pub(crate) source: Place,
}

/// Where the image is.
#[derive(Debug)]
pub(crate) enum Place {
    Registry { reference: Reference, options: Box<RegistryOptions> },
    Layout { path: PathBuf, name: Option<String> },
    Archive { file: fs::File, name: Option<String> },
}

impl Job {
    pub(crate) fn from_request(request: Request) -> Result<Self, Error> {
        if request.version != WIRE_VERSION {
            let versions = format!("version {}, not {WIRE_VERSION}", request.version);
            return Err(Error::Request(versions));
        }
        let source = match request.source {
            Source::Registry { reference, credentials, plain_http } => {
                let credentials = credentials.map(|own| oci::Credentials {
                    username: own.username,
                    secret: Secret::new(own.secret),
                });
                let options = RegistryOptions { credentials, plain_http, ..Default::default() };
                let reference = reference.parse().map_err(oci::Error::from)?;
                Place::Registry { reference, options: Box::new(options) }
            }
            Source::Layout { path, name } => Place::Layout { path: path.into(), name },
            Source::Archive { fd, name } => Place::Archive { file: inherited(fd)?, name },
        };
        let platform = request.platform.parse().map_err(oci::Error::from)?;
        Ok(Self { store: request.store.into(), platform, source })
    }

    pub(crate) fn from_arguments(arguments: Arguments) -> Result<Self, Error> {
        let open = |path: &PathBuf| {
            let what = path.display().to_string();
            fs::File::open(path).map_err(|source| Error::Open { what, source })
        };
        let (source, name) = (arguments.source, arguments.name);
        let source = match (source.layout, source.archive, source.registry) {
            (Some(path), _, _) => Place::Layout { path, name },
            (_, Some(path), _) => Place::Archive { file: open(&path)?, name },
            (_, _, Some(reference)) => {
                let read = |path: PathBuf| {
                    let what = path.display().to_string();
                    fs::read(path).map_err(|source| Error::Open { what, source })
                };
                let options = RegistryOptions {
                    credentials: arguments.username.zip(arguments.secret).map(
                        |(username, secret)| oci::Credentials {
                            username,
                            secret: Secret::new(secret),
                        },
                    ),
                    plain_http: arguments.plain_http,
                    extra_ca_pem: arguments.ca.map(read).transpose()?,
                    ..Default::default()
                };
                let reference = reference.parse().map_err(oci::Error::from)?;
                Place::Registry { reference, options: Box::new(options) }
            }
            (None, None, None) => return Err(Error::Request("no image is named".to_owned())),
        };
        let platform = arguments.platform.parse().map_err(oci::Error::from)?;
        Ok(Self { store: arguments.store, platform, source })
    }
}

/// A file that the agent left open for us. The number is only a claim, so the kernel is asked for
/// a descriptor of our own for it: a wrong number is an error, and never somebody else's file.
fn inherited(fd: i32) -> Result<fs::File, Error> {
    let ask = || {
        let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        rustix::process::pidfd_getfd(own.as_fd(), fd, PidfdGetfdFlags::empty())
    };
    let what = format!("archive on descriptor {fd}");
    let file = ask().map_err(|source| Error::Open { what: what.clone(), source: source.into() })?;
    Ok(fs::File::from_parts(file.into(), what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: u16, source: Source) -> Request {
        Request { version, source, store: "/x".to_owned(), platform: "linux/amd64".to_owned() }
    }

    #[test]
    fn a_request_of_another_version_or_with_a_wrong_name_is_refused() {
        let layout = || Source::Layout { path: "/y".to_owned(), name: None };
        assert!(Job::from_request(request(WIRE_VERSION, layout())).is_ok());
        let error = Job::from_request(request(WIRE_VERSION + 1, layout())).unwrap_err();
        assert!(matches!(error, Error::Request(_)));
        let reference = "r.io/../x".to_owned();
        let climbing = Source::Registry { reference, credentials: None, plain_http: Vec::new() };
        let error = Job::from_request(request(WIRE_VERSION, climbing)).unwrap_err();
        assert!(matches!(error, Error::Get(oci::Error::Reference(_))));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        let archive = Source::Archive { fd: 1_000_000, name: None };
        let error = Job::from_request(request(WIRE_VERSION, archive)).unwrap_err();
        assert!(error.to_string().contains("descriptor 1000000"));
    }
}
