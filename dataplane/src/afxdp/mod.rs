//! AF_XDP: the rings and frames of one worker on real devices.
//!
//! # Theory
//!
//! *What.* [`AfXdp`] is a [`Driver`] over one UMEM and one socket for each of the worker's ports: its queue of the trunk and its queues of the
//! uplinks. The sockets share the UMEM, so that a frame received on one port is sent on another without a copy of ours (the kernel
//! copies once on each side: copy mode). xsk-rs makes UMEM and sockets; the rings are driven by [`ring`], because xsk-rs's
//! descriptors cannot move a packet's start, which a tunnel header needs.
//!
//! *Life of a frame.* free list, fill ring, kernel, rx ring, packet, tx ring, kernel, completion ring, free list. Of a port's frames
//! at most twice its rx ring's entries are in fill and rx ring together, and at most its tx ring's entries are on their way
//! through tx and completion ring. The UMEM has all of these and the spare ones, so that a fill ring never starves because another ring is full.
//!
//! *Long packets.* What is longer than a frame holds takes several descriptors, all but the last with XDP_PKT_CONTD
//! ([`AfXdpSettings::long_packets`]). A packet is received when all of its descriptors have come, until when they stay in the rx ring, and
//! it is sent when there is room for all of them: the kernel would take what a cut packet's rest is followed by for a part of it.
//!
//! *Invariant.* free + in packets + receiving + sending = all frames ([`AfXdp::frames`]), at any time.
//!
//! *Thread safety.* Nothing is shared: a driver is used by one thread at a time, and a queue has one driver.
//!
//! *Copy mode.* Receive work is done by the kernel on the CPU of the sender's or of the device's soft interrupt. Send work is done in
//! sendto on the worker's CPU, which is nearly all of a packet's cost, and always has to be asked for: one call for all that a turn sends on a port.
//! Receiving costs no call, and neither does a look that finds nothing.
//!
//! *Files.* Each names only files above it in this list: [`chunk`] and [`sys`] (one chunk; system calls), [`trunk`] (the trunk's MAC addresses),
//! [`ring`] (the four rings), [`error`], [`settings`], [`umem`] (memory and sockets), this one.
//!
//! *References.* Documentation/networking/af_xdp.rst; net/xdp/xsk.c.

mod chunk;
mod error;
mod ring;
mod settings;
mod sys;
pub mod trunk;
mod umem;

use std::{io, os::fd::BorrowedFd, thread, time::Duration};

use nix::{errno::Errno, net::if_::if_nametoindex};
use weir_packet::Mac;

use self::{
    chunk::Chunk,
    ring::Rings,
    umem::{Frames, Socket},
};
pub use self::{
    error::AfXdpError,
    ring::MAX_RING_ENTRIES,
    settings::{AfXdpSettings, PortSettings, RingSizes},
    sys::receive_queues,
};
use crate::{
    driver::{Driver, PortId},
    frame::{Arena, Frame, HEADROOM_BYTES, IfIndex, LinkType, MAX_FRAMES, Packet, Segment, frames_of_mtu},
};

/// Descriptors of packets of one frame that one sendto may handle: two bursts, so that one call is enough unless something was left over.
const SEND_BUDGET: u32 = 128;
/// How often a sendto that achieves nothing is repeated.
const IDLE_SENDS: u32 = 3;
/// Bytes of an Ethernet header: no device sends less, and the kernel loses the frame of an empty packet.
const ETHERNET_HEADER_BYTES: usize = 14;
/// The kernel frees a closed socket's queue a little later; a restart waits for it this long at most.
const QUEUE_RELEASE_TRIES: u32 = 25;
const QUEUE_RELEASE_PAUSE: Duration = Duration::from_millis(20);
/// How long a worker sleeps at most while packets wait for a device that was busy.
const UNSENT_SLEEP: Duration = Duration::from_millis(1);

/// What tells a port's packets apart.
#[derive(Clone, Copy, Debug)]
enum Role {
    Trunk,
    Uplink { index: IfIndex, mac: Mac },
}

