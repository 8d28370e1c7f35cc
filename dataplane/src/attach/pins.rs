//! The pin folder: where links and maps stay when the router goes.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt, unix::process::parent_id},
    path::{Path, PathBuf},
};

use aya::{
    maps::{Array, Map, MapData},
    programs::{
        MultiProgLink, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, LinkError, LinkOrder, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
    sys::SyscallError,
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::error::{AttachError, map_error};

/// Where the BPF file system is mounted by custom.
const BPF_MOUNT: &str = "/sys/fs/bpf";
const WORKLOAD: &str = "workload_";
const UPLINK_XDP: &str = "uplink_";
const UPLINK_TC: &str = "uplink_carry_";
const UPLINK_ANSWER: &str = "uplink_answer_";
const DEVICE_TAKE: &str = "device_take_";
const DEVICE_ANSWER: &str = "device_answer_";
const SOCKETS: &str = "sockets_";

/// A pin folder that belongs to this process alone, while it lives.
#[derive(Debug)]
pub(super) struct Pins {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Opens the folder, and makes it (and the mount at the customary place) where it is missing.
    pub(super) fn open(dir: &Path) -> Result<Self, AttachError> {
        if dir.starts_with(BPF_MOUNT) {
            mount_bpf()?;
        }
        // Whether it is a BPF file system is asked of what exists, before anything is made in a wrong place.
        let exists = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        if !is_bpf(exists) {
            return Err(AttachError::NotBpf { path: dir.to_owned() });
        }
        fs::create_dir_all(dir).map_err(pin_error(dir))?;
        Self::lock(dir)
    }

    /// Opens the folder if there is one.
    pub(super) fn existing(dir: &Path) -> Result<Option<Self>, AttachError> {
        if !dir.is_dir() {
            // Not to be seen is not to be absent.
            if dir.starts_with(BPF_MOUNT) && !is_bpf(Path::new(BPF_MOUNT)) && has_own_mounts() {
                return Err(AttachError::PrivateMounts { path: BPF_MOUNT });
            }
            return Ok(None);
        }
        if !is_bpf(dir) {
            return Err(AttachError::NotBpf { path: dir.to_owned() });
        }
        Self::lock(dir).map(Some)
    }

    fn lock(dir: &Path) -> Result<Self, AttachError> {
        let folder = File::open(dir).map_err(pin_error(dir))?;
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(AttachError::InUse { path: dir.to_owned() }),
            Err((_, errno)) => Err(pin_error(dir)(errno.into())),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn trunk_receive(&self) -> PathBuf {
        self.dir.join("trunk_receive")
    }

    pub(super) fn trunk_deliver(&self) -> PathBuf {
        self.dir.join("trunk_deliver")
    }

    pub(super) fn host_send(&self) -> PathBuf {
        self.dir.join("trunk_host_send")
    }

    pub(super) fn loopback_send(&self) -> PathBuf {
        self.dir.join("trunk_loopback_send")
    }

    pub(super) fn workload(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{WORKLOAD}{index}"))
    }

    pub(super) fn uplink_xdp(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{UPLINK_XDP}{index}"))
    }

    pub(super) fn uplink_tc(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{UPLINK_TC}{index}"))
    }

    pub(super) fn uplink_answer(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{UPLINK_ANSWER}{index}"))
    }

    pub(super) fn kernel_device_take(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{DEVICE_TAKE}{index}"))
    }

    pub(super) fn kernel_device_answer(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{DEVICE_ANSWER}{index}"))
    }

    pub(super) fn trunk_sockets(&self) -> PathBuf {
        self.dir.join("sockets_trunk")
    }

    pub(super) fn uplink_sockets(&self, index: u32) -> PathBuf {
        self.dir.join(format!("{SOCKETS}{index}"))
    }

    /// Indexes of the devices that have a workload's link.
    pub(super) fn workloads(&self) -> Result<Vec<u32>, AttachError> {
        self.indexes(WORKLOAD)
    }

    /// Indexes of the devices that have an uplink's link.
    pub(super) fn uplinks(&self) -> Result<Vec<u32>, AttachError> {
        self.indexes_of(&[UPLINK_XDP, UPLINK_TC, UPLINK_ANSWER])
    }

    /// Indexes of the devices of the kernel's own that have a link.
    pub(super) fn kernel_devices(&self) -> Result<Vec<u32>, AttachError> {
        self.indexes_of(&[DEVICE_TAKE, DEVICE_ANSWER])
    }

    fn indexes_of(&self, prefixes: &[&str]) -> Result<Vec<u32>, AttachError> {
        let all: Vec<Vec<u32>> = prefixes.iter().map(|prefix| self.indexes(prefix)).collect::<Result<_, _>>()?;
        let mut indexes = all.concat();
        indexes.sort_unstable();
        indexes.dedup();
        Ok(indexes)
    }

    fn indexes(&self, prefix: &str) -> Result<Vec<u32>, AttachError> {
        let mut indexes: Vec<u32> =
            self.names()?.iter().filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect();
        indexes.sort_unstable();
        Ok(indexes)
    }

    /// Names of all pins.
    pub(super) fn names(&self) -> Result<Vec<String>, AttachError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(pin_error(&self.dir))? {
            let name = entry.map_err(pin_error(&self.dir))?.file_name();
            names.push(name.to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Whether the pins belong to a router of another network namespace that still exists. Those of one that is gone
    /// are removed.
    pub(super) fn check_namespace(&self) -> Result<(), AttachError> {
        let path = self.dir.join("identity");
        if !path.exists() {
            return Ok(());
        }
        let pinned = MapData::from_pin(&path).and_then(Map::from_map_data).map_err(map_error("identity"))?;
        let identity = Array::<_, u64>::try_from(pinned).map_err(map_error("identity"))?;
        let owner = identity.get(&0, 0).map_err(map_error("identity"))?;
        // 0: the process that made the map ended before it could say whose it is.
        if owner == 0 || owner == namespace()? {
            return Ok(());
        }
        if is_alive(&self.trunk_deliver())? {
            return Err(AttachError::OtherNamespace { path: self.dir.clone() });
        }
        self.remove_all().map(drop)
    }

    /// Removes all pins; their names. Links are removed first and are off when this returns.
    pub(super) fn remove_all(&self) -> Result<Vec<String>, AttachError> {
        let names = self.names()?;
        let is_link =
            |name: &&String| [WORKLOAD, UPLINK_XDP, "trunk_", "device_"].iter().any(|prefix| name.starts_with(prefix));
        for name in names.iter().filter(is_link) {
            unpin_link(&self.dir.join(name))?;
        }
        for name in names.iter().filter(|name| !is_link(name)) {
            let path = self.dir.join(name);
            fs::remove_file(&path).map_err(pin_error(&path))?;
        }
        Ok(names)
    }
}

/// The inode number of the calling thread's network namespace.
pub(super) fn namespace() -> Result<u64, AttachError> {
    let path = Path::new("/proc/thread-self/ns/net");
    Ok(fs::metadata(path).map_err(pin_error(path))?.ino())
}

/// Removes a link's pin. With the last of its file descriptors closed here, and not by the file system's own clean-up,
/// the program is off the device when this returns. False: there was none.
pub(super) fn unpin_link(path: &Path) -> Result<bool, AttachError> {
    match pinned(path)? {
        Some(link) => link.unpin().map(|_| true).map_err(pin_error(path)),
        None => Ok(false),
    }
}

/// Removes a map's pin.
pub(super) fn unpin_map(path: &Path) -> Result<(), AttachError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pin_error(path)(error)),
        _ => Ok(()),
    }
}

/// Attaches `program` to a device in native mode and pins the link; a link that is pinned already gets the program in
/// the old one's place, without a packet between them.
pub(super) fn attach_xdp(
    program: &mut Xdp,
    program_name: &'static str,
    index: u32,
    device: &str,
    pin: &Path,
) -> Result<(), AttachError> {
    let failed = |source| xdp_error(program_name, device, source);
    if let Some(link) = pinned(pin)? {
        let link = XdpLink::try_from(FdLink::from(link)).map_err(link_error(pin))?;
        match program.attach_to_link(link) {
            Ok(id) => return program.take_link(id).map(drop).map_err(failed),
            Err(error) if errno(&error) == Some(Errno::ENOLINK) => unpin_map(pin)?,
            Err(error) => return Err(failed(error)),
        }
    }
    let id = program.attach_to_if_index(index, XdpMode::Driver).map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    keep(link.try_into().map_err(link_error(pin))?, pin)
}

/// The same for a tc program, which goes to the front of the device's programs at that hook.
pub(super) fn attach_tcx(
    program: &mut SchedClassifier,
    program_name: &'static str,
    device: &str,
    hook: TcAttachType,
    pin: &Path,
) -> Result<(), AttachError> {
    let failed = |source| tcx_error(program_name, device, source);
    if let Some(link) = pinned(pin)? {
        let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(link_error(pin))?;
        match program.attach_to_link(link) {
            Ok(id) => return program.take_link(id).map(drop).map_err(failed),
            Err(error) if errno(&error) == Some(Errno::ENOLINK) => unpin_map(pin)?,
            Err(error) => return Err(failed(error)),
        }
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(device, hook, options).map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    keep(link.try_into().map_err(link_error(pin))?, pin)
}

fn keep(link: FdLink, pin: &Path) -> Result<(), AttachError> {
    link.pin(pin).map(drop).map_err(|error| pin_error(pin)(io::Error::other(super::error::chain(&error))))
}

fn pinned(path: &Path) -> Result<Option<PinnedLink>, AttachError> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link)),
        Err(LinkError::SyscallError(SyscallError { io_error, .. })) if io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(link_error(path)(error)),
    }
}

