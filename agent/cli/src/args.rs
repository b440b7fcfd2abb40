//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
#[command(name = "holdfast", version, about = "Runs OCI images in microVMs on a Holdfast node")]
#[command(after_help = "Exit codes: 0 done, 1 wrong request, 2 wrong line, 3 the host could not, \
                        4 our bug. `run` and `exec` pass on the command's own exit code.")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) target: Target,
    /// How answers are printed.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which node, and as whom.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Target {
    /// Address of the node's API.
    #[arg(
        long,
        global = true,
        env = "HOLDFAST_ENDPOINT",
        default_value = "https://localhost:8443"
    )]
    pub(crate) endpoint: String,
    /// Bearer token. Better given by the environment: others see a command line.
    #[arg(long, global = true, env = "HOLDFAST_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// PEM file of the node's CA. Without it the system's CAs are trusted.
    #[arg(long, global = true, env = "HOLDFAST_CA")]
    pub(crate) ca: Option<PathBuf>,
    /// Sandbox group: `name`, or `subscription/resource-group/name`.
    #[arg(long, global = true, env = "HOLDFAST_GROUP", default_value = "local/default/default")]
    pub(crate) group: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new sandbox, and delete the sandbox after it.
    Run(Run),
    /// Sandboxes.
    #[command(subcommand)]
    Sandbox(SandboxCommand),
    /// Snapshots of sandboxes, from which others are made.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// What may leave a sandbox, and what did.
    #[command(subcommand)]
    Egress(EgressCommand),
    /// Disk images.
    #[command(subcommand)]
    Image(ImageCommand),
    /// The node itself.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Check that the node can be reached, can run sandboxes, and keeps them apart.
    Doctor {
        /// Pack what was found, the node's log and figures into a new archive (tar.gz), without
        /// secrets, for whoever is asked for help.
        #[arg(long, value_name = "FILE")]
        bundle: Option<PathBuf>,
    },
    /// Print the version.
    Version,
    /// Print a completion script for a shell.
    Completion { shell: clap_complete::Shell },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// Pass stdin on.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    #[command(flatten)]
    pub(crate) process: Process,
    #[command(flatten)]
    pub(crate) size: Size,
    /// Kept as the label `name`.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// File with the egress policy, JSON as `egress show` prints it. Without one nothing leaves the
    /// sandbox.
    #[arg(long, value_name = "FILE")]
    pub(crate) egress_policy: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) registry: Registry,
    /// Name of a public image, id of a disk image, or an image reference that is pulled.
    pub(crate) image: String,
    /// Arguments for the image's entrypoint; without any, the image's own.
    #[arg(last = true)]
    pub(crate) command: Vec<String>,
}

/// How a command is run.
#[derive(Debug, clap::Args)]
pub(crate) struct Process {
    /// Environment variable, `NAME=value`; `NAME` alone takes it over from here. Repeatable.
    #[arg(short, long = "env", value_name = "K=V")]
    pub(crate) env: Vec<String>,
    /// File of `NAME=value` lines; `#` begins a comment. Repeatable.
    #[arg(long, value_name = "F")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory.
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Kill the command after so many seconds; its exit code is then 124.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
}

/// What a sandbox may use.
#[derive(Debug, clap::Args)]
pub(crate) struct Size {
    /// `250m`, `0.5`, `2`.
    #[arg(long, default_value = "1000m")]
    pub(crate) cpu: String,
    /// `512Mi`, `2Gi`; at most 2Gi a CPU.
    #[arg(long, default_value = "2Gi")]
    pub(crate) memory: String,
    /// `20Gi`.
    #[arg(long)]
    pub(crate) disk: Option<String>,
}