impl Role {
    /// A packet that came by the port, or the first part of one.
    #[inline]
    fn packet(self, segment: Segment) -> Packet {
        match self {
            Self::Trunk => {
                let mut packet = Packet::new(segment, IfIndex::HOST, LinkType::Host);
                (packet.device, packet.link) = trunk::origin(destination(&packet));
                packet
            }
            Self::Uplink { index, mac } => {
                let mut packet = Packet::new(segment, index, LinkType::Other);
                packet.link = link_type(destination(&packet), mac);
                packet
            }
        }
    }
}

#[derive(Debug)]
struct Port {
    rings: Rings,
    socket: Socket,
    role: Role,
    /// Frames to keep in fill and rx ring, and frames to have on their way out at most.
    receiving_target: u32,
    sending_limit: u32,
    device: String,
    queue: u32,
    /// Packets that the kernel took and the device refused.
    refused: u64,
    /// Received packets of more descriptors than can be sent.
    too_long: u64,
    /// The error that ended the port's life.
    failure: Option<Errno>,
}

impl Port {
    fn open(
        settings: &AfXdpSettings,
        port: &PortSettings,
        role: Role,
        frames: &mut Frames,
    ) -> Result<Self, AfXdpError> {
        let PortSettings { device, index: IfIndex(index), queue, sizes, .. } = port;
        let no_such_device = || AfXdpError::NoSuchDevice { device: device.clone(), index: *index };
        // The sockets are bound by name: another device may have it by now.
        if if_nametoindex(device.as_str()).map_err(|_| no_such_device())? != *index {
            return Err(no_such_device());
        }
        let entries = settings.ring_entries(port);
        let error = |source| AfXdpError::of_socket(source, device, *index, *queue, settings.memory_bytes());
        let (socket, rings) = Socket::open(frames, device, *queue, entries, settings.long_packets()).map_err(error)?;
        let budget = SEND_BUDGET * frames_of_mtu(settings.mtu);
        sys::set_send_budget(socket.fd(), budget.min(sizes.tx)).map_err(error)?;
        let mut port = Self {
            rings,
            socket,
            role,
            receiving_target: 2 * sizes.rx,
            sending_limit: sizes.tx,
            device: device.clone(),
            queue: *queue,
            refused: 0,
            too_long: 0,
            failure: None,
        };
        port.refill(&mut frames.free);
        Ok(port)
    }

    /// Keeps the fill ring full, and its reader awake.
    #[inline]
    fn refill(&mut self, free: &mut Vec<Chunk>) {
        let wanted = self.receiving_target - self.rings.receiving();
        self.rings.fill.fill(free, wanted);
        if self.rings.fill.needs_wakeup() {
            match sys::wake_receive(self.socket.fd()) {
                Ok(()) | Err(Errno::EAGAIN | Errno::EBUSY | Errno::EINTR | Errno::ENOBUFS | Errno::ENETDOWN) => {}
                Err(errno) => self.failure = Some(errno),
            }
        }
    }

    /// How many of `packets`, from the first on, can be pushed to the tx ring.
    #[inline]
    fn room(&mut self, frames: &Frames, packets: &[Packet]) -> usize {
        let unused = self.sending_limit - self.rings.sending();
        if packets.iter().any(Packet::has_tail) {
            let mut room = self.rings.tx.room(unused) as usize;
            let fits = |packet: &&Packet| {
                let rest = room.checked_sub(frames.arena.frames_of(packet));
                room = rest.unwrap_or(room);
                rest.is_some()
            };
            return packets.iter().take_while(fits).count();
        }
        let wanted = unused.min(u32::try_from(packets.len()).unwrap_or(u32::MAX));
        self.rings.tx.room(wanted) as usize
    }

