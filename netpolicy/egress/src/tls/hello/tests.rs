//! Tests of the first message.

use proptest::prelude::*;

use super::*;

/// A ClientHello of a real client, as one record, with more padding.
fn client_hello(name: &str, padding: usize) -> Vec<u8> {
    let mut extensions = Vec::new();
    let mut extend = |kind: u16, content: &[u8]| {
        extensions.extend(kind.to_be_bytes());
        extensions.extend(u16::try_from(content.len()).unwrap().to_be_bytes());
        extensions.extend(content);
    };
    let length = u16::try_from(name.len()).unwrap();
    let mut list = (length + 3).to_be_bytes().to_vec();
    list.push(0);
    list.extend(length.to_be_bytes());
    list.extend(name.as_bytes());
    extend(EXTENSION_SERVER_NAME, &list);
    extend(EXTENSION_ALPN, b"\0\x0c\x02h2\x08http/1.1");
    extend(EXTENSION_SUPPORTED_VERSIONS, &[2, 3, 4]);
    extend(21, &vec![0; padding]);
    message(&extensions)
}

fn message(extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let mut message = vec![CLIENT_HELLO];
    message.extend(&u32::try_from(body.len()).unwrap().to_be_bytes()[1..]);
    message.extend(body);
    message
}

fn records(message: &[u8], bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for part in message.chunks(bytes) {
        out.extend([RECORD_HANDSHAKE, 3, 1]);
        out.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
        out.extend(part);
    }
    out
}

fn name(bytes: &[u8]) -> Result<Option<String>, BadHello> {
    read(bytes).map(|hello| hello.and_then(|hello| hello.server_name))
}

#[test]
fn c8_a_hello_cut_anywhere_asks_for_more_and_then_says_the_name() {
    for record_bytes in [1, 7, 40, 16_384] {
        let whole = records(&client_hello("allowed.test", 10), record_bytes);
        for cut in 0..whole.len() {
            assert_eq!(read(&whole[..cut]), Ok(None), "{record_bytes}, cut at {cut}");
        }
        let hello = read(&whole).unwrap().unwrap();
        let expected = Hello { server_name: Some("allowed.test".into()), offers_h2: true };
        assert_eq!(hello, expected, "{record_bytes}");
    }
}

#[test]
fn c9_a_hello_of_15_kib_is_read() {
    let whole = records(&client_hello("allowed.test", 15 * 1024), 16_384);
    assert_eq!(name(&whole), Ok(Some("allowed.test".into())));
}

#[test]
fn c10_a_hello_over_the_limit_is_refused_before_it_is_all_there() {
    let whole = records(&client_hello("allowed.test", 60_000), 16_384);
    assert_eq!(name(&whole[..100]), Err(BadHello::TooLong));
    let crumbs = records(&client_hello("allowed.test", 4000), 1);
    assert_eq!(name(&crumbs), Err(BadHello::TooLong));
}

#[test]
fn c6_a_name_that_is_none_is_refused() {
    for odd in ["", "a\0.test", "a b.test", &"a".repeat(300)] {
        assert_eq!(name(&records(&client_hello(odd, 0), 16_384)), Err(BadHello::Name), "{odd}");
    }
    assert_eq!(name(&records(&message(&[]), 16_384)), Ok(None));
}

#[test]
fn c11_what_is_not_a_handshake_is_refused_at_its_first_byte() {
    // An alert, a change of cipher spec, SSLv2, HTTP, SSH.
    for first in [&[21_u8, 3, 1][..], &[20, 3, 1], &[0x80, 0x2e], b"GET", b"SSH"] {
        assert_eq!(name(first), Err(BadHello::NotTls), "{first:?}");
    }
    assert_eq!(name(&[RECORD_HANDSHAKE, 3, 1, 0, 0]), Err(BadHello::Malformed));
}

#[test]
fn a_second_server_name_is_refused_in_one_extension_or_two() {
    let one = b"\0\0\0\x06\0\x04\0\0\x01a";
    let twice = [&one[..], &one[..]].concat();
    assert_eq!(name(&records(&message(&twice), 16_384)), Err(BadHello::Malformed));
    let list = b"\0\0\0\x0a\0\x08\0\0\x01a\0\0\x01b";
    assert_eq!(name(&records(&message(list), 16_384)), Err(BadHello::Name));
}

#[test]
fn c11_a_client_of_tls_1_1_is_refused() {
    let mut old = message(&[]);
    old[5] = 2;
    assert_eq!(name(&records(&old, 16_384)), Err(BadHello::Version));
}

proptest! {
    #[test]
    fn any_bytes_are_a_hello_or_more_or_an_error(bytes: Vec<u8>, place: prop::sample::Index, byte: u8) {
        let _ = read(&bytes);
        let _ = hello(&bytes);
        let mut whole = records(&client_hello("allowed.test", 3), 64);
        let place = place.index(whole.len());
        whole[place] = byte;
        let _ = read(&whole);
    }
}
