//! The texts that are in force, kept on a disk for a start that finds its sources unreadable or half written; and beside them what
//! default/kubernetes had last ([`crate::translate::LastApi`]).
//!
//! # File
//! [`MAGIC`] and the version; seconds since 1970; how many texts; each text as the lengths of its path and of its compressed bytes, its file's
//! stamp, the path, and the text (gzip, RFC 1952, with its own CRC-32); a CRC-32 of all before. Numbers are little-endian. The file is written
//! whole under another name, synced, and renamed: there is the one of before, or the new one.
//!
//! What is read back is trusted as little as any other file: a bad one is an error that says why, and every size is bounded.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, Crc, read::GzDecoder, write::GzEncoder};

use super::{
    file::{self, Stamp, Unread},
    library::InForce,
};

const MAGIC: [u8; 8] = *b"weirkept";
const VERSION: u32 = 1;
/// The name of the file in its folder.
const NAME: &str = "objects";
/// That of the file with the API's backends.
pub(crate) const API_NAME: &str = "api";
/// The longest file, in bytes: a tenth of the texts, or less.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// All texts together, in bytes.
const MAX_TEXT_BYTES: u64 = 1 << 30;
/// Longest path (PATH_MAX, limits.h).
const MAX_PATH_BYTES: u32 = 4096;
const CHECKSUM_BYTES: usize = 4;
/// All but the texts.
const FRAME_BYTES: u64 = 8 + 4 + 8 + 4 + CHECKSUM_BYTES as u64;
/// What each text has beside its path and its bytes.
const ENTRY_BYTES: usize = 4 + 4 + 8 * Stamp::WORDS;

/// Texts that were in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// When they were written down.
    pub since_unix_seconds: u64,
    /// By the path that each was read by.
    pub texts: Vec<(PathBuf, String)>,
}

/// Why there are no kept texts, or none are kept.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The system refuses.
    #[error("{what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The file is not to be used.
    #[error("{path} is not used: {why}")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: Unread,
    },
    /// It is none of these.
    #[error("{path} is not used: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is too much to be kept.
    #[error("the objects in force are not kept for the next start: their texts have more than {MAX_TEXT_BYTES} bytes")]
    TooMuch,
}

/// A text as it stands in the file.
struct Entry {
    stamp: [u64; Stamp::WORDS],
    compressed: Vec<u8>,
}

/// What a file holds, by path.
type Entries = HashMap<PathBuf, Entry>;

fn path_in(folder: &Path) -> PathBuf {
    folder.join(NAME)
}

impl Kept {
    /// The texts that are kept in a folder; `None` where none are.
    ///
    /// # Errors
    /// Where the file is not to be used; it stays.
    pub fn read(folder: &Path) -> Result<Option<Self>, KeepError> {
        let path = path_in(folder);
        let Some((since_unix_seconds, order, mut entries)) = read_entries(&path)? else { return Ok(None) };
        let mut texts = Vec::new();
        let mut left = MAX_TEXT_BYTES;
        for name in order {
            let Some(entry) = entries.remove(&name) else { continue };
            let bytes =
                inflate(&entry.compressed, left).map_err(|why| KeepError::Malformed { path: path.clone(), why })?;
            left -= bytes.len() as u64;
            let text = String::from_utf8(bytes)
                .map_err(|_| KeepError::Malformed { path: path.clone(), why: "a text is not UTF-8" })?;
            texts.push((name, text));
        }
        Ok(Some(Self { since_unix_seconds, texts }))
    }

