//! The tiny parent of one VMM. Started by the agent, which gives it its orders by a socket; see
//! `holdfast_jail::run_shim`.

fn main() -> std::process::ExitCode {
    holdfast_jail::run_shim()
}
