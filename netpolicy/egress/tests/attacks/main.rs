//! A hostile guest, the program as the agent starts it, and servers that note every byte they get,
//! each in a network namespace of its own. Tests are named after the rows of the attack list; each
//! shows first that the same thing arrives where a policy allows it. Needs root.

mod dns;
mod flows;
mod http;
mod names;
mod opened;
mod policy;
// The bench uses what these do not.
#[allow(dead_code, unused_imports)]
mod rig;
mod secrets;
// The same.
#[allow(dead_code)]
mod sys;
mod tls;
