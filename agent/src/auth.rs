//! Who may call: bearer tokens, kept as SHA-256. One admin token today; scopes join with groups'
//! own tokens.

use std::path::{Path, PathBuf};

use fs_err as fs;
use holdfast_model::Secret;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::durable::{self, Readers};

/// Hashes of the tokens, in the state folder.
const TOKENS_FILE: &str = "tokens.json";

/// The admin token made at first boot, for the operator to fetch and remove.
pub const ADMIN_TOKEN_FILE: &str = "admin-token";

/// Random bytes of a token: past guessing.
const TOKEN_RANDOM_BYTES: usize = 32;

/// Longest `Authorization` header that is hashed, in bytes; clouds' tokens are some kilobytes.
const HEADER_BYTES_MAX: usize = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("cannot keep the tokens")]
    File(#[from] std::io::Error),
    #[error("{} is not a list of tokens", path.display())]
    Form {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the kernel gave no random bytes")]
    Random(#[from] getrandom::Error),
}

/// One token, by the name that the audit log uses.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Known {
    name: String,
    /// 64 hex digits.
    sha256: String,
}

/// Whose token a call came with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub name: String,
}

/// Every token this node knows.
#[derive(Debug)]
pub struct Tokens(Vec<Known>);

impl Tokens {
    /// The configured admin token alone, or the ones of the state folder; there, an admin token is
    /// made if there is none.
    pub fn load(state: &Path, configured: Option<&Secret>) -> Result<Self, AuthError> {
        if let Some(token) = configured {
            return Ok(Self(vec![admin(token.reveal())]));
        }
        let path = state.join(TOKENS_FILE);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Self)
                .map_err(|source| AuthError::Form { path, source }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::make(state, &path),
            Err(error) => Err(error.into()),
        }
    }

    fn make(state: &Path, path: &Path) -> Result<Self, AuthError> {
        let mut random = [0; TOKEN_RANDOM_BYTES];
        getrandom::fill(&mut random)?;
        let token = format!("hf_{}", hex(&random));
        let known = vec![admin(&token)];
        // The token first: hashes without it would lock everyone out.
        let line = format!("{token}\n");
        durable::replace(&state.join(ADMIN_TOKEN_FILE), line.as_bytes(), Readers::Owner)?;
        let list = serde_json::to_vec(&known).map_err(std::io::Error::from)?;
        durable::replace(path, &list, Readers::Owner)?;
        Ok(Self(known))
    }

    /// Whose token `authorization` (the header's value) carries.
    pub fn caller(&self, authorization: &[u8]) -> Option<Caller> {
        if authorization.len() > HEADER_BYTES_MAX {
            return None;
        }
        let (scheme, token) = authorization.split_at_checked("Bearer ".len())?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return None;
        }
        let sent = sha256(token.trim_ascii());
        // Every token is compared, each in full: how long it takes tells nothing.
        let mut found = None;
        for known in &self.0 {
            if same(known.sha256.as_bytes(), sent.as_bytes()) {
                found = Some(Caller { name: known.name.clone() });
            }
        }
        found
    }
}

fn admin(token: &str) -> Known {
    Known { name: "admin".to_owned(), sha256: sha256(token.as_bytes()) }
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares without stopping at the first difference.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(token: &str) -> Vec<u8> {
        format!("Bearer {token}").into_bytes()
    }

    #[test]
    fn the_token_made_at_first_boot_works_after_a_restart_and_no_other_does() {
        let state = tempfile::tempdir().unwrap();
        Tokens::load(state.path(), None).unwrap();
        let tokens = Tokens::load(state.path(), None).unwrap();
        let token = fs::read_to_string(state.path().join(ADMIN_TOKEN_FILE)).unwrap();
        let token = token.trim_end();
        assert!(token.starts_with("hf_") && token.len() == 67, "{}", token.len());
        assert_eq!(tokens.caller(&header(token)).unwrap().name, "admin");
        let cut = &token[..66];
        for wrong in ["", "hf_", cut, &format!("{token}0"), &token.to_uppercase()] {
            assert_eq!(tokens.caller(&header(wrong)), None);
        }
        assert_eq!(tokens.caller(token.as_bytes()), None, "without the scheme");
        assert_eq!(tokens.caller(format!("Basic {token}").as_bytes()), None);
    }

    #[test]
    fn the_state_folder_holds_no_token_but_in_its_own_file() {
        let state = tempfile::tempdir().unwrap();
        Tokens::load(state.path(), None).unwrap();
        let token = fs::read_to_string(state.path().join(ADMIN_TOKEN_FILE)).unwrap();
        let list = fs::read_to_string(state.path().join(TOKENS_FILE)).unwrap();
        assert!(!list.contains(token.trim_end()));
    }

    #[test]
    fn a_configured_token_is_the_only_one() {
        let state = tempfile::tempdir().unwrap();
        let tokens = Tokens::load(state.path(), Some(&Secret::new("sixteen-letters!"))).unwrap();
        assert!(tokens.caller(&header("sixteen-letters!")).is_some());
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
    }
}
