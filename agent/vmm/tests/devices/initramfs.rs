//! The guest's initramfs: busybox, this program and its libraries, at the paths they have here.

use std::{env, os::unix::fs::PermissionsExt, path::Path, process::Command};

/// Makes the archive `target`, whose first program is the script `init`.
pub(crate) fn make(target: &Path, init: &str) {
    let root = target.with_extension("root");
    let put = |from: &Path, to: &str| {
        let target = root.join(to.trim_start_matches('/'));
        fs_err::create_dir_all(target.parent().unwrap()).unwrap();
        fs_err::copy(from, &target).unwrap();
        fs_err::set_permissions(&target, PermissionsExt::from_mode(0o755)).unwrap();
    };
    put(Path::new("/bin/busybox"), "bin/busybox");
    put(&env::current_exe().unwrap(), "probe");
    let maps = fs_err::read_to_string("/proc/self/maps").unwrap();
    for library in maps.lines().filter_map(|line| line.split_whitespace().nth(5)) {
        if library.contains(".so") {
            put(Path::new(library), library);
        }
    }
    // The loader is found by the one path written into every program.
    put(Path::new("/lib64/ld-linux-x86-64.so.2"), "lib64/ld-linux-x86-64.so.2");
    let script = root.join("init");
    fs_err::write(&script, init).unwrap();
    fs_err::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let pack = format!("find . | cpio -o -H newc > {}", target.display());
    let mut packer = Command::new("/bin/busybox");
    assert!(packer.args(["sh", "-c", &pack]).current_dir(&root).status().unwrap().success());
}
