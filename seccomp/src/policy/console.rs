//! The tables of `console`.

use crate::filter::Rule;

/// Until it is ready.
pub const LAUNCH: &[Rule] = &[];

/// Once it is ready.
pub const RUN: &[Rule] = &[];