    /// Pushes a packet to the tx ring, which has room for it.
    #[inline]
    fn push(&mut self, frames: &mut Frames, packet: Packet) {
        let (Segment { frame, start, len }, mut tail) = frames.arena.split(packet);
        self.rings.tx.push(frames.chunk(frame), start, len, tail.is_some());
        while let Some(rest) = tail {
            let (Segment { frame, start, len }, next) = frames.arena.pop(rest);
            self.rings.tx.push(frames.chunk(frame), start, len, next.is_some());
            tail = next;
        }
    }

    /// Appends up to `limit` received packets, which may have several descriptors, to `into`; how many.
    fn receive_long(&mut self, frames: &mut Frames, into: &mut Vec<Packet>, limit: usize) -> usize {
        let (mut received, mut seen) = (0, false);
        while received < limit {
            let descriptors = self.rings.rx.next_packet();
            if descriptors == 0 {
                break;
            }
            seen = true;
            if descriptors > MAX_FRAMES as u32 {
                // Nothing that a device with the MTU that the settings say receives.
                frames.free.extend((0..descriptors).map(|_| self.rings.rx.read().chunk));
                self.too_long += 1;
                continue;
            }
            let first = frames.segment(self.rings.rx.read());
            let mut packet = self.role.packet(first);
            for _ in 1..descriptors {
                let next = frames.segment(self.rings.rx.read());
                frames.arena.append(&mut packet, next);
            }
            into.push(packet);
            received += 1;
        }
        if seen {
            self.rings.rx.release();
        }
        received
    }

    /// Sends packets that are long enough to be sent; those that the tx ring has no room for stay in the list.
    #[inline]
    fn transmit(&mut self, frames: &mut Frames, packets: &mut Vec<Packet>) {
        self.rings.completion.drain(&mut frames.free);
        while self.failure.is_none() {
            let count = self.room(frames, packets);
            for mut packet in packets.drain(..count) {
                if matches!(self.role, Role::Trunk) && !packet.device.is_kernels() {
                    let source = trunk::target(packet.device);
                    packet.bytes_mut()[6..12].copy_from_slice(&source.0);
                }
                self.push(frames, packet);
            }
            self.rings.tx.publish();
            self.send(&mut frames.free);
            if packets.is_empty() || self.room(frames, &packets[..1]) == 0 {
                return;
            }
        }
    }

    /// Has the kernel send what lies in the tx ring. Returns when it did, or cannot now: then the rest stays in the ring for the next time.
    #[inline]
    fn send(&mut self, free: &mut Vec<Chunk>) {
        let mut untaken = self.rings.tx.untaken();
        let mut idle_sends = 0;
        let mut refusals_possible = untaken;
        while untaken > 0 {
            let result = sys::send(self.socket.fd());
            self.rings.completion.drain(free);
            let before = std::mem::replace(&mut untaken, self.rings.tx.untaken());
            match result {
                // EAGAIN: the send budget is used up, or the device, its completion ring or the socket's buffer is full.
                Ok(()) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                // The kernel took the packet and completes its frame, but its device dropped it. That the ring's consumer moved is
                // published only by the next call.
                Err(Errno::EBUSY) if refusals_possible > 0 => {
                    self.refused += 1;
                    refusals_possible -= 1;
                    continue;
                }
                // No memory for a packet, or the device is down: that may pass.
                Err(Errno::EBUSY | Errno::ENOBUFS | Errno::ENOMEM | Errno::ENETDOWN) => return,
                Err(errno) => {
                    self.failure = Some(errno);
                    return;
                }
            }
            if untaken == before {
                idle_sends += 1;
                if idle_sends == IDLE_SENDS {
                    return;
                }
            }
        }
    }

    /// Finds out whether the device is gone.
    fn check(&mut self) {
        if let Err(Errno::ENXIO) = sys::send(self.socket.fd()) {
            self.failure = Some(Errno::ENXIO);
        }
    }
}

/// The AF_XDP rings and frames of one worker.
#[derive(Debug)]
pub struct AfXdp {
    // In this order: sockets are closed before the memory that they use is unmapped.
    ports: Vec<Port>,
    frames: Frames,
    long_packets: bool,
}

