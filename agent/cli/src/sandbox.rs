//! `holdfast sandbox …`.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use holdfast_api::{
    lifecycle::SuspendMode,
    node::{Phase, ResumeReport, SandboxDetails},
    path,
    sandbox::{
        CreateSandbox, PublicState, ResourcesBody, Sandbox, SnapshotRef, SourcesRef, Suspend,
    },
    snapshot::{Fork, Forked},
    stream::Command,
};

use crate::{
    args::{Create, Exec, Mode, Output, Size},
    client::Client,
    egress,
    error::CliError,
    exec, image, output, snapshot,
};

/// Between two looks at a sandbox that is being made.
const POLL: Duration = Duration::from_millis(250);

/// What a sandbox uses, as the wire has it.
pub(crate) fn resources(size: &Size) -> ResourcesBody {
    ResourcesBody { cpu: size.cpu.clone(), memory: size.memory.clone(), disk: size.disk.clone() }
}

/// `name=value` options as labels.
pub(crate) fn labels(
    pairs: &[String],
    name: Option<&String>,
) -> Result<Option<BTreeMap<String, String>>, CliError> {
    let mut labels = BTreeMap::new();
    for text in pairs {
        let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
        let (name, value) =
            pair.ok_or_else(|| CliError::Wrong(format!("{text:?} is not of the form name=value")))?;
        labels.insert(name.to_owned(), value.to_owned());
    }
    if let Some(name) = name {
        labels.insert("name".to_owned(), name.clone());
    }
    Ok((!labels.is_empty()).then_some(labels))
}

pub(crate) async fn create(
    client: &Client,
    create: Create,
    output: Output,
) -> Result<(), CliError> {
    let labels = labels(&create.label, create.name.as_ref())?;
    let egress_policy = create.egress_policy.as_deref().map(egress::read).transpose()?;
    if let Some(id) = &create.from_snapshot {
        let snapshot = Some(SnapshotRef { id: snapshot::parsed(id)?.to_string() });
        let sources_ref = Some(SourcesRef { disk_image: None, snapshot });
        let request =
            CreateSandbox { sources_ref, labels, egress_policy, ..CreateSandbox::default() };
        return made(client, &request, output).await;
    }
    let image = create.image.as_deref().unwrap_or_default();
    let image = image::resolve(client, image, &create.registry).await?;
    let environment: BTreeMap<_, _> = create
        .env
        .iter()
        .map(|text| {
            text.split_once('=')
                .ok_or_else(|| CliError::Wrong(format!("{text:?} is not of the form NAME=value")))
        })
        .map(|pair| pair.map(|(name, value)| (name.to_owned(), value.to_owned())))
        .collect::<Result<_, _>>()?;
    let request = CreateSandbox {
        sources_ref: Some(SourcesRef { disk_image: Some(image), snapshot: None }),
        resources: Some(resources(&create.size)),
        labels,
        environment: (!environment.is_empty()).then_some(environment),
        cmd: (!create.command.is_empty()).then_some(create.command),
        egress_policy,
        ..CreateSandbox::default()
    };
    made(client, &request, output).await
}

async fn made(client: &Client, request: &CreateSandbox, output: Output) -> Result<(), CliError> {
    let sandbox: Sandbox = client.put(&path::sandboxes(&client.group), request).await?;
    let sandbox = wait(client, sandbox).await?;
    match output {
        Output::Json => output::json(&sandbox),
        Output::Table => output::line(&sandbox.id),
    }
}

pub(crate) async fn fork(
    client: &Client,
    id: &str,
    count: u32,
    label: &[String],
    output: Output,
) -> Result<(), CliError> {
    // An id that is none is refused here: it could name another path.
    one(client, id)?;
    let request = Fork { count, labels: labels(label, None)? };
    let forked: Forked = client.post_body(&path::fork(&client.group, id), &request).await?;
    let mut sandboxes = Vec::with_capacity(forked.value.len());
    for sandbox in forked.value {
        sandboxes.push(wait(client, sandbox).await?);
    }
    match output {
        Output::Json => output::json(&sandboxes),
        Output::Table => sandboxes.iter().try_for_each(|sandbox| output::line(&sandbox.id)),
    }
}

/// Waits until a sandbox is no longer being made. One that failed is an error that says why.
pub(crate) async fn wait(client: &Client, mut sandbox: Sandbox) -> Result<Sandbox, CliError> {
    while sandbox.state == PublicState::Creating {
        tokio::time::sleep(POLL).await;
        sandbox = client.get(&path::sandbox(&client.group, &sandbox.id)).await?;
    }
    if sandbox.state == PublicState::Running {
        return Ok(sandbox);
    }
    Err(failed(&sandbox, "does not run"))
}

