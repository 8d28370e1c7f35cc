//! Requests to the kernel over rtnetlink, with proof that each was answered whole.
//!
//! Two habits of the library are turned off here. It hides acknowledgements and the end of a dump, so that a connection
//! that broke looks like an answer that is complete; both are forwarded and demanded. And it hides NLM_F_DUMP_INTR
//! (Documentation/userspace-api/netlink/intro.rst, "Dump consistency"): an interrupted dump may lack entries and is
//! read again.

use futures::StreamExt;
use rtnetlink::{
    Handle,
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkMessage},
    },
    sys::AsyncSocket,
};
use tokio::task::JoinSet;

use super::KernelError;

/// The kernel sets it on the messages of a dump during which the list changed (include/uapi/linux/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often an interrupted dump is read before that is an error.
const DUMP_ATTEMPTS: u32 = 20;

/// A connection for requests; clones share it. The kernel allows one dump at a time on it.
#[derive(Clone)]
pub(super) struct Requests {
    handle: Handle,
}

impl Requests {
    /// Opens a socket; its task lives in `tasks`.
    pub(super) fn open(tasks: &mut JoinSet<()>) -> Result<Self, KernelError> {
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(KernelError::Open)?;
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        // Strict checking makes the kernel honour the table in a route dump, instead of listing every table.
        connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true).map_err(KernelError::Open)?;
        tasks.spawn(connection);
        Ok(Self { handle })
    }

    /// Sends one change and waits for its acknowledgement. `action` says what it is, to stand after "refused to".
    pub(super) async fn change(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        action: impl FnOnce() -> String,
    ) -> Result<(), KernelError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(request).map_err(|_| KernelError::Closed)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return match error.code {
                    None => Ok(()),
                    Some(_) => Err(KernelError::Refused { action: action(), source: error.to_io() }),
                };
            }
        }
        Err(KernelError::Closed)
    }

    /// The device of that name, if there is one.
    pub(super) async fn link(&self, name: &str) -> Result<Option<LinkMessage>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut answers = self.handle.clone().request(request).map_err(|_| KernelError::Closed)?;
        let mut link = None;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => link = Some(message),
                NetlinkPayload::Error(error) => match error.code {
                    None => return Ok(link),
                    Some(_) if error.raw_code() == -libc::ENODEV => return Ok(None),
                    Some(_) => {
                        let action = format!("describe the device {name}");
                        return Err(KernelError::Refused { action, source: error.to_io() });
                    }
                },
                _ => {}
            }
        }
        Err(KernelError::Closed)
    }

    /// Reads a whole list. An errno in `empty` stands for an empty one.
    pub(super) async fn dump(
        &self,
        message: RouteNetlinkMessage,
        what: &'static str,
        empty: &[i32],
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut request = NetlinkMessage::from(message.clone());
            request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let mut answers = self.handle.clone().request(request).map_err(|_| KernelError::Closed)?;
            let mut list = Vec::new();
            let mut whole = true;
            loop {
                let answer = answers.next().await.ok_or(KernelError::Closed)?;
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                let errno = match answer.payload {
                    NetlinkPayload::InnerMessage(entry) => {
                        list.push(entry);
                        continue;
                    }
                    NetlinkPayload::Done(done) => done.code,
                    NetlinkPayload::Error(error) => error.raw_code(),
                    _ => continue,
                };
                match errno.checked_neg() {
                    Some(0) => break,
                    Some(errno) if empty.contains(&errno) => return Ok(Vec::new()),
                    errno => {
                        return Err(KernelError::Refused {
                            action: format!("list its {what}"),
                            source: std::io::Error::from_raw_os_error(errno.unwrap_or(libc::EPROTO)),
                        });
                    }
                }
            }
            if whole {
                return Ok(list);
            }
        }
        Err(KernelError::Unstable { what, attempts: DUMP_ATTEMPTS })
    }
}
