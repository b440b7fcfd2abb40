//! `holdfast-pager`: fills the memory of one guest that goes on already. The agent runs one a cold
//! resume, as a user of its own. It parses stored bytes, so it first gives up every right that
//! filling does not need.

use std::process::ExitCode;

fn main() -> ExitCode {
    holdfast_pager::run()
}
