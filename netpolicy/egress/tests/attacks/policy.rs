//! Rows F of the attack list: policies that change, and programs that end.

use std::time::Duration;

use holdfast_wire::egress::{Held, Request, ToAgent, Verdict};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::rig::{
    ALLOWED, BY_NAME, DATABASE, EVERYTHING, REFERENCE, Rig, SANDBOX, SECRET, WILD, allow_hosts,
    client::{A, GATEWAY, dig, exchange, get, https_get, tls},
};

const NOTHING: &str = r#"{"defaultAction": "Deny"}"#;

/// A connection, if one comes about in a moment.
async fn reachable() -> Option<TcpStream> {
    let connect = TcpStream::connect((DATABASE, 5432));
    tokio::time::timeout(Duration::from_secs(2), connect).await.ok()?.ok()
}

#[test]
fn f1_no_byte_of_a_tunnel_passes_once_the_policy_that_ends_it_is_answered() {
    let rig = Rig::new(BY_NAME);
    let web = rig.outside.authority.roots();
    let ended = rig.guest(async {
        let mut raw = TcpStream::connect((DATABASE, 5432)).await.unwrap();
        raw.write_all(b"before").await.unwrap();
        raw.read_exact(&mut [0; 6]).await.unwrap();
        let mut passed = tls(ALLOWED, "allowed.test", web).await.unwrap();
        let (status, _) = exchange(&mut passed, &get("allowed.test", "/before")).await.unwrap();
        assert_eq!(status, 200);

        // A flood that fills every buffer between here and there.
        let flooded = TcpStream::connect((DATABASE, 5432)).await.unwrap();
        let (mut flood_out, mut flood_in) = flooded.into_split();
        let flood = tokio::spawn(async move {
            let piece = vec![b'f'; 65_536];
            while flood_in.write_all(&piece).await.is_ok() {}
        });
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while flood_out.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
        });
        tokio::time::sleep(Duration::from_millis(300)).await;

        rig.put(NOTHING);
        let after = rig.outside.seen(DATABASE, 5432).bytes.len();
        // The first to look at the socket hears of the reset.
        let written = raw.write_all(b"after").await;
        let _ = passed.write_all(get("allowed.test", "/after").as_bytes()).await;
        let ends = (written.and(raw.read(&mut [0; 9]).await), passed.read(&mut [0; 9]).await);
        flood.await.unwrap();
        reading.await.unwrap();
        (ends, after)
    });
    let ((raw, passed), after) = ended;
    assert!(raw.is_err(), "reset, not closed: {raw:?}");
    assert!(passed.is_err() || passed.is_ok_and(|count| count == 0));
    let seen = rig.outside.seen(DATABASE, 5432).bytes;
    // What the server's own socket held when the answer came, it may read afterwards; nothing of
    // what was sent later.
    assert!(seen.len() - after < 8 << 20, "{after}, then {}", seen.len());
    assert!(!seen.windows(5).any(|bytes| bytes == b"after"));
    assert_eq!(rig.outside.seen(ALLOWED, 443).requests.len(), 1);
    let flows = rig.agent.told().decisions.into_iter().filter(|it| it.verdict == Verdict::Allowed);
    let tunnels: Vec<_> = flows.filter(|it| it.flow != 0).collect();
    assert_eq!(tunnels.len(), 3, "{tunnels:#?}");
    assert!(tunnels.iter().all(|it| rig.end_of(it.flow).revoked));
}

#[test]
fn f1_the_next_request_of_a_connection_is_judged_by_the_new_policy() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let statuses = rig.guest(async {
        let mut stream = tls(ALLOWED, "allowed.test", roots).await.unwrap();
        let mut plain = TcpStream::connect((ALLOWED, 80)).await.unwrap();
        let mut statuses = Vec::new();
        for policy in [REFERENCE, NOTHING, REFERENCE] {
            rig.put(policy);
            statuses.push(exchange(&mut stream, &get("allowed.test", "/")).await.unwrap().0);
            statuses.push(exchange(&mut plain, &get("allowed.test", "/")).await.unwrap().0);
        }
        statuses
    });
    assert_eq!(statuses, [200, 200, 403, 403, 200, 200]);
}

