//! The verdict on a connection that other tables have judged: whether it goes on by these.
//!
//! [`crate::decide`] judges a connection's first packet, and this what has become of it since. It sees a connection and the tables of a
//! snapshot, and no packet: of that it knows what it may begin ([`Claim`]), so that who asks without one is answered as well.

use weir_conntrack::ConnRef;
use weir_nat::Standing;
use weir_packet::{Direction, DropReason, Protocol, Tick};

use crate::{
    decide,
    forwarding::{Route, Routed},
    frame::IfIndex,
    next_hops,
    origin::{self, Arrival},
    snapshot::Snapshot,
};

/// The generation of a connection that was taken over from an earlier process and not judged yet; no snapshot has it.
const NO_GENERATION: u32 = 0;

/// A flow of datagrams that was answered and is silent for so long has no answer outstanding that anybody still waits for, most likely: what
/// comes then is somebody else who has the port now. It is also netfilter's time for what is no stream yet.
const QUIET_TICKS: u32 = (2_000_000_000 / Tick::NS) as u32;

/// What a packet may do where its connection does not stand any more, or is over.
///
/// | | a backend or device that is gone | a backend that drains | a service that appeared | a way out that changed | a policy that denies |
/// |---|---|---|---|---|---|
/// | [`Claim::Rides`] | the connection ends (TCP whose backend is gone: RST) | goes on | goes on without it | goes on | cuts it |
/// | [`Claim::Opens`] | opens anew | goes on; datagrams open anew where this node knows that its pod is gone | datagrams open anew | datagrams open anew | cuts it |
/// | [`Claim::Moves`] | opens anew | opens anew | opens anew | opens anew | cuts it |
/// | [`Claim::OpensAgain`] | opens anew | goes on | opens anew | opens anew | opens anew, and is judged as a first packet |
///
/// A connection rides on also where no service is left at its frontend, unless this node knows that the pod is gone: whoever takes a service
/// away takes no pod away.
///
/// A masqueraded connection's way out has changed where it would get another source address now. Where the node does not even have the one
/// that it got, that is as if its backend were gone.
///
/// A backend drains ([`Standing::Drains`]) while it terminates and serves, with others to come to. Its process may end at any moment, before
/// anybody tells that it serves no more. A flow of datagrams there is judged again at each packet ([`Rejudged::Drains`]).
///
/// A connection that stands is asked itself: a SYN in the middle of an established or closing one is its receiver's to answer (RFC 5961, 4),
/// one that repeats an unanswered one goes where that went, and one on a connection that is over opens anew ([`weir_conntrack::Tracked::NewFlow`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Claim {
    /// It only goes on with the connection.
    Rides,
    /// It would open a connection if it had none, but this one is known to both ends; or it is a datagram of who opened the flow.
    Opens,
    /// It is a datagram of who opened a flow that nothing holds to its backend: no stream, and no answer is awaited.
    Moves,
    /// It opens one, as this one is over or was never answered ([`ConnRef::is_opened_again_by`]).
    OpensAgain,
}

impl Claim {
    /// Of a packet in the middle of a flow.
    pub(crate) fn of_data(protocol: Protocol, direction: Direction) -> Self {
        match direction {
            Direction::Original if !is_connection(protocol) => Self::Opens,
            // What still comes from a backend that is gone must not reach the client in the backend's own name.
            _ => Self::Rides,
        }
    }

    /// Of a packet of a flow without connection. A stream (netfilter's ASSURED) may be a session that only its backend knows (QUIC), and so
    /// may what is about to become one: who has got an answer just now may wait for another.
    pub(crate) fn of_datagram<A: Routed>(conn: &ConnRef<'_, A>, direction: Direction, now: Tick) -> Self {
        match Self::of_data(conn.protocol(), direction) {
            Self::Opens if !conn.assured() && (!conn.seen_reply() || now.since(conn.last_seen()) >= QUIET_TICKS) => {
                Self::Moves
            }
            other => other,
        }
    }
}

/// Whether both ends of the protocol's flows know when one begins and ends.
pub(crate) fn is_connection(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::TCP | Protocol::SCTP)
}

