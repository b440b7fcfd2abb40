//! How much a policy may hold. What is over a limit is refused whole.

/// Bytes of a policy as JSON. It lies in the sandbox's record, which is written at every change.
pub const POLICY_BYTES_MAX: usize = 128 * 1024;
/// Rules of a policy.
pub const RULES_MAX: usize = 512;
/// Host rules of a policy.
pub const HOST_RULES_MAX: usize = 1024;
/// CIDR rules of a policy: each may become an element of an nft set.
pub const CIDR_RULES_MAX: usize = 256;
/// Bytes of a rule's name.
pub const NAME_BYTES_MAX: usize = 128;
/// Bytes of a path pattern, and of a path that a rewrite puts in place of another.
pub const PATH_PATTERN_BYTES_MAX: usize = 1024;
/// `*` in one path pattern.
pub const PATH_STARS_MAX: usize = 8;
/// Methods of a rule.
pub const METHODS_MAX: usize = 16;
/// Bytes of a method, in a rule and in a request.
pub const METHOD_BYTES_MAX: usize = 32;
/// Ports of a rule.
pub const PORTS_MAX: usize = 32;
/// Record types that a rule adds to those DNS answers.
pub const DNS_TYPES_MAX: usize = 8;
/// Header changes of a rule.
pub const HEADERS_MAX: usize = 32;
/// Bytes of a header's name.
pub const HEADER_NAME_BYTES_MAX: usize = 128;
/// Bytes of a header's value or of the format of one.
pub const HEADER_VALUE_BYTES_MAX: usize = 8 * 1024;
/// Bytes of all header names, values and formats of a policy.
pub const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a host name, the dots included (RFC 1035 less the root's).
pub const HOST_BYTES_MAX: usize = 253;
/// Bytes of one label of a host name.
pub const LABEL_BYTES_MAX: usize = 63;
/// Bytes of a request's path and query.
pub const TARGET_BYTES_MAX: usize = 8 * 1024;
/// Bytes of the id of a secret.
pub const SECRET_ID_BYTES_MAX: usize = 127;
/// Bytes of the name of a value in a secret.
pub const SECRET_KEY_BYTES_MAX: usize = 253;
/// Bytes of an identity's resource or resource id.
pub const RESOURCE_BYTES_MAX: usize = 1024;
