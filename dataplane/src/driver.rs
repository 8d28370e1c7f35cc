//! What a worker needs of the devices below it. Implemented by the AF_XDP driver and by the memory driver; the worker loop is
//! generic over it, so that a driver costs no indirect call.

use crate::frame::{Arena, Frame, MAX_PACKET_BYTES, ONE_FRAME_BYTES, Packet, Tail};

/// One of the worker's own places to receive and send: a (device, queue) pair with its four rings. The trunk is port 0,
/// uplinks follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct PortId(pub u8);

impl PortId {
    /// The trunk: all workloads and the node's own kernel.
    pub const TRUNK: Self = Self(0);
}

/// The rings and frames of one worker.
pub trait Driver {
    /// Number of ports, the trunk included.
    fn ports(&self) -> usize;

    /// Appends up to `limit` received packets to `into`, which has the capacity; the number appended. Keeps the fill ring full.
    fn receive(&mut self, port: PortId, into: &mut Vec<Packet>, limit: usize) -> usize;

    /// Sends `packets` in their order and removes from the list what was sent; what the ring had no room for stays in it.
    ///
    /// `packet.device` is the device that it leaves by: an uplink's own index, or on the trunk a workload's or [`crate::frame::IfIndex::HOST`].
    fn transmit(&mut self, port: PortId, packets: &mut Vec<Packet>);

    /// A packet of no bytes with the usual headroom, to be filled; `None` where no frame is free.
    fn allocate(&mut self) -> Option<Packet>;

    /// The memory of its frames.
    fn arena(&self) -> &Arena;

    /// The memory of its frames, to put packets together of several.
    fn arena_mut(&mut self) -> &mut Arena;

    /// Makes a frame free.
    fn free(&mut self, frame: Frame);

    /// Takes back the frames of a packet that goes nowhere.
    #[inline]
    fn release(&mut self, packet: Packet) {
        let (first, tail) = self.arena().split(packet);
        self.free(first.frame);
        if tail.is_some() {
            self.release_tail(tail);
        }
    }

    /// Takes back the frames of a tail.
    #[cold]
    fn release_tail(&mut self, mut tail: Option<Tail>) {
        while let Some(rest) = tail {
            let (segment, next) = self.arena_mut().pop(rest);
            self.free(segment.frame);
            tail = next;
        }
    }

    /// Makes a packet `bytes` bytes long, which is no longer than it was.
    #[inline]
    fn truncate(&mut self, packet: &mut Packet, bytes: usize) {
        if packet.has_tail() {
            let tail = self.arena_mut().cut(packet, bytes);
            self.release_tail(tail);
        } else {
            packet.set_len(bytes);
        }
    }

    /// A packet of the bytes of all `parts`, with the usual headroom; `None` where too few frames are free, or it is longer than a packet
    /// can be.
    fn packet_of(&mut self, parts: &[&[u8]]) -> Option<Packet> {
        if parts.iter().map(|part| part.len()).sum::<usize>() > MAX_PACKET_BYTES {
            return None;
        }
        let mut packet = self.allocate()?;
        // The frame behind it that is being filled.
        let mut last: Option<Packet> = None;
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                let current = last.as_mut().unwrap_or(&mut packet);
                let begin = current.bytes().len();
                let (now, later) = rest.split_at(rest.len().min(ONE_FRAME_BYTES - begin));
                current.set_len(begin + now.len());
                current.bytes_mut()[begin..].copy_from_slice(now);
                rest = later;
                if !rest.is_empty() {
                    self.append(&mut packet, last.take());
                    last = self.allocate();
                    if last.is_none() {
                        self.release(packet);
                        return None;
                    }
                }
            }
        }
        self.append(&mut packet, last);
        Some(packet)
    }

    /// Adds the frame of a packet that has no other at the end of `packet`.
    fn append(&mut self, packet: &mut Packet, last: Option<Packet>) {
        if let Some(last) = last {
            let (segment, _) = self.arena().split(last);
            self.arena_mut().append(packet, segment);
        }
    }
}
