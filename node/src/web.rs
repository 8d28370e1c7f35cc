//! What weir says of itself over HTTP: metrics for Prometheus, and whether it lives and is ready.
//!
//! A thread with a runtime of its own listens, and asks control for the facts as any client does, by a message. So an answer says that
//! control takes messages, which is what "alive" means here; an API server that is gone or a file at fault is no reason to be restarted.

use std::{io, net::SocketAddr, thread, time::Duration};

use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, header};
use prometheus_client::metrics::histogram::Histogram;
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{info, warn};
use weir_kubernetes::State;

use crate::{
    http::{self, Answer},
    metrics,
};

/// How long control may take to answer. The kubelet waits for a second by default, and tries three times.
const CONTROL: Duration = Duration::from_secs(5);
/// How soon a port that another process has is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What control knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Whether what was there at the start is in force.
    pub serves: bool,
    /// Number of the last publication.
    pub generation: u32,
    /// Objects whose newest version is at fault.
    pub faulty: usize,
    /// The running cluster that is followed.
    pub cluster: Option<State>,
    /// How long its changes of endpoints took to be in force.
    pub programming: Option<Histogram>,
}

/// Makes a message of who asks for the facts.
pub type Wrap<M> = fn(oneshot::Sender<Facts>) -> M;

/// Listens at an address for as long as `inbox` takes messages.
///
/// # Errors
/// Where there can be no more threads. A port that is taken is told, and tried again.
pub fn start<M: Send + 'static>(address: SocketAddr, inbox: mpsc::Sender<M>, message: Wrap<M>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = move || {
        runtime.block_on(async {
            let ended = inbox.clone();
            tokio::select! {
                () = serve(address, inbox, message) => {}
                () = ended.closed() => {}
            }
        });
    };
    thread::Builder::new().name("weir-http".into()).spawn(run).map(drop)
}

async fn serve<M: Send + 'static>(address: SocketAddr, inbox: mpsc::Sender<M>, message: Wrap<M>) {
    let mut is_told = false;
    let listener = loop {
        match http::listen(address) {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut is_told, true) {
                    warn!(%address, "nobody can read metrics: {}", http::problem_of(&error));
                }
                sleep(RETRY).await;
            }
        }
    };
    info!(%address, "metrics are at /metrics");
    let respond = move |request: Request<_>| {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let inbox = inbox.clone();
        async move { respond(&method, &path, ask(&inbox, message)).await }
    };
    http::answer_all(listener, respond).await;
}

/// Control's facts; `None` where it does not answer.
async fn ask<M>(inbox: &mpsc::Sender<M>, message: Wrap<M>) -> Option<Facts> {
    let (answer, facts) = oneshot::channel();
    let asked = async {
        inbox.send(message(answer)).await.ok()?;
        facts.await.ok()
    };
    timeout(CONTROL, asked).await.ok().flatten()
}

async fn respond(method: &Method, path: &str, facts: impl Future<Output = Option<Facts>>) -> Answer {
    let text = |status, text: String| answer(status, "text/plain; charset=utf-8", text);
    if !matches!(*method, Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "GET is all that there is\n".to_owned());
    }
    if !matches!(path, "/metrics" | "/livez" | "/healthz" | "/readyz") {
        return text(StatusCode::NOT_FOUND, "there are /metrics, /livez, /healthz and /readyz\n".to_owned());
    }
    let Some(facts) = facts.await else {
        let why = format!("control has taken no message for {} s\n", CONTROL.as_secs());
        return text(StatusCode::SERVICE_UNAVAILABLE, why);
    };
    match path {
        "/metrics" => answer(StatusCode::OK, metrics::CONTENT_TYPE, metrics::of(&facts)),
        "/readyz" if !facts.serves => {
            text(StatusCode::SERVICE_UNAVAILABLE, "what was there at the start is not in force yet\n".to_owned())
        }
        _ => text(StatusCode::OK, "ok\n".to_owned()),
    }
}

fn answer(status: StatusCode, kind: &str, body: String) -> Answer {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
        .body(Full::new(Bytes::from(body)))
        .expect("its headers are valid")
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv4Addr, TcpListener, TcpStream},
    };

    use super::*;

    fn get(address: SocketAddr, request: &str) -> String {
        let mut stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn control_is_asked_for_each_answer_and_who_hears_nothing_says_so() {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let (inbox, mut messages) = mpsc::channel::<oneshot::Sender<Facts>>(1);
        start(address, inbox, |asker| asker).unwrap();
        let control = thread::spawn(move || {
            for serves in [false, false, true, true] {
                let facts = Facts { serves, generation: 7, ..Facts::default() };
                messages.blocking_recv().unwrap().send(facts).unwrap();
            }
            messages
        });
        assert!(get(address, "GET /livez").starts_with("HTTP/1.1 200"));
        let not_ready = get(address, "GET /readyz");
        assert!(not_ready.starts_with("HTTP/1.1 503") && not_ready.contains("not in force yet"), "{not_ready}");
        assert!(get(address, "GET /readyz").starts_with("HTTP/1.1 200"));
        let metrics = get(address, "GET /metrics");
        assert!(
            metrics.contains("application/openmetrics-text") && metrics.contains("\nweir_generation 7\n"),
            "{metrics}"
        );
        // These do not ask control, which answers nobody any more.
        let messages = control.join().unwrap();
        assert!(get(address, "GET /").starts_with("HTTP/1.1 404"));
        assert!(get(address, "POST /metrics").starts_with("HTTP/1.1 405"));
        assert!(get(address, "GET /livez").starts_with("HTTP/1.1 503"));
        drop(messages);
    }
}