/// Where a driver's frames are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameCounts {
    /// All frames of the UMEM: the sum of the others but the last.
    pub total: u32,
    /// Free ones.
    pub free: u32,
    /// In packets that the driver handed out.
    pub in_packets: u32,
    /// With the kernel to be received into, or received and not looked at.
    pub receiving: u32,
    /// With the kernel to be sent, or sent and not looked at.
    pub sending: u32,
    /// As the rings' shared indices say: frames that lie in a ring. `receiving + sending` without those that the kernel has in its hands.
    pub in_rings: u32,
}

/// A socket's counters of things that went wrong (XDP_STATISTICS, include/uapi/linux/if_xdp.h), in packets since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RingStatistics {
    /// Received packets that were dropped for another reason than a full rx ring, as being too long.
    pub rx_dropped: u64,
    /// Fill entries that the kernel refused.
    pub rx_invalid_descs: u64,
    /// Tx entries that the kernel refused.
    pub tx_invalid_descs: u64,
    /// Received packets that were dropped because the rx ring was full.
    pub rx_ring_full: u64,
    /// Received packets that were dropped because the fill ring was empty.
    pub rx_fill_ring_empty_descs: u64,
    /// Times that the kernel found the tx ring empty.
    pub tx_ring_empty_descs: u64,
    /// Packets that the kernel took from the tx ring and the device then dropped (sendto's EBUSY).
    pub tx_refused: u64,
}

/// How a port's socket was bound, for the log and the status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortMode {
    /// The device.
    pub device: String,
    /// The queue.
    pub queue: u32,
    /// "copy" or "zero-copy".
    pub mode: &'static str,
    /// Why this one.
    pub reason: &'static str,
}

impl AfXdp {
    /// Opens the worker's sockets, and gives the kernel frames to receive into. Packets arrive once the attached XDP program
    /// redirects to the sockets ([`AfXdp::socket`]).
    ///
    /// A queue that another socket has is tried again for half a second: the kernel frees the queue of a closed socket a little later.
    ///
    /// # Errors
    /// See [`AfXdpError`]; what was opened is closed again.
    pub fn open(settings: &AfXdpSettings) -> Result<Self, AfXdpError> {
        let mut tries = 0;
        loop {
            match Self::open_once(settings) {
                Err(AfXdpError::QueueTaken { .. }) if tries < QUEUE_RELEASE_TRIES => {
                    tries += 1;
                    thread::sleep(QUEUE_RELEASE_PAUSE);
                }
                result => return result,
            }
        }
    }

    fn open_once(settings: &AfXdpSettings) -> Result<Self, AfXdpError> {
        let count = settings.check()?;
        let mut frames = Frames::new(count, settings.ring_entries(&settings.trunk))
            .map_err(|source| AfXdpError::of_memory(source, settings.memory_bytes()))?;
        let mut ports = Vec::with_capacity(1 + settings.uplinks.len());
        ports.push(Port::open(settings, &settings.trunk, Role::Trunk, &mut frames)?);
        for uplink in &settings.uplinks {
            let role = Role::Uplink { index: uplink.index, mac: uplink.mac };
            ports.push(Port::open(settings, uplink, role, &mut frames)?);
        }
        Ok(Self { ports, frames, long_packets: settings.long_packets() })
    }

