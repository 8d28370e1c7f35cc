//! What control hears of: one message for each thing, from tasks and threads that wait in its place.
//!
//! Each of them sends into one bounded channel, and waits where that is full. Control never waits for one of them. A task whose source ended
//! opens it again, so only a dead worker ends the router.

use std::{io, net::IpAddr, path::PathBuf, thread, time::Duration};

use tokio::{
    net::UnixStream,
    signal::unix::{Signal, SignalKind, signal},
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    time::sleep,
};
use tracing::{error, warn};
use weir_cluster::{
    sockets::{Listening, Sockets},
    sources::watch::{Trigger, Watch, WatchError},
};
use weir_dataplane::{frame::IfIndex, pipeline::Event};

use super::verify::Round;
use crate::{
    action_log,
    control::Request,
    kernel::{
        FollowSettings, HostPlumbing, HostReport, HostSettings, KernelError, KernelState, Link, Resolver, View, Wanted,
    },
    pods::Ask,
    prepare::Finished,
    web::Facts,
};

/// Messages that may wait for control.
const MESSAGES: usize = 4096;
/// Neighbours that may wait to be asked for. Those for whom there is no room are asked for again in a second, if packets still wait for them.
const NEIGHBORS: usize = 1024;
/// How long is waited before a source that ended is opened again, doubled each time up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Something that control hears of.
pub(super) enum Message {
    /// The kernel's links, routes or neighbours changed: the view has them.
    KernelChanged,
    /// The kernel cannot be followed; it is tried again.
    KernelFailed(KernelError),
    /// A worker tells.
    Worker(Event),
    /// A worker ended.
    WorkerFailed(usize, io::Error),
    /// Files changed, or SIGHUP came.
    Files(Trigger),
    /// Files cannot be watched; it is tried again.
    FilesFailed(WatchError),
    /// Objects of the running cluster changed.
    Cluster,
    /// A configuration is ready, or refused.
    Prepared(Box<Finished>),
    /// A round of a verification has ended.
    Verified(Round),
    /// Which ports the node's sockets have.
    Ports(Listening, Option<Sockets>),
    /// weir-cni's side asks.
    Pod(Ask),
    /// What the kernel knows of a device that is to be closed.
    ToClose { device: String, link: Result<Option<Link>, KernelError>, answer: oneshot::Sender<Result<(), String>> },
    /// A client asks; the permit is a place among those who are answered.
    Client(Request, UnixStream, OwnedSemaphorePermit),
    /// Somebody asks by HTTP how weir is.
    Facts(oneshot::Sender<Facts>),
    /// The kernel's routes and rules are as they were wanted last, or not.
    Plumbed(Result<HostReport, KernelError>),
    /// The router is to end.
    End,
}

/// Control's end, and what others send by.
pub(super) fn inbox() -> (mpsc::Sender<Message>, mpsc::Receiver<Message>) {
    mpsc::channel(MESSAGES)
}

/// Sends [`Message::End`] at SIGINT or SIGTERM.
///
/// # Errors
/// Where they cannot be caught.
pub(super) fn signals(inbox: &mpsc::Sender<Message>) -> io::Result<()> {
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let (mut caught, inbox): (Signal, _) = (signal(kind)?, inbox.clone());
        tokio::spawn(async move {
            while caught.recv().await.is_some() {
                drop(inbox.send(Message::End).await);
            }
        });
    }
    Ok(())
}

/// Pauses that grow.
struct Pauses(Duration);

impl Pauses {
    async fn pause(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }

    fn reset(&mut self) {
        self.0 = FIRST_PAUSE;
    }
}

/// Follows the kernel; where that ends, from its beginning again. What is to be asked of it beside is asked by what `resolver` has.
pub(super) fn follow_kernel(mut kernel: KernelState, resolver: watch::Sender<Resolver>, inbox: mpsc::Sender<Message>) {
    tokio::spawn(async move {
        let view: View = kernel.view().clone();
        let mut pauses = Pauses(FIRST_PAUSE);
        loop {
            let message = match kernel.changed().await {
                Ok(changed) if changed.links || changed.routes || changed.neighbors => {
                    pauses.reset();
                    Message::KernelChanged
                }
                Ok(_) => continue,
                Err(error) => {
                    let has_ended = matches!(error, KernelError::Closed);
                    if inbox.send(Message::KernelFailed(error)).await.is_err() {
                        return;
                    }
                    if has_ended {
                        kernel = follow_anew(&view, &mut pauses, &inbox).await;
                        resolver.send_replace(kernel.resolver());
                    }
                    Message::KernelChanged
                }
            };
            if inbox.send(message).await.is_err() {
                return;
            }
        }
    });
}

/// Follows the kernel from the beginning, as soon as it lets.
async fn follow_anew(view: &View, pauses: &mut Pauses, inbox: &mpsc::Sender<Message>) -> KernelState {
    loop {
        pauses.pause().await;
        match KernelState::follow_on(FollowSettings::default(), view.clone()).await {
            Ok(kernel) => return kernel,
            Err(error) => drop(inbox.send(Message::KernelFailed(error)).await),
        }
    }
}

