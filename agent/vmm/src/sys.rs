//! The calls of the VMM's core for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU8, Ordering},
};

use kvm_bindings::{kvm_run, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{
    GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, VolatileMemoryError, VolatileSlice,
    bitmap::BitmapSlice,
};

use vmm_sys_util::errno;

use crate::vm::Memory;

/// Makes all threads allocate from the one heap of the process. A thread's own heap would cost
/// address space and pages for each, and when it shrinks the C library opens a file of /proc, which
/// no thread may here.
pub(crate) fn keep_one_heap() {
    // SAFETY: takes two integers. Where it is refused, the allocator goes on as before.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Ends this process without any cleanup.
pub(crate) fn end_at_once(code: i32) -> ! {
    // SAFETY: takes an integer and does not return; no destructor or exit handler of this program
    // is needed by anybody else.
    unsafe { libc::_exit(code) }
}

/// Takes ownership of the inherited fd `fd`. The caller ([`crate::inherited`]) does so before
/// anything in this process opened an fd, and at most once a number.
pub(crate) fn claim_fd(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; on a closed number it fails with EBADF.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the fd is open (checked above) and nobody else owns it: it came by inheritance, no
    // fd has been opened by this process yet, and the caller claims each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One positional read from `file` straight into guest memory.
pub(crate) fn read_at_volatile<B: BitmapSlice>(
    file: &impl AsRawFd,
    offset: u64,
    slice: &mut VolatileSlice<'_, B>,
) -> Result<usize, VolatileMemoryError> {
    let offset = i64::try_from(offset)
        .map_err(|_| VolatileMemoryError::Overflow { base: usize::MAX, offset: slice.len() })?;
    let guard = slice.ptr_guard_mut();
    // SAFETY: the guard keeps `slice.len()` bytes of the guest's mapping valid for the whole call,
    // and guest memory is only ever accessed as volatile bytes, so the kernel may write there.
    let count =
        unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), slice.len(), offset) };
    match usize::try_from(count) {
        Ok(count) => {
            slice.bitmap().mark_dirty(0, count);
            Ok(count)
        }
        Err(_) => Err(VolatileMemoryError::IOError(io::Error::last_os_error())),
    }
}

/// Asks for huge pages under `memory`: a boot takes 1200 exits with them and 7400 without, and keeps
/// a fifth more memory, since kernels fill their memory from the bottom and from the top. Only
/// advice: a host without huge pages for shared memory ignores it.
pub(crate) fn prefer_huge_pages(memory: &Memory) {
    advise(memory, libc::MADV_HUGEPAGE).unwrap_or_else(|error| {
        log::debug!(error:%; "guest memory has no huge pages");
    });
}

/// Makes a KVM handle of an inherited `/dev/kvm`.
pub(crate) fn kvm_from(fd: OwnedFd) -> Kvm {
    // SAFETY: ownership is handed over by `into_raw_fd`. That it really is /dev/kvm is checked by
    // the caller through the API version, which any other file refuses.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// Shows every region of `memory` to the guest, one slot each.
pub(crate) fn map_memory(vm: &VmFd, memory: &Memory) -> io::Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let start = region.start_addr();
        let host = memory.get_host_address(start).map_err(io::Error::other)?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start.0,
            memory_size: region.len(),
            userspace_addr: host.expose_provenance() as u64,
        };
        // SAFETY: the range is one whole mapping of `memory`, which the machine keeps until its
        // vCPUs are gone; the regions do not overlap (vm-memory refuses that), nor do the slots.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}

/// Sets a vCPU's extended state.
pub(crate) fn set_extended_state(vcpu: &VcpuFd, state: &kvm_xsave) -> Result<(), errno::Error> {
    // SAFETY: KVM reads as much as the guest's features need, which is over the 4096 bytes of
    // `state` only for features that a process must ask for first (AMX), and this one never does.
    unsafe { vcpu.set_xsave(state) }
}

/// Tells the kernel to leave guest memory out of core dumps: it holds the tenant's secrets.
pub(crate) fn leave_out_of_core_dumps(memory: &Memory) -> io::Result<()> {
    advise(memory, libc::MADV_DONTDUMP)
}

/// Lets go of `bytes` from `offset` on of a private mapping of a file: what was written there is
/// lost, and the file shows again.
pub(crate) fn let_go(region: &GuestRegionMmap, offset: u64, bytes: u64) -> io::Result<()> {
    advise_part(region, offset, bytes, libc::MADV_DONTNEED)
}

/// Makes `bytes` from `offset` on of a private mapping be there as writes would, which leave them as
/// they are.
pub(crate) fn copy_ahead(region: &GuestRegionMmap, offset: u64, bytes: u64) -> io::Result<()> {
    advise_part(region, offset, bytes, libc::MADV_POPULATE_WRITE)
}

