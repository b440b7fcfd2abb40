//! Name of a command that outlives its connection, made by the client.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

const ID_BYTES: usize = 16;

/// 128 random bits, as 32 hex digits: whoever does not know it cannot attach to the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ExecId([u8; ID_BYTES]);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an exec id has {} digits of 0-9 and a-f", 2 * ID_BYTES)]
pub struct BadExecId;

impl ExecId {
    /// The caller brings the randomness.
    pub const fn from_random(random: [u8; ID_BYTES]) -> Self {
        Self(random)
    }

    pub const fn bytes(self) -> [u8; ID_BYTES] {
        self.0
    }
}

impl fmt::Display for ExecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for ExecId {
    type Err = BadExecId;

    fn from_str(text: &str) -> Result<Self, BadExecId> {
        let allowed = |b| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 2 * ID_BYTES || !text.bytes().all(allowed) {
            return Err(BadExecId);
        }
        u128::from_str_radix(text, 16).map(|id| Self(id.to_be_bytes())).map_err(|_| BadExecId)
    }
}

impl TryFrom<String> for ExecId {
    type Error = BadExecId;

    fn try_from(text: String) -> Result<Self, BadExecId> {
        text.parse()
    }
}

impl From<ExecId> for String {
    fn from(id: ExecId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_form() {
        let id = ExecId::from_random([0x0a; ID_BYTES]);
        let text = "0a".repeat(ID_BYTES);
        assert_eq!((id.to_string(), text.parse()), (text.clone(), Ok(id)));
        for wrong in ["", "0a", &text.to_uppercase(), &format!("+{}", &text[1..])] {
            assert_eq!(wrong.parse::<ExecId>(), Err(BadExecId), "{wrong}");
        }
    }
}
