//! `holdfast doctor`: looks step by step at what stands between this line and a running sandbox,
//! then at the node's host.

use std::{net::ToSocketAddrs, path::Path, process::ExitCode, time::Duration};

use holdfast_api::{
    disk_image::PublicDiskImage,
    node::{HostCheck, NodeBundle, NodeInfo, Verdict},
    path,
};

use crate::{
    args::{Output, Target},
    bundle::Bundle,
    client::Client,
    connection,
    error::CliError,
    output,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What was found on the way.
#[derive(Default)]
struct Findings {
    checks: Vec<HostCheck>,
    node: Option<NodeInfo>,
    own: Option<NodeBundle>,
}

impl Findings {
    fn pass(&mut self, name: &str, detail: String) {
        self.checks.push(HostCheck {
            name: name.to_owned(),
            verdict: Verdict::Ok,
            detail,
            remedy: None,
        });
    }

    fn fail(&mut self, name: &str, error: &CliError) {
        self.checks.push(HostCheck {
            name: name.to_owned(),
            verdict: Verdict::Failed,
            detail: error.to_string(),
            remedy: error.hint().map(str::to_owned),
        });
    }
}

/// Runs the checks in order; the first of the way to the node that fails ends them, since the rest
/// stand on it. Exit code 3 if one failed; a warning is none. With `bundle` everything found goes
/// into a new archive, too.
pub(crate) async fn doctor(
    target: &Target,
    bundle: Option<&Path>,
    output: Output,
) -> Result<ExitCode, CliError> {
    let mut findings = Findings::default();
    if let Err((name, error)) = examine(target, bundle.is_some(), &mut findings).await {
        findings.fail(name, &error);
    }
    let checks = &findings.checks;
    output::list(output, checks, &["CHECK", "OK", "DETAIL"], |check| {
        let ok = match check.verdict {
            Verdict::Ok => "yes",
            Verdict::Warning => "warning",
            Verdict::Failed => "NO",
        };
        let remedy = check.remedy.as_ref().map(|it| format!(" ({it})")).unwrap_or_default();
        vec![check.name.clone(), ok.to_owned(), format!("{}{remedy}", check.detail)]
    })?;
    if let Some(path) = bundle {
        let (host, port) = connection::host_and_port(&target.endpoint)?;
        let (node, own) = (findings.node.as_ref(), findings.own.as_ref());
        Bundle { host: &host, port, checks, node, own }.write(path)?;
    }
    let failed = checks.iter().any(|check| check.verdict == Verdict::Failed);
    Ok(if failed { ExitCode::from(3) } else { ExitCode::SUCCESS })
}

async fn examine(
    target: &Target,
    bundle: bool,
    findings: &mut Findings,
) -> Result<(), (&'static str, CliError)> {
    let at = |name| move |error| (name, error);
    let (host, port) = connection::host_and_port(&target.endpoint).map_err(at("endpoint"))?;
    findings.pass("endpoint", target.endpoint.clone());

    reach(&host, port).map_err(at("connection"))?;
    findings.pass("connection", format!("{host} port {port}"));

    let client = Client::new(target).map_err(at("tls"))?;
    client.check(path::READYZ).await.map_err(at("tls"))?;
    let ca =
        target.ca.as_ref().map_or("the system's CAs".to_owned(), |ca| ca.display().to_string());
    findings.pass("tls", format!("trusted by {ca}"));

    let node: NodeInfo = client.get(path::NODE).await.map_err(at("token"))?;
    findings.pass("token", "accepted".to_owned());
    findings.pass("node", format!("holdfastd {}, kernel {}", node.version, node.kernel));
    let free = node.memory_mib.capacity - node.memory_mib.reserved;
    findings.node = Some(node);
    if bundle {
        findings.own = Some(client.get(path::NODE_BUNDLE).await.map_err(at("bundle"))?);
    }

    let of_host: Vec<HostCheck> = client.get(path::NODE_DOCTOR).await.map_err(at("host"))?;
    findings.checks.extend(of_host);

    let room = (free >= 512.0)
        .then_some(())
        .ok_or_else(|| CliError::Host(format!("{free} MiB are free, the smallest tier needs 512")));
    room.map_err(at("memory"))?;
    findings.pass("memory", format!("{free} MiB free for sandboxes"));

    let images: Vec<PublicDiskImage> =
        client.get_all(&path::public_disk_images(&client.group)).await.map_err(at("group"))?;
    let names: Vec<_> = images.iter().map(|image| image.name.as_str()).collect();
    findings.pass("group", format!("{}; public images: {}", client.group, names.join(" ")));
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
