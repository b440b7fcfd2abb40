//! Disk images: the create request and the answers.

use std::collections::BTreeMap;

use holdfast_model::Secret;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    decode::BadBody,
    labels::{self, Labels},
    sandbox::check_arguments,
};

/// Longest image reference, in bytes: host, repository (255), tag (128) and digest.
const REFERENCE_BYTES_MAX: usize = 1024;

/// Longest part of registry credentials, in bytes; bearer tokens of clouds are some kilobytes.
const CREDENTIAL_BYTES_MAX: usize = 16 * 1024;

/// Body of `PUT …/diskimages`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CreateDiskImage {
    pub image: ImageSpec,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry_credentials: Option<RegistryCredentials>,
    /// Not carried out yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub managed_identity_resource_id: Option<Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageSpec {
    /// Image reference; an archive's name for imported ones.
    pub base: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryCredentials {
    pub username: String,
    pub token: Secret,
}

impl CreateDiskImage {
    /// What the types do not say.
    pub fn check(&self) -> Result<(), BadBody> {
        if self.managed_identity_resource_id.is_some() {
            return Err(BadBody::NotYet { field: "managedIdentityResourceId" });
        }
        let base = &self.image.base;
        // The rest of a reference's grammar is its parser's affair; this keeps logs readable.
        let fits = (1..=REFERENCE_BYTES_MAX).contains(&base.len())
            && base.bytes().all(|b| b.is_ascii_graphic());
        if !fits {
            let reason = "must be an image reference such as docker.io/library/debian:trixie";
            return Err(BadBody::shape("image.base", reason));
        }
        check_arguments("image.entrypoint", self.image.entrypoint.as_deref())?;
        check_arguments("image.cmd", self.image.cmd.as_deref())?;
        if let Some(credentials) = &self.registry_credentials {
            let parts = [
                ("registryCredentials.username", credentials.username.as_str()),
                ("registryCredentials.token", credentials.token.reveal()),
            ];
            for (field, text) in parts {
                let fits = text.len() <= CREDENTIAL_BYTES_MAX && !text.contains(char::is_control);
                if !fits {
                    let reason = format!(
                        "has at most {CREDENTIAL_BYTES_MAX} bytes and no control characters"
                    );
                    return Err(BadBody::shape(field, reason));
                }
            }
        }
        labels::check(self.labels.as_ref().unwrap_or(&Labels::new()))
    }
}

/// One disk image of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskImage {
    pub id: String,
    /// The label `name`, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default)]
    pub labels: Labels,
    pub image: ImageSpec,
    pub status: ImageStatus,
    /// Manifest digest, once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    pub state: ImageState,
    /// Why it is Failed, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageState {
    Creating,
    Ready,
    Failed,
}

/// A disk image that every group of the node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicDiskImage {
    pub id: String,
    pub name: String,
    pub status: ImageStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    fn check(text: &str) -> Result<(), BadBody> {
        decode::<CreateDiskImage>(text.as_bytes())?.check()
    }

    #[test]
    fn what_the_sdk_sends_is_read() {
        let text = r#"{"image":{"base":"localhost:5000/a:b","entrypoint":["/x"],"cmd":[]},
            "labels":{"name":"n"},"registryCredentials":{"username":"u","token":"t"}}"#;
        assert_eq!(check(text), Ok(()));
    }

    #[test]
    fn what_cannot_be_worked_with_is_refused_by_its_field() {
        let cases = [
            ("{}", "image.base: "),
            (r#"{"image":{"base":"a b"}}"#, "image.base: "),
            (r#"{"image":{"base":"a","entrypoint":[""]}}"#, "image.entrypoint: "),
            (
                r#"{"image":{"base":"a"},"managedIdentityResourceId":"x"}"#,
                "managedIdentityResourceId ",
            ),
            (r#"{"image":{"base":"a"},"labels":{"":"x"}}"#, "labels.: "),
            (
                r#"{"image":{"base":"a"},"registryCredentials":{"username":"a\n","token":""}}"#,
                "registryCredentials.username: ",
            ),
        ];
        for (text, start) in cases {
            let error = check(text).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }

    #[test]
    fn a_token_is_not_in_debug_output() {
        let text =
            r#"{"image":{"base":"a"},"registryCredentials":{"username":"u","token":"hush"}}"#;
        let request: CreateDiskImage = decode(text.as_bytes()).unwrap();
        assert!(!format!("{request:?}").contains("hush"));
    }

    #[test]
    fn the_answer_has_the_form_the_sdk_reads() {
        let image = DiskImage {
            id: "a".repeat(20),
            name: Some("n".to_owned()),
            labels: [("name".to_owned(), "n".to_owned())].into(),
            image: ImageSpec { base: "b".to_owned(), ..ImageSpec::default() },
            status: ImageStatus { state: ImageState::Ready, message: None },
            digest: None,
            created_at: None,
        };
        let golden = r#"{"id":"aaaaaaaaaaaaaaaaaaaa","name":"n","labels":{"name":"n"},"image":{"base":"b"},"status":{"state":"Ready"}}"#;
        assert_eq!(serde_json::to_string(&image).unwrap(), golden);
    }
}
