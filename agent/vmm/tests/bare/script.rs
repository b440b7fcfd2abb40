//! A guest that carries out a list of stores, loads and waits: whatever a hostile driver could do to
//! its memory and its devices, one access after the other, written down in Rust.

/// Where the code lies, and behind it the list.
const CODE: u32 = 0x10_0000;
const LIST: u32 = 0x10_0100;
const RECORD_BYTES: u32 = 12;
/// Counters of loops, a word each.
const COUNTERS: u32 = 0x18_0000;

/// Windows of devices, and what is at their registers (virtio 1.2, section 4.2.2).
const WINDOWS: u32 = 0xd000_0000;
const WINDOW_BYTES: u32 = 0x1000;
pub(crate) const FEATURES: u32 = 0x20;
pub(crate) const FEATURES_PAGE: u32 = 0x24;
pub(crate) const QUEUE: u32 = 0x30;
pub(crate) const QUEUE_SIZE: u32 = 0x38;
pub(crate) const QUEUE_READY: u32 = 0x44;
pub(crate) const NOTIFY: u32 = 0x50;
pub(crate) const STATUS: u32 = 0x70;
pub(crate) const DESCRIPTORS: u32 = 0x80;
pub(crate) const AVAILABLE: u32 = 0x90;
pub(crate) const USED: u32 = 0xa0;
pub(crate) const STARTED: u32 = 15;

/// Entries of a queue.
pub(crate) const ENTRIES: u32 = 16;
/// Buffers of attacks.
pub(crate) const BUFFERS: u32 = 0x100_0000;

/// Reads the record at ESI and does what it says: 0, 1, 2 store 4, 2, 1 bytes; 3 writes a port; 4
/// loads; 5 counts down and goes back; 6 and 7 wait until there are these 2 or 4 bytes.
///
/// ```text
///         mov esi, LIST
/// next:   mov eax, [esi]; mov edi, [esi+4]; mov ecx, [esi+8]; add esi, 12
///         cmp eax, 1; jb store32; je store16
///         cmp eax, 3; jb store8; je port
///         cmp eax, 5; jb load; je again; cmp eax, 7; je wait32
/// wait:   cmp [edi], cx; jne wait; jmp next
/// store32: mov [edi], ecx; jmp next      store16: mov [edi], cx; jmp next
/// store8:  mov [edi], cl; jmp next       port: mov edx, edi; mov al, cl; out dx, al; jmp next
/// load:    mov eax, [edi]; jmp next      again: dec dword [edi]; je next; mov esi, ecx; jmp next
/// wait32:  cmp [edi], ecx; jne wait32; jmp next
/// ```
const INTERPRETER: [u8; 87] = [
    0xbe, 0x00, 0x01, 0x10, 0x00, 0x8b, 0x06, 0x8b, 0x7e, 0x04, 0x8b, 0x4e, 0x08, 0x83, 0xc6, 0x0c,
    0x83, 0xf8, 0x01, 0x72, 0x1c, 0x74, 0x1e, 0x83, 0xf8, 0x03, 0x72, 0x1e, 0x74, 0x20, 0x83, 0xf8,
    0x05, 0x72, 0x22, 0x74, 0x24, 0x83, 0xf8, 0x07, 0x74, 0x27, 0x66, 0x3b, 0x0f, 0x75, 0xfb, 0xeb,
    0xd4, 0x89, 0x0f, 0xeb, 0xd0, 0x66, 0x89, 0x0f, 0xeb, 0xcb, 0x88, 0x0f, 0xeb, 0xc7, 0x89, 0xfa,
    0x88, 0xc8, 0xee, 0xeb, 0xc0, 0x8b, 0x07, 0xeb, 0xbc, 0xff, 0x0f, 0x74, 0xb8, 0x89, 0xce, 0xeb,
    0xb4, 0x3b, 0x0f, 0x75, 0xfc, 0xeb, 0xae,
];

/// The list, as it grows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Script {
    records: Vec<[u32; 3]>,
    loops: u32,
}

/// One queue of one device, set up as it should be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ring {
    pub(crate) device: u32,
    pub(crate) queue: u32,
}

impl Ring {
    /// Where its descriptors are; the rings are one and two pages behind.
    pub(crate) fn base(self) -> u32 {
        0x20_0000 + self.device * 0x1_0000 + self.queue * 0x4000
    }

    pub(crate) fn available(self) -> u32 {
        self.base() + 0x1000
    }

    pub(crate) fn used(self) -> u32 {
        self.base() + 0x2000
    }
}

impl Script {
    fn add(&mut self, what: u32, at: u32, value: u32) -> &mut Self {
        self.records.push([what, at, value]);
        self
    }

    pub(crate) fn store(&mut self, at: u32, value: u32) -> &mut Self {
        self.add(0, at, value)
    }

    pub(crate) fn store16(&mut self, at: u32, value: u16) -> &mut Self {
        self.add(1, at, value.into())
    }

