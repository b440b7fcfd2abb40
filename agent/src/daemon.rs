//! The parts put together: what is started in which order, and stopped in the other.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fs_err as fs;
use holdfast_api::node::Verdict;
use holdfast_store::Store;
use jiff::Timestamp;
use log::{info, warn};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::sleep};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    audit::AuditLog,
    auth::Tokens,
    blocking::off_thread,
    config::Config,
    host::{self, Host},
    http::{App, Budget, Calls, default_group, router, server},
    images::Images,
    metrics::Metrics,
    sandbox::{Ending, Parts, Registry},
    tls::{self, Authority, Serving},
};

/// How often the node's addresses and its certificate's end are looked at.
const CERTIFICATE_CHECK_EVERY: Duration = Duration::from_secs(30);

/// A daemon that serves.
pub struct Daemon {
    app: Arc<App>,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    renewal: JoinHandle<()>,
}

impl Daemon {
    /// Repairs what an earlier process left, then serves.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let state = config.paths.state.clone();
        for folder in [&config.paths.state, &config.paths.run] {
            fs::create_dir_all(folder)?;
        }
        let store = open_store(&state).await?;
        let metrics = Arc::new(Metrics::new().context("metrics")?);
        let host = Host::here();
        host.apply(config.host.smt);
        let checks = host.examine(config.host.smt);
        host::report(&checks);
        metrics.host_warnings(checks.iter().filter(|check| check.verdict != Verdict::Ok).count());
        let tls = load_tls(&config).await?;
        let images = Images::start(&config, Arc::clone(&store), Arc::clone(&metrics))
            .await
            .context("images")?;
        let parts = Parts {
            config: &config,
            store: Arc::clone(&store),
            images: Arc::clone(&images),
            metrics: Arc::clone(&metrics),
        };
        let registry = Registry::start(parts).await.context("sandboxes")?;
        let listen = config.api.listen;
        let listener =
            TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
        let address = listener.local_addr()?;
        let acceptor = TlsAcceptor::from(tls.config()?);
        let connections_max = config.limits.connections_max;
        let app = Arc::new(App {
            tokens: Tokens::load(&state, config.api.admin_token.as_ref())?,
            audit: Arc::new(AuditLog::open(&state.join("audit"))?),
            audit_broken: AtomicBool::new(false),
            config,
            store,
            registry,
            images,
            metrics,
            measuring: tokio::sync::Mutex::default(),
            tls,
            calls: Calls::default(),
            output_budget: Arc::new(Budget::default()),
            making: tokio::sync::RwLock::default(),
            stopping: AtomicBool::new(false),
            halt: CancellationToken::new(),
            started: Instant::now(),
        });
        let (stop, stopped) = watch::channel(false);
        let served = router(Arc::clone(&app));
        let server =
            tokio::spawn(server::serve(listener, acceptor, served, connections_max, stopped));
        let renewal = tokio::spawn(renew(Arc::clone(&app)));
        info!(address:%; "API serves");
        Ok(Self { app, address, stop, server, renewal })
    }

    /// Where the API listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The node's CA, for clients to trust.
    pub fn ca_pem(&self) -> &str {
        self.app.tls.authority().pem()
    }

    /// What whoever stands at the console needs to reach the node.
    pub fn greeting(&self) -> String {
        let own = tls::addresses().into_iter().map(|ip| SocketAddr::new(ip, self.address.port()));
        let listening = (!self.address.ip().is_unspecified()).then_some(self.address);
        let shown = listening.or_else(|| own.into_iter().next()).unwrap_or(self.address);
        let fingerprint = self.app.tls.authority().fingerprint();
        format!("holdfast: API on https://{shown}, CA SHA256:{fingerprint}")
    }

    /// Takes no more calls, leaves or ends what runs, and returns when all is in order.
    pub async fn stop(self, ending: Ending) {
        self.app.stopping.store(true, Ordering::Release);
        self.app.halt.cancel();
        self.renewal.abort();
        // Calls under way wait for sandboxes: those end first, and nobody waits in vain.
        let server = async {
            self.stop.send_replace(true);
            // A panic of the server was told by its own report.
            let _ = self.server.await;
        };
        tokio::join!(server, self.app.registry.stop(ending), self.app.images.stop());
        info!("stopped");
    }
}

async fn open_store(state: &Path) -> anyhow::Result<Arc<Store>> {
    let path = state.join("store.redb");
    let opened = off_thread(move || {
        let store = Store::open(&path)?;
        let group = default_group();
        if store.group(&group.key)?.is_none() {
            store.put_group(&group)?;
        }
        Ok::<_, holdfast_store::StoreError>(store)
    });
    Ok(Arc::new(opened.await.context("records")?))
}

async fn load_tls(config: &Config) -> anyhow::Result<Arc<Serving>> {
    let folder = config.paths.state.join("tls");
    let names = config.api.server_names.clone();
    let loaded = off_thread(move || {
        let authority = Authority::load(&folder)?;
        Serving::load(authority, &folder, &tls::served_names(&names), Timestamp::now())
    });
    Ok(Arc::new(loaded.await.context("certificates")?))
}

/// Keeps the certificate valid for the addresses the node has, as long as the daemon runs.
async fn renew(app: Arc<App>) {
    loop {
        sleep(CERTIFICATE_CHECK_EVERY).await;
        app.registry.egress().refresh().await;
        let own = Arc::clone(&app);
        let renewed = off_thread(move || {
            let names = tls::served_names(&own.config.api.server_names);
            own.tls.renew(&names, Timestamp::now())
        });
        match renewed.await {
            Ok(true) => info!("certificate made anew"),
            Ok(false) => {}
            Err(error) => warn!(error:%, hint = error.hint(); "certificate not made anew"),
        }
    }
}
