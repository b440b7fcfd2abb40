//! The WebSocket of one command.

use std::time::Duration;

use holdfast_api::{API_VERSION, path, stream::MESSAGE_BYTES_MAX};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error as WsError, client::IntoClientRequest, protocol::WebSocketConfig},
};

use crate::{
    client::{Client, api_error},
    connection,
    error::CliError,
};

pub(crate) type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// How long connecting and the handshakes may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Opens the streaming exec of a sandbox.
pub(crate) async fn open(client: &Client, id: &str) -> Result<Socket, CliError> {
    timeout(CONNECT_TIMEOUT, connect(client, id))
        .await
        .map_err(|_| CliError::Host(format!("{} did not answer", client.target.endpoint)))?
}

async fn connect(client: &Client, id: &str) -> Result<Socket, CliError> {
    let (host, port) = connection::host_and_port(&client.target.endpoint)?;
    let unreachable = |what: &str, error: std::io::Error| {
        CliError::Host(format!("cannot {what} {}: {error}", client.target.endpoint))
    };
    let tcp = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|error| unreachable("connect to", error))?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(host.clone())
        .map_err(|_| CliError::Wrong(format!("{host:?} is not a host name")))?;
    let tls = TlsConnector::from(connection::tls(&client.target)?)
        .connect(name, tcp)
        .await
        .map_err(|error| unreachable("trust", error))?;
    let path = path::exec(&client.group, id);
    let mut request = format!("wss://{host}:{port}{path}?api-version={API_VERSION}")
        .into_client_request()
        .map_err(lost)?;
    if let Some(token) = &client.target.token {
        let value = format!("Bearer {token}").parse().map_err(|_| {
            CliError::Wrong("the token holds characters a header cannot".to_owned())
        })?;
        request.headers_mut().insert("authorization", value);
    }
    let limits = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX));
    match tokio_tungstenite::client_async_with_config(request, tls, Some(limits)).await {
        Ok((socket, _)) => Ok(socket),
        Err(WsError::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            Err(api_error(response.status().as_u16(), &String::from_utf8_lossy(body)))
        }
        Err(error) => Err(lost(error)),
    }
}

fn lost(error: WsError) -> CliError {
    CliError::Host(format!("the connection to the command could not be made: {error}"))
}