/// Gives one piece of advice about a part of a mapping that is guest memory.
fn advise_part(region: &GuestRegionMmap, offset: u64, bytes: u64, advice: i32) -> io::Result<()> {
    let offset = usize::try_from(offset).map_err(io::Error::other)?;
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    let end = offset.checked_add(bytes).filter(|&end| end <= region.size());
    end.ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the range lies inside one mapping that `region` owns (checked above). Guest memory is
    // only ever accessed as volatile bytes, so that advice changes them at any time is expected.
    let outcome = unsafe { libc::madvise(region.as_ptr().add(offset).cast(), bytes, advice) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives one piece of advice about all of `memory`; it must be of a kind that changes no byte.
fn advise(memory: &Memory, advice: i32) -> io::Result<()> {
    for region in memory.iter() {
        let host = memory.get_host_address(region.start_addr()).map_err(io::Error::other)?;
        let length = usize::try_from(region.len()).map_err(io::Error::other)?;
        // SAFETY: the range is one whole mapping that `memory` owns, and neither advice given
        // above changes or drops what is in it.
        if unsafe { libc::madvise(host.cast(), length, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A second mapping of one vCPU's shared page, for whoever wants the vCPU out of the guest. With a
/// mapping of its own it stays valid when the vCPU's thread ends first.
pub(crate) struct ImmediateExit {
    page: NonNull<kvm_run>,
}

/// Bytes mapped: the field needed is in the first page.
const RUN_PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

// SAFETY: the only access is an atomic store to one byte of a mapping this value owns.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above; atomic stores may come from several threads.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: with a null hint and no MAP_FIXED the kernel picks an unused range, so no
        // mapping Rust relies on is replaced; `vcpu` is borrowed, so it is open for the call.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                RUN_PAGE.get(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page.cast()) {
            Some(page_start) if page != libc::MAP_FAILED => Ok(Self { page: page_start }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// From now on KVM_RUN returns at once, until the vCPU's thread takes the request back.
    pub(crate) fn request(&self) {
        // SAFETY: the field lies inside the page mapped for as long as `self` lives, is one byte
        // without alignment needs, and the kernel reads it as a single byte.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) };
        flag.store(1, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: `page` is the start of a mapping of this length that only `self` knows of.
        unsafe { libc::munmap(self.page.as_ptr().cast(), RUN_PAGE.get()) };
    }
}

/// Calls that threads of the tests try under their filter.
#[cfg(test)]
pub(crate) mod testing {
    use std::ptr;

    /// Makes the system call that `deed` names, with arguments that do no harm if it is let through.
    pub(crate) fn ask(deed: &str) {
        const NOWHERE: i32 = -1;
        let page = 4096_usize;
        let own = libc::pid_t::try_from(std::process::id()).unwrap();
        let executable = libc::PROT_READ | libc::PROT_EXEC;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: none of these calls touches memory of Rust: descriptors are invalid, pointers are
        // null or not looked at, mappings are new ones, and the process ends after it.
        unsafe {
            match deed {
                "socket" => _ = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0),
                "open" => _ = libc::open(c"/".as_ptr(), libc::O_RDONLY),
                "execve" => _ = libc::execve(c"".as_ptr(), ptr::null(), ptr::null()),
                "fork" => _ = libc::syscall(libc::SYS_fork),
                "thread" => _ = libc::syscall(libc::SYS_clone, libc::CLONE_VM, 0, 0, 0, 0),
                "executable-mmap" => {
                    _ = libc::mmap(ptr::null_mut(), page, executable, anonymous, NOWHERE, 0);
                }
                "executable-mprotect" => _ = libc::mprotect(ptr::null_mut(), page, executable),
                // TIOCSTI
                "ioctl" => _ = libc::ioctl(NOWHERE, 0x5412),
                "kvm-run" => _ = libc::ioctl(NOWHERE, 0xae80),
                "kill-parent" => _ = libc::syscall(libc::SYS_tgkill, 1, 1, 34),
                "kick" => _ = libc::syscall(libc::SYS_tgkill, own, NOWHERE, 34),
                "ptrace" => _ = libc::ptrace(libc::PTRACE_PEEKDATA, NOWHERE, 0, 0),
                "seccomp" => _ = libc::syscall(libc::SYS_seccomp, 1, 0, 0),
                "prctl" => _ = libc::prctl(libc::PR_GET_DUMPABLE),
                "io_uring" => _ = libc::syscall(libc::SYS_io_uring_enter, NOWHERE, 0, 0, 0, 0, 0),
                "preadv2" => _ = libc::preadv2(NOWHERE, ptr::null(), 0, 0, 0),
                "yield" => _ = libc::sched_yield(),
                "clock" => _ = libc::syscall(libc::SYS_clock_gettime, 0, 0),
                // The word is not 0, so it does not wait.
                "futex-wait" => {
                    _ = libc::syscall(libc::SYS_futex, &raw const own, 0, 0, ptr::null::<u8>());
                }
                other => unreachable!("no deed is called {other}"),
            }
        }
    }
}