/// Whether a connection is to be judged by these tables: an earlier generation judged it, or none. Not one that a later generation has judged
/// already, on another worker whose turn began after the next publication: these tables may not even know its backend yet.
#[inline]
pub(crate) fn is_stale<A: Routed>(conn: &ConnRef<'_, A>, snapshot: &Snapshot) -> bool {
    let (judged_by, current) = (conn.generation(), snapshot.generation);
    judged_by != current && (judged_by == NO_GENERATION || (judged_by.wrapping_sub(current) as i32) < 0)
}

/// What becomes of a connection that another generation judged.
pub(crate) enum Rejudged {
    /// It goes on.
    Keep,
    /// It goes on, and its next packet is to be judged again: its backend drains.
    Drains,
    /// It ends: a policy denies it now, or what it needs is gone, which nobody can be told.
    Cut(DropReason),
    /// It ends, as who opened it is not there any more, and is to be forgotten: another may have its address.
    Gone(DropReason),
    /// It ends, and both ends are told: its backend, or its address, is gone.
    Reset(DropReason),
    /// It ends, and the packet opens a new one.
    Anew,
}

/// Judges a connection again, and notes the outcome.
pub(crate) fn rejudge<A: Routed>(conn: &ConnRef<'_, A>, claim: Claim, snapshot: &Snapshot) -> Rejudged {
    let Judged { stamps, drains, begins_anew } = match judge_again(conn, claim, snapshot) {
        Ok(judged) => judged,
        Err(rejudged) => return rejudged,
    };
    if stamps != conn.stamps()[..2] {
        let [.., backend_stamp] = conn.stamps();
        conn.set_stamps([stamps[0], stamps[1], backend_stamp]);
    }
    let hops = [Direction::Original, Direction::Reply].map(|way| next_hops::find(conn, way, &snapshot.forwarding));
    conn.set_next_hops(next_hops::words(snapshot, &conn.key(Direction::Reply), hops));
    if drains {
        return Rejudged::Drains;
    }
    if !begins_anew {
        conn.set_generation(snapshot.generation);
    }
    Rejudged::Keep
}

/// What would become of a connection that nobody but its own next packet is about to begin anew. Notes nothing.
pub(crate) fn outlook<A: Routed>(conn: &ConnRef<'_, A>, snapshot: &Snapshot) -> Rejudged {
    match judge_again(conn, Claim::of_data(conn.protocol(), Direction::Original), snapshot) {
        Ok(Judged { drains: true, .. }) => Rejudged::Drains,
        Ok(Judged { drains: false, .. }) => Rejudged::Keep,
        Err(rejudged) => rejudged,
    }
}

/// Whether a connection stands by these tables, for what rides on it: an ICMP error, a later fragment; then whether its backend drains. Why
/// not, where it does not; `anew` where its next packet would open another. It is left as it is to its own packets.
pub(crate) fn still_stands<A: Routed>(
    conn: &ConnRef<'_, A>,
    direction: Direction,
    anew: DropReason,
    snapshot: &Snapshot,
) -> Result<bool, DropReason> {
    if !is_stale(conn, snapshot) {
        return Ok(false);
    }
    match rejudge(conn, Claim::of_data(conn.protocol(), direction), snapshot) {
        Rejudged::Keep => Ok(false),
        Rejudged::Drains => Ok(true),
        Rejudged::Cut(reason) | Rejudged::Gone(reason) | Rejudged::Reset(reason) => Err(reason),
        Rejudged::Anew => Err(anew),
    }
}

/// What a connection is to remember of its judgement.
struct Judged {
    stamps: [u32; 2],
    drains: bool,
    /// A flow of datagrams goes on only until who opened it sends one, whoever's comes before.
    begins_anew: bool,
}