/// Whether the device of a pinned tc link still exists. The kernel sets a link's device index to 0 when it goes.
fn is_alive(path: &Path) -> Result<bool, AttachError> {
    let Some(link) = pinned(path)? else { return Ok(false) };
    let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(link_error(path))?;
    let descriptor = link.fd().map_err(link_error(path))?.as_raw_fd();
    let info = PathBuf::from(format!("/proc/self/fdinfo/{descriptor}"));
    let text = fs::read_to_string(&info).map_err(pin_error(&info))?;
    Ok(text.lines().filter_map(|line| line.strip_prefix("ifindex:")).any(|index| index.trim() != "0"))
}

/// Mounts the BPF file system at the customary place, if it is not there yet.
fn mount_bpf() -> Result<(), AttachError> {
    let path = Path::new(BPF_MOUNT);
    if is_bpf(path) {
        return Ok(());
    }
    if has_own_mounts() {
        return Err(AttachError::PrivateMounts { path: BPF_MOUNT });
    }
    // Two mounts one over the other would hide the pins in the lower one. Whoever waits here finds the mount
    // afterwards.
    let folder = File::open(path).map_err(pin_error(path))?;
    let _lock = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, errno)| pin_error(path)(errno.into()))?;
    if is_bpf(path) {
        return Ok(());
    }
    // As systemd mounts it: who may use maps and programs of others is root.
    mount(Some("bpf"), BPF_MOUNT, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(|source| AttachError::MountBpf { path: BPF_MOUNT, source })
}