/// Watches the files that were asked for last. When others are asked for, they may have changed after they were read and before they were
/// watched, so that counts as a change.
pub(super) fn watch_files(mut files: Watch, mut paths: watch::Receiver<Vec<PathBuf>>, inbox: mpsc::Sender<Message>) {
    tokio::spawn(async move {
        let mut pauses = Pauses(FIRST_PAUSE);
        loop {
            let outcome = tokio::select! {
                changed = paths.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let wanted = paths.borrow_and_update().clone();
                    files.set_paths(wanted).map(|()| Trigger::Files)
                }
                changed = files.changed() => changed,
            };
            let message = match outcome {
                Ok(trigger) => {
                    pauses.reset();
                    Message::Files(trigger)
                }
                Err(error) => {
                    if inbox.send(Message::FilesFailed(error)).await.is_err() {
                        return;
                    }
                    pauses.pause().await;
                    // Anew, whatever failed. What changed meanwhile is found by reading.
                    let wanted = paths.borrow_and_update().clone();
                    match Watch::new(wanted) {
                        Ok(again) => {
                            files = again.sharing(files.revisit());
                            Message::Files(Trigger::Files)
                        }
                        Err(error) => {
                            paths.mark_changed();
                            Message::FilesFailed(error)
                        }
                    }
                }
            };
            if inbox.send(message).await.is_err() {
                return;
            }
        }
    });
}

/// Makes the kernel's routes and rules what is wanted last.
pub(super) fn plumb(
    settings: HostSettings,
    mut plumbing: HostPlumbing,
    mut wanted: watch::Receiver<Option<Wanted>>,
    inbox: mpsc::Sender<Message>,
) {
    tokio::spawn(async move {
        while wanted.changed().await.is_ok() {
            let Some(next) = wanted.borrow_and_update().clone() else { continue };
            let outcome = plumbing.apply(&next).await;
            if matches!(outcome, Err(KernelError::Closed))
                && let Ok(again) = HostPlumbing::new(settings.clone())
            {
                plumbing = again;
            }
            if inbox.send(Message::Plumbed(outcome)).await.is_err() {
                return;
            }
        }
    });
}

/// Hands on what workers tell; writes what they log, so that a slow reader of the log holds up nobody else.
///
/// # Errors
/// Where there can be no thread.
pub(super) fn hear_workers(
    events: crossbeam::channel::Receiver<Event>,
    inbox: mpsc::Sender<Message>,
) -> io::Result<()> {
    let hand_on = move || {
        for event in events.iter() {
            match event {
                Event::Logged(logged) => action_log::write(&logged),
                other => {
                    if inbox.blocking_send(Message::Worker(other)).is_err() {
                        return;
                    }
                }
            }
        }
    };
    thread::Builder::new().name("weir-events".into()).spawn(hand_on).map(drop)
}

/// Hands on what is asked about pods.
pub(super) fn hear_pods(mut asks: mpsc::Receiver<Ask>, inbox: mpsc::Sender<Message>) {
    tokio::spawn(async move {
        while let Some(ask) = asks.recv().await {
            if inbox.send(Message::Pod(ask)).await.is_err() {
                return;
            }
        }
        error!("the maker of pods has ended: no pod is made any more until weir is started again");
    });
}

/// Hands on that objects of the running cluster changed.
pub(super) fn follow_cluster(mut changes: watch::Receiver<()>, inbox: mpsc::Sender<Message>) {
    tokio::spawn(async move {
        while changes.changed().await.is_ok() {
            if inbox.send(Message::Cluster).await.is_err() {
                return;
            }
        }
    });
}

/// Hands on that a worker ended.
pub(super) fn hear_failures(mut failures: mpsc::Receiver<(usize, io::Error)>, inbox: mpsc::Sender<Message>) {
    tokio::spawn(async move {
        while let Some((worker, source)) = failures.recv().await {
            drop(inbox.send(Message::WorkerFailed(worker, source)).await);
        }
    });
}

/// Looks which ports the node's sockets have, which takes its time where there are many; all sockets only where `looks_at_all`.
pub(super) fn look_at_ports(
    range: (u16, u16),
    has_host_endpoints: bool,
    looks_at_all: bool,
    inbox: mpsc::Sender<Message>,
) {
    tokio::task::spawn_blocking(move || {
        let listening = Listening::read().relevant(range, has_host_endpoints);
        let sockets = looks_at_all.then(Sockets::read);
        drop(inbox.blocking_send(Message::Ports(listening, sockets)));
    });
}

/// Asks the kernel for a device that is to be closed.
pub(super) fn ask_for_device(
    resolver: Resolver,
    device: String,
    answer: oneshot::Sender<Result<(), String>>,
    inbox: mpsc::Sender<Message>,
) {
    tokio::spawn(async move {
        let link = resolver.device(&device).await;
        drop(inbox.send(Message::ToClose { device, link, answer }).await);
    });
}

/// Has the kernel asked for neighbours, one after the other. A refusal means that the device just went; the packets that wait are dropped in time.
pub(super) fn resolve_neighbors(resolver: watch::Receiver<Resolver>) -> mpsc::Sender<(IpAddr, IfIndex)> {
    let (sender, mut neighbors) = mpsc::channel::<(IpAddr, IfIndex)>(NEIGHBORS);
    tokio::spawn(async move {
        while let Some((address, device)) = neighbors.recv().await {
            let resolver = resolver.borrow().clone();
            if let Err(error) = resolver.resolve(address, device).await {
                warn!(%address, device = device.0, %error, "a neighbour cannot be asked for");
            }
        }
    });
    sender
}
