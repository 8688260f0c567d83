//! The C library's allocator, kept to what the run filters allow.
#![allow(unsafe_code)]

use nix::libc;

/// Has all threads share one heap, grown by brk(2) alone. Called once, before there is a second thread.
///
/// Left to itself the C library makes a heap per thread, for which it maps, protects, and reads /proc/sys when it
/// gives memory back. With this a backend maps guest memory and nothing else, a running core maps nothing, and their filters
/// say so. Small allocations come from a cache per thread either way.
pub(crate) fn one_heap() {
    // SAFETY: it only sets parameters of the allocator, and no other thread exists that could use it meanwhile.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}
