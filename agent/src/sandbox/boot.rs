//! From a VMM that was started to a guest that serves: by booting it, or by having it go on from
//! what was saved.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use holdfast_store::SandboxRecord;
use holdfast_wire::vmm::{Event, Exit, Reply, ToVmm};
use log::warn;
use tokio::{sync::mpsc, time::timeout};

use super::{
    ExecError, LaunchError, SuspendError, control,
    control::{Control, ControlError},
    guest::{GuestLink, digest_of, network_of},
    launch::{BootPhases, Booted, Machine, ms_since, us_since},
    memory::GuestMemory,
    node::Node,
    settings,
    templates::Making,
};
use crate::{
    blocking::off_thread,
    error_chain::error_chain,
    fault::{self, Point},
    images::Located,
};

/// From the first instruction until PID 1 serves. A boot takes a fraction of a second on hardware;
/// an emulated machine under load is a hundred times slower.
const READY_PATIENCE: Duration = Duration::from_secs(120);

/// What a new sandbox's guest begins with.
pub(super) enum Origin {
    /// The kernel. The guest is kept for others if that is wanted, before it is given anything.
    Kernel(Option<Making>),
    /// A guest that was booted for another and kept before it was given anything.
    Template,
    /// A sandbox that was saved.
    Saved,
}

/// Starts a new sandbox's guest and sets it up. May be cancelled: the machine is the caller's.
pub(super) async fn begin(
    machine: &Machine,
    (record, image): (&SandboxRecord, &Located),
    origin: Origin,
    node: &Arc<Node>,
    phases: &mut BootPhases,
) -> Result<Booted, BootError> {
    let set_up = matches!(origin, Origin::Saved);
    let mut booted = match origin {
        Origin::Kernel(making) => boot(machine, record, making, node, phases).await?,
        Origin::Template | Origin::Saved => restore(machine, record, node, phases).await?,
    };
    fault::at(Point::CreateBooted);
    let starting = Instant::now();
    booted.network = Some(tell_network(machine, &booted.guest, record, node, None).await?);
    if !set_up {
        let overrides = settings::disk_image_overrides(node, record).await;
        let start = settings::start(record, &image.record.settings, &overrides);
        until_end(machine, booted.guest.start(start)).await?.map_err(not_set_up)?;
    }
    machine.limit_cpu(record.spec.resources.cpu)?;
    phases.start_us += us_since(starting);
    fault::at(Point::CreateStarted);
    Ok(booted)
}

/// Boots the machine until its guest serves.
async fn boot(
    machine: &Machine,
    record: &SandboxRecord,
    making: Option<Making>,
    node: &Arc<Node>,
    phases: &mut BootPhases,
) -> Result<Booted, BootError> {
    let began = Instant::now();
    let (control, mut events, _) =
        until_end(machine, control::connect(&machine.control_path())).await??;
    phases.spawn_us = us_since(began);

    let booting = Instant::now();
    until_end(machine, control.demand(ToVmm::Boot))
        .await??
        .map_err(|reason| LaunchError::Refused { reason })?;
    let ready = timeout(READY_PATIENCE, guest_ready(&mut events));
    match until_end(machine, ready).await? {
        Ok(Ok(())) => {}
        Ok(Err(exit)) => return Err(BootError::Ended(exit)),
        Err(_) => return Err(LaunchError::NotReady { waited: READY_PATIENCE }.into()),
    }
    phases.boot_us = us_since(booting);
    if let Some(making) = making {
        until_end(machine, keep(machine, record, &control, node, making)).await?;
    }
    let guest = GuestLink::new(machine.vsock_path());
    Ok(Booted { control, events, guest, mended: None, network: None })
}

/// Keeps the guest as a template. It goes on, whatever comes of it.
async fn keep(
    machine: &Machine,
    record: &SandboxRecord,
    control: &Control,
    node: &Arc<Node>,
    making: Making,
) {
    let began = Instant::now();
    let kept = copy(machine, record, control, node, making).await;
    // A VMM that does not answer this is found out by whoever asks it next.
    let _ = control.demand(ToVmm::Resume).await;
    node.metrics.template_made(kept.is_ok());
    match kept {
        Ok(()) => log::info!(id:% = record.id, ms = ms_since(began); "guest kept as a template"),
        Err(error) => {
            warn!(id:% = record.id, error:% = error_chain(&error); "guest not kept as a template");
        }
    }
}

async fn copy(
    machine: &Machine,
    record: &SandboxRecord,
    control: &Control,
    node: &Arc<Node>,
    making: Making,
) -> Result<(), SuspendError> {
    let refused = |reason| SuspendError::Refused { reason };
    control.demand(ToVmm::Pause).await?.map_err(refused)?;
    let state = match control.ask(ToVmm::Save).await? {
        Reply::Saved { state } => state,
        Reply::Refused { reason } => return Err(refused(reason)),
        other => return Err(refused(format!("it answered {other:?} to Save"))),
    };
    let bytes = record.spec.resources.memory.bytes();
    let (pid, disk) = (machine.vmm_pid(), node.disks.path(&record.id));
    let node = Arc::clone(node);
    off_thread(move || {
        let memory = GuestMemory::of(pid, bytes).map_err(SuspendError::Memory)?;
        node.templates.keep(making, &memory, &disk, state).map_err(SuspendError::Template)
    })
    .await
}

