//! How an API server is reached: from what is configured, and by every address that it was ever known to have.
//!
//! It is dialled itself, and not by the service that this router serves. Where one address does not answer, the next question goes to the next.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use http::{Method, Request, Response, Uri};
use http_body_util::BodyExt as _;
use kube_client::{
    Client, Config,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::time::timeout;

use crate::wire::Status;

/// How long a server has to begin its answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Most bytes of an answer that is not a list.
pub const MAX_BYTES: usize = 64 << 20;
/// Where Calico's ConfigMap `kubernetes-services-endpoint` is expected, mounted as a folder.
const ENDPOINT_FOLDER: &str = "/etc/weir/kubernetes-services-endpoint";

/// Who says where the API server is and who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A kubeconfig.
    Kubeconfig(PathBuf),
    /// The account of the pod that this is.
    InCluster,
}

/// What a weir.yaml says.
pub fn access_of(kubernetes: &weir_cluster::config::Kubernetes) -> Access {
    kubernetes.kubeconfig.clone().map_or(Access::InCluster, Access::Kubeconfig)
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// What is configured is at fault.
    #[error("{0}")]
    Config(String),
    /// Nobody answers.
    #[error("{address}: {why}")]
    Unreachable {
        /// Who was asked.
        address: String,
        /// What happened.
        why: String,
    },
    /// The server refuses.
    #[error("the API server refuses {path}: {} {}: {}", status.code, status.reason, status.message)]
    Refused {
        /// What it was asked for.
        path: String,
        /// What it said.
        status: Status,
    },
    /// What it sends makes no sense.
    #[error("the API server's answer makes no sense: {0}")]
    Nonsense(String),
    /// It stopped in the middle.
    #[error("the answer broke off: {0}")]
    Broken(String),
}

impl Failure {
    /// HTTP's code of a refusal.
    pub fn code(&self) -> u16 {
        match self {
            Self::Refused { status, .. } => status.code,
            _ => 0,
        }
    }
}

/// What an API server is asked.
struct Question {
    method: Method,
    /// What the answer is to be encoded in; `None` where it may be compressed.
    encoding: Option<&'static str>,
    /// The content's type, and the content.
    content: Option<(&'static str, String)>,
}

/// One after another, the addresses of an API server.
pub struct Dial {
    config: Config,
    /// Each with its client, once it was asked.
    addresses: RefCell<Vec<(Uri, Option<Client>)>>,
    current: Cell<usize>,
}

impl Dial {
    /// As is configured.
    ///
    /// # Errors
    /// Where that cannot be read.
    pub async fn new(access: &Access) -> Result<Self, Failure> {
        let mut config = match access {
            Access::Kubeconfig(path) => {
                let in_file = |error| Failure::Config(format!("{}: {error}", path.display()));
                let file = Kubeconfig::read_from(path).map_err(in_file)?;
                let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
                config.map_err(in_file)?
            }
            Access::InCluster => {
                let config = Config::incluster_env().or_else(|_| Config::incluster_dns());
                config.map_err(|error| Failure::Config(format!("kubernetes.inCluster: {error}")))?
            }
        };
        // Repetitions have their own rules here.
        config.default_retry = false;
        config.connect_timeout = Some(Duration::from_secs(10));
        let mut addresses = vec![(config.cluster_url.clone(), None)];
        if *access == Access::InCluster
            && let Some(given) = given_endpoint(Path::new(ENDPOINT_FOLDER))
        {
            addresses.insert(0, (given, None));
        }
        Ok(Self { config, addresses: RefCell::new(addresses), current: Cell::new(0) })
    }

    /// Makes addresses known that the API server has by its own word. They are tried after those that are known.
    pub fn learn(&self, endpoints: &BTreeSet<SocketAddr>) {
        let mut addresses = self.addresses.borrow_mut();
        for endpoint in endpoints {
            let uri: Uri = format!("https://{endpoint}").parse().expect("an address and a port");
            if addresses.iter().all(|(known, _)| known.authority() != uri.authority()) {
                addresses.push((uri, None));
            }
        }
    }

    /// The address that is asked next.
    pub fn address(&self) -> String {
        let addresses = self.addresses.borrow();
        addresses[self.current.get() % addresses.len()].0.to_string()
    }

    fn client(&self) -> Result<(usize, Client), Failure> {
        let mut addresses = self.addresses.borrow_mut();
        let index = self.current.get() % addresses.len();
        let (uri, client) = &mut addresses[index];
        if client.is_none() {
            let mut config = self.config.clone();
            if config.tls_server_name.is_none() && config.cluster_url.host() != uri.host() {
                // Its certificate is for the name that it is configured by.
                config.tls_server_name = config.cluster_url.host().map(|host| host.trim_matches(['[', ']']).to_owned());
            }
            config.cluster_url = uri.clone();
            *client = Some(Client::try_from(config).map_err(|error| Failure::Config(error.to_string()))?);
        }
        Ok((index, client.clone().expect("it was made")))
    }

