//! Names of sandboxes and disk images.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Letters and digits of every id: no `-`, at which host names of ingress are split.
pub const ID_BYTES: usize = 20;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id: 20 characters of a-z and 0-9")]
pub struct BadId(String);

fn parse(s: &str) -> Result<Box<str>, BadId> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let fits = s.len() == ID_BYTES && s.bytes().all(allowed);
    if fits { Ok(s.into()) } else { Err(BadId(s.chars().take(64).collect())) }
}

/// Makes an id's text of random bytes. The caller brings the randomness.
fn from_random(random: [u8; ID_BYTES]) -> Box<str> {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz012345";
    random
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]))
        .collect::<String>()
        .into()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            pub fn from_random(random: [u8; ID_BYTES]) -> Self {
                Self(from_random(random))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadId;

            fn from_str(s: &str) -> Result<Self, BadId> {
                parse(s).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadId;

            fn try_from(s: String) -> Result<Self, BadId> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id! {
    /// Name of one sandbox, so that it can be a file name, a cgroup's name and a host name's part.
    SandboxId
}
id! {
    /// Name of one disk image of a sandbox group.
    DiskImageId
}
id! {
    /// Name of one snapshot of a sandbox.
    SnapshotId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_make_an_id_that_parses() {
        for byte in 0..=255 {
            let id = SandboxId::from_random([byte; ID_BYTES]);
            assert_eq!(id.as_str().parse(), Ok(id), "byte {byte}");
        }
    }

    #[test]
    fn nothing_that_could_leave_a_folder_is_an_id() {
        let cases =
            ["", "..", "../../../etc/passwd", "aaaaaaaaaaaaaaaaaaa/", "aaaaaaaaaaaaaaaaaaaaa"];
        for text in cases {
            assert!(text.parse::<SandboxId>().is_err(), "{text}");
        }
    }
}
