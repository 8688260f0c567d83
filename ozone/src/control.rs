//! How a machine that runs is spoken to from outside: `ozone restart`, `pause`, `resume` and `status`.
//!
//! A machine with a name listens on a unix socket in a directory of its user's own ([`server`]); a command connects to it,
//! says one thing and waits for the answer ([`client`]). Both are typed ([`message`]).

pub mod client;
pub mod message;
pub mod server;
