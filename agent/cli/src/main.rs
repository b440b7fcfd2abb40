//! `holdfast`: the command line, a client of the public API like any other.
#![forbid(unsafe_code)]

mod args;
mod bundle;
mod client;
mod connection;
mod doctor;
mod egress;
mod error;
mod exec;
mod image;
mod node;
mod output;
mod run;
mod sandbox;
mod snapshot;
mod socket;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser};

use args::{
    Args, Command, EgressCommand, ImageCommand, NodeCommand, SandboxCommand, SnapshotCommand,
};
use client::Client;
use error::CliError;

/// Exit code for a command line that cannot be understood.
const WRONG_LINE: u8 = 2;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Clap's own form: usage errors to stderr, `--help` to stdout.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(WRONG_LINE) } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&CliError::Host(format!("cannot start threads: {error}"))),
    };
    let outcome = runtime.block_on(carry_out(args));
    // A thread may still sit in a read of stdin, which nothing ends.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

/// Prints an error with its causes and its remedy.
fn report(error: &CliError) -> ExitCode {
    let mut text = format!("holdfast: {error}");
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(&format!(": {inner_text}"));
        }
        cause = inner.source();
    }
    if let Some(hint) = error.hint() {
        text.push_str(&format!("\n  hint: {hint}"));
    }
    let _ = writeln!(io::stderr(), "{text}");
    ExitCode::from(error.exit_code())
}

async fn carry_out(args: Args) -> Result<ExitCode, CliError> {
    let output = args.output;
    let done = |outcome: Result<(), CliError>| outcome.map(|()| ExitCode::SUCCESS);
    match args.command {
        Command::Version => done(output::line(&format!("holdfast {}", env!("CARGO_PKG_VERSION")))),
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "holdfast", &mut text);
            done(output::raw(&text))
        }
        Command::Doctor { bundle } => doctor::doctor(&args.target, bundle.as_deref(), output).await,
        Command::Run(run) => run::run(&Client::new(&args.target)?, run).await,
        Command::Sandbox(command) => {
            let client = Client::new(&args.target)?;
            match command {
                SandboxCommand::Create(create) => {
                    done(sandbox::create(&client, create, output).await)
                }
                SandboxCommand::List { label } => {
                    done(sandbox::list(&client, &label, output).await)
                }
                SandboxCommand::Get { id, verbose } => {
                    done(sandbox::get(&client, &id, verbose, output).await)
                }
                SandboxCommand::Exec(exec) => sandbox::exec(&client, exec).await,
                SandboxCommand::Suspend { mode, ids } => {
                    done(sandbox::suspend(&client, mode, &ids).await)
                }
                SandboxCommand::Resume { verbose, ids } => {
                    done(sandbox::resume(&client, verbose, &ids).await)
                }
                SandboxCommand::Fork { id, count, label } => {
                    done(sandbox::fork(&client, &id, count, &label, output).await)
                }
                SandboxCommand::Delete { ids } => done(sandbox::delete(&client, &ids).await),
            }
        }
        Command::Snapshot(command) => {
            let client = Client::new(&args.target)?;
            done(match command {
                SnapshotCommand::Create { sandbox, name, label } => {
                    snapshot::create(&client, &sandbox, name.as_ref(), &label, output).await
                }
                SnapshotCommand::List { label } => snapshot::list(&client, &label, output).await,
                SnapshotCommand::Get { id } => snapshot::get(&client, &id, output).await,
                SnapshotCommand::Inspect { id } => snapshot::inspect(&client, &id, output).await,
                SnapshotCommand::Verify { ids } => snapshot::verify(&client, &ids, output).await,
                SnapshotCommand::Delete { ids } => snapshot::delete(&client, &ids).await,
                SnapshotCommand::Remote => snapshot::list_remote(&client, output).await,
                SnapshotCommand::Fetch { id } => snapshot::fetch(&client, &id, output).await,
                SnapshotCommand::Gc => snapshot::gc(&client, output).await,
            })
        }
        Command::Egress(command) => {
            let client = Client::new(&args.target)?;
            done(match command {
                EgressCommand::Show { id } => egress::show(&client, &id).await,
                EgressCommand::Set(set) => egress::set(&client, &set).await,
                EgressCommand::Apply { id, file } => egress::apply(&client, &id, &file).await,
                EgressCommand::Explain { id, url, method } => {
                    egress::explain(&client, &id, &url, &method, output).await
                }
                EgressCommand::Decisions(asked) => egress::decisions(&client, &asked, output).await,
            })
        }
        Command::Image(command) => {
            let client = Client::new(&args.target)?;
            match command {
                ImageCommand::Pull(pull) => done(image::pull(&client, pull, output).await),
                ImageCommand::Import { file, name } => {
                    done(image::import(&client, &file, name, output).await)
                }
                ImageCommand::List => done(image::list(&client, output).await),
                ImageCommand::Delete { ids } => done(image::delete(&client, &ids).await),
                ImageCommand::Gc => done(image::gc(&client, output).await),
            }
        }
        Command::Node(command) => {
            let client = Client::new(&args.target)?;
            match command {
                NodeCommand::Info => done(node::info(&client, output).await),
                NodeCommand::Status => done(node::status(&client, output).await),
            }
        }
    }
}