fn is_bpf(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether this process does not see the mounts that its parent or the machine's first process sees. One that may not
/// be looked at is taken for the same.
fn has_own_mounts() -> bool {
    let Ok(own) = fs::read_link("/proc/self/ns/mnt") else { return false };
    [parent_id(), 1]
        .iter()
        .any(|process| fs::read_link(format!("/proc/{process}/ns/mnt")).is_ok_and(|mounts| mounts != own))
}

fn pin_error(path: &Path) -> impl Fn(io::Error) -> AttachError + '_ {
    |source| AttachError::Pin { path: path.to_owned(), source }
}

fn link_error(path: &Path) -> impl Fn(LinkError) -> AttachError + '_ {
    |error| pin_error(path)(io::Error::other(super::error::chain(&error)))
}

fn errno(error: &ProgramError) -> Option<Errno> {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) => io_error.raw_os_error().map(Errno::from_raw),
        _ => None,
    }
}

fn xdp_error(program: &'static str, device: &str, source: ProgramError) -> AttachError {
    let device = device.to_owned();
    match errno(&source) {
        Some(Errno::EOPNOTSUPP) => AttachError::NoNativeMode { device },
        Some(Errno::EBUSY | Errno::EEXIST) => AttachError::Occupied { device },
        // A veth, whose other end sends by more queues than it receives by.
        Some(Errno::ENOSPC) => AttachError::FewerQueues { device },
        _ => AttachError::Attach { program, device, source: Box::new(source) },
    }
}

fn tcx_error(program: &'static str, device: &str, source: ProgramError) -> AttachError {
    AttachError::Attach { program, device: device.to_owned(), source: Box::new(source) }
}
