//! Where `weir-cni` asks: a Unix socket that only root may use, a thread per request, bounded in number and time.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    cmsg_space,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, getsockopt, recvmsg, sockopt::PeerCredentials},
};
use weir_cni::{
    CniError,
    wire::{self, Answer, PROTOCOL, Request},
};

use super::{PodsError, keeper::Keeper};

/// Requests that are worked at at once: more than a node has pods. Each has a thread.
const MAX_REQUESTS: usize = 512;
/// How long a request may take to arrive, and its answer to be taken.
const ARRIVAL: Duration = Duration::from_secs(5);
/// How often what went without a DEL is looked for.
const TENDING: Duration = Duration::from_secs(30);
/// How long the end of the server waits for requests under way.
const ENDING: Duration = Duration::from_secs(5);

/// The server; ends when it is dropped.
pub struct Server {
    path: PathBuf,
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
    /// Listens at `path`, in place of whoever did before: the state folder's lock says that nobody does.
    pub fn start(path: &Path, keeper: Arc<Keeper>) -> Result<Self, PodsError> {
        let failed = |source| PodsError::Socket { path: path.into(), source };
        let listener = listen(path).map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let requests = Arc::new(Requests::default());
        let counted = requests.clone();
        let acceptor = thread::Builder::new()
            .name("weir-pods".into())
            .spawn(move || accept(&listener, &stopped, &keeper, &counted))
            .map_err(failed)?;
        Ok(Self { path: path.into(), stop: Some(stop), acceptor: Some(acceptor), requests })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        self.stop = None;
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.requests.wait(ENDING);
    }
}

/// A socket of mode 0600 that is whole as soon as it has its name.
fn listen(path: &Path) -> io::Result<UnixListener> {
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
    fs::rename(&beside, path)?;
    Ok(listener)
}

fn accept(listener: &UnixListener, stopped: &UnixStream, keeper: &Arc<Keeper>, requests: &Arc<Requests>) {
    let tending = Arc::new(AtomicBool::new(false));
    let mut tended = Instant::now();
    loop {
        let mut waiting =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        let left = TENDING.saturating_sub(tended.elapsed());
        let _ = poll(&mut waiting, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        if waiting[1].revents().is_none_or(|events| !events.is_empty()) {
            return;
        }
        if tended.elapsed() >= TENDING && !tending.swap(true, Ordering::AcqRel) {
            tended = Instant::now();
            let (keeper, busy) = (keeper.clone(), tending.clone());
            spawn("weir-pods-tend", requests.begin(), move || {
                keeper.tend();
                busy.store(false, Ordering::Release);
            });
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let Some(request) = requests.begin() else {
                    refuse(&stream, "weir has too many requests under way");
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
    if let Err(error) = spawned {
        tracing::warn!("no thread for a request of weir-cni: {error}");
    }
}

fn refuse(mut stream: &UnixStream, why: &str) {
    let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
    let _ = wire::write_message(&mut stream, &Answer::Failed(CniError::new(CniError::TRY_AGAIN, why)));
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
            return refuse(stream, &format!("the request cannot be read: {error}"));
        }
    };
    if request.protocol != PROTOCOL {
        let what = format!(
            "weir-cni speaks protocol {}, the router {PROTOCOL}: install the weir-cni that came with it",
            request.protocol
        );
        return refuse(stream, &what);
    }
    let what = request.command.to_string();
    let outcome = keeper.serve(request.command, namespace.as_ref());
    let took = begin.elapsed().as_secs_f64() * 1e3;
    match &outcome {
        Ok(_) => tracing::debug!("{what}: {took:.1} ms"),
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
fn receive(stream: &UnixStream) -> io::Result<(Request, Option<File>)> {
    let end = Instant::now() + ARRIVAL;
    stream.set_read_timeout(Some(ARRIVAL))?;
    let mut length = [0; 4];
    let mut space = cmsg_space!([i32; 4]);
    let mut namespace = None;
    let count = {
        let mut buffers = [IoSliceMut::new(&mut length)];
        let message =
            recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            let ControlMessageOwned::ScmRights(descriptors) = control else { continue };
            for descriptor in descriptors {
                // SAFETY: the kernel has just made this descriptor for this process (unix(7), SCM_RIGHTS), and nobody else knows it.
                let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
                namespace.get_or_insert(File::from(owned));
            }
        }
        message.bytes
    };
    let mut from = Bounded { stream, end };
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    from.read_exact(&mut length[count..])?;
    Ok((wire::read_message(&mut from, length)?, namespace))
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
