//! The UMEM of a worker, its frames, and its sockets.
//!
//! # Theory
//!
//! *What.* A UMEM is a region of memory cut into chunks of [`FRAME_BYTES`]. A chunk is in one of three hands: the kernel's (it lies in a ring
//! or is being received into or sent), ours as a [`Frame`] of a packet, or nobody's: then it waits in the free list.
//!
//! *Proof.* The right to a chunk is a move-only value in each hand but the kernel's: [`Chunk`] where it is a number, [`Frame`] where it
//! is memory. Chunks are made once when the UMEM is cut up, and again only by the rings the kernel returns them through; they end only in
//! rings. A frame is made of a chunk, and a chunk of a frame.
//!
//! *Thread safety.* Everything here belongs to one thread at a time.

use std::{
    error::Error,
    io,
    num::NonZeroU32,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
};

use xsk_rs::{
    CompQueue, FillQueue, RxQueue, Socket as XskSocket, TxQueue, Umem,
    config::{
        BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig, XDP_UMEM_MIN_CHUNK_SIZE,
    },
};

use super::{
    chunk::Chunk,
    ring::{Received, RingEntries, Rings},
};
use crate::frame::{Arena, FRAME_BYTES, Frame, HEADROOM_BYTES, Segment};

const _: () = assert!(FRAME_BYTES == XDP_UMEM_MIN_CHUNK_SIZE as usize);

/// A UMEM and those of its frames that are not in the kernel's hands.
#[derive(Debug)]
pub(super) struct Frames {
    pub arena: Arena,
    /// Free chunks, the one freed last at the end: its memory is likely to be in a cache.
    pub free: Vec<Chunk>,
    umem: Umem,
}

impl Frames {
    /// A UMEM of `count` frames, all of them free. Its sockets have fill and completion rings of the sizes in `entries`.
    pub fn new(count: NonZeroU32, entries: RingEntries) -> io::Result<Self> {
        let config = UmemConfig::builder()
            .frame_size(FrameSize::new(FRAME_BYTES as u32).map_err(invalid)?)
            // The kernel puts its own XDP_PACKET_HEADROOM in front of each packet, whatever is asked for here.
            .frame_headroom(0)
            .fill_queue_size(QueueSize::new(entries.fill).map_err(invalid)?)
            .comp_queue_size(QueueSize::new(entries.completion).map_err(invalid)?)
            .build()
            .map_err(invalid)?;
        let (umem, descriptors) = Umem::new(config, count, false).map_err(cause)?;

        // xsk-rs tells where a packet's data begins, not where the UMEM does; the first descriptor is that of chunk 0.
        let first = &descriptors[0];
        assert_eq!(first.addr(), HEADROOM_BYTES);
        // SAFETY: the descriptor is of this UMEM, and its data has length 0: nothing is accessed.
        let data = unsafe { umem.data(first) }.contents().as_ptr();
        // The memory came from mmap through foreign code, not from a Rust allocation; a pointer with its exposed provenance may reach all of it.
        let base = ptr::with_exposed_provenance_mut(data.expose_provenance() - HEADROOM_BYTES);
        let base = NonNull::new(base).expect("a mapping does not begin at address 0");
        // SAFETY: an anonymous mapping of count * FRAME_BYTES zeroed bytes that `umem` keeps; xsk-rs accesses it only through descriptors,
        // which end here. The arena lies beside `umem`, and Drop keeps the mapping for frames that are still out.
        let arena = unsafe { Arena::over(base, count.get()) };

        // SAFETY: each chunk is made once here; the kernel was given none.
        let free = (0..u64::from(count.get())).rev().map(|i| unsafe { Chunk::at(i * FRAME_BYTES as u64) }).collect();
        Ok(Self { arena, free, umem })
    }

    /// Frames of the UMEM, wherever they are.
    pub fn total(&self) -> u32 {
        self.arena.frames()
    }

    /// Frames that packets of ours hold.
    pub fn outstanding(&self) -> u32 {
        self.arena.outstanding()
    }