/// What a call that sets the guest up came to.
fn not_set_up(error: ExecError) -> LaunchError {
    match error {
        ExecError::Refused(failure) => LaunchError::Start { message: failure.message },
        ExecError::Guest(error) => LaunchError::Guest(error),
        other => LaunchError::Start { message: other.to_string() },
    }
}

/// Has a suspended sandbox's machine go on. May be cancelled: the machine is the caller's.
pub(super) async fn go_on(
    machine: &Machine,
    record: &SandboxRecord,
    node: &Arc<Node>,
    phases: &mut BootPhases,
) -> Result<Booted, BootError> {
    let mut booted = restore(machine, record, node, phases).await?;
    // What the snapshot of another was told is as good as nothing: that one may be of another group.
    let told = record.saved.as_ref().filter(|saved| !saved.of_another);
    let told = told.and_then(|saved| saved.network.as_deref());
    booted.network = Some(tell_network(machine, &booted.guest, record, node, told).await?);
    machine.limit_cpu(record.spec.resources.cpu)?;
    Ok(booted)
}

/// Tells the guest of its link to the outside, unless that is what it was told when it was saved.
/// Gives what it knows now.
async fn tell_network(
    machine: &Machine,
    guest: &GuestLink,
    record: &SandboxRecord,
    node: &Node,
    told: Option<&str>,
) -> Result<String, BootError> {
    let ca_pem = node.egress.ca_pem(&record.group).await.map_err(LaunchError::Egress)?;
    let network = network_of(ca_pem);
    let digest = digest_of(&network);
    if told != Some(&digest)
        && !until_end(machine, guest.network(network)).await?.map_err(not_set_up)?
    {
        warn!(id:% = record.id; "a guest of an earlier release goes on without a network");
    }
    Ok(digest)
}

/// Has the machine go on from the state it was given.
async fn restore(
    machine: &Machine,
    record: &SandboxRecord,
    node: &Arc<Node>,
    phases: &mut BootPhases,
) -> Result<Booted, BootError> {
    let began = Instant::now();
    let (control, events, _) =
        until_end(machine, control::connect(&machine.control_path())).await??;
    machine.fill(node)?;
    phases.spawn_us = us_since(began);

    let restoring = Instant::now();
    for request in [ToVmm::Restore, ToVmm::RenewGeneration, ToVmm::Resume] {
        until_end(machine, control.demand(request))
            .await??
            .map_err(|reason| LaunchError::Refused { reason })?;
    }
    phases.boot_us = us_since(restoring);

    let telling = Instant::now();
    let guest = GuestLink::new(machine.vsock_path());
    let mended = until_end(machine, guest.resumed()).await?.map_err(not_set_up)?;
    // Only what was saved of it is itself.
    if record.saved.as_ref().is_none_or(|saved| saved.of_another) {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| LaunchError::Random(error.into()))?;
        let renewed = guest.renew(record.id.to_string(), seed);
        until_end(machine, renewed).await?.map_err(not_set_up)?;
    }
    phases.start_us = us_since(telling);
    Ok(Booted { control, events, guest, mended: Some(mended), network: None })
}

/// Why a boot did not come to its end.
pub(super) enum BootError {
    Failed(LaunchError),
    /// The machine ended under it. The last word, if one was heard.
    Ended(Option<Exit>),
}

impl<E: Into<LaunchError>> From<E> for BootError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl From<ControlError> for LaunchError {
    fn from(error: ControlError) -> Self {
        Self::Control(error)
    }
}

/// Does the work, unless the machine ends first. The work is given a moment more then: what it
/// waits for may have been sent before the end.
async fn until_end<T>(machine: &Machine, work: impl Future<Output = T>) -> Result<T, BootError> {
    const LAST_WORD_PATIENCE: Duration = Duration::from_millis(200);
    tokio::pin!(work);
    tokio::select! {
        outcome = &mut work => Ok(outcome),
        _ = machine.ended() => {
            timeout(LAST_WORD_PATIENCE, work).await.map_err(|_| BootError::Ended(None))
        }
    }
}

/// Waits for PID 1. The error: the machine ended first, with its last word if there was one.
async fn guest_ready(events: &mut mpsc::Receiver<Event>) -> Result<(), Option<Exit>> {
    loop {
        match events.recv().await {
            Some(Event::GuestReady) => return Ok(()),
            Some(Event::Exited(exit)) => return Err(Some(exit)),
            Some(Event::DeviceStopped { device, reason }) => {
                warn!(device:%, reason:%; "a device was stopped during boot");
            }
            None => return Err(None),
        }
    }
}
