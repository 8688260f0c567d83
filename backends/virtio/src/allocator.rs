//! The C library's allocator, kept to what the run filters allow.
#![allow(unsafe_code)]

/// Has all threads share one heap, grown by brk(2) alone. Called once, before there is a second thread.
///
/// Left to itself the C library makes a heap per thread, for which it maps, protects, and reads /proc/sys when it
/// gives memory back. With this the one mmap(2) of a backend is that of guest memory, and its filter says so. Small
/// allocations come from a cache per thread either way.
pub(crate) fn one_heap() {
    // SAFETY: it only sets parameters of the allocator, and no other thread exists that could use it meanwhile.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}