    /// The memory of a chunk of this UMEM.
    #[inline]
    pub fn frame(&mut self, chunk: Chunk) -> Frame {
        // SAFETY: a Chunk is the exclusive right to its chunk, and ends here. (A driver has one UMEM, and its chunks do not leave it.)
        unsafe { self.arena.take(chunk.into_address()) }
    }

    /// What was received.
    #[inline]
    pub fn segment(&mut self, received: Received) -> Segment {
        Segment { frame: self.frame(received.chunk), start: received.start, len: received.len }
    }

    /// The chunk of a frame, to be sent.
    ///
    /// # Panics
    /// Where the frame is of another UMEM.
    #[inline]
    pub fn chunk(&mut self, frame: Frame) -> Chunk {
        let address = self.arena.give_back(frame);
        let end = u64::from(self.arena.frames()) * FRAME_BYTES as u64;
        assert!(address < end, "a packet comes back to the driver that it came from");
        // SAFETY: the frame was the exclusive right to this chunk, and ended here.
        unsafe { Chunk::at(address) }
    }

    /// Makes a frame free.
    #[inline]
    pub fn give_back(&mut self, frame: Frame) {
        let chunk = self.chunk(frame);
        self.free.push(chunk);
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        // A packet that somebody still holds must not lose its memory; a leak is the smaller evil.
        if self.arena.outstanding() > 0 {
            std::mem::forget(self.umem.clone());
        }
    }
}

/// A socket bound to one queue of a device. libxdp is done with it after it was made; its queues here only keep it open.
#[derive(Debug)]
pub(super) struct Socket {
    rx: RxQueue,
    _tx: TxQueue,
    _fill: FillQueue,
    _completion: CompQueue,
}

impl Socket {
    /// Binds a socket to queue `queue` of `device`, in copy mode, with the memory of `frames`; loads no XDP program. `entries`
    /// has the sizes of the UMEM's fill and completion rings. `long_packets`: a packet may have several descriptors; libxdp
    /// binds all sockets of a UMEM as the first of them.
    pub fn open(
        frames: &Frames,
        device: &str,
        queue: u32,
        entries: RingEntries,
        long_packets: bool,
    ) -> io::Result<(Self, Rings)> {
        let flags = BindFlags::XDP_COPY | BindFlags::XDP_USE_NEED_WAKEUP;
        let flags = if long_packets { flags | BindFlags::XDP_USE_SG } else { flags };
        let config = SocketConfig::builder()
            .rx_queue_size(QueueSize::new(entries.rx).map_err(invalid)?)
            .tx_queue_size(QueueSize::new(entries.tx).map_err(invalid)?)
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(flags)
            .build();
        let interface: Interface = device.parse().map_err(invalid)?;
        // SAFETY: the flag that sockets sharing a queue would need is set, and no program is loaded.
        let (tx, rx, rings) = unsafe { XskSocket::new(config, &frames.umem, &interface, queue) }.map_err(cause)?;
        // Without rings of its own the socket would share another one's: the same queue was opened twice.
        let (fill, completion) = rings.ok_or_else(|| io::Error::from_raw_os_error(libc::EBUSY))?;
        let socket = Self { rx, _tx: tx, _fill: fill, _completion: completion };
        // SAFETY: socket and UMEM were made with these sizes just now; libxdp's view of the rings is never used; all chunks that this driver
        // pushes come from `frames`, its only UMEM.
        let rings = unsafe { Rings::of(socket.fd(), entries) }.map_err(|error| match error.raw_os_error() {
            // Kernels before 6.4 do not map the rings of a bound socket; the queue itself is not busy.
            Some(libc::EBUSY) => io::Error::from_raw_os_error(libc::EAFNOSUPPORT),
            _ => error,
        })?;
        Ok((socket, rings))
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the queues keep the descriptor open for as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.rx.fd().as_raw_fd()) }
    }
}

fn invalid(error: impl Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// The system's error behind one of xsk-rs.
fn cause(error: impl Error + Send + Sync + 'static) -> io::Error {
    let errno = error.source().and_then(|source| source.downcast_ref::<io::Error>()).and_then(io::Error::raw_os_error);
    errno.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}
