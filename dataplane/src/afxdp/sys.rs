//! The few system calls on an AF_XDP socket that xsk-rs does not offer (Documentation/networking/af_xdp.rst,
//! include/uapi/linux/if_xdp.h), in safe clothes.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socket},
        time::TimeSpec,
    },
};

/// How many descriptors one sendto handles in copy mode (Linux 6.17); missing in libc.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;
/// Its value before it is set, and its least one (TX_BATCH_SIZE, net/xdp/xsk.c).
const DEFAULT_SEND_BUDGET: u32 = 32;

/// The pages that rings are mapped in.
pub(super) const PAGE_BYTES: usize = 4096;

/// ETHTOOL_GCHANNELS (include/uapi/linux/ethtool.h); missing in libc.
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// `struct ethtool_channels`: what may be, then what is.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    most: [u32; 4],
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

/// How many receive queues a device of the calling thread's network namespace uses. What netlink calls IFLA_NUM_RX_QUEUES is how many it could have:
/// a veth, or a NIC that was told to use fewer, has no packets and no AF_XDP sockets on the others.
///
/// # Errors
///
/// Those of the system; `Unsupported` where the driver does not tell, since it has no such choice.
pub fn receive_queues(device: &str) -> io::Result<u32> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    let mut name = [0; libc::IFNAMSIZ];
    if device.len() >= name.len() || device.bytes().any(|byte| byte == 0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: (&raw mut channels).cast() },
    };
    // SAFETY: SIOCETHTOOL reads `request`, whose name ends with a zero, and with this command writes one `ethtool_channels` to where its data points.
    // Both live until the call has returned.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut request) };
    match Errno::result(result) {
        Ok(_) => Ok(channels.receive + channels.combined),
        Err(Errno::EOPNOTSUPP) => Err(io::ErrorKind::Unsupported.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Which ring of a socket a mapping shows: mmap's offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RingKind {
    Rx,
    Tx,
    Fill,
    Completion,
}

impl RingKind {
    fn page_offset(self) -> libc::off_t {
        match self {
            Self::Rx => libc::XDP_PGOFF_RX_RING,
            Self::Tx => libc::XDP_PGOFF_TX_RING,
            Self::Fill => libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t,
            Self::Completion => libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t,
        }
    }
}

/// Where the parts of a ring lie in its mapping, in bytes (struct xdp_ring_offset).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RingOffsets {
    pub producer: usize,
    pub consumer: usize,
    pub flags: usize,
    pub entries: usize,
}

/// The offsets of all four rings of a socket (XDP_MMAP_OFFSETS).
pub(super) struct SocketOffsets(libc::xdp_mmap_offsets);

impl SocketOffsets {
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let zero = || libc::xdp_ring_offset { producer: 0, consumer: 0, desc: 0, flags: 0 };
        let mut offsets = libc::xdp_mmap_offsets { rx: zero(), tx: zero(), fr: zero(), cr: zero() };
        get_option(socket, libc::XDP_MMAP_OFFSETS, &mut offsets)?;
        Ok(Self(offsets))
    }

    pub fn ring(&self, kind: RingKind) -> RingOffsets {
        let offsets = match kind {
            RingKind::Rx => &self.0.rx,
            RingKind::Tx => &self.0.tx,
            RingKind::Fill => &self.0.fr,
            RingKind::Completion => &self.0.cr,
        };
        RingOffsets {
            producer: offsets.producer as usize,
            consumer: offsets.consumer as usize,
            flags: offsets.flags as usize,
            entries: offsets.desc as usize,
        }
    }
}

/// A plain C structure that getsockopt may fill with any bytes.
///
/// # Safety
/// Every bit pattern must be a valid value of the type, and it must have no padding.
unsafe trait PlainOption {}
// SAFETY: sixteen u64.
unsafe impl PlainOption for libc::xdp_mmap_offsets {}
// SAFETY: six u64.
unsafe impl PlainOption for libc::xdp_statistics {}
// SAFETY: one u32.
unsafe impl PlainOption for libc::xdp_options {}

