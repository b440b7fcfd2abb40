//! A request as it came in: read so that there is one reading of it, or refused.

use std::net::IpAddr;

use holdfast_netpolicy::{HostName, Method, Scheme, Target};
use hyper::{
    HeaderMap, Request, StatusCode, Version,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE},
    http::uri::Authority,
};

use crate::accept::same_address;

/// What the guest asks for.
pub(super) struct Asked {
    pub(super) host: Host,
    pub(super) method: Method,
    pub(super) target: Target,
    /// It wants the connection for a WebSocket.
    pub(super) websocket: bool,
}

/// The host of a request.
#[derive(Debug, Clone)]
pub(super) enum Host {
    Name(HostName),
    /// It names the address that the guest connected to.
    Address(IpAddr),
}

/// Why it is refused before any policy is asked.
#[derive(Debug)]
pub(super) struct Misasked {
    pub(super) status: StatusCode,
    /// For the record.
    pub(super) reason: &'static str,
    pub(super) message: &'static str,
    /// The host as it was written, for the record.
    pub(super) host: String,
}

/// The connection it came on.
pub(super) struct On<'a> {
    pub(super) scheme: Scheme,
    pub(super) server_name: Option<&'a HostName>,
    pub(super) address: IpAddr,
    pub(super) port: u16,
}

impl Asked {
    pub(super) fn read<B>(request: &Request<B>, on: &On<'_>) -> Result<Self, Misasked> {
        let written = written_host(request);
        let wrong = |status, reason, message| Misasked {
            status,
            reason,
            message,
            host: written.unwrap_or_default().to_owned(),
        };
        let bad = |reason, message| wrong(StatusCode::BAD_REQUEST, reason, message);
        if request.method() == hyper::Method::CONNECT {
            let message = "CONNECT is not for this proxy: connect to the host itself";
            return Err(wrong(StatusCode::METHOD_NOT_ALLOWED, "connect", message));
        }
        if !one_host(request) {
            return Err(bad("bad_host", "a request names one host, once"));
        }
        let Some(authority) = written else {
            return Err(bad("bad_host", "the request names no host"));
        };
        let host = host(authority, on)
            .ok_or_else(|| bad("bad_host", "the host is not a name with, at most, this port"))?;
        match (&host, on.server_name) {
            // What was judged by one name must not carry requests to another.
            (Host::Name(name), Some(server_name)) if name != server_name => {
                let message = "the host is not the server name of this TLS connection";
                return Err(wrong(StatusCode::MISDIRECTED_REQUEST, "host_mismatch", message));
            }
            (Host::Address(_), Some(_)) => {
                let message = "the host is an address and the server name of TLS is a name";
                return Err(wrong(StatusCode::MISDIRECTED_REQUEST, "host_mismatch", message));
            }
            _ => {}
        }
        if !one_framing(request.headers()) {
            return Err(bad("bad_framing", "the length of the body is said in more than one way"));
        }
        let method = Method::parse(request.method().as_str())
            .map_err(|_| bad("bad_method", "the method is not one"))?;
        let path = request.uri().path_and_query().map_or("", |path| path.as_str());
        let target = Target::parse(path.as_bytes())
            .map_err(|_| bad("bad_target", "the path is not in a form that servers agree on"))?;
        let websocket = wants_websocket(request);
        Ok(Self { host, method, target, websocket })
    }
}

/// The host as it is written in the request.
fn written_host<B>(request: &Request<B>) -> Option<&str> {
    let of_uri = request.uri().authority().map(Authority::as_str);
    of_uri.or_else(|| request.headers().get(HOST)?.to_str().ok())
}

/// Whether all places that name a host name the same, and none does so twice.
fn one_host<B>(request: &Request<B>) -> bool {
    let mut headers = request.headers().get_all(HOST).iter();
    let (first, second) = (headers.next(), headers.next());
    let authority = request.uri().authority().map(Authority::as_str);
    let same = match (authority, first) {
        (Some(authority), Some(header)) => header.as_bytes() == authority.as_bytes(),
        // HTTP/1.1 wants the header even beside an absolute URI.
        (Some(_), None) => request.version() == Version::HTTP_2,
        (None, _) => true,
    };
    same && second.is_none()
}

fn host(authority: &str, on: &On<'_>) -> Option<Host> {
    // A name has no colon; an IPv6 address is in brackets.
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let default = on.scheme.default_port();
    let port_fits = match port {
        None => on.port == default,
        Some(port) => {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>() == Ok(on.port)
        }
    };
    if !port_fits {
        return None;
    }
    if same_address(host, on.address) {
        return Some(Host::Address(on.address));
    }
    HostName::of_wire(host).ok().map(Host::Name)
}

