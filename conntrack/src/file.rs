//! A table that outlives its process.
//!
//! # What
//! A table's memory may be a file. A process that ends, however it ends, leaves its connections there; the next one
//! makes a table of its own in a new file and takes over what is live in the old one. It trusts nothing of the old file
//! but connections in the phase `Live`: those were whole before they became so, and a process that is killed stops
//! between two instructions, so every word is as it was stored. The index and the chains of free connections may have been
//! left in the middle of a change, and are made anew. That also lets the new table have another size.
//!
//! The new file takes the old one's name when it is complete; a process that is killed before has changed nothing.
//!
//! # Room
//! A page of a full tmpfs that is first touched later is a SIGBUS. So all of the file's pages are there before the table is used
//! (MADV_POPULATE_WRITE, madvise(2); unlike fallocate(2) it gets huge pages on a tmpfs mounted with `huge=advise`), and a file of
//! before is read, never mapped ([`crate::saved`]). Where two tables do not fit, the live connections of the old one are held in memory
//! while its file makes way, and a process that is killed just then loses them. Where not even one fits, the table is in memory.
//!
//! # Header
//! Words of 64 bits at the start of the file: [`MAGIC`], [`VERSION`] and the address family, buckets and connections, the
//! boot that the ticks count from (two words). The magic is written last.
//!
//! # Who may
//! A process holds a lock (flock) on its file as long as it has the table, so that no two use one. On a tmpfs: on a disk the
//! kernel would write every touched page back.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use nix::{errno::Errno, sys::statvfs::fstatvfs};
use thiserror::Error;
use weir_packet::{Address, Tick};
use weir_sync::{
    Arc, Domain,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    Table, TableConfig,
    arrays::Arrays,
    conn,
    saved::Saved,
    state::State,
    storage::{Lines, Memory},
};

/// The first eight bytes of a table's file.
pub const MAGIC: [u8; 8] = *b"weirconn";
/// Grows whenever a word of the layout gets another meaning.
pub const VERSION: u32 = 1;

pub(crate) const HEADER_WORDS: usize = 5;
/// Documentation/admin-guide/sysctl/kernel.rst, random/boot_id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why a table could not be made in a file.
#[derive(Debug, Error)]
pub enum FileError {
    /// Another process has the table.
    #[error("the connection table {0} is in use by another process; stop it first")]
    InUse(PathBuf),
    /// The system refused.
    #[error("{what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Why a file's connections were not taken over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Refusal {
    /// It is no connection table, or was never completed.
    #[error("it is no connection table")]
    NotATable,
    /// Its words mean something else.
    #[error("it has layout version {0}, and this program knows version {VERSION} only")]
    Version(u32),
    /// It is of the other address family.
    #[error("it is a table of IPv{0}")]
    Family(u32),
    /// It is from before the last boot: its clock is another.
    #[error("it is from before the last boot")]
    OtherBoot,
    /// It is shorter than it says.
    #[error("it is cut short")]
    CutShort,
    /// The system does not give its bytes.
    #[error("it cannot be read")]
    Unreadable,
}

/// A file system has no room for a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("a table of {needed_bytes} bytes needs {missing_bytes} more than there are")]
pub struct NoRoom {
    /// Bytes of the table.
    pub needed_bytes: u64,
    /// Bytes that there are too few of.
    pub missing_bytes: u64,
}

/// What was taken over from the process before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Restored {
    /// Connections that live on.
    pub connections: usize,
    /// Connections that had no room in a smaller table.
    pub left_out: usize,
    /// Why nothing, or nothing more, was taken over, where there was a file.
    pub refused: Option<Refusal>,
    /// Why the table is not in its file but in this process's memory.
    pub no_room: Option<NoRoom>,
}

pub(crate) fn family<A: Address>() -> u32 {
    if A::WORDS == 1 { 4 } else { 6 }
}

