//! Writes the first inputs of each target, from which cargo-fuzz goes on: `seeds FOLDER` makes
//! `FOLDER/TARGET/seed-N`. Each is a driver, an agent or a client that mostly does what it should.

use std::{env, error::Error, fs, path::Path};

use holdfast_vmm::fuzzing::{Access, Step, accesses, input, state_seed};
use holdfast_wire::{frame, vmm::ToVmm};

const VERSION_1: u64 = 1 << 32;
const EVENT_INDEX: u64 = 1 << 29;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = env::args().nth(1).ok_or("usage: seeds FOLDER")?;
    let scripts: [(&str, Vec<Vec<Step>>); 6] = [
        ("disk", disk()),
        ("read_only_disk", disk()),
        ("rng", rng()),
        ("vsock", vsock()),
        ("network", network()),
        ("balloon", balloon()),
    ];
    for (target, scripts) in scripts {
        let inputs = scripts.into_iter().chain(broken()).map(|steps| input(&steps));
        write(&folder, target, inputs.collect())?;
    }
    write(&folder, "mmio", mmio())?;
    write(&folder, "control", control()?)?;
    let state = state_seed();
    let whole = [&[0][..], &state[1..]].concat();
    // All of a state can be zero.
    let mut states = vec![state, whole, vec![0; 8192], b"\0HFST".to_vec()];
    states.push([&b"\0HFST\x01\0"[..], &[0; 16]].concat());
    states.push([&b"\0HFST\x02\0"[..], &[0; 16]].concat());
    write(&folder, "state", states)?;
    write(&folder, "policy", policies())?;
    Ok(())
}

