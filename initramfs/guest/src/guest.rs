//! PID 1's state and what moves it: the start and the power-off, each once.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicUsize},
    thread,
    time::Duration,
};

use holdfast_wire::guest::{CA_BYTES_MAX, Exited, Failure, FailureKind, Network, Start};
use rustix::event::{EventfdFlags, eventfd};

use crate::{
    children::Children,
    entrypoint::Entrypoint,
    failure::{failure, from_io, invalid},
    kept::Keeper,
    limits, network, power,
    quiesce::Frost,
    resumed, root,
    rpc::THREAD_STACK_BYTES,
    trust,
    workload::{Site, Workload},
};

/// PID 1's state: what the machine offers, and what has become of the workload.
#[derive(Debug)]
pub struct Guest {
    pub(crate) site: Site,
    /// Why there is no root to start a workload in, if there is none.
    boot_trouble: Option<String>,
    pub(crate) ready_ns: u64,
    children: Arc<Children>,
    phase: Mutex<Phase>,
    network: Mutex<Option<Network>>,
    /// Connections being served.
    pub(crate) connections: AtomicUsize,
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) frost: Arc<Frost>,
    /// Readable once the power-off was asked for and the workload is stopped.
    pub(crate) off: OwnedFd,
}

#[derive(Debug, Clone)]
enum Phase {
    /// Nothing was started yet.
    Waiting,
    /// A Start is under way, or has failed half-way: there is no second try in one machine.
    Spent,
    Running(Arc<Workload>),
    Stopping,
}

impl Guest {
    pub fn new(site: Site, boot_trouble: Option<String>, ready_ns: u64) -> io::Result<Self> {
        Ok(Self {
            site,
            boot_trouble,
            ready_ns,
            children: Arc::default(),
            phase: Mutex::new(Phase::Waiting),
            network: Mutex::default(),
            connections: AtomicUsize::new(0),
            keeper: Arc::default(),
            frost: Arc::default(),
            off: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    pub fn children(&self) -> Arc<Children> {
        Arc::clone(&self.children)
    }

    fn phase(&self) -> Phase {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_phase(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// `None`: there is none, or it runs.
    pub(crate) fn entrypoint_exited(&self) -> Option<Exited> {
        match self.phase() {
            Phase::Running(workload) => workload.entrypoint()?.exited(),
            _ => None,
        }
    }

    pub(crate) fn workload(&self) -> Result<Arc<Workload>, Failure> {
        let refused = |message: &str| Err(failure(FailureKind::WrongState, message));
        match self.phase() {
            Phase::Running(workload) => Ok(workload),
            Phase::Waiting => refused("the sandbox was not started yet"),
            Phase::Spent => refused("the sandbox's start is under way or has failed"),
            Phase::Stopping => refused("the sandbox is being stopped"),
        }
    }

    pub(crate) fn start(&self, start: &Start) -> Result<(), Failure> {
        {
            let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
            if !matches!(*phase, Phase::Waiting) {
                let message = "the sandbox was started already";
                return Err(failure(FailureKind::WrongState, message));
            }
            *phase = Phase::Spent;
        }
        if let Some(trouble) = &self.boot_trouble {
            return Err(failure(FailureKind::Internal, trouble));
        }
        // Programs that look themselves up by it find it from their first instruction.
        if !start.host_name.is_empty() {
            rustix::system::sethostname(start.host_name.as_bytes())
                .map_err(|error| from_io("cannot set the host name", &error.into()))?;
        }
        let limits = limits::of_this_machine()?;
        let network = self.network.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let start_in = (start, network.as_ref());
        let workload = Workload::create(&self.site, start_in, limits, self.children())?;
        let workload = Arc::new(workload);
        self.set_phase(Phase::Running(Arc::clone(&workload)));
        self.reap_strays();
        if !start.argv.is_empty() {
            workload.set_entrypoint(Entrypoint::start(&workload, start.argv.clone())?);
        }
        Ok(())
    }

    /// From the moment there is a child, the sandbox's first process, until there is none.
    fn reap_strays(&self) {
        // Strays come to the machine's first process only.
        if std::process::id() != 1 {
            return;
        }
        let children = self.children();
        // Without the thread strays stay zombies, which the workload's process limit bounds.
        let _ = thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(THREAD_STACK_BYTES)
            .spawn(move || children.reap_strays());
    }

    /// Makes a clone a machine of its own: `seed` into the kernel's random numbers, then names.
    pub(crate) fn renew(&self, host_name: &str, seed: &[u8]) -> Result<(), Failure> {
        resumed::reseed(seed)?;
        let old = rustix::system::uname().nodename().to_string_lossy().into_owned();
        rustix::system::sethostname(host_name.as_bytes())
            .map_err(|error| from_io("cannot set the host name", &error.into()))?;
        if let Phase::Running(workload) = self.phase() {
            let inside = workload.enter()?;
            root::rename(&old, host_name, &inside);
        }
        Ok(())
    }

    /// Sets the link to the outside up. Of a sandbox that goes on, ends what was open over it, and
    /// has programs trust whoever is there now.
    pub(crate) fn connect(&self, network: Network) -> Result<(), Failure> {
        if network.ca_pem.len() > CA_BYTES_MAX {
            return Err(invalid(format!("a certificate of {} bytes", network.ca_pem.len())));
        }
        let phase = self.phase();
        if let Some(device) = self.site.device {
            network::set_up(device, &network)?;
        }
        let ca_pem = network.ca_pem.clone();
        let before = {
            let mut there = self.network.lock().unwrap_or_else(PoisonError::into_inner);
            there.replace(network)
        };
        if let Phase::Running(workload) = phase
            && before.is_none_or(|before| before.ca_pem != ca_pem)
        {
            let _inside = workload.enter()?;
            trust::install(&ca_pem);
        }
        Ok(())
    }

    pub(crate) fn power_off(&self, grace: Duration) -> Result<(), Failure> {
        let before = {
            let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *phase, Phase::Stopping)
        };
        match before {
            Phase::Running(workload) => power::stop(&workload, grace),
            Phase::Waiting | Phase::Spent => rustix::fs::sync(),
            Phase::Stopping => {
                let message = "the sandbox is being stopped already";
                return Err(failure(FailureKind::WrongState, message));
            }
        }
        Ok(())
    }
}