/// This boot's number, as two words; zeroes where there is none.
pub(crate) fn boot() -> [u64; 2] {
    let text = fs::read_to_string(BOOT_ID).unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).unwrap_or(0);
    [(number >> 64) as u64, number as u64]
}

impl<A: Address> Table<A> {
    /// A table in a file, with the connections of the one that is there under that name. `now` is the time by the clock that
    /// all processes of a boot share, as the times of connections are. Where the file has no room, the table is in memory.
    ///
    /// # Errors
    /// Where a process that lives has the file, or the system refuses.
    ///
    /// # Panics
    /// Where there is neither room nor memory.
    pub fn in_file(
        config: TableConfig,
        domain: Arc<Domain>,
        path: &Path,
        now: Tick,
    ) -> Result<(Self, Restored), FileError> {
        let failed = |what: &'static str| move |source| FileError::System { what, path: path.to_owned(), source };
        let mut saved = Saved::<A>::open(path)?;
        let new_path = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&new_path)
            .map_err(failed("cannot make the connection table beside"))?;
        // Nobody has this file but another process that starts now, whose file it then is. One that was left is emptied.
        file.try_lock().map_err(|_| FileError::InUse(path.to_owned()))?;
        let sizes = Self::sizes(&config);
        let layout = sizes.layout;
        let reserve = || reserve(&file, layout.bytes).map_err(failed("cannot reserve memory for the connection table"));
        let mut memory = reserve()?;
        if memory.is_err() && path.exists() {
            saved = saved.map(|saved| saved.and_then(Saved::into_memory));
            fs::remove_file(path).map_err(failed("cannot remove the old connection table"))?;
            memory = reserve()?;
        }
        let arrays = match &memory {
            Ok(memory) => Arrays::of(memory, &layout),
            Err(_) => Arrays::new(&layout),
        };
        let table = Self::with(config, domain, arrays, sizes);
        let mut restored = match saved {
            Some(Ok(saved)) => table.restore(&saved, now),
            Some(Err(refusal)) => Restored { refused: Some(refusal), ..Restored::default() },
            None => Restored::default(),
        };
        let memory = match memory {
            Ok(memory) => memory,
            Err(no_room) => {
                fs::remove_file(&new_path).map_err(failed("cannot remove the connection table beside"))?;
                restored.no_room = Some(no_room);
                return Ok((table, restored));
            }
        };

        let header = Lines::<AtomicU64>::at(&memory, 0, HEADER_WORDS);
        let [boot_high, boot_low] = boot();
        let words = [
            u64::from(VERSION) << 32 | u64::from(family::<A>()),
            u64::from(sizes.bucket_count) << 32 | u64::from(sizes.conn_count),
            boot_high,
            boot_low,
        ];
        for (at, word) in words.into_iter().enumerate() {
            header[at + 1].store(word, Ordering::Relaxed);
        }
        header[0].store(u64::from_le_bytes(MAGIC), Ordering::Release);
        fs::rename(&new_path, path).map_err(failed("cannot put into place the connection table"))?;
        Ok((table, restored))
    }

    /// Takes over the live connections of another table. Before any worker uses this one.
    fn restore(&self, saved: &Saved<A>, now: Tick) -> Restored {
        let mut restored = Restored::default();
        let mut handle = self.handle();
        for chunk in saved.chunks() {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(refusal) => return Restored { refused: Some(refusal), ..restored },
            };
            for index in 0..chunk.count {
                let lines = conn::Lines::<A>::of(&chunk.conns, index);
                let state = State(lines.state().load(Ordering::Acquire));
                if !state.is_live() || self.conns.is_expired(state, lines, now) {
                    continue;
                }
                if self.adopt(&mut handle, lines, &chunk.tcp[index as usize]) {
                    restored.connections += 1;
                } else {
                    restored.left_out += 1;
                }
            }
        }
        restored
    }
}

