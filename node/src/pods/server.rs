//! Where `weir-cni` asks: a Unix socket that only root may use, a thread per request, bounded in number and time.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, MetadataExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recvmsg,
        socket, sockopt::PeerCredentials,
    },
};
use serde::Deserialize as _;
use serde_json::Value;
use weir_cni::{
    CniError,
    wire::{self, Answer, Command, OTHER_PROTOCOL, PROTOCOL, Request},
};

use super::{PodsError, keeper::Keeper};

/// Requests that are worked at at once: more than a node has pods. Each has a thread.
const MAX_REQUESTS: usize = 512;
/// Most descriptors of one message (SCM_MAX_FD of the kernel, include/net/scm.h).
const MAX_DESCRIPTORS: usize = 253;
/// How long a request may take to arrive, and its answer to be taken.
const ARRIVAL: Duration = Duration::from_secs(5);
/// How often what went without a DEL is looked for; and when first: a DEL that found nobody while this was starting lies in the queue.
const TENDING: Duration = Duration::from_secs(30);
const FIRST_TENDING: Duration = Duration::from_secs(3);
/// How long the end of the server waits for requests under way.
const ENDING: Duration = Duration::from_secs(5);

/// The server; ends when it is dropped.
pub struct Server {
    path: PathBuf,
    /// Device and inode of the socket's file.
    file: (u64, u64),
    /// Closing it wakes the thread.
    stop: Option<UnixStream>,
    acceptor: Option<JoinHandle<()>>,
    requests: Arc<Requests>,
}

/// How many requests are under way.
#[derive(Default)]
struct Requests {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Requests {
    fn begin(self: &Arc<Self>) -> Option<UnderWay> {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        if *count >= MAX_REQUESTS {
            return None;
        }
        *count += 1;
        Some(UnderWay(self.clone()))
    }

    fn wait(&self, limit: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_timeout_while(count, limit, |count| *count > 0));
    }
}

/// One request under way.
struct UnderWay(Arc<Requests>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.changed.notify_all();
    }
}

impl Server {
    /// Listens at `path`, in place of a router that ended without taking its socket away.
    pub fn start(path: &Path, keeper: Arc<Keeper>) -> Result<Self, PodsError> {
        let failed = |source| PodsError::Socket { path: path.into(), source };
        let (listener, file) = listen(path).map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let requests = Arc::new(Requests::default());
        let counted = requests.clone();
        let acceptor = thread::Builder::new()
            .name("weir-pods".into())
            .spawn(move || accept(&listener, &stopped, &keeper, &counted))
            .map_err(failed)?;
        Ok(Self { path: path.into(), file, stop: Some(stop), acceptor: Some(acceptor), requests })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Another's stays.
        if fs::metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
        self.stop = None;
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.requests.wait(ENDING);
    }
}

/// A socket of mode 0600 that is whole as soon as it has its name, and its file's device and inode.
fn listen(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    if somebody_listens(path)? {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another router answers there: end it, or give this one a socket of its own",
        ));
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    }
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    let file = fs::metadata(&beside)?;
    fs::rename(&beside, path)?;
    Ok((listener, (file.dev(), file.ino())))
}

/// Whether a process listens at a socket. It need not be accepting.
fn somebody_listens(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let connected = connect(socket.as_raw_fd(), &UnixAddr::new(path)?);
    Ok(matches!(connected, Ok(()) | Err(Errno::EAGAIN)))
}

