//! The streaming exec's front: what is answered before a command runs. What it does after is tested
//! where microVMs run.

use holdfast_api::path;

use crate::server::{Server, group};

#[tokio::test]
async fn the_streaming_exec_answers_a_plain_request_with_a_typed_error() {
    let server = Server::start().await;
    let at = path::exec(&group(), "aaaaaaaaaaaaaaaaaaaa");
    server.get(&at).await.refused(404, "SandboxNotFound");
}