#[test]
fn f12_a_tunnel_that_the_new_mode_would_open_is_reset_and_others_stay() {
    let rig = Rig::new(BY_NAME);
    let web = rig.outside.authority.roots();
    let (passed, raw) = rig.guest(async {
        let mut passed = tls(ALLOWED, "allowed.test", web).await.unwrap();
        exchange(&mut passed, &get("allowed.test", "/")).await.unwrap();
        let mut raw = TcpStream::connect((DATABASE, 5432)).await.unwrap();
        raw.write_all(b"one").await.unwrap();
        raw.read_exact(&mut [0; 3]).await.unwrap();
        rig.put(REFERENCE);
        let passed = exchange(&mut passed, &get("allowed.test", "/")).await.map(|it| it.0);
        raw.write_all(b"two").await.unwrap();
        (passed, raw.read_exact(&mut [0; 3]).await.map(drop))
    });
    assert!(passed.is_err() && raw.is_ok(), "{passed:?} {raw:?}");
}

#[test]
fn f3_a_policy_that_is_refused_changes_nothing() {
    let rig = Rig::new(REFERENCE);
    for policy in [
        "",
        "{}",
        "[]",
        r#"{"defaultAction": "Perhaps"}"#,
        r#"{"defaultAction": "Deny", "hostRules": [{"pattern": "*.com", "action": "Allow"}]}"#,
    ] {
        rig.agent.refused(rig.put_request(SANDBOX, policy, SECRET), &[]);
    }
    let Request::Put(mut put) = rig.put_request(SANDBOX, EVERYTHING, SECRET) else { panic!() };
    put.generation = 1;
    let reason = rig.agent.refused(Request::Put(put), &[]);
    assert!(reason.contains("generation"), "{reason}");
    let other = rig.put_request("cccccccccccccccccccc", REFERENCE, SECRET);
    assert!(rig.agent.refused(other, &[]).contains("sockets"));
    let roots = rig.ca.roots();
    assert_eq!(rig.guest(https_get(ALLOWED, "allowed.test", "/", roots)).unwrap().0, 200);
    assert_eq!(rig.guest(dig(GATEWAY, "evil.test", A)).unwrap().code, 5);
}

#[test]
fn an_agent_that_starts_anew_finds_its_sandboxes_served_and_goes_on() {
    let rig = Rig::new(REFERENCE);
    rig.agent.hang_up();
    let roots = rig.ca.roots();
    assert_eq!(rig.guest(https_get(ALLOWED, "allowed.test", "/a", roots)).unwrap().0, 200);
    let agent = rig.agent.again();
    let hello = Request::Hello { version: holdfast_wire::WIRE_VERSION };
    let ToAgent::Hello { configured, sandboxes, .. } = agent.ask(hello, &[]) else { panic!() };
    assert!(configured);
    assert_eq!(sandboxes, [Held { sandbox: SANDBOX.into(), generation: 1 }]);
    // What was decided meanwhile is told to the new one.
    let told = agent.wait_for(|told| told.decisions.iter().find(|it| it.path == "/a").cloned());
    assert_eq!(told.unwrap().verdict, Verdict::Allowed);
    agent.done(rig.put_request(SANDBOX, NOTHING, SECRET), &[]);
    let roots = rig.ca.roots();
    assert!(rig.guest(tls(ALLOWED, "allowed.test", roots)).is_err());
}

#[test]
fn a_sandbox_that_is_removed_has_no_flow_left_and_can_come_again() {
    let rig = Rig::new(REFERENCE);
    let roots = rig.ca.roots();
    let ended = rig.guest(async {
        let mut raw = TcpStream::connect((DATABASE, 5432)).await.unwrap();
        raw.write_all(b"one").await.unwrap();
        raw.read_exact(&mut [0; 3]).await.unwrap();
        let mut opened = tls(ALLOWED, "allowed.test", roots).await.unwrap();
        exchange(&mut opened, &get("allowed.test", "/")).await.unwrap();
        rig.agent.done(Request::Remove { sandbox: SANDBOX.into() }, &[]);
        (raw.read(&mut [0; 9]).await, opened.read(&mut [0; 9]).await)
    });
    assert!(ended.0.is_err() && ended.1.is_err(), "{ended:?}");
    assert!(rig.guest(reachable()).is_none(), "nobody listens");
    // Twice is no error.
    rig.agent.done(Request::Remove { sandbox: SANDBOX.into() }, &[]);
    let sockets = rig.sockets();
    rig.agent.done(rig.put_request(SANDBOX, REFERENCE, SECRET), &sockets);
    drop(sockets);
    let roots = rig.ca.roots();
    assert_eq!(rig.guest(https_get(ALLOWED, "allowed.test", "/", roots)).unwrap().0, 200);
}

