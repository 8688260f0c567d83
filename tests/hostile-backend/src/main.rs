//! A disk's backend that does not play by the rules, to be put in the place of `ozone-blk`.
//!
//! It lives under the same filters and speaks the same protocols, by code of its own: what it is to do wrong no honest
//! library offers. One thread does everything. The disk's name says what it does wrong, and at which of its starts
//! ([`play`]); at all others it is an honest disk.

mod disk;
mod image;
mod inflight;
mod life;
mod play;
mod server;
mod sys;
mod vring;
mod wire;

use std::process::ExitCode;

fn main() -> ExitCode {
    match life::live() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            log::error!("{reason}");
            ExitCode::FAILURE
        }
    }
}
