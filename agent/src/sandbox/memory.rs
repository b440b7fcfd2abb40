//! Guest memory of a microVM that stands still, copied out through its VMM's own mappings of it.
//!
//! A guest that was booted has a memory file of its own. One that was resumed has private copies of
//! the pages it changed, over the memory image of its snapshot, which it shares with others.

use std::{
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
};

use fs_err as fs;
use holdfast_snapshot::{FileSource, PAGE_BYTES, Pages, Source};

use super::{disk::clone, touched::Touched};

/// Read and written at once.
const CHUNK_BYTES: usize = 1 << 20;
const PAGE: u64 = PAGE_BYTES as u64;

/// Of an entry of a process's page map (the kernel's admin-guide/mm/pagemap): the page is there, is
/// on swap, is of a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// It was written since the marks of the process were wiped (admin-guide/mm/soft-dirty).
const WRITTEN: u64 = 1 << 55;

/// One mapping of guest memory: addresses in the VMM, and where in the memory they are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    addresses: Range<u64>,
    offset: u64,
    private: bool,
    /// Device and inode of what is mapped.
    file: (String, u64),
}

/// Guest memory as its VMM sees it.
pub(super) struct GuestMemory {
    bytes: u64,
    memory: Backing,
}

enum Backing {
    /// The guest's own memory file.
    Own(Box<dyn Source + Send>),
    /// Private copies over an image.
    Private { mappings: Vec<Mapping>, memory: fs::File, inode: u64, changed: Pages },
}

/// Wipes the marks that say which pages the process with this id has written: what it writes from
/// now on is marked. False: this kernel does not keep them.
pub(super) fn mark_writes(pid: u32) -> io::Result<bool> {
    if !writes_are_marked()? {
        return Ok(false);
    }
    // The kernel takes the marks alone; memory stays as it is.
    fs::write(format!("/proc/{pid}/clear_refs"), "4")?;
    Ok(true)
}

/// Whether this kernel marks what is written. Tried on a page of this process, which has just been.
fn writes_are_marked() -> io::Result<bool> {
    let page = vec![1_u8; 2 * PAGE_BYTES];
    let address = page.as_ptr().expose_provenance() as u64 + PAGE;
    let mut entry = [0; 8];
    let map = fs::File::open("/proc/self/pagemap")?;
    map.file().read_exact_at(&mut entry, address / PAGE * 8)?;
    Ok(u64::from_ne_bytes(entry) & WRITTEN != 0)
}

/// Where guest memory of so many bytes is in the VMM with this process id: addresses, and where in
/// the memory they begin.
pub(super) fn regions(pid: u32, bytes: u64) -> io::Result<Vec<(Range<u64>, u64)>> {
    let mappings = mappings_of(pid, bytes)?;
    Ok(mappings.into_iter().map(|mapping| (mapping.addresses, mapping.offset)).collect())
}

fn mappings_of(pid: u32, bytes: u64) -> io::Result<Vec<Mapping>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    guest_mappings(&maps, bytes).ok_or_else(|| {
        io::Error::other(format!("process {pid} maps no file as {bytes} bytes of memory"))
    })
}

/// What the guest of the VMM with this process id, of so many bytes, has touched since it went on
/// from `image`, of which pages were copied `ahead`. `None`: it has a memory file of its own, or
/// has touched more than a guest does that has just gone on.
pub(super) fn touched(
    pid: u32,
    bytes: u64,
    image: &fs::File,
    ahead: &Touched,
) -> io::Result<Option<Touched>> {
    let memory = GuestMemory::of(pid, bytes)?;
    let Backing::Private { mappings, changed, .. } = &memory.memory else { return Ok(None) };
    let there = pages_that(pid, mappings, |entry| entry & PRESENT != 0)?;
    let own = memory.differing_from(image, changed, ahead)?;
    // Whoever only reads what was copied for it in vain is seen the next time.
    let in_vain = |page| changed.holds(page) && !own.holds(page);
    let there = there.pages().filter(|&page| !in_vain(page)).map(|page| page..page + 1);
    Ok(Touched::seen(&there.collect(), &own))
}

