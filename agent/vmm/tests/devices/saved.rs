//! A Linux guest that is saved, goes on, and goes on twice more as clones of itself.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use holdfast_wire::vmm::{Reply, ToVmm};

use crate::{
    guest::{BLOCK, ECHO, FORKED, LOST, RANDOM},
    running::{booted, connect, switch_off, told, wait_until},
    vmm::{DiskFiles, Launch, Saved, Vmm},
};

fn echoes(client: &mut UnixStream) {
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
}

fn disk(path: &Path) -> DiskFiles {
    let files = vec![path.to_owned()];
    DiskFiles { files, read_only: false, limits: Default::default() }
}

/// Goes on from `saved`, on a disk of its own.
fn clone(launch: &Launch, saved: &Saved, image: &Path, own: &Path) -> Vmm {
    fs_err::copy(image, own).unwrap();
    let launch = Launch { saved: Some(saved.clone()), disks: vec![disk(own)], ..launch.clone() };
    let mut vmm = launch.start().unwrap();
    for request in [ToVmm::Restore, ToVmm::RenewGeneration, ToVmm::Resume] {
        assert_eq!(vmm.ask(&request).unwrap(), Reply::Done, "{request:?}");
    }
    vmm
}

#[test]
fn clones_of_a_linux_guest_go_on_by_themselves_and_so_does_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs_err::write(path("disk"), vec![0; 1 << 20]).unwrap();
    let mut launch = None;
    let mut vmm = booted("saved", |it| {
        it.disks = vec![disk(&path("disk"))];
        it.balloon = true;
        launch = Some(it.clone());
    });
    // What it was booted from is gone, and not needed.
    let launch = Launch { initramfs: None, ..launch.unwrap() };
    assert_eq!(told(&vmm, BLOCK), "block 1");
    let mut held = connect(&vmm, ECHO);
    echoes(&mut held);
    let saved = vmm.save(&path("memory")).unwrap();
    assert!(saved.state.len() < 64 * 1024, "{} bytes of state", saved.state.len());
    // Of the same instant.
    fs_err::copy(path("disk"), path("disk-saved")).unwrap();

    // The guest itself lost nothing.
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    echoes(&mut held);
    assert_eq!((told(&vmm, LOST), told(&vmm, BLOCK)), ("0 lost".into(), "block 2".into()));

    let image = path("disk-saved");
    let mut clones = [
        clone(&launch, &saved, &image, &path("disk-a")),
        clone(&launch, &saved, &image, &path("disk-b")),
    ];
    for clone in &mut clones {
        echoes(&mut connect(clone, ECHO));
        // The connection that was open is gone, and its program was told.
        wait_until(clone, "nobody told of the connection", |clone| told(clone, LOST) == "1 lost");
        // Each has the disk of that instant, and writes to its own.
        assert_eq!(told(clone, BLOCK), "block 2");
        wait_until(clone, "random numbers not seeded anew", |clone| told(clone, FORKED) == "yes");
    }
    let random: Vec<_> = clones.iter().chain([&vmm]).map(|vmm| told(vmm, RANDOM)).collect();
    assert!(random[0] != random[1] && random[1] != random[2] && random[0] != random[2]);
    assert_eq!(told(&vmm, BLOCK), "block 3");
    clones.iter_mut().chain([&mut vmm]).for_each(switch_off);
}

#[test]
fn a_guest_is_saved_and_restored_again_and_again_on_several_vcpus() {
    let folder = tempfile::tempdir().unwrap();
    fs_err::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let disks = vec![disk(&folder.path().join("disk"))];
    let mut launch = None;
    let mut vmm = booted("saved", |it| {
        it.vcpus = 4;
        it.disks = disks;
        launch = Some(it.clone());
    });
    // What it was booted from is gone, and not needed.
    let launch = Launch { initramfs: None, ..launch.unwrap() };
    for round in 1..=5 {
        assert_eq!(told(&vmm, BLOCK), format!("block {round}"));
        // The image of one round, and what was written since, is the image of the next.
        let saved = vmm.save(&folder.path().join(format!("memory-{round}"))).unwrap();
        drop(vmm);
        vmm = Launch { saved: Some(saved), ..launch.clone() }.start().unwrap();
        for request in [ToVmm::Restore, ToVmm::RenewGeneration, ToVmm::Resume] {
            assert_eq!(vmm.ask(&request).unwrap(), Reply::Done, "{request:?}");
        }
        echoes(&mut connect(&vmm, ECHO));
    }
    switch_off(&mut vmm);
}
