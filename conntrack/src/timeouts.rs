//! How long an idle connection lives.
//!
//! Names and defaults are those of netfilter's sysctls (kernel, Documentation/networking/nf_conntrack-sysctl.rst),
//! without the prefix `nf_conntrack_`. The connection's state word holds a [`TimeoutClass`], so that a lookup needs
//! one load from a small table to tell whether an entry has expired.

use weir_packet::Tick;

/// A timeout name that is not netfilter's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no conntrack timeout {0:?}; the names are netfilter's, such as nf_conntrack_tcp_timeout_established")]
pub struct UnknownTimeout(pub String);

macro_rules! timeouts {
    ($($(#[doc = $doc:literal])+ $field:ident, $class:ident, $sysctl:literal, $seconds:literal;)+) => {
        /// Timeouts in seconds.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct Timeouts { $($(#[doc = $doc])+ pub $field: u32,)+ }

        impl Default for Timeouts {
            /// The kernel's defaults.
            fn default() -> Self {
                Self { $($field: $seconds,)+ }
            }
        }

        impl Timeouts {
            /// The sysctl names, in the order of the fields.
            pub const NAMES: &'static [&'static str] = &[$($sysctl,)+];

            /// Sets the timeout of that sysctl name.
            pub fn set(&mut self, name: &str, seconds: u32) -> Result<(), UnknownTimeout> {
                match name {
                    $($sysctl => self.$field = seconds,)+
                    _ => return Err(UnknownTimeout(name.to_owned())),
                }
                Ok(())
            }

            /// The timeout of that sysctl name.
            pub fn get(&self, name: &str) -> Result<u32, UnknownTimeout> {
                match name {
                    $($sysctl => Ok(self.$field),)+
                    _ => Err(UnknownTimeout(name.to_owned())),
                }
            }

            /// The timeouts by class.
            pub(crate) fn by_class(&self) -> ByClass {
                let mut ticks = [0; CLASSES];
                $(ticks[TimeoutClass::$class as usize] = ticks_of(self.$field);)+
                ByClass(ticks)
            }
        }

        /// Which timeout applies to a connection.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub(crate) enum TimeoutClass {
            /// Expired at once: what is over before its timeout.
            Ended = 0,
            $($class,)+
        }
    };
}