impl GuestMemory {
    /// Of the VMM with this process id, whose guest has so many bytes. It must not run meanwhile.
    pub(super) fn of(pid: u32, bytes: u64) -> io::Result<Self> {
        let mappings = mappings_of(pid, bytes)?;
        let Some(first) = mappings.first() else { return Err(io::ErrorKind::NotFound.into()) };
        let memory = if first.private {
            Backing::Private {
                inode: first.file.1,
                changed: pages_that(pid, &mappings, is_own_copy)?,
                memory: fs::File::open(format!("/proc/{pid}/mem"))?,
                mappings,
            }
        } else {
            // Whichever of the mappings: they are of one file.
            let Range { start, end } = first.addresses;
            let file = fs::File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))?;
            Backing::Own(Box::new(FileSource::new(file.into_parts().0)?))
        };
        Ok(Self { bytes, memory })
    }

    /// Writes all of it to the empty file `to`, with holes where it is zero. `image`: what the guest
    /// was resumed from, of which pages were copied `ahead`; then `to` begins as a copy of that, only
    /// what changed is written, and the pages that did are given.
    pub(super) fn copy(
        &self,
        to: &fs::File,
        image: Option<&fs::File>,
        ahead: &Touched,
    ) -> io::Result<Option<Pages>> {
        match (&self.memory, image) {
            (Backing::Private { inode, changed, .. }, Some(image))
                if image.metadata()?.ino() == *inode =>
            {
                let changed = self.differing_from(image, changed, ahead)?;
                clone(image, to)?;
                self.write(&changed, to, Zeros::Written)?;
                Ok(Some(changed))
            }
            (Backing::Private { .. }, _) => {
                to.set_len(self.bytes)?;
                self.write(&std::iter::once(0..self.bytes / PAGE).collect(), to, Zeros::Left)?;
                Ok(None)
            }
            // It was filled from the image, or from what that was made of.
            (Backing::Own(file), Some(image)) if image.metadata()?.len() == self.bytes => {
                let changed =
                    differing(file.as_ref(), &FileSource::new(image.file().try_clone()?)?)?;
                clone(image, to)?;
                self.write(&changed, to, Zeros::Written)?;
                Ok(Some(changed))
            }
            (Backing::Own(file), _) => {
                to.set_len(self.bytes)?;
                self.write(&file.used()?, to, Zeros::Left)?;
                Ok(None)
            }
        }
    }

    /// Brings `to` up to date, which [`Self::copy`] made while the guest ran, with `before` as its
    /// result, after its writes had begun to be marked. The guest stands still now.
    pub(super) fn copy_again(
        pid: u32,
        bytes: u64,
        to: &fs::File,
        before: Option<Pages>,
    ) -> io::Result<Option<Pages>> {
        let now = Self::of(pid, bytes)?;
        let written = pages_that(pid, &mappings_of(pid, bytes)?, |entry| entry & WRITTEN != 0)?;
        now.write(&written, to, Zeros::Written)?;
        // What is no copy any more was given back: what it holds is of no use to the guest.
        Ok(before.map(|before| {
            [before, written].iter().flat_map(|pages| pages.runs().iter().cloned()).collect()
        }))
    }

    /// Those of its own copies that are not as in the image. Only of those that were made `ahead` it
    /// has to be looked at: the others came of a write.
    fn differing_from(
        &self,
        image: &fs::File,
        copies: &Pages,
        ahead: &Touched,
    ) -> io::Result<Pages> {
        let (mut mine, mut theirs) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let mut differing = Vec::new();
        for page in copies.pages() {
            let differs = !ahead.is_written(page) || {
                self.read(page * PAGE, &mut mine)?;
                image.file().read_exact_at(&mut theirs, page * PAGE)?;
                mine != theirs
            };
            differing.extend(differs.then_some(page..page + 1));
        }
        Ok(differing.into_iter().collect())
    }

    fn write(&self, pages: &Pages, to: &fs::File, zeros: Zeros) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        for run in pages.runs() {
            let (mut at, end) = (run.start * PAGE, run.end * PAGE);
            while at < end {
                let rest = usize::try_from(end - at).unwrap_or(usize::MAX);
                let piece = &mut chunk[..rest.min(CHUNK_BYTES)];
                self.read(at, piece)?;
                match zeros {
                    Zeros::Written => to.file().write_all_at(piece, at)?,
                    Zeros::Left => write_used(to, at, piece)?,
                }
                at += piece.len() as u64;
            }
        }
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.memory {
            Backing::Own(file) => file.read_at(at, into),
            Backing::Private { mappings, memory, .. } => {
                let (mut at, mut into) = (at, into);
                while !into.is_empty() {
                    let (address, room) = place(mappings, at).ok_or(io::ErrorKind::NotFound)?;
                    let rest = usize::try_from(room).unwrap_or(usize::MAX).min(into.len());
                    let (here, beyond) = into.split_at_mut(rest);
                    memory.file().read_exact_at(here, address)?;
                    at += here.len() as u64;
                    into = beyond;
                }
                Ok(())
            }
        }
    }
}

