//! One process, one microVM: KVM, virtio, threads; no tokio. The library is the whole program, so
//! that tests and fuzz targets reach its parsers; `main.rs` only calls [`run`].

mod devices;
mod event;
mod inherited;
mod sys;
mod vm;

/// Runs the VMM to its end and says how it ended.
pub fn run() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
