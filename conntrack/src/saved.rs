//! The table of a process that has ended, as its file has it.
//!
//! It is read, never mapped: to touch a page that the file does not have yet would take one of the tmpfs, and be a SIGBUS where that is
//! full. What is needed of it are its connections, a chunk after the other.

use std::{
    fs::{File, OpenOptions},
    io,
    marker::PhantomData,
    os::unix::fs::FileExt,
    path::Path,
};

use weir_packet::Address;
use weir_sync::atomic::{AtomicU64, Ordering};

use crate::{
    arrays::{Layout, USED_AT},
    conn,
    file::{FileError, HEADER_WORDS, MAGIC, Refusal, VERSION, boot, family},
    storage::{Lines, Memory, PAGE_BYTES},
    tcp::TcpLine,
};

/// Connections of a chunk that is read at once.
const CHUNK: u32 = 4096;

/// The table of a process that has ended.
pub(crate) struct Saved<A: Address> {
    connections: Connections,
    family: PhantomData<A>,
}

enum Connections {
    /// In their file, of this layout; so many were ever used.
    InFile(File, Layout, u32),
    InMemory(Chunk),
}

/// Connections with their TCP state.
#[derive(Clone)]
pub(crate) struct Chunk {
    pub(crate) conns: Lines<conn::Line>,
    pub(crate) tcp: Lines<TcpLine>,
    pub(crate) count: u32,
}

impl<A: Address> Saved<A> {
    /// The table in a file, if there is one.
    pub(crate) fn open(path: &Path) -> Result<Option<Result<Self, Refusal>>, FileError> {
        let failed = |what: &'static str| move |source| FileError::System { what, path: path.to_owned(), source };
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("cannot open the connection table")(error)),
        };
        file.try_lock().map_err(|_| FileError::InUse(path.to_owned()))?;
        let length = file.metadata().map_err(failed("cannot read the length of the connection table"))?.len();
        if length < PAGE_BYTES as u64 {
            return Ok(Some(Err(Refusal::NotATable)));
        }
        let mut page = [0; PAGE_BYTES];
        file.read_exact_at(&mut page, 0).map_err(failed("cannot read the connection table"))?;
        Ok(Some(Self::read(file, &page, length)))
    }

    fn read(file: File, page: &[u8; PAGE_BYTES], length: u64) -> Result<Self, Refusal> {
        let mut header = [0; HEADER_WORDS];
        for (word, bytes) in header.iter_mut().zip(page.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let halves = |word: u64| ((word >> 32) as u32, word as u32);
        if header[0] != u64::from_le_bytes(MAGIC) {
            return Err(Refusal::NotATable);
        }
        match halves(header[1]) {
            (VERSION, found) if found == family::<A>() => {}
            (VERSION, found) => return Err(Refusal::Family(found)),
            (version, _) => return Err(Refusal::Version(version)),
        }
        if header[3..] != boot() {
            return Err(Refusal::OtherBoot);
        }
        let (bucket_count, conn_count) = halves(header[2]);
        let layout = Layout::new::<A>(bucket_count, conn_count);
        if (layout.bytes as u64) > length {
            return Err(Refusal::CutShort);
        }
        let [used, ..] = page[USED_AT..].as_chunks().0 else { return Err(Refusal::CutShort) };
        let used = u32::from_ne_bytes(*used).min(conn_count);
        Ok(Self { connections: Connections::InFile(file, layout, used), family: PhantomData })
    }

    /// All connections, in order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = Result<Chunk, Refusal>> {
        let (in_file, in_memory) = match &self.connections {
            Connections::InFile(file, layout, used) => (Some((file, layout, *used)), None),
            Connections::InMemory(chunk) => (None, Some(Ok(chunk.clone()))),
        };
        let read = in_file.into_iter().flat_map(|(file, layout, used)| {
            let chunk = move |first| Chunk::read::<A>(file, layout, first, CHUNK.min(used - first));
            (0..used).step_by(CHUNK as usize).map(chunk)
        });
        read.chain(in_memory)
    }

    /// The same without its file.
    pub(crate) fn into_memory(self) -> Result<Self, Refusal> {
        let chunk = match self.connections {
            Connections::InFile(file, layout, used) => Chunk::read::<A>(&file, &layout, 0, used)?,
            Connections::InMemory(chunk) => chunk,
        };
        Ok(Self { connections: Connections::InMemory(chunk), family: PhantomData })
    }
}

impl Chunk {
    fn read<A: Address>(file: &File, layout: &Layout, first: u32, count: u32) -> Result<Self, Refusal> {
        let (first, connections) = (first as usize, count as usize);
        let conn_bytes = conn::Lines::<A>::COUNT * size_of::<conn::Line>();
        let conns = read(file, layout.conns + first * conn_bytes, connections * conn_bytes)?;
        let tcp = read(file, layout.tcp + first * size_of::<TcpLine>(), connections * size_of::<TcpLine>())?;
        Ok(Self { conns, tcp, count })
    }
}

/// A part of a file, in memory of its own.
fn read<T: crate::storage::Zeroable>(file: &File, offset: usize, bytes: usize) -> Result<Lines<T>, Refusal> {
    const PIECE_BYTES: usize = 1 << 16;
    let memory = Memory::anonymous(bytes.max(PAGE_BYTES));
    let words = Lines::<AtomicU64>::at(&memory, 0, bytes / size_of::<u64>());
    let mut piece = vec![0; PIECE_BYTES.min(bytes)];
    let mut at = 0;
    for words in words.chunks(PIECE_BYTES / size_of::<u64>()) {
        let piece = &mut piece[..size_of_val(words)];
        file.read_exact_at(piece, (offset + at) as u64).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Refusal::CutShort,
            _ => Refusal::Unreadable,
        })?;
        for (word, bytes) in words.iter().zip(piece.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        at += piece.len();
    }
    Ok(Lines::at(&memory, 0, bytes / size_of::<T>()))
}
