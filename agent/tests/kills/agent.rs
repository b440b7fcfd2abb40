//! One agent in a process of its own, spoken to over its API.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use fs_err as fs;
use holdfast_api::path;
use holdfastd::{
    daemon::Daemon,
    fault::{FAULT_POINT, FAULT_POWER, Point},
    sandbox::Ending,
};
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::{task::spawn_blocking, time::sleep};

use crate::node::{alive, config_in, group};

pub(crate) const TOKEN: &str = "hf_a-token-of-the-tests";

/// Longer than anything here takes on an emulated machine under load.
pub(crate) const LONG: Duration = Duration::from_secs(180);

const PAUSE: Duration = Duration::from_millis(50);

/// Set for an agent: its folder, and where it listens.
const FOLDER: &str = "HOLDFAST_TEST_FOLDER";
const LISTEN: &str = "HOLDFAST_TEST_LISTEN";

/// What all agents of a test have in common.
pub(crate) struct Place {
    pub(crate) folder: PathBuf,
    /// The same for all, so that clients find the next one.
    port: u16,
}

impl Place {
    pub(crate) fn new(folder: &Path) -> Self {
        // Another test of this process may have done it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self { folder: folder.to_owned(), port: free.local_addr().unwrap().port() }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

/// In the process that is an agent: serves until stdin is closed.
pub(crate) async fn serve_if_asked() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = PathBuf::from(folder);
    let mut config = config_in(&folder);
    config.api.listen = std::env::var(LISTEN).unwrap().parse().unwrap();
    config.api.admin_token = Some(holdfast_model::Secret::new(TOKEN));
    let daemon = Daemon::start(config).await.unwrap();
    fs::write(folder.join("ca.pem"), daemon.ca_pem()).unwrap();
    say("serves");
    spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
    daemon.stop(Ending::Detach).await;
    say("stopped");
}

/// A line of its own among those of the test harness.
fn say(word: &str) {
    // Who started us may be gone.
    let _ = writeln!(std::io::stdout(), "\n{word}");
}

/// One that serves.
pub(crate) struct Agent {
    process: Child,
    stdin: Option<ChildStdin>,
    client: Client,
    pub(crate) endpoint: String,
    pub(crate) ca: PathBuf,
}

/// The answer of a call. Status 0: there was none.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{self:?}"))
    }
}

impl Agent {
    pub(crate) async fn start(place: &Place, fault: Option<Point>) -> Self {
        Self::start_by(place, fault, false).await
    }

    /// One with which the whole machine goes down at its point.
    pub(crate) async fn start_without_power(place: &Place, point: Point) -> Self {
        Self::start_by(place, Some(point), true).await
    }

