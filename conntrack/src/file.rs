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
//! # Header
//! Words of 64 bits at the start of the file: [`MAGIC`], [`VERSION`] and the address family, buckets and connections, the
//! boot that the ticks count from (two words). The magic is written last.
//!
//! # Who may
//! A process holds a lock (flock) on its file as long as it has the table, so that no two use one. On a tmpfs: on a disk the
//! kernel would write every touched page back.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;
use weir_packet::{Address, Tick};
use weir_sync::{
    Arc, Domain,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    Table, TableConfig,
    arrays::{Arrays, Layout},
    conn,
    state::State,
    storage::{Lines, Memory},
};

/// The first eight bytes of a table's file.
pub const MAGIC: [u8; 8] = *b"weirconn";
/// Grows whenever a word of the layout gets another meaning.
pub const VERSION: u32 = 1;

const HEADER_WORDS: usize = 5;
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
}

/// What was taken over from the process before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Restored {
    /// Connections that live on.
    pub connections: usize,
    /// Connections that had no room in a smaller table.
    pub left_out: usize,
    /// Why nothing was taken over, where there was a file.
    pub refused: Option<Refusal>,
}

/// The table of a process that has ended.
struct Saved<A: Address> {
    arrays: Arrays,
    used: u32,
    family: std::marker::PhantomData<A>,
}

fn family<A: Address>() -> u32 {
    if A::WORDS == 1 { 4 } else { 6 }
}

/// This boot's number, as two words; zeroes where there is none.
fn boot() -> [u64; 2] {
    let text = fs::read_to_string(BOOT_ID).unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).unwrap_or(0);
    [(number >> 64) as u64, number as u64]
}

impl<A: Address> Table<A> {
    /// A table in a file, with the connections of the one that is there under that name. `now` is the time by the clock that
    /// all processes of a boot share, as the times of connections are.
    ///
    /// # Errors
    /// Where a process that lives has the file, or the system refuses.
    pub fn in_file(
        config: TableConfig,
        domain: Arc<Domain>,
        path: &Path,
        now: Tick,
    ) -> Result<(Self, Restored), FileError> {
        let failed = |what: &'static str| move |source| FileError::System { what, path: path.to_owned(), source };
        let saved = Saved::<A>::open(path)?;
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
        file.set_len(0).map_err(failed("cannot empty the connection table beside"))?;
        let sizes = Self::sizes(&config);
        let layout = sizes.layout;
        file.set_len(layout.bytes as u64).map_err(failed("cannot make room for the connection table"))?;
        let memory = Memory::of_file(file).map_err(failed("cannot map the connection table"))?;
        let table = Self::with(config, domain, Arrays::of(&memory, &layout), sizes);
        let restored = match saved {
            Some(Ok(saved)) => table.restore(&saved, now),
            Some(Err(refusal)) => Restored { refused: Some(refusal), ..Restored::default() },
            None => Restored::default(),
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
        for index in 0..saved.used {
            let lines = conn::Lines::<A>::of(&saved.arrays.conns, index);
            let state = State(lines.state().load(Ordering::Acquire));
            if !state.is_live() || self.conns.is_expired(state, lines, now) {
                continue;
            }
            if self.adopt(&mut handle, lines, &saved.arrays.tcp[index as usize]) {
                restored.connections += 1;
            } else {
                restored.left_out += 1;
            }
        }
        restored
    }
}

impl<A: Address> Saved<A> {
    /// The table in a file, if there is one.
    fn open(path: &Path) -> Result<Option<Result<Self, Refusal>>, FileError> {
        let failed = |what: &'static str| move |source| FileError::System { what, path: path.to_owned(), source };
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("cannot open the connection table")(error)),
        };
        file.try_lock().map_err(|_| FileError::InUse(path.to_owned()))?;
        let length = file.metadata().map_err(failed("cannot read the length of the connection table"))?.len();
        if length < crate::storage::PAGE_BYTES as u64 {
            return Ok(Some(Err(Refusal::NotATable)));
        }
        let memory = Memory::of_file(file).map_err(failed("cannot map the connection table"))?;
        Ok(Some(Self::read(&memory, length)))
    }

    fn read(memory: &Arc<Memory>, length: u64) -> Result<Self, Refusal> {
        let header = Lines::<AtomicU64>::at(memory, 0, HEADER_WORDS);
        let word = |at: usize| header[at].load(Ordering::Acquire);
        let halves = |word: u64| ((word >> 32) as u32, word as u32);
        if word(0) != u64::from_le_bytes(MAGIC) {
            return Err(Refusal::NotATable);
        }
        match halves(word(1)) {
            (VERSION, found) if found == family::<A>() => {}
            (VERSION, found) => return Err(Refusal::Family(found)),
            (version, _) => return Err(Refusal::Version(version)),
        }
        if [word(3), word(4)] != boot() {
            return Err(Refusal::OtherBoot);
        }
        let (bucket_count, conn_count) = halves(word(2));
        let layout = Layout::new::<A>(bucket_count, conn_count);
        if (layout.bytes as u64) > length {
            return Err(Refusal::CutShort);
        }
        let arrays = Arrays::of(memory, &layout);
        let used = arrays.used[0].load(Ordering::Relaxed).min(conn_count);
        Ok(Self { arrays, used, family: std::marker::PhantomData })
    }
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
            assert_eq!(restored, Restored { connections: 333, left_out: 0, refused: None });
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
        assert_eq!(restored, Restored { connections: 249, left_out: 0, refused: None });
        let restored = open(100, Tick(4000));
        assert_eq!(restored, Restored { connections: 100, left_out: 149, refused: None });
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