/// Judges a connection again, by its original key, its device and its stored DNAT; how it ends, if it does.
fn judge_again<A: Routed>(conn: &ConnRef<'_, A>, claim: Claim, snapshot: &Snapshot) -> Result<Judged, Rejudged> {
    let forwarding = &*snapshot.forwarding;
    let original = conn.key(Direction::Original);
    let reply = conn.key(Direction::Reply);
    let translated = next_hops::translated(conn);

    let services = snapshot.rules.services.services::<A>();
    // A backend may be the very frontend: then only the stamp tells that a service led there.
    let [.., backend_stamp] = conn.stamps();
    let was_translated = backend_stamp != 0 || (translated.dst, translated.ports) != (original.dst, original.ports);
    let standing = match was_translated {
        true => services.standing(&original, translated.dst, translated.ports.destination()),
        false => Standing::Stays,
    };
    // A service that is gone takes its slices along, and not its pods: what both ends know goes on, as with kube-proxy. Of pods of other nodes
    // nobody here knows more than that.
    let rides_on = claim == Claim::Rides
        && is_connection(original.protocol)
        && !services.is_served(&original)
        && forwarding.route(translated.dst) != Route::NoSuchPod;
    if standing == Standing::Gone && !rides_on {
        return Err(match claim {
            Claim::Opens | Claim::Moves | Claim::OpensAgain => Rejudged::Anew,
            Claim::Rides if original.protocol == Protocol::TCP => Rejudged::Reset(DropReason::BackendGone),
            Claim::Rides => Rejudged::Cut(DropReason::BackendGone),
        });
    }
    // A connection ends with its pod, and both ends know it.
    let drains = standing == Standing::Drains && !is_connection(original.protocol);
    if drains {
        match claim {
            Claim::Moves => return Err(Rejudged::Anew),
            Claim::Opens if forwarding.route(translated.dst) == Route::NoSuchPod => return Err(Rejudged::Anew),
            Claim::Opens | Claim::Rides | Claim::OpensAgain => {}
        }
    }
    // A service appeared at this address. Connections that are known to both ends go on without it.
    let is_taken_over = match claim {
        Claim::Rides => false,
        Claim::Opens => !is_connection(original.protocol),
        Claim::Moves | Claim::OpensAgain => true,
    };
    let mut begins_anew = !was_translated && services.claims(&original);
    if begins_anew && is_taken_over {
        return Err(Rejudged::Anew);
    }

    let origin = origin::of_opener(IfIndex(conn.device()), original.src, forwarding).map_err(|reason| match claim {
        // Who opened it has gone with its device, or has not that address any more, as where the kernel forwarded for a pod that nobody had
        // named yet; who has its address now opens anew.
        Claim::Opens | Claim::Moves | Claim::OpensAgain => Rejudged::Anew,
        Claim::Rides => Rejudged::Gone(reason),
    })?;
    let through_tunnel = forwarding.is_tunnelled(original.src);
    let arrival = Arrival::by(origin, IfIndex(conn.device()), through_tunnel, forwarding);
    let stamps = decide::policy_stamps(snapshot, arrival, &translated);
    // Of what an earlier process judged there are no stamps, which is how those of a pod look that has no object yet.
    if (stamps != conn.stamps()[..2] || conn.generation() == NO_GENERATION)
        && let Err(reason) = decide::judge_again(snapshot, arrival, &original, &translated)
    {
        // Another backend may be allowed, or nothing is: what opens is judged as what it is, and counted and logged as such.
        return Err(if claim == Claim::OpensAgain { Rejudged::Anew } else { Rejudged::Cut(reason) });
    }
    if reply.dst != original.src
        && let Some(adjacency) = forwarding.adjacency_of(&translated)
        && let source = decide::masquerade_source(forwarding, origin, adjacency)
        && source != Some(reply.dst)
    {
        // The way out is another one, whose link may not bring answers to the address that it had; or the node has not that address any more.
        let is_gone = !forwarding.is_local(reply.dst) && forwarding.loopback_source() != Some(reply.dst);
        match claim {
            Claim::Moves | Claim::OpensAgain => return Err(Rejudged::Anew),
            Claim::Opens if is_gone || !is_connection(original.protocol) => return Err(Rejudged::Anew),
            // Whoever has it now would get the answers.
            Claim::Rides if is_gone => {
                return Err(match original.protocol {
                    Protocol::TCP => Rejudged::Reset(DropReason::AddressGone),
                    _ => Rejudged::Cut(DropReason::AddressGone),
                });
            }
            // Both ends know that address; answers may come by the old way yet.
            Claim::Opens | Claim::Rides => begins_anew = true,
        }
    }
    begins_anew &= !is_connection(original.protocol);
    Ok(Judged { stamps, drains, begins_anew })
}
