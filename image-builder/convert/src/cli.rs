//! The command line for people and the image build.

use std::path::PathBuf;

use clap::{Args, Parser};

use crate::public::Listing;

/// Makes an OCI image a root file system in an image store.
///
/// Without arguments it reads one request of the Holdfast agent from standard input. With
/// arguments it converts the image they name, shows its progress on standard error and writes the
/// digest of the image's manifest to standard output.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// Folder of the image store; made if it is missing
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,
    #[command(flatten)]
    pub(crate) source: SourceArguments,
    /// Which image of a layout or archive, if it holds several
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// For which machines the image is meant
    #[arg(long, value_name = "OS/ARCHITECTURE", default_value = "linux/amd64")]
    pub(crate) platform: String,
    /// List the image in the store's public.json under this name
    #[arg(long, value_name = "NAME")]
    public: Option<String>,
    /// What the list says of the image
    #[arg(long, requires = "public", default_value = "")]
    description: String,
    /// Registry (`host[:port]`) that may be spoken to over plain http; may be given several times
    #[arg(long, value_name = "HOST")]
    pub(crate) plain_http: Vec<String>,
    /// Certificates (PEM) to trust besides those of the system
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Name to use at the registry; its password or token is taken from HOLDFAST_REGISTRY_SECRET
    #[arg(long, requires = "secret")]
    pub(crate) username: Option<String>,
    // Not on the command line, where every user of the machine could read it.
    #[arg(long, env = "HOLDFAST_REGISTRY_SECRET", hide = true, hide_env_values = true)]
    pub(crate) secret: Option<String>,
}

/// Where the image is.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct SourceArguments {
    /// Folder of the OCI image layout
    #[arg(long, value_name = "DIR")]
    pub(crate) layout: Option<PathBuf>,
    /// OCI or docker archive (plain tar)
    #[arg(long, value_name = "FILE")]
    pub(crate) archive: Option<PathBuf>,
    /// Image in a registry: `host[:port]/name[:tag][@digest]`
    #[arg(long, value_name = "REFERENCE")]
    pub(crate) registry: Option<String>,
}

impl Arguments {
    pub(crate) fn listing(&self) -> Option<Listing> {
        let description = self.description.clone();
        self.public.clone().map(|name| Listing { name, description })
    }
}
