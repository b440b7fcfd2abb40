//! The daemon on every node: puts the parts together, holds no rules of its own.

fn main() {}
