//! HTTP as this node answers it: one short request per connection, a few connections at once.

use std::{collections::VecDeque, convert::Infallible, future::Future, io, net::SocketAddr, time::Duration};

use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
    time,
};

/// An answer.
pub type Answer = Response<Full<Bytes>>;

/// How long a client may take to send its request.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Connections to one socket that are open at once. Another takes the place of the oldest: who asks is answered at once, and who says nothing
/// for longer is nobody.
pub const CONNECTIONS: usize = 16;
const BACKLOG: u32 = 128;

/// A socket that listens at an address of its own family.
///
/// # Errors
/// As the kernel refuses.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => {
            let socket = TcpSocket::new_v6()?;
            // IPv4 has a socket of its own.
            setsockopt(&socket, Ipv6V6Only, &true)?;
            socket
        }
    };
    // Connections of a router before this one may still be closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What to say where [`listen`] failed.
pub fn problem_of(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process listens there (`ss -ltnp` names it); stop it".into(),
        _ => error.to_string(),
    }
}

/// Answers each request with what `respond` makes of it, without an end. What others do at other sockets is no concern of this one.
pub async fn answer_all<R, F>(listener: TcpListener, respond: R)
where
    R: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    // Oldest first; all end with this.
    let mut answering = VecDeque::new();
    loop {
        // Out of descriptors or memory, or a client that went away: the next may do better.
        let Ok((stream, _)) = listener.accept().await else {
            time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        answering.retain(|task: &Answering| !task.0.is_finished());
        if answering.len() == CONNECTIONS {
            answering.pop_front();
        }
        let answered = time::timeout(2 * PATIENCE, answer(stream, respond.clone()));
        answering.push_back(Answering(tokio::spawn(async move {
            let _ = answered.await;
        })));
    }
}

/// A connection that is answered until this is dropped.
struct Answering(JoinHandle<()>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn answer<R, F>(stream: TcpStream, respond: R) -> hyper::Result<()>
where
    R: Fn(Request<Incoming>) -> F,
    F: Future<Output = Answer>,
{
    let service = service_fn(|request| {
        let answer = respond(request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}
