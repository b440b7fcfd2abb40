//! Which addresses a registry may send us to.

use super::*;

fn transport(name: &str, plain_http: &[&str]) -> Transport {
    let plain_http = plain_http.iter().map(|&host| host.to_owned()).collect();
    let options = RegistryOptions { plain_http, ..RegistryOptions::default() };
    Transport::new(&name.parse().unwrap(), options).unwrap()
}

fn permitted(transport: &Transport, to: &str) -> bool {
    transport.joined(&Url::parse("https://r.io/v2/").unwrap(), to).is_ok()
}

#[test]
fn a_registry_of_the_network_leads_neither_into_the_clear_nor_inward() {
    let transport = transport("r.io/a:b", &["listed.example:5000"]);
    let cases = [
        ("https://cdn.example/blob", true),
        ("/v2/elsewhere", true),
        ("http://listed.example:5000/blob", true),
        ("http://listed.example/blob", false),
        ("http://r.io/blob", false),
        ("https://localhost/blob", false),
        ("https://127.0.0.1:8443/blob", false),
        ("https://[::1]/blob", false),
        ("https://169.254.169.254/latest", false),
        ("https://0.0.0.0/blob", false),
        ("file:///etc/passwd", false),
        ("ftp://r.io/blob", false),
    ];
    for (to, allowed) in cases {
        assert_eq!(permitted(&transport, to), allowed, "{to}");
    }
}

#[test]
fn a_registry_of_this_machine_may_use_http_here_and_nowhere_else() {
    let transport = transport("127.0.0.1:5000/a:b", &[]);
    assert!(permitted(&transport, "http://127.0.0.1:6000/blob"));
    assert!(permitted(&transport, "http://localhost:6000/blob"));
    assert!(!permitted(&transport, "http://r.io/blob"));
}