/// Whether there is one way to tell where the body ends. The parser has refused what is no number.
fn one_framing(headers: &HeaderMap) -> bool {
    let lengths = headers.get_all(CONTENT_LENGTH).iter().count();
    let encodings = headers.get_all(TRANSFER_ENCODING).iter().count();
    lengths + encodings <= 1
}

fn wants_websocket<B>(request: &Request<B>) -> bool {
    let upgrade = request.headers().get(UPGRADE).and_then(|value| value.to_str().ok());
    request.version() == Version::HTTP_11
        && request.method() == hyper::Method::GET
        && upgrade.is_some_and(|protocol| protocol.eq_ignore_ascii_case("websocket"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(request: Request<()>, server_name: Option<&str>) -> Result<Asked, StatusCode> {
        let name = server_name.map(|name| HostName::of_wire(name).unwrap());
        let scheme = if name.is_some() { Scheme::Https } else { Scheme::Http };
        let on = On {
            scheme,
            server_name: name.as_ref(),
            address: [198, 51, 100, 10].into(),
            port: scheme.default_port(),
        };
        Asked::read(&request, &on).map_err(|misasked| misasked.status)
    }

    fn with_hosts(hosts: &[&str]) -> Request<()> {
        let mut builder = Request::builder().uri("/");
        for host in hosts {
            builder = builder.header(HOST, *host);
        }
        builder.body(()).unwrap()
    }

    #[test]
    fn d3_a_request_names_one_host_in_a_form_that_all_read_alike() {
        for hosts in [
            &["allowed.test", "evil.test"][..],
            &["allowed.test", "allowed.test"],
            &["allowed.test, evil.test"],
            &["allowed.test@evil.test"],
            &["evil.test@allowed.test"],
            &["allowed.test:22"],
            &["allowed.test:"],
            &["allowed.test:+80"],
            &["allowed.test:80:80"],
            &[""],
            &[],
            &["allowed.test/"],
            &["198.51.100.66"],
            &["allowed.test\t"],
        ] {
            let status = read(with_hosts(hosts), None).err();
            assert_eq!(status, Some(StatusCode::BAD_REQUEST), "{hosts:?}");
        }
        for host in ["allowed.test", "ALLOWED.test.", "allowed.test:80"] {
            let asked = read(with_hosts(&[host]), None).unwrap();
            assert!(matches!(asked.host, Host::Name(name) if name.as_str() == "allowed.test"));
        }
        let asked = read(with_hosts(&["198.51.100.10"]), None).unwrap();
        assert!(matches!(asked.host, Host::Address(_)));
    }

    #[test]
    fn d3_an_absolute_uri_and_the_header_name_the_same_host() {
        let request = |uri: &str, host: &str| {
            Request::builder().uri(uri).header(HOST, host).body(()).unwrap()
        };
        assert!(read(request("http://allowed.test/a", "allowed.test"), None).is_ok());
        let status = read(request("http://allowed.test/a", "evil.test"), None).err();
        assert_eq!(status, Some(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn e2_a_host_that_is_not_the_server_name_is_misdirected() {
        assert!(read(with_hosts(&["api.test"]), Some("api.test")).is_ok());
        for host in ["other.test", "198.51.100.10"] {
            let status = read(with_hosts(&[host]), Some("api.test")).err();
            assert_eq!(status, Some(StatusCode::MISDIRECTED_REQUEST), "{host}");
        }
    }

    #[test]
    fn d5_connect_is_refused() {
        let request = Request::builder().method("CONNECT").uri("evil.test:443").body(()).unwrap();
        assert_eq!(read(request, None).err(), Some(StatusCode::METHOD_NOT_ALLOWED));
    }

    #[test]
    fn a_body_whose_length_is_said_twice_is_refused() {
        for headers in [
            &[("content-length", "3"), ("transfer-encoding", "chunked")][..],
            &[("content-length", "3"), ("content-length", "3")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "identity")],
        ] {
            let mut request = with_hosts(&["allowed.test"]);
            for (name, value) in headers {
                request.headers_mut().append(*name, value.parse().unwrap());
            }
            assert_eq!(read(request, None).err(), Some(StatusCode::BAD_REQUEST), "{headers:?}");
        }
    }
}
