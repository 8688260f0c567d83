//! The only place that knows which architecture this is: everything else uses the names exported here.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Entry, after_pause, attach_platform, configure_vcpu, layout, load, prepare_vm, supported_cpuid};