/// As whom images are pulled.
#[derive(Debug, clap::Args)]
pub(crate) struct Registry {
    /// User name at the registry.
    #[arg(long, env = "HOLDFAST_REGISTRY_USER")]
    pub(crate) registry_user: Option<String>,
    /// Password or token at the registry. Better given by the environment.
    #[arg(long, env = "HOLDFAST_REGISTRY_TOKEN", hide_env_values = true)]
    pub(crate) registry_token: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// Make a sandbox and wait until it runs.
    Create(Create),
    /// List the group's sandboxes.
    List {
        /// Only those with this label, `name=value`. Repeatable: all must fit.
        #[arg(short, long)]
        label: Vec<String>,
    },
    /// Show one sandbox.
    Get { id: String },
    /// Run a command in a sandbox. One that is suspended is resumed for it.
    Exec(Exec),
    /// Keep sandboxes as snapshots of memory and disk, and give the node back what they use.
    Suspend {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Have suspended sandboxes go on where they stood.
    Resume {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Make copies of a sandbox as it is now, which go on beside it.
    Fork {
        id: String,
        /// How many.
        #[arg(short = 'n', long, default_value_t = 1)]
        count: u32,
        /// Label of each, `name=value`. Repeatable.
        #[arg(short, long)]
        label: Vec<String>,
    },
    /// Delete sandboxes.
    Delete {
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) size: Size,
    /// Kept as the label `name`.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Label, `name=value`. Repeatable.
    #[arg(short, long)]
    pub(crate) label: Vec<String>,
    /// Environment variable of everything in the sandbox, `NAME=value`. Repeatable.
    #[arg(short, long = "env", value_name = "K=V")]
    pub(crate) env: Vec<String>,
    /// File with the egress policy, JSON as `egress show` prints it. Without one nothing leaves the
    /// sandbox; of a clone, it has its snapshot's.
    #[arg(long, value_name = "FILE")]
    pub(crate) egress_policy: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) registry: Registry,
    /// Make it from this snapshot: it goes on where that stood, with the snapshot's size.
    #[arg(long, value_name = "ID", conflicts_with_all = ["image", "cpu", "memory", "disk", "env", "command"])]
    pub(crate) from_snapshot: Option<String>,
    /// Name of a public image, id of a disk image, or an image reference that is pulled.
    #[arg(required_unless_present = "from_snapshot")]
    pub(crate) image: Option<String>,
    /// Replaces the image's cmd.
    #[arg(last = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Exec {
    /// Pass stdin on.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    #[command(flatten)]
    pub(crate) process: Process,
    pub(crate) id: String,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Make a snapshot of a sandbox that runs or is suspended. It goes on as it was.
    Create {
        sandbox: String,
        /// Kept as the label `name`.
        #[arg(long)]
        name: Option<String>,
        /// Label, `name=value`. Repeatable.
        #[arg(short, long)]
        label: Vec<String>,
    },
    /// List the group's snapshots.
    List {
        /// Only those with this label, `name=value`. Repeatable: all must fit.
        #[arg(short, long)]
        label: Vec<String>,
    },
    /// Show one snapshot.
    Get { id: String },
    /// Show what a snapshot is made of on the node.
    Inspect { id: String },
    /// Read all of a snapshot and say whether it is sound.
    Verify {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Delete snapshots. Sandboxes that were made from them stay.
    Delete {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// List the group's snapshots in the remote store, those of other nodes too.
    Remote,
    /// Bring a snapshot from the remote store to this node, to make sandboxes of it.
    Fetch { id: String },
    /// Remove pieces that no snapshot and no sandbox needs.
    Gc,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EgressCommand {
    /// Print the policy in force.
    Show { id: String },
    /// Change parts of the policy in force. Prints the new one.
    Set(SetEgress),
    /// Put the policy of a file in place of the one in force.
    Apply {
        id: String,
        /// JSON, in the form that `show` prints. `-` is stdin.
        #[arg(short, long)]
        file: PathBuf,
    },
    /// Say what the policy in force makes of an address, step by step, and by which rule.
    Explain {
        id: String,
        /// `https://host[:port]/path`, `http://…`, `dns://name[/TYPE]`, `tcp://address:port`,
        /// `udp://…`.
        url: String,
        #[arg(short, long, default_value = "GET")]
        method: String,
    },
    /// List what was decided about the sandbox's flows.
    Decisions(Decisions),
}

#[derive(Debug, clap::Args)]
pub(crate) struct SetEgress {
    pub(crate) id: String,
    /// What becomes of flows that no rule speaks of.
    #[arg(long, value_enum)]
    pub(crate) default: Option<EgressDefault>,
    /// How far the proxy looks into what passes it.
    #[arg(long, value_enum)]
    pub(crate) inspection: Option<EgressInspection>,
    /// Let flows to these hosts pass: a name, `*.` before a name, or `*`. Repeatable.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) allow: Vec<String>,
    /// Let none to these hosts pass. Repeatable; counts before what is allowed.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) deny: Vec<String>,
    /// Drop the host rules there were.
    #[arg(long)]
    pub(crate) replace: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EgressDefault {
    Allow,
    Deny,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EgressInspection {
    Legacy,
    Full,
    Partial,
    None,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Decisions {
    pub(crate) id: String,
    /// Go on, and print what is new as it comes.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only what was denied.
    #[arg(long, conflicts_with = "allowed")]
    pub(crate) denied: bool,
    /// Only what was allowed.
    #[arg(long)]
    pub(crate) allowed: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Pull an image from a registry and make a disk image of it.
    Pull(Pull),
    /// Make a disk image of an OCI or docker archive.
    Import {
        file: PathBuf,
        /// Kept as the label `name`.
        #[arg(long)]
        name: Option<String>,
    },
    /// List the group's disk images and the public ones.
    List,
    /// Delete disk images.
    Delete {
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Remove what no disk image and no sandbox refers to.
    Gc,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Pull {
    #[command(flatten)]
    pub(crate) registry: Registry,
    /// Kept as the label `name`.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// `host[:port]/name[:tag][@digest]`.
    pub(crate) reference: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Version, system, capacity and use.
    Info,
    /// Who has what: capacity, what is promised, what each sandbox uses, what was refused.
    Status,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_run_takes_its_command_behind_two_dashes() {
        let args = Args::try_parse_from([
            "holdfast", "run", "-i", "-e", "A=1", "-w", "/tmp", "-u", "1:1", "debian", "--", "ls",
            "-l",
        ]);
        let Command::Run(run) = args.unwrap().command else { panic!("not a run") };
        assert_eq!(run.command, ["ls", "-l"]);
        assert_eq!(run.process.env, ["A=1"]);
        assert!(run.interactive);
    }

    #[test]
    fn a_policy_is_changed_by_its_parts() {
        let args = Args::try_parse_from([
            "holdfast",
            "egress",
            "set",
            "x",
            "--default",
            "deny",
            "--inspection",
            "partial",
            "--allow",
            "a.test",
            "--allow",
            "*.b.test",
            "--deny",
            "c.test",
        ]);
        let Command::Egress(EgressCommand::Set(set)) = args.unwrap().command else { panic!() };
        assert_eq!(set.allow, ["a.test", "*.b.test"]);
        assert_eq!((set.default, set.deny.len()), (Some(EgressDefault::Deny), 1));
        let both = ["holdfast", "egress", "decisions", "x", "--denied", "--allowed"];
        assert!(Args::try_parse_from(both).is_err());
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        let create = ["holdfast", "sandbox", "create", "--from-snapshot", "a"];
        assert!(Args::try_parse_from(create).is_ok());
        for line in [
            &["holdfast"][..],
            &["holdfast", "fly"],
            &["holdfast", "run"],
            &create[..3],
            &[&create[..], &["debian"]].concat(),
            &[&create[..], &["--cpu", "2"]].concat(),
        ] {
            assert!(Args::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
