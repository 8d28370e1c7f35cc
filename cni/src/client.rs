//! Asks the router.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    sys::{
        socket::{
            AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, setsockopt,
            socket, sockopt,
        },
        time::TimeVal,
    },
};

use crate::wire::{self, Answer, Command, PROTOCOL, Request};

/// How long a router may take: longer than it lets itself (it waits for control and for the pod's object), shorter than runtimes wait.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// The same where nothing has to be made.
pub const SHORT_PATIENCE: Duration = Duration::from_secs(5);

/// Asks the router that listens at `socket`.
///
/// # Errors
/// Where none does, or it does not answer within `patience`.
pub fn ask(socket: &Path, command: Command, netns: Option<&File>, patience: Duration) -> io::Result<Answer> {
    let end = Instant::now() + patience;
    let mut stream = connected(socket, patience)?;
    let body = serde_json::to_vec(&Request { protocol: PROTOCOL, command })?;
    let prefix = wire::length_prefix(&body)?;
    let descriptors = netns.map(|file| [file.as_raw_fd()]);
    let control = descriptors.as_ref().map(|descriptors| ControlMessage::ScmRights(descriptors));
    // The descriptor goes with the first of these four bytes; a stream socket takes them all or none.
    let sent = sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(&prefix)],
        control.as_slice(),
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != prefix.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    stream.write_all(&body)?;
    let mut from = Bounded { stream, end };
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    wire::read_message(&mut from, length)
}

/// Opens a namespace's file without waiting, whatever the path leads to.
///
/// # Errors
/// Where it cannot be opened.
pub fn open_namespace(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Connecting waits where too many others do, so the limit has to be set before.
fn connected(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Zero would be no limit.
    let limit = TimeVal::new(patience.as_secs() as i64, i64::from(patience.subsec_micros().max(1)));
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// Reads until a point in time, however slowly the bytes come.
struct Bounded {
    stream: UnixStream,
    end: Instant,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        match self.stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            other => other,
        }
    }
}
