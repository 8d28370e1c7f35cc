//! Follows one kind for as long as it is asked to: list, watch, again where that ends.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    rc::Rc,
    time::{Duration, Instant, SystemTime},
};

use http_body_util::BodyExt as _;
use jiff::Timestamp;
use kube_client::client::Body;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use weir_cluster::resources::live::{Live, Reader};

use crate::{
    dial::{Dial, Failure},
    follow::{Follow, TooMany},
    keep::{Folder, Journal},
    resource::Resource,
    wire::{Bookmark, Event, FIRST_PAGE, Page, Status},
};

/// For how long a watch is asked for; each a little other, so that a cluster's watches do not end at once.
const WATCH: Duration = Duration::from_secs(290);
/// How much longer than that nothing may come before a connection is taken for dead.
const MARGIN: Duration = Duration::from_secs(20);
/// The same, of a server that sends bookmarks: it does each minute.
const BOOKMARKS: Duration = Duration::from_secs(150);
/// The longest event: etcd holds 1.5 MiB of an object, and JSON may be longer than what is stored.
const MAX_EVENT: usize = 16 << 20;
/// The pause after what failed, at first and at most.
pub const BACKOFF: (Duration, Duration) = (Duration::from_millis(800), Duration::from_secs(30));
/// How long an object of a list waits for the disk that it is kept on.
const DISK: Duration = Duration::from_secs(5);
/// How long a server may be behind what was seen before it is believed all the same.
const BEHIND: Duration = Duration::from_secs(300);

/// Changes of slices that are measured until they are published.
pub const MOST_TRIGGERS: usize = 100_000;

/// When the cluster saw what changed in a slice, by its annotation.
fn trigger_time(json: &str) -> Option<SystemTime> {
    #[derive(serde::Deserialize)]
    struct Slice<'j> {
        #[serde(borrow)]
        metadata: Metadata<'j>,
    }
    #[derive(serde::Deserialize)]
    struct Metadata<'j> {
        #[serde(borrow, default)]
        annotations: Option<BTreeMap<Cow<'j, str>, Cow<'j, str>>>,
    }
    let Slice { metadata } = serde_json::from_str(json).ok()?;
    parse_time(metadata.annotations?.get("endpoints.kubernetes.io/last-change-trigger-time")?)
}

/// A moment as Kubernetes writes it (RFC 3339, in UTC), not before 1970.
fn parse_time(text: &str) -> Option<SystemTime> {
    let time: Timestamp = text.strip_suffix('Z').and(text.parse().ok())?;
    Some(SystemTime::from(time)).filter(|time| *time >= SystemTime::UNIX_EPOCH)
}

/// A number from 0 to 1 that is hard to guess.
pub fn random() -> f64 {
    let state = RandomState::new().hash_one(0_u8);
    (state >> 11) as f64 / (1_u64 << 53) as f64
}

/// One kind, as it is followed.
pub struct Watched {
    /// Which.
    pub resource: Resource,
    /// Since when.
    pub begun: Instant,
    /// What is known.
    pub follow: RefCell<Follow>,
    /// Where it is kept for the next start.
    pub journal: RefCell<Option<Journal>>,
    /// When the server last said something of it.
    pub last_word: Cell<Option<Instant>>,
    /// What went wrong last, if nothing has gone well since.
    pub failure: RefCell<Option<String>>,
    /// Objects and events that could not be read.
    pub unreadable: Cell<u64>,
    /// Whether an object asks for service accounts.
    pub names_accounts: Cell<bool>,
    /// Whether an object may ask for the endpoints of a service.
    pub names_services: Cell<bool>,
}

/// What all kinds share.
pub struct Shared {
    /// How the server is reached.
    pub dial: Dial,
    /// What reads objects.
    pub reader: Reader,
    /// Where objects are kept.
    pub folder: Option<Folder>,
    /// Told of each change.
    pub changed: Notify,
    /// When what changed of slices was seen by the cluster, until it is published.
    pub triggers: RefCell<Vec<SystemTime>>,
}

/// How a watch went.
enum Ended {
    /// As it was asked to.
    InTime,
    /// The server does not have what it should go on from any more.
    Expired,
}

impl Watched {
    /// One that was not asked for yet.
    pub fn new(resource: Resource, reader: &Reader) -> Self {
        let set = weir_cluster::resources::live::Set::new(reader, resource.live());
        Self {
            resource,
            begun: Instant::now(),
            follow: RefCell::new(Follow::new(set)),
            journal: RefCell::default(),
            last_word: Cell::new(None),
            failure: RefCell::default(),
            unreadable: Cell::new(0),
            names_accounts: Cell::new(false),
            names_services: Cell::new(false),
        }
    }

