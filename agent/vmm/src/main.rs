//! The VMM program. Its configuration and every resource come by inherited fd; see
//! `holdfast_wire::vmm`.

fn main() -> std::process::ExitCode {
    holdfast_vmm::run()
}
