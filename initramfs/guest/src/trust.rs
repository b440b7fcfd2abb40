//! The certificate of who opens TLS for the sandbox's group, put where programs look for whom they
//! trust. The thread is inside the sandbox's root.
//!
//! An image that is arranged in another way is left as it is: its programs refuse what is opened,
//! and nothing else of the sandbox suffers.

use std::path::Path;

use fs_err as fs;

use crate::files;

/// By itself, where SDKs of other clouds look for it too.
const CERTIFICATE: &str = "/etc/ssl/certs/adc-egress-proxy-ca.crt";

/// Where distributions keep what is added to their bundles when these are made anew: of Debian and
/// Alpine, where the tool for it may come later, and of others if it is there.
const ANCHORS: (&str, &[&str]) = (
    "/usr/local/share/ca-certificates",
    &["/etc/pki/ca-trust/source/anchors", "/etc/pki/trust/anchors"],
);

/// Everyone who is trusted, in one file: of Debian, Alpine and Arch, of Fedora, of SUSE, and of
/// OpenSSL by itself. The first is made where there is none.
const BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Programs that bring a bundle of their own, and look at these first.
const BUNDLE_VARIABLES: &[&str] = &[
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
];

/// Programs that add to a bundle of their own what these name.
const CERTIFICATE_VARIABLES: &[&str] = &["NODE_EXTRA_CA_CERTS", "DENO_CERT"];

/// Around ours in a bundle, so that another can take its place.
const BEGIN: &str = "# holdfast: who opens TLS for this sandbox's group\n";
const END: &str = "# holdfast: end\n";

/// A larger bundle is left as it is. Distributions' have a quarter of a MiB.
const BUNDLE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Has programs trust this certificate, in place of the one that was there before; an empty one
/// takes that away. Gives the variables by which programs find it, if it is one.
pub(crate) fn install(pem: &str) -> Vec<(&'static str, &'static str)> {
    let (own, others) = ANCHORS;
    let others = others.iter().filter(|folder| Path::new(folder).is_dir());
    for folder in std::iter::once(&own).chain(others) {
        let path = format!("{folder}/adc-egress-proxy-ca.crt");
        place(&path, pem);
    }
    place(CERTIFICATE, pem);
    let there: Vec<_> = BUNDLES.iter().filter(|path| Path::new(path).is_file()).collect();
    for path in &there {
        // Several may be links to one.
        let Ok(bytes) = files::read_bounded(path, BUNDLE_BYTES_MAX) else { continue };
        let Ok(bundle) = String::from_utf8(bytes) else { continue };
        let with = with_ours(&bundle, pem);
        if with != bundle {
            place(path, &with);
        }
    }
    if pem.is_empty() {
        return Vec::new();
    }
    if there.is_empty() {
        place(BUNDLES[0], &with_ours("", pem));
    }
    let bundle = there.first().map_or(BUNDLES[0], |path| path);
    let of_bundle = BUNDLE_VARIABLES.iter().map(|name| (*name, bundle));
    of_bundle.chain(CERTIFICATE_VARIABLES.iter().map(|name| (*name, CERTIFICATE))).collect()
}

/// The bundle with ours behind all others, once.
fn with_ours(bundle: &str, pem: &str) -> String {
    let mut others = bundle.to_owned();
    while let Some((before, rest)) = others.split_once(BEGIN) {
        // Without its end it was cut by somebody: what is behind it stays.
        let behind = rest.split_once(END).map_or(rest, |(_, behind)| behind);
        others = format!("{before}{behind}");
    }
    if pem.is_empty() {
        return others;
    }
    if !others.is_empty() && !others.ends_with('\n') {
        others.push('\n');
    }
    let line = if pem.ends_with('\n') { "" } else { "\n" };
    format!("{others}{BEGIN}{pem}{line}{END}")
}

/// Writes a file whole or not at all; an empty one goes. Behind a link, so that the link stays.
fn place(path: &str, content: &str) {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    // What is no file is somebody's own.
    let metadata = fs::metadata(&path).ok();
    if metadata.as_ref().is_some_and(|metadata| !metadata.is_file()) {
        return;
    }
    if content.is_empty() {
        let _ = fs::remove_file(&path);
        return;
    }
    let Some(folder) = path.parent() else { return };
    let draft = folder.join(".holdfast-ca.draft");
    let written = fs::create_dir_all(folder)
        .and_then(|()| match fs::remove_file(&draft) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => fs::write(&draft, content),
        })
        .and_then(|()| match metadata {
            Some(metadata) => fs::set_permissions(&draft, metadata.permissions()),
            None => Ok(()),
        })
        .and_then(|()| fs::rename(&draft, &path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_in_a_bundle_once_and_another_takes_its_place() {
        let first = with_ours("theirs", "one\n");
        assert_eq!(first, format!("theirs\n{BEGIN}one\n{END}"));
        assert_eq!(with_ours(&first, "one\n"), first);
        assert_eq!(with_ours(&first, "two"), format!("theirs\n{BEGIN}two\n{END}"));
        assert_eq!(with_ours(&first, ""), "theirs\n");
        assert_eq!(with_ours("", "one\n"), format!("{BEGIN}one\n{END}"));
    }

    #[test]
    fn what_others_wrote_behind_ours_stays() {
        let later = format!("theirs\n{BEGIN}one\n{END}added\n");
        assert_eq!(with_ours(&later, "two\n"), format!("theirs\nadded\n{BEGIN}two\n{END}"));
        let cut = format!("theirs\n{BEGIN}one\nadded\n");
        assert_eq!(with_ours(&cut, ""), "theirs\none\nadded\n");
    }
}
