//! What the plugin and the router say to each other over the router's Unix socket.
//!
//! One connection carries one [`Request`] and one [`Answer`]: JSON behind its length (four bytes, network order). The descriptor of
//! the pod's network namespace, where the request has one, comes with the first bytes (SCM_RIGHTS, unix(7)).

use std::{
    fmt,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

use crate::CniError;

/// Changes with every change of these types that the other side would misread.
pub const PROTOCOL: u32 = 1;
/// The number of an [`Answer::Failed`] of a router that speaks another protocol: one of weir's own, which no runtime gets to see.
pub const OTHER_PROTOCOL: u32 = 101;
/// Where the router listens if nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/weir/cni.sock";
/// Most bytes of a request or an answer; a GC with ten thousand sandboxes has one.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Most characters of a sandbox's id, so that it fits into a file name.
pub const MAX_SANDBOX_LENGTH: usize = 200;
/// The gateway of every pod for IPv4, as Calico has it: on its link, and nobody's address.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The gateway for IPv6: the link-local address that the host end has by its MAC address ee:ee:ee:ee:ee:ee (RFC 4291, appendix A).
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xecee, 0xeeff, 0xfeee, 0xeeee);

/// A sandbox's interface: what a runtime adds and deletes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Attachment {
    /// CNI_CONTAINERID.
    pub sandbox: String,
    /// CNI_IFNAME.
    pub interface: String,
}

/// An attachment as it comes in.
#[derive(Deserialize)]
struct Unchecked {
    sandbox: String,
    interface: String,
}

impl TryFrom<Unchecked> for Attachment {
    type Error = String;

    fn try_from(read: Unchecked) -> Result<Self, String> {
        Self::new(&read.sandbox, &read.interface)
    }
}

impl Attachment {
    /// An attachment of names that are safe in a file's name and in a kernel's.
    ///
    /// # Errors
    /// Says what is wrong with which environment variable.
    pub fn new(sandbox: &str, interface: &str) -> Result<Self, String> {
        // The specification's rule for CNI_CONTAINERID (section 2, "Parameters").
        let begins = sandbox.starts_with(|c: char| c.is_ascii_alphanumeric());
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !begins || !sandbox.chars().all(word) {
            return Err(
                "CNI_CONTAINERID must be letters, digits, `_`, `.` and `-`, and begin with a letter or digit".into()
            );
        }
        if sandbox.len() > MAX_SANDBOX_LENGTH {
            return Err(format!(
                "CNI_CONTAINERID has {} characters, weir takes {MAX_SANDBOX_LENGTH} at most",
                sandbox.len()
            ));
        }
        // dev_valid_name() of the kernel (net/core/dev.c), which has 16 bytes for a name and its end; control characters would spoil
        // what is printed.
        // A `%` would be a pattern for a name (dev_alloc_name()).
        let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
        if interface.is_empty() || matches!(interface, "." | "..") || !interface.chars().all(plain) {
            return Err(
                "CNI_IFNAME must be an interface name: visible ASCII characters without `/`, `:` and `%`".into()
            );
        }
        if matches!(interface, "all" | "default" | "lo") {
            return Err(format!("CNI_IFNAME: {interface} is a name that the kernel uses itself"));
        }
        if interface.len() > 15 {
            return Err(format!("CNI_IFNAME has {} characters, an interface name has 15 at most", interface.len()));
        }
        Ok(Self { sandbox: sandbox.into(), interface: interface.into() })
    }

    /// A file name for it; [`Attachment::from_file_name`] reads it. A sandbox's id has no `@`.
    pub fn file_name(&self) -> String {
        format!("{}@{}", self.sandbox, self.interface)
    }

    /// The attachment that has this file name.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let (sandbox, interface) = name.split_once('@')?;
        Self::new(sandbox, interface).ok()
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of sandbox {}", self.interface, self.sandbox)
    }
}

/// Whose sandbox it is (K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID in CNI_ARGS).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, where the runtime says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

impl PodName {
    /// Whether both names are such as Kubernetes gives: lower-case letters, digits, `-` and `.`, at most 253 (RFC 1123 subdomains).
    pub fn is_valid(&self) -> bool {
        let ok = |text: &str| {
            (1..=253).contains(&text.len())
                && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'.'))
                && !text.starts_with(['-', '.'])
        };
        ok(&self.namespace) && ok(&self.name) && self.uid.as_ref().is_none_or(|uid| uid.len() <= 253)
    }
}

/// What the plugin asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL`]
    pub protocol: u32,
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Command {
    /// Make the pod's network; the namespace's descriptor comes with it. Answered by [`Answer::Made`].
    #[serde(rename_all = "camelCase")]
    Add {
        /// The interface.
        attachment: Attachment,
        /// The pod.
        pod: PodName,
        /// The name of the network configuration.
        #[serde(default)]
        network: String,
    },
    /// Take it away. Answered by [`Answer::Done`] also where there is nothing to take.
    Del {
        /// The interface.
        attachment: Attachment,
        /// The pod, where the runtime says it: then it waits for an ADD of that pod that is under way.
        pod: Option<PodName>,
    },
    /// Compare what is there with what was made; the namespace's descriptor comes with it. Answered by [`Answer::Made`].
    Check {
        /// The interface.
        attachment: Attachment,
    },
    /// Whether pods can be made.
    Status,
    /// Take away all of a network that is not listed.
    #[serde(rename_all = "camelCase")]
    Gc {
        /// What the runtime has.
        valid: Vec<Attachment>,
        /// The name of the network configuration.
        #[serde(default)]
        network: String,
    },
    /// Do what is in the queue of DELs.
    Drain,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add { attachment, pod, .. } => {
                write!(f, "ADD of {attachment} for pod {}/{}", pod.namespace, pod.name)
            }
            Self::Del { attachment, .. } => write!(f, "DEL of {attachment}"),
            Self::Check { attachment } => write!(f, "CHECK of {attachment}"),
            Self::Status => f.write_str("STATUS"),
            Self::Gc { valid, .. } => write!(f, "GC with {} valid attachments", valid.len()),
            Self::Drain => f.write_str("the queue of DELs"),
        }
    }
}

/// A device that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its MAC address as text.
    pub mac: String,
}

/// A pod's network as it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The end in the node.
    pub host: Device,
    /// The end in the pod.
    pub pod: Device,
    /// The MTU of both, in bytes.
    pub mtu: u32,
    /// The pod's addresses, one per family.
    pub addresses: Vec<IpAddr>,
}

/// What the router answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// The network is there.
    Made(Made),
    /// It is done.
    Done,
    /// It cannot be done.
    Failed(CniError),
}

/// The length that stands before a message.
///
/// # Errors
/// Where it is too long.
pub fn length_prefix(message: &[u8]) -> io::Result<[u8; 4]> {
    match u32::try_from(message.len()) {
        Ok(length) if message.len() <= MAX_MESSAGE_BYTES => Ok(length.to_be_bytes()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes; {MAX_MESSAGE_BYTES} are allowed", message.len()),
        )),
    }
}

/// Writes a message.
///
/// # Errors
/// Where it is too long or cannot be written.
pub fn write_message(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let mut bytes = length_prefix(&body)?.to_vec();
    bytes.extend(body);
    to.write_all(&bytes)
}

/// Reads a message whose length stands before it.
///
/// # Errors
/// Where it is too long, is cut off or is no such message.
pub fn read_message<T: for<'de> Deserialize<'de>>(from: &mut impl Read, length: [u8; 4]) -> io::Result<T> {
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes is announced")));
    }
    let mut body = Vec::new();
    // Grows with what comes, not with what is announced.
    from.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&body)?)
}
