//! The addresses of this node's pods, on the pods' objects: other nodes know them by that before the kubelet's status says them.
//!
//! As Calico's CNI plugin does, by a patch of the subresource `status`, which may change annotations and no spec (libcalico-go,
//! lib/backend/k8s/resources/workloadendpoint.go). An address is taken back by an empty text, as there, and only where it is the one that was written.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    rc::Rc,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use http::Method;
use serde_json::json;
use tokio::time::sleep;
use weir_cluster::resources::kubernetes::{POD_IP, POD_IPS};

use super::{BACKOFF, FORBIDDEN, JSON_PATCH, MERGE, Speaker, Told, jittered, longer};
use crate::{
    dial::{Dial, Failure},
    watch::Shared,
};

/// How many are written at once.
pub const AT_ONCE: usize = 8;
/// How many may wait. A node has some hundred pods.
const WAITING: usize = 4096;
/// How often a conflict is tried again: the server does so itself a few times.
const CONFLICTS: u32 = 5;

/// A pod and its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodAddresses {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The uid of its object.
    pub uid: String,
    /// Its addresses, the first first.
    pub addresses: Vec<IpAddr>,
}

impl PodAddresses {
    fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}/status", self.namespace, self.name)
    }

    /// The first and all, as Calico writes them.
    fn texts(&self) -> (String, String) {
        let texts: Vec<String> =
            self.addresses.iter().map(|one| format!("{one}/{}", if one.is_ipv4() { 32 } else { 128 })).collect();
        (texts.first().cloned().unwrap_or_default(), texts.join(","))
    }
}

/// What is to stand on one object.
struct Wish {
    pod: PodAddresses,
    is_there: bool,
    due: Instant,
    pause: Duration,
    conflicts: u32,
    /// Whether it is being written. The newest wish is written after that.
    is_written: bool,
    /// Tells this wish from the one before.
    number: u64,
    heard: Option<SyncSender<()>>,
}

/// What is to stand on pods' objects, by their uid.
#[derive(Default)]
pub struct Wishes {
    by_uid: BTreeMap<String, Wish>,
    numbers: u64,
    /// Until when nothing is said, as it is forbidden.
    forbidden: Option<Instant>,
    /// Whether what was tried last failed, so that nobody should wait.
    fails: bool,
    pub told: Told,
}

impl Wishes {
    pub fn len(&self) -> usize {
        self.by_uid.len()
    }

    pub fn announce(&mut self, pod: PodAddresses, now: Instant) -> Option<Receiver<()>> {
        let (told, heard) = sync_channel(1);
        let is_taken = !pod.addresses.is_empty() && self.put(pod, true, Some(told), now);
        Some(heard).filter(|_| is_taken && !self.fails)
    }

    pub fn withdraw(&mut self, pod: PodAddresses, now: Instant) {
        self.put(pod, false, None, now);
    }

    fn put(&mut self, pod: PodAddresses, is_there: bool, heard: Option<SyncSender<()>>, now: Instant) -> bool {
        if self.forbidden.is_some_and(|until| now < until) {
            return false;
        }
        self.numbers += 1;
        let is_written = self.by_uid.get(&pod.uid).is_some_and(|known| known.is_written);
        if self.by_uid.len() >= WAITING && !self.by_uid.contains_key(&pod.uid) {
            self.told.problem = Some(format!("more than {WAITING} pods wait for their addresses to be written"));
            return false;
        }
        let number = self.numbers;
        let wish = Wish { is_there, due: now, pause: Duration::ZERO, conflicts: 0, is_written, number, heard, pod };
        self.by_uid.insert(wish.pod.uid.clone(), wish);
        true
    }

    /// What is to be written now; else when it is time to look again.
    fn next(&mut self, now: Instant) -> Result<(PodAddresses, bool, u64), Option<Instant>> {
        let free = || self.by_uid.values().filter(|wish| !wish.is_written);
        let Some((uid, due)) = free().min_by_key(|wish| wish.due).map(|wish| (wish.pod.uid.clone(), wish.due)) else {
            return Err(None);
        };
        let Some(wish) = self.by_uid.get_mut(&uid).filter(|_| due <= now) else { return Err(Some(due)) };
        wish.is_written = true;
        Ok((wish.pod.clone(), wish.is_there, wish.number))
    }

