//! The memory driver: the same dataplane without devices, for `weir replay`, `weir bench` and tests.
//!
//! Packets are injected at a device and collected where they leave. Frames come from a heap arena and are accounted as a UMEM's are.

use std::{collections::VecDeque, ptr::NonNull};

use crate::{
    driver::{Driver, PortId},
    frame::{Arena, FRAME_BYTES, Frame, HEADROOM_BYTES, IfIndex, LinkType, MAX_PACKET_BYTES, Packet, Segment},
};

/// A driver whose rings are queues in memory.
#[derive(Debug)]
pub struct MemoryDriver {
    arena: Arena,
    /// Offsets of free frames.
    free: Vec<u64>,
    inboxes: Vec<VecDeque<Packet>>,
    sent: Vec<Packet>,
    /// Where a packet of several frames is put together.
    whole: Vec<u8>,
    /// A box, as a pointer so that the arena stays its memory's only user.
    memory: NonNull<[[u8; FRAME_BYTES]]>,
}

// SAFETY: the memory belongs to the driver alone, wherever it is.
unsafe impl Send for MemoryDriver {}

/// Why a packet was not injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    /// It is longer than a packet can be.
    #[error("a packet of {0} bytes is longer than weir carries ({MAX_PACKET_BYTES} bytes)")]
    TooLong(usize),
    /// Too many frames are in use.
    #[error("too few frames are free")]
    NoFrame,
}

impl MemoryDriver {
    /// A driver with `ports` ports and `frames` frames of [`FRAME_BYTES`] bytes.
    pub fn new(ports: usize, frames: u32) -> Self {
        let memory = NonNull::from(Box::leak(vec![[0; FRAME_BYTES]; frames as usize].into_boxed_slice()));
        Self {
            // SAFETY: `memory` is valid and initialised for frames * FRAME_BYTES bytes until `self` ends, and nothing else reads or writes it.
            arena: unsafe { Arena::over(memory.cast(), frames) },
            free: (0..u64::from(frames)).rev().map(|i| i * FRAME_BYTES as u64).collect(),
            inboxes: (0..ports).map(|_| VecDeque::new()).collect(),
            sent: Vec::new(),
            whole: Vec::new(),
            memory,
        }
    }

    /// Puts a received packet into the queue of `port`.
    ///
    /// # Errors
    /// Where it is longer than a packet can be, or too few frames are free.
    pub fn inject(&mut self, port: PortId, device: IfIndex, link: LinkType, bytes: &[u8]) -> Result<(), InjectError> {
        if bytes.len() > MAX_PACKET_BYTES {
            return Err(InjectError::TooLong(bytes.len()));
        }
        let mut packet = self.packet_of(&[bytes]).ok_or(InjectError::NoFrame)?;
        packet.device = device;
        packet.link = link;
        self.inboxes[usize::from(port.0)].push_back(packet);
        Ok(())
    }

    /// Hands every packet that was sent since the last call to `look`, in order: the device that it left by, and its bytes.
    pub fn drain_sent(&mut self, mut look: impl FnMut(IfIndex, &[u8])) {
        // Put back afterwards, so that the next turn finds its capacity.
        let mut sent = std::mem::take(&mut self.sent);
        let mut whole = std::mem::take(&mut self.whole);
        for packet in sent.drain(..) {
            look(packet.device, self.arena.whole(&packet, &mut whole));
            self.release(packet);
        }
        self.sent = sent;
        self.whole = whole;
    }

    /// Frames in use: in queues, or held by the pipeline.
    pub fn outstanding(&self) -> u32 {
        self.arena.outstanding()
    }

    /// Bytes of frame memory.
    pub fn memory_bytes(&self) -> usize {
        self.memory.len() * FRAME_BYTES
    }
}

impl Driver for MemoryDriver {
    fn ports(&self) -> usize {
        self.inboxes.len()
    }

    fn receive(&mut self, port: PortId, into: &mut Vec<Packet>, limit: usize) -> usize {
        let inbox = &mut self.inboxes[usize::from(port.0)];
        let count = inbox.len().min(limit);
        into.extend(inbox.drain(..count));
        count
    }

    fn transmit(&mut self, _port: PortId, packets: &mut Vec<Packet>) {
        self.sent.append(packets);
    }

