//! Answers to the guest: by UDP on the socket handed over, by TCP on connections to port 53.

use std::{
    io,
    net::{IpAddr, SocketAddrV4},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use holdfast_netpolicy::{self as netpolicy, DnsType, Flow, HostName, Outcome, Reason};
use holdfast_wire::egress::{Kind, Verdict};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    Answer, ResolveError, look_up,
    message::{CLASS_IN, Code, Query},
};
use crate::{
    sandbox::{Because, Sandbox, Subject, turns},
    socket::Socket,
    sys,
};

/// Longest query: a name of 253 bytes and what is around it, with room for options.
const QUERY_BYTES_MAX: usize = 1024;
/// Questions of one sandbox that are on their way at a time.
const QUESTIONS_MAX: usize = 64;
/// Longest answer by TCP.
const TCP_BYTES_MAX: usize = 65_535;
/// Questions on one TCP connection, and how long it may say nothing.
const TCP_QUESTIONS_MAX: usize = 128;
const TCP_IDLE_MAX: Duration = Duration::from_secs(10);

/// A wait after a socket's error.
const ERROR_PAUSE: Duration = Duration::from_millis(5);

/// Serves the UDP socket until the task is aborted.
pub(crate) async fn serve_udp(sandbox: Arc<Sandbox>, socket: AsyncFd<OwnedFd>) {
    let socket = Arc::new(socket);
    let questions = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let mut answers = tokio::task::JoinSet::new();
    let mut buffer = [0; QUERY_BYTES_MAX];
    loop {
        // A flood has no end.
        turns::pause().await;
        let receive = |fd: &OwnedFd| sys::receive(fd.as_fd(), &mut buffer);
        let received = match socket.async_io(Interest::READABLE, receive).await {
            Ok(received) => received,
            Err(error) => {
                // Most often an ICMP error for an answer of ours; if it is not, it may come again.
                log::debug!(sandbox:% = sandbox.id, error:%; "no question received");
                sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        while answers.try_join_next().is_some() {}
        let Ok(query) = Query::read(&buffer[..received.bytes]) else { continue };
        let Some(place) = admit(&sandbox, &questions) else { continue };
        let (sandbox, socket) = (sandbox.clone(), socket.clone());
        let turns = sandbox.turns.clone();
        answers.spawn(turns.task(async move {
            let answer = answer(&sandbox, &query, query.answer_bytes_max).await;
            let _ = reply(&socket, &answer, received.from, received.to).await;
            drop(place);
        }));
    }
}

fn admit(
    sandbox: &Sandbox,
    questions: &Arc<Semaphore>,
) -> Option<tokio::sync::OwnedSemaphorePermit> {
    sandbox.counters.dns_queries.fetch_add(1, Relaxed);
    let per_second = sandbox.group.setup().limits.dns_per_second;
    let fits = sandbox.names.admit_query(per_second, Instant::now());
    let place = fits.then(|| questions.clone().try_acquire_owned().ok()).flatten();
    if place.is_none() {
        sandbox.counters.limited.fetch_add(1, Relaxed);
    }
    place
}

/// Answers from where the question was sent to: the guest looks at that.
async fn reply(
    socket: &AsyncFd<OwnedFd>,
    answer: &[u8],
    to: SocketAddrV4,
    from: Option<SocketAddrV4>,
) -> io::Result<()> {
    let from = from.map(|address| *address.ip());
    socket.async_io(Interest::WRITABLE, |fd| sys::send(fd.as_fd(), answer, to, from)).await
}

/// Serves one connection to port 53.
pub(crate) async fn serve_tcp(sandbox: &Arc<Sandbox>, mut stream: Socket) -> io::Result<()> {
    let questions = Arc::new(Semaphore::new(1));
    for _ in 0..TCP_QUESTIONS_MAX {
        let read = async {
            let length = usize::from(stream.read_u16().await?);
            if length > QUERY_BYTES_MAX {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let mut bytes = vec![0; length];
            stream.read_exact(&mut bytes).await?;
            Ok(bytes)
        };
        let Ok(Ok(bytes)) = timeout(TCP_IDLE_MAX, read).await else { break };
        let Ok(query) = Query::read(&bytes) else { break };
        let Some(_place) = admit(sandbox, &questions) else { break };
        let answer = answer(sandbox, &query, TCP_BYTES_MAX).await;
        let length = u16::try_from(answer.len()).unwrap_or(0);
        let framed = [&length.to_be_bytes(), answer.as_slice()].concat();
        timeout(TCP_IDLE_MAX, stream.write_all(&framed)).await??;
    }
    stream.end_cleanly().await
}

/// The answer to one question, and its place on record.
async fn answer(sandbox: &Arc<Sandbox>, query: &Query, bytes_max: usize) -> Vec<u8> {
    let name = query.name.as_deref().map(HostName::of_wire);
    let about = |address: Option<IpAddr>| Subject {
        host: query.name.as_deref().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase(),
        scheme: "dns",
        address,
        ..Subject::default()
    };
    let rules = sandbox.rules();
    let deny = |because: &Because, code: Code| {
        sandbox.record(Kind::Dns, Verdict::Denied, because, about(None));
        query.error(code)
    };
    let Some(Ok(name)) = name else {
        return deny(&Because::own(rules.generation, "no_name"), Code::Refused);
    };
    if query.class != CLASS_IN {
        return deny(&Because::own(rules.generation, "record_type"), Code::Refused);
    }
    let kind = DnsType::from(query.kind);
    let (because, outcome) = {
        let verdict = netpolicy::decide(&rules.policy, &Flow::Dns { name: &name, kind });
        let because = Because::of(&rules, &verdict);
        let outcome = match (&verdict.outcome, verdict.reason) {
            (Outcome::Deny, Reason::LocalName) => Err(Code::NxDomain),
            // The name may be asked for, and has nothing of this type: the guest tries another.
            (Outcome::Deny, Reason::RecordType) => Err(Code::NoError),
            (Outcome::Deny, _) => Err(Code::Refused),
            _ => Ok(()),
        };
        (because, outcome)
    };
    if let Err(code) = outcome {
        return deny(&because, code);
    }
    let setup = sandbox.group.setup();
    match look_up(sandbox, &setup, &name, query.kind).await {
        Ok(Answer { code, records }) => {
            let first = Answer { code, records: records.clone() }.addresses().next();
            sandbox.record(Kind::Dns, Verdict::Allowed, &because, about(first));
            query.answer(code, &records, bytes_max)
        }
        Err(ResolveError::Denied(denied)) => {
            let address = match denied {
                netpolicy::Denied::Own(address) | netpolicy::Denied::Range { address, .. } => {
                    address
                }
            };
            let because = because.but("rebind");
            sandbox.record(Kind::Dns, Verdict::Denied, &because, about(Some(address)));
            query.error(Code::NxDomain)
        }
        Err(error @ ResolveError::TooManyNames) => {
            deny(&because.but(error.reason()), Code::Refused)
        }
        Err(error) => {
            let because = because.but(error.reason());
            sandbox.record(Kind::Dns, Verdict::Failed, &because, about(None));
            query.error(Code::ServFail)
        }
    }
}
