//! A chunk of a UMEM as a number.

use crate::frame::FRAME_BYTES;

/// The exclusive right to one chunk of a UMEM, as its address: bytes from the UMEM's start.
#[derive(Debug)]
pub(super) struct Chunk(u64);

impl Chunk {
    /// The chunk that holds byte `address`.
    ///
    /// # Safety
    /// Nobody else has it, in any form: the kernel has just returned it, or it was never handed out.
    #[inline]
    pub unsafe fn at(address: u64) -> Self {
        Self(address & !(FRAME_BYTES as u64 - 1))
    }

    /// Ends the right; the address of the chunk's first byte.
    #[inline]
    pub fn into_address(self) -> u64 {
        self.0
    }
}