    /// Keeps the texts of files in a folder, which is made where it is not there. A text whose file has changed since is left as it was kept
    /// last, if it was; whether anything was to be written.
    ///
    /// # Errors
    /// Where it cannot be written; what was kept before stays.
    pub fn write(folder: &Path, in_force: &[InForce]) -> Result<bool, KeepError> {
        let path = path_in(folder);
        // A bad one is replaced.
        let (_, order, mut before) = read_entries(&path).ok().flatten().unwrap_or_default();
        let mut entries: Vec<(&Path, Entry)> = Vec::new();
        let mut is_as_before = true;
        let (mut size, mut text_size) = (0, 0);
        for InForce { path, stamp } in in_force {
            let known = before.remove(path);
            let words = stamp.map(|stamp| stamp.words());
            let known_is_it = known.as_ref().is_some_and(|known| words.is_none_or(|words| known.stamp == words));
            let entry = if known_is_it { known } else { stamp.and_then(|stamp| compress(path, stamp)).or(known) };
            let Some(entry) = entry else { continue };
            size += (entry.compressed.len() + path.as_os_str().len() + ENTRY_BYTES) as u64;
            text_size += Stamp::bytes_of(&entry.stamp);
            if size > MAX_FILE_BYTES - FRAME_BYTES || text_size > MAX_TEXT_BYTES {
                return Err(KeepError::TooMuch);
            }
            is_as_before &= known_is_it && order.get(entries.len()).is_some_and(|known| known == path);
            entries.push((path, entry));
        }
        if is_as_before && order.len() == entries.len() && !order.is_empty() {
            return Ok(false);
        }
        write_whole(folder, &path, &encode(&entries))?;
        Ok(true)
    }

    /// Removes what is kept in a folder, and the folder if nothing else is in it; whether there was anything.
    ///
    /// # Errors
    /// Where it cannot be removed.
    pub fn remove(folder: &Path) -> io::Result<bool> {
        let mut removed = false;
        for path in [path_in(folder), folder.join(API_NAME)] {
            removed |= match fs::remove_file(path) {
                Ok(()) => true,
                Err(error) if is_absent(&error) => false,
                Err(error) => return Err(error),
            };
        }
        // What else is in it is not weir's.
        let _ = fs::remove_dir(folder);
        Ok(removed)
    }
}

/// Whether there is no such file.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind())
}

/// A file's text in the state with that stamp; `None` where it has another by now.
fn compress(path: &Path, stamp: Stamp) -> Option<Entry> {
    let (found, bytes) = file::read(path).ok()?;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&bytes).ok()?;
    let compressed = encoder.finish().ok()?;
    (found == stamp).then(|| Entry { stamp: stamp.words(), compressed })
}

fn inflate(compressed: &[u8], at_most: u64) -> Result<Vec<u8>, &'static str> {
    let mut bytes = Vec::new();
    let read = GzDecoder::new(compressed).take(at_most.min(file::MAX_BYTES) + 1).read_to_end(&mut bytes);
    match read {
        Ok(length) if length as u64 > at_most.min(file::MAX_BYTES) => Err("its texts are too long"),
        Ok(_) => Ok(bytes),
        Err(_) => Err("a text is damaged"),
    }
}

