//! Fixed names that both sides of the test host rely on.

/// Name of the virtio-serial port that carries [`crate::wire`].
pub const PORT: &str = "ozone.agent";

/// The read-only disk that carries files into the host, as a tar archive.
pub const PARCEL: &str = "/dev/vda";

/// Size of [`PARCEL`] in bytes: fixed, because the disk is part of the saved machine.
pub const PARCEL_BYTES: u64 = 4 << 30;

/// Where the guest's kernels, initramfs and disk lie in the host.
pub const GUEST: &str = "/guest";

/// Where the product's executables are put; it is on the PATH.
pub const EXECUTABLES: &str = "/usr/local/bin";

/// The host's kernel modules and, in [`MODULE_ORDER`], the order in which they load.
pub const MODULES: &str = "/modules";

/// One module file name per line, dependencies first.
pub const MODULE_ORDER: &str = "/modules/order";

/// The group of `/dev/kvm`, as on Debian.
pub const KVM_GROUP: u32 = 104;

/// An ordinary user of the host, not in [`KVM_GROUP`] but for tests that say so.
pub const ORDINARY_USER: u32 = 1000;

/// Set to `1` in the environment of every command in the host.
pub const IN_HOST: &str = "OZONE_TEST_HOST";