    /// Follows it, without an end.
    pub async fn run(self: Rc<Self>, shared: Rc<Shared>) {
        let mut pause = BACKOFF.0;
        let mut way = Way::default();
        let mut behind_since: Option<Instant> = None;
        loop {
            let begin = Instant::now();
            let outcome = self.turn(&shared, &mut way).await;
            self.follow.borrow_mut().ended();
            match outcome {
                Ok(Ended::InTime) => {}
                Ok(Ended::Expired) => self.follow.borrow_mut().expired(),
                Err(failure) => {
                    tracing::debug!("{}: {failure}", self.resource.plural);
                    self.failure.replace(Some(failure.to_string()));
                    shared.changed.notify_one();
                }
            }
            if self.journal.borrow().as_ref().is_some_and(Journal::needs_list) {
                self.follow.borrow_mut().expired();
            }
            let is_behind = self.follow.borrow().is_behind();
            behind_since = is_behind.then(|| behind_since.unwrap_or(begin));
            if behind_since.is_some_and(|since| since.elapsed() > BEHIND) {
                self.follow.borrow_mut().forget_version();
                behind_since = None;
            }
            // A turn that went well for a while is followed by the next at once.
            if begin.elapsed() > BACKOFF.1 {
                pause = BACKOFF.0;
                continue;
            }
            sleep(pause.mul_f64(0.5 + random())).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    async fn turn(&self, shared: &Shared, way: &mut Way) -> Result<Ended, Failure> {
        let resume = self.follow.borrow().resume().map(str::to_owned);
        let outcome = match resume {
            Some(from) => self.watch(shared, way, Some(&from)).await,
            None if way.in_pages => {
                self.list(shared, way).await?;
                return Ok(Ended::InTime);
            }
            None => self.watch(shared, way, None).await,
        };
        match outcome {
            // A server without streaming lists refuses them, or ends the watch with an error; one that knows no such field of a selector does too.
            Err(failure) if matches!(failure.code(), 400 | 422) => {
                if !way.without_fields && !self.resource.fields.is_empty() && failure.to_string().contains("field") {
                    way.without_fields = true;
                } else if !way.in_pages {
                    way.in_pages = true;
                } else {
                    return Err(failure);
                }
                tracing::debug!("{}: another way, as {failure}", self.resource.plural);
                Ok(Ended::InTime)
            }
            other => other,
        }
    }

    /// What is asked for, without a question mark.
    fn query(&self, way: &Way, more: &str) -> String {
        let Resource { labels, fields, .. } = &self.resource;
        let encode = |text: &str| text.replace('!', "%21").replace('/', "%2F").replace('=', "%3D");
        let mut path = format!("{}?{more}", self.resource.path());
        if !labels.is_empty() {
            path += &format!("&labelSelector={}", encode(labels));
        }
        if !fields.is_empty() && !way.without_fields {
            path += &format!("&fieldSelector={}", encode(fields));
        }
        path
    }

    /// Does something to what is known, and writes it down if that made another of it.
    fn known(
        &self,
        sign: char,
        json: &str,
        change: impl FnOnce(&mut Follow) -> Result<(), TooMany>,
    ) -> Result<(), Failure> {
        let mut follow = self.follow.borrow_mut();
        let before = follow.changes();
        change(&mut follow).map_err(|error| Failure::Nonsense(error.to_string()))?;
        if follow.changes() != before {
            self.kept(|journal| journal.change(sign, json));
        }
        Ok(())
    }

    fn kept(&self, write: impl FnOnce(&mut Journal)) {
        if let Some(journal) = &mut *self.journal.borrow_mut() {
            write(journal);
        }
    }

    fn begin_list(&self) {
        self.follow.borrow_mut().begin_list();
        self.kept(Journal::begin);
    }

    async fn item(&self, json: &str, object: Live) -> Result<(), Failure> {
        let begin = Instant::now();
        while self.journal.borrow().as_ref().is_some_and(Journal::is_crowded) {
            if begin.elapsed() > DISK {
                tracing::warn!("the disk is too slow to keep {} for the next start", self.resource.plural);
                self.kept(Journal::give_up);
            }
            sleep(Duration::from_millis(1)).await;
        }
        self.kept(|journal| journal.item(json));
        self.follow.borrow_mut().item(object).map_err(|error| Failure::Nonsense(error.to_string()))
    }

    fn end_list(&self, version: &str) {
        let mut follow = self.follow.borrow_mut();
        follow.end_list(version);
        // A list that is passed over is not kept either; the file stays, and what comes is added to it.
        let is_behind = follow.is_behind();
        self.kept(|journal| if is_behind { journal.pass_over() } else { journal.end() });
    }

    fn heard(&self) {
        self.last_word.set(Some(Instant::now()));
        if self.failure.borrow().is_some() {
            self.failure.replace(None);
        }
    }

    /// A list in pages.
    async fn list(&self, shared: &Shared, way: &mut Way) -> Result<(), Failure> {
        self.begin_list();
        let mut more = FIRST_PAGE.to_owned();
        loop {
            let text = match shared.dial.text(&self.query(way, &more)).await {
                // The version that the pages are of is gone: begin again.
                Err(failure) if failure.code() == 410 => {
                    self.follow.borrow_mut().expired();
                    return Ok(());
                }
                Err(failure) if matches!(failure.code(), 400 | 422) && !way.without_fields => {
                    way.without_fields = true;
                    return Ok(());
                }
                other => other?,
            };
            let page: Page<'_> = serde_json::from_str(&text).map_err(|error| Failure::Nonsense(error.to_string()))?;
            for item in page.items.unwrap_or_default() {
                let object = self.read(shared, item.get())?;
                self.item(item.get(), object).await?;
            }
            self.heard();
            let Some(next) = page.metadata.next_page()? else {
                self.end_list(&page.metadata.resource_version.unwrap_or_default());
                shared.changed.notify_one();
                return Ok(());
            };
            more = next;
        }
    }

    /// Gives each object of a list to `take`, beside what is followed.
    pub async fn fetch(
        &self,
        shared: &Shared,
        mut take: impl FnMut(Live) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut way = Way::default();
        let mut more = FIRST_PAGE.to_owned();
        loop {
            let text = match shared.dial.text(&self.query(&way, &more)).await {
                Err(failure)
                    if matches!(failure.code(), 400 | 422)
                        && !way.without_fields
                        && !self.resource.fields.is_empty() =>
                {
                    way.without_fields = true;
                    continue;
                }
                other => other?,
            };
            let page: Page<'_> = serde_json::from_str(&text).map_err(|error| Failure::Nonsense(error.to_string()))?;
            for item in page.items.unwrap_or_default() {
                take(self.read(shared, item.get())?)?;
            }
            let Some(next) = page.metadata.next_page()? else { return Ok(()) };
            more = next;
        }
    }

    fn read(&self, shared: &Shared, json: &str) -> Result<Live, Failure> {
        let object = shared.reader.read(self.resource.live(), json).map_err(|error| {
            self.unreadable.set(self.unreadable.get() + 1);
            Failure::Nonsense(error.to_string())
        })?;
        // Only policy is told apart by accounts, or names services.
        if self.resource.plural.ends_with("policies") {
            for (asked, word) in [(&self.names_accounts, "\"serviceAccount"), (&self.names_services, "\"services\"")] {
                asked.set(asked.get() || json.contains(word));
            }
        }
        Ok(object)
    }

    /// Watches from a version on; without one, the objects that there are come first.
    async fn watch(&self, shared: &Shared, way: &mut Way, from: Option<&str>) -> Result<Ended, Failure> {
        let seconds = WATCH.mul_f64(0.8 + 0.4 * random());
        let mut more = format!("watch=1&allowWatchBookmarks=true&timeoutSeconds={}", seconds.as_secs());
        match from {
            Some(version) if version.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte)) => {
                more += &format!("&resourceVersion={version}");
            }
            Some(_) => return Ok(Ended::Expired),
            None => more += "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
        }
        let response = match shared.dial.stream(&self.query(way, &more)).await {
            Err(failure) if failure.code() == 410 => return Ok(Ended::Expired),
            other => other?,
        };
        let mut is_list = from.is_none();
        if is_list {
            self.begin_list();
        }
        let mut lines = Lines::new(response.into_body());
        let mut silence = seconds + MARGIN;
        while let Some(line) = lines.next(silence).await? {
            if line.is_empty() {
                continue;
            }
            let (was_list, had_failed) = (is_list, self.failure.borrow().is_some());
            let before = self.follow.borrow().changes();
            let nonsense = |error: serde_json::Error| Failure::Nonsense(error.to_string());
            let event: Event<'_> = serde_json::from_str(&line).map_err(nonsense)?;
            let json = event.object.get();
            match event.kind {
                "BOOKMARK" => {
                    let bookmark: Bookmark = serde_json::from_str(json).map_err(nonsense)?;
                    silence = BOOKMARKS.min(silence);
                    if is_list && bookmark.ends_list() {
                        self.end_list(bookmark.version());
                        is_list = false;
                    } else if is_list {
                        // It does not know what it was asked for.
                        way.in_pages = true;
                        return Ok(Ended::InTime);
                    } else {
                        self.follow.borrow_mut().bookmark(bookmark.version());
                    }
                }
                "ERROR" => {
                    let status: Status = serde_json::from_str(json).unwrap_or_default();
                    if status.code == 410 {
                        return Ok(Ended::Expired);
                    }
                    if is_list && !matches!(status.code, 429 | 500..=599) {
                        way.in_pages = true;
                        return Ok(Ended::InTime);
                    }
                    // A watch cache that cannot serve it says so by an error of the server as well.
                    way.count_refusal(is_list);
                    return Err(Failure::Refused { path: self.resource.path(), status });
                }
                "ADDED" | "MODIFIED" if is_list => {
                    let object = self.read(shared, json)?;
                    self.item(json, object).await?;
                }
                "ADDED" | "MODIFIED" => {
                    let object = self.read(shared, json)?;
                    self.known('+', json, |follow| follow.changed(object))?;
                    if self.resource.kind == "EndpointSlice" && self.follow.borrow().changes() != before {
                        let mut triggers = shared.triggers.borrow_mut();
                        if triggers.len() < MOST_TRIGGERS {
                            triggers.extend(trigger_time(json));
                        }
                    }
                }
                // What is gone before the list is whole is not in it.
                "DELETED" if is_list => return Err(Failure::Nonsense("a deletion within a list".to_owned())),
                "DELETED" => {
                    let object = self.read(shared, json)?;
                    self.known('-', json, |follow| {
                        follow.deleted(&object);
                        Ok(())
                    })?;
                }
                other => return Err(Failure::Nonsense(format!("an event of the kind {other:?}"))),
            }
            self.heard();
            // Most of what comes says nothing new: the heartbeats of a large cluster's nodes.
            if !is_list && (was_list || had_failed || self.follow.borrow().changes() != before) {
                shared.changed.notify_one();
            }
        }
        if is_list { Err(Failure::Broken("before the list was whole".to_owned())) } else { Ok(Ended::InTime) }
    }
}