    /// The socket of a port, for the XSKMAP of its device (under its queue's number).
    ///
    /// # Panics
    /// Where there is no such port.
    pub fn socket(&self, port: PortId) -> BorrowedFd<'_> {
        self.ports[usize::from(port.0)].socket.fd()
    }

    /// The sockets of all ports in their order, to wait for them along with something else. Each is readable while it
    /// has a received packet. [`AfXdp::sleep`] is enough for most.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.ports.iter().map(|port| port.socket.fd()).collect()
    }

    /// How each port's socket was bound.
    ///
    /// # Errors
    /// Of the system, where a socket does not tell.
    pub fn modes(&self) -> io::Result<Vec<PortMode>> {
        let mode = |port: &Port| {
            let zero_copy = sys::is_zero_copy(port.socket.fd())?;
            let (mode, reason) = match zero_copy {
                true => ("zero-copy", "the driver offers it"),
                false => ("copy", "a worker's ports share one UMEM with the trunk, and a veth has no zero-copy"),
            };
            Ok(PortMode { device: port.device.clone(), queue: port.queue, mode, reason })
        };
        self.ports.iter().map(mode).collect()
    }

    /// What went wrong on a port since the start.
    ///
    /// # Errors
    /// Of the system, where the socket does not tell.
    ///
    /// # Panics
    /// Where there is no such port.
    pub fn statistics(&self, port: PortId) -> io::Result<RingStatistics> {
        let port = &self.ports[usize::from(port.0)];
        let kernel = sys::statistics(port.socket.fd())?;
        Ok(RingStatistics {
            rx_dropped: kernel.rx_dropped + port.too_long,
            rx_invalid_descs: kernel.rx_invalid_descs,
            tx_invalid_descs: kernel.tx_invalid_descs,
            rx_ring_full: kernel.rx_ring_full,
            rx_fill_ring_empty_descs: kernel.rx_fill_ring_empty_descs,
            tx_ring_empty_descs: kernel.tx_ring_empty_descs,
            tx_refused: port.refused,
        })
    }

    /// Where the frames are now.
    pub fn frames(&self) -> FrameCounts {
        let sum = |count: fn(&Rings) -> u32| self.ports.iter().map(|port| count(&port.rings)).sum();
        FrameCounts {
            total: self.frames.total(),
            free: self.frames.free.len() as u32,
            in_packets: self.frames.outstanding(),
            receiving: sum(Rings::receiving),
            sending: sum(Rings::sending),
            in_rings: sum(Rings::lying),
        }
    }

    /// Bytes of UMEM and rings as they are mapped. [`AfXdpSettings::memory_bytes`] tells them beforehand, with the lists beside it.
    pub fn mapped_bytes(&self) -> usize {
        let rings: usize = self.ports.iter().map(|port| port.rings.mapped_bytes()).sum();
        self.frames.total() as usize * crate::frame::FRAME_BYTES + rings
    }

    /// The first port's failure that nothing but opening anew repairs, as when its device was removed. To be looked at now and then:
    /// `transmit` finds it when it sends on the port, [`AfXdp::check`] on any.
    pub fn fault(&self) -> Option<AfXdpError> {
        self.ports.iter().find_map(|port| {
            let source = port.failure?.into();
            Some(AfXdpError::Failed { device: port.device.clone(), queue: port.queue, source })
        })
    }

    /// Finds out which devices are gone: [`AfXdp::fault`] tells. A system call for each port, to be made now and then.
    pub fn check(&mut self) {
        self.ports.iter_mut().filter(|port| port.failure.is_none()).for_each(Port::check);
    }

    /// Sleeps until a packet arrives on any port, or `timeout` is over. False after the timeout or a signal. A packet that came since the
    /// last `receive` ends it at once, and so does a port's failure that it meets. That a device is removed does not: the kernel does not tell pollers.
    pub fn sleep(&mut self, timeout: Duration) -> bool {
        self.reap();
        let mut timeout = timeout;
        for port in self.ports.iter_mut().filter(|port| port.failure.is_none()) {
            port.refill(&mut self.frames.free);
            port.send(&mut self.frames.free);
            if port.failure.is_some() {
                return true;
            }
            if port.rings.tx.untaken() > 0 {
                timeout = timeout.min(UNSENT_SLEEP);
            }
        }
        let sockets: Vec<_> = self.ports.iter().filter(|port| port.failure.is_none()).map(|p| p.socket.fd()).collect();
        // An error means that the kernel has no memory for poll: a busy turn instead of a sleep.
        sys::wait(&sockets, timeout).unwrap_or(true)
    }

    /// Makes the frames of all packets that were sent free.
    fn reap(&mut self) {
        for port in &mut self.ports {
            port.rings.completion.drain(&mut self.frames.free);
        }
    }
}

