//! What is left of a way past a proxy when what made it is gone.

use holdfast_netpolicy::Passing;

use crate::world::{ALLOWED, EVIL, HOST, World, received, udp_to};

#[test]
fn f4_with_nobody_who_made_it_a_way_stays_as_the_last_policy_said() {
    let world = World::new();
    // Nobody holds a socket to nftables, and no process of ours has to run.
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(ALLOWED, &[]));
    sandbox.send_udp(ALLOWED, 99, b"x");
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(ALLOWED));
    assert_eq!(world.outside.count(EVIL), 0);
}

#[test]
fn f5_flushed_rules_of_the_host_open_nothing_until_they_are_there_again() {
    let world = World::new();
    let on_host = world.server_on_host(HOST, 99);
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL), "the test does not see it arrive");

    world.in_host("nft flush ruleset");
    world.outside.forget();
    for to in [EVIL, ALLOWED, HOST] {
        sandbox.send_udp(to, 99, b"x");
    }
    assert_eq!(world.outside.count(EVIL), 0);
    assert!(received(&on_host).is_none(), "the host itself is reached");

    // Without the rule of routes everything would be open.
    world.in_host("ip rule delete pref 0");
    for to in [EVIL, ALLOWED, HOST] {
        sandbox.send_udp(to, 99, b"x");
    }
    assert!(world.outside.saw(ALLOWED), "the test does not see it arrive");
    assert!(received(&on_host).is_some(), "the test does not see it arrive at the host");
}

#[test]
fn f5_a_ruleset_that_is_loaded_anew_opens_nothing_until_the_policy_is_put() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL));
    world.load_ruleset();
    world.outside.forget();
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(!world.outside.saw(EVIL));
    world.put(&sandbox, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL), "it does not come back");
}

#[test]
fn f6_a_link_without_a_policy_leads_nowhere() {
    let world = World::new();
    let sandbox = world.sandbox(1, Passing::Udp, &udp_to(EVIL, &[]));
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(world.outside.saw(EVIL));
    world.nft().remove_byway(sandbox.number).unwrap();
    world.outside.forget();
    sandbox.send_udp(EVIL, 99, b"x");
    assert!(!world.outside.saw(EVIL));
    // And twice is no error.
    world.nft().remove_byway(sandbox.number).unwrap();
}