/// Policies with every field that there is, with what a guest asks under them, and wrong ones.
fn policies() -> Vec<Vec<u8>> {
    let full = r#"{"defaultAction":"Deny","trafficInspection":"Partial","rules":[
        {"name":"a","match":{"host":"a.test","path":"/x*/y","methods":["GET"],"ports":[443]},
         "action":{"type":"Deny"}},
        {"match":{"host":"*.a.test"},"tls":"Open","dnsTypes":["TXT"],"action":{"type":"Transform",
         "allowPlainHttp":true,"headers":[
          {"operation":"Set","name":"A","valueRef":{"secretRef":{"secretId":"s","secretKey":"k",
           "format":"Bearer {value}"}}},
          {"operation":"Insert","name":"B","valueRef":{"managedIdentityRef":{"type":"UserAssigned",
           "resource":"r","identityResourceId":"i","format":"{value}"}}},
          {"operation":"Set","name":"C","value":"v"},{"operation":"Remove","name":"D"}]}},
        {"match":{"host":"*"},"action":{"type":"Rewrite","scheme":"https","host":"b.test",
         "port":8443,"path":"/z"}}],
        "hostRules":[{"pattern":"b\u00fccher.test","action":"Allow","ports":[22]}],
        "cidrRules":[{"name":"c","cidr":"10.0.0.0/8","protocol":"any","ports":[53],"action":"Allow"},
         {"cidr":"2001:db8::/32","protocol":"udp","action":"Deny"}]}"#;
    let under = |host: &str, target: &str, policy: &str| {
        format!("{host}\n{target}\n{}", policy.replace('\n', " ")).into_bytes()
    };
    vec![
        under("a.test", "/x/%2e%2e/x;p//y?q=1", full),
        under("b.a.test.", "/x%2fy\\z", full),
        under("xn--bcher-kva.test", "/%25%32%35", full),
        under("*.test", "*", r#"{"defaultAction":"Allow"}"#),
        under("1.2.3.4", "/a b", r#"{"defaultAction":"allow"}"#),
        under(
            "localhost",
            "/%00",
            r#"{"defaultAction":"Deny","rules":[{"match":{"host":"*.com"}}]}"#,
        ),
    ]
}

fn write(folder: &str, target: &str, inputs: Vec<Vec<u8>>) -> std::io::Result<()> {
    let folder = Path::new(folder).join(target);
    fs::create_dir_all(&folder)?;
    for (number, input) in inputs.into_iter().enumerate() {
        fs::write(folder.join(format!("seed-{number:02}")), input)?;
    }
    Ok(())
}

fn start() -> Step {
    Step::Start { features: VERSION_1 | EVENT_INDEX | 0xffff_ffff }
}

fn request(queue: u8, bytes: Vec<u8>, room: u32) -> Step {
    Step::Request { queue, bytes, piece: 4096, room }
}

/// Drivers that break what holds for every device.
fn broken() -> Vec<Vec<Step>> {
    let describe = |index, address, len, flags, next| Step::Descriptor {
        queue: 0,
        index,
        address,
        len,
        flags,
        next,
    };
    let offer = |head| Step::Offer { queue: 0, head };
    let bad_queue = |size, descriptors, available, used| Step::Queue {
        queue: 0,
        size,
        descriptors,
        available,
        used,
    };
    vec![
        // A chain that ends in itself, one that leads out of the table, one outside of memory.
        vec![start(), describe(0, 0x40000, 16, 1, 0), offer(0), Step::Work],
        vec![start(), describe(0, 0x40000, 16, 1, 99), offer(0), Step::Work],
        vec![start(), describe(0, u64::MAX - 7, 16, 2, 0), offer(0), Step::Work],
        vec![start(), describe(0, 0x40000, u32::MAX, 2, 0), offer(0), Step::Work],
        vec![start(), describe(0, 0x40000, 0, 0, 0), offer(0), Step::Work],
        vec![start(), offer(999), Step::Work],
        // A table in a table, which was not agreed on.
        vec![start(), describe(0, 0x40000, 32, 4, 0), offer(0), Step::Work],
        vec![start(), Step::Index { queue: 0, index: 0x8000 }, Step::Work],
        vec![bad_queue(3, 0x4000, 0x5000, 0x6000), start(), Step::Work],
        vec![bad_queue(16, 0x4001, 0x5000, 0x6000), start(), Step::Work],
        vec![bad_queue(16, 0x4000, u64::MAX, 0x6000), start(), Step::Work],
        // The used ring over the descriptors.
        vec![
            bad_queue(16, 0x4000, 0x5000, 0x4000),
            start(),
            request(0, vec![0; 64], 64),
            Step::Work,
        ],
        vec![Step::Work, Step::Reset, Step::Restore, start(), Step::Restore, Step::Reset],
        vec![
            start(),
            Step::Event { queue: 0, event: 5 },
            request(0, vec![0; 64], 4096),
            Step::Work,
            Step::Store { at: 0x40000, bytes: vec![0xff; 64] },
            request(0, vec![0; 64], 4096),
            Step::Work,
        ],
    ]
}

fn disk() -> Vec<Vec<Step>> {
    let header = |kind: u32, sector: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes
    };
    let with = |kind, sector, data: &[u8]| [header(kind, sector), data.to_vec()].concat();
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let two = [range(0, 8, 0), range(64, 16, 1)].concat();
    let mut scripts = Vec::new();
    for features in [0xffff_ffff, 0] {
        let begin = Step::Start { features: VERSION_1 | features };
        for bytes in [
            with(1, 8, &[7; 512]),
            with(1, 380, &[7; 4096]),
            with(1, u64::MAX, &[7; 512]),
            with(1, 8, &[7; 100]),
            header(4, 0),
            with(11, 0, &two),
            with(13, 0, &two),
            with(11, 0, &range(u64::MAX, 8, 0)),
            with(13, 0, &range(0, u32::MAX, 2)),
            with(11, 0, &[1; 15]),
            header(99, 0),
        ] {
            scripts.push(vec![begin.clone(), request(0, bytes, 1), Step::Work]);
        }
        for (sector, room) in
            [(0, 513), (120, 4097), (508, 4097), (u64::MAX, 513), (0, 100), (0, 1)]
        {
            scripts.push(vec![begin.clone(), request(0, header(0, sector), room), Step::Work]);
        }
        scripts.push(vec![begin.clone(), request(0, header(8, 0), 21), Step::Work]);
        scripts.push(vec![begin.clone(), request(0, header(8, 0), 5), Step::Work]);
        scripts.push(vec![begin.clone(), request(0, header(0, 0), 0), Step::Work]);
        scripts.push(vec![begin, request(0, vec![1; 7], 1), Step::Work]);
    }
    scripts
}

fn rng() -> Vec<Vec<Step>> {
    let ask = |room| vec![start(), request(0, Vec::new(), room), Step::Work];
    vec![ask(16), ask(1 << 16), ask(u32::MAX), vec![start(), request(0, vec![1; 8], 8), Step::Work]]
}

