//! The kernel command line: what of it concerns the way to the root.

use std::{fmt, path::PathBuf, str::FromStr};

/// What runs after the root is mounted, unless `init=` names another.
const INIT: &str = "/usr/lib/systemd/systemd";

/// Which partition holds the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RootName {
    /// The partition's own UUID, lower case.
    Uuid(String),
    /// The partition's name in the partition table.
    Label(String),
}

impl fmt::Display for RootName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => write!(f, "PARTUUID={uuid}"),
            Self::Label(label) => write!(f, "PARTLABEL={label}"),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cmdline {
    pub(crate) root: RootName,
    pub(crate) init: PathBuf,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadCmdline {
    #[error("the kernel command line has no root=")]
    NoRoot,
    #[error("root={0} is neither PARTUUID=… nor PARTLABEL=…")]
    Root(String),
    #[error("init={0} is not an absolute path")]
    Init(String),
}

impl FromStr for Cmdline {
    type Err = BadCmdline;

    /// As in the kernel, the last of several equal keys counts.
    fn from_str(line: &str) -> Result<Self, BadCmdline> {
        let mut root = None;
        let mut init = PathBuf::from(INIT);
        for word in words(line) {
            match word.split_once('=') {
                Some(("root", value)) => root = Some(root_name(value)?),
                Some(("init", value)) if value.starts_with('/') => init = value.into(),
                Some(("init", value)) => return Err(BadCmdline::Init(value.to_owned())),
                _ => {}
            }
        }
        Ok(Self { root: root.ok_or(BadCmdline::NoRoot)?, init })
    }
}

fn root_name(value: &str) -> Result<RootName, BadCmdline> {
    match value.split_once('=') {
        Some(("PARTUUID", uuid)) if !uuid.is_empty() => {
            Ok(RootName::Uuid(uuid.to_ascii_lowercase()))
        }
        Some(("PARTLABEL", label)) if !label.is_empty() => Ok(RootName::Label(label.to_owned())),
        _ => Err(BadCmdline::Root(value.to_owned())),
    }
}

/// Splits at white space outside double quotes and drops the quotes, as the kernel does.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '"' => quoted = !quoted,
            _ if letter.is_whitespace() && !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(letter),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cmdline, BadCmdline> {
        line.parse()
    }

    #[test]
    fn a_root_is_named_by_uuid_in_any_case_or_by_label() {
        let uuid = RootName::Uuid("a0b1".to_owned());
        assert_eq!(parse("quiet root=PARTUUID=A0B1 ro\n").map(|c| c.root), Ok(uuid));
        let label = RootName::Label("two words".to_owned());
        assert_eq!(parse("root=\"PARTLABEL=two words\"").map(|c| c.root), Ok(label));
    }

    #[test]
    fn the_last_of_several_roots_counts() {
        let last = RootName::Label("b".to_owned());
        assert_eq!(parse("root=PARTLABEL=a root=PARTLABEL=b").map(|c| c.root), Ok(last));
    }

    #[test]
    fn a_line_without_a_usable_root_is_refused() {
        assert_eq!(parse("quiet"), Err(BadCmdline::NoRoot));
        for root in ["/dev/vda1", "PARTUUID=", "PARTLABEL=", "UUID=1", ""] {
            let refused = Err(BadCmdline::Root(root.to_owned()));
            assert_eq!(parse(&format!("root={root}")), refused, "{root}");
        }
    }

    #[test]
    fn init_is_systemd_unless_the_line_names_another() {
        assert_eq!(parse("root=PARTLABEL=a").map(|c| c.init), Ok(INIT.into()));
        assert_eq!(parse("root=PARTLABEL=a init=/bin/x").map(|c| c.init), Ok("/bin/x".into()));
        let relative = Err(BadCmdline::Init("x".to_owned()));
        assert_eq!(parse("root=PARTLABEL=a init=x"), relative);
    }
}
