//! `holdfast image …`, and from what a sandbox is made.

use std::{io::IsTerminal, path::Path, time::Duration};

use holdfast_api::{
    disk_image::{
        CreateDiskImage, DiskImage, ImageSpec, ImageState, PublicDiskImage, RegistryCredentials,
    },
    model::{DiskImageId, Secret},
    node::{GcResult, ImageProgress},
    path,
    sandbox::DiskImageRef,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio_util::io::ReaderStream;

use crate::{
    args::{Output, Pull, Registry},
    client::Client,
    error::CliError,
    output,
    sandbox::labels,
};

/// Between two looks at an image that is being made.
const POLL: Duration = Duration::from_millis(200);

/// What `text` names: a disk image of the group by id, a public image by name, or an image
/// reference, which is pulled unless the group has it already.
pub(crate) async fn resolve(
    client: &Client,
    text: &str,
    registry: &Registry,
) -> Result<DiskImageRef, CliError> {
    if text.parse::<DiskImageId>().is_ok() {
        return Ok(by_id(text.to_owned()));
    }
    let public: Vec<PublicDiskImage> =
        client.get_all(&path::public_disk_images(&client.group)).await?;
    if public.iter().any(|image| image.name == text) {
        return Ok(DiskImageRef { id: None, name: Some(text.to_owned()), is_public: Some(true) });
    }
    let ours: Vec<DiskImage> = client.get_all(&path::disk_images(&client.group)).await?;
    let named = |image: &&DiskImage| {
        image.status.state == ImageState::Ready
            && (image.image.base == text || image.name.as_deref() == Some(text))
    };
    // The newest, if a tag was pulled more than once.
    if let Some(image) = ours.iter().filter(named).max_by(|a, b| a.created_at.cmp(&b.created_at)) {
        return Ok(by_id(image.id.clone()));
    }
    Ok(by_id(make(client, text, None, registry).await?.id))
}

fn by_id(id: String) -> DiskImageRef {
    DiskImageRef { id: Some(id), name: None, is_public: None }
}

fn credentials(registry: &Registry) -> Result<Option<RegistryCredentials>, CliError> {
    match (&registry.registry_user, &registry.registry_token) {
        (None, None) => Ok(None),
        (user, Some(token)) => Ok(Some(RegistryCredentials {
            username: user.clone().unwrap_or_default(),
            token: Secret::new(token.clone()),
        })),
        (Some(_), None) => Err(CliError::Wrong(
            "a registry user needs --registry-token or HOLDFAST_REGISTRY_TOKEN".to_owned(),
        )),
    }
}

/// Asks for a disk image of a reference and shows how it comes along.
async fn make(
    client: &Client,
    reference: &str,
    name: Option<&String>,
    registry: &Registry,
) -> Result<DiskImage, CliError> {
    let request = CreateDiskImage {
        image: ImageSpec { base: reference.to_owned(), ..ImageSpec::default() },
        labels: labels(&[], name)?,
        registry_credentials: credentials(registry)?,
        managed_identity_resource_id: None,
    };
    let image: DiskImage = client.put(&path::disk_images(&client.group), &request).await?;
    follow(client, image).await
}

/// Waits until an image is made. One that failed is an error that says why.
async fn follow(client: &Client, mut image: DiskImage) -> Result<DiskImage, CliError> {
    let bar = bar(&image.image.base);
    while image.status.state == ImageState::Creating {
        tokio::time::sleep(POLL).await;
        let progress: ImageProgress = client.get(&path::progress(&client.group, &image.id)).await?;
        bar.set_length(progress.bytes);
        bar.set_position(progress.bytes_done);
        bar.set_message(format!("layer {} of {}", progress.layers_done, progress.layers));
        image = client.get(&path::disk_image(&client.group, &image.id)).await?;
    }
    bar.finish_and_clear();
    if image.status.state == ImageState::Ready {
        return Ok(image);
    }
    let why = image.status.message.unwrap_or_else(|| "no reason was given".to_owned());
    // Nobody can make a sandbox of it; the record would only be in the way.
    client.delete(&path::disk_image(&client.group, &image.id)).await?;
    Err(CliError::Wrong(format!("image {}: {why}", image.image.base)))
}

/// A progress bar on stderr, if that is a terminal.
fn bar(title: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let form = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {msg}";
    let style = ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_prefix(title.to_owned())
}

pub(crate) async fn pull(client: &Client, pull: Pull, output: Output) -> Result<(), CliError> {
    let image = make(client, &pull.reference, pull.name.as_ref(), &pull.registry).await?;
    show(&image, output)
}

pub(crate) async fn import(
    client: &Client,
    file: &Path,
    name: Option<String>,
    output: Output,
) -> Result<(), CliError> {
    let source = fs_err::tokio::File::open(file).await?;
    let length = source.metadata().await?.len();
    let bar = bar("sending");
    bar.set_length(length);
    let sent = bar.clone();
    let stream = futures_util::StreamExt::inspect(ReaderStream::new(source), move |piece| {
        if let Ok(bytes) = piece {
            sent.inc(u64::try_from(bytes.len()).unwrap_or_default());
        }
    });
    let name = name.or_else(|| file.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    let query: Vec<_> = name.map(|name| ("name", name)).into_iter().collect();
    let body = reqwest::Body::wrap_stream(stream);
    let image: DiskImage = client.put_stream(&path::import(&client.group), &query, body).await?;
    bar.finish_and_clear();
    show(&follow(client, image).await?, output)
}

fn show(image: &DiskImage, output: Output) -> Result<(), CliError> {
    match output {
        Output::Json => output::json(image),
        Output::Table => output::line(&image.id),
    }
}

/// A row of `image list`.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    name: String,
    public: bool,
    state: ImageState,
    reference: String,
}

pub(crate) async fn list(client: &Client, output: Output) -> Result<(), CliError> {
    let public: Vec<PublicDiskImage> =
        client.get_all(&path::public_disk_images(&client.group)).await?;
    let ours: Vec<DiskImage> = client.get_all(&path::disk_images(&client.group)).await?;
    let public = public.into_iter().map(|image| Row {
        id: image.id,
        name: image.name,
        public: true,
        state: image.status.state,
        reference: String::new(),
    });
    let ours = ours.into_iter().map(|image| Row {
        id: image.id,
        name: image.name.unwrap_or_default(),
        public: false,
        state: image.status.state,
        reference: image.image.base,
    });
    let rows: Vec<_> = public.chain(ours).collect();
    output::list(output, &rows, &["ID", "NAME", "PUBLIC", "STATE", "REFERENCE"], |row| {
        let public = if row.public { "yes" } else { "no" };
        let state = format!("{:?}", row.state);
        vec![row.id.clone(), row.name.clone(), public.to_owned(), state, row.reference.clone()]
    })
}

pub(crate) async fn delete(client: &Client, ids: &[String]) -> Result<(), CliError> {
    for id in ids {
        let id: DiskImageId = id
            .parse()
            .map_err(|error| CliError::Wrong(format!("{error}; `image list` has them")))?;
        client.delete(&path::disk_image(&client.group, id.as_str())).await?;
        output::line(id.as_str())?;
    }
    Ok(())
}

pub(crate) async fn gc(client: &Client, output: Output) -> Result<(), CliError> {
    let result: GcResult = client.post(path::IMAGES_GC).await?;
    match output {
        Output::Json => output::json(&result),
        Output::Table => output::line(&format!(
            "removed {} images, {} layers, {} blobs: {} MiB freed",
            result.images_removed,
            result.layers_removed,
            result.blobs_removed,
            result.bytes_freed / (1024 * 1024)
        )),
    }
}
