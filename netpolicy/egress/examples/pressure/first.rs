//! Row B19 of the attack list: a connection that begins in the same moment as the answer that told
//! its address is let through, however often it is tried.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use crate::rig::{
    Answer, Rig,
    client::{GATEWAY, client_hello, query, read_reply},
};

/// Addresses that names lead to, each with a server of its own.
const ADDRESSES: u8 = 50;
/// Guests' programs that do it side by side.
const SIDE_BY_SIDE: u32 = 4;

const POLICY: &str = r#"{"defaultAction": "Deny", "trafficInspection": "Partial",
    "hostRules": [{"pattern": "*.wild.test", "action": "Allow"}]}"#;

fn name_of(trial: u32) -> String {
    format!("n{trial}.wild.test")
}

fn address_of(trial: u32) -> Ipv4Addr {
    let number = u8::try_from(trial % u32::from(ADDRESSES)).unwrap_or(0);
    Ipv4Addr::new(198, 51, 100, 128 + number)
}

/// Does it so often, each time with a name never asked for before, and gives how many were refused
/// or led elsewhere.
pub(crate) fn trials(count: u32, threads: usize) -> u32 {
    let rig = Rig::on_threads(threads, POLICY, |configure| {
        configure.limits.dns_names = u32::MAX;
        configure.limits.dns_per_second = u32::MAX;
    });
    for number in 0..u32::from(ADDRESSES) {
        let address = address_of(number);
        rig.outside.address(address);
        // It says its last byte once it has heard from a client.
        rig.outside.custom(address, 443, move |mut stream| async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            if stream.read(&mut [0; 64]).await.is_ok() {
                let _ = stream.write_all(&address.octets()[3..]).await;
            }
        });
    }
    for trial in 0..count {
        rig.outside.name(&name_of(trial), Answer::Address(address_of(trial).into()));
    }
    let (next, failed) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                rig.in_guest(|| {
                    loop {
                        let trial = next.fetch_add(1, Relaxed);
                        if trial >= count {
                            return;
                        }
                        if let Err(error) = attempt(trial) {
                            eprintln!("trial {trial}: {error}");
                            failed.fetch_add(1, Relaxed);
                        }
                    }
                });
            });
        }
    });
    failed.load(Relaxed)
}

/// Asks, and connects to what it is told with nothing in between.
fn attempt(trial: u32) -> io::Result<()> {
    let (name, patience) = (name_of(trial), Some(Duration::from_secs(10)));
    let (query, hello) = (query(&name, 1, 1), client_hello(&name));
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(patience)?;
    socket.connect((GATEWAY, 53))?;
    socket.send(&query)?;
    let mut buffer = [0; 1024];
    let received = socket.recv(&mut buffer)?;
    let reply = read_reply(&buffer[..received], query.len());
    let told = reply.addresses.first().copied();
    let told = told.ok_or_else(|| io::Error::other(format!("no address: {reply:?}")))?;
    let mut stream = TcpStream::connect(SocketAddr::new(told, 443))?;
    stream.set_read_timeout(patience)?;
    stream.write_all(&hello)?;
    let mut last = [0];
    stream.read_exact(&mut last)?;
    let expected = address_of(trial);
    if told != expected || last[0] != expected.octets()[3] {
        let wrong = format!("told {told}, reached {}, and not {expected}", last[0]);
        return Err(io::Error::other(wrong));
    }
    Ok(())
}
