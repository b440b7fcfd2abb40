//! Tests of messages.

use proptest::prelude::*;

use super::*;

fn response(id: u16, name: &str, kind: u16, records: &[Record]) -> Vec<u8> {
    let query = Query::read(&write_query(id, name, kind)).unwrap();
    query.answer(Code::NoError, records, 65_535)
}

fn address(name: &str, address: &str) -> Record {
    let data = Data::Address(address.parse().unwrap());
    Record { name: name.to_owned(), ttl_seconds: 60, data }
}

#[test]
fn a_query_is_read_as_it_was_written() {
    let query = Query::read(&write_query(7, "AlLowed.test", kind::A)).unwrap();
    assert_eq!((query.id, query.kind, query.class), (7, kind::A, CLASS_IN));
    assert_eq!(query.name.as_deref(), Some("AlLowed.test"));
    assert!(query.edns && query.recursion_desired);
    assert_eq!(query.answer_bytes_max, 1232);
}

#[test]
fn an_answer_is_read_as_it_was_written() {
    let cname = Data::Cname("cdn.test".into());
    let records = [
        Record { name: "allowed.test".into(), ttl_seconds: 5, data: cname },
        address("cdn.test", "198.51.100.10"),
        address("cdn.test", "2001:db8::10"),
    ];
    let read = Response::read(&response(9, "allowed.test", kind::A, &records)).unwrap();
    assert_eq!((read.id, read.code, read.truncated), (9, Code::NoError, false));
    assert_eq!(read.records, records);
}

#[test]
fn b15_what_does_not_fit_is_cut_at_a_record_and_the_answer_says_so() {
    let records: Vec<_> =
        (0..100).map(|n| address("allowed.test", &format!("198.51.100.{n}"))).collect();
    let query = Query::read(&write_query(1, "allowed.test", kind::A)).unwrap();
    let bytes = query.answer(Code::NoError, &records, 512);
    let read = Response::read(&bytes).unwrap();
    assert!(bytes.len() <= 512 && read.truncated);
    assert_eq!(read.records, records[..read.records.len()]);
    assert!(read.records.len() > 10);
}

#[test]
fn a_name_that_points_at_itself_or_forward_is_refused() {
    let mut bytes = write_query(1, "", kind::A);
    for place in [12_u8, 13, 40, 255] {
        bytes[HEADER_BYTES] = 0xc0;
        bytes.insert(HEADER_BYTES + 1, place);
        assert_eq!(Query::read(&bytes), Err(BadMessage::Name), "to {place}");
        bytes.remove(HEADER_BYTES + 1);
    }
}

#[test]
fn a_name_with_odd_bytes_is_no_name_but_can_be_answered() {
    let mut bytes = write_query(1, "a.b", kind::A);
    bytes[HEADER_BYTES + 1] = 0;
    let query = Query::read(&bytes).unwrap();
    assert_eq!(query.name, None);
    assert_eq!(&query.error(Code::Refused)[2..4], &[0x81, 0x85]);
}

#[test]
fn a_service_record_loses_what_would_hide_names_or_bring_addresses() {
    let parameters = vec![
        (0, vec![0, 1, 0, 5]),
        (1, b"\x02h2".to_vec()),
        (4, vec![10, 0, 0, 1]),
        (5, vec![1, 2, 3]),
        (6, vec![0; 16]),
    ];
    let service = Service { kind: kind::HTTPS, priority: 1, target: String::new(), parameters };
    let record =
        Record { name: "allowed.test".into(), ttl_seconds: 60, data: Data::Service(service) };
    let read = Response::read(&response(1, "allowed.test", kind::HTTPS, &[record])).unwrap();
    let Data::Service(service) = &read.records[0].data else { panic!("{read:?}") };
    assert_eq!(service.parameters, [(0, vec![0, 1]), (1, b"\x02h2".to_vec())]);
}

#[test]
fn a_message_cut_anywhere_is_an_error_and_never_a_panic() {
    let whole = response(9, "allowed.test", kind::A, &[address("allowed.test", "198.51.100.1")]);
    // The additional record at the end is not looked at.
    for cut in 0..whole.len() - 11 {
        assert!(Response::read(&whole[..cut]).is_err(), "cut at {cut}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Query::read(&bytes);
        let _ = Response::read(&bytes);
        // And with a head that lets more of it be read.
        if let Some(head) = bytes.get_mut(2..12) {
            head.copy_from_slice(&[0x81, 0x80, 0, 1, 0, 5, 0, 0, 0, 0]);
        }
        if let Ok(read) = Response::read(&bytes) {
            for record in read.records {
                prop_assert!(record.name.len() <= NAME_BYTES_MAX);
            }
        }
    }
}
