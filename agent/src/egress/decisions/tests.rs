//! What is kept of decisions, and for how long.

use holdfast_model::{Digest, GroupKey, SandboxSpec, State, id::ID_BYTES, sandbox::ImageSource};
use holdfast_store::SandboxRecord;

use super::*;

fn id(byte: u8) -> SandboxId {
    SandboxId::from_random([byte; ID_BYTES])
}

fn sandbox(byte: u8) -> SandboxRecord {
    SandboxRecord {
        state: State::Running,
        ..SandboxRecord::accepted(
            id(byte),
            GroupKey::local_default(),
            SandboxSpec::of_image(ImageSource::Public("debian".to_owned())),
            Digest::from_sha256([0; 32]),
            0,
        )
    }
}

struct Fixture {
    store: Arc<Store>,
    _folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store.redb")).unwrap());
        store.put_sandbox(&sandbox(1)).unwrap();
        store.put_sandbox(&sandbox(2)).unwrap();
        Self { store, _folder: folder }
    }

    fn decisions(&self) -> Arc<Decisions> {
        self.with_room(BYTES_MAX)
    }

    fn with_room(&self, bytes_max: usize) -> Arc<Decisions> {
        let metrics = Arc::new(Metrics::new().unwrap());
        Decisions::with_room(Arc::clone(&self.store), metrics, bytes_max).unwrap()
    }
}

fn decided(allowed: bool, host: &str) -> Decided {
    Decided { allowed, host: host.to_owned(), ..Decided::default() }
}

fn hosts(records: &[DecisionRecord]) -> Vec<&str> {
    records.iter().map(|record| record.host.as_str()).collect()
}

#[test]
fn f10_a_flood_of_denials_is_counted_and_pushes_out_nothing_that_was_allowed() {
    let decisions = Fixture::new();
    let decisions = decisions.decisions();
    decisions.record(&id(1), decided(true, "first"));
    for number in 0..10_000 {
        decisions.record(&id(1), decided(false, &number.to_string()));
    }
    let report = decisions.report(&id(1), 0);
    assert_eq!(hosts(&report.allowed), ["first"]);
    assert_eq!(report.denied.len(), KEPT_MAX);
    assert_eq!(report.denied.last().unwrap().host, "9999");
    assert_eq!((report.last_sequence, report.dropped), (10_001, 10_000 - 512));
    assert_eq!(decisions.report(&id(2), 0), Report::default());
}

#[test]
fn f10_nothing_that_a_guest_sends_reaches_a_terminal_or_fills_the_log() {
    let fixture = Fixture::new();
    let decisions = fixture.decisions();
    let hostile = Decided {
        host: "a\r\nb\u{1b}[31m\"\u{202e}c\0".to_owned(),
        method: "M".repeat(10_000),
        path: format!("/\u{9b}x{}?token=hunter2", "é".repeat(1000)),
        reason: "\u{7f}".to_owned(),
        ..Decided::default()
    };
    decisions.record(&id(1), hostile);
    let without_path = Decided { path: "/p?token=hunter2#x".to_owned(), ..Decided::default() };
    decisions.record(&id(1), without_path);
    let report = decisions.report(&id(1), 0);
    let [kept, other] = &report.denied[..] else { panic!() };
    assert_eq!(kept.host, "a\u{fffd}\u{fffd}b\u{fffd}[31m\"\u{fffd}c\u{fffd}");
    assert_eq!((kept.method.len(), &*kept.reason), (32, "\u{fffd}"));
    assert!(kept.path.starts_with("/\u{fffd}xéé") && kept.path.len() <= PATH_BYTES_MAX);
    assert_eq!(other.path, "/p");
    assert!(!format!("{report:?}").contains("hunter2"));
}

#[test]
fn what_was_written_is_there_after_a_restart_and_what_was_pushed_out_is_not() {
    let fixture = Fixture::new();
    let decisions = fixture.decisions();
    for number in 0..600 {
        decisions.record(&id(1), decided(number % 2 == 0, &number.to_string()));
    }
    decisions.write().unwrap();
    for number in 600..1800 {
        decisions.record(&id(1), decided(number % 2 == 0, &number.to_string()));
    }
    decisions.write().unwrap();
    decisions.record(&id(1), decided(true, "unwritten"));
    let before = decisions.report(&id(1), 0);
    let again = fixture.decisions();
    let after = again.report(&id(1), 0);
    let (_, written) = before.allowed.split_last().unwrap();
    // The one that was not written had pushed another out.
    assert_eq!(after.allowed[1..], *written);
    assert_eq!(after.denied, before.denied);
    assert_eq!(after.last_sequence, 1800);
    assert_eq!(fixture.store.decisions(&id(1)).unwrap().len(), 2 * KEPT_MAX);
    again.record(&id(1), decided(true, "next"));
    assert_eq!(again.report(&id(1), 1800).allowed[0].sequence, 1801);
}

