//! `holdfast run`: create, wait, exec with streams, pass on the exit code, delete.

use std::process::ExitCode;

use holdfast_api::{
    path,
    sandbox::{CreateSandbox, Sandbox, SourcesRef},
    stream::Command,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{args::Run, client::Client, egress, error::CliError, exec, image, sandbox};

pub(crate) async fn run(client: &Client, run: Run) -> Result<ExitCode, CliError> {
    let command = Command::Entrypoint(run.command.clone());
    let start = exec::start(&run.process, command, run.interactive)?;
    let egress_policy = run.egress_policy.as_deref().map(egress::read).transpose()?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let image = tokio::select! {
        image = image::resolve(client, &run.image, &run.registry) => image?,
        _ = interrupt.recv() => return Ok(ExitCode::from(exec::INTERRUPTED)),
    };
    let request = CreateSandbox {
        sources_ref: Some(SourcesRef { disk_image: Some(image), snapshot: None }),
        resources: Some(sandbox::resources(&run.size)),
        labels: sandbox::labels(&[], run.name.as_ref())?,
        // The command is run by exec, with our streams; nothing else is started.
        entrypoint: Some(Vec::new()),
        cmd: Some(Vec::new()),
        egress_policy,
        ..CreateSandbox::default()
    };
    // Not cut short by an interrupt: until it is answered nobody knows what there is to delete.
    let created: Sandbox = client.put(&path::sandboxes(&client.group), &request).await?;
    let path = path::sandbox(&client.group, &created.id);
    let outcome = within(client, created, start, &mut interrupt).await;
    let deleted = client.delete(&path).await;
    let code = outcome?;
    deleted.map(|()| code)
}

/// What is done while the sandbox exists; whatever comes of it, the caller deletes the sandbox.
async fn within(
    client: &Client,
    created: Sandbox,
    start: holdfast_api::stream::Start,
    interrupt: &mut Signal,
) -> Result<ExitCode, CliError> {
    let running = tokio::select! {
        running = sandbox::wait(client, created) => running?,
        _ = interrupt.recv() => return Ok(ExitCode::from(exec::INTERRUPTED)),
    };
    exec::run(client, &running.id, start).await
}
