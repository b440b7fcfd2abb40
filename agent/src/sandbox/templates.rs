//! Guests that were booted and given nothing yet, for later sandboxes of the same kind to begin from:
//! a create of a known image is then a clone, whose memory is shared until it is written.
//!
//! Made by demand: when a kind is asked for a second time, the guest that is booted for it is copied
//! before anything of its sandbox reaches it. There is no secret in a template, and nothing in it has
//! to last: they are made anew after every start of the agent.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_model::{Digest, Mib, SandboxSpec};
use log::warn;

use super::{
    disk::{self, DiskError, clone},
    memory::GuestMemory,
    report::{Fetched, Warmth},
    snapshots::{Memory, TakenUp},
    touched::Touched,
};

const MEMORY_FILE: &str = "memory";
const DISK_FILE: &str = "disk.ext4";

/// A kind that is asked for twice within this is worth a template.
const DEMAND: Duration = Duration::from_secs(60 * 60);

/// Kinds that are remembered as asked for once.
const ASKED_MAX: usize = 1024;

/// What two sandboxes must have alike to begin from one guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    image: Digest,
    memory: Mib,
    disk: Mib,
    vcpus: u8,
}

impl Kind {
    pub(super) fn of(image: Digest, spec: &SandboxSpec) -> Self {
        let size = spec.resources;
        Self { image, memory: size.memory, disk: size.disk, vcpus: size.vcpus() }
    }
}

/// How a sandbox of some kind is to begin.
pub(super) enum Plan {
    Boot,
    /// And its guest is to be kept.
    BootAndKeep(Making),
    FromTemplate(TakenUp),
}

#[derive(Debug)]
enum Stage {
    AskedFor(Instant),
    Making,
    Ready(Template),
}

#[derive(Debug)]
struct Template {
    folder: PathBuf,
    state: Vec<u8>,
    used: Instant,
}

type Table = HashMap<Kind, Stage>;

#[derive(Debug)]
pub(super) struct Templates {
    folder: PathBuf,
    /// 0: none are made.
    max: usize,
    table: Arc<Mutex<Table>>,
}

/// The right to make one kind's template; dropped unused, the kind counts as asked for.
#[derive(Debug)]
pub(super) struct Making {
    kind: Kind,
    table: Arc<Mutex<Table>>,
}

impl Drop for Making {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        if matches!(table.get(&self.kind), Some(Stage::Making)) {
            table.insert(self.kind.clone(), Stage::AskedFor(Instant::now()));
        }
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // Nothing that holds the lock can panic half way through a change.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Templates {
    /// An empty folder for `max` of them. Blocks.
    pub(super) fn open(state: &Path, max: u32) -> Result<Self, DiskError> {
        let folder = state.join("templates").join("guests");
        remove(&folder)?;
        fs::create_dir_all(&folder).map_err(disk::failed("make", &folder))?;
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        Ok(Self { folder, max, table: Arc::default() })
    }

    /// How a sandbox of this kind is to begin now. Blocks.
    pub(super) fn plan(&self, kind: &Kind) -> Plan {
        if self.max == 0 {
            return Plan::Boot;
        }
        let mut table = lock(&self.table);
        if let Some(Stage::Ready(template)) = table.get_mut(kind) {
            template.used = Instant::now();
            match template.take_up() {
                Ok(taken) => return Plan::FromTemplate(taken),
                Err(error) => {
                    warn!(error:%; "a template is gone");
                    table.remove(kind);
                }
            }
        }
        match table.get(kind) {
            Some(Stage::AskedFor(at)) if at.elapsed() < DEMAND => {
                table.insert(kind.clone(), Stage::Making);
                Plan::BootAndKeep(Making { kind: kind.clone(), table: Arc::clone(&self.table) })
            }
            Some(Stage::Making) => Plan::Boot,
            _ => {
                table.retain(
                    |_, stage| !matches!(stage, Stage::AskedFor(at) if at.elapsed() >= DEMAND),
                );
                if table.len() < ASKED_MAX {
                    table.insert(kind.clone(), Stage::AskedFor(Instant::now()));
                }
                Plan::Boot
            }
        }
    }

    /// Copies a guest that stands still. Blocks.
    pub(super) fn keep(
        &self,
        making: Making,
        memory: &GuestMemory,
        disk: &Path,
        state: Vec<u8>,
    ) -> Result<(), DiskError> {
        let folder = self.room()?;
        if let Err(error) = copy(&folder, memory, disk) {
            // The next start of the agent sweeps what stays.
            let _ = fs::remove_dir_all(&folder);
            return Err(error);
        }
        let template = Template { folder, state, used: Instant::now() };
        let gone = {
            let mut table = lock(&self.table);
            table.insert(making.kind.clone(), Stage::Ready(template));
            take_oldest(&mut table, self.max)
        };
        gone.iter().try_for_each(|template| remove(&template.folder))
    }

    /// Forgets a kind's template, from which a guest did not go on.
    pub(super) fn forget(&self, kind: &Kind) {
        let gone = lock(&self.table).remove(kind);
        if let Some(Stage::Ready(template)) = gone
            && let Err(error) = remove(&template.folder)
        {
            warn!(error:%; "a template's files stay behind");
        }
    }

