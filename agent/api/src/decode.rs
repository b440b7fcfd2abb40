//! From the bytes of a request body to a value, with errors that say where.

use serde::de::DeserializeOwned;

use crate::error::Code;

/// Why a body was refused. `code` and `hint` go into the answer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBody {
    #[error("the body is not JSON: {reason}")]
    Syntax { reason: String },
    #[error("{field}: {reason}")]
    Shape { field: String, reason: String },
    #[error("{field} is not carried out by this node yet")]
    NotYet { field: &'static str },
    #[error("{0}")]
    Resources(#[from] holdfast_model::sandbox::BadResources),
}

impl BadBody {
    pub(crate) fn shape(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Shape { field: field.into(), reason: reason.into() }
    }

    pub fn code(&self) -> Code {
        match self {
            Self::Syntax { .. } => Code::MalformedJson,
            Self::Shape { .. } => Code::InvalidRequest,
            Self::NotYet { .. } => Code::UnsupportedField,
            Self::Resources(_) => Code::InvalidResourceTier,
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            Self::Syntax { .. } => "send one JSON object in UTF-8",
            Self::Shape { .. } => "correct the field and send the request again",
            Self::NotYet { .. } => "leave the field out",
            Self::Resources(_) => {
                "tiers: 250m/512Mi, 500m/1024Mi, 1000m/2048Mi, 2000m/4096Mi, 4000m/8192Mi"
            }
        }
    }
}

/// Reads one JSON value that is the whole of `bytes`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BadBody> {
    let mut input = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut input).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.inner().to_string();
        if error.inner().is_data() {
            // At the top there is no field to name: the reason itself names an unknown one.
            let field = if path == "." { "body".to_owned() } else { path };
            BadBody::Shape { field, reason }
        } else {
            BadBody::Syntax { reason }
        }
    })?;
    input.end().map_err(|error| BadBody::Syntax { reason: error.to_string() })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sandbox::CreateSandbox;

    #[test]
    fn malformed_json_is_refused_with_line_and_column() {
        let cases: [&[u8]; 5] =
            [b"", b"{", b"{\n\"labels\" 1}", b"{}{}", b"{\"labels\":{\"a\":\"\xff\"}}"];
        for bytes in cases {
            let error = decode::<CreateSandbox>(bytes).unwrap_err();
            assert_eq!(error.code(), Code::MalformedJson, "{error}");
            let text = error.to_string();
            assert!(text.contains("line ") && text.contains("column "), "{text}");
        }
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named_by_its_path() {
        let error =
            decode::<CreateSandbox>(br#"{"sourcesRef":{"diskImage":{"id":5}}}"#).unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest);
        assert!(error.to_string().starts_with("sourcesRef.diskImage.id: "), "{error}");
    }

    #[test]
    fn an_unknown_field_is_named_wherever_it_is() {
        for text in
            [r#"{"colour":1}"#, r#"{"resources":{"cpu":"1000m","memory":"2Gi","colour":1}}"#]
        {
            let error = decode::<CreateSandbox>(text.as_bytes()).unwrap_err();
            assert_eq!(error.code(), Code::InvalidRequest);
            assert!(error.to_string().contains("unknown field `colour`"), "{error}");
        }
    }

    #[test]
    fn a_body_nested_without_end_is_refused() {
        let body = "[".repeat(crate::JSON_BYTES_MAX);
        assert!(decode::<serde_json::Value>(body.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<CreateSandbox>(&bytes);
        }
    }
}
