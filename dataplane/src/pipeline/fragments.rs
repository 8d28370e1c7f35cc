//! Fragments: the first of a packet takes the way of a whole one, the others follow it or wait for it ([`crate::fragments`]).
//!
//! The one stage that owns its packets: it keeps some, and each that comes may let others go.

use weir_conntrack::{ConnRef, Tracked};
use weir_packet::{
    Direction, DropReason,
    parse::{Kind, View},
};

use super::{Course, Handler, Known, track::follow};
use crate::{
    decide,
    driver::Driver,
    forwarding::Forwarding,
    fragments::{self, Fate, Fragments, Lead, Slot},
    frame::Packet,
    origin::Origin,
    rejudge,
    tables::Family,
};

impl<'a, D: Driver> Handler<'a, D> {
    #[inline]
    fn fragments<A: Family>(&mut self) -> &mut Fragments<A> {
        &mut A::own(&mut self.pipeline.own).fragments
    }

    /// A fragment.
    #[cold]
    pub(super) fn fragment<A: Family>(&mut self, mut packet: Packet, known: Known<'_, A>) {
        let Known { view, origin } = known;
        if let Err(reason) = decide::check_source(self.context.snapshot, origin, &view.key) {
            return self.end(packet, Err(reason));
        }
        let Some((key, extent)) = fragments::place(view, origin, packet.device) else {
            return self.end(packet, Err(DropReason::LinkScope));
        };
        // Before a first that comes too late: what waits must not depend on how often upkeep is done.
        self.look_after_fragments::<A>();
        let now = self.context.now;
        let Some(slot) = self.fragments::<A>().datagram(&key, now) else {
            // The node's own are its kernel's to join, unless a connection claims them, which the first one tells.
            let is_for_node = origin == Origin::Uplink && self.context.snapshot.forwarding.is_for_node(view.key.dst);
            let ended = match is_for_node {
                true if view.is_later_fragment() => self.hand_over(&mut packet, view),
                true => self.track_and_forward(&mut packet, known),
                false => Err(DropReason::FragmentLimit),
            };
            return self.end(packet, ended);
        };
        if let Err(reason) = self.fragments::<A>().note(slot, extent) {
            self.end(packet, Err(reason));
            return self.settle::<A>(slot);
        }
        match self.fragments::<A>().fate(slot) {
            Fate::Unknown if view.is_later_fragment() => return self.wait(packet, view, slot),
            Fate::Unknown => {}
            // A packet may be given up before its first fragment comes.
            fate => return self.go_after(packet, view, slot, fate),
        }
        let segment = self.observed(&packet, view);
        let hash = A::table(self.context.tables).hash(&view.key);
        let course = self.track(&packet, known, hash);
        let fate = match &course {
            Ok(Course::Connection(conn, direction)) => {
                let to = conn.key(direction.flip()).invert();
                Fate::Follow(Lead::new(view.key, to, &segment, extent.end))
            }
            Ok(Course::Untracked(_)) => Fate::Untracked,
            Ok(Course::Pass(_)) => Fate::Pass,
            Ok(Course::Punt) => Fate::Punt,
            Err(reason) => Fate::Drop(*reason),
        };
        let ended = course.and_then(|course| self.forward(&mut packet, view, &course));
        self.fragments::<A>().decide(slot, ended.map_or_else(Fate::Drop, |_| fate));
        self.end(packet, ended);
        self.settle::<A>(slot);
    }

    /// Keeps a later fragment until its first has come.
    fn wait<A: Family>(&mut self, mut packet: Packet, view: &View<A>, slot: Slot) {
        let (now, forwarding) = (self.context.now, &*self.context.snapshot.forwarding);
        packet = match self.fragments::<A>().hold(slot, packet, *view, now) {
            Ok(()) => return,
            Err(packet) => packet,
        };
        // For the node itself: its kernel has more room. Any other packet will not be whole without this fragment.
        if self.is_for_node::<A>(slot, forwarding) {
            let ended = self.hand_over(&mut packet, view);
            return self.end(packet, ended);
        }
        self.fragments::<A>().decide(slot, Fate::Drop(DropReason::FragmentOrphan));
        self.end(packet, Err(DropReason::FragmentOrphan));
        self.settle::<A>(slot);
    }