fn packet(op: u16, target_port: u32, len: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(1024u32.to_le_bytes());
    bytes.extend(target_port.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(65536u32.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(data);
    bytes
}

fn vsock() -> Vec<Vec<Step>> {
    /// The first port that a host client gets.
    const HOST: u32 = 1 << 30;
    let room = || request(0, Vec::new(), 4096);
    let send = |bytes| request(1, bytes, 0);
    let begin = || {
        let mut steps = vec![start()];
        steps.extend((0..6).map(|_| room()));
        steps.push(request(2, Vec::new(), 8));
        steps.push(Step::Connect);
        steps.push(Step::Say { client: 0, bytes: b"CONNECT 1024\n".to_vec() });
        steps.push(Step::Work);
        steps
    };
    let mut scripts = Vec::new();
    for port in [HOST, 1024, 1, 2] {
        let mut steps = begin();
        steps.extend([
            send(packet(2, port, 0, 0, b"")),
            Step::Work,
            Step::Say { client: 0, bytes: vec![1; 3000] },
            Step::Work,
            room(),
            Step::Work,
            send(packet(5, port, 5, 0, b"hello")),
            Step::Work,
            Step::Hear { client: 0 },
            send(packet(6, port, 0, 0, b"")),
            send(packet(7, port, 0, 0, b"")),
            Step::Work,
            Step::HangUp { client: 0 },
            Step::Work,
            send(packet(4, port, 0, 3, b"")),
            Step::Work,
            room(),
            Step::Work,
            send(packet(3, port, 0, 0, b"")),
            Step::Work,
        ]);
        scripts.push(steps);
    }
    for packet in [
        packet(1, 1025, 0, 0, b""),
        packet(1, 7, 0, 0, b""),
        packet(9, HOST, 0, 0, b""),
        packet(5, HOST, 1 << 20, 0, b"x"),
        packet(5, HOST, 5, 0, b"hello")[..43].to_vec(),
        vec![0xff; 44],
    ] {
        let mut steps = begin();
        steps.extend([send(packet), Step::Work, room(), Step::Work]);
        scripts.push(steps);
    }
    for text in [&b"CONNECT 99999999999\n"[..], b"GET / HTTP/1.1\n", b"CONNECT 1", b""] {
        let client = Step::Say { client: 0, bytes: text.to_vec() };
        let rest = [Step::Work, Step::HangUp { client: 1 }, Step::Work];
        scripts.push([vec![start(), room(), Step::Connect, client], rest.to_vec()].concat());
    }
    // Saved and restored: the driver hears of it, deals with it, and clients are let in.
    let after = [Step::Restore, Step::Work, Step::Connect, request(2, Vec::new(), 8), Step::Work];
    scripts.push([begin(), after.to_vec(), vec![Step::Work, Step::Reset]].concat());
    scripts.push([begin(), vec![Step::Restore, Step::Work, Step::Reset, start()]].concat());
    scripts
}

fn network() -> Vec<Vec<Step>> {
    const MERGEABLE: u64 = 1 << 15;
    let frame = |flags: u8, gso: u8, header: u16, size: u16, start: u16, length: usize| {
        let mut bytes = vec![flags, gso];
        for number in [header, size, start, 6, 0] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([2, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 8, 0]);
        bytes.resize(12 + length, 0x45);
        bytes
    };
    let mut scripts = Vec::new();
    for features in [0xffff_ffff | VERSION_1, VERSION_1, MERGEABLE | VERSION_1, 0xf | VERSION_1] {
        let begin = Step::Start { features };
        for bytes in [
            frame(0, 0, 0, 0, 0, 60),
            frame(1, 0, 0, 0, 34, 200),
            frame(1, 1, 54, 1448, 34, 4000),
            frame(1, 4, 54, 1448, 34, 4000),
            frame(1, 5, 42, 1448, 34, 4000),
            frame(0xff, 0xff, 0xffff, 0xffff, 0xffff, 100),
            frame(0, 0, 0, 0, 0, 5),
            frame(0, 0, 0, 0, 0, 8000),
        ] {
            scripts.push(vec![begin.clone(), request(1, bytes, 0), Step::Work]);
        }
        for (rooms, room, length) in [(1, 2000, 100), (6, 512, 2000), (1, 64, 2000), (2, 20, 1000)]
        {
            let mut steps = vec![begin.clone()];
            steps.extend((0..rooms).map(|_| request(0, Vec::new(), room)));
            steps.push(Step::Datagram { bytes: vec![7; length] });
            steps.extend([Step::Work, Step::Datagram { bytes: vec![8; 10] }, Step::Work]);
            steps.extend([request(0, Vec::new(), 4096), Step::Work]);
            scripts.push(steps);
        }
        scripts.push(vec![begin, request(0, vec![1; 20], 0), Step::Work, Step::Restore]);
    }
    scripts
}

fn balloon() -> Vec<Vec<Step>> {
    let pages = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
    let mut scripts = Vec::new();
    for queue in 0..2 {
        for numbers in [&[600, 601, 602, 700][..], &[1 << 30], &[], &[0x200, 0x1ff, 0x200]] {
            scripts.push(vec![start(), request(queue, pages(numbers), 0), Step::Work]);
        }
        scripts.push(vec![start(), request(queue, vec![1; 7], 0), Step::Work]);
        scripts.push(vec![start(), request(queue, Vec::new(), 64), Step::Work]);
    }
    let report =
        |address, len| Step::Descriptor { queue: 2, index: 0, address, len, flags: 2, next: 0 };
    for (address, len) in
        [(1 << 20, 1 << 20), (0x1f_f000, 0x2000), ((1 << 20) + 1, 5000), (1 << 40, 4096)]
    {
        scripts.push(vec![
            start(),
            report(address, len),
            Step::Offer { queue: 2, head: 0 },
            Step::Work,
        ]);
    }
    scripts.push(vec![
        Step::Configuration { at: 4, bytes: vec![9, 0, 0, 0] },
        Step::Configuration { at: 0, bytes: vec![9, 0, 0, 0] },
        Step::Configuration { at: 200, bytes: vec![9] },
        start(),
        Step::Restore,
    ]);
    scripts
}

fn mmio() -> Vec<Vec<u8>> {
    let mut inputs = Vec::new();
    for device in 0..3 {
        let start = Access::Start { device, features: VERSION_1 | EVENT_INDEX | 1 << 5 };
        let ask = |write| Access::Ask { queue: 0, len: 64, write };
        inputs.push(vec![
            start.clone(),
            ask(true),
            Access::Pause,
            Access::Restore,
            Access::Resume,
            ask(false),
            Access::Balloon { mib: 1 },
            Access::Pause,
            Access::Write { device, offset: 0x70, bytes: vec![0; 4] },
            Access::Resume,
            start,
        ]);
        // Every register read, and written in either half of its life.
        let reads = (0..0x120).step_by(4).map(|offset| Access::Read { device, offset, bytes: 4 });
        inputs.push(reads.clone().take(40).collect());
        inputs.push(reads.skip(40).collect());
        for status in [1u8, 3, 11, 15] {
            let mut script =
                vec![Access::Write { device, offset: 0x70, bytes: vec![status, 0, 0, 0] }];
            script.extend((0x10..0xc0).step_by(4).map(|offset| {
                let value = if offset == 0x44 { 1 } else { 16 };
                Access::Write { device, offset, bytes: vec![value, 0, 0, 0] }
            }));
            script.push(Access::Read { device, offset: 0x70, bytes: 4 });
            inputs.push(script);
        }
    }
    inputs.push(vec![
        Access::Stray { address: 0xfff, bytes: 4 },
        Access::Read { device: 0, offset: 1, bytes: 3 },
        Access::Write { device: 1, offset: 0x101, bytes: vec![1; 8] },
        Access::Read { device: 1, offset: 0xffff, bytes: 8 },
    ]);
    inputs.iter().map(|script| accesses(script)).collect()
}

fn control() -> Result<Vec<Vec<u8>>, frame::FrameError> {
    let requests = [
        ToVmm::Hello { version: 1 },
        ToVmm::Boot,
        ToVmm::Pause,
        ToVmm::Resume,
        ToVmm::Stats,
        ToVmm::Balloon { target_mib: 7 },
        ToVmm::RenewGeneration,
        ToVmm::Kill,
        ToVmm::Save,
        ToVmm::Restore,
    ];
    let mut inputs = requests.iter().map(frame::encode).collect::<Result<Vec<_>, _>>()?;
    let all = inputs.concat();
    inputs.push(all[..all.len() - 3].to_vec());
    inputs.push(all);
    inputs.push(vec![0xff; 8]);
    inputs.push(vec![4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    Ok(inputs)
}