    async fn start_by(place: &Place, fault: Option<Point>, power: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "agent_process", "--nocapture"])
            .env(FOLDER, &place.folder)
            .env(LISTEN, format!("127.0.0.1:{}", place.port))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(point) = fault {
            command.env(FAULT_POINT, point.name());
        }
        if power {
            command.env(FAULT_POWER, "1");
        }
        let mut process = command.spawn().unwrap();
        let stdin = process.stdin.take();
        let stdout = BufReader::new(process.stdout.take().unwrap());
        let serves = spawn_blocking(move || {
            let mut lines = stdout.lines().map_while(Result::ok);
            let serves = lines.any(|line| line == "serves");
            // Read to the end, so that the agent never waits for us.
            std::thread::spawn(move || lines.count());
            serves
        });
        assert!(serves.await.unwrap(), "the agent does not serve");
        let ca = fs::read(place.ca()).unwrap();
        let client = Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&ca).unwrap()])
            .timeout(LONG)
            .build()
            .unwrap();
        Self { process, stdin, client, endpoint: place.endpoint(), ca: place.ca() }
    }

    /// Waits until it is killed by itself.
    pub(crate) async fn dies(self) {
        let status = self.ended().await;
        assert_eq!(status.signal(), Some(9), "the agent did not come to its point: {status}");
    }

    /// Stops it in good order, as an upgrade does.
    pub(crate) async fn stops(mut self) {
        drop(self.stdin.take());
        let status = self.ended().await;
        assert!(status.success(), "{status}");
    }

    async fn ended(mut self) -> std::process::ExitStatus {
        let ended = async {
            loop {
                if let Some(status) = self.process.try_wait().unwrap() {
                    return status;
                }
                sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(LONG, ended).await.expect("the agent ends")
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>, name: &str) -> Answer {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.endpoint))
            .bearer_auth(TOKEN)
            .header(holdfast_api::REQUEST_ID_HEADER, name);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let gone = Answer { status: 0, body: String::new() };
        let Ok(response) = request.send().await else { return gone };
        let status = response.status().as_u16();
        match response.text().await {
            Ok(body) => Answer { status, body },
            Err(_) => gone,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, None, "get").await
    }

    pub(crate) fn details(&self, id: &str) -> String {
        path::details(&group(), id)
    }

    pub(crate) fn sandbox(&self, id: &str) -> String {
        path::sandbox(&group(), id)
    }

    /// A small sandbox; the same name makes the same.
    pub(crate) async fn create(&self, name: &str) -> Answer {
        let body = json!({
            "sourcesRef": {"diskImage": {"name": "busybox", "isPublic": true}},
            "resources": {"cpu": "500m", "memory": "128Mi", "disk": "1Gi"},
            "labels": {"name": name},
        });
        self.call(Method::PUT, &path::sandboxes(&group()), Some(body), name).await
    }

    /// A sandbox made of a snapshot; the same name makes the same.
    pub(crate) async fn create_from(&self, snapshot: &str, name: &str) -> Answer {
        let body = json!({"sourcesRef": {"snapshot": {"id": snapshot}}});
        self.call(Method::PUT, &path::sandboxes(&group()), Some(body), name).await
    }

    pub(crate) async fn delete(&self, id: &str) -> Answer {
        self.call(Method::DELETE, &self.sandbox(id), None, "delete").await
    }

    pub(crate) async fn snapshot(&self, id: &str, name: &str) -> Answer {
        let path = path::snapshot_of(&group(), id);
        self.call(Method::POST, &path, Some(json!({})), name).await
    }

    /// Copies of a sandbox; the same name makes the same.
    pub(crate) async fn fork(&self, id: &str, count: u32, name: &str) -> Answer {
        let body = json!({"count": count});
        self.call(Method::POST, &path::fork(&group(), id), Some(body), name).await
    }

    pub(crate) async fn delete_snapshot(&self, id: &str) -> Answer {
        self.call(Method::DELETE, &path::snapshot(&group(), id), None, "delete-snapshot").await
    }

    /// Ids of all sandboxes.
    pub(crate) async fn list(&self) -> Vec<String> {
        self.ids(&path::sandboxes(&group())).await
    }

    /// Ids of all snapshots.
    pub(crate) async fn snapshots(&self) -> Vec<String> {
        self.ids(&path::snapshots(&group())).await
    }

    async fn ids(&self, path: &str) -> Vec<String> {
        let list = self.get(path).await.json();
        let ids = list["value"].as_array().unwrap().iter();
        ids.map(|sandbox| sandbox["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until the sandbox is Running.
    pub(crate) async fn runs(&self, id: &str) {
        let running = async {
            loop {
                let sandbox = self.get(&self.sandbox(id)).await.json();
                match sandbox["state"].as_str() {
                    Some("Creating") => sleep(PAUSE).await,
                    state => return assert_eq!(state, Some("Running"), "{sandbox}"),
                }
            }
        };
        tokio::time::timeout(LONG, running).await.expect("the sandbox runs");
    }

    /// The sandbox's state, by the API.
    pub(crate) async fn state(&self, id: &str) -> String {
        let sandbox = self.get(&self.sandbox(id)).await.json();
        sandbox["state"].as_str().unwrap().to_owned()
    }

    /// Has the sandbox stop or resume.
    pub(crate) async fn order(&self, id: &str, what: &str) -> Answer {
        let path = format!("{}/{what}", self.sandbox(id));
        self.call(Method::POST, &path, None, what).await
    }

    pub(crate) async fn execute(&self, id: &str, command: &str, name: &str) -> Answer {
        let path = path::execute_shell_command(&group(), id);
        self.call(Method::POST, &path, Some(json!({"command": command})), name).await
    }

    /// What a command says that changes nothing, by the streaming exec: the points of
    /// `executeShellCommand` are not on its way.
    pub(crate) async fn look(&self, id: &str, command: &str) -> String {
        let command = command.to_owned();
        let mut cli = crate::stream::cli(self, id, &["sh", "-c", &command]);
        let output = spawn_blocking(move || cli.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn runs(pid: u64) -> bool {
    alive(u32::try_from(pid).unwrap())
}
