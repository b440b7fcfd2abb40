//! How long a change of policy takes while a hundred tunnels are open: from the request to the
//! answer, as the agent sees it.

use std::time::Instant;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    BY_NAME,
    origin::{RAW, RAW_NAME},
    rig::{Rig, client::client_hello},
    sys::cpu_time_of,
};

const TUNNELS: u32 = 100;
const NOTHING: &str = r#"{"defaultAction": "Deny"}"#;

/// Milliseconds of changes that leave all tunnels, and of as many that end all of them.
pub(crate) fn measure(rig: &Rig, changes: u32, mut note: impl FnMut(&'static str, f64)) {
    let put = |policy: &str| {
        let start = Instant::now();
        rig.put(policy);
        start.elapsed().as_secs_f64() * 1e3
    };
    let (mut kept, mut ended, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    rig.guest(async {
        for _ in 0..changes {
            let mut streams = Vec::new();
            for _ in 0..TUNNELS {
                let mut stream = TcpStream::connect((RAW, 443)).await.expect("the guest connects");
                stream.write_all(&client_hello(RAW_NAME)).await.expect("it is let through");
                stream.read_exact(&mut [0]).await.expect("the server answers");
                streams.push(stream);
            }
            kept.push(put(BY_NAME));
            let before = cpu_time_of(rig.program_id());
            ended.push(put(NOTHING));
            let used = cpu_time_of(rig.program_id()).saturating_sub(before);
            cpu.push(used.as_secs_f64() * 1e3);
            for stream in &mut streams {
                let end = stream.read(&mut [0]).await;
                assert!(end.is_err(), "a tunnel outlived its policy: {end:?}");
            }
            put(BY_NAME);
        }
    });
    for (times, median, most) in [
        (kept, "kept_100_tunnels_ms", "kept_100_tunnels_ms_max"),
        (ended, "ended_100_tunnels_ms", "ended_100_tunnels_ms_max"),
        // Of the process: what it takes where nobody else wants the CPU.
        (cpu, "ended_100_tunnels_cpu_ms", "ended_100_tunnels_cpu_ms_max"),
    ] {
        let (middle, _, max) = crate::spread(&times);
        note(median, middle);
        note(most, max);
    }
}
