//! One file, read whole or not at all.
//!
//! # Theory
//! What counts is a file that nobody is writing: a text that was cut short, and is being written again, is no text. A read lease
//! (fcntl(2), F_SETLEASE with F_RDLCK) is refused with EAGAIN while any process has the file open for writing, a writable mapping too:
//! exact, and some 6 µs on ext4, tmpfs and overlayfs. It is given back at once, so that no writer waits for it, and asked for again after
//! reading; a file that was opened, changed and closed in between has another stamp. Not told is who writes past this view of the file: into
//! the upper layer of an overlay, or on another machine of a network file system. Where no lease is to be had (the file is another
//! user's and CAP_LEASE is missing, or its file system has none) a file counts once it was left alone for [`QUIET`].
//!
//! Only regular files are read, and none is waited for: opening a FIFO would block until somebody writes, a device may do anything.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The largest file that is read, in bytes.
pub const MAX_BYTES: u64 = 512 << 20;
// Places in it are numbers of 32 bits.
const _: () = assert!(MAX_BYTES <= u32::MAX as u64);
/// How long a file must have been left alone where the kernel does not tell who has it open.
const QUIET: Duration = Duration::from_millis(200);
/// How often a file that changes while it is read is read again at once.
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_millis(10);

/// Which signal tells of a broken lease (include/uapi/asm-generic/fcntl.h); the crate libc has no name for it.
const F_SETSIG: libc::c_int = 10;

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Words of a stamp.
    pub const WORDS: usize = 7;

    /// The stamp of a file as it is.
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// It as plain numbers.
    pub fn words(&self) -> [u64; Self::WORDS] {
        let Self { device, inode, bytes, modified, changed } = *self;
        let [modified, changed] =
            [modified, changed].map(|(seconds, nanoseconds)| [seconds as u64, nanoseconds as u64]);
        [device, inode, bytes, modified[0], modified[1], changed[0], changed[1]]
    }

    /// The size of the file, of a stamp as plain numbers.
    pub fn bytes_of(words: &[u64; Self::WORDS]) -> u64 {
        words[2]
    }

    /// Whether the file's last change was longer ago.
    pub fn is_older_than(&self, age: Duration) -> bool {
        self.age().is_some_and(|past| past > age)
    }

    /// How long ago the file's last change was; `None` where that is yet to come, by a clock that was set back.
    fn age(&self) -> Option<Duration> {
        let (seconds, nanoseconds) = self.changed;
        let changed = Duration::new(u64::try_from(seconds).ok()?, nanoseconds as u32);
        SystemTime::now().duration_since(UNIX_EPOCH).ok()?.checked_sub(changed)
    }
}

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// It may be half of what it is to become.
    #[error("it is open for writing, and counts when it is closed (`fuser` names the process)")]
    Written,
    /// There is nothing to be read whole.
    #[error("it is {0}, and only regular files are read")]
    NotRegular(Kind),
    /// It is too long.
    #[error("it has {0} bytes, and a file of at most {MAX_BYTES} is read; split it into several")]
    TooLong(u64),
    /// The system refuses.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// A kind of file that is not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A FIFO.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character or block device.
    Device,
    /// A folder, or something unheard of.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fifo => "a FIFO",
            Self::Socket => "a socket",
            Self::Device => "a device",
            Self::Other => "no file",
        })
    }
}

fn regular(metadata: &fs::Metadata) -> Result<Stamp, Unread> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(Stamp::of(metadata));
    }
    Err(Unread::NotRegular(match () {
        () if kind.is_fifo() => Kind::Fifo,
        () if kind.is_socket() => Kind::Socket,
        () if kind.is_char_device() || kind.is_block_device() => Kind::Device,
        () => Kind::Other,
    }))
}

/// A file's bytes, all of one state, with its stamp. Symbolic links are followed.
///
/// # Errors
/// Where it is not to be read now.
pub fn read(path: &Path) -> Result<(Stamp, Vec<u8>), Unread> {
    for attempt in 0..TRIES {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let (file, stamp) = open(path)?;
        if stamp.bytes > MAX_BYTES {
            return Err(Unread::TooLong(stamp.bytes));
        }
        if is_written_now(&file, &stamp) {
            return Err(Unread::Written);
        }
        let mut bytes = Vec::new();
        (&file).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        // It may have been opened since.
        if is_written_now(&file, &stamp) {
            return Err(Unread::Written);
        }
        if Stamp::of(&file.metadata()?) == stamp && bytes.len() as u64 == stamp.bytes {
            return Ok((stamp, bytes));
        }
    }
    Err(Unread::Written)
}

/// Whether a regular file is open for writing, or may be. What cannot be opened is not.
pub fn is_written(path: &Path) -> bool {
    match open(path) {
        Ok((file, stamp)) => is_written_now(&file, &stamp),
        Err(error) => matches!(error, Unread::Written),
    }
}

fn open(path: &Path) -> Result<(File, Stamp), Unread> {
    // Looked at before it is opened, as opening a device may do something, and after, as it may be another one by then.
    regular(&fs::metadata(path)?)?;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        // Somebody has a lease for writing (open(2)).
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Unread::Written),
        Err(error) => return Err(error.into()),
    };
    let stamp = regular(&file.metadata()?)?;
    Ok((file, stamp))
}

