//! What the API servers that tests play have in common: connections, requests, and how a client finds them.

use std::{
    io::{self, BufRead, BufReader, Read},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
};

/// Serves each connection on a thread of its own.
pub fn accept(listener: TcpListener, serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (serve, stream) = (serve.clone(), stream.unwrap());
            thread::spawn(move || drop(serve(stream)));
        }
    });
}

/// A request.
#[allow(dead_code, reason = "each test looks at a part of it")]
pub struct Request {
    /// GET, PATCH, ...
    pub method: String,
    /// The path, with the query.
    pub target: String,
    /// The headers' lines, in lower case.
    pub headers: String,
    /// The content.
    pub body: Vec<u8>,
}

impl Request {
    /// The next one of a connection; `None` where that has ended.
    pub fn read(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Self>> {
        let (mut first, mut headers) = (String::new(), String::new());
        if reader.read_line(&mut first)? == 0 {
            return Ok(None);
        }
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            if line.trim().is_empty() {
                break;
            }
            headers += &line.to_lowercase();
        }
        let length = headers.lines().find_map(|line| line.strip_prefix("content-length:"));
        let mut body = vec![0; length.map_or(0, |length| length.trim().parse().unwrap())];
        reader.read_exact(&mut body)?;
        let mut words = first.split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap(), words.next().unwrap());
        Ok(Some(Self { method, target, headers, body }))
    }
}

/// Writes a kubeconfig for a server into a folder.
pub fn kubeconfig(folder: &Path, server: SocketAddr) -> PathBuf {
    let path = folder.join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: 'http://{server}'}}}}]\ncontexts: [{{name: c, context: {{cluster: c, \
         user: u}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\ncurrent-context: c\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}