    /// What became of it.
    fn heard(&mut self, uid: &str, number: u64, outcome: &Result<String, Failure>, now: Instant) {
        let Some(wish) = self.by_uid.get_mut(uid) else { return };
        wish.is_written = false;
        let code = outcome.as_ref().err().map_or(200, Failure::code);
        if wish.number != number {
            // It is another's by now, and due.
            self.fails = outcome.is_err() && !is_final(code);
            return;
        }
        if let Some(heard) = wish.heard.take() {
            // Who waited may have gone on.
            let _ = heard.try_send(());
        }
        match code {
            200 => {
                self.told.hear(outcome);
                self.fails = false;
                self.by_uid.remove(uid);
            }
            403 => {
                self.told.hear(outcome);
                self.forbidden = Some(now + FORBIDDEN);
                self.by_uid.clear();
            }
            // The pod is gone, or another, or does not name this address any more.
            404 | 422 => drop(self.by_uid.remove(uid)),
            409 if wish.conflicts >= CONFLICTS => drop(self.by_uid.remove(uid)),
            400..=499 if is_final(code) && code != 409 => {
                self.told.hear(outcome);
                self.by_uid.remove(uid);
            }
            code => {
                wish.conflicts += u32::from(code == 409);
                wish.pause = longer(wish.pause);
                wish.due = now + jittered(wish.pause);
                if code != 409 {
                    self.fails = true;
                    self.told.hear(outcome);
                }
            }
        }
    }
}

/// Whether a server that answers so will not answer otherwise.
fn is_final(code: u16) -> bool {
    (400..500).contains(&code) && ![401, 408, 425, 429].contains(&code)
}

/// Writes one after another, without an end.
pub async fn run(speaker: Arc<Speaker>, shared: Rc<Shared>) {
    loop {
        let next = speaker.wishes().pods.next(Instant::now());
        match next {
            Ok((pod, is_there, number)) => {
                let outcome = write(&shared.dial, &pod, is_there).await;
                speaker.wishes().pods.heard(&pod.uid, number, &outcome, Instant::now());
                // A wish that waited for this one is another's to see.
                speaker.of_pods.notify_one();
            }
            Err(due) => {
                let due = due.map_or(BACKOFF.1, |due| due.saturating_duration_since(Instant::now()));
                tokio::select! {
                    () = speaker.of_pods.notified() => {}
                    () = sleep(due) => {}
                }
            }
        }
    }
}