timeouts! {
    /// A SYN was seen, and none from the other side.
    tcp_syn_sent, TcpSynSent, "nf_conntrack_tcp_timeout_syn_sent", 120;
    /// A SYN-ACK was seen.
    tcp_syn_recv, TcpSynRecv, "nf_conntrack_tcp_timeout_syn_recv", 60;
    /// An established connection: five days.
    tcp_established, TcpEstablished, "nf_conntrack_tcp_timeout_established", 432_000;
    /// One side has sent its FIN.
    tcp_fin_wait, TcpFinWait, "nf_conntrack_tcp_timeout_fin_wait", 120;
    /// That FIN is acknowledged.
    tcp_close_wait, TcpCloseWait, "nf_conntrack_tcp_timeout_close_wait", 60;
    /// The other side has sent its FIN too.
    tcp_last_ack, TcpLastAck, "nf_conntrack_tcp_timeout_last_ack", 30;
    /// Both FINs are acknowledged.
    tcp_time_wait, TcpTimeWait, "nf_conntrack_tcp_timeout_time_wait", 120;
    /// A RST was seen.
    tcp_close, TcpClose, "nf_conntrack_tcp_timeout_close", 10;
    /// Upper limit after repeated retransmissions, or with a closed window.
    tcp_max_retrans, TcpMaxRetrans, "nf_conntrack_tcp_timeout_max_retrans", 300;
    /// Upper limit while sent data is not acknowledged.
    tcp_unacknowledged, TcpUnacknowledged, "nf_conntrack_tcp_timeout_unacknowledged", 300;
    /// UDP in one direction, or in both for less than two seconds.
    udp, Udp, "nf_conntrack_udp_timeout", 30;
    /// UDP that went on in both directions for two seconds.
    udp_stream, UdpStream, "nf_conntrack_udp_timeout_stream", 120;
    /// ICMP echo.
    icmp, Icmp, "nf_conntrack_icmp_timeout", 30;
    /// ICMPv6 echo.
    icmpv6, Icmpv6, "nf_conntrack_icmpv6_timeout", 30;
    /// Other protocols.
    generic, Generic, "nf_conntrack_generic_timeout", 600;
    /// SCTP of which only an INIT was seen, or that was aborted or is over.
    sctp_closed, SctpClosed, "nf_conntrack_sctp_timeout_closed", 10;
    /// SCTP whose INIT was answered.
    sctp_cookie_wait, SctpCookieWait, "nf_conntrack_sctp_timeout_cookie_wait", 3;
    /// SCTP after its cookie was echoed.
    sctp_cookie_echoed, SctpCookieEchoed, "nf_conntrack_sctp_timeout_cookie_echoed", 3;
    /// An SCTP association.
    sctp_established, SctpEstablished, "nf_conntrack_sctp_timeout_established", 210;
    /// SCTP whose shutdown was sent by the original side.
    sctp_shutdown_sent, SctpShutdownSent, "nf_conntrack_sctp_timeout_shutdown_sent", 3;
    /// SCTP whose shutdown was sent by the replying side.
    sctp_shutdown_recd, SctpShutdownRecd, "nf_conntrack_sctp_timeout_shutdown_recd", 3;
    /// SCTP whose shutdown is acknowledged.
    sctp_shutdown_ack_sent, SctpShutdownAckSent, "nf_conntrack_sctp_timeout_shutdown_ack_sent", 3;
    /// SCTP of which only a heartbeat was seen.
    sctp_heartbeat_sent, SctpHeartbeatSent, "nf_conntrack_sctp_timeout_heartbeat_sent", 30;
}

const CLASSES: usize = 32;
const _: () = assert!(Timeouts::NAMES.len() < CLASSES);

/// Seconds in ticks, at most a quarter of the clock's range, so that ages can be told from the future.
fn ticks_of(seconds: u32) -> u32 {
    let ticks = u64::from(seconds) * (1_000_000_000 / Tick::NS);
    ticks.min(u64::from(u32::MAX / 4)) as u32
}

/// Timeouts in ticks by [`TimeoutClass`].
#[derive(Clone, Debug)]
pub(crate) struct ByClass([u32; CLASSES]);

impl ByClass {
    /// Ticks of the class with that number.
    #[inline(always)]
    pub(crate) fn ticks(&self, class: u8) -> u32 {
        self.0[usize::from(class) % CLASSES]
    }

    /// Ticks of that class.
    pub(crate) fn of(&self, class: TimeoutClass) -> u32 {
        self.ticks(class as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_sets_its_own_timeout() {
        for (number, name) in Timeouts::NAMES.iter().enumerate() {
            let mut timeouts = Timeouts::default();
            timeouts.set(name, 7_000_000 + number as u32).expect("a known name");
            assert_eq!(timeouts.get(name), Ok(7_000_000 + number as u32));
            let others =
                |t: &Timeouts| Timeouts::NAMES.iter().filter(|n| *n != name).map(|n| t.get(n)).collect::<Vec<_>>();
            assert_eq!(others(&timeouts), others(&Timeouts::default()));
            let ticks = timeouts.by_class().ticks(number as u8 + 1);
            assert_eq!(ticks, 700_000_000 + 100 * number as u32);
        }
        assert_eq!(Timeouts::default().set("nf_conntrack_max", 1), Err(UnknownTimeout("nf_conntrack_max".into())));
    }

    #[test]
    fn very_long_timeouts_stay_in_the_clock() {
        let timeouts = Timeouts { tcp_established: u32::MAX, ..Timeouts::default() };
        assert_eq!(timeouts.by_class().ticks(TimeoutClass::TcpEstablished as u8), u32::MAX / 4);
        assert_eq!(timeouts.by_class().ticks(TimeoutClass::Ended as u8), 0);
    }
}
