//! The store against real servers of either kind, and a snapshot in each. Needs python3 and npm, by
//! which `scripts/object-stores` installs the servers.

use std::{
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use holdfast_blob::{Bucket, Location, Secrets};
use holdfast_snapshot::{
    Draft, FileSource, Folder, Key, Kind, Name, PieceStore, Put, Snapshot, SnapshotError, collect,
};
use tokio::runtime::Runtime;

/// They are installed first where they are not there.
const PATIENCE: Duration = Duration::from_secs(300);

/// The well-known key of Azurite's account.
const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

struct Server {
    child: Child,
    runtime: Runtime,
    location: Location,
    secrets: Secrets,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(kind: &str) -> Self {
        // Another test of this process may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../scripts/object-stores");
        let child = Command::new(script).args([kind, &port.to_string()]).spawn().unwrap();
        let endpoint = format!("http://127.0.0.1:{port}");
        let (url, endpoint, key_id, key) = match kind {
            "s3" => ("s3://bucket/of/tests", endpoint, "id", "secret"),
            _ => {
                let endpoint = format!("{endpoint}/devstoreaccount1");
                ("azure://devstoreaccount1/bucket/of/tests", endpoint, "", AZURITE_KEY)
            }
        };
        let location = Location::parse(url, &endpoint, "").unwrap();
        let secrets = Secrets { key_id: key_id.to_owned(), key: key.to_owned() };
        let server = Self { child, runtime: Runtime::new().unwrap(), location, secrets };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "{kind} does not answer");
            thread::sleep(Duration::from_millis(100));
        }
        server.runtime.block_on(server.make_bucket(kind, port));
        server
    }

    /// By the servers' own calls: stores do not make buckets.
    async fn make_bucket(&self, kind: &str, port: u16) {
        let made = match kind {
            "s3" => {
                let url = format!("http://127.0.0.1:{port}/bucket");
                reqwest::Client::new().put(url).send().await.unwrap()
            }
            _ => {
                let url = azure_container_url(port);
                reqwest::Client::new().put(url).header("content-length", "0").send().await.unwrap()
            }
        };
        let status = made.status();
        assert!(status.is_success(), "{status}: {}", made.text().await.unwrap());
    }

    fn bucket(&self) -> Bucket {
        Bucket::open(&self.location, &self.secrets, self.runtime.handle().clone()).unwrap()
    }
}

/// A call that makes the container, signed as an account's shared access signature is
/// (Azure Storage, "Create an account SAS", version 2020-12-06 and later).
fn azure_container_url(port: u16) -> String {
    let fields = ["devstoreaccount1", "rwdlac", "b", "sco", "", "2099-01-01", "", "http,https"];
    let version = "2021-06-08";
    let text: String =
        fields.iter().chain([&version, &"", &""]).map(|field| format!("{field}\n")).collect();
    // One field less than the above: after the version comes the encryption scope, then the end.
    let text = text.strip_suffix('\n').unwrap();
    let output = Command::new("python3")
        .args([
            "-c",
            "import base64, hashlib, hmac, sys, urllib.parse\n\
             mac = hmac.new(base64.b64decode(sys.argv[1]), sys.argv[2].encode(), hashlib.sha256)\n\
             print(urllib.parse.quote(base64.b64encode(mac.digest()), safe=''), end='')",
            AZURITE_KEY,
            text,
        ])
        .output()
        .unwrap();
    let signature = String::from_utf8(output.stdout).unwrap();
    format!(
        "http://127.0.0.1:{port}/devstoreaccount1/bucket?restype=container&sv={version}&ss=b&srt=sco\
         &sp=rwdlac&se=2099-01-01&spr=http,https&sig={signature}"
    )
}

