//! The environment of a command: what container users expect to be there, then the image's and
//! the sandbox's, then the exec's own.

use std::{collections::BTreeMap, ffi::CString};

use holdfast_wire::guest::Failure;

use crate::failure::invalid;

/// PATH of a sandbox whose image names none.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Names to values; a name occurs once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// What every command has unless the image or the caller says otherwise.
    pub fn with_defaults(host_name: &str) -> Self {
        let mut defaults = Self::default();
        defaults.set_default("PATH", DEFAULT_PATH);
        if !host_name.is_empty() {
            defaults.set_default("HOSTNAME", host_name);
        }
        defaults
    }

    /// Adds variables; a later one of the same name replaces.
    pub fn extend(&mut self, variables: &[(String, String)]) -> Result<(), Failure> {
        for (name, value) in variables {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(invalid(format!("{name:?} is not a name of an environment variable")));
            }
            if value.contains('\0') {
                return Err(invalid(format!("environment variable {name} has a NUL in its value")));
            }
            self.0.insert(name.clone(), value.clone());
        }
        Ok(())
    }

    pub fn set_default(&mut self, name: &str, value: &str) {
        if !self.0.contains_key(name) {
            self.0.insert(name.to_owned(), value.to_owned());
        }
    }

    pub fn path(&self) -> &str {
        self.0.get("PATH").map_or(DEFAULT_PATH, String::as_str)
    }

    /// `NAME=value` as exec wants it.
    pub fn to_c_strings(&self) -> Result<Vec<CString>, Failure> {
        self.0
            .iter()
            .map(|(name, value)| {
                CString::new(format!("{name}={value}"))
                    .map_err(|_| invalid(format!("environment variable {name} has a NUL")))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use holdfast_wire::guest::FailureKind;

    use super::*;

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn the_same_name_replaces_and_defaults_give_way() {
        let mut environment = Environment::with_defaults("box");
        environment.extend(&[pair("PATH", "/opt/bin"), pair("A", "1")]).unwrap();
        environment.extend(&[pair("A", "2=3"), pair("HOME", "/h")]).unwrap();
        environment.set_default("HOME", "/root");
        let lines: Vec<_> = environment
            .to_c_strings()
            .unwrap()
            .into_iter()
            .map(|line| line.into_string().unwrap())
            .collect();
        assert_eq!(lines, ["A=2=3", "HOME=/h", "HOSTNAME=box", "PATH=/opt/bin"]);
        assert_eq!(environment.path(), "/opt/bin");
    }

    #[test]
    fn a_name_the_kernel_could_not_carry_is_refused() {
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0y")] {
            let refused = Environment::default().extend(&[pair(name, value)]).unwrap_err();
            assert_eq!(refused.kind, FailureKind::Invalid, "{name:?}");
        }
    }
}