async fn write(dial: &Dial, pod: &PodAddresses, is_there: bool) -> Result<String, Failure> {
    let (first, all) = pod.texts();
    if is_there {
        // With its uid the server refuses it for another pod of that name.
        let patch = json!({"metadata": {"uid": pod.uid, "annotations": {POD_IP: first, POD_IPS: all}}});
        return dial.write(Method::PATCH, &pod.path(), MERGE, patch.to_string()).await;
    }
    let at = |key: &str| format!("/metadata/annotations/{}", key.replace('/', "~1"));
    let patch = json!([
        {"op": "test", "path": "/metadata/uid", "value": pod.uid},
        {"op": "test", "path": at(POD_IPS), "value": all},
        {"op": "add", "path": at(POD_IPS), "value": ""},
        {"op": "add", "path": at(POD_IP), "value": ""},
    ]);
    dial.write(Method::PATCH, &pod.path(), JSON_PATCH, patch.to_string()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Status;

    fn pod(uid: &str, address: &str) -> PodAddresses {
        PodAddresses {
            namespace: "x".into(),
            name: "p".into(),
            uid: uid.into(),
            addresses: vec![address.parse().unwrap()],
        }
    }

    fn refused(code: u16) -> Result<String, Failure> {
        Err(Failure::Refused { path: "/p".into(), status: Status { code, ..Status::default() } })
    }

    fn unreachable() -> Result<String, Failure> {
        Err(Failure::Unreachable { address: "a".into(), why: "away".into() })
    }

    #[test]
    fn the_newest_wish_for_a_pod_stands_and_one_is_written_at_a_time() {
        let (mut wishes, now) = (Wishes::default(), Instant::now());
        let heard = wishes.announce(pod("u", "10.0.0.1"), now).unwrap();
        let (first, is_there, number) = wishes.next(now).unwrap();
        assert!(is_there && first.texts() == ("10.0.0.1/32".into(), "10.0.0.1/32".into()));
        // While it is written it goes, and comes again with another address.
        wishes.withdraw(pod("u", "10.0.0.1"), now);
        drop(wishes.announce(pod("u", "10.0.0.2"), now));
        assert_eq!(wishes.next(now), Err(None), "it is being written");
        assert!(heard.recv().is_err(), "nobody waits for what is not wanted any more");
        wishes.heard("u", number, &unreachable(), now);
        let (second, is_there, number) = wishes.next(now).unwrap();
        assert!(is_there && second == pod("u", "10.0.0.2"));
        wishes.heard("u", number, &Ok(String::new()), now);
        assert_eq!((wishes.len(), wishes.told.written), (0, 1));
    }

    #[test]
    fn a_server_that_is_away_is_waited_for_once_and_asked_with_pauses() {
        let (mut wishes, mut now) = (Wishes::default(), Instant::now());
        let heard = wishes.announce(pod("u", "10.0.0.1"), now).unwrap();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let (_, _, number) = wishes.next(now).unwrap();
            wishes.heard("u", number, &unreachable(), now);
            let Err(Some(due)) = wishes.next(now) else { panic!("it is not due") };
            pauses.push((due - now).as_secs_f64());
            now = due;
        }
        assert_eq!(heard.try_recv(), Ok(()), "who waits hears of the first try");
        assert!((0.6..1.0).contains(&pauses[0]) && (23.9..36.1).contains(&pauses[7]), "{pauses:?}");
        assert!(wishes.announce(pod("v", "10.0.0.2"), now).is_none(), "nobody waits for a server that is away");
        assert!(wishes.told.problem.as_ref().unwrap().contains("away"));
        let (of, _, number) = wishes.next(now).unwrap();
        wishes.heard(&of.uid, number, &Ok(String::new()), now);
        assert!(wishes.announce(pod("w", "10.0.0.3"), now).is_some(), "it is there again");
    }

    #[test]
    fn what_can_never_be_ends_a_wish_and_what_is_forbidden_all() {
        let now = Instant::now();
        for (code, left) in [(404, 0), (422, 0), (400, 0), (409, 1), (429, 1), (500, 1), (401, 1)] {
            let mut wishes = Wishes::default();
            drop(wishes.announce(pod("u", "10.0.0.1"), now));
            let (_, _, number) = wishes.next(now).unwrap();
            wishes.heard("u", number, &refused(code), now);
            assert_eq!(wishes.len(), left, "{code}");
        }
        let mut wishes = Wishes::default();
        drop(wishes.announce(pod("u", "10.0.0.1"), now));
        drop(wishes.announce(pod("v", "10.0.0.2"), now));
        let (of, _, number) = wishes.next(now).unwrap();
        wishes.heard(&of.uid, number, &refused(403), now);
        assert!(wishes.announce(pod("w", "10.0.0.3"), now).is_none());
        assert_eq!((wishes.len(), wishes.next(now)), (0, Err(None)));
        assert!(wishes.told.problem.is_some());
        let later = now + FORBIDDEN;
        assert!(wishes.announce(pod("w", "10.0.0.3"), later).is_some());
        // Conflicts do not go on for ever.
        let mut now = later;
        for _ in 0..=CONFLICTS {
            let (of, _, number) = wishes.next(now).unwrap();
            wishes.heard(&of.uid, number, &refused(409), now);
            now += BACKOFF.1 * 2;
        }
        assert_eq!(wishes.len(), 0);
    }

    #[test]
    fn there_is_room_for_a_bounded_number() {
        let (mut wishes, now) = (Wishes::default(), Instant::now());
        for number in 0..WAITING + 10 {
            drop(wishes.announce(pod(&number.to_string(), "10.0.0.1"), now));
        }
        assert_eq!(wishes.len(), WAITING);
        // One that is there already may still change.
        wishes.withdraw(pod("0", "10.0.0.1"), now);
        assert!(!wishes.by_uid["0"].is_there);
    }
}
