//! The signal that brings a vCPU thread out of KVM_RUN.
//!
//! It may arrive just before KVM_RUN, where it would be lost: so its handler sets the flag by which KVM_RUN returns at
//! once (Linux Documentation/virt/kvm/api.rst, section 5, `immediate_exit`).
#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{addr_of_mut, null_mut};
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};

use kvm_ioctls::VcpuFd;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use protocol::Fault;

/// The signal. The run filter allows no other to be sent.
const SIGNAL: Signal = Signal::SIGUSR1;

thread_local! {
    /// The `immediate_exit` of this thread's vCPU. It needs neither initialisation nor a destructor: a signal handler may
    /// read it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

extern "C" fn handle(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: it points into the mapping of a vCPU that this thread owns, and is null before and after that. The kernel
        // reads this byte, and nobody keeps a reference to it.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
    }
}

/// Has the signal handled in this process. Before the first vCPU thread.
///
/// # Errors
/// A host fault with what sigaction(2) answers.
pub fn install() -> Result<(), Fault> {
    // Calls that can be restarted are: only KVM_RUN is to end.
    let action = SigAction::new(SigHandler::Handler(handle), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does one load of thread-local memory and one atomic store, both async-signal-safe.
    let previous = unsafe { sigaction(SIGNAL, &action) };
    previous.map(drop).map_err(|errno| Fault::host(format!("sigaction: {errno}")))
}

/// A thread of this process.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl Thread {
    /// The calling one.
    pub fn current() -> Self {
        Self { process: nix::unistd::getpid().as_raw(), thread: nix::unistd::gettid().as_raw() }
    }

    /// Sends the signal.
    pub fn interrupt(self) {
        // One that has ended needs no signal.
        // SAFETY: the call takes three numbers. No thread is made after the vCPUs', so that the number can belong to no
        // other one.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, SIGNAL as libc::c_int) };
    }
}

/// A vCPU of the thread that made this: the signal brings that thread out of KVM_RUN, and never into it again before
/// `immediate_exit` has been cleared.
pub struct Interruptible {
    vcpu: VcpuFd,
    /// Another thread's handler would not find it.
    _not_send: PhantomData<*mut u8>,
}

impl Interruptible {
    /// Makes the calling thread the one of `vcpu`. A thread has one.
    pub fn new(mut vcpu: VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(addr_of_mut!(vcpu.get_kvm_run().immediate_exit));
        Self { vcpu, _not_send: PhantomData }
    }

    /// Clears `immediate_exit`. A signal that comes when this has returned sets it again.
    pub fn clear(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
        // Or the compiler may do it later than that, and a signal would be lost.
        compiler_fence(Ordering::SeqCst);
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}

impl Deref for Interruptible {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.vcpu
    }
}

impl DerefMut for Interruptible {
    fn deref_mut(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }
}