/// What was found out of how this server wants to be asked.
#[derive(Debug, Default)]
struct Way {
    /// It has no streaming lists.
    in_pages: bool,
    /// It does not know the fields of a selector.
    without_fields: bool,
    refusals: u8,
}

impl Way {
    /// After a third streaming list that ended with an error, another way is tried.
    fn count_refusal(&mut self, of_list: bool) {
        self.refusals += u8::from(of_list);
        self.in_pages |= self.refusals >= 3;
    }
}

/// A body by lines.
struct Lines {
    body: Body,
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to where there is no end of it.
    searched: usize,
}

impl Lines {
    fn new(body: Body) -> Self {
        Self { body, bytes: Vec::new(), start: 0, searched: 0 }
    }

    /// The next line, unless nothing comes for so long.
    async fn next(&mut self, silence: Duration) -> Result<Option<String>, Failure> {
        loop {
            if let Some(length) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') {
                let end = self.searched + length;
                let line = std::str::from_utf8(&self.bytes[self.start..end]).map(str::to_owned);
                (self.start, self.searched) = (end + 1, end + 1);
                return line.map(Some).map_err(|_| Failure::Nonsense("it is no UTF-8".to_owned()));
            }
            self.bytes.drain(..self.start);
            (self.start, self.searched) = (0, self.bytes.len());
            if self.bytes.len() > MAX_EVENT {
                return Err(Failure::Nonsense(format!("an event of more than {} MiB", MAX_EVENT >> 20)));
            }
            let frame = timeout(silence, self.body.frame()).await;
            let frame = frame.map_err(|_| Failure::Broken(format!("nothing came for {} s", silence.as_secs())))?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => return Err(Failure::Broken(error.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.bytes.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod time_tests {
    use super::*;

    #[test]
    fn moments_are_read_as_kubernetes_writes_them() {
        let since =
            |text: &str| parse_time(text).map(|time| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos());
        // By date(1).
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:34:56Z", 951_827_696_000_000_000),
            ("2026-12-01T15:09:37.5Z", 1_796_137_777_500_000_000),
            ("2026-12-01T15:09:37.000000001Z", 1_796_137_777_000_000_001),
        ] {
            assert_eq!(since(text), Some(expected), "{text}");
        }
        for none in [
            "",
            "2026-12-01",
            "2026-13-01T00:00:00Z",
            "2026-12-01T24:00:00Z",
            "2026-12-01T00:00:00+01:00",
            "x-1-1T0:0:0Z",
            "2026-12-01T00:00:00.0000000001Z",
        ] {
            assert_eq!(since(none), None, "{none}");
        }
        let slice = r#"{"metadata": {"name": "x", "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:00:01Z"}}, "ports": []}"#;
        assert_eq!(trigger_time(slice), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1)));
        assert_eq!(trigger_time(r#"{"metadata": {"name": "x"}}"#), None);
    }
}
