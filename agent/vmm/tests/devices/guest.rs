//! The guest's side: this same program, run inside the microVM by `init`.

#[path = "vsock/sys.rs"]
mod sys;

use std::{
    env,
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::{fs::FileExt, net::UnixStream},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use holdfast_wire::vmm::READY_PORT;

/// Ports of the guest's side of these tests.
pub(crate) const ECHO: u32 = 5000;
pub(crate) const COUNT: u32 = 5001;
pub(crate) const POUR: u32 = 5002;
pub(crate) const STOP: u32 = 5003;
pub(crate) const FILL: u32 = 5004;
pub(crate) const FORKED: u32 = 5005;
pub(crate) const LOAD: u32 = 5006;
pub(crate) const FLAGS: u32 = 5007;
pub(crate) const LOST: u32 = 5008;
pub(crate) const RANDOM: u32 = 5009;
pub(crate) const BLOCK: u32 = 5010;
/// Bytes poured out by [`POUR`].
pub(crate) const POURED_BYTES: usize = 3 << 20;
/// Bytes of memory used by [`FILL`] while its client stays.
pub(crate) const FILLED_BYTES: usize = 100 << 20;

pub(crate) fn rest(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes in which a missing, doubled or moved one shows.
pub(crate) fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// To the standard library one stream socket is like another.
fn serve(port: u32, talk: fn(UnixStream)) {
    let listener = sys::listen(port).unwrap();
    thread::spawn(move || {
        loop {
            let stream = sys::accept(&listener).unwrap();
            thread::spawn(move || talk(stream.into()));
        }
    });
}

fn refused(port: u32) -> bool {
    sys::connect(port).unwrap_err().raw_os_error() == Some(libc::ECONNRESET)
}

fn echo(stream: &mut (impl Read + Write)) {
    let mut bytes = [0; 65_536];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        stream.write_all(&bytes[..count]).unwrap();
    }
}

fn count(stream: &mut (impl Read + Write)) {
    let bytes = rest(stream);
    let verdict = if bytes == pattern(bytes.len()) { "as expected" } else { "garbled" };
    stream.write_all(format!("{} {verdict}", bytes.len()).as_bytes()).unwrap();
}

/// Run inside the guest by `init`; anywhere else it has nothing to do.
#[test]
fn serves_as_the_guest() {
    if env::var_os("HOLDFAST_GUEST_ROLE").is_none() {
        return;
    }
    serve(ECHO, |mut stream| echo(&mut stream));
    serve(COUNT, |mut stream| count(&mut stream));
    serve(POUR, |mut stream| stream.write_all(&pattern(POURED_BYTES)).unwrap());
    let stop = sys::listen(STOP).unwrap();
    assert!(refused(READY_PORT + 1));
    println!("another port of the host was refused");
    assert!(refused(READY_PORT));
    sys::accept(&stop).unwrap();
}

/// Run inside the guest by `init-role`; anywhere else it has nothing to do.
#[test]
fn plays_its_part() {
    match env::var("HOLDFAST_GUEST_ROLE").as_deref() {
        Ok("network") => serve_network(),
        Ok("memory") => serve_memory(),
        Ok("processors") => serve_processors(),
        Ok("saved") => serve_saved(),
        _ => return,
    }
    let stop = sys::listen(STOP).unwrap();
    assert!(refused(READY_PORT));
    sys::accept(&stop).unwrap();
}

fn serve_network() {
    let serve = |port: u32, talk: fn(TcpStream)| {
        let listener = TcpListener::bind(("0.0.0.0", u16::try_from(port).unwrap())).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || talk(stream.unwrap()));
            }
        });
    };
    serve(ECHO, |mut stream| echo(&mut stream));
    serve(COUNT, |mut stream| count(&mut stream));
    serve(POUR, |mut stream| stream.write_all(&pattern(POURED_BYTES)).unwrap());
    let socket = UdpSocket::bind(("0.0.0.0", u16::try_from(ECHO).unwrap())).unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 10_000];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&bytes[..count], from).unwrap();
        }
    });
}

fn serve_memory() {
    serve(FILL, |mut stream| {
        let memory = vec![0x5a_u8; FILLED_BYTES];
        stream.write_all(b"filled").unwrap();
        // Until the client leaves.
        let left = stream.read(&mut [0]).unwrap_or(0);
        assert_eq!((left, memory[FILLED_BYTES - 1]), (0, 0x5a));
    });
    serve(FORKED, tell_of_forks);
}

fn tell_of_forks(mut stream: UnixStream) {
    let log = Command::new("/bin/dmesg").output().unwrap().stdout;
    let told = String::from_utf8_lossy(&log).contains("reseeded due to virtual machine fork");
    stream.write_all(if told { b"yes" } else { b"no" }).unwrap();
}

/// Connections that ended by an error, not by their client.
static LOST_CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
/// Blocks written to the disk so far.
static BLOCKS: AtomicUsize = AtomicUsize::new(0);

fn serve_saved() {
    serve(ECHO, |mut stream| {
        let mut bytes = [0; 100];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => return,
                Ok(count) => stream.write_all(&bytes[..count]).unwrap(),
                Err(_) => {
                    LOST_CONNECTIONS.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
        }
    });
    serve(LOST, |mut stream| {
        write!(stream, "{} lost", LOST_CONNECTIONS.load(Ordering::SeqCst)).unwrap();
    });
    serve(RANDOM, |mut stream| {
        let mut bytes = [0; 16];
        fs_err::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
        write!(stream, "{bytes:?}").unwrap();
    });
    serve(FORKED, tell_of_forks);
    // Writes the next block and reads all of them, past every cache.
    serve(BLOCK, |mut stream| {
        let count = BLOCKS.fetch_add(1, Ordering::SeqCst) + 1;
        let disk = fs_err::OpenOptions::new().read(true).write(true).open("/dev/vda").unwrap();
        let block = |number: usize| vec![u8::try_from(number).unwrap(); 4096];
        let at = |number: usize| number as u64 * 4096;
        disk.file().write_all_at(&block(count), at(count)).unwrap();
        disk.sync_all().unwrap();
        for number in 1..=count {
            let mut read = vec![0; 4096];
            disk.file().read_exact_at(&mut read, at(number)).unwrap();
            assert!(read == block(number), "block {number} of {count}");
        }
        write!(stream, "block {count}").unwrap();
    });
}

fn serve_processors() {
    serve(LOAD, |mut stream| {
        let found = thread::available_parallelism().unwrap().get();
        let working: Vec<_> = (0..found).map(|cpu| thread::spawn(move || works_on(cpu))).collect();
        let worked = working.into_iter().filter_map(|it| it.join().unwrap().then_some(())).count();
        stream.write_all(format!("{found} found, {worked} worked").as_bytes()).unwrap();
    });
    serve(FLAGS, |mut stream| {
        let all = fs_err::read_to_string("/proc/cpuinfo").unwrap();
        let flags = all.lines().find(|line| line.starts_with("flags")).unwrap();
        stream.write_all(flags.as_bytes()).unwrap();
    });
}

/// Works on one CPU alone. True: that is where it was.
fn works_on(cpu: usize) -> bool {
    let mut only = rustix::thread::CpuSet::new();
    only.set(cpu);
    rustix::thread::sched_setaffinity(None, &only).unwrap();
    let sum = pattern(1 << 20).iter().map(|byte| u64::from(*byte)).sum::<u64>();
    sum > 0 && rustix::thread::sched_getcpu() == cpu
}
