//! `holdfast node …`.

use holdfast_api::{
    node::{Amounts, NodeInfo, NodeStatus, SandboxUse},
    path,
};

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

pub(crate) async fn status(client: &Client, output: Output) -> Result<(), CliError> {
    let status: NodeStatus = client.get(path::NODE_STATUS).await?;
    if output == Output::Json {
        return output::json(&status);
    }
    for (name, value) in summary(&status) {
        output::line(&format!("{name:<10} {value}"))?;
    }
    output::line("")?;
    let head =
        ["ID", "GROUP", "STATE", "CPU", "CPU TIME", "MEMORY", "USED", "PEAK", "READ", "WRITTEN"];
    output::list(output, &status.sandboxes, &head, row)
}

fn summary(status: &NodeStatus) -> [(&'static str, String); 6] {
    let of = |amounts: Amounts, unit: &str| {
        let free = amounts.capacity - amounts.reserved;
        format!("{} of {}{unit} reserved, {free} free", amounts.reserved, amounts.capacity)
    };
    let refused = status.refusals;
    [
        ("cpu", format!("{} (factor {})", of(status.cpus, ""), status.cpu_factor)),
        ("memory", format!("{} (factor {})", of(status.memory_mib, " MiB"), status.memory_factor)),
        ("disk", format!("{} of {} MiB free", status.disk_mib.available, status.disk_mib.total)),
        (
            "traffic",
            match &status.disk_bound {
                Some(bound) => format!("of disks {bound}"),
                None => "of disks is not bounded".to_owned(),
            },
        ),
        ("sandboxes", format!("{} of {} at most", status.sandboxes.len(), status.sandboxes_max)),
        (
            "refused",
            format!(
                "{} for memory, {} for CPU, {} for disk, {} for their number",
                refused.memory, refused.cpu, refused.disk, refused.count
            ),
        ),
    ]
}

fn row(sandbox: &SandboxUse) -> Vec<String> {
    let SandboxUse { id, group, state, cpus, memory_mib, used } = sandbox;
    let mib = |bytes: u64| format!("{}Mi", bytes >> 20);
    let figures = [
        Some(cpus.to_string()),
        used.map(|used| format!("{:.1}s", used.cpu_seconds)),
        Some(format!("{memory_mib}Mi")),
        used.map(|used| format!("{:.0}Mi", used.memory_mib)),
        used.map(|used| format!("{:.0}Mi", used.memory_peak_mib)),
        used.map(|used| mib(used.io_read_bytes)),
        used.map(|used| mib(used.io_written_bytes)),
    ];
    let names = [id, group, state].map(Clone::clone);
    names.into_iter().chain(figures.map(|figure| figure.unwrap_or("-".to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use holdfast_api::node::{DiskUse, Refusals, Used};

    use super::*;

    fn sandbox(used: Option<Used>) -> SandboxUse {
        SandboxUse {
            id: "aaaa".to_owned(),
            group: "local/default/default".to_owned(),
            state: "Running".to_owned(),
            cpus: 0.25,
            memory_mib: 512,
            used,
        }
    }

    #[test]
    fn a_row_tells_what_was_promised_and_used_and_of_what_does_not_run_only_the_promise() {
        let used = Used {
            cpu_seconds: 1.25,
            memory_mib: 90.4,
            memory_peak_mib: 100.0,
            io_written_bytes: 3 << 20,
            ..Used::default()
        };
        let cells = row(&sandbox(Some(used))).join(" ");
        assert_eq!(cells, "aaaa local/default/default Running 0.25 1.2s 512Mi 90Mi 100Mi 0Mi 3Mi");
        let cells = row(&sandbox(None)).join(" ");
        assert_eq!(cells, "aaaa local/default/default Running 0.25 - 512Mi - - - -");
    }

    #[test]
    fn the_summary_says_what_is_free_and_what_was_refused_for_what() {
        let status = NodeStatus {
            cpus: Amounts { capacity: 8.0, reserved: 1.5 },
            memory_mib: Amounts { capacity: 4096.0, reserved: 580.0 },
            memory_factor: 1.0,
            cpu_factor: 4.0,
            disk_mib: DiskUse { total: 10, available: 5 },
            sandboxes_max: 1000,
            disk_bound: None,
            refusals: Refusals { memory: 2, ..Refusals::default() },
            sandboxes: vec![sandbox(None)],
        };
        let summary = summary(&status).map(|(_, value)| value);
        assert_eq!(summary[0], "1.5 of 8 reserved, 6.5 free (factor 4)");
        assert_eq!(summary[1], "580 of 4096 MiB reserved, 3516 free (factor 1)");
        assert_eq!(summary[4], "1 of 1000 at most");
        assert_eq!(summary[5], "2 for memory, 0 for CPU, 0 for disk, 0 for their number");
    }
}
