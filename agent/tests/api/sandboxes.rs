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

#[tokio::test]
async fn a_suspend_names_a_mode_that_there_is_and_a_sandbox_that_there_is() {
    let server = Server::start().await;
    let at = path::suspend(&group(), "aaaaaaaaaaaaaaaaaaaa");
    for body in ["{}", r#"{"mode":"Disk"}"#, r#"{"mode":"Memory"}"#] {
        server.post(&at, body).await.refused(404, "SandboxNotFound");
    }
}