    /// A folder of its own for the next.
    fn room(&self) -> Result<PathBuf, DiskError> {
        let mut number = 0;
        loop {
            let folder = self.folder.join(number.to_string());
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(folder),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(disk::failed("make", &folder)(error)),
            }
        }
    }
}

impl Template {
    fn take_up(&self) -> io::Result<TakenUp> {
        let memory = fs::File::open(self.folder.join(MEMORY_FILE))?;
        let fetched = Fetched { warmth: Warmth::Hot, ..Fetched::default() };
        let (state, disk) = (self.state.clone(), self.folder.join(DISK_FILE));
        let (memory, written) = (Memory::Image(memory), Vec::new());
        Ok(TakenUp { memory, written, state, disk, fetched })
    }
}

/// Those that are too many, the ones used longest ago.
fn take_oldest(table: &mut Table, max: usize) -> Vec<Template> {
    let mut gone = Vec::new();
    loop {
        let ready = table.iter().filter_map(|(kind, stage)| match stage {
            Stage::Ready(template) => Some((template.used, kind)),
            _ => None,
        });
        let ready: Vec<_> = ready.collect();
        if ready.len() <= max {
            return gone;
        }
        let oldest = ready.iter().min_by_key(|(used, _)| *used).map(|(_, kind)| (*kind).clone());
        let oldest = oldest.and_then(|kind| table.remove(&kind));
        if let Some(Stage::Ready(template)) = oldest {
            gone.push(template);
        }
    }
}

fn copy(folder: &Path, memory: &GuestMemory, from: &Path) -> Result<(), DiskError> {
    let path = folder.join(MEMORY_FILE);
    let file = disk::new(&path)?;
    memory
        .copy(&file, None, &Touched::default())
        .map_err(disk::failed("copy guest memory to", &path))?;
    let path = folder.join(DISK_FILE);
    let (source, target) =
        (fs::File::open(from).map_err(disk::failed("open", from))?, disk::new(&path)?);
    clone(&source, &target).map_err(disk::failed("copy the disk to", &path))
}

fn remove(folder: &Path) -> Result<(), DiskError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(disk::failed("remove", folder)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_model::{MilliCpu, Resources};

    use super::*;

    fn kind(byte: u8) -> Kind {
        let size = Resources { cpu: MilliCpu(1000), memory: Mib(128), disk: Mib(1024) };
        let Resources { memory, disk, .. } = size;
        Kind { image: Digest::from_sha256([byte; 32]), memory, disk, vcpus: size.vcpus() }
    }

    /// As [`Templates::keep`] leaves it.
    fn made(templates: &Templates, making: &Making) {
        let folder = templates.room().unwrap();
        fs::write(folder.join(MEMORY_FILE), "memory").unwrap();
        let template = Template { folder, state: vec![1], used: Instant::now() };
        lock(&templates.table).insert(making.kind.clone(), Stage::Ready(template));
    }

    #[test]
    fn a_kind_asked_for_twice_is_kept_once_and_then_used() {
        let state = tempfile::tempdir().unwrap();
        let templates = Templates::open(state.path(), 2).unwrap();
        assert!(matches!(templates.plan(&kind(1)), Plan::Boot));
        let Plan::BootAndKeep(making) = templates.plan(&kind(1)) else { panic!() };
        // One at a time, and other kinds are others.
        assert!(matches!(templates.plan(&kind(1)), Plan::Boot));
        assert!(matches!(templates.plan(&kind(2)), Plan::Boot));
        drop(making);
        let Plan::BootAndKeep(making) = templates.plan(&kind(1)) else { panic!() };
        made(&templates, &making);
        drop(making);
        let Plan::FromTemplate(taken) = templates.plan(&kind(1)) else { panic!() };
        assert_eq!(taken.state, [1]);
        // One whose files are gone is made again.
        fs::remove_file(templates.folder.join("0").join(MEMORY_FILE)).unwrap();
        assert!(matches!(templates.plan(&kind(1)), Plan::Boot));
        assert!(matches!(templates.plan(&kind(1)), Plan::BootAndKeep(_)));
    }

    #[test]
    fn the_ones_used_longest_ago_go_first_and_a_start_begins_with_none() {
        let state = tempfile::tempdir().unwrap();
        let templates = Templates::open(state.path(), 2).unwrap();
        for byte in 1..4 {
            let _ = templates.plan(&kind(byte));
            let Plan::BootAndKeep(making) = templates.plan(&kind(byte)) else { panic!() };
            made(&templates, &making);
        }
        assert!(matches!(templates.plan(&kind(1)), Plan::FromTemplate(_)));
        let gone = take_oldest(&mut lock(&templates.table), 2);
        assert_eq!(
            gone.iter().map(|it| it.folder.clone()).collect::<Vec<_>>(),
            [templates.folder.join("1")]
        );
        templates.forget(&kind(3));
        assert!(!templates.folder.join("2").exists());
        let again = Templates::open(state.path(), 0).unwrap();
        assert_eq!(fs::read_dir(&again.folder).unwrap().count(), 0);
        assert!(matches!(again.plan(&kind(1)), Plan::Boot));
        assert!(matches!(again.plan(&kind(1)), Plan::Boot));
    }
}