/// What every store must do, whoever serves it.
fn keeps_pieces_and_manifests(bucket: &Bucket) {
    let small = b"a small piece".to_vec();
    // In parts, the last of them a short one.
    let large: Vec<u8> = (0..(8 << 20) + 12_345_u32).map(|at| at.to_le_bytes()[1]).collect();
    for (kind, bytes) in [(Kind::State, &small), (Kind::Segment, &large)] {
        let name = Name::of(bytes);
        let missing = bucket.whole_piece(kind, &name).unwrap_err();
        assert!(matches!(missing, SnapshotError::Missing { .. }), "{missing}");
        assert_eq!(bucket.put_piece(kind, &name, bytes).unwrap(), Put::Created);
        assert_eq!(bucket.put_piece(kind, &name, bytes).unwrap(), Put::AlreadyThere);
        assert_eq!(bucket.piece_bytes(kind, &name).unwrap(), bytes.len() as u64);
        assert!(bucket.whole_piece(kind, &name).unwrap() == *bytes);
        assert_eq!(bucket.read_piece(kind, &name, 2, 5).unwrap(), bytes[2..7]);
        let cut = bucket.read_piece(kind, &name, bytes.len() as u64 - 2, 5).unwrap_err();
        assert!(matches!(cut, SnapshotError::Changed { .. }), "{cut}");
        assert_eq!(bucket.pieces(kind, 0).unwrap(), [name]);
        assert_eq!(bucket.pieces(kind, 3600).unwrap(), []);
        assert_eq!(bucket.delete_piece(kind, &name).unwrap(), bytes.len() as u64);
        assert_eq!(bucket.delete_piece(kind, &name).unwrap(), 0);
        assert_eq!(bucket.pieces(kind, 0).unwrap(), []);
    }

    assert_eq!(bucket.put_manifest("one", b"first").unwrap(), Put::Created);
    assert_eq!(bucket.put_manifest("one", b"second").unwrap(), Put::AlreadyThere);
    assert_eq!(bucket.read_manifest("one", 100).unwrap(), b"first");
    let large = bucket.read_manifest("one", 4).unwrap_err();
    assert!(matches!(large, SnapshotError::TooLarge { found: 5, max: 4, .. }), "{large}");
    assert!(matches!(bucket.put_manifest("../two", b"").unwrap_err(), SnapshotError::Id { .. }));
    assert_eq!(bucket.manifests().unwrap(), ["one"]);
    assert!(bucket.delete_manifest("one").unwrap());
    assert!(!bucket.delete_manifest("one").unwrap());
    assert_eq!(bucket.manifests().unwrap(), Vec::<String>::new());
}

/// A snapshot that was written to it is read back, and its deletion leaves nothing.
fn keeps_snapshots(bucket: &Bucket) {
    let key = Key::new([7; 32]);
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..4_u32 << 20).map(|at| (at >> 3).to_le_bytes()[1]).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    let source = FileSource::new(file.try_clone().unwrap()).unwrap();
    let mut draft = Draft::new(bucket, &key, "whole", None).unwrap();
    draft.image("memory", &source, None, &[]).unwrap();
    draft.state(b"state").unwrap();
    draft.commit(1).unwrap();

    let snapshot = Snapshot::open(bucket, &key, "whole").unwrap();
    assert_eq!(snapshot.state(bucket, &key).unwrap().unwrap(), b"state");
    assert!(snapshot.verify(bucket, &key).unwrap().frames > 0);
    let back = tempfile::tempfile().unwrap();
    snapshot.image(bucket, &key, "memory").unwrap().restore(&back).unwrap();
    let mut read = vec![0; bytes.len()];
    std::os::unix::fs::FileExt::read_exact_at(&back, &mut read, 0).unwrap();
    assert!(read == bytes);
    // Read in place of the folder's.
    let folder = tempfile::tempdir().unwrap();
    let folder = Folder::open(folder.path()).unwrap();
    for (kind, name) in snapshot.manifest.pieces() {
        folder.put_piece(kind, &name, &bucket.whole_piece(kind, &name).unwrap()).unwrap();
    }

    assert_eq!(collect(bucket, 0).unwrap().pieces_deleted, 0);
    bucket.delete_manifest("whole").unwrap();
    let collected = collect(bucket, 0).unwrap();
    assert_eq!(collected.pieces_deleted, snapshot.manifest.pieces().len());
}

#[test]
fn an_s3_server_keeps_pieces_manifests_and_snapshots() {
    let server = Server::start("s3");
    keeps_pieces_and_manifests(&server.bucket());
    keeps_snapshots(&server.bucket());
}

#[test]
fn an_azure_blob_server_keeps_pieces_manifests_and_snapshots() {
    let server = Server::start("azure");
    keeps_pieces_and_manifests(&server.bucket());
    keeps_snapshots(&server.bucket());
}

#[test]
fn a_server_that_is_gone_is_an_error_that_says_what_could_not_be_done() {
    let runtime = Runtime::new().unwrap();
    let location = Location::parse("s3://bucket", "http://127.0.0.1:1", "").unwrap();
    let secrets = Secrets { key_id: "id".to_owned(), key: "secret".to_owned() };
    let bucket = Bucket::open(&location, &secrets, runtime.handle().clone()).unwrap();
    let error = bucket.put_manifest("one", b"first").unwrap_err();
    assert!(error.to_string().contains("keep manifest one"), "{error}");
}
