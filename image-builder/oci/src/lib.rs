//! OCI images: pull by digest, verify, keep layers.
