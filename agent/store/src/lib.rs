//! Durable records. The only crate that knows how they lie on disk.