    pub(crate) fn store8(&mut self, at: u32, value: u8) -> &mut Self {
        self.add(2, at, value.into())
    }

    pub(crate) fn out(&mut self, port: u16, value: u8) -> &mut Self {
        self.add(3, port.into(), value.into())
    }

    pub(crate) fn load(&mut self, at: u32) -> &mut Self {
        self.add(4, at, 0)
    }

    /// Waits until there is this number.
    pub(crate) fn wait16(&mut self, at: u32, value: u16) -> &mut Self {
        self.add(6, at, value.into())
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_until_broken(&mut self, device: u32) -> &mut Self {
        const NEEDS_RESET: u32 = 64;
        self.add(7, WINDOWS + device * WINDOW_BYTES + STATUS, STARTED | NEEDS_RESET)
    }

    /// Does it so many times.
    pub(crate) fn repeat(&mut self, times: u32, body: impl FnOnce(&mut Self)) -> &mut Self {
        let counter = COUNTERS + 4 * self.loops;
        self.loops += 1;
        self.store(counter, times);
        let start = LIST + RECORD_BYTES * u32::try_from(self.records.len()).unwrap();
        body(self);
        self.add(5, counter, start)
    }

    pub(crate) fn bytes(&mut self, at: u32, bytes: &[u8]) -> &mut Self {
        for (offset, byte) in (0..).zip(bytes) {
            self.store8(at + offset, *byte);
        }
        self
    }

    pub(crate) fn print(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes() {
            self.out(0x3f8, byte);
        }
        self
    }

    /// A register of a device.
    pub(crate) fn register(&mut self, device: u32, register: u32, value: u32) -> &mut Self {
        self.store(WINDOWS + device * WINDOW_BYTES + register, value)
    }

    pub(crate) fn read_register(&mut self, device: u32, register: u32) -> &mut Self {
        self.load(WINDOWS + device * WINDOW_BYTES + register)
    }

    /// Up to the point at which queues are set up, with these features of the first 32.
    pub(crate) fn begin(&mut self, device: u32, features: u32) -> &mut Self {
        self.register(device, STATUS, 0).register(device, STATUS, 3);
        for (page, half) in [(0, features), (1, 1)] {
            self.register(device, FEATURES_PAGE, page).register(device, FEATURES, half);
        }
        self.register(device, STATUS, 11)
    }

    /// One queue as it should be, empty.
    pub(crate) fn queue(&mut self, ring: Ring) -> &mut Self {
        let Ring { device, queue } = ring;
        self.store(ring.available(), 0).store(ring.used(), 0);
        self.register(device, QUEUE, queue).register(device, QUEUE_SIZE, ENTRIES);
        for (register, at) in
            [(DESCRIPTORS, ring.base()), (AVAILABLE, ring.available()), (USED, ring.used())]
        {
            self.register(device, register, at).register(device, register + 4, 0);
        }
        self.register(device, QUEUE_READY, 1)
    }

    /// All of a driver's start, with so many queues.
    pub(crate) fn start(&mut self, device: u32, features: u32, queues: u32) -> &mut Self {
        self.begin(device, features);
        for queue in 0..queues {
            self.queue(Ring { device, queue });
        }
        self.register(device, STATUS, STARTED)
    }

    pub(crate) fn descriptor(
        &mut self,
        ring: Ring,
        index: u32,
        address: u64,
        (len, flags, next): (u32, u16, u16),
    ) -> &mut Self {
        let at = ring.base() + 16 * index;
        let [low, high] =
            [address & 0xffff_ffff, address >> 32].map(|it| u32::try_from(it).unwrap());
        self.store(at, low).store(at + 4, high).store(at + 8, len);
        self.store16(at + 12, flags).store16(at + 14, next)
    }

    /// Makes the chain at `head` the request with this number, counted from 0, and kicks.
    pub(crate) fn offer(&mut self, ring: Ring, number: u32, head: u16) -> &mut Self {
        self.store16(ring.available() + 4 + 2 * (number % ENTRIES), head);
        let offered = u16::try_from((number + 1) & 0xffff).unwrap();
        self.store16(ring.available() + 2, offered);
        self.register(ring.device, NOTIFY, ring.queue)
    }

    /// Says that it lives, and switches off.
    pub(crate) fn end(&mut self) -> &mut Self {
        self.print("alive").out(0x600, 5 << 2 | 1 << 5)
    }

    /// The kernel's code.
    pub(crate) fn code(&self) -> Vec<u8> {
        let mut code = INTERPRETER.to_vec();
        code.resize(usize::try_from(LIST - CODE).unwrap(), 0);
        code.extend(self.records.iter().flatten().flat_map(|word| word.to_le_bytes()));
        assert!(code.len() < usize::try_from(COUNTERS - CODE).unwrap(), "the list is too long");
        code
    }
}
