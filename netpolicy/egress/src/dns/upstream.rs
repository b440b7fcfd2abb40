//! Asking a resolver. Whoever wants to answer in its place must guess port, number and the case of
//! every letter.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::message::{self, BadMessage, Code, Response};

/// How long one resolver may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// How often all of them are asked.
const ROUNDS: usize = 2;
/// Longest answer by UDP: we ask for 1232.
const UDP_BYTES_MAX: usize = 4096;
/// Datagrams that are not the answer, after which the next resolver is asked.
const STRANGERS_MAX: usize = 16;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("no resolver is configured")]
    NoResolver,
    #[error("no resolver answered in time")]
    Silent,
    #[error("a resolver cannot be reached")]
    Unreachable(#[source] io::Error),
    #[error("a resolver's answer cannot be read")]
    Malformed(#[source] BadMessage),
}

/// The name with its letters in random case, which a resolver gives back as they are.
fn in_random_case(name: &str) -> String {
    let mut random = [0; 32];
    // Without randomness left is a fixed case: still an answer to the port and number.
    let _ = getrandom::fill(&mut random);
    let flip = |(place, letter): (usize, char)| {
        let bit = random[place / 8 % random.len()] >> (place % 8) & 1;
        if bit == 1 { letter.to_ascii_uppercase() } else { letter }
    };
    name.chars().enumerate().map(flip).collect()
}

fn random_id() -> u16 {
    let mut bytes = [0; 2];
    let _ = getrandom::fill(&mut bytes);
    u16::from_be_bytes(bytes)
}

/// Asks the resolvers in their order until one says something definite.
pub(super) async fn ask(
    resolvers: &[SocketAddr],
    name: &str,
    kind: u16,
) -> Result<Response, AskError> {
    let mut failed = AskError::NoResolver;
    for _ in 0..ROUNDS {
        for resolver in resolvers {
            let asked = timeout(ANSWER_TIME_MAX, ask_one(*resolver, name, kind)).await;
            match asked.unwrap_or(Err(AskError::Silent)) {
                Ok(response) if matches!(response.code, Code::NoError | Code::NxDomain) => {
                    return Ok(response);
                }
                // One that cannot answer: perhaps the next one can.
                Ok(_) => failed = AskError::Silent,
                Err(error) => failed = error,
            }
        }
    }
    Err(failed)
}

async fn ask_one(resolver: SocketAddr, name: &str, kind: u16) -> Result<Response, AskError> {
    let any: SocketAddr = if resolver.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let unreachable = AskError::Unreachable;
    // A socket of its own for every question: the kernel draws the port, and takes datagrams of
    // the resolver only.
    let socket = UdpSocket::bind(any).await.map_err(unreachable)?;
    socket.connect(resolver).await.map_err(unreachable)?;
    let (id, asked) = (random_id(), in_random_case(name));
    let query = message::write_query(id, &asked, kind);
    socket.send(&query).await.map_err(unreachable)?;
    let mut buffer = [0; UDP_BYTES_MAX];
    for _ in 0..STRANGERS_MAX {
        let count = socket.recv(&mut buffer).await.map_err(unreachable)?;
        let Ok(response) = Response::read(&buffer[..count]) else { continue };
        if response.id != id || response.kind != kind {
            continue;
        }
        // Not forged, then, but from a resolver that changes the case: by TCP nobody else answers.
        if response.name != asked || response.truncated {
            if response.name.eq_ignore_ascii_case(&asked) {
                return ask_by_tcp(resolver, &query, id, &asked).await;
            }
            continue;
        }
        return Ok(response);
    }
    Err(AskError::Silent)
}

async fn ask_by_tcp(
    resolver: SocketAddr,
    query: &[u8],
    id: u16,
    asked: &str,
) -> Result<Response, AskError> {
    let exchange = async {
        let mut stream = TcpStream::connect(resolver).await?;
        let length = u16::try_from(query.len()).unwrap_or(0);
        stream.write_all(&[&length.to_be_bytes(), query].concat()).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    };
    let answer = exchange.await.map_err(AskError::Unreachable)?;
    let response = Response::read(&answer).map_err(AskError::Malformed)?;
    if response.id == id && response.name.eq_ignore_ascii_case(asked) {
        Ok(response)
    } else {
        Err(AskError::Silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_case_of_letters_is_drawn_and_the_name_stays() {
        let name = "a-name-of-some-letters-to-draw-the-case-of.example.test";
        let drawn: Vec<_> = (0..4).map(|_| in_random_case(name)).collect();
        assert!(drawn.iter().all(|one| one.eq_ignore_ascii_case(name)));
        assert!(drawn.iter().any(|one| *one != drawn[0]), "{drawn:?}");
    }
}
