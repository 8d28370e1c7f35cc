//! Where a running router keeps its connections: in files on a tmpfs, so that they outlive the process.
//!
//! A tmpfs of weir's own is mounted with `huge=advise`, since only then does the kernel back a file's mapping by huge pages on
//! demand. A folder that is on a tmpfs already is taken as it is: so an operator chooses another place, or gives a container
//! one that outlives it.
//!
//! All memory of the tables is reserved at the start ([`weir_conntrack::file`]). A restart makes each table anew beside the old one, so the
//! folder should have room for the larger one once more.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        statfs::{TMPFS_MAGIC, statfs},
        statvfs::statvfs,
    },
};
use rand_chacha::ChaCha8Rng;
use tracing::info;
use weir_cluster::{compile, config::Conntrack};
use weir_conntrack::{
    Table,
    file::{FileError, Restored},
};
use weir_dataplane::tables::{Family, Tables};
use weir_packet::Tick;
use weir_sync::{Arc, Domain};

use crate::control::RUN_FOLDER;

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// Another process has the file.
    #[error(transparent)]
    InUse(FileError),
}

/// The tables, and what came of those of the process before.
pub struct Opened {
    /// The tables.
    pub tables: Tables,
    /// What was taken over, by family; `None` where the table is in this process's memory only.
    pub restored: [Option<Restored>; 2],
    /// What an operator should know.
    pub notes: Vec<String>,
}

/// The folder of a node's tables.
pub fn folder(node_name: &str) -> PathBuf {
    Path::new(RUN_FOLDER).join(format!("{node_name}.conntrack"))
}

/// Makes the tables of both families in `folder`, with the connections of the process before. Where files are not to be had, the
/// tables are in memory, and a note says why.
///
/// # Errors
/// A process that still uses the files.
pub fn open(
    folder: &Path,
    settings: &Conntrack,
    domain: &Arc<Domain>,
    random: &mut ChaCha8Rng,
    now: Tick,
) -> Result<Opened, TablesError> {
    let mut notes = Vec::new();
    let mut place = Some(folder);
    if let Err(error) = prepare(folder) {
        let path = folder.display();
        notes.push(format!(
            "connections will not outlive this process: no tmpfs at {path}: {error}; mount one there, with huge=advise"
        ));
        place = None;
    }
    let (v4, of_v4) = table(place.map(|folder| folder.join("ipv4")), settings, domain, random, now, &mut notes)?;
    let (v6, of_v6) = table(place.map(|folder| folder.join("ipv6")), settings, domain, random, now, &mut notes)?;
    let bytes = [v4.memory_bytes() as u64, v6.memory_bytes() as u64];
    let mut place = "memory of this process".to_owned();
    if of_v4.is_some() && of_v6.is_some() {
        place = folder.display().to_string();
        notes.extend(no_room_for_a_restart(folder, bytes));
    } else if of_v4.is_some() || of_v6.is_some() {
        place = format!("{} and memory of this process", folder.display());
    }
    info!(ipv4_bytes = bytes[0], ipv6_bytes = bytes[1], place, "connection tables");
    Ok(Opened { tables: Tables { v4, v6 }, restored: [of_v4, of_v6], notes })
}

/// Bytes of a tmpfs that has both tables, and one of them once more.
fn wanted_bytes([v4, v6]: [u64; 2]) -> u64 {
    v4 + v6 + v4.max(v6)
}

/// What is missing for a restart to copy the tables beside those that there are.
fn no_room_for_a_restart(folder: &Path, bytes: [u64; 2]) -> Option<String> {
    let stat = statvfs(folder).ok().filter(|stat| stat.blocks() > 0)?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let missing = bytes[0].max(bytes[1]).checked_sub(free).filter(|missing| *missing > 0)?;
    let (path, wanted) = (folder.display(), wanted_bytes(bytes));
    Some(format!(
        "a restart that is killed may lose all connections: {path} has no room for a second table, {missing} bytes are missing, so it is \
         copied by way of memory; `mount -o remount,size={wanted} {path}` makes room"
    ))
}

