//! Lists in pages. They are in the order of their ids, and a page begins after an id: what comes and
//! goes meanwhile moves nothing.

use holdfast_api::page::{PAGE_SIZE, Page, SKIP_PARAMETER};

use super::request::{Here, Query};

/// The page that `query` asks for. `id` names an item; items are in the order of their ids.
pub(super) fn page<T, U>(
    items: impl Iterator<Item = T>,
    query: &Query,
    here: &Here,
    id: impl Fn(&T) -> &str,
    answer: impl Fn(T) -> U,
) -> Page<U> {
    let after = query.get(SKIP_PARAMETER).unwrap_or_default();
    let mut rest = items.filter(|item| id(item) > after).peekable();
    let shown: Vec<T> = rest.by_ref().take(PAGE_SIZE).collect();
    let more = rest.peek().is_some();
    let last = shown.last().filter(|_| more);
    let next_link = last.map(|last| here.with(SKIP_PARAMETER, id(last)));
    Page { value: shown.into_iter().map(answer).collect(), next_link }
}
