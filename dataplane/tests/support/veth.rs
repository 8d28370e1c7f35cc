//! Veth pairs in a network namespace of the test's own, an XDP program that hands every frame to AF_XDP, and a packet socket on the
//! far ends. Unsafe is used for the packet socket's address only, which nix cannot build.

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use aya::{
    Ebpf,
    maps::XskMap,
    programs::{Xdp, xdp::XdpMode},
};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout, SndBufForce},
        },
        time::{TimeVal, TimeValLike},
    },
    unistd::geteuid,
};
use weir_dataplane::frame::IfIndex;
use weir_packet::Mac;

/// The EtherType of the tests' frames: for local experiments (IEEE 802).
pub const TEST_ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// Whether tests that need privileges are to be left out.
pub fn skipped() -> bool {
    std::env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1")
}

/// Moves this thread into a new network namespace. It has no name, and ends with the last of its threads and sockets, whatever becomes of
/// the test.
pub fn enter_namespace() {
    assert!(geteuid().is_root(), "this test needs root; WEIR_SKIP_E2E=1 leaves it out");
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    // The kernel would send router solicitations into the tests' devices.
    for which in ["all", "default"] {
        let path = format!("/proc/thread-self/root/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        if Path::new(&path).exists() {
            std::fs::write(&path, "1").expect("IPv6 is turned off in the namespace");
        }
    }
}

/// Runs `ip` in the thread's namespace.
pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("the ip command");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A veth pair: `near`, whose frames go to AF_XDP, and `far`, where the test sends and receives.
pub struct Veth {
    pub near: String,
    pub far: String,
    pub index: IfIndex,
    pub mac: Mac,
    program: Ebpf,
}

impl Veth {
    /// Makes `{name}n` and `{name}f` with this number of queues each, and attaches the program.
    pub fn new(name: &str, queues: u32, mac: Mac) -> Self {
        let (near, far) = (format!("{name}n"), format!("{name}f"));
        let queues = format!("numtxqueues {queues} numrxqueues {queues}");
        ip(&format!("link add {near} address {mac} {queues} type veth peer name {far} {queues}"));
        let mut program = Ebpf::load(redirect_program()).expect("the XDP program");
        let redirect: &mut Xdp = program.program_mut("redirect").unwrap().try_into().unwrap();
        redirect.load().expect("the XDP program loads");
        redirect.attach(&near, XdpMode::Driver).expect("the XDP program is attached");
        ip(&format!("link set {near} up"));
        ip(&format!("link set {far} up"));
        let index = IfIndex(if_nametoindex(near.as_str()).unwrap());
        Self { near, far, index, mac, program }
    }

    /// Hands the frames of `queue` to `socket`.
    pub fn redirect(&mut self, queue: u32, socket: impl AsRawFd) {
        let mut sockets: XskMap<_> = self.program.map_mut("sockets").unwrap().try_into().unwrap();
        sockets.set(queue, socket, 0).expect("the socket enters the XSKMAP");
    }

    /// A packet socket on the far end.
    pub fn wire(&self) -> Wire {
        Wire::open(&self.far)
    }
}

/// A minimal program: all frames to the socket of their queue, nothing to the kernel.
fn redirect_program() -> &'static [u8] {
    static OBJECT: OnceLock<Vec<u8>> = OnceLock::new();
    const SOURCE: &str = r#"
        #include <linux/bpf.h>
        #define SECTION(name) __attribute__((section(name), used))
        struct {
            int (*type)[BPF_MAP_TYPE_XSKMAP];
            int (*max_entries)[16];
            __u32 *key;
            __u32 *value;
        } sockets SECTION(".maps");
        static long (*redirect_map)(void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;
        SECTION("xdp.frags") int redirect(struct xdp_md *context) {
            return redirect_map(&sockets, context->rx_queue_index, XDP_DROP);
        }
        char license_text[] SECTION("license") = "Dual MIT/GPL";
    "#;
    OBJECT.get_or_init(|| {
        let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("redirect-{}", std::process::id()));
        let (source, object) = (base.with_extension("c"), base.with_extension("o"));
        std::fs::write(&source, SOURCE).unwrap();
        let output = Command::new("clang")
            .args(["-O2", "-g", "-target", "bpf", "-c"])
            .arg(format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH))
            .arg(&source)
            .arg("-o")
            .arg(&object)
            .output()
            .expect("clang");
        assert!(output.status.success(), "clang: {}", String::from_utf8_lossy(&output.stderr));
        let bytes = std::fs::read(&object).unwrap();
        for file in [source, object] {
            std::fs::remove_file(file).unwrap();
        }
        bytes
    })
}

/// Sends and receives whole frames on a device, through the kernel.
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    fn open(device: &str) -> Self {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&socket, RcvBufForce, &(64 << 20)).unwrap();
        setsockopt(&socket, SndBufForce, &(64 << 20)).unwrap();
        setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(1000)).unwrap();
        let on: libc::c_int = 1;
        // SAFETY: the option's value is one int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_IGNORE_OUTGOING,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as u32,
            )
        };
        assert_eq!(result, 0, "PACKET_IGNORE_OUTGOING: {}", io::Error::last_os_error());
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: if_nametoindex(device).unwrap() as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a whole sockaddr_ll, which outlives the call.
        let result = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        assert_eq!(result, 0, "bind: {}", io::Error::last_os_error());
        Self { socket }
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!(send(self.socket.as_raw_fd(), frame, MsgFlags::empty()), Ok(frame.len()));
    }

    /// The next frame, waiting for it up to a second.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 16384];
        let len = recv(self.socket.as_fd().as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()?;
        Some(buffer[..len].to_vec())
    }

    /// Whether nothing comes for `time`.
    pub fn is_silent(&self, time: Duration) -> bool {
        setsockopt(&self.socket, ReceiveTimeout, &TimeVal::microseconds(time.as_micros() as i64)).unwrap();
        let silent = self.receive().is_none();
        setsockopt(&self.socket, ReceiveTimeout, &TimeVal::milliseconds(1000)).unwrap();
        silent
    }
}

/// A test's frame: Ethernet header, number, and `payload_bytes` bytes that depend on it.
pub fn frame(destination: Mac, source: Mac, number: u32, payload_bytes: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(18 + payload_bytes);
    frame.extend(destination.0);
    frame.extend(source.0);
    frame.extend(TEST_ETHER_TYPE);
    frame.extend(number.to_be_bytes());
    frame.extend((0..payload_bytes).map(|i| (number as usize + i) as u8));
    frame
}
