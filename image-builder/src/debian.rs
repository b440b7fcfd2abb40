//! Debian: where this machine gets packages from, and trees made of them.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::command::run;

/// The release everything is made from.
pub(crate) const SUITE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Never on a node, whichever package brings it.
const PATHS_LEFT_OUT: [&str; 7] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
    "/usr/share/zsh/*",
];

/// Lines for sources.list: what the machine's own apt knows of the release and its updates.
#[derive(Debug)]
pub(crate) struct Sources(Vec<String>);

pub(crate) fn sources() -> Result<Sources> {
    let targets = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]))?;
    let sources = Sources(lines(&targets));
    if sources.0.is_empty() {
        bail!("apt knows no source for {SUITE}: run scripts/setup");
    }
    Ok(sources)
}

fn lines(targets: &str) -> Vec<String> {
    let ours = |release: &str| release == SUITE || release.starts_with(&format!("{SUITE}-"));
    let known = targets.lines().filter_map(|line| line.split_once(' '));
    let mut lines: Vec<_> = known
        .filter(|(_, release)| ours(release) && !release.ends_with("-backports"))
        .map(|(uri, release)| format!("deb [signed-by={KEYRING}] {uri} {release} main"))
        .collect();
    lines.sort();
    lines.dedup();
    lines
}

/// Makes a tree of `packages` and what they need at `target`: a folder, or a tar by its name.
pub(crate) fn bootstrap(
    sources: &Sources,
    variant: &str,
    packages: &[&str],
    target: &Path,
) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--mode=root"]);
    command.arg(format!("--variant={variant}"));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    for path in PATHS_LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.arg(format!("--include={}", packages.join(",")));
    command.arg(SUITE).arg(target).args(&sources.0);
    run(&mut command).with_context(|| format!("{} packages of {SUITE}", packages.len()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_the_release_and_its_updates_and_nothing_else() {
        let targets = "http://a/debian/ bookworm\nhttp://a/debian/ trixie\nhttp://a/debian/ trixie\n\
                       http://a/debian/ trixie-backports\nhttp://s/ trixie-security\n";
        let expected = [("http://a/debian/", "trixie"), ("http://s/", "trixie-security")];
        let expected = expected.map(|(u, r)| format!("deb [signed-by={KEYRING}] {u} {r} main"));
        assert_eq!(lines(targets), expected);
    }
}
