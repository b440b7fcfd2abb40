//! Matches a device's modalias against the patterns of `modules.alias`.

/// Whether `name` fits `pattern`: `*`, `?` and `[a-f0-9]` as in fnmatch(3), without escapes.
///
/// At most `pattern × name` steps: a failed try goes back to the last star only.
pub(crate) fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at_pattern, mut at_name) = (0, 0);
    // Where to go on after a failure: behind the last star, one byte further in the name.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at_pattern) == Some(&b'*') {
            at_pattern += 1;
            retry = Some((at_pattern, at_name));
            continue;
        }
        match (one(&pattern[at_pattern..], name.get(at_name).copied()), &mut retry) {
            (Step::Took(bytes), _) => {
                at_pattern += bytes;
                at_name += 1;
            }
            (Step::Done, _) => return true,
            (Step::Failed, Some((from, next))) if *next < name.len() => {
                *next += 1;
                (at_pattern, at_name) = (*from, *next);
            }
            (Step::Failed, _) => return false,
        }
    }
}

enum Step {
    /// One byte of the name fitted this many bytes of the pattern.
    Took(usize),
    /// Both ended.
    Done,
    Failed,
}

fn one(pattern: &[u8], byte: Option<u8>) -> Step {
    match (pattern.first(), byte) {
        (None, None) => Step::Done,
        (None, Some(_)) | (Some(_), None) => Step::Failed,
        (Some(b'?'), Some(_)) => Step::Took(1),
        (Some(b'['), Some(byte)) => class(pattern, byte),
        (Some(literal), Some(byte)) if *literal == byte => Step::Took(1),
        _ => Step::Failed,
    }
}

/// `pattern` begins with `[`. A class without its end fits nothing.
fn class(pattern: &[u8], byte: u8) -> Step {
    let Some(end) = pattern.iter().position(|&b| b == b']') else { return Step::Failed };
    let mut rest = &pattern[1..end];
    while let Some((&low, after)) = rest.split_first() {
        let (high, after) = match after {
            [b'-', high, after @ ..] => (*high, after),
            _ => (low, after),
        };
        if (low..=high).contains(&byte) {
            return Step::Took(end + 1);
        }
        rest = after;
    }
    Step::Failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_fit_the_patterns_of_their_drivers() {
        for (pattern, name) in [
            ("virtio:d00000002v*", "virtio:d00000002v00001AF4"),
            (
                "pci:v00001AF4d*sv*sd*bc*sc*i*",
                "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00",
            ),
            ("pci:v*d*sv*sd*bc01sc08i02*", "pci:v00008086d00000953sv00008086sd00003702bc01sc08i02"),
            ("usb:v1234p*d0[0-3]*dc*", "usb:v1234p5678d0299dc00"),
            ("scsi:t-0x00*", "scsi:t-0x00"),
            ("a?c", "abc"),
            ("*", ""),
            ("", ""),
        ] {
            assert!(fits(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }

    #[test]
    fn other_devices_do_not() {
        for (pattern, name) in [
            ("virtio:d00000002v*", "virtio:d00000001v00001AF4"),
            ("pci:v*d*sv*sd*bc01sc08i02*", "pci:v00008086d00000953sv0sd0bc01sc06i01"),
            ("usb:v1234p*d0[0-3]*dc*", "usb:v1234p5678d0499dc00"),
            ("a?c", "ac"),
            ("abc", "abcd"),
            ("abcd", "abc"),
            ("a[bc", "ab"),
            ("", "a"),
        ] {
            assert!(!fits(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }

    #[test]
    fn many_stars_end_in_good_time() {
        let pattern = "*a".repeat(200) + "b";
        assert!(!fits(pattern.as_bytes(), "a".repeat(2000).as_bytes()));
    }
}
