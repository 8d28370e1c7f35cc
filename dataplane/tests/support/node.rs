//! A node on a real kernel: network namespaces for it and its pods, a pin folder, and what the kernel knows of its programs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use aya::{
    TestRun as _, TestRunOptions,
    programs::{ProgramInfo, SchedClassifier, Xdp, links::PinnedLink, loaded_programs},
};
use aya_obj::programs::XdpAttachType;
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns},
};
use weir_dataplane::attach::{Attachment, TrunkSettings, detach};
use weir_packet::Mac;

pub fn skipped() -> bool {
    let skipped = env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1");
    if skipped {
        eprintln!("skipped: WEIR_SKIP_E2E=1");
    } else {
        assert!(nix::unistd::geteuid().is_root(), "needs root (WEIR_SKIP_E2E=1 skips it)");
    }
    skipped
}

/// Runs a shell command; its standard output.
pub fn shell(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().expect("sh starts");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the output is text")
}

/// A network namespace, deleted on drop.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("weir-attach-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        shell(&format!("ip netns add {name}"));
        let namespace = Self { name };
        namespace.shell("ip link set lo up");
        namespace
    }

    pub fn shell(&self, command: &str) -> String {
        self.run(|| shell(command))
    }

    /// Runs `work` on a thread that is in this namespace.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let path = format!("/run/netns/{}", self.name);
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    let namespace = fs::File::open(path).expect("the namespace exists");
                    setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter it");
                    work()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// A node: a namespace for the router, and its pin folder.
pub struct Node {
    pub namespace: Namespace,
    pub pins: PathBuf,
}

impl Node {
    pub fn new() -> Self {
        let namespace = Namespace::new();
        let pins = Path::new("/sys/fs/bpf").join(&namespace.name);
        Self { namespace, pins }
    }

    pub fn settings(&self) -> TrunkSettings {
        TrunkSettings { queues: 2, mtu: 1500, flows: None, pin_dir: self.pins.clone() }
    }

    pub fn open(&self) -> Attachment {
        Attachment::open(self.settings()).expect("the trunk attaches")
    }

    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.namespace.run(work)
    }

    /// A veth pair: `host` here, eth0 in `there`.
    pub fn connect(&self, host: &str, there: &Namespace) {
        self.namespace
            .shell(&format!("ip link add {host} type veth peer name eth0 netns {}; ip link set {host} up", there.name));
        there.shell("ip link set eth0 up");
    }

    /// A pod with 10.7.0.5 as address and a default route, as Calico sets it up.
    pub fn pod(&self, host: &str) -> Namespace {
        let pod = Namespace::new();
        self.connect(host, &pod);
        pod.shell(
            "ip addr add 10.7.0.5/32 dev eth0; ip route add 169.254.1.1 dev eth0 scope link; \
             ip route add default via 169.254.1.1; \
             ip neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
        );
        pod
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let result = thread::scope(|scope| scope.spawn(|| self.run(|| detach(&self.pins))).join());
        if !thread::panicking() {
            result.expect("detach does not panic").expect("detach cleans up");
        } else {
            let _ = fs::remove_dir_all(&self.pins);
        }
    }
}

pub fn index_of(device: &str) -> u32 {
    if_nametoindex(device).unwrap_or_else(|error| panic!("{device}: {error}"))
}

pub fn mac_of(namespace: &Namespace, device: &str) -> Mac {
    let text = namespace.shell(&format!("ip -br link show dev {device}"));
    text.split_whitespace().nth(2).expect("the third column is the MAC").parse().expect("a MAC address")
}

pub fn program_of(link: &Path) -> u32 {
    info_of(link).1
}

/// The id of a pinned link, and of its program.
pub fn info_of(link: &Path) -> (u32, u32) {
    let pinned = PinnedLink::from_pin(link).expect("the link is pinned");
    let info = aya::programs::links::FdLink::from(pinned).info().expect("the kernel knows it");
    (info.id(), info.program_id())
}

/// The program of a pinned link.
pub fn program_info(link: &Path) -> ProgramInfo {
    let id = program_of(link);
    loaded_programs()
        // Others', of who tests beside, may go while they are listed.
        .filter_map(Result::ok)
        .find(|info| info.id() == id)
        .expect("the program is loaded")
}

/// The XDP program of a pinned link.
pub fn xdp_program(link: &Path) -> Xdp {
    Xdp::from_program_info(program_info(link), "xdp".into(), XdpAttachType::Interface).expect("it is an XDP program")
}

/// What a program returns for a frame that arrived on a queue (BPF_PROG_TEST_RUN).
pub fn run_xdp(program: &Xdp, frame: &[u8], device: u32, queue: u32) -> u32 {
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, frame.len() as u32, 0, device, queue, 0].map(u32::to_ne_bytes).concat();
    let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), ..TestRunOptions::new() };
    program.test_run(options).expect("a test run").return_value
}

/// The tc program of a pinned link.
pub fn tc_program(link: &Path) -> SchedClassifier {
    SchedClassifier::from_program_info(program_info(link), "tc".into()).expect("it is a tc program")
}

/// What a program returns for a frame that has come in (BPF_PROG_TEST_RUN).
pub fn run_tc(program: &SchedClassifier, frame: &[u8]) -> u32 {
    let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() };
    program.test_run(options).expect("a test run").return_value
}
