//! Conversions under way. Disk images of one reference and one set of credentials share one.

use holdfast_model::DiskImageId;
use holdfast_wire::convert::Progress;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Credentials;

/// Conversions under way or waiting for their turn.
pub(super) const FLIGHTS_MAX: usize = 64;

/// What is the same pull: a private image is never handed to whoever has other credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FlightKey {
    pub(super) reference: String,
    pub(super) credentials: Option<Credentials>,
}

#[derive(Debug)]
struct Flight {
    number: u64,
    /// `None`: an archive, which nobody else has.
    key: Option<FlightKey>,
    members: Vec<DiskImageId>,
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
}

/// The conversions under way.
#[derive(Debug, Default)]
pub(super) struct Flights {
    flights: Vec<Flight>,
    next_number: u64,
}

/// A conversion that is to be begun by whoever got this.
#[derive(Debug)]
pub(super) struct Departure {
    pub(super) number: u64,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) cancel: CancellationToken,
}

/// What becomes of a disk image that wants to board.
#[derive(Debug)]
pub(super) enum Boarding {
    /// It goes with one that is under way.
    Joined,
    First(Departure),
    /// Too many are under way.
    Full,
}

impl Flights {
    pub(super) fn board(&mut self, key: Option<FlightKey>, member: DiskImageId) -> Boarding {
        let same = |flight: &&mut Flight| key.is_some() && flight.key == key;
        if let Some(flight) = self.flights.iter_mut().find(same) {
            flight.members.push(member);
            return Boarding::Joined;
        }
        if self.flights.len() >= FLIGHTS_MAX {
            return Boarding::Full;
        }
        let number = self.next_number;
        self.next_number += 1;
        let (sender, progress) = watch::channel(Progress::default());
        let cancel = CancellationToken::new();
        let departure = Departure { number, progress: sender, cancel: cancel.clone() };
        self.flights.push(Flight { number, key, members: vec![member], progress, cancel });
        Boarding::First(departure)
    }

    /// Ends a flight. Gives the disk images whose outcome is now known.
    pub(super) fn land(&mut self, number: u64) -> Vec<DiskImageId> {
        match self.flights.iter().position(|flight| flight.number == number) {
            Some(index) => self.flights.swap_remove(index).members,
            None => Vec::new(),
        }
    }

    /// Takes a disk image off its flight. A flight nobody is on is given up.
    pub(super) fn leave(&mut self, member: &DiskImageId) {
        for flight in &mut self.flights {
            flight.members.retain(|known| known != member);
            if flight.members.is_empty() {
                flight.cancel.cancel();
                // Nobody may board what is being given up.
                flight.key = None;
            }
        }
    }

    pub(super) fn progress(&self, member: &DiskImageId) -> Option<Progress> {
        let flight = self.flights.iter().find(|flight| flight.members.contains(member))?;
        Some(flight.progress.borrow().clone())
    }

    pub(super) fn cancel_all(&mut self) {
        for flight in &mut self.flights {
            flight.cancel.cancel();
            flight.key = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_model::Secret;

    use super::*;

    fn id(byte: u8) -> DiskImageId {
        DiskImageId::from_random([byte; 20])
    }

    fn key(secret: Option<&str>) -> Option<FlightKey> {
        let credentials = secret
            .map(|secret| Credentials { username: "u".to_owned(), secret: Secret::new(secret) });
        Some(FlightKey { reference: "r.io/a:1".to_owned(), credentials })
    }

    fn first(boarding: Boarding) -> Departure {
        match boarding {
            Boarding::First(departure) => departure,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_same_reference_with_the_same_credentials_is_pulled_once() {
        let mut flights = Flights::default();
        let departure = first(flights.board(key(Some("a")), id(1)));
        assert!(matches!(flights.board(key(Some("a")), id(2)), Boarding::Joined));
        assert_eq!(flights.land(departure.number), [id(1), id(2)]);
        first(flights.board(key(Some("a")), id(3)));
    }

    #[test]
    fn other_credentials_and_archives_never_share() {
        let mut flights = Flights::default();
        for key in [key(None), key(Some("a")), key(Some("b")), None, None] {
            first(flights.board(key, id(1)));
        }
    }

    #[test]
    fn a_flight_is_given_up_when_its_last_member_leaves_and_nobody_boards_it_then() {
        let mut flights = Flights::default();
        let departure = first(flights.board(key(None), id(1)));
        assert!(matches!(flights.board(key(None), id(2)), Boarding::Joined));
        flights.leave(&id(1));
        assert!(!departure.cancel.is_cancelled());
        flights.leave(&id(2));
        assert!(departure.cancel.is_cancelled());
        first(flights.board(key(None), id(3)));
    }

    #[test]
    fn one_flight_more_than_the_limit_is_refused() {
        let mut flights = Flights::default();
        for _ in 0..FLIGHTS_MAX {
            first(flights.board(None, id(1)));
        }
        assert!(matches!(flights.board(None, id(1)), Boarding::Full));
    }
}
