//! The two places where KVM's own structures need unsafe code: taking the descriptor over, and reading a union.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_ioctls::{Kvm, VcpuFd};

/// KVM behind a descriptor of `/dev/kvm` that was handed over.
pub fn from_descriptor(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and owned, and its ownership moves into the returned value.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// The suberror of an exit with KVM_EXIT_INTERNAL_ERROR.
pub fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: all members of the union are plain integers, valid for any bytes; which member KVM filled in follows from
    // the exit reason, and a wrong one would be a wrong number in a message.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}