    /// Asks for what comes bit by bit; it begins at most [`ANSWER`] later.
    ///
    /// # Errors
    /// Where nobody answers, or the server refuses.
    pub async fn stream(&self, path: &str) -> Result<Response<Body>, Failure> {
        // Whoever compresses it would hold back what has happened until there is more of it.
        self.ask(path, Question { method: Method::GET, encoding: Some("identity"), content: None }).await
    }

    /// Writes something; what the server says of it.
    ///
    /// # Errors
    /// As [`Dial::text`].
    pub async fn write(&self, method: Method, path: &str, kind: &'static str, text: String) -> Result<String, Failure> {
        let question = Question { method, encoding: None, content: Some((kind, text)) };
        self.whole(self.ask(path, question).await?).await
    }

    async fn ask(&self, path: &str, question: Question) -> Result<Response<Body>, Failure> {
        let (index, client) = self.client()?;
        let address = self.address();
        let unreachable = |why: String| {
            // Another may have gone on to the next already.
            if self.current.get() == index {
                self.current.set((index + 1) % self.addresses.borrow().len());
            }
            Failure::Unreachable { address: address.clone(), why }
        };
        let mut request = Request::builder().method(question.method).uri(path).header("accept", "application/json");
        if let Some(encoding) = question.encoding {
            request = request.header("accept-encoding", encoding);
        }
        if let Some((kind, _)) = question.content {
            request = request.header("content-type", kind);
        }
        let body = question.content.map_or_else(Body::empty, |(_, text)| Body::from(text.into_bytes()));
        let request = request.body(body).map_err(|error| Failure::Config(error.to_string()))?;
        let response = match timeout(ANSWER, client.send(request)).await {
            Err(_) => return Err(unreachable(format!("no answer within {} s", ANSWER.as_secs()))),
            Ok(Err(error)) => return Err(unreachable(in_full(&error))),
            Ok(Ok(response)) => response,
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status().as_u16();
        let body = collect(response.into_body(), 64 << 10).await.unwrap_or_default();
        let mut status: Status = serde_json::from_slice(&body).unwrap_or_default();
        status.code = code;
        if status.message.is_empty() {
            status.message = String::from_utf8_lossy(&body).chars().take(200).collect();
        }
        let path = path.split('?').next().unwrap_or_default().to_owned();
        Err(Failure::Refused { path, status })
    }

    /// A whole answer. The server may compress it, as it does with long lists.
    ///
    /// # Errors
    /// As [`Dial::stream`], and where it is too long.
    pub async fn text(&self, path: &str) -> Result<String, Failure> {
        self.whole(self.ask(path, Question { method: Method::GET, encoding: None, content: None }).await?).await
    }

    async fn whole(&self, response: Response<Body>) -> Result<String, Failure> {
        let body = collect(response.into_body(), MAX_BYTES).await?;
        String::from_utf8(body).map_err(|_| Failure::Nonsense("it is no UTF-8".to_owned()))
    }
}

/// An error with what caused it.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

/// A body of at most so many bytes, none of which is a minute after the one before.
async fn collect(mut body: Body, limit: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    loop {
        let frame = timeout(ANSWER, body.frame()).await.map_err(|_| Failure::Broken("nothing comes".to_owned()))?;
        let Some(frame) = frame else { return Ok(bytes) };
        let frame = frame.map_err(|error| Failure::Broken(in_full(&error)))?;
        let Some(data) = frame.data_ref() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(Failure::Nonsense(format!("it is longer than {} MiB", limit >> 20)));
        }
        bytes.extend_from_slice(data);
    }
}

/// The endpoint that a mounted ConfigMap gives.
fn given_endpoint(folder: &Path) -> Option<Uri> {
    let read = |name: &str| Some(std::fs::read_to_string(folder.join(name)).ok()?.trim().to_owned());
    let (host, port) = (read("KUBERNETES_SERVICE_HOST")?, read("KUBERNETES_SERVICE_PORT"));
    let host = if host.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6()) { format!("[{host}]") } else { host };
    format!("https://{host}:{}", port.as_deref().unwrap_or("443")).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_of_a_mounted_config_map_is_dialled() {
        let folder = std::env::temp_dir().join(format!("weir-endpoint-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(given_endpoint(&folder), None);
        std::fs::write(folder.join("KUBERNETES_SERVICE_HOST"), "fd00::1\n").unwrap();
        assert_eq!(given_endpoint(&folder).unwrap().to_string(), "https://[fd00::1]:443/");
        std::fs::write(folder.join("KUBERNETES_SERVICE_HOST"), "192.0.2.1\n").unwrap();
        std::fs::write(folder.join("KUBERNETES_SERVICE_PORT"), "6443").unwrap();
        assert_eq!(given_endpoint(&folder).unwrap().to_string(), "https://192.0.2.1:6443/");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