    fn allocate(&mut self) -> Option<Packet> {
        let offset = self.free.pop()?;
        // SAFETY: the offset was on the free list, so nobody holds that frame.
        let frame = unsafe { self.arena.take(offset) };
        Some(Packet::new(Segment { frame, start: HEADROOM_BYTES as u16, len: 0 }, IfIndex::HOST, LinkType::Host))
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn arena_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }

    #[inline]
    fn free(&mut self, frame: Frame) {
        self.free.push(self.arena.give_back(frame));
    }
}

impl Drop for MemoryDriver {
    fn drop(&mut self) {
        let queued: Vec<Packet> =
            self.inboxes.iter_mut().flat_map(|q| q.drain(..)).chain(self.sent.drain(..)).collect();
        for packet in queued {
            self.release(packet);
        }
        let outstanding = self.arena.outstanding();
        // A packet that somebody still holds must not lose its memory.
        if outstanding == 0 {
            // SAFETY: it is the box that `new` leaked, and no frame of it is out.
            drop(unsafe { Box::from_raw(self.memory.as_ptr()) });
        }
        debug_assert!(std::thread::panicking() || outstanding == 0, "frames are missing at the end");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_go_round_and_are_accounted() {
        let mut driver = MemoryDriver::new(2, 2);
        driver.inject(PortId(1), IfIndex(3), LinkType::Host, b"one").unwrap();
        driver.inject(PortId(1), IfIndex(3), LinkType::Host, b"two").unwrap();
        assert_eq!(driver.inject(PortId(1), IfIndex(3), LinkType::Host, b"x"), Err(InjectError::NoFrame));
        assert_eq!(
            driver.inject(PortId(1), IfIndex(3), LinkType::Host, &[0; MAX_PACKET_BYTES + 1]),
            Err(InjectError::TooLong(MAX_PACKET_BYTES + 1))
        );
        let mut burst = Vec::new();
        assert_eq!(driver.receive(PortId::TRUNK, &mut burst, 64), 0);
        assert_eq!(driver.receive(PortId(1), &mut burst, 1), 1);
        assert_eq!(driver.receive(PortId(1), &mut burst, 64), 1);
        let second = burst.pop().unwrap();
        driver.release(second);
        assert_eq!(driver.outstanding(), 1);
        driver.transmit(PortId::TRUNK, &mut burst);
        assert!(burst.is_empty());
        let mut seen = Vec::new();
        driver.drain_sent(|device, bytes| seen.push((device, bytes.to_vec())));
        assert_eq!(seen, [(IfIndex(3), b"one".to_vec())]);
        assert_eq!(driver.outstanding(), 0);
    }

    #[test]
    fn long_packets_go_over_several_frames_and_come_out_whole() {
        let bytes: Vec<u8> = (0..=MAX_PACKET_BYTES).map(|place| (place / 7) as u8).collect();
        let mut driver = MemoryDriver::new(1, 18);
        for (length, frames) in [(0, 1), (1792, 1), (1793, 2), (9014, 6), (MAX_PACKET_BYTES, 18)] {
            driver.inject(PortId::TRUNK, IfIndex(3), LinkType::Host, &bytes[..length]).unwrap();
            assert_eq!(driver.outstanding(), frames, "{length}");
            let mut burst = Vec::new();
            assert_eq!(driver.receive(PortId::TRUNK, &mut burst, 64), 1);
            driver.transmit(PortId::TRUNK, &mut burst);
            driver.drain_sent(|_, sent| assert!(sent == &bytes[..length], "{length}"));
            assert_eq!(driver.outstanding(), 0);
        }
        let mut inject = |bytes| driver.inject(PortId::TRUNK, IfIndex(3), LinkType::Host, bytes);
        assert_eq!(inject(&bytes), Err(InjectError::TooLong(MAX_PACKET_BYTES + 1)));
        inject(&bytes[..9014]).unwrap();
        inject(&bytes[..9014]).unwrap();
        inject(&bytes[..1792]).unwrap();
        // Five frames are left: nothing of it stays.
        assert_eq!(inject(&bytes[..9014]), Err(InjectError::NoFrame));
        assert_eq!(driver.outstanding(), 13);
    }
}
