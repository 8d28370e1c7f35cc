//! The TCP options that connection tracking follows: window scale, SACK permitted, SACK.

use crate::parse::TcpFields;

const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const WINDOW_SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const SACK: u8 = 5;

/// Two no-operations and a timestamp of ten bytes: what nearly all segments carry that carry any (RFC 7323, appendix A).
const TIMESTAMP_ONLY: [u8; 4] = [NO_OPERATION, NO_OPERATION, 8, 10];

/// The largest shift that a window scale may ask for (RFC 7323, 2.3).
const MAX_WINDOW_SCALE: u8 = 14;

/// What a segment's options say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpOptions {
    /// Of a SYN: how far its sender shifts the windows of its later segments, at most 14 (RFC 7323, 2).
    pub window_scale: Option<u8>,
    /// Of a SYN: its sender understands SACK (RFC 2018, 2).
    pub sack_permitted: bool,
    /// Of others: the highest right edge of the blocks that its sender has received beyond the acknowledgment number
    /// (RFC 2018, 3); `None` where there is none beyond it.
    pub sack: Option<u32>,
}

impl TcpOptions {
    /// Reads the options of a segment with those fields. A malformed option ends the list: what comes before it counts.
    #[inline]
    pub fn read(options: &[u8], segment: &TcpFields) -> Self {
        let is_syn = segment.flags & TcpFields::SYN != 0;
        match options.first_chunk::<4>() {
            None => Self::default(),
            Some(&TIMESTAMP_ONLY) if options.len() == 12 && !is_syn => Self::default(),
            Some(_) if is_syn => Self::of_syn(options),
            Some(_) => Self { sack: highest_sack(options, segment.ack), ..Self::default() },
        }
    }

    #[inline(never)]
    fn of_syn(options: &[u8]) -> Self {
        let mut found = Self::default();
        for (kind, value) in (Options { rest: options }) {
            match (kind, value) {
                (WINDOW_SCALE, [scale]) => found.window_scale = Some((*scale).min(MAX_WINDOW_SCALE)),
                (SACK_PERMITTED, []) => found.sack_permitted = true,
                _ => {}
            }
        }
        found
    }
}

#[inline(never)]
fn highest_sack(options: &[u8], ack: u32) -> Option<u32> {
    let is_sack = |(kind, value): &(u8, &[u8])| *kind == SACK && !value.is_empty() && value.len().is_multiple_of(8);
    let (_, blocks) = (Options { rest: options }).find(is_sack)?;
    let beyond = |block: &[u8; 8]| {
        let right_edge = u32::from_be_bytes([block[4], block[5], block[6], block[7]]);
        let distance = right_edge.wrapping_sub(ack);
        (distance as i32 > 0).then_some(distance)
    };
    let farthest = blocks.as_chunks::<8>().0.iter().filter_map(beyond).max()?;
    Some(ack.wrapping_add(farthest))
}

/// The options other than padding: kind and value.
struct Options<'o> {
    rest: &'o [u8],
}

impl<'o> Iterator for Options<'o> {
    type Item = (u8, &'o [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match *self.rest {
                [] | [END, ..] | [_] => return None,
                [NO_OPERATION, ref rest @ ..] => self.rest = rest,
                [kind, length, ..] => {
                    let value = self.rest.get(2..usize::from(length))?;
                    self.rest = &self.rest[usize::from(length)..];
                    return Some((kind, value));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(flags: u8, ack: u32, options: &[u8]) -> TcpOptions {
        TcpOptions::read(options, &TcpFields { flags, ack, ..TcpFields::default() })
    }

    #[test]
    fn a_syn_says_what_its_sender_can() {
        let syn = |options: &[u8]| {
            let read = read(TcpFields::SYN, 0, options);
            assert_eq!(read.sack, None);
            (read.window_scale, read.sack_permitted)
        };
        let usual = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
        assert_eq!(syn(&usual), (Some(7), true));
        assert_eq!(syn(&[]), (None, false));
        assert_eq!(syn(&[3, 3, 200, 0]), (Some(14), false), "no more than RFC 7323 lets");
        assert_eq!(syn(&[1, 1, 4, 2]), (None, true));
        assert_eq!(syn(&[0, 3, 3, 7]), (None, false), "after the end of the list");
        assert_eq!(syn(&[3, 4, 7, 0, 4, 3, 0, 0]), (None, false), "of a wrong length");
        assert_eq!(syn(&[4, 2, 3, 9]), (None, true), "longer than the header");
        assert_eq!(syn(&[4, 2, 3, 1, 3, 3, 7, 0]), (None, true), "an option shorter than its own head");
        assert_eq!(syn(&[4, 2, 1, 3]), (None, true), "half an option");
        let timestamp_only = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(syn(&timestamp_only), (None, false));
    }

    #[test]
    fn a_sack_counts_where_it_is_beyond_the_acknowledgment() {
        let sack = |ack, blocks: &[[u32; 2]]| {
            let mut options = vec![1, 1, 5, 2 + 8 * blocks.len() as u8];
            options.extend(blocks.iter().flatten().flat_map(|edge| edge.to_be_bytes()));
            let read = read(TcpFields::ACK, ack, &options);
            assert_eq!((read.window_scale, read.sack_permitted), (None, false));
            read.sack
        };
        assert_eq!(sack(1000, &[[1100, 1200]]), Some(1200));
        assert_eq!(sack(1000, &[[1100, 1200], [1500, 1700], [1300, 1400]]), Some(1700));
        assert_eq!(sack(1000, &[[500, 600]]), None, "a D-SACK (RFC 2883)");
        assert_eq!(sack(1000, &[[900, 1000]]), None);
        assert_eq!(sack(u32::MAX - 10, &[[u32::MAX - 5, 20]]), Some(20), "around the end of sequence space");
        assert_eq!(sack(1000, &[]), None);
        assert_eq!(read(TcpFields::ACK, 0, &[5, 9, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1]).sack, None, "half a block");
        assert_eq!(read(TcpFields::ACK, 0, &[1, 1, 5, 10, 0, 0, 0, 1]).sack, None, "longer than the header");
        let timestamp = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
        assert_eq!(read(TcpFields::ACK, 0, &timestamp), TcpOptions::default());
        let both = [&timestamp[..], &[1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 9]].concat();
        assert_eq!(read(TcpFields::ACK, 0, &both).sack, Some(9));
    }
}
