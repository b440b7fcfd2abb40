//! The link to PID 1 against peers that are not PID 1: each costs its own call, an error and at most
//! one time-out, and no memory to speak of.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_wire::{
    frame::{self, CHUNK_BYTES_MAX, FRAME_BYTES_MAX},
    guest::{Command, Exec, ExecKey, Exited, Info, Output, Start},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::{Instant, sleep, timeout},
};

use super::{
    ExecError, GuestError,
    guest::{ANSWER_PATIENCE, GuestLink},
};

/// What a call with a time-out may take in all: connecting, and one wait.
const TIME_OUTS_MAX: u32 = 2;

/// What the kernel and the link's own buffer may hold of a stream that nobody reads, in bytes.
const UNREAD_BYTES_MAX: u64 = 4 * FRAME_BYTES_MAX as u64;

/// How a peer behaves once a call has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// The VMM's greeting never comes.
    NoGreeting,
    /// It never ends.
    EndlessGreeting,
    /// Another word than OK.
    WrongGreeting,
    /// The connection is closed instead of an answer.
    Closes,
    /// Nothing at all, and nothing is read.
    Silent,
    /// A byte of a frame's length now and then.
    Dribbles,
    /// A frame that announces 4 GiB.
    Huge,
    /// The largest length there may be, and then nothing.
    LargestAndSilent,
    /// Bytes that are no frame's content.
    Garbage,
    /// Half a frame, then the end.
    Cut,
    /// Answers of all kinds that no call wants first.
    WrongOrder(Wrong),
    /// A refusal with as long a message as fits.
    LongRefusal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Processes,
    Exited,
    Taken,
    Gap,
}

const MANNERS: [Manner; 15] = [
    Manner::NoGreeting,
    Manner::EndlessGreeting,
    Manner::WrongGreeting,
    Manner::Closes,
    Manner::Silent,
    Manner::Dribbles,
    Manner::Huge,
    Manner::LargestAndSilent,
    Manner::Garbage,
    Manner::Cut,
    Manner::WrongOrder(Wrong::Processes),
    Manner::WrongOrder(Wrong::Exited),
    Manner::WrongOrder(Wrong::Taken),
    Manner::WrongOrder(Wrong::Gap),
    Manner::LongRefusal,
];

/// Every call that the agent makes.
const CALLS: [&str; 7] =
    ["start", "power off", "info", "exec", "attach", "read a file", "write a file"];

fn exec() -> Exec {
    Exec {
        command: Command::Shell("true".to_owned()),
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        timeout_ms: None,
        keep: None,
    }
}

async fn call(link: &GuestLink, name: &str) -> Result<(), ExecError> {
    match name {
        "start" => link.start(Start::default()).await,
        "power off" => link.power_off(Duration::ZERO).await,
        "info" => link.info().await.map(drop),
        "exec" => link.exec(exec()).await.map(drop),
        "attach" => link.attach(ExecKey([0; 16]), 0).await.map(drop),
        "read a file" => link.read_file("/f".to_owned()).await.map(drop),
        _ => {
            let body = tokio::io::repeat(7).take(64 * 1024 * 1024);
            link.write_file("/f".to_owned(), None, false, body).await
        }
    }
}

/// A link to whatever `serve` makes of each connection.
fn link_to<F>(folder: &Path, serve: impl Fn(UnixStream) -> F + Send + 'static) -> GuestLink
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let path = folder.join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A link that hangs up is what a peer like this comes to.
            tokio::spawn(serve(stream));
        }
    });
    GuestLink::new(path)
}

async fn line(stream: &mut UnixStream) -> std::io::Result<()> {
    while stream.read_u8().await? != b'\n' {}
    Ok(())
}

/// Greets and reads the request.
async fn hear(stream: &mut UnixStream) -> std::io::Result<()> {
    line(stream).await?;
    stream.write_all(b"OK 7\n").await?;
    let length = stream.read_u32_le().await?;
    let mut request = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut request).await.map(drop)
}

async fn say(stream: &mut UnixStream, output: &Output) -> std::io::Result<()> {
    stream.write_all(&frame::encode(output).unwrap()).await
}

/// Ends what is said, for whoever listens, at once. A close does so only once nobody else has the
/// socket, and a child that another test is starting has a copy of it until its exec: meanwhile
/// nothing happens here, and the clock of these tests goes on to the time-out.
async fn hang_up(mut stream: UnixStream) -> std::io::Result<()> {
    stream.shutdown().await
}

/// Keeps the connection open, reading nothing.
async fn hold() -> std::io::Result<()> {
    std::future::pending().await
}

