//! `…/sandboxes/{id}/files`: one file in, one file out.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use futures_util::stream;
use holdfast_api::{error::Code, exec::check_path, model::Mib};

use super::{
    App,
    answer::empty,
    body,
    problem::Problem,
    request::{OfSandbox, Query},
};

/// Permission bits a client may set: set-user-id, set-group-id and sticky are among them.
const MODE_MAX: u32 = 0o7777;

pub(super) async fn read(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    query: Query,
) -> Result<Response, Problem> {
    let path = file_path(&query)?;
    let file = app.registry.read_file(&record.id, path).await;
    let file = file.map_err(|error| Problem::of_file(&error))?;
    // The size the guest announced is not believed: an error midway ends the connection, and the
    // client sees that the body is not whole.
    let pieces = stream::try_unfold(file, |mut file| async move {
        let piece = file.next().await?;
        Ok::<_, crate::sandbox::ExecError>(piece.map(|piece| (piece, file)))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

pub(super) async fn write(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    query: Query,
    body: Body,
) -> Result<Response, Problem> {
    let path = file_path(&query)?;
    let mode = query.get("mode").map(file_mode).transpose()?;
    let create_dirs = query.flag("createDirs")?.unwrap_or(false);
    let body = body::reader(body, Mib(app.config.limits.file_mib_max).bytes());
    let written = app.registry.write_file(&record.id, path, mode, create_dirs, body).await;
    written.map_err(|error| Problem::of_file(&error))?;
    Ok(empty(204))
}

fn file_path(query: &Query) -> Result<String, Problem> {
    if query.get("containerName").is_some() {
        let message = "containerName is not carried out by this node yet";
        return Err(Problem::new(Code::UnsupportedField, message, "leave the parameter out"));
    }
    let path = query.need("path")?;
    check_path(path).map_err(|reason| Problem::invalid(format!("path: {reason}")))?;
    Ok(path.to_owned())
}

fn file_mode(text: &str) -> Result<u32, Problem> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= MODE_MAX);
    mode.ok_or_else(|| Problem::invalid("mode: must be octal, such as 0644"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal_and_nothing_else() {
        assert_eq!(file_mode("0755"), Ok(0o755));
        assert_eq!(file_mode("4755"), Ok(0o4755));
        for text in ["", "8", "+755", "rwx", "10000", "0o755"] {
            assert!(file_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_path_that_cannot_be_a_file_is_refused() {
        for query in ["", "path=", "path=a", "path=/a%00", "path=/a&containerName=x"] {
            assert!(file_path(&Query::parse(query).unwrap()).is_err(), "{query}");
        }
        let query = Query::parse("path=/a/..%2Fb").unwrap();
        assert_eq!(
            file_path(&query).unwrap(),
            "/a/../b",
            "inside the sandbox all paths are its own"
        );
    }
}