fn table<A: Family>(
    path: Option<PathBuf>,
    settings: &Conntrack,
    domain: &Arc<Domain>,
    random: &mut ChaCha8Rng,
    now: Tick,
    notes: &mut Vec<String>,
) -> Result<(Table<A>, Option<Restored>), TablesError> {
    let config = compile::table_config(settings, random);
    if let Some(path) = path {
        let shown = path.display();
        match Table::in_file(config, domain.clone(), &path, now) {
            Ok((table, restored)) => {
                if let Some(refusal) = restored.refused {
                    notes.push(format!("connections of before are lost: {shown}: {refusal}"));
                }
                let Some(no_room) = restored.no_room else { return Ok((table, Some(restored))) };
                let folder = path.parent().unwrap_or(&path).display();
                notes.push(format!(
                    "connections will not outlive this process: no room for {shown}: {no_room}; enlarge the tmpfs with \
                     `mount -o remount,size=BYTES {folder}`"
                ));
                return Ok((table, None));
            }
            Err(error @ FileError::InUse(_)) => return Err(TablesError::InUse(error)),
            Err(error) => notes.push(format!("connections will not outlive this process: {error}")),
        }
    }
    Ok((Table::new(config, domain.clone()), None))
}

/// Makes the folder a tmpfs, if it is none.
fn prepare(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    if is_tmpfs(folder) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let with = |options: &str| mount(Some("weir"), folder, Some("tmpfs"), flags, Some(options));
    // A kernel without huge pages does not know the option.
    match with("mode=0700,huge=advise") {
        Err(Errno::EINVAL) => Ok(with("mode=0700")?),
        other => Ok(other?),
    }
}

fn is_tmpfs(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
}

/// Removes a node's tables; whether there were any.
///
/// # Errors
/// Where they cannot be removed.
pub fn remove(folder: &Path) -> io::Result<bool> {
    if !folder.exists() {
        return Ok(false);
    }
    for file in ["ipv4", "ipv6", "ipv4.new", "ipv6.new"] {
        match fs::remove_file(folder.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    // A mount that an operator made below or above stays: then the folder is none of weir's.
    // Detached even while a process that is about to end still has a file of it.
    match umount2(folder, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};
    use rand_chacha::rand_core::SeedableRng;
    use weir_sync::Domain;

    use super::*;

    /// Opens tables on a tmpfs of so many bytes; what is noted, and which tables are there.
    fn on_tmpfs(bytes: u64) -> (Vec<String>, [bool; 2]) {
        assert!(nix::unistd::geteuid().is_root(), "needs root (WEIR_SKIP_E2E=1 skips it)");
        let folder = tempfile::tempdir().unwrap();
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("weir"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(&*format!("size={bytes}")))
                .unwrap();
            open_in(folder.path())
        };
        let opened = std::thread::scope(|scope| scope.spawn(work).join().unwrap());
        let shown = folder.path().display().to_string();
        (opened.notes.iter().map(|note| note.replace(&shown, "DIR")).collect(), opened.restored.map(|r| r.is_some()))
    }

    fn open_in(folder: &Path) -> Opened {
        let settings = Conntrack { max_entries: 20_000, ..Conntrack::default() };
        let opened = open(folder, &settings, &Domain::new(), &mut ChaCha8Rng::seed_from_u64(1), Tick(1)).unwrap();
        assert_eq!(opened.tables.v6.len(), 0);
        opened
    }

    #[test]
    fn what_a_tmpfs_has_no_room_for_is_said_with_what_is_missing() {
        if std::env::var_os("WEIR_SKIP_E2E").is_some_and(|value| value == "1") {
            eprintln!("skipped: WEIR_SKIP_E2E=1");
            return;
        }
        let tables = open_in(tempfile::tempdir_in("/dev/shm").unwrap().path()).tables;
        let (v4, v6) = (tables.v4.memory_bytes() as u64, tables.v6.memory_bytes() as u64);
        assert!(v4 < v6);
        let whole = wanted_bytes([v4, v6]);
        assert_eq!(on_tmpfs(whole), (Vec::new(), [true, true]));
        let (notes, in_files) = on_tmpfs(whole - 8192);
        assert_eq!(in_files, [true, true]);
        let expected = format!(
            "DIR has no room for a second table, 8192 bytes are missing, so it is copied by way of memory; `mount -o remount,size={whole} DIR` makes room"
        );
        assert!(notes.len() == 1 && notes[0].ends_with(&expected), "{notes:?}");
        let (notes, in_files) = on_tmpfs(v4 + v6 - 4096);
        assert_eq!(in_files, [true, false]);
        let expected = format!("no room for DIR/ipv6: a table of {v6} bytes needs 4096 more than there are; enlarge");
        assert!(notes.len() == 1 && notes[0].contains(&expected), "{notes:?}");
        let (notes, in_files) = on_tmpfs(v4 - 4096);
        assert_eq!((notes.len(), in_files), (2, [false, false]), "{notes:?}");
    }
}