fn get_option<T: PlainOption>(socket: BorrowedFd<'_>, option: libc::c_int, into: &mut T) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `into` is valid for `length` bytes, and any bytes make a valid T.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_XDP, option, ptr::from_mut(into).cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // Kernels before 5.4 answer with shorter structures, whose fields lie elsewhere.
    if length as usize != size_of::<T>() {
        return Err(Errno::EOPNOTSUPP.into());
    }
    Ok(())
}

/// The socket's own counters (XDP_STATISTICS).
pub(super) fn statistics(socket: BorrowedFd<'_>) -> io::Result<libc::xdp_statistics> {
    let mut statistics = libc::xdp_statistics {
        rx_dropped: 0,
        rx_invalid_descs: 0,
        tx_invalid_descs: 0,
        rx_ring_full: 0,
        rx_fill_ring_empty_descs: 0,
        tx_ring_empty_descs: 0,
    };
    get_option(socket, libc::XDP_STATISTICS, &mut statistics)?;
    Ok(statistics)
}

/// Whether the socket was bound in zero-copy mode (XDP_OPTIONS).
pub(super) fn is_zero_copy(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut options = libc::xdp_options { flags: 0 };
    get_option(socket, libc::XDP_OPTIONS, &mut options)?;
    Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

/// Lets one [`send`] handle up to `descriptors`, no more than the tx ring has entries. Below the kernel's own
/// number, and where the kernel does not know the option, it stays at that.
pub(super) fn set_send_budget(socket: BorrowedFd<'_>, descriptors: u32) -> io::Result<()> {
    if descriptors <= DEFAULT_SEND_BUDGET {
        return Ok(());
    }
    // SAFETY: the option's value is one u32, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            XDP_MAX_TX_SKB_BUDGET,
            (&raw const descriptors).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => match Errno::last() {
            Errno::ENOPROTOOPT => Ok(()),
            errno => Err(errno.into()),
        },
    }
}

/// Makes the kernel take descriptors from the tx ring, which may be empty. ENXIO says that the socket's device is gone.
#[inline]
pub(super) fn send(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no buffer and no address are passed.
    let result = unsafe { libc::sendto(socket.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Makes the driver look at the fill ring again.
#[inline]
pub(super) fn wake_receive(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no buffer and no address are passed.
    let result = unsafe {
        libc::recvfrom(socket.as_raw_fd(), ptr::null_mut(), 0, libc::MSG_DONTWAIT, ptr::null_mut(), ptr::null_mut())
    };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Waits until one of the sockets has a received packet; false where `timeout` was over before, or a signal came. It cannot miss a packet:
/// the kernel looks at the rx rings after it has put the thread on their wait queues. A removed device does not end it.
pub(super) fn wait(sockets: &[BorrowedFd<'_>], timeout: Duration) -> Result<bool, Errno> {
    let mut polled: Vec<PollFd<'_>> = sockets.iter().map(|socket| PollFd::new(*socket, PollFlags::POLLIN)).collect();
    match ppoll(&mut polled, Some(TimeSpec::from_duration(timeout)), None) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The memory of one ring, shared with the kernel, as long as this lives.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; this is its only owner.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes of one ring of `socket`. The kernel allows it besides libxdp's own mapping, for bound
    /// sockets since Linux 6.4.
    pub fn of_ring(socket: BorrowedFd<'_>, kind: RingKind, bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Self::map(bytes, flags, socket.as_raw_fd(), kind.page_offset())
    }

    /// Zeroed memory that no kernel looks at: tests play the kernel's part on it.
    #[cfg(test)]
    pub fn anonymous(bytes: usize) -> io::Result<Self> {
        Self::map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    fn map(bytes: usize, flags: libc::c_int, file: libc::c_int, offset: libc::off_t) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, file, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap without MAP_FIXED never answers with address 0");
        Ok(Self { base, bytes })
    }

    /// The first byte; page-aligned.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are those of a successful mmap, and the owner of a mapping keeps no pointer beyond it.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(result, 0, "munmap of a ring");
    }
}
