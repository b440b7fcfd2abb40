//! What a slot's rules have counted.

use std::io;

/// One counter of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotCounter {
    /// The ruleset's name for it.
    pub name: String,
    pub packets: u64,
    pub bytes: u64,
}

/// In the network namespace of this thread.
pub(super) fn read() -> io::Result<Vec<SlotCounter>> {
    let said = super::nft(&["list", "counters"], "")?;
    let said = String::from_utf8_lossy(&said);
    parse(&said).ok_or_else(|| io::Error::other("nft lists counters in an unknown form"))
}

/// Of the form `counter NAME { packets N bytes N }`, among words of the tables around them.
fn parse(said: &str) -> Option<Vec<SlotCounter>> {
    let mut words = said.split_whitespace();
    let mut counters = Vec::new();
    while let Some(word) = words.next() {
        if word != "counter" {
            continue;
        }
        let name = words.next()?.to_owned();
        let mut number = |before: &[&str]| {
            let as_expected = before.iter().all(|wanted| words.next() == Some(wanted));
            if as_expected { words.next()?.parse().ok() } else { None }
        };
        let packets = number(&["{", "packets"])?;
        let bytes = number(&["bytes"])?;
        counters.push(SlotCounter { name, packets, bytes });
    }
    Some(counters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_what_nft_says() {
        let said = "table netdev sandbox {\n\tcounter bad_mac {\n\t\tpackets 2 bytes 84\n\t}\n\
                    \n\tcounter passed_tcp {\n\t\tpackets 7 bytes 400\n\t}\n}\n";
        let [bad, passed] = parse(said).unwrap().try_into().unwrap();
        assert_eq!(bad, SlotCounter { name: "bad_mac".to_owned(), packets: 2, bytes: 84 });
        assert_eq!(passed, SlotCounter { name: "passed_tcp".to_owned(), packets: 7, bytes: 400 });
    }

    #[test]
    fn another_form_is_no_counter_of_zero() {
        assert_eq!(parse("counter a { bytes 1 packets 2 }"), None);
        assert_eq!(parse("counter a { packets"), None);
        assert_eq!(parse(""), Some(Vec::new()));
    }
}