fn encode(entries: &[(&Path, Entry)]) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(now.to_le_bytes());
    bytes.extend((entries.len() as u32).to_le_bytes());
    for (path, entry) in entries {
        let path = path.as_os_str().as_bytes();
        bytes.extend((path.len() as u32).to_le_bytes());
        bytes.extend((entry.compressed.len() as u32).to_le_bytes());
        bytes.extend(entry.stamp.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(path);
        bytes.extend(&entry.compressed);
    }
    bytes.extend(checksum(&bytes).to_le_bytes());
    bytes
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// What the file of that name holds, with its time and the order of its texts.
fn read_entries(path: &Path) -> Result<Option<(u64, Vec<PathBuf>, Entries)>, KeepError> {
    let bytes = match file::read(path) {
        Ok((_, bytes)) => bytes,
        Err(Unread::System(error)) if is_absent(&error) => return Ok(None),
        Err(why) => return Err(KeepError::Bad { path: path.to_owned(), why }),
    };
    decode(&bytes).map(Some).map_err(|why| KeepError::Malformed { path: path.to_owned(), why })
}

fn decode(bytes: &[u8]) -> Result<(u64, Vec<PathBuf>, Entries), &'static str> {
    const CUT: &str = "it is cut short";
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err("it is too long");
    }
    let bytes = bytes.strip_prefix(&MAGIC).ok_or("it holds no kept objects")?;
    let (&version, _) = bytes.split_first_chunk().ok_or(CUT)?;
    if u32::from_le_bytes(version) != VERSION {
        return Err("it is of another version of weir");
    }
    let (body, &sum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(CUT)?;
    let mut crc = Crc::new();
    crc.update(&MAGIC);
    crc.update(body);
    if crc.sum() != u32::from_le_bytes(sum) {
        return Err("its checksum is wrong");
    }
    let mut rest = &body[version.len()..];
    let since = u64::from_le_bytes(take(&mut rest).ok_or(CUT)?);
    let count = u32::from_le_bytes(take(&mut rest).ok_or(CUT)?);
    let (mut order, mut entries) = (Vec::new(), Entries::new());
    for _ in 0..count {
        let path_bytes = u32::from_le_bytes(take(&mut rest).ok_or(CUT)?);
        let compressed_bytes = u32::from_le_bytes(take(&mut rest).ok_or(CUT)?);
        let mut stamp = [0; Stamp::WORDS];
        for word in &mut stamp {
            *word = u64::from_le_bytes(take(&mut rest).ok_or(CUT)?);
        }
        if path_bytes > MAX_PATH_BYTES {
            return Err("a path is too long");
        }
        let (path, after) = rest.split_at_checked(path_bytes as usize).ok_or(CUT)?;
        let (compressed, after) = after.split_at_checked(compressed_bytes as usize).ok_or(CUT)?;
        rest = after;
        let path = PathBuf::from(OsString::from_vec(path.to_vec()));
        if entries.insert(path.clone(), Entry { stamp, compressed: compressed.to_vec() }).is_some() {
            return Err("it has a path twice");
        }
        order.push(path);
    }
    if rest.is_empty() { Ok((since, order, entries)) } else { Err("it is longer than it says") }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}

