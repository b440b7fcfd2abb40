//! Knocks at the host as fast as it can: for tests of what that does to others.

fn main() {
    loop {
        holdfast_guest::vsock::ring();
    }
}