async fn behave(manner: Manner, mut stream: UnixStream) -> std::io::Result<()> {
    match manner {
        Manner::NoGreeting => return hold().await,
        Manner::EndlessGreeting => loop {
            stream.write_all(b"OK 111111111111111").await?;
        },
        Manner::WrongGreeting => {
            line(&mut stream).await?;
            stream.write_all(b"NO 7\n").await?;
            return hold().await;
        }
        _ => hear(&mut stream).await?,
    }
    match manner {
        Manner::Closes => return hang_up(stream).await,
        Manner::Dribbles => loop {
            stream.write_all(&[1]).await?;
            sleep(ANSWER_PATIENCE / 3).await;
            stream.write_all(&[0]).await?;
            sleep(ANSWER_PATIENCE).await;
        },
        Manner::Huge => stream.write_all(&u32::MAX.to_le_bytes()).await?,
        Manner::LargestAndSilent => {
            let length = u32::try_from(FRAME_BYTES_MAX).unwrap();
            stream.write_all(&length.to_le_bytes()).await?;
        }
        Manner::Garbage => {
            stream.write_all(&[9, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255]).await?;
        }
        Manner::Cut => {
            stream.write_all(&[9, 0, 0, 0, 1, 2]).await?;
            return hang_up(stream).await;
        }
        Manner::WrongOrder(Wrong::Processes) => {
            say(&mut stream, &Output::Processes(Vec::new())).await?;
        }
        Manner::WrongOrder(Wrong::Exited) => {
            say(&mut stream, &Output::Exited(Exited::Code(0))).await?;
        }
        Manner::WrongOrder(Wrong::Taken) => {
            say(&mut stream, &Output::Taken { stdin: u64::MAX }).await?;
        }
        Manner::WrongOrder(Wrong::Gap) => {
            say(&mut stream, &Output::Gap { bytes: u64::MAX }).await?;
        }
        Manner::LongRefusal => {
            let failure = holdfast_wire::guest::Failure {
                kind: holdfast_wire::guest::FailureKind::Internal,
                message: "x".repeat(FRAME_BYTES_MAX - 64),
            };
            say(&mut stream, &Output::Failed(failure)).await?;
        }
        _ => {}
    }
    hold().await
}

#[tokio::test(start_paused = true)]
async fn whatever_a_guest_answers_costs_an_error_and_one_time_out_at_most() {
    for manner in MANNERS {
        for name in CALLS {
            let folder = tempfile::tempdir().unwrap();
            let link = link_to(folder.path(), move |stream| behave(manner, stream));
            let began = Instant::now();
            let outcome = timeout(ANSWER_PATIENCE * TIME_OUTS_MAX, call(&link, name)).await;
            let outcome = outcome.unwrap_or_else(|_| panic!("{name} hangs on {manner:?}"));
            assert!(outcome.is_err(), "{name} believes {manner:?}");
            let waits = matches!(
                manner,
                Manner::NoGreeting | Manner::Silent | Manner::Dribbles | Manner::LargestAndSilent
            );
            let waited = began.elapsed() >= ANSWER_PATIENCE;
            assert_eq!(waited, waits, "{name} on {manner:?}: {outcome:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_does_not_hold_up_the_calls_of_another() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let silent = link_to(folder.path(), |stream| behave(Manner::Silent, stream));
    let good = link_to(other.path(), async |mut stream: UnixStream| {
        hear(&mut stream).await?;
        say(&mut stream, &Output::Info(Info::default())).await?;
        hold().await
    });
    let hanging: Vec<_> = (0..100)
        .map(|_| {
            let silent = silent.clone();
            tokio::spawn(async move { silent.info().await })
        })
        .collect();
    let began = Instant::now();
    for _ in 0..100 {
        good.info().await.unwrap();
    }
    assert!(began.elapsed() < ANSWER_PATIENCE);
    for call in hanging {
        let outcome = call.await.unwrap();
        assert!(matches!(outcome, Err(ExecError::Guest(GuestError::Silent { .. }))), "{outcome:?}");
    }
}

/// A peer that answers with `first`, then `rest` for ever, counting what went out.
fn endless(folder: &Path, first: Output, rest: Output) -> (GuestLink, Arc<AtomicU64>) {
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let link = link_to(folder, move |mut stream| {
        let (first, rest, counted) = (first.clone(), rest.clone(), Arc::clone(&counted));
        async move {
            hear(&mut stream).await?;
            say(&mut stream, &first).await?;
            let piece = frame::encode(&rest).unwrap();
            loop {
                let count = stream.write(&piece).await?;
                // Whole frames only: what did not fit follows.
                stream.write_all(&piece[count..]).await?;
                counted.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        }
    });
    (link, sent)
}

/// Until nothing moves any more.
async fn at_rest(sent: &AtomicU64) -> u64 {
    loop {
        let before = sent.load(Ordering::Relaxed);
        sleep(Duration::from_secs(1)).await;
        let after = sent.load(Ordering::Relaxed);
        if before == after {
            return after;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn output_without_end_waits_for_its_reader_and_fills_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let started = Output::Started { pid: 1, kept: true, stdin_taken: 0 };
    let piece = Output::Stdout(vec![b'x'; CHUNK_BYTES_MAX]);
    let (link, sent) = endless(folder.path(), started, piece);
    let mut session = link.exec(exec()).await.unwrap();
    for read in 0..100_u64 {
        let unread = at_rest(&sent).await - read * CHUNK_BYTES_MAX as u64;
        assert!(unread < UNREAD_BYTES_MAX, "{unread} bytes are held");
        assert!(matches!(session.next().await, Ok(Some(Output::Stdout(_)))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_without_end_and_an_exec_that_breaks_its_word_end_with_their_reader() {
    let folder = tempfile::tempdir().unwrap();
    let piece = Output::Data(vec![b'x'; CHUNK_BYTES_MAX]);
    let (link, sent) = endless(folder.path(), Output::File { size: 3, mode: 0 }, piece);
    let mut file = link.read_file("/f".to_owned()).await.unwrap();
    assert_eq!(file.size, 3);
    for _ in 0..100 {
        assert_eq!(file.next().await.unwrap().map(|bytes| bytes.len()), Some(CHUNK_BYTES_MAX));
    }
    drop(file);
    let after = at_rest(&sent).await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(sent.load(Ordering::Relaxed), after, "nobody is sent to any more");

    let folder = tempfile::tempdir().unwrap();
    let started = Output::Started { pid: 1, kept: false, stdin_taken: 0 };
    let (link, _) = endless(folder.path(), started.clone(), started);
    let mut session = link.exec(exec()).await.unwrap();
    let broken = session.next().await;
    assert!(matches!(broken, Err(GuestError::Unexpected { got: "Started", .. })), "{broken:?}");
}
