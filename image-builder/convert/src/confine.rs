//! What this process gives up before it looks at a stranger's bytes. The agent has made it another
//! user already; here go the ways to become more than that, or to use more than a pull needs.

use std::collections::BTreeMap;

use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::error::Error;

/// Open files: a store's handful, some connections, and room.
const FILES_MAX: u64 = 256;
/// Address space in bytes. Resident are some ten MiB; a zstd window may take 128 MiB and the tree
/// of the largest allowed layer as much, and thread stacks and arenas reserve far more than they
/// use.
const ADDRESS_SPACE_BYTES_MAX: u64 = 2 << 30;

/// Number of a system call in the x32 table, which some kernels offer beside the usual one.
#[cfg(target_arch = "x86_64")]
const X32_BIT: i64 = 0x4000_0000;

/// Calls that start programs, reach into other processes, change what the system is made of, or
/// have been the way into the kernel more often than others.
///
/// A list of what is denied, not of what is allowed: the calls of TLS, name resolution and the
/// allocator differ between versions of the libraries, and a pull that dies of a new harmless call
/// is an outage. What the list leaves can be done by any user without rights, to the files of this
/// user: the store. `clone` stays for threads, without new namespaces.
const DENIED: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Flags of `clone` that make namespaces.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Limits and filters for the whole process and every thread it will have.
pub(crate) fn confine() -> Result<(), Error> {
    let failed = |what: &'static str| move |source: std::io::Error| Error::Confine { what, source };
    let limit = |max| Rlimit { current: Some(max), maximum: Some(max) };
    for (resource, max) in [
        (Resource::Nofile, FILES_MAX),
        (Resource::As, ADDRESS_SPACE_BYTES_MAX),
        // A core file would hold credentials.
        (Resource::Core, 0),
    ] {
        setrlimit(resource, limit(max)).map_err(|e| failed("resource limits")(e.into()))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|e| failed("new rights")(e.into()))?;
    for filter in filters().map_err(|e| failed("system calls")(std::io::Error::other(e)))? {
        // The ticker runs already.
        seccompiler::apply_filter_all_threads(&filter)
            .map_err(|e| failed("system calls")(std::io::Error::other(e)))?;
    }
    Ok(())
}

fn filters() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let errno = |errno: i32| SeccompAction::Errno(u32::try_from(errno).unwrap_or(1));
    let mut denied: BTreeMap<i64, Vec<SeccompRule>> =
        DENIED.iter().map(|call| (*call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    denied.extend(DENIED.iter().map(|call| (*call | X32_BIT, Vec::new())));
    let makes_namespace = |flag: i32| {
        let flag = u64::from(flag.unsigned_abs());
        let equal = SeccompCmpOp::MaskedEq(flag);
        SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Qword, equal, flag)?])
    };
    let clones = NAMESPACES.into_iter().map(makes_namespace).collect::<Result<_, _>>()?;
    denied.insert(libc::SYS_clone, clones);
    // The flags of clone3 lie in memory, where a filter cannot look. Without the call libc uses
    // clone, but only this error tells it to.
    let absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let program = |rules, action| -> Result<BpfProgram, seccompiler::BackendError> {
        let arch = std::env::consts::ARCH.try_into()?;
        SeccompFilter::new(rules, SeccompAction::Allow, action, arch)?.try_into()
    };
    Ok([program(denied, errno(libc::EPERM))?, program(absent, errno(libc::ENOSYS))?])
}

#[cfg(test)]
mod tests {
    use std::{io, process::Command, thread};

    use super::*;

    #[test]
    fn threads_still_start_but_no_program_and_no_other_root() {
        // On a thread of its own: the filters must not reach the other tests.
        let outcome = thread::spawn(|| {
            for filter in filters().unwrap() {
                seccompiler::apply_filter(&filter).unwrap();
            }
            assert_eq!(thread::spawn(|| 7).join().unwrap(), 7);
            let root = rustix::process::chroot("/").unwrap_err();
            (Command::new("/bin/true").status().unwrap_err().kind(), root)
        });
        let refused = (io::ErrorKind::PermissionDenied, rustix::io::Errno::PERM);
        assert_eq!(outcome.join().unwrap(), refused);
    }
}
