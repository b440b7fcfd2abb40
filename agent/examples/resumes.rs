//! A sandbox that goes on again and again, from its memory file and from pieces by turns, and runs a
//! command each time: what is looked at by whoever traces it (`scripts/kernel-order`).
//!
//! Says `mark` and rests before each resume, and again when the command has said a word.
#![expect(clippy::print_stdout, reason = "it tells where it is")]

#[path = "../tests/microvm/node.rs"]
#[allow(dead_code)]
mod node;

use std::{path::Path, time::Duration};

use fs_err as fs;
use holdfast_model::SandboxId;
use holdfast_wire::guest::Output;
use node::{Node, shell, spec};
use rustix::mount::{MountFlags, mount};

const MEMORY_MIB: u32 = 256;

/// Whoever reads the mark has looked at the trace by then.
const REST: Duration = Duration::from_secs(2);

async fn says(node: &Node, id: &SandboxId) {
    let mut session = node.registry.exec(id, shell("echo on")).await.unwrap();
    let mut said = Vec::new();
    while let Some(output) = session.next().await.unwrap() {
        if let Output::Stdout(bytes) = output {
            said.extend_from_slice(&bytes);
        }
    }
    assert_eq!(said, b"on\n");
}

async fn mark() {
    println!("mark");
    tokio::time::sleep(REST).await;
}

/// As after a restart of the node.
fn forget_memory_files(node: &Node) {
    for saved in fs::read_dir(node.state().join("saved")).unwrap() {
        for file in fs::read_dir(saved.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("memory-")) {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

#[tokio::main]
async fn main() {
    let rounds: u32 = std::env::var("HOLDFAST_ROUNDS").map_or(3, |text| text.parse().unwrap());
    let folder = Path::new("/tmp/resumes");
    fs::create_dir_all(folder).unwrap();
    mount("none", folder, "tmpfs", MountFlags::empty(), None).unwrap();
    let node = Node::start_in(folder.to_owned()).await;
    let id = node.running(spec(MEMORY_MIB)).await;
    says(&node, &id).await;
    for round in 0..rounds {
        node.registry.suspend(&id, None).await.unwrap();
        if round % 2 == 1 {
            forget_memory_files(&node);
        }
        mark().await;
        node.registry.resume(&id).await.unwrap();
        says(&node, &id).await;
        mark().await;
    }
    node.registry.delete(&id).await.unwrap();
}