/// Zeroes of a file's own, all of whose pages are there.
fn reserve(file: &File, bytes: usize) -> io::Result<Result<Arc<Memory>, NoRoom>> {
    file.set_len(0)?;
    let no_room = |free: u64| {
        let needed_bytes = bytes as u64;
        // Others may have given some back since it was refused.
        NoRoom { needed_bytes, missing_bytes: needed_bytes.saturating_sub(free).max(crate::storage::PAGE_BYTES as u64) }
    };
    match free_bytes(file)? {
        Some(free) if free < bytes as u64 => return Ok(Err(no_room(free))),
        _ => {}
    }
    file.set_len(bytes as u64)?;
    let memory = Memory::of_file(file.try_clone()?)?;
    match memory.populate() {
        Ok(()) => Ok(Ok(memory)),
        // The fault that would have been a SIGBUS (madvise(2), MADV_POPULATE_WRITE): others took the room meanwhile.
        Err(error) if [Errno::EFAULT, Errno::ENOMEM].contains(&errno(&error)) => {
            drop(memory);
            file.set_len(0)?;
            Ok(Err(no_room(free_bytes(file)?.unwrap_or(0))))
        }
        Err(error) => Err(error),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// What a file's file system has room for; `None` without a limit, as a tmpfs of size 0 (statvfs(3)).
fn free_bytes(file: &File) -> io::Result<Option<u64>> {
    let stat = fstatvfs(file)?;
    Ok((stat.blocks() > 0).then(|| stat.blocks_available().saturating_mul(stat.fragment_size())))
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::{
        collections::BTreeSet,
        fs::File,
        net::{Ipv4Addr, Ipv6Addr},
        os::unix::fs::FileExt,
    };

    use weir_packet::{Direction, FlowKey, Ports, Protocol};

    use super::*;
    use crate::{Attributes, Insert, NewConn, Observed, TcpSettings, Timeouts};

    fn config(max_entries: u32, seed: u64) -> TableConfig {
        TableConfig { max_entries, seed: [seed, 7], timeouts: Timeouts::default(), tcp: TcpSettings::default() }
    }

    fn new_conn<A: Address>(number: u32) -> NewConn<A> {
        let original = FlowKey {
            src: A::from_bits128(u128::from(number) + 1),
            dst: A::from_bits128(0x0a60_0001),
            ports: Ports::new(1000, 53),
            protocol: if number.is_multiple_of(2) { Protocol::TCP } else { Protocol::UDP },
        };
        let reply = FlowKey { src: A::from_bits128(0x0af4_0001), ..original.invert() };
        let attributes =
            Attributes { device: number, stamps: [1, 2, 3], generation: 9, next_hops: [5, 6], flags: number as u8 };
        let first = Observed { tcp_flags: 2, tcp_seq: number, tcp_window: 1000, ..Observed::default() };
        NewConn { original, reply, attributes, first }
    }

    fn fill<A: Address>(path: &Path, count: u32, remove_every: u32) {
        let domain = Domain::new();
        let mut participant = domain.join();
        let (table, restored) = Table::<A>::in_file(config(1000, 1), domain, path, Tick(0)).unwrap();
        assert_eq!(restored, Restored::default());
        let mut handle = table.handle();
        let turn = participant.enter();
        for number in 0..count {
            let Insert::Inserted(conn) = table.insert(&mut handle, new_conn(number), Tick(number), &turn) else {
                panic!("room")
            };
            if number % remove_every == 0 {
                assert!(table.remove(&mut handle, conn, &turn));
            }
        }
    }

    fn outlives<A: Address>() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fill::<A>(&path, 500, 3);
        // A table of another size and another seed; once more, from that one.
        for (max_entries, seed) in [(400, 2), (5000, 3)] {
            let domain = Domain::new();
            let mut participant = domain.join();
            let (table, restored) = Table::<A>::in_file(config(max_entries, seed), domain, &path, Tick(600)).unwrap();
            assert_eq!(restored, Restored { connections: 333, left_out: 0, ..Restored::default() });
            assert_eq!(table.len(), 333);
            let turn = participant.enter();
            for number in 0..500 {
                let new = new_conn::<A>(number);
                for (key, direction) in [(new.original, Direction::Original), (new.reply, Direction::Reply)] {
                    let hit = table.lookup(&key, table.hash(&key), Tick(600), &turn);
                    assert_eq!(hit.map(|hit| hit.direction), (number % 3 != 0).then_some(direction), "{number}");
                    let Some(hit) = hit else { continue };
                    let conn = table.conn(hit.conn);
                    let attributes =
                        Attributes { stamps: [0, 0, 3], generation: 0, next_hops: [0, 0], ..new.attributes };
                    assert_eq!((conn.original(), conn.reply()), (new.original, new.reply));
                    assert_eq!(conn.attributes(), attributes, "judged by nobody yet");
                }
            }
            let mut seen = BTreeSet::new();
            table.for_each(Tick(600), |entry| {
                seen.insert(entry.attributes.device);
                assert_eq!(entry.last_seen, Tick(entry.attributes.device));
                assert_eq!(entry.tcp_state.is_some(), entry.attributes.device % 2 == 0);
            });
            assert_eq!(seen.len(), 333);
        }
    }

    #[test]
    fn connections_outlive_their_process_ipv4() {
        outlives::<Ipv4Addr>();
    }

    #[test]
    fn connections_outlive_their_process_ipv6() {
        outlives::<Ipv6Addr>();
    }

    #[test]
    fn what_expired_meanwhile_is_not_taken_over_and_what_does_not_fit_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fill::<Ipv4Addr>(&path, 500, 1000);
        let open =
            |max_entries, now| Table::<Ipv4Addr>::in_file(config(max_entries, 5), Domain::new(), &path, now).unwrap().1;
        // An unreplied UDP flow lives 30 seconds, a TCP connection after its SYN 120.
        let restored = open(1000, Tick(4000));
        assert_eq!(restored, Restored { connections: 249, left_out: 0, ..Restored::default() });
        let restored = open(100, Tick(4000));
        assert_eq!(restored, Restored { connections: 100, left_out: 149, ..Restored::default() });
    }

    #[test]
    fn a_file_in_use_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let open = || Table::<Ipv4Addr>::in_file(config(10, 1), Domain::new(), &path, Tick(0));
        let first = open().unwrap();
        assert!(matches!(open(), Err(FileError::InUse(_))));
        drop(first);
        assert!(open().is_ok());
        let nowhere = Table::<Ipv4Addr>::in_file(config(10, 1), Domain::new(), &path.join("x"), Tick(0));
        assert!(matches!(nowhere, Err(FileError::System { .. })));
    }

    #[test]
    fn files_that_are_not_understood_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let refusal = |change: &dyn Fn(&File)| {
            let _ = fs::remove_file(&path);
            fill::<Ipv4Addr>(&path, 10, 1);
            change(&OpenOptions::new().write(true).open(&path).unwrap());
            let (table, restored) = Table::<Ipv4Addr>::in_file(config(9, 1), Domain::new(), &path, Tick(0)).unwrap();
            assert_eq!((table.len(), restored.connections), (0, 0));
            restored.refused
        };
        assert_eq!(refusal(&|file| file.set_len(10).unwrap()), Some(Refusal::NotATable));
        assert_eq!(refusal(&|file| file.write_all_at(b"x", 0).unwrap()), Some(Refusal::NotATable));
        assert_eq!(refusal(&|file| file.write_all_at(&2u32.to_le_bytes(), 12).unwrap()), Some(Refusal::Version(2)));
        assert_eq!(refusal(&|file| file.write_all_at(&6u32.to_le_bytes(), 8).unwrap()), Some(Refusal::Family(6)));
        assert_eq!(refusal(&|file| file.write_all_at(&[0; 16], 24).unwrap()), Some(Refusal::OtherBoot));
        assert_eq!(refusal(&|file| file.set_len(8192).unwrap()), Some(Refusal::CutShort));
        assert_eq!(refusal(&|_| {}), None);
    }
}
