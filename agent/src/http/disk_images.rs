//! `…/diskimages`, public ones, and what is ours beside them: progress, import, collection.

use std::{io::Seek, sync::Arc};

use axum::{body::Body, extract::State, response::Response};
use holdfast_api::{
    disk_image::{CreateDiskImage, DiskImage, ImageSpec, ImageState, ImageStatus, PublicDiskImage},
    error::Code,
    labels::Labels,
    model::{GroupKey, Mib},
    node::{GcResult, ImageProgress},
    sandbox::check_public_name,
};
use holdfast_store::{DiskImageRecord, DiskImageState};
use tokio::io::{AsyncWriteExt, copy};

use super::{
    App,
    answer::{empty, json, rfc3339},
    body,
    paging::page,
    problem::Problem,
    request::{Here, InGroup, Name, OfDiskImage, Query, RequestId, shortened},
};
use crate::{
    blocking::off_thread,
    images::{Credentials, NewImage, PublicImage},
};

type Answer = Result<Response, Problem>;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    RequestId(request_id): RequestId,
    body: Body,
) -> Answer {
    let request: CreateDiskImage = body::json(body).await?;
    request.check()?;
    let credentials = request.registry_credentials.map(|credentials| Credentials {
        username: credentials.username,
        secret: credentials.token,
    });
    let ImageSpec { base, entrypoint, cmd } = request.image;
    let labels = request.labels.unwrap_or_default();
    let new = NewImage { group, base, labels, entrypoint, cmd, request_id };
    let _making = app.making_in(&new.group).await?;
    let record = app.images.create(new, credentials).await?;
    Ok(json(201, &disk_image(record)))
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    query: Query,
    here: Here,
) -> Answer {
    let records = app.images.list(&group)?.into_iter();
    Ok(json(200, &page(records, &query, &here, |r| r.id.as_str(), disk_image)))
}

pub(super) async fn get(OfDiskImage(record): OfDiskImage) -> Answer {
    Ok(json(200, &disk_image(record)))
}

pub(super) async fn delete(
    State(app): State<Arc<App>>,
    OfDiskImage(record): OfDiskImage,
) -> Answer {
    app.images.delete(&record.id).await?;
    Ok(empty(204))
}

pub(super) async fn list_public(
    State(app): State<Arc<App>>,
    InGroup(_): InGroup,
    query: Query,
    here: Here,
) -> Answer {
    let images = app.images.list_public().iter();
    Ok(json(200, &page(images, &query, &here, |image| &image.name, public_image)))
}

pub(super) async fn get_public(
    State(app): State<Arc<App>>,
    InGroup(_): InGroup,
    Name(name): Name,
) -> Answer {
    check_public_name(&name).map_err(Problem::invalid)?;
    match app.images.get_public(&name) {
        Some(image) => Ok(json(200, &public_image(image))),
        None => {
            let message = format!("there is no public disk image {}", shortened(&name));
            let hint = "list them with GET …/diskimages/public";
            Err(Problem::new(Code::DiskImageNotFound, message, hint))
        }
    }
}

pub(super) async fn progress(
    State(app): State<Arc<App>>,
    OfDiskImage(record): OfDiskImage,
) -> Answer {
    let state = match record.state {
        DiskImageState::Creating => "Creating",
        DiskImageState::Ready => "Ready",
        DiskImageState::Failed => "Failed",
    };
    let progress = app.images.progress(&record.id).unwrap_or_default();
    let body = ImageProgress {
        state: state.to_owned(),
        layers: progress.layers,
        layers_done: progress.layers_done,
        bytes: progress.bytes,
        bytes_done: progress.bytes_done,
    };
    Ok(json(200, &body))
}

/// The archive goes to disk first: a conversion reads it from front and back.
pub(super) async fn import(
    State(app): State<Arc<App>>,
    InGroup(group): InGroup,
    RequestId(request_id): RequestId,
    query: Query,
    body: Body,
) -> Answer {
    let name = query.need("name")?.to_owned();
    let new = imported(group, &name, request_id)?;
    let file = spool(&app, body).await?;
    let choice = query.get("choose").map(str::to_owned);
    let _making = app.making_in(&new.group).await?;
    let record = app.images.import(new, file, choice).await?;
    Ok(json(201, &disk_image(record)))
}

/// The imported image is known by its name, and labelled with it.
fn imported(group: GroupKey, name: &str, request_id: Option<String>) -> Result<NewImage, Problem> {
    let labels: Labels = [("name".to_owned(), name.to_owned())].into();
    let request = CreateDiskImage {
        image: ImageSpec { base: name.to_owned(), ..ImageSpec::default() },
        labels: Some(labels.clone()),
        ..CreateDiskImage::default()
    };
    request.check()?;
    let base = name.to_owned();
    Ok(NewImage { group, base, labels, entrypoint: None, cmd: None, request_id })
}

/// Writes the body to a file without a name, which goes away with its last reader.
async fn spool(app: &App, body: Body) -> Result<fs_err::File, Problem> {
    const HINT: &str = "see that the data partition has space";
    let internal = |error: std::io::Error| Problem::internal(&error, HINT);
    let folder = app.config.paths.state.join("spool");
    let (made, shown) = (folder.clone(), folder.join("archive"));
    let file = off_thread(move || {
        fs_err::create_dir_all(&made)?;
        tempfile::tempfile_in(&made)
    });
    let mut file = tokio::fs::File::from_std(file.await.map_err(internal)?);
    let mut body = body::reader(body, Mib(app.config.limits.archive_mib_max).bytes());
    // A copy fails by the body or by the disk; the body's error says that it is one.
    copy(&mut body, &mut file).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::StorageFull => {
            Problem::new(Code::NoCapacity, "the node has no space for the archive", HINT)
        }
        _ => Problem::of_body(&error),
    })?;
    file.flush().await.map_err(internal)?;
    let mut file = fs_err::File::from_parts(file.into_std().await, shown);
    file.rewind().map_err(internal)?;
    Ok(file)
}

pub(super) async fn gc(State(app): State<Arc<App>>) -> Answer {
    let report = app.images.gc().await?;
    let body = GcResult {
        images_removed: report.images.into(),
        layers_removed: report.layers.into(),
        blobs_removed: report.blobs.into(),
        bytes_freed: report.bytes,
    };
    Ok(json(200, &body))
}

fn disk_image(record: DiskImageRecord) -> DiskImage {
    let state = match record.state {
        DiskImageState::Creating => ImageState::Creating,
        DiskImageState::Ready => ImageState::Ready,
        DiskImageState::Failed => ImageState::Failed,
    };
    // The contract has one text for both.
    let message = match (record.message, record.hint) {
        (Some(message), Some(hint)) => Some(format!("{message} (hint: {hint})")),
        (message, _) => message,
    };
    DiskImage {
        id: record.id.to_string(),
        name: record.labels.get("name").cloned(),
        labels: record.labels,
        image: ImageSpec { base: record.base, entrypoint: record.entrypoint, cmd: record.cmd },
        status: ImageStatus { state, message },
        digest: record.digest.map(|digest| digest.to_string()),
        created_at: Some(rfc3339(record.created_at_ms)),
    }
}

fn public_image(image: &PublicImage) -> PublicDiskImage {
    PublicDiskImage {
        id: image.name.clone(),
        name: image.name.clone(),
        status: ImageStatus { state: ImageState::Ready, message: None },
        description: Some(image.description.clone()).filter(|text| !text.is_empty()),
        tags: [("digest".to_owned(), image.digest.to_string())].into(),
    }
}