pub(crate) async fn list(
    client: &Client,
    label: &[String],
    output: Output,
) -> Result<(), CliError> {
    let path = filtered(path::sandboxes(&client.group), label)?;
    let sandboxes: Vec<Sandbox> = client.get_all(&path).await?;
    output::list(output, &sandboxes, &["ID", "STATE", "NAME", "CPU", "MEMORY", "CREATED"], |s| {
        let (cpu, memory) = s
            .resources
            .as_ref()
            .map_or_else(Default::default, |r| (r.cpu.clone(), r.memory.clone()));
        let name = s.labels.get("name").cloned().unwrap_or_default();
        let created = s.created_at.clone().unwrap_or_default();
        vec![s.id.clone(), s.state.as_str().to_owned(), name, cpu, memory, created]
    })
}

/// The path of a list of what has all these labels.
pub(crate) fn filtered(path: String, label: &[String]) -> Result<String, CliError> {
    // Checked here, since a filter with a typing error would list everything.
    labels(label, None)?;
    if label.is_empty() {
        return Ok(path);
    }
    let pairs: Vec<_> = label.iter().map(|pair| percent(pair)).collect();
    Ok(format!("{path}?labels={}", pairs.join(",")))
}

/// Escapes what would end a query parameter or be read as another character.
fn percent(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'=' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

pub(crate) async fn get(
    client: &Client,
    id: &str,
    verbose: bool,
    output: Output,
) -> Result<(), CliError> {
    let sandbox: Sandbox = client.get(&one(client, id)?).await?;
    let report = if verbose { report(client, id).await? } else { None };
    if output == Output::Json {
        return match report {
            Some(report) => output::json(&Reported { sandbox, resume_report: report }),
            None => output::json(&sandbox),
        };
    }
    output::line(&format!("id       {}", sandbox.id))?;
    output::line(&format!("state    {}", sandbox.state.as_str()))?;
    let details = sandbox.state_details.unwrap_or_default();
    if let Some(why) = details.failure {
        output::line(&format!("reason   {why}"))?;
    }
    if let (Some(why), Some(at)) = (details.stopped_reason, details.stopped_at) {
        let mode = details.suspend_mode.unwrap_or_default();
        output::line(&format!("stopped  {why} at {at}, kept {mode:?}"))?;
    }
    if let Some(size) = &sandbox.resources {
        let disk = size.disk.as_deref().unwrap_or("-");
        output::line(&format!("size     cpu {}, memory {}, disk {disk}", size.cpu, size.memory))?;
    }
    for (name, value) in &sandbox.labels {
        output::line(&format!("label    {name}={value}"))?;
    }
    output::line(&format!("created  {}", sandbox.created_at.as_deref().unwrap_or("-")))?;
    report.iter().flat_map(told).try_for_each(|line| output::line(&line))
}

/// A sandbox, and what its last resume took.
#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Reported {
    #[serde(flatten)]
    sandbox: Sandbox,
    resume_report: ResumeReport,
}

/// What the sandbox's last resume took, if it runs and has had one.
async fn report(client: &Client, id: &str) -> Result<Option<ResumeReport>, CliError> {
    let details: SandboxDetails = client.get(&path::details(&client.group, id)).await?;
    Ok(details.resume_report)
}

/// A report in lines for people.
fn told(report: &ResumeReport) -> Vec<String> {
    let ms = |us: u64| format!("{}.{:03} ms", us / 1000, us % 1000);
    let mut lines = vec![format!("resumed  {}", report.from)];
    lines
        .extend(report.phases.iter().map(|Phase { name, us }| format!("  {name:<10} {}", ms(*us))));
    if report.bytes_read > 0 {
        let (bytes, frames, pages) = (report.bytes_read, report.frames_read, report.pages_read);
        lines.push(format!("  read       {bytes} bytes, {frames} frames, {pages} pages"));
    }
    if let Some(faults) = report.faults {
        lines.push(format!("  faults     {faults}"));
    }
    if let Some(us) = report.clock_skew_us {
        let sign = if us < 0 { "-" } else { "" };
        lines.push(format!("  clock      set forward by {sign}{}", ms(us.unsigned_abs())));
    }
    if let Some(count) = report.connections_reset {
        lines.push(format!("  reset      {count} TCP connections"));
    }
    lines
}

pub(crate) async fn exec(client: &Client, arguments: Exec) -> Result<ExitCode, CliError> {
    one(client, &arguments.id)?;
    let command = Command::Argv(arguments.command);
    let start = exec::start(&arguments.process, command, arguments.interactive)?;
    exec::run(client, &arguments.id, start).await
}

