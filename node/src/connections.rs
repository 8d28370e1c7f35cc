//! Where a running router keeps its connections: in files on a tmpfs, so that they outlive the process.
//!
//! A tmpfs of weir's own is mounted with `huge=advise`, since only then does the kernel back a file's mapping by huge pages on
//! demand. A folder that is on a tmpfs already is taken as it is: so an operator chooses another place, or gives a container
//! one that outlives it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{TMPFS_MAGIC, statfs},
};
use rand_chacha::ChaCha8Rng;
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
    Ok(Opened { tables: Tables { v4, v6 }, restored: [of_v4, of_v6], notes })
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
        match Table::in_file(config, domain.clone(), &path, now) {
            Ok((table, restored)) => {
                if let Some(refusal) = restored.refused {
                    notes.push(format!("connections of before are lost: {}: {refusal}", path.display()));
                }
                return Ok((table, Some(restored)));
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
