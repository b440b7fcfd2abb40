//! Converts the image of an OCI layout folder into a store, for measuring.
//!
//! `convert_layout LAYOUT STORE`

#[path = "../tests/support/layout.rs"]
mod layout;

use std::{io::Write, path::Path};

fn main() -> std::io::Result<()> {
    let [layout, store] = std::env::args().skip(1).collect::<Vec<_>>().try_into().unwrap_or_else(
        |arguments: Vec<_>| panic!("want LAYOUT and STORE, got {} arguments", arguments.len()),
    );
    let record = layout::convert(Path::new(&layout), Path::new(&store));
    writeln!(std::io::stdout().lock(), "{}", record.digest)
}