fn accept(listener: &UnixListener, stopped: &UnixStream, keeper: &Arc<Keeper>, requests: &Arc<Requests>) {
    // Whether one tends; it says so until it ends, however it does.
    let tending = Arc::new(());
    let mut due = Instant::now() + FIRST_TENDING;
    loop {
        let mut waiting =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        // Rounded up, so that it is due then.
        let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let _ = poll(&mut waiting, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        if waiting[1].revents().is_none_or(|events| !events.is_empty()) {
            return;
        }
        if Instant::now() >= due {
            due = Instant::now() + TENDING;
            if Arc::strong_count(&tending) == 1 {
                let (keeper, busy) = (keeper.clone(), tending.clone());
                spawn("weir-pods-tend", requests.begin(), move || {
                    let _busy = busy;
                    keeper.tend();
                });
            }
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let Some(request) = requests.begin() else {
                    refuse(&stream, CniError::TRY_AGAIN, "weir has too many requests under way");
                    continue;
                };
                let keeper = keeper.clone();
                spawn("weir-pods-cni", Some(request), move || serve(&stream, &keeper));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                // Out of descriptors, mostly: those under way will give theirs back.
                tracing::warn!("weir-cni cannot be answered: {error}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn spawn(name: &str, request: Option<UnderWay>, action: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new().name(name.into()).spawn(move || {
        action();
        drop(request);
    });
    if let Err(error) = &spawned {
        tracing::warn!("no thread for a request of weir-cni: {error}");
    }
}

fn refuse(mut stream: &UnixStream, code: u32, why: &str) {
    let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
    let _ = wire::write_message(&mut stream, &Answer::Failed(CniError::new(code, why)));
}

/// One request.
fn serve(stream: &UnixStream, keeper: &Keeper) {
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) if peer.uid() == 0 => {}
        _ => return tracing::warn!("a process that is not root's asked at the socket of weir-cni"),
    }
    let begin = Instant::now();
    let (request, namespace) = match receive(stream) {
        Ok(received) => received,
        Err(error) => {
            tracing::warn!("a request of weir-cni cannot be read: {error}");
            return refuse(stream, CniError::TRY_AGAIN, &format!("the request cannot be read: {error}"));
        }
    };
    // Another protocol's command need not be one of this.
    let protocol = request["protocol"].as_u64();
    if protocol != Some(PROTOCOL.into()) {
        let other = protocol.map_or("none".into(), |protocol| protocol.to_string());
        let what =
            format!("weir-cni speaks protocol {other}, the router {PROTOCOL}: install the weir-cni that came with it");
        return refuse(stream, OTHER_PROTOCOL, &what);
    }
    let command = match Request::deserialize(request) {
        Ok(request) => request.command,
        Err(error) => return refuse(stream, CniError::TRY_AGAIN, &format!("the request cannot be read: {error}")),
    };
    let (what, is_poll) = (command.to_string(), command == Command::Status);
    let outcome = keeper.serve(command, namespace.as_ref());
    let took = begin.elapsed().as_secs_f64() * 1e3;
    match &outcome {
        Ok(_) => tracing::debug!("{what}: {took:.1} ms"),
        Err(error) if is_poll => tracing::debug!("{what}: {error}"),
        Err(error) => tracing::warn!("{what} failed after {took:.1} ms: {error}"),
    }
    let answer = match outcome {
        Ok(Some(made)) => Answer::Made(made),
        Ok(None) => Answer::Done,
        Err(error) => Answer::Failed(error),
    };
    let mut stream = stream;
    let sent = stream.set_write_timeout(Some(ARRIVAL)).and_then(|()| wire::write_message(&mut stream, &answer));
    // It is done all the same; a runtime that did not hear of it sends a DEL.
    if let Err(error) = sent.and_then(|()| stream.flush()) {
        tracing::warn!("nobody took the answer to {what}: {error}");
    }
}

/// Reads the request, and the descriptor that came with its first bytes.
fn receive(stream: &UnixStream) -> io::Result<(Value, Option<File>)> {
    let end = Instant::now() + ARRIVAL;
    stream.set_read_timeout(Some(ARRIVAL))?;
    let mut length = [0; 4];
    // With room for all that can come at once, the kernel cuts nothing off: what it has installed is told, and can be closed.
    let mut space = cmsg_space!([i32; MAX_DESCRIPTORS]);
    let mut descriptors = Vec::new();
    let count = {
        let mut buffers = [IoSliceMut::new(&mut length)];
        let message =
            recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            let ControlMessageOwned::ScmRights(received) = control else { continue };
            // SAFETY: the kernel has just made these descriptors for this process (unix(7), SCM_RIGHTS), and nobody else knows them.
            descriptors.extend(received.into_iter().map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) }));
        }
        message.bytes
    };
    let mut from = Bounded { stream, end };
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if descriptors.len() > 1 {
        let what = format!("{} descriptors came along, one is a pod's namespace", descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    from.read_exact(&mut length[count..])?;
    Ok((wire::read_message(&mut from, length)?, descriptors.pop().map(File::from)))
}

/// Reads until a point in time, however slowly the bytes come.
struct Bounded<'s> {
    stream: &'s UnixStream,
    end: Instant,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::IoSlice, os::fd::AsFd as _};

    use nix::{
        sys::socket::{ControlMessage, sendmsg},
        unistd::pipe,
    };

    use super::*;

    #[test]
    fn descriptors_that_are_too_many_are_closed() {
        for count in [2, 5, MAX_DESCRIPTORS] {
            let (here, there) = UnixStream::pair().unwrap();
            let (reading, writing) = pipe().unwrap();
            let descriptors = vec![writing.as_fd().as_raw_fd(); count];
            let rights = [ControlMessage::ScmRights(&descriptors)];
            let prefix = [IoSlice::new(&[0, 0, 0, 2])];
            sendmsg::<UnixAddr>(there.as_raw_fd(), &prefix, &rights, MsgFlags::empty(), None).unwrap();
            (&there).write_all(b"{}").unwrap();
            drop(writing);
            let error = receive(&here).unwrap_err();
            assert!(error.to_string().contains("descriptors came along"), "{count}: {error}");
            // Nobody can write any more: no copy is left.
            let mut waiting = [PollFd::new(reading.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut waiting, 1000_u16), Ok(1), "{count}: a copy is left");
            assert!(waiting[0].revents().unwrap().contains(PollFlags::POLLHUP));
        }
    }
}