/// The pages in which the two differ.
fn differing(one: &dyn Source, other: &dyn Source) -> io::Result<Pages> {
    let used: Pages =
        [one.used()?, other.used()?].iter().flat_map(|used| used.runs().iter().cloned()).collect();
    let (mut mine, mut theirs) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut runs = Vec::new();
    for run in used.runs() {
        let mut page = run.start;
        while page < run.end {
            let count = (run.end - page).min((CHUNK_BYTES / PAGE_BYTES) as u64);
            let bytes = usize::try_from(count * PAGE).unwrap_or(CHUNK_BYTES);
            one.read_at(page * PAGE, &mut mine[..bytes])?;
            other.read_at(page * PAGE, &mut theirs[..bytes])?;
            let pages = mine[..bytes].chunks(PAGE_BYTES).zip(theirs[..bytes].chunks(PAGE_BYTES));
            let differ = (page..).zip(pages).filter(|(_, (mine, theirs))| mine != theirs);
            runs.extend(differ.map(|(page, _)| page..page + 1));
            page += count;
        }
    }
    Ok(runs.into_iter().collect())
}

/// What is done with pages of zeros.
#[derive(Clone, Copy)]
enum Zeros {
    /// There may be something else in their place.
    Written,
    /// There is a hole in their place.
    Left,
}

/// Writes runs of pages that are not zero.
fn write_used(to: &fs::File, at: u64, piece: &[u8]) -> io::Result<()> {
    let used = |page: &[u8]| page != &[0; PAGE_BYTES][..page.len()];
    let mut start = 0;
    while start < piece.len() {
        let run = piece[start..].chunks(PAGE_BYTES).take_while(|page| used(page));
        let length: usize = run.map(<[u8]>::len).sum();
        to.file().write_all_at(&piece[start..start + length], at + start as u64)?;
        start += length + PAGE_BYTES;
    }
    Ok(())
}

/// The address of byte `at` of the memory, and how many bytes follow it in its mapping.
fn place(mappings: &[Mapping], at: u64) -> Option<(u64, u64)> {
    mappings.iter().find_map(|mapping| {
        let inside = at.checked_sub(mapping.offset)?;
        let address = mapping.addresses.start.checked_add(inside)?;
        mapping.addresses.contains(&address).then(|| (address, mapping.addresses.end - address))
    })
}

/// The mappings that together are all of one file of so many bytes: nothing else of a VMM is as
/// large. In ascending order of their offsets.
fn guest_mappings(maps: &str, bytes: u64) -> Option<Vec<Mapping>> {
    let mut by_file = std::collections::BTreeMap::<_, Vec<Mapping>>::new();
    for mapping in maps.lines().filter_map(mapping) {
        by_file.entry(mapping.file.clone()).or_default().push(mapping);
    }
    by_file.into_values().find_map(|mut mappings| {
        mappings.sort_by_key(|mapping| mapping.offset);
        let mut end = 0;
        for mapping in &mappings {
            if mapping.offset != end || mapping.private != mappings[0].private {
                return None;
            }
            end += mapping.addresses.end - mapping.addresses.start;
        }
        (end == bytes).then_some(mappings)
    })
}

/// A line of `/proc/PID/maps`, if it is of a file: addresses, rights, offset, device, inode.
fn mapping(line: &str) -> Option<Mapping> {
    let fields: Vec<_> = line.split_whitespace().take(5).collect();
    let [addresses, rights, offset, device, inode] = fields[..] else { return None };
    let number = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = addresses.split_once('-')?;
    let inode = inode.parse().ok().filter(|inode| *inode != 0)?;
    Some(Mapping {
        addresses: number(start)?..number(end)?,
        offset: number(offset)?,
        private: rights.ends_with('p'),
        file: (device.to_owned(), inode),
    })
}

/// Of the entry of a page in a private mapping of a file: the process has its own copy.
fn is_own_copy(entry: u64) -> bool {
    entry & SWAPPED != 0 || entry & PRESENT != 0 && entry & OF_FILE == 0
}

