//! rtnetlink without a runtime: one request, its answer.
//!
//! A socket belongs to the network namespace of the thread that opens it, for good. So what is to be done in a pod's namespace needs a
//! thread there only for as long as it takes to open one ([`in_namespace`]).

use std::{io, os::fd::AsFd, thread};

use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// Set on the messages of a dump during which the list changed (include/uapi/linux/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often such a dump is read again.
const DUMP_ATTEMPTS: u32 = 20;
/// The same of a list that a pod can make long, and change all the time.
const DUMP_ATTEMPTS_OF_PODS: u32 = 5;

/// A socket.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens one in the namespace of this thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes a change; the kernel has made it when this returns.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
    }

    /// Asks for one thing.
    pub fn get(&mut self, message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
        Ok(self.exchange(message, NLM_F_REQUEST | NLM_F_ACK)?.0.pop())
    }

    /// Whether a list has something. It may be as long as a pod likes: nothing of it is kept.
    pub fn any(
        &mut self,
        message: &RouteNetlinkMessage,
        is_it: impl Fn(&RouteNetlinkMessage) -> bool,
    ) -> io::Result<bool> {
        for _ in 0..DUMP_ATTEMPTS_OF_PODS {
            let mut found = false;
            let whole =
                self.receive(message.clone(), NLM_F_REQUEST | NLM_F_DUMP, |message| found |= is_it(&message))?;
            if found || whole {
                return Ok(found);
            }
        }
        Err(io::Error::other(format!("the list changed during each of {DUMP_ATTEMPTS_OF_PODS} readings")))
    }

    /// Reads a whole list.
    pub fn list(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            let (list, whole) = self.exchange(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if whole {
                return Ok(list);
            }
        }
        Err(io::Error::other(format!("the list changed during each of {DUMP_ATTEMPTS} readings")))
    }

    /// Sends a request and keeps what is answered; with whether the list did not change meanwhile.
    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let mut found = Vec::new();
        let whole = self.receive(message, flags, |message| found.push(message))?;
        Ok((found, whole))
    }

    /// Sends a request and reads until it is acknowledged or the list is at its end. Whether that did not change meanwhile.
    fn receive(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut whole = true;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                // Aligned to four bytes (netlink(7), NLMSG_NEXT).
                let length = (answer.header.length as usize).next_multiple_of(4).max(4).min(rest.len());
                rest = &rest[length..];
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => take(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) => return Ok(whole),
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
                    }
                    NetlinkPayload::Done(_) => return Ok(whole),
                    _ => {}
                }
            }
        }
    }
}

/// Does something on a thread in a network namespace, which ends with it.
pub fn in_namespace<T: Send>(
    namespace: impl AsFd + Send,
    action: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("weir-pod-netns".into()).spawn_scoped(scope, || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            action()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread in the pod's namespace ended early")))
    })
}
