//! Which block device a folder lies on.

use std::{fmt, io, path::Path};

use fs_err as fs;
use rustix::fs::{major, minor, stat};

/// A whole disk, by its numbers: bounds on traffic are set on disks, not on their partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockDevice {
    pub major: u32,
    pub minor: u32,
}

impl BlockDevice {
    /// The disk below the file system of `folder`. `None` where there is no single one: memory,
    /// network, file systems of several devices.
    pub fn below(folder: &Path) -> io::Result<Option<Self>> {
        let number = stat(folder)?.st_dev;
        Self::whole(Path::new("/sys/dev/block"), major(number), minor(number))
    }

    /// `devices` is sysfs's folder of links by number. A partition lies in the folder of its disk.
    fn whole(devices: &Path, major: u32, minor: u32) -> io::Result<Option<Self>> {
        let link = devices.join(format!("{major}:{minor}"));
        let own = match fs::canonicalize(&link) {
            Ok(own) => own,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !own.join("partition").exists() {
            return Ok(Some(Self { major, minor }));
        }
        let disk = own.parent().unwrap_or(&own).join("dev");
        Ok(fs::read_to_string(disk)?.trim().parse().ok())
    }
}

impl std::str::FromStr for BlockDevice {
    type Err = std::num::ParseIntError;

    /// `8:0`. Without a colon there is no minor number to read, which is an error too.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (major, minor) = s.split_once(':').unwrap_or((s, ""));
        Ok(Self { major: major.parse()?, minor: minor.parse()? })
    }
}

impl fmt::Display for BlockDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_partition_is_told_by_its_disk_and_a_disk_by_itself() {
        let sys = tempfile::tempdir().unwrap();
        let (devices, disk) = (sys.path().join("dev"), sys.path().join("devices/vda"));
        fs::create_dir_all(disk.join("vda3")).unwrap();
        fs::create_dir_all(&devices).unwrap();
        fs::write(disk.join("dev"), "254:0\n").unwrap();
        fs::write(disk.join("vda3/partition"), "3\n").unwrap();
        symlink("../devices/vda", devices.join("254:0")).unwrap();
        symlink("../devices/vda/vda3", devices.join("254:3")).unwrap();
        let vda = Some(BlockDevice { major: 254, minor: 0 });
        for minor in [0, 3] {
            assert_eq!(BlockDevice::whole(&devices, 254, minor).unwrap(), vda, "minor {minor}");
        }
        assert_eq!(BlockDevice::whole(&devices, 0, 42).unwrap(), None);
    }

    #[test]
    fn a_folder_in_memory_is_on_no_disk() {
        assert_eq!(BlockDevice::below(Path::new("/proc")).unwrap(), None);
    }
}
