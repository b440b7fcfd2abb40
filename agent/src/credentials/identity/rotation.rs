//! Which key signs tokens at a time, when there is to be another, and when one is of no more use.
//! A key is shown before it signs, so that who keeps a copy of the keys has it in time, and for as
//! long as a token it signed may be looked at.

use holdfast_store::SigningKeyRecord;

use super::issuer::TOKEN_MS;

/// How long a key signs.
const SIGNS_MS: u64 = 30 * 24 * 3600 * 1000;

/// How long before it signs a key is shown.
const SHOWN_BEFORE_MS: u64 = 24 * 3600 * 1000;

/// How far the clock of who looks at a token may be behind.
const CLOCKS_MS: u64 = 5 * 60 * 1000;

/// The key that signs now: the newest whose time has come. Of keys none of whose time has come, as
/// after a clock that went back, the oldest.
pub(super) fn signer(keys: &[SigningKeyRecord], now_ms: u64) -> Option<&SigningKeyRecord> {
    let come = keys.iter().filter(|key| key.signs_from_ms <= now_ms);
    let newest = come.max_by_key(|key| key.signs_from_ms);
    newest.or_else(|| keys.iter().min_by_key(|key| key.signs_from_ms))
}

/// From when on another key is to sign, if it is to be made now.
pub(super) fn next_signs_from_ms(keys: &[SigningKeyRecord], now_ms: u64) -> Option<u64> {
    let Some(last) = keys.iter().map(|key| key.signs_from_ms).max() else {
        // There was none to be shown earlier.
        return Some(now_ms);
    };
    let due = last.saturating_add(SIGNS_MS);
    // A node that was off when the next was due shows it for as long all the same.
    let from = due.max(now_ms.saturating_add(SHOWN_BEFORE_MS));
    (now_ms >= due - SHOWN_BEFORE_MS).then_some(from)
}

/// Ids of keys by whose tokens nobody can be known any more.
pub(super) fn over(keys: &[SigningKeyRecord], now_ms: u64) -> Vec<String> {
    let is_over = |key: &&SigningKeyRecord| {
        let later = keys.iter().map(|other| other.signs_from_ms);
        let next = later.filter(|from| *from > key.signs_from_ms).min();
        next.is_some_and(|from| now_ms >= from.saturating_add(TOKEN_MS + CLOCKS_MS))
    };
    keys.iter().filter(is_over).map(|key| key.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 24 * 3600 * 1000;
    const START_MS: u64 = 1000 * DAY_MS;

    fn key(id: &str, signs_from_ms: u64) -> SigningKeyRecord {
        SigningKeyRecord { id: id.to_owned(), wrapped: Vec::new(), signs_from_ms }
    }

    #[test]
    fn the_first_key_signs_at_once_and_the_next_is_shown_a_day_before_it_does() {
        assert_eq!(next_signs_from_ms(&[], START_MS), Some(START_MS));
        let mut keys = vec![key("a", START_MS)];
        assert_eq!(next_signs_from_ms(&keys, START_MS + 29 * DAY_MS - 1), None);
        let next = next_signs_from_ms(&keys, START_MS + 29 * DAY_MS).unwrap();
        assert_eq!(next, START_MS + 30 * DAY_MS);
        keys.push(key("b", next));
        assert_eq!(next_signs_from_ms(&keys, START_MS + 29 * DAY_MS), None);
        assert_eq!(signer(&keys, next - 1).unwrap().id, "a");
        assert_eq!(signer(&keys, next).unwrap().id, "b");
    }

    #[test]
    fn a_node_that_was_off_shows_its_next_key_for_a_day_too() {
        let (keys, now_ms) = ([key("a", START_MS)], START_MS + 100 * DAY_MS);
        assert_eq!(next_signs_from_ms(&keys, now_ms), Some(now_ms + DAY_MS));
    }

    #[test]
    fn a_key_is_kept_until_the_last_token_it_signed_is_over_on_every_clock() {
        let keys =
            [key("a", START_MS), key("b", START_MS + DAY_MS), key("c", START_MS + 9 * DAY_MS)];
        let end = START_MS + DAY_MS + TOKEN_MS + CLOCKS_MS;
        assert_eq!(over(&keys, end - 1), Vec::<String>::new());
        assert_eq!(over(&keys, end), ["a"]);
        assert_eq!(over(&keys, START_MS + 1000 * DAY_MS), ["a", "b"]);
    }

    #[test]
    fn a_clock_that_went_back_finds_a_key() {
        let keys = [key("b", START_MS + 1), key("a", START_MS)];
        assert_eq!(signer(&keys, START_MS - DAY_MS).unwrap().id, "a");
        assert_eq!(next_signs_from_ms(&keys, 0), None);
        assert!(signer(&[], 0).is_none());
    }
}
