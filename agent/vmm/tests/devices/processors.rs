//! One to four vCPUs, all of them at work; and what their CPUs say of themselves.

use holdfast_wire::vmm::CpuTemplate;

use crate::{
    guest::{FLAGS, LOAD},
    running::{booted, switch_off, told},
};

#[test]
fn every_vcpu_of_one_to_four_is_found_and_works() {
    for vcpus in 1..=4 {
        let mut vmm = booted("processors", |launch| launch.vcpus = vcpus);
        assert_eq!(told(&vmm, LOAD), format!("{vcpus} found, {vcpus} worked"));
        switch_off(&mut vmm);
    }
}

#[test]
fn a_template_hides_what_is_not_in_it_and_the_guest_still_works() {
    let mut vmm = booted("processors", |launch| launch.cpu = CpuTemplate::V3);
    let flags = told(&vmm, FLAGS);
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    for flag in ["avx2", "bmi2", "fma", "movbe", "aes", "pclmulqdq", "hypervisor"] {
        assert!(has(flag), "{flag} is missing in {flags}");
    }
    for flag in ["sha_ni", "rdseed", "adx", "smap", "svm", "sse4a", "clflushopt"] {
        assert!(!has(flag), "{flag} is still in {flags}");
    }
    assert_eq!(told(&vmm, LOAD), "2 found, 2 worked");
    switch_off(&mut vmm);
}
