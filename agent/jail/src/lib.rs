//! What the host lends one microVM: cgroup, run folder, the VMM process.