/// The pages of the memory whose entry in the process's page map is such.
fn pages_that(
    pid: u32,
    mappings: &[Mapping],
    is_wanted: impl Fn(u64) -> bool,
) -> io::Result<Pages> {
    let map = fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut entries = vec![0; CHUNK_BYTES];
    for Mapping { addresses, offset, .. } in mappings {
        let (mut page, last) = (addresses.start / PAGE, addresses.end / PAGE);
        // From the page of the address space to that of the memory.
        let number = |page: u64| page - addresses.start / PAGE + offset / PAGE;
        while page < last {
            let count = (last - page).min(CHUNK_BYTES as u64 / 8);
            let bytes = usize::try_from(count * 8).unwrap_or(CHUNK_BYTES);
            map.file().read_exact_at(&mut entries[..bytes], page * 8)?;
            let (entries, _) = entries[..bytes].as_chunks::<8>();
            for (index, entry) in (0..).zip(entries) {
                let here = is_wanted(u64::from_ne_bytes(*entry));
                let number = number(page + index);
                match runs.last_mut() {
                    Some(run) if here && run.end == number => run.end += 1,
                    _ if here => runs.push(number..number + 1),
                    _ => {}
                }
            }
            page += count;
        }
    }
    Ok(runs.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const MAPS: &str = "\
555500000000-555500002000 r--p 00000000 08:01 7 /usr/bin/vmm
7f0000000000-7f0000004000 rw-s 00000000 00:05 42 /memfd:guest (deleted)
7f1000000000-7f1000002000 rw-s 00004000 00:05 42 /memfd:guest (deleted)
7f2000000000-7f2000006000 rw-p 00000000 00:00 0
7f3000000000-7f3000001000 rw-p 00001000 08:01 9 /data/other
";

    #[test]
    fn guest_memory_is_the_file_that_is_mapped_whole_in_its_size() {
        let found = guest_mappings(MAPS, 0x6000).unwrap();
        assert_eq!(found.iter().map(|it| it.offset).collect::<Vec<_>>(), [0, 0x4000]);
        assert!(!found[0].private);
        assert_eq!(place(&found, 0x4001), Some((0x7f10_0000_0001, 0x1fff)));
        assert_eq!(place(&found, 0x6000), None);
        assert_eq!(guest_mappings(MAPS, 0x2000).unwrap()[0].file.1, 7);
        // A part of a file, and nothing of a file.
        assert_eq!(guest_mappings(MAPS, 0x1000), None);
    }

    /// A process that maps `path` in the given way, changes page 1 and waits.
    fn mapper(path: &std::path::Path, how: &str) -> std::process::Child {
        let script = "import mmap, os, sys\n\
             fd = os.open(sys.argv[1], os.O_RDWR)\n\
             flags = mmap.MAP_SHARED if sys.argv[2] == 'shared' else mmap.MAP_PRIVATE\n\
             memory = mmap.mmap(fd, 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)\n\
             memory[4096:4104] = b'changed!'\n\
             memory[8192:8193] = b'\\0'\n\
             memory[0:1]\n\
             print('ready', flush=True)\n\
             sys.stdin.read()\n";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(path)
            .arg(how)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        assert_eq!(line, "ready\n");
        child
    }

    #[test]
    fn a_copy_is_what_the_process_sees_and_names_the_pages_it_has_of_its_own() {
        // A size that no other file has which such a process maps.
        let bytes = 5 * (1 << 20) + 3 * PAGE;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let image = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let image = image.unwrap();
        image.set_len(bytes).unwrap();
        image.file().write_all_at(b"first", 0).unwrap();
        image.file().write_all_at(b"far", 4 << 20).unwrap();
        let expected = |start: &[u8]| {
            let mut whole = vec![0; usize::try_from(bytes).unwrap()];
            whole[..start.len()].copy_from_slice(start);
            whole[4096..4104].copy_from_slice(b"changed!");
            whole[4 << 20..][..3].copy_from_slice(b"far");
            whole
        };
        let other = folder.path().join("other");
        // Both were copied ahead, and one is still as it was.
        let seen: Pages = std::iter::once(1..3).collect();
        let ahead = Touched::seen(&seen, &seen).unwrap();
        for (how, with_image) in
            [("private", true), ("private", false), ("shared", false), ("shared", true)]
        {
            // What is mapped shared is written to: then it is compared with what it was.
            let shared = how == "shared";
            if shared && !other.exists() {
                fs::copy(&path, &other).unwrap();
            }
            let mut child = mapper(&path, how);
            let memory = GuestMemory::of(child.id(), bytes).unwrap();
            let to = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(folder.path().join(format!("copy-{how}-{with_image}")))
                .unwrap();
            let image = if shared { &other } else { &path };
            let opened = fs::File::open(image).unwrap();
            let pages = memory.copy(&to, with_image.then_some(&opened), &ahead).unwrap();
            let mut copy = vec![0; usize::try_from(bytes).unwrap()];
            to.file().read_exact_at(&mut copy, 0).unwrap();
            assert!(copy == expected(b"first"), "{how} {with_image}");
            assert_eq!(pages.is_some(), with_image);
            if let Some(pages) = pages {
                assert_eq!(pages, std::iter::once(1..2).collect(), "{how}");
            }
            let seen = touched(child.id(), bytes, &opened, &ahead).unwrap();
            assert_eq!(seen.is_some(), !shared);
            if let Some(seen) = seen {
                assert_eq!([1, 2].map(|page| seen.is_written(page)), [true, false]);
                assert!(seen.pages().all(|page| page != 2), "it was copied in vain");
                let seen = touched(child.id(), bytes, &opened, &Touched::default()).unwrap();
                assert!([1, 2].map(|page| seen.as_ref().unwrap().is_written(page)) == [true; 2]);
            }
            assert!(to.metadata().unwrap().blocks() < 2 * bytes / 512, "{how}");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
