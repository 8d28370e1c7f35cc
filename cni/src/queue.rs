//! DELs that no router took.
//!
//! A folder beside the router's socket, so that the plugin and the router always mean the same one. An entry is an empty file, named by
//! the attachment: that makes it whole as soon as it is there, and one per attachment. Nothing is lost where an entry is: a sandbox's
//! devices end with its namespace, and the router finds the rest when it starts.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::wire::Attachment;

/// Most entries. More than a node has pods; who fills it has another trouble.
pub const MAX_ENTRIES: usize = 4096;

/// The queue of a router's socket.
#[derive(Clone, Debug)]
pub struct Queue {
    folder: PathBuf,
}

impl Queue {
    /// The queue beside a socket: `SOCKET.queue/`.
    pub fn beside(socket: &Path) -> Self {
        let mut folder = socket.as_os_str().to_owned();
        folder.push(".queue");
        Self { folder: folder.into() }
    }

    /// Keeps an attachment whose DEL nobody took; it is on the disk when this returns. Twice is as good as once.
    ///
    /// # Errors
    /// Where the queue is full or cannot be written.
    pub fn push(&self, attachment: &Attachment) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let file = self.folder.join(attachment.file_name());
        if !file.exists() {
            if fs::read_dir(&self.folder)?.take(MAX_ENTRIES).count() == MAX_ENTRIES {
                return Err(io::Error::other(format!(
                    "{} has {MAX_ENTRIES} entries already; start weir, it works them off",
                    self.folder.display()
                )));
            }
            File::create(&file)?.sync_all()?;
        }
        File::open(&self.folder)?.sync_all()
    }

    /// What is kept; no entries where there is no folder.
    ///
    /// # Errors
    /// Where the folder cannot be read.
    pub fn entries(&self) -> io::Result<Vec<Attachment>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            found.extend(entry?.file_name().to_str().and_then(Attachment::from_file_name));
        }
        Ok(found)
    }

    /// Whether an attachment is kept.
    pub fn has(&self, attachment: &Attachment) -> bool {
        self.folder.join(attachment.file_name()).exists()
    }

    /// Forgets an attachment.
    ///
    /// # Errors
    /// Where its file cannot be removed.
    pub fn remove(&self, attachment: &Attachment) -> io::Result<()> {
        match fs::remove_file(self.folder.join(attachment.file_name())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
