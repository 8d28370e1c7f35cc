//! Answers to clients: control gives what it knows, a thread writes it.
//!
//! A reader may be slow, and tables are long. So each answer has a thread; there are as many at once as [`crate::listener`] has places.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    os::unix::net::UnixStream,
    sync::Arc,
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use weir_dataplane::{clock::now, hits::Hits, worker::Shared};
use weir_nat::{BackendIdentity, Model};
use weir_sync::Domain;

use crate::{conntrack, control::PolicyHits, pods::Pods, services, snat_use};

/// How long a client may leave what was written unread.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to be written.
pub(super) enum Answer {
    Line(Value),
    Status(Value),
    Hits(Hits),
    Ipam(Arc<Pods>),
    Conntrack(conntrack::Query),
    Services(Model, HashMap<BackendIdentity, u64>),
}

/// What answers are read from beside what control gives.
pub(super) struct Answers {
    pub(super) shared: Arc<Shared>,
    pub(super) domain: Arc<Domain>,
}

impl Answers {
    /// Has an answer written. `place` is given back when that is done.
    ///
    /// # Errors
    /// Where there can be no thread, or the client has gone.
    pub(super) fn begin(
        &self,
        answer: Answer,
        stream: tokio::net::UnixStream,
        place: OwnedSemaphorePermit,
    ) -> io::Result<()> {
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let (shared, domain) = (Arc::clone(&self.shared), Arc::clone(&self.domain));
        let write = move || {
            // A reader that went away ends it.
            drop(write(answer, stream, &shared, &domain));
            drop(place);
        };
        thread::Builder::new().name("weir-answer".into()).spawn(write).map(drop)
    }
}

fn write(answer: Answer, mut stream: UnixStream, shared: &Shared, domain: &Arc<Domain>) -> io::Result<()> {
    match answer {
        Answer::Line(line) => writeln!(stream, "{line}"),
        Answer::Status(mut status) => {
            status["snat"]["addresses"] = snat_use::of_both(&shared.tables, now());
            writeln!(stream, "{status}")
        }
        Answer::Hits(hits) => {
            let hits = hits.by_rule().into_iter().map(|(rule, hits)| (rule.0, hits)).collect();
            writeln!(stream, "{}", json!(PolicyHits { hits }))
        }
        // It reads files, and asks the kernel for devices.
        Answer::Ipam(pods) => match pods.explain() {
            Ok(report) => writeln!(stream, "{}", json!(report)),
            Err(error) => writeln!(stream, "{}", json!({"error": error.to_string()})),
        },
        Answer::Conntrack(query) => conntrack::answer(stream, shared, domain, &query),
        Answer::Services(model, hits) => services::answer(stream, &model, &hits),
    }
}