pub(crate) async fn suspend(
    client: &Client,
    mode: Option<Mode>,
    ids: &[String],
) -> Result<(), CliError> {
    let mode = mode.map(|mode| match mode {
        Mode::Memory => SuspendMode::Memory,
        Mode::Disk => SuspendMode::Disk,
    });
    for id in ids {
        // An id that is none is refused here: it could name another path.
        one(client, id)?;
        client.order_body(&path::suspend(&client.group, id), &Suspend { mode }).await?;
        let stopped = [PublicState::Suspended, PublicState::Idle];
        wait_for(client, id, PublicState::Stopping, &stopped).await?;
        output::line(id)?;
    }
    Ok(())
}

pub(crate) async fn resume(client: &Client, verbose: bool, ids: &[String]) -> Result<(), CliError> {
    for id in ids {
        match client.order(&format!("{}/resume", one(client, id)?)).await {
            // It runs, if nothing else is wrong with it: what was asked for.
            Err(CliError::Api { status: 409, .. }) => {
                let sandbox: Sandbox = client.get(&one(client, id)?).await?;
                if sandbox.state != PublicState::Running {
                    return Err(failed(&sandbox, "is not suspended"));
                }
            }
            asked => asked?,
        }
        wait_for(client, id, PublicState::Resuming, &[PublicState::Running]).await?;
        output::line(id)?;
        if verbose {
            let report = report(client, id).await?;
            report.iter().flat_map(told).try_for_each(|line| output::line(&line))?;
        }
    }
    Ok(())
}

/// Waits while the sandbox is in the one state, until it is in one of the others.
async fn wait_for(
    client: &Client,
    id: &str,
    passing: PublicState,
    wanted: &[PublicState],
) -> Result<(), CliError> {
    loop {
        let sandbox: Sandbox = client.get(&one(client, id)?).await?;
        if wanted.contains(&sandbox.state) {
            return Ok(());
        }
        if sandbox.state != passing {
            return Err(failed(&sandbox, "did not get there"));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn failed(sandbox: &Sandbox, how: &str) -> CliError {
    let why = sandbox.state_details.as_ref().and_then(|details| details.failure.clone());
    let why = why.unwrap_or_else(|| sandbox.state.as_str().to_owned());
    CliError::Host(format!("sandbox {} {how}: {why}", sandbox.id))
}

pub(crate) async fn delete(client: &Client, ids: &[String]) -> Result<(), CliError> {
    for id in ids {
        client.delete(&one(client, id)?).await?;
        output::line(id)?;
    }
    Ok(())
}

/// The path of one sandbox. An id that is none is refused here: it could name another path.
pub(crate) fn one(client: &Client, id: &str) -> Result<String, CliError> {
    let parsed = id.parse::<holdfast_api::model::SandboxId>();
    parsed
        .map(|id| path::sandbox(&client.group, id.as_str()))
        .map_err(|error| CliError::Wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairs_and_a_name_is_one_of_them() {
        let labels = labels(&["a=b=c".to_owned()], Some(&"n".to_owned())).unwrap().unwrap();
        assert_eq!(labels["a"], "b=c");
        assert_eq!(labels["name"], "n");
        assert!(super::labels(&["a".to_owned()], None).is_err());
    }

    #[test]
    fn a_report_is_told_in_milliseconds_and_only_what_is_known_of_it() {
        let phase = |name: &str, us| Phase { name: name.to_owned(), us };
        let mut report = ResumeReport {
            from: "cold".to_owned(),
            phases: vec![phase("memory", 12_345), phase("total", 20_001)],
            bytes_read: 4096,
            frames_read: 2,
            pages_read: 30,
            faults: Some(7),
            clock_skew_us: Some(-1_500),
            connections_reset: Some(3),
        };
        let expected = [
            "resumed  cold",
            "  memory     12.345 ms",
            "  total      20.001 ms",
            "  read       4096 bytes, 2 frames, 30 pages",
            "  faults     7",
            "  clock      set forward by -1.500 ms",
            "  reset      3 TCP connections",
        ];
        assert_eq!(told(&report), expected);
        (report.bytes_read, report.faults) = (0, None);
        (report.clock_skew_us, report.connections_reset) = (None, None);
        assert_eq!(told(&report), expected[..3]);
    }

    #[test]
    fn a_filter_cannot_break_out_of_its_parameter() {
        assert_eq!(percent("a=b&c"), "a=b%26c");
        assert_eq!(percent("ä"), "%C3%A4");
    }
}
