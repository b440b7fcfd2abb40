//! Finds the root's block device among the disks the kernel shows.

use std::path::{Path, PathBuf};

use crate::{cmdline::RootName, gpt, say};

/// The device under `dev` of the partition called `name`, if a disk in `class` (the kernel's
/// `/sys/class/block`) has it. A disk that cannot be read is passed over: another may hold it.
pub(crate) fn find(class: &Path, dev: &Path, name: &RootName) -> Option<PathBuf> {
    names(class).iter().find_map(|disk| {
        let mut device = fs_err::File::open(dev.join(node(disk))).ok()?;
        let partitions = gpt::read(&mut device, block_bytes(class, disk)).ok()?;
        let found = partitions.iter().find(|partition| partition.is(name))?;
        let partition = partition_name(class, disk, found.number);
        if partition.is_none() {
            say(&format!("{disk} has {name}, but the kernel does not show it"));
        }
        Some(dev.join(node(&partition?)))
    })
}

/// The whole disks: partitions have a file with their number.
pub(crate) fn names(class: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(class).into_iter().flatten().flatten();
    let whole = entries.filter(|entry| !entry.path().join("partition").exists());
    let mut names: Vec<_> = whole.filter_map(|disk| disk.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn block_bytes(class: &Path, disk: &str) -> u32 {
    let path = class.join(disk).join("queue/logical_block_size");
    let text = fs_err::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(512)
}

fn partition_name(class: &Path, disk: &str, number: u32) -> Option<String> {
    let children = fs_err::read_dir(class.join(disk)).ok()?.flatten();
    let is_it = |path: &Path| {
        let text = fs_err::read_to_string(path.join("partition")).unwrap_or_default();
        text.trim().parse() == Ok(number)
    };
    let child = children.map(|entry| entry.path()).find(|path| is_it(path))?;
    child.file_name()?.to_str().map(str::to_owned)
}

/// Where sysfs writes `!`, the device node has a folder.
fn node(name: &str) -> String {
    name.replace('!', "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with one disk, `cciss!c0d0`, of two partitions.
    fn sysfs() -> tempfile::TempDir {
        let class = tempfile::tempdir().unwrap();
        for (partition, number) in [("cciss!c0d0p1", "1\n"), ("cciss!c0d0p2", "2\n")] {
            let inside = class.path().join("cciss!c0d0").join(partition);
            fs_err::create_dir_all(&inside).unwrap();
            fs_err::write(inside.join("partition"), number).unwrap();
            let beside = class.path().join(partition);
            fs_err::create_dir_all(&beside).unwrap();
            fs_err::write(beside.join("partition"), number).unwrap();
        }
        class
    }

    #[test]
    fn only_whole_disks_are_looked_at() {
        assert_eq!(names(sysfs().path()), ["cciss!c0d0"]);
    }

    #[test]
    fn a_partition_is_found_by_its_number_and_not_by_its_name() {
        let class = sysfs();
        let found = partition_name(class.path(), "cciss!c0d0", 2);
        assert_eq!(found.map(|name| node(&name)).as_deref(), Some("cciss/c0d0p2"));
        assert_eq!(partition_name(class.path(), "cciss!c0d0", 3), None);
    }

    #[test]
    fn a_disk_that_cannot_be_read_is_passed_over() {
        let class = sysfs();
        let name = RootName::Label("holdfast-root-a".to_owned());
        assert_eq!(find(class.path(), class.path(), &name), None);
    }
}