    /// Lets the fragments go that have waited for their packet's fate, which is known now; forgets the packet if it is complete.
    fn settle<A: Family>(&mut self, slot: Slot) {
        loop {
            let fragments = self.fragments::<A>();
            let fate = fragments.fate(slot);
            if fate == Fate::Unknown {
                return;
            }
            let Some(waiting) = fragments.take_next(slot) else { return fragments.finish(slot) };
            self.go_after(waiting.packet, &waiting.view, slot, fate);
        }
    }

    /// Sends a later fragment after its first.
    fn go_after<A: Family>(&mut self, mut packet: Packet, view: &View<A>, slot: Slot, fate: Fate<A>) {
        let forwarding = &*self.context.snapshot.forwarding;
        let towards = || forwarding.adjacency_to(view.key.dst).ok_or(DropReason::NoRoute);
        let mut view = *view;
        let course = match fate {
            Fate::Follow(lead) => {
                let found = self.connection_of(&lead, &view);
                if let Err(reason) = found {
                    self.fragments::<A>().decide(slot, Fate::Drop(reason));
                }
                view.key = lead.key;
                found.map(|(conn, direction)| Course::Connection(conn, direction))
            }
            Fate::Pass => match towards() {
                Ok(hop) if forwarding.adjacency(hop).kind.leaves_node() => Ok(Course::Pass(hop)),
                _ => Err(DropReason::NoRoute),
            },
            Fate::Untracked => towards().map(Course::Untracked),
            Fate::Punt => Ok(Course::Punt),
            Fate::Drop(reason) => Err(reason),
            Fate::Unknown => Err(DropReason::FragmentOrphan),
        };
        let ended = course.and_then(|course| self.forward(&mut packet, &view, &course));
        self.end(packet, ended);
        self.fragments::<A>().finish(slot);
    }

    /// The connection by which a first fragment went, for one of those that follow; why not, where it would not go there any more.
    fn connection_of<A: Family>(
        &self,
        lead: &Lead<A>,
        view: &View<A>,
    ) -> Result<(ConnRef<'a, A>, Direction), DropReason> {
        let context = self.context;
        let table = A::table(context.tables);
        let hit = table.lookup(&lead.key, table.hash(&lead.key), context.now, context.turn);
        let hit = hit.ok_or(DropReason::Invalid)?;
        let (conn, direction) = (table.conn(hit.conn), hit.direction);
        if conn.key(direction.flip()).invert() != lead.to {
            return Err(DropReason::Invalid);
        }
        rejudge::still_stands(&conn, direction, DropReason::Invalid, context.snapshot)?;
        if let Kind::LaterFragment { offset, bytes, more: false, .. } = view.kind
            && let Some(segment) = lead.whole_segment(offset + bytes)
            && follow(&conn, direction, &segment, context) != Tracked::Accept
        {
            return Err(DropReason::Invalid);
        }
        Ok((conn, direction))
    }

    /// Whether the packet came by an uplink and is for this node's own address.
    fn is_for_node<A: Family>(&mut self, slot: Slot, forwarding: &Forwarding) -> bool {
        self.fragments::<A>().uplink_destination(slot).is_some_and(|destination| forwarding.is_for_node(destination))
    }

    /// Ends the wait of fragments whose first does not come: those for the node itself are its kernel's, which may have it.
    pub(super) fn look_after_fragments<A: Family>(&mut self) {
        let (now, forwarding) = (self.context.now, &*self.context.snapshot.forwarding);
        while let Some(slot) = self.fragments::<A>().overdue(now) {
            let is_for_node = self.is_for_node::<A>(slot, forwarding);
            let fate = if is_for_node { Fate::Punt } else { Fate::Drop(DropReason::FragmentOrphan) };
            self.fragments::<A>().decide(slot, fate);
            self.settle::<A>(slot);
            if is_for_node {
                // Its first, if it comes after all, is judged as any other.
                self.fragments::<A>().forget(slot);
            }
        }
    }
}
