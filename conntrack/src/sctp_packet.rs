//! What an SCTP packet says, as far as associations move by it.

/// A chunk that moves an association (RFC 9260, 3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    Init,
    InitAck,
    /// With the T bit: the sender knows no association, and returns the tag that it got.
    Abort {
        returns_tag: bool,
    },
    Shutdown,
    ShutdownAck,
    Error,
    CookieEcho,
    CookieAck,
    ShutdownComplete {
        returns_tag: bool,
    },
    Heartbeat,
    HeartbeatAck,
}

impl Event {
    const fn of(chunk_type: u8, flags: u8) -> Option<Self> {
        let returns_tag = flags & 1 != 0;
        Some(match chunk_type {
            1 => Self::Init,
            2 => Self::InitAck,
            4 => Self::Heartbeat,
            5 => Self::HeartbeatAck,
            6 => Self::Abort { returns_tag },
            7 => Self::Shutdown,
            8 => Self::ShutdownAck,
            9 => Self::Error,
            10 => Self::CookieEcho,
            11 => Self::CookieAck,
            14 => Self::ShutdownComplete { returns_tag },
            _ => return None,
        })
    }

    /// Whether its packet holds no other chunk (RFC 9260, 6.10).
    const fn is_alone(self) -> bool {
        matches!(self, Self::Init | Self::InitAck | Self::ShutdownComplete { .. })
    }

    /// Whether it is its packet's first (RFC 9260, 5.1 D and E).
    const fn is_first(self) -> bool {
        self.is_alone() || matches!(self, Self::CookieEcho | Self::CookieAck)
    }
}

/// Chunks of a packet that are looked at; a frame holds about as many that carry one byte of data each.
pub const MAX_CHUNKS: usize = 256;
/// Of those, how many may be such that matter.
pub const MAX_EVENTS: usize = 8;

/// What a packet's chunks say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SctpPacket {
    /// The verification tag.
    pub(crate) tag: u32,
    /// The tag that its sender chooses, in an INIT or INIT ACK.
    pub(crate) initiate_tag: u32,
    events: [Option<Event>; MAX_EVENTS],
    /// Whether it holds chunks that move nothing, and whether DATA is among them.
    pub(crate) has_others: bool,
    pub(crate) has_data: bool,
    /// Whether there are chunks, and their order is one that RFC 9260 lets.
    pub(crate) is_valid: bool,
}

impl SctpPacket {
    /// No packet.
    pub(crate) const NOTHING: Self = Self {
        tag: 0,
        initiate_tag: 0,
        events: [None; MAX_EVENTS],
        has_others: false,
        has_data: false,
        is_valid: false,
    };

    /// Reads an SCTP packet from its common header on. A last chunk may be cut off, as in a first fragment.
    pub fn read(packet: &[u8]) -> Self {
        let mut read = Self::default();
        let Some((header, mut rest)) = packet.split_first_chunk::<12>() else { return read };
        read.tag = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let (mut events, mut was_alone) = (0, false);
        for count in 0..=MAX_CHUNKS {
            let Some(&[chunk_type, flags, high, low]) = rest.first_chunk() else {
                read.is_valid = count != 0;
                return read;
            };
            let length = usize::from(u16::from_be_bytes([high, low]));
            if length < 4 || was_alone {
                return read;
            }
            match Event::of(chunk_type, flags) {
                None => {
                    read.has_others = true;
                    read.has_data |= chunk_type == 0;
                }
                Some(event) => {
                    if event.is_first() && count != 0 || events == MAX_EVENTS {
                        return read;
                    }
                    if matches!(event, Event::Init | Event::InitAck) {
                        let Some(tag) = rest.get(4..20) else { return read };
                        read.initiate_tag = u32::from_be_bytes([tag[0], tag[1], tag[2], tag[3]]);
                    }
                    was_alone = event.is_alone();
                    read.events[events] = Some(event);
                    events += 1;
                }
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        }
        read
    }

    /// Whether it holds nothing by which an association's state moves: DATA and the like alone.
    #[inline]
    pub fn moves_nothing(&self) -> bool {
        self.events[0].is_none()
    }

    /// Whether it asks for an association: an INIT, with the tag that it must have (RFC 9260, 8.5.1 A).
    pub fn is_init(&self) -> bool {
        self.is_valid && self.tag == 0 && self.events[0] == Some(Event::Init)
    }

    pub(crate) fn events(&self) -> impl Iterator<Item = Event> {
        self.events.into_iter().flatten()
    }

    pub(crate) fn has(&self, wanted: impl Fn(Event) -> bool) -> bool {
        self.events().any(wanted)
    }
}
