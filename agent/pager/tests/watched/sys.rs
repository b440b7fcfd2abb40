//! Its mappings and the calls of userfaultfd(2).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use holdfast_wire::pager::Region;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const PAGE: usize = 4096;

/// In two mappings with a gap between, as guests of over 3 GiB have.
pub(crate) struct Watched {
    pub(crate) faults: OwnedFd,
    parts: [*mut u8; 2],
    pages: usize,
}

// SAFETY: the mappings are this value's own; they are read and written by volatile accesses alone.
unsafe impl Send for Watched {}
// SAFETY: as above; no two threads of these tests write the same bytes.
unsafe impl Sync for Watched {}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    requests: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    requests: u64,
}

impl Watched {
    pub(crate) fn of(pages: usize) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, (pages * PAGE) as u64).unwrap();
        let device = fs_err::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
        let device = device.unwrap();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let half = pages / 2 * PAGE;
        let mut api = Api { api: 0xaa, features: 1 << 5, requests: 0 };
        // SAFETY: the requests read and write structures of the layouts they expect, alive during
        // the calls; the kernel chooses where the mappings lie, so nothing of Rust is replaced.
        unsafe {
            let faults = libc::ioctl(device.as_raw_fd(), 0xaa00, flags);
            assert!(faults >= 0, "{}", io::Error::last_os_error());
            let faults = OwnedFd::from_raw_fd(faults);
            assert_eq!(libc::ioctl(faults.as_raw_fd(), 0xc018_aa3f, &raw mut api), 0);
            let map = |offset: usize| {
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let (shared, fd) = (libc::MAP_SHARED, file.as_raw_fd());
                let offset = i64::try_from(offset).unwrap();
                let part = libc::mmap(ptr::null_mut(), half, access, shared, fd, offset);
                assert_ne!(part, libc::MAP_FAILED);
                let start = part.expose_provenance() as u64;
                let mut it = Register { start, bytes: half as u64, mode: 1, requests: 0 };
                assert_eq!(libc::ioctl(faults.as_raw_fd(), 0xc020_aa00, &raw mut it), 0);
                part.cast()
            };
            Self { parts: [map(0), map(half)], faults, pages }
        }
    }

    fn half(&self) -> usize {
        self.pages / 2
    }

    fn at(&self, page: usize) -> *mut u8 {
        let part = self.parts[page / self.half()];
        // SAFETY: `page` is below the number of pages, so this is inside of one mapping.
        unsafe { part.add(page % self.half() * PAGE) }
    }

    /// Waits until the page is there.
    pub(crate) fn page(&self, page: usize) -> Vec<u8> {
        let at = self.at(page);
        // SAFETY: a whole page of a mapping that lives as long as `self`.
        (0..PAGE).map(|byte| unsafe { at.add(byte).read_volatile() }).collect()
    }

    pub(crate) fn write(&self, page: usize, text: &[u8]) {
        let at = self.at(page);
        for (place, byte) in text.iter().enumerate() {
            // SAFETY: as above; the texts of these tests are shorter than a page.
            unsafe { at.add(place).write_volatile(*byte) };
        }
    }

    /// Pages that can be read without waiting.
    pub(crate) fn present(&self) -> Vec<usize> {
        let mut here = vec![0_u8; self.half()];
        let mut present = Vec::new();
        for (part, first) in self.parts.iter().zip([0, self.half()]) {
            // SAFETY: the kernel writes one byte a page of the mapping into `here`.
            let told = unsafe { libc::mincore(part.cast(), self.half() * PAGE, here.as_mut_ptr()) };
            assert_eq!(told, 0);
            let there = here.iter().enumerate().filter(|(_, here)| **here & 1 == 1);
            present.extend(there.map(|(page, _)| first + page));
        }
        present
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        let bytes = (self.half() * PAGE) as u64;
        let of = |(part, index): (&*mut u8, u64)| Region {
            address: part.expose_provenance() as u64,
            bytes,
            offset: index * bytes,
        };
        self.parts.iter().zip(0..).map(of).collect()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        for part in self.parts {
            // SAFETY: a mapping of this length that only `self` knows of.
            unsafe { libc::munmap(part.cast(), self.half() * PAGE) };
        }
    }
}