#[test]
fn a_sandbox_that_is_gone_leaves_nothing_and_nothing_is_kept_for_one_that_never_was() {
    let fixture = Fixture::new();
    let decisions = fixture.decisions();
    decisions.record(&id(1), decided(true, "a"));
    decisions.record(&id(3), decided(true, "a"));
    decisions.write().unwrap();
    decisions.record(&id(1), decided(true, "b"));
    // Its record goes first, as in a deletion that the agent does not survive.
    fixture.store.remove_sandbox(&id(1)).unwrap();
    decisions.write().unwrap();
    assert_eq!(fixture.store.all_decisions().unwrap(), []);
    decisions.forget(&id(1));
    decisions.record(&id(1), decided(true, "late"));
    assert_eq!(decisions.report(&id(1), 0), Report::default());
    assert_eq!(decisions.table().bytes, 0);
}

#[test]
fn over_the_budget_of_the_node_a_sandbox_pushes_out_its_own() {
    let fixture = Fixture::new();
    let one = bytes_of(&decided(true, "0").into_record(&id(1), 0));
    let decisions = fixture.with_room(100 * one);
    decisions.record(&id(2), decided(true, "0"));
    for _ in 0..500 {
        decisions.record(&id(1), decided(true, "0"));
    }
    assert_eq!(decisions.report(&id(1), 0).allowed.len(), 99);
    assert_eq!(decisions.report(&id(2), 0).allowed.len(), 1);
    for _ in 0..500 {
        decisions.record(&id(2), decided(true, "0"));
    }
    assert_eq!(decisions.report(&id(2), 0).allowed.len(), KEPT_MIN);
}

#[test]
fn what_was_only_counted_is_counted() {
    let fixture = Fixture::new();
    let decisions = fixture.decisions();
    decisions.record(&id(1), decided(false, "a"));
    decisions.missed(&id(1), 41);
    let report = decisions.report(&id(1), 0);
    assert_eq!((report.last_sequence, report.dropped), (42, 41));
}

#[test]
fn the_bytes_of_a_flow_are_on_its_record_when_it_has_ended_also_in_the_store() {
    let fixture = Fixture::new();
    let decisions = fixture.decisions();
    let of_flow = |flow, host: &str| Decided { flow, ..decided(true, host) };
    decisions.record(&id(1), of_flow(1, "first"));
    decisions.record(&id(1), of_flow(2, "second"));
    decisions.record(&id(1), of_flow(0, "told nothing more of"));
    decisions.write().unwrap();
    let carried = |flow, sent_bytes, received_bytes| Carried { flow, sent_bytes, received_bytes };
    decisions.ended(&id(1), carried(2, 20, 200));
    decisions.ended(&id(1), carried(2, 9, 9));
    decisions.ended(&id(1), carried(0, 9, 9));
    decisions.ended(&id(1), carried(7, 9, 9));
    decisions.ended(&id(2), carried(1, 9, 9));
    let bytes = |decisions: &Decisions| -> Vec<_> {
        let allowed = decisions.report(&id(1), 0).allowed;
        allowed.iter().map(|record| (record.sent_bytes, record.received_bytes)).collect()
    };
    let expected = [(0, 0), (20, 200), (0, 0)];
    assert_eq!(bytes(&decisions), expected);
    decisions.write().unwrap();
    assert_eq!(bytes(&fixture.decisions()), expected, "another agent knows less");

    // One that is pushed out while it goes on is of nobody.
    for number in 0..2 * KEPT_MAX as u64 {
        decisions.record(&id(1), of_flow(10 + number, "more"));
    }
    decisions.ended(&id(1), carried(1, 9, 9));
    let report = decisions.report(&id(1), 0);
    assert!(report.allowed.iter().all(|record| record.sent_bytes == 0));
    decisions.ended(&id(1), carried(9 + 2 * KEPT_MAX as u64, 5, 6));
    let last = decisions.report(&id(1), 0).allowed.pop().unwrap();
    assert_eq!((last.sent_bytes, last.received_bytes), (5, 6));
}
