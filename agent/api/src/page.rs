//! One page of a list.

use serde::{Deserialize, Serialize};

/// Things on one page. Large enough that most lists are one answer.
pub const PAGE_SIZE: usize = 100;

/// Query parameter that says after which thing a page begins.
pub const SKIP_PARAMETER: &str = "skipToken";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Page<T> {
    pub value: Vec<T>,
    /// Where the next page is; none on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_link: Option<String>,
}