/// Whether a process of ours is over, waited for or not.
fn is_gone(id: u32) -> bool {
    let stat = fs_err::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('Z'));
    state.unwrap_or(true)
}

#[test]
fn f4_a_program_that_is_killed_leaves_nothing_open() {
    let rig = Rig::new(REFERENCE);
    let ended = rig.guest(async {
        let mut raw = TcpStream::connect((DATABASE, 5432)).await.unwrap();
        raw.write_all(b"one").await.unwrap();
        raw.read_exact(&mut [0; 3]).await.unwrap();
        let id = rustix::process::Pid::from_raw(i32::try_from(rig.program_id()).unwrap()).unwrap();
        rustix::process::kill_process(id, rustix::process::Signal::KILL).unwrap();
        let ended = raw.read(&mut [0; 9]).await;
        // Its sockets are closed one after the other.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !is_gone(rig.program_id()) && std::time::Instant::now() < deadline {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        (ended, reachable().await, dig(GATEWAY, "allowed.test", A).await)
    });
    assert!(ended.0.is_err() || ended.0.is_ok_and(|count| count == 0));
    assert!(ended.1.is_none() && ended.2.is_none());
}

#[test]
fn f10_what_a_guest_writes_is_cut_and_told_as_text() {
    let rig = Rig::new(REFERENCE);
    let path = format!("/{}?secret=query", "x".repeat(2000));
    let (status, _) = rig.guest(crate::rig::client::http(WILD, &get("evil.test", &path))).unwrap();
    assert_eq!(status, 403);
    let denial = rig.denial("evil.test");
    assert_eq!(denial.path.len(), holdfast_wire::egress::PATH_BYTES_MAX);
    assert!(!denial.path.contains('?'));
}

#[test]
fn f1_a_change_of_policy_ends_a_hundred_tunnels_before_it_is_answered() {
    let rig = Rig::new(REFERENCE);
    rig.guest(async {
        let mut streams = Vec::new();
        for _ in 0..100 {
            let mut stream = TcpStream::connect((DATABASE, 5432)).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            streams.push(stream);
        }
        rig.put(&allow_hosts(&["allowed.test"], "Full"));
        assert_eq!(rig.stats().connections, 0);
        for stream in &mut streams {
            assert!(stream.read(&mut [0]).await.is_err());
        }
    });
}

#[test]
fn the_program_is_nobody_and_holds_sockets_only() {
    for threads in [1, 3] {
        let rig = Rig::on_threads(threads, REFERENCE, |_| {});
        let roots = rig.ca.roots();
        assert_eq!(rig.guest(https_get(ALLOWED, "allowed.test", "/", roots)).unwrap().0, 200);
        let folder = format!("/proc/{}", rig.program_id());
        for task in fs_err::read_dir(format!("{folder}/task")).unwrap() {
            let status = fs_err::read_to_string(task.unwrap().path().join("status")).unwrap();
            for line in [
                "Uid:\t65534\t65534\t65534\t65534",
                "Gid:\t65534\t65534\t65534\t65534",
                "Groups:\t \n",
                "CapPrm:\t0000000000000000",
                "CapEff:\t0000000000000000",
                "NoNewPrivs:\t1",
                "Seccomp:\t2",
            ] {
                assert!(status.contains(line), "{line:?} is not in {status}");
            }
        }
        let mut kinds = std::collections::BTreeSet::new();
        for entry in fs_err::read_dir(format!("{folder}/fd")).unwrap() {
            let entry = entry.unwrap();
            let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
            let Ok(target) = fs_err::read_link(entry.path()) else { continue };
            if number > 2 {
                kinds.insert(target.to_str().unwrap().split(':').next().unwrap().to_owned());
            }
        }
        let expected = ["anon_inode".to_owned(), "socket".to_owned()];
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), expected);
    }
}