impl Driver for AfXdp {
    fn ports(&self) -> usize {
        self.ports.len()
    }

    #[inline]
    fn receive(&mut self, port: PortId, into: &mut Vec<Packet>, limit: usize) -> usize {
        debug_assert!(into.capacity() - into.len() >= limit, "the caller has made room for the packets");
        let number = usize::from(port.0);
        let target = self.ports[number].receiving_target;
        if self.frames.free.len() < (target - self.ports[number].rings.receiving()) as usize {
            self.reap();
        }
        let Self { ports, frames, long_packets } = self;
        let port = &mut ports[number];
        port.refill(&mut frames.free);
        if *long_packets {
            return port.receive_long(frames, into, limit);
        }
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let role = port.role;
        port.rings.rx.receive(limit, |received| into.push(role.packet(frames.segment(received)))) as usize
    }

    #[inline]
    fn transmit(&mut self, port: PortId, packets: &mut Vec<Packet>) {
        let Self { ports, frames, .. } = self;
        let port = &mut ports[usize::from(port.0)];
        let sendable = |packet: &Packet| packet.bytes().len() >= ETHERNET_HEADER_BYTES;
        if packets.iter().all(sendable) {
            port.transmit(frames, packets);
        } else {
            let short: Vec<Packet> = packets.extract_if(.., |packet| !sendable(packet)).collect();
            port.transmit(frames, packets);
            packets.extend(short);
        }
    }

    fn allocate(&mut self) -> Option<Packet> {
        if self.frames.free.is_empty() {
            self.reap();
        }
        let chunk = self.frames.free.pop()?;
        let segment = Segment { frame: self.frames.frame(chunk), start: HEADROOM_BYTES as u16, len: 0 };
        Some(Packet::new(segment, IfIndex::HOST, LinkType::Host))
    }

    fn arena(&self) -> &Arena {
        &self.frames.arena
    }

    fn arena_mut(&mut self) -> &mut Arena {
        &mut self.frames.arena
    }

    #[inline]
    fn free(&mut self, frame: Frame) {
        self.frames.give_back(frame);
    }
}

#[cfg(debug_assertions)]
impl Drop for AfXdp {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let counts = self.frames();
        assert_eq!(counts.in_packets, 0, "all packets come back to their driver before it ends");
        assert_eq!(counts.free + counts.receiving + counts.sending, counts.total, "no frame is lost: {counts:?}");
    }
}

/// The destination MAC address; zeros where the packet is too short to have one.
#[inline]
fn destination(packet: &Packet) -> Mac {
    Mac(packet.bytes().first_chunk().copied().unwrap_or_default())
}

/// How a packet to `destination` was addressed on the device that has the address `own` (eth_type_trans of the kernel).
#[inline]
fn link_type(destination: Mac, own: Mac) -> LinkType {
    if destination == own {
        LinkType::Host
    } else if !destination.is_group() {
        LinkType::Other
    } else if destination == Mac::BROADCAST {
        LinkType::Broadcast
    } else {
        LinkType::Multicast
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_can_be_moved_to_its_thread() {
        fn assert_send<T: Send>() {}
        assert_send::<AfXdp>();
    }

    #[test]
    fn the_destination_tells_the_link_type() {
        let own = Mac([6, 0, 0, 0, 0, 1]);
        for (destination, expected) in [
            ([6, 0, 0, 0, 0, 1], LinkType::Host),
            ([6, 0, 0, 0, 0, 2], LinkType::Other),
            ([0xff; 6], LinkType::Broadcast),
            ([0x33, 0x33, 0, 0, 0, 1], LinkType::Multicast),
            ([0; 6], LinkType::Other),
        ] {
            assert_eq!(link_type(Mac(destination), own), expected, "{destination:x?}");
        }
    }
}