/// Writes a file of a folder, which is made where it is not there: as it was, or with these bytes.
pub(crate) fn write_whole(folder: &Path, path: &Path, bytes: &[u8]) -> Result<(), KeepError> {
    let new = path.with_extension("new");
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| KeepError::System { what, path, source }
    };
    fs::create_dir_all(folder).map_err(failed("cannot make the state folder", folder))?;
    let write = || {
        // One that was left by a process that was killed.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // What policies there are is not everybody's business.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| {
        // On a full disk it would stay in the way.
        let _ = fs::remove_file(&new);
        failed("the objects in force are not kept for the next start: cannot write", path)(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_force(paths: &[PathBuf]) -> Vec<InForce> {
        let stamp = |path: &PathBuf| fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata));
        paths.iter().map(|path| InForce { path: path.clone(), stamp: stamp(path) }).collect()
    }

    fn texts(folder: &Path) -> Vec<String> {
        Kept::read(folder).unwrap().unwrap().texts.into_iter().map(|(_, text)| text).collect()
    }

    /// Files with these texts, and a state folder that is not there yet.
    fn world(texts: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..texts.len()).map(|number| folder.path().join(format!("{number}.yaml"))).collect();
        for (path, text) in paths.iter().zip(texts) {
            fs::write(path, text).unwrap();
        }
        let state = folder.path().join("lib/state");
        (folder, paths, state)
    }

    #[test]
    fn texts_are_kept_as_they_were_in_force() {
        let (_folder, paths, state) = world(&["a: 1\n", "", "\u{e9}: [\n"]);
        assert_eq!(Kept::read(&state).unwrap(), None);
        assert!(!Kept::remove(&state).unwrap());
        assert!(Kept::write(&state, &in_force(&paths)).unwrap());
        let kept = Kept::read(&state).unwrap().unwrap();
        let all = paths.iter().cloned().zip(["a: 1\n", "", "\u{e9}: [\n"].map(str::to_owned));
        assert_eq!(kept.texts, all.collect::<Vec<_>>());
        assert!(kept.since_unix_seconds > 1_700_000_000);
        assert!(!Kept::write(&state, &in_force(&paths)).unwrap(), "there is nothing new");

        // One whose file has changed since, one of which an earlier text is in force, and one that is gone.
        let before = in_force(&paths);
        fs::write(&paths[0], "a: changed\n").unwrap();
        fs::write(&paths[2], "broken").unwrap();
        let now = [before[0].clone(), InForce { stamp: None, ..before[2].clone() }];
        assert!(Kept::write(&state, &now).unwrap(), "one less");
        assert_eq!(texts(&state), ["a: 1\n", "\u{e9}: [\n"]);
        assert!(Kept::write(&state, &in_force(&paths)).unwrap());
        assert_eq!(texts(&state), ["a: changed\n", "", "broken"]);
        // Nothing is kept of a text that never was in force.
        let never = InForce { path: "never".into(), stamp: None };
        assert!(Kept::write(&state, &[never]).unwrap());
        assert_eq!(texts(&state), Vec::<String>::new());
        let files: Vec<_> = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, [NAME]);
        assert!(Kept::remove(&state).unwrap() && !state.exists());
    }

    #[test]
    fn a_damaged_file_is_never_used_and_always_replaced() {
        let (_folder, paths, state) = world(&["apiVersion: v1\n", "kind: Pod\n"]);
        Kept::write(&state, &in_force(&paths)).unwrap();
        let path = state.join(NAME);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(decode(&bad).is_err(), "a bit of byte {at}");
            assert!(decode(&good[..at]).is_err(), "cut at {at}");
        }
        assert!(decode(&[&good[..], b"x"].concat()).is_err());
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        let why = Kept::read(&state).unwrap_err().to_string();
        assert!(why.ends_with("objects is not used: its checksum is wrong"), "{why}");
        // What was left by a process that was killed, and a bad file, are in nobody's way.
        fs::write(state.join("objects.new"), "half").unwrap();
        assert!(Kept::write(&state, &in_force(&paths)).unwrap());
        assert_eq!(texts(&state).len(), 2);

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(
            Kept::read(&state).unwrap_err().to_string().ends_with("it is no file, and only regular files are read")
        );
        assert!(Kept::write(&state, &in_force(&paths)).is_err(), "a folder is in the way");
        assert!(!state.join("objects.new").exists());
    }

    /// With a right checksum too, as a hostile hand can make one.
    #[test]
    fn no_size_that_a_file_names_is_believed() {
        let sealed = |body: &[u8]| {
            let whole = [&MAGIC[..], &VERSION.to_le_bytes(), &7u64.to_le_bytes(), body].concat();
            let sum = checksum(&whole).to_le_bytes();
            [&whole[..], &sum].concat()
        };
        let text = |path_bytes: u32, compressed_bytes: u32, rest: &[u8]| {
            let words = [0; 8 * Stamp::WORDS];
            [&path_bytes.to_le_bytes()[..], &compressed_bytes.to_le_bytes(), &words, rest].concat()
        };
        let one = 1u32.to_le_bytes();
        assert_eq!(decode(&sealed(&0u32.to_le_bytes())).unwrap().0, 7);
        for (body, why) in [
            (u32::MAX.to_le_bytes().to_vec(), "it is cut short"),
            ([&one[..], &text(u32::MAX, 0, b"")].concat(), "a path is too long"),
            ([&one[..], &text(1, u32::MAX, b"a")].concat(), "it is cut short"),
            ([&one[..], &text(1, 0, b"ab")].concat(), "it is longer than it says"),
            ([&2u32.to_le_bytes()[..], &text(1, 0, b"a"), &text(1, 0, b"a")].concat(), "it has a path twice"),
        ] {
            assert_eq!(decode(&sealed(&body)).err(), Some(why));
        }
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&vec![0; 1 << 20]).unwrap();
        let bomb = encoder.finish().unwrap();
        assert_eq!(inflate(&bomb, (1 << 20) - 1), Err("its texts are too long"));
        assert_eq!(inflate(&bomb, 1 << 20).map(|bytes| bytes.len()), Ok(1 << 20));
        assert_eq!(inflate(&bomb[..bomb.len() - 1], 1 << 20), Err("a text is damaged"));
    }
}
