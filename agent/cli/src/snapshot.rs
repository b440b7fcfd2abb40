//! `holdfast snapshot …`.

use holdfast_api::{
    model::SnapshotId,
    path,
    snapshot::{
        CreateSnapshot, RemoteSnapshots, Snapshot, SnapshotDetails, SnapshotVerified,
        SnapshotsCollected,
    },
};

use crate::{args::Output, client::Client, error::CliError, output, sandbox};

/// An id that is none is refused here: it could name another path.
pub(crate) fn parsed(id: &str) -> Result<SnapshotId, CliError> {
    id.parse().map_err(|error: holdfast_api::model::id::BadId| CliError::Wrong(error.to_string()))
}

pub(crate) async fn create(
    client: &Client,
    sandbox: &str,
    name: Option<&String>,
    label: &[String],
    output: Output,
) -> Result<(), CliError> {
    sandbox::one(client, sandbox)?;
    let request = CreateSnapshot { labels: sandbox::labels(label, name)? };
    let path = path::snapshot_of(&client.group, sandbox);
    let snapshot: Snapshot = client.post_body(&path, &request).await?;
    match output {
        Output::Json => output::json(&snapshot),
        Output::Table => output::line(&snapshot.id),
    }
}

pub(crate) async fn list(
    client: &Client,
    label: &[String],
    output: Output,
) -> Result<(), CliError> {
    let path = sandbox::filtered(path::snapshots(&client.group), label)?;
    let snapshots: Vec<Snapshot> = client.get_all(&path).await?;
    output::list(output, &snapshots, &["ID", "SANDBOX", "NAME", "MIB", "CREATED"], |it| {
        let name = it.labels.get("name").cloned().unwrap_or_default();
        let size = it.size_in_mb.map(|size| size.to_string()).unwrap_or_default();
        let sandbox = it.sandbox_id.clone().unwrap_or_default();
        vec![it.id.clone(), sandbox, name, size, it.created_at_utc.clone().unwrap_or_default()]
    })
}

pub(crate) async fn get(client: &Client, id: &str, output: Output) -> Result<(), CliError> {
    let path = path::snapshot(&client.group, parsed(id)?.as_str());
    let snapshot: Snapshot = client.get(&path).await?;
    if output == Output::Json {
        return output::json(&snapshot);
    }
    output::line(&format!("id       {}", snapshot.id))?;
    output::line(&format!("of       {}", snapshot.sandbox_id.as_deref().unwrap_or("-")))?;
    if let Some(size) = &snapshot.resources {
        let disk = size.disk.as_deref().unwrap_or("-");
        output::line(&format!("size     cpu {}, memory {}, disk {disk}", size.cpu, size.memory))?;
    }
    if let Some(mib) = snapshot.size_in_mb {
        output::line(&format!("on disk  {mib} MiB"))?;
    }
    for (name, value) in &snapshot.labels {
        output::line(&format!("label    {name}={value}"))?;
    }
    output::line(&format!("created  {}", snapshot.created_at_utc.as_deref().unwrap_or("-")))
}

pub(crate) async fn inspect(client: &Client, id: &str, output: Output) -> Result<(), CliError> {
    let path = path::snapshot_details(&client.group, parsed(id)?.as_str());
    let details: SnapshotDetails = client.get(&path).await?;
    if output == Output::Json {
        return output::json(&details);
    }
    let SnapshotDetails { pieces, piece_bytes, disk_bytes, .. } = &details;
    output::line(&format!("id       {}", details.id))?;
    output::line(&format!("format   {}", details.format))?;
    output::line(&format!("image    {}", details.image_digest))?;
    output::line(&format!("memory   {} layers", details.memory_layers))?;
    output::line(&format!("pieces   {pieces}, {piece_bytes} bytes"))?;
    output::line(&format!("disk     {disk_bytes} bytes"))?;
    output::line(&format!("hot      {}", if details.hot { "yes" } else { "no" }))?;
    output::line(&format!("upload   {}", details.upload))
}

pub(crate) async fn verify(
    client: &Client,
    ids: &[String],
    output: Output,
) -> Result<(), CliError> {
    for id in ids {
        let path = path::verify(&client.group, parsed(id)?.as_str());
        let verified: SnapshotVerified = client.post(&path).await?;
        match output {
            Output::Json => output::json(&verified)?,
            Output::Table => output::line(&format!(
                "{id} is sound: {} frames in {} layers",
                verified.frames, verified.layers
            ))?,
        }
    }
    Ok(())
}

pub(crate) async fn delete(client: &Client, ids: &[String]) -> Result<(), CliError> {
    for id in ids {
        client.delete(&path::snapshot(&client.group, parsed(id)?.as_str())).await?;
        output::line(id)?;
    }
    Ok(())
}

pub(crate) async fn list_remote(client: &Client, output: Output) -> Result<(), CliError> {
    let found: RemoteSnapshots = client.get(&path::remote_snapshots(&client.group)).await?;
    output::list(output, &found.value, &["ID", "SANDBOX", "CREATED"], |it| {
        let created = it.created_at_utc.clone().unwrap_or_default();
        vec![it.id.clone(), it.sandbox_id.clone(), created]
    })
}

pub(crate) async fn fetch(client: &Client, id: &str, output: Output) -> Result<(), CliError> {
    let path = path::fetch_snapshot(&client.group, parsed(id)?.as_str());
    let snapshot: Snapshot = client.post(&path).await?;
    match output {
        Output::Json => output::json(&snapshot),
        Output::Table => output::line(&snapshot.id),
    }
}

pub(crate) async fn gc(client: &Client, output: Output) -> Result<(), CliError> {
    let collected: SnapshotsCollected = client.post(path::SNAPSHOTS_GC).await?;
    if output == Output::Json {
        return output::json(&collected);
    }
    if collected.postponed {
        return output::line("a snapshot is being written: nothing was removed");
    }
    let SnapshotsCollected { pieces_removed, bytes_freed, .. } = collected;
    output::line(&format!("removed {pieces_removed} pieces, {bytes_freed} bytes"))
}
