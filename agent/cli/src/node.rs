//! `holdfast node …`.

use holdfast_api::{node::NodeInfo, path};

use crate::{args::Output, client::Client, error::CliError, output};

pub(crate) async fn info(client: &Client, output: Output) -> Result<(), CliError> {
    let node: NodeInfo = client.get(path::NODE).await?;
    if output == Output::Json {
        return output::json(&node);
    }
    let system = node.os_release.get("PRETTY_NAME").map_or("unknown", String::as_str);
    let states: Vec<_> = node.sandboxes.iter().map(|(state, n)| format!("{n} {state}")).collect();
    let states = if states.is_empty() { "none".to_owned() } else { states.join(", ") };
    let rows = [
        ("node", node.hostname.clone()),
        ("version", node.version.clone()),
        ("system", system.to_owned()),
        ("kernel", node.kernel.clone()),
        ("addresses", node.addresses.join(" ")),
        ("cpu", format!("{} of {} reserved", node.cpus.reserved, node.cpus.capacity)),
        (
            "memory",
            format!(
                "{} of {} MiB reserved, {} MiB used",
                node.memory_mib.reserved, node.memory_mib.capacity, node.memory_used_mib
            ),
        ),
        ("disk", format!("{} of {} MiB free", node.disk_mib.available, node.disk_mib.total)),
        ("sandboxes", states),
    ];
    rows.iter().try_for_each(|(name, value)| output::line(&format!("{name:<10} {value}")))
}
