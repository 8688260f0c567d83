//! Buffers as input and output past the page cache wants them.

/// What buffers, offsets and lengths past the page cache are multiples of, on any disk.
const PAGE: usize = 4096;

/// Bytes that begin at a multiple of 4096.
#[derive(Debug)]
pub struct Room {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Room {
    /// `length` zeroes.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, start, length }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}
