//! `holdfast doctor`: looks step by step at what stands between this line and a running sandbox.

use std::{net::ToSocketAddrs, process::ExitCode, time::Duration};

use holdfast_api::{disk_image::PublicDiskImage, node::NodeInfo, path};
use serde::Serialize;

use crate::{
    args::{Output, Target},
    client::Client,
    connection,
    error::CliError,
    output,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
}

/// Runs the checks in order; the first that fails ends them, since the rest stand on it. Exit code
/// 3 if one failed.
pub(crate) async fn doctor(target: &Target, output: Output) -> Result<ExitCode, CliError> {
    let mut checks = Vec::new();
    let outcome = examine(target, &mut checks).await;
    if let Err((name, error)) = &outcome {
        let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
        checks.push(Check { name, ok: false, detail: format!("{error}{hint}") });
    }
    output::list(output, &checks, &["CHECK", "OK", "DETAIL"], |check| {
        let ok = if check.ok { "yes" } else { "NO" };
        vec![check.name.to_owned(), ok.to_owned(), check.detail.clone()]
    })?;
    Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

async fn examine(target: &Target, checks: &mut Vec<Check>) -> Result<(), (&'static str, CliError)> {
    let mut pass = |name, detail: String| checks.push(Check { name, ok: true, detail });

    let at = |name| move |error| (name, error);
    let (host, port) = connection::host_and_port(&target.endpoint).map_err(at("endpoint"))?;
    pass("endpoint", target.endpoint.clone());

    reach(&host, port).map_err(at("connection"))?;
    pass("connection", format!("{host} port {port}"));

    let client = Client::new(target).map_err(at("tls"))?;
    client.check(path::READYZ).await.map_err(at("tls"))?;
    let ca =
        target.ca.as_ref().map_or("the system's CAs".to_owned(), |ca| ca.display().to_string());
    pass("tls", format!("trusted by {ca}"));

    let node: NodeInfo = client.get(path::NODE).await.map_err(at("token"))?;
    pass("token", "accepted".to_owned());
    pass("node", format!("holdfastd {}, kernel {}", node.version, node.kernel));

    let free = node.memory_mib.capacity - node.memory_mib.reserved;
    let room = (free >= 512.0)
        .then_some(())
        .ok_or_else(|| CliError::Host(format!("{free} MiB are free, the smallest tier needs 512")));
    room.map_err(at("memory"))?;
    pass("memory", format!("{free} MiB free for sandboxes"));

    let images: Vec<PublicDiskImage> =
        client.get_all(&path::public_disk_images(&client.group)).await.map_err(at("group"))?;
    let names: Vec<_> = images.iter().map(|image| image.name.as_str()).collect();
    pass("group", format!("{}; public images: {}", client.group, names.join(" ")));
    Ok(())
}

/// Connects once, to tell a wrong address or a closed port from a TLS failure.
fn reach(host: &str, port: u16) -> Result<(), CliError> {
    let addresses = (host, port)
        .to_socket_addrs()
        .map_err(|error| CliError::Host(format!("cannot resolve {host}: {error}")))?;
    let mut last = format!("{host} has no address");
    for address in addresses {
        match std::net::TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(_) => return Ok(()),
            Err(error) => last = format!("cannot connect to {address}: {error}"),
        }
    }
    Err(CliError::Host(last))
}
