//! The frames that are sent: which they are, and whether one came as it left.

/// An EtherType for local experiments, which no kernel handles.
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// The header in front of each packet of virtio-net in bytes (virtio 1.2, section 5.1.6).
pub const HEADER: usize = 12;

/// Ethernet, IPv4 and TCP headers without options, in bytes.
const HEADERS: u16 = 54;

/// Bytes of data in a segment of a large frame, for an MTU of 1500.
const SEGMENT: u16 = 1448;

/// Frames above this are left to be segmented.
const LARGEST_PLAIN: usize = 1514;

/// A kind of frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Length in bytes, from the Ethernet header on and without a checksum.
    pub length: usize,
}

impl Frame {
    /// Whether it is one large TCP segment that the device or the kernel is to divide.
    #[must_use]
    pub fn is_large(self) -> bool {
        self.length > LARGEST_PLAIN
    }

    /// Where the number is in the frame. Behind a virtio-net header it is aligned.
    #[must_use]
    pub fn number_at(self) -> usize {
        if self.is_large() { 60 } else { 20 }
    }

    /// The header of virtio-net for it.
    #[must_use]
    pub fn header(self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        if self.is_large() {
            // NEEDS_CSUM, and GSO_TCPV4; the checksum is 16 bytes into the TCP header.
            header[..2].copy_from_slice(&[1, 1]);
            for (place, field) in header[2..].chunks_exact_mut(2).zip([HEADERS, SEGMENT, 34, 16]) {
                place.copy_from_slice(&field.to_le_bytes());
            }
        }
        header
    }

    /// The frame with this number.
    #[must_use]
    pub fn bytes(self, number: u64) -> Vec<u8> {
        let mut frame = [&[0xff; 6][..], &[0x52, 0x54, 0, 9, 9, 9]].concat();
        if self.is_large() {
            frame.extend([8, 0]);
            frame.extend(ipv4(self.length - 14));
            // Ports, sequence, acknowledgement, header length and flags, window, checksum, urgent pointer.
            frame.extend([0, 9, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        } else {
            frame.extend(ETHERTYPE);
        }
        frame.extend((frame.len()..self.length).map(|index| index as u8));
        self.set_number(&mut frame, number);
        frame
    }

    /// Gives a frame another number.
    pub fn set_number(self, frame: &mut [u8], number: u64) {
        frame[self.number_at()..][..8].copy_from_slice(&number.to_le_bytes());
    }

    /// The number of `frame`, if it is one of this kind whose bytes are all right.
    #[must_use]
    pub fn check(self, frame: &[u8]) -> Option<u64> {
        let number = u64::from_le_bytes(*frame.get(self.number_at()..)?.first_chunk()?);
        (frame == self.bytes(number)).then_some(number)
    }
}

/// An IPv4 header of a TCP packet of `length` bytes between two addresses for documentation.
fn ipv4(length: usize) -> [u8; 20] {
    let mut header = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2];
    header[2..4].copy_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    let sum: u32 = header.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    header[10..12].copy_from_slice(&(!folded as u16).to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_frame_is_found() {
        for length in [64, 1514, 65_214] {
            let kind = Frame { length };
            let good = kind.bytes(77);
            assert_eq!((good.len(), kind.check(&good)), (length, Some(77)));
            for index in [0, 12, 18, length - 1] {
                let mut bad = good.clone();
                bad[index] ^= 1;
                assert_eq!(kind.check(&bad), None, "byte {index} of {length}");
            }
            assert_eq!(kind.check(&good[..length - 1]), None);
            assert_eq!(kind.check(&[]), None);
        }
    }

    #[test]
    fn the_checksum_of_a_header_adds_up() {
        let sum: u32 = ipv4(65_200).chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
