//! Why a worker's sockets could not be opened, or do not work any more.

use std::io;

use super::ring::MAX_RING_ENTRIES;
use crate::frame::MAX_MTU;

/// Why a worker's sockets could not be opened, or do not work any more.
#[derive(Debug, thiserror::Error)]
pub enum AfXdpError {
    /// A ring's size is not allowed.
    #[error(
        "{device}: the {ring} ring cannot have {entries} entries; give a power of two from {least} to {MAX_RING_ENTRIES}"
    )]
    RingSize {
        /// The device.
        device: String,
        /// "rx" or "tx".
        ring: &'static str,
        /// The size that was asked for.
        entries: u32,
        /// The least size.
        least: u32,
    },
    /// An MTU above [`MAX_MTU`].
    #[error("the MTU is {mtu}, but weir carries {MAX_MTU} at most")]
    Mtu {
        /// The largest of the devices' MTUs.
        mtu: u32,
    },
    /// Two ports of one worker are the same queue.
    #[error("queue {queue} of {device} is given twice to one worker; give each queue once")]
    QueueTwice {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
    },
    /// More ports than port numbers.
    #[error("a worker cannot have {ports} ports; use more workers, or fewer queues per uplink")]
    TooManyPorts {
        /// The trunk and the uplinks' queues.
        ports: usize,
    },
    /// EPERM or EACCES.
    #[error("not allowed to open AF_XDP sockets; run as root, or with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF")]
    NotPermitted(#[source] io::Error),
    /// ENOMEM or ENOBUFS.
    #[error(
        "no memory for {bytes} bytes of frames and rings; free some, make the rings smaller, or raise the limit of locked memory \
         (ulimit -l, LimitMEMLOCK=)"
    )]
    NoMemory {
        /// What the settings ask for (`AfXdpSettings::memory_bytes`).
        bytes: usize,
        /// The system's error.
        source: io::Error,
    },
    /// EAFNOSUPPORT or ENOPROTOOPT.
    #[error(
        "this kernel lacks AF_XDP sockets, or what weir needs of them; give it CONFIG_XDP_SOCKETS and Linux 6.6 or later"
    )]
    NoKernelSupport(#[source] io::Error),
    /// ENODEV, or another device has the name now.
    #[error("there is no device {device} with index {index}; it was removed, or made anew: read the devices again")]
    NoSuchDevice {
        /// The device.
        device: String,
        /// The index in the settings.
        index: u32,
    },
    /// EBUSY.
    #[error(
        "queue {queue} of {device} belongs to another AF_XDP socket; is another router running? `ss --xdp -p` shows whose it is"
    )]
    QueueTaken {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
        /// The system's error.
        source: io::Error,
    },
    /// EINVAL.
    #[error(
        "{device} has no queue {queue} for AF_XDP; see `ethtool -l {device}`, and give it queues with `ethtool -L {device} combined {}` \
         (a veth: `rx {} tx {}`), or use fewer workers", queue + 1, queue + 1, queue + 1
    )]
    NoSuchQueue {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
        /// The system's error.
        source: io::Error,
    },
    /// EOPNOTSUPP.
    #[error("{device} cannot do what AF_XDP needs: its driver has no XDP in this mode")]
    NotSupported {
        /// The device.
        device: String,
        /// The system's error.
        source: io::Error,
    },
    /// Another error of the system, at the start.
    #[error("opening the AF_XDP socket on queue {queue} of {device}")]
    Open {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
        /// The system's error.
        source: io::Error,
    },
    /// The UMEM could not be made.
    #[error("making the memory that AF_XDP sockets share")]
    Memory(#[source] io::Error),
    /// A socket that was open does not work any more.
    #[error("the AF_XDP socket on queue {queue} of {device} does not work any more; was the device removed?")]
    Failed {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
        /// The system's error.
        source: io::Error,
    },
}

impl AfXdpError {
    /// The error of making a UMEM.
    pub(super) fn of_memory(source: io::Error, bytes: usize) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(source),
            // EAGAIN: mmap's answer where the limit of locked memory is reached.
            Some(libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN) => Self::NoMemory { bytes, source },
            Some(libc::EAFNOSUPPORT | libc::ENOPROTOOPT) => Self::NoKernelSupport(source),
            _ => Self::Memory(source),
        }
    }

    /// The error of opening a socket on a queue of a device.
    pub(super) fn of_socket(source: io::Error, device: &str, index: u32, queue: u32, bytes: usize) -> Self {
        let device = device.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(source),
            Some(libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN) => Self::NoMemory { bytes, source },
            Some(libc::EAFNOSUPPORT | libc::ENOPROTOOPT) => Self::NoKernelSupport(source),
            Some(libc::ENODEV | libc::ENXIO) => Self::NoSuchDevice { device, index },
            Some(libc::EBUSY) => Self::QueueTaken { device, queue, source },
            Some(libc::EINVAL) => Self::NoSuchQueue { device, queue, source },
            Some(libc::EOPNOTSUPP) => Self::NotSupported { device, source },
            _ => Self::Open { device, queue, source },
        }
    }
}
