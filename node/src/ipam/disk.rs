//! The state folder: small files that are each whole or not there.
//!
//! A file is written beside its place (a name that begins with a dot), synced, renamed, and its folder synced, so that it is on the disk
//! when [`Disk::write`] returns. What a crash leaves beside is removed at the next start.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// A folder of the state folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Folder {
    /// A record per attachment.
    Pods,
    /// A file per address that was given back.
    Freed,
    /// What concerns the node.
    Node,
}

impl Folder {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pods, Self::Freed, Self::Node];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Freed => "freed",
            Self::Node => "node",
        }
    }
}

/// Whether a change has to outlive a power cut when the call returns. What does not still outlives the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// It has to.
    Now,
    /// A later change makes up for it.
    Later,
}

/// Files by folder and name. A trait, so that tests can end at every step.
pub trait Disk: Send + std::marker::Sync {
    /// Writes a whole file or nothing.
    ///
    /// # Errors
    /// Where it cannot; then the file is as before.
    fn write(&self, folder: Folder, name: &str, bytes: &[u8], sync: Sync) -> io::Result<()>;
    /// Removes a file; one that is not there is removed.
    ///
    /// # Errors
    /// Where it cannot.
    fn remove(&self, folder: Folder, name: &str, sync: Sync) -> io::Result<()>;
    /// All files of a folder, by name.
    ///
    /// # Errors
    /// Where it cannot be read.
    fn read(&self, folder: Folder) -> io::Result<Vec<(String, Vec<u8>)>>;
}

/// A folder of the node's disk.
#[derive(Clone, Debug)]
pub struct StateFolder {
    root: PathBuf,
}

impl StateFolder {
    /// Opens it, and makes what is missing.
    ///
    /// # Errors
    /// Where it cannot.
    pub fn create(root: &Path) -> io::Result<Self> {
        for folder in Folder::ALL {
            let folder = root.join(folder.name());
            DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        }
        Ok(Self { root: root.into() })
    }

    /// Removes what a crash left beside. Only for whom the folder is locked: another process may be about to rename it. What cannot be removed
    /// is read by nobody.
    pub fn clean(&self) {
        for folder in Folder::ALL {
            let entries = fs::read_dir(self.root.join(folder.name())).into_iter().flatten().flatten();
            for entry in entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".")) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// One that is only read; what is missing is empty.
    pub fn existing(root: &Path) -> Self {
        Self { root: root.into() }
    }

    fn sync_folder(&self, folder: Folder) -> io::Result<()> {
        File::open(self.root.join(folder.name()))?.sync_all()
    }
}

impl Disk for StateFolder {
    fn write(&self, folder: Folder, name: &str, bytes: &[u8], sync: Sync) -> io::Result<()> {
        let place = self.root.join(folder.name());
        let beside = place.join(format!(".{name}"));
        let write = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(bytes)?;
            if sync == Sync::Now {
                file.sync_all()?;
            }
            fs::rename(&beside, place.join(name))
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        if sync == Sync::Now { self.sync_folder(folder) } else { Ok(()) }
    }

    fn remove(&self, folder: Folder, name: &str, sync: Sync) -> io::Result<()> {
        match fs::remove_file(self.root.join(folder.name()).join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        if sync == Sync::Now { self.sync_folder(folder) } else { Ok(()) }
    }

    fn read(&self, folder: Folder) -> io::Result<Vec<(String, Vec<u8>)>> {
        let entries = match fs::read_dir(self.root.join(folder.name())) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with('.') {
                continue;
            }
            match fs::read(entry.path()) {
                Ok(bytes) => files.push((name, bytes)),
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        files.sort();
        Ok(files)
    }
}
