//! The few devices that the core answers itself: what a kernel's first lines, its reset and its power-off need.

pub mod i8042;
pub mod panic;
pub mod power;
pub mod serial;
