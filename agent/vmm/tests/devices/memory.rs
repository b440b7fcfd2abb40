//! What the guest does not use goes back to the host; a fork is told to it; idle, nothing wakes.

use std::{
    io::Read,
    net::Shutdown,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use holdfast_wire::vmm::{BalloonStats, IoLimits, Network, Reply, ToVmm};

use crate::{
    guest::{FILL, FILLED_BYTES, FORKED},
    running::{LONG, booted, connect, stats, switch_off, told, wait_until},
    tap,
    vmm::Vmm,
};

const MIB: u64 = 1 << 20;

fn held(vmm: &Vmm) -> u64 {
    vmm.guest_bytes().unwrap()
}

fn balloon(vmm: &mut Vmm) -> BalloonStats {
    stats(vmm).balloon.unwrap()
}

#[test]
fn memory_that_the_guest_frees_or_gives_up_is_the_hosts_again() {
    let mut vmm = booted("memory", |launch| launch.balloon = true);

    let mut client = connect(&vmm, FILL);
    let mut word = [0; 6];
    client.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"filled");
    let full = held(&vmm);
    assert!(full > FILLED_BYTES as u64, "{full} bytes held");
    // The guest frees what it filled, and reports it by itself.
    client.shutdown(Shutdown::Both).unwrap();
    // Not all of it: the guest reports whole blocks of 2 MiB, and some are in use in part.
    let enough = full - FILLED_BYTES as u64 * 3 / 4;
    wait_until(&mut vmm, "memory was not given back", |vmm| held(vmm) < enough);
    println!("held: {} MiB filled, {} MiB after", full / MIB, held(&vmm) / MIB);
    assert!(balloon(&mut vmm).given_back_bytes > FILLED_BYTES as u64 * 3 / 4);

    // What was given back can be used again, and is given back again.
    let mut client = connect(&vmm, FILL);
    client.read_exact(&mut word).unwrap();
    assert!(held(&vmm) > FILLED_BYTES as u64);
    client.shutdown(Shutdown::Both).unwrap();
    wait_until(&mut vmm, "memory was not given back again", |vmm| held(vmm) < enough);

    assert_eq!(vmm.ask(&ToVmm::Balloon { target_mib: 100 }).unwrap(), Reply::Done);
    wait_until(&mut vmm, "the balloon did not fill", |vmm| balloon(vmm).actual_mib == 100);
    let before = held(&vmm);
    assert!(before < 156 * MIB, "{} MiB held", before / MIB);
    assert_eq!(vmm.ask(&ToVmm::Balloon { target_mib: 0 }).unwrap(), Reply::Done);
    wait_until(&mut vmm, "the balloon did not empty", |vmm| balloon(vmm).actual_mib == 0);
    let refused = vmm.ask(&ToVmm::Balloon { target_mib: 256 }).unwrap();
    assert!(matches!(refused, Reply::Refused { .. }), "{refused:?}");
    switch_off(&mut vmm);
}

#[test]
fn a_guest_is_told_that_it_goes_on_as_another_and_seeds_its_random_numbers_anew() {
    let mut vmm = booted("memory", |_| {});
    assert_eq!(vmm.ask(&ToVmm::RenewGeneration).unwrap(), Reply::Done);
    wait_until(&mut vmm, "the guest was not told", |vmm| told(vmm, FORKED) == "yes");
    let refused = vmm.ask(&ToVmm::Balloon { target_mib: 1 }).unwrap();
    assert!(matches!(refused, Reply::Refused { .. }), "no balloon: {refused:?}");
    switch_off(&mut vmm);
}

/// How often the VMM's threads but its vCPUs' have woken.
fn wakeups(vmm: &Vmm) -> u64 {
    let tasks = fs_err::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap();
    let woken = |task: std::path::PathBuf| {
        let status = fs_err::read_to_string(task.join("status")).unwrap();
        let of = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let vcpu = of("Name:").trim().starts_with("vcpu");
        if vcpu { 0 } else { of("voluntary_ctxt_switches:").trim().parse::<u64>().unwrap() }
    };
    tasks.map(|task| woken(task.unwrap().path())).sum()
}

#[test]
fn an_idle_guest_wakes_no_thread_of_the_vmm_but_its_vcpus() {
    tap::leave_network().unwrap();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let fd = Arc::new(tap::tap("tap0", flags).unwrap());
    let up = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ifconfig tap0 10.0.0.1 up";
    assert!(Command::new("/bin/busybox").args(["sh", "-c", up]).status().unwrap().success());
    let free = IoLimits::default();
    let mac = [2, 0, 0, 0, 0, 2];
    let network = Network { tap_fd: 0, mac, mtu: 1500, to_guest: free, from_guest: free };
    let mut vmm = booted("memory", |launch| {
        launch.networks.push((fd, network));
        launch.balloon = true;
    });
    // Its last pages are reported some seconds after its boot; then it is still.
    let start = Instant::now();
    let mut before = wakeups(&vmm);
    loop {
        thread::sleep(Duration::from_secs(3));
        let now = wakeups(&vmm);
        if now == before {
            break;
        }
        assert!(start.elapsed() < LONG, "never still: {before}, {now}");
        before = now;
    }
    switch_off(&mut vmm);
}