fn is_written_now(file: &File, stamp: &Stamp) -> bool {
    lease_is_refused(file).unwrap_or_else(|| stamp.age().is_some_and(|age| age <= QUIET))
}

/// Whether another has the file open for writing; `None` where the kernel does not say.
fn lease_is_refused(file: &File) -> Option<bool> {
    let ask = |command: libc::c_int, argument: libc::c_int| {
        // SAFETY: the descriptor is open, and these commands take an integer.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // A writer that comes just now is announced by a signal: SIGIO, which would end the process, or this one, which means nothing.
    ask(F_SETSIG, libc::SIGURG).ok()?;
    match ask(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {
            // Where it fails the lease ends with the descriptor, soon.
            let _ = ask(libc::F_SETLEASE, libc::F_UNLCK);
            Some(false)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(true),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixListener, time::Instant};

    use super::*;

    fn outcome(path: &Path) -> Result<String, String> {
        read(path).map(|(_, bytes)| String::from_utf8(bytes).unwrap()).map_err(|error| match error {
            Unread::System(error) => format!("{:?}", error.kind()),
            other => other.to_string(),
        })
    }

    #[test]
    fn a_file_counts_when_its_last_writer_has_closed_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        fs::write(&path, "old").unwrap();
        let link = folder.path().join("link.yaml");
        std::os::unix::fs::symlink("a.yaml", &link).unwrap();
        let reader = File::open(&path).unwrap();
        assert_eq!((outcome(&path), is_written(&path)), (Ok("old".into()), false), "a reader is no writer");
        let mut writers = [(); 2].map(|()| OpenOptions::new().write(true).open(&path).unwrap());
        for path in [&path, &link] {
            assert!(is_written(path) && outcome(path).unwrap_err().starts_with("it is open for writing"));
        }
        writers[0].set_len(0).unwrap();
        writers[0].write_all(b"new text").unwrap();
        let [first, second] = writers;
        drop(first);
        assert!(is_written(&path), "another still has it");
        drop(second);
        for path in [&path, &link] {
            assert_eq!((outcome(path), is_written(path)), (Ok("new text".into()), false));
        }
        // Renamed in from where it was written.
        let mut writer = File::create(folder.path().join("new")).unwrap();
        writer.write_all(b"renamed").unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        assert!(outcome(&path).is_err());
        drop(writer);
        assert_eq!(outcome(&path), Ok("renamed".into()));
        drop(reader);
    }

    /// Half of the texts that a writer leaves for a moment must never be read.
    #[test]
    fn what_is_read_beside_a_writer_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let text = |number: u8| vec![b'a' + number % 26; 20_000 + usize::from(number)];
        fs::write(&path, text(0)).unwrap();
        let until = Instant::now() + Duration::from_secs(1);
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in (0..=255).cycle() {
                    let mut file = File::create(&path).unwrap();
                    for part in text(number).chunks(4096) {
                        file.write_all(part).unwrap();
                    }
                    drop(file);
                    if Instant::now() > until {
                        return;
                    }
                    thread::sleep(Duration::from_micros(u64::from(number) * 5));
                }
            });
            let (mut whole, mut refused) = (0, 0);
            while Instant::now() < until {
                match read(&path) {
                    Ok((_, bytes)) => {
                        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "two texts in one");
                        assert_eq!(text((bytes.len() - 20_000) as u8), bytes);
                        whole += 1;
                    }
                    Err(Unread::Written) => refused += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            assert!(whole > 20 && refused > 20, "{whole} whole, {refused} refused");
        });
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let made = std::process::Command::new("mkfifo").arg(path("fifo")).status().unwrap();
        assert!(made.success());
        let _listener = UnixListener::bind(path("socket")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("zero")).unwrap();
        fs::create_dir(path("folder")).unwrap();
        File::create(path("long")).unwrap().set_len(MAX_BYTES + 1).unwrap();
        let refused = |name: &str| outcome(&path(name)).unwrap_err();
        assert_eq!(refused("fifo"), "it is a FIFO, and only regular files are read");
        assert_eq!(refused("socket"), "it is a socket, and only regular files are read");
        assert_eq!(refused("zero"), "it is a device, and only regular files are read");
        assert_eq!(refused("folder"), "it is no file, and only regular files are read");
        assert!(refused("long").starts_with("it has 536870913 bytes, and a file of at most 536870912 is read"));
        assert_eq!(refused("none"), "NotFound");
    }

    #[test]
    fn without_a_lease_a_file_counts_once_it_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        fs::write(&path, "text").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(lease_is_refused(&file), Some(false));
        // A descriptor without a lease of its own: what it refers to is no file.
        let path_only = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
        assert_eq!(lease_is_refused(&path_only), None);
        let stamp = |seconds_ahead: i64| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let changed = (now.as_secs() as i64 + seconds_ahead, i64::from(now.subsec_nanos()));
            Stamp { changed, ..Stamp::of(&file.metadata().unwrap()) }
        };
        assert_eq!([-1, 0, 5].map(|ahead| is_written_now(&path_only, &stamp(ahead))), [false, true, false]);
    }
}
