//! Where `weir status` and its like ask: a Unix socket that only root may use. What a client asks is read beside control, which hears of it
//! once it is there: one that says nothing, or no end of it, keeps nobody waiting.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{sleep, timeout},
};
use tracing::warn;

use crate::control::Request;

/// Clients whose request is being read; more are turned away.
const CLIENTS: usize = 4096;
/// Answers of many lines that are being written at most, and answers of one line, which find a place also where all of the others are taken.
const LONG: usize = 56;
const SHORT: usize = 16;
/// How long a request may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(1);
/// Most bytes of a request.
const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// How long nobody is let in after a connection could not be: those there are give their descriptors back.
const PAUSE: Duration = Duration::from_millis(100);

/// Makes a message of a request, of who is to be answered, and of a place among those who are, to be dropped once it is done.
pub type Wrap<M> = fn(Request, UnixStream, OwnedSemaphorePermit) -> M;

/// The socket; removed when this is dropped.
pub struct Listener {
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, in the place of whoever did before, and hands each request to `inbox`, with a place among those who are answered.
    /// Needs a tokio runtime.
    ///
    /// # Errors
    /// Where there can be no socket.
    pub fn start<M: Send + 'static>(path: &Path, inbox: mpsc::Sender<M>, message: Wrap<M>) -> io::Result<Self> {
        // It has its mode before it has its name.
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&beside)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
        fs::rename(&beside, path)?;
        let desk = Desk { inbox, message, long: places(LONG), short: places(SHORT) };
        tokio::spawn(accept(listener, Arc::new(desk)));
        Ok(Self { path: path.into() })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn places(count: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(count))
}

/// Where requests go.
struct Desk<M> {
    inbox: mpsc::Sender<M>,
    message: Wrap<M>,
    /// Places for answers of many lines, and of one.
    long: Arc<Semaphore>,
    short: Arc<Semaphore>,
}

async fn accept<M: Send + 'static>(listener: UnixListener, desk: Arc<Desk<M>>) {
    let room = places(CLIENTS);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = desk.inbox.closed() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let Ok(place) = room.clone().try_acquire_owned() else { continue };
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    if let Ok(Err(error)) = timeout(ARRIVAL, read(stream, &desk)).await {
                        warn!(%error, "a client was not answered");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "no client can be let in");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Reads a client's request, and hands it over if it is one and there is a place for its answer.
async fn read<M>(stream: UnixStream, desk: &Desk<M>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    (&mut stream).take(MAX_REQUEST_BYTES).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        // Somebody only looked whether a router runs.
        return Ok(());
    }
    let mut stream = stream.into_inner();
    let refusal = match serde_json::from_slice::<Request>(&line) {
        Ok(request) => {
            let places = if request.is_long() { &desk.long } else { &desk.short };
            match places.clone().try_acquire_owned() {
                Ok(place) => {
                    drop(desk.inbox.send((desk.message)(request, stream, place)).await);
                    return Ok(());
                }
                Err(_) => {
                    "too many answers are being written already; try again when some of those who ask have ended".into()
                }
            }
        }
        Err(error) => error.to_string(),
    };
    let mut text = json!({"error": refusal}).to_string();
    text.push('\n');
    stream.write_all(text.as_bytes()).await
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, Write as _},
        os::unix::net::UnixStream as Client,
    };

    use super::*;

    fn client(path: &Path, says: &[u8]) -> Client {
        let mut client = Client::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.write_all(says).unwrap();
        client
    }

    type Asked = (Request, UnixStream, OwnedSemaphorePermit);

    fn start(path: &Path) -> (Listener, mpsc::Receiver<Asked>) {
        let (sender, asked) = mpsc::channel(16);
        (Listener::start(path, sender, |request, stream, place| (request, stream, place)).unwrap(), asked)
    }

    /// The next request is for the status, and answered.
    async fn answer(asked: &mut mpsc::Receiver<Asked>, client: Client) {
        let (request, mut stream, _place) =
            timeout(Duration::from_secs(10), asked.recv()).await.expect("at once").unwrap();
        assert!(matches!(request, Request::Status));
        stream.write_all(b"{\"generation\":1}\n").await.unwrap();
        let mut answer = String::new();
        std::io::BufReader::new(client).read_line(&mut answer).unwrap();
        assert_eq!(answer, "{\"generation\":1}\n");
    }

    #[tokio::test]
    async fn clients_that_say_nothing_keep_nobody_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.sock");
        let (listener, mut asked) = start(&path);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // More than the socket's own queue has room for, so somebody has to let them in meanwhile.
        let at = path.clone();
        let silent = tokio::task::spawn_blocking(move || (0..400).map(|_| client(&at, b"")).collect::<Vec<_>>());
        let silent = silent.await.unwrap();
        let endless = client(&path, &[b'x'; 1000]);
        drop(client(&path, b""));
        answer(&mut asked, client(&path, b"\"status\"\n")).await;
        drop((silent, endless));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn answers_that_take_long_leave_places_for_short_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.sock");
        let (_listener, mut asked) = start(&path);
        let mut watched = Vec::new();
        for _ in 0..LONG {
            let client = client(&path, b"{\"conntrack\": {\"action\": \"watch\"}}\n");
            watched.push((client, asked.recv().await.unwrap()));
        }
        let one_more = client(&path, b"{\"services\": {}}\n");
        let refusal = tokio::task::spawn_blocking(move || {
            let mut answer = String::new();
            std::io::BufReader::new(one_more).read_line(&mut answer).unwrap();
            answer
        });
        assert!(refusal.await.unwrap().contains("too many answers"));
        answer(&mut asked, client(&path, b"\"status\"\n")).await;
        watched.pop();
        let again = client(&path, b"{\"services\": {}}\n");
        assert!(matches!(asked.recv().await.unwrap().0, Request::Services(_)));
        drop(again);
    }

    #[tokio::test]
    async fn what_is_no_request_or_has_no_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.sock");
        let (_listener, mut asked) = start(&path);
        for says in [b"\"sttus\"\n".to_vec(), vec![b'x'; MAX_REQUEST_BYTES as usize]] {
            let asks = client(&path, &says);
            let answer = tokio::task::spawn_blocking(move || {
                let mut answer = String::new();
                std::io::BufReader::new(asks).read_line(&mut answer).unwrap();
                answer
            });
            tokio::select! {
                answer = answer => assert!(answer.as_ref().unwrap().starts_with("{\"error\":"), "{answer:?}"),
                _ = asked.recv() => panic!("that is no request"),
            }
        }
    }
}
