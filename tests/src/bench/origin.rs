//! nginx with a small answer, in clear and over TLS.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

use super::usage::FILES;
use crate::{
    daemon::{Folder, Process},
    netns::Netns,
    tls::Authority,
};

/// Its port in clear.
pub const HTTP: u16 = 80;
/// Its port with TLS.
pub const HTTPS: u16 = 443;

/// An nginx with a small answer on a plain and on a TLS port.
pub struct Origin {
    /// The server.
    pub process: Process,
    folder: Folder,
}

impl Origin {
    /// Starts one. `http2` is what TLS may speak besides HTTP/1.1.
    pub fn start(netns: &Netns, name: &str, authority: &Authority, http2: bool) -> Result<Self> {
        Self::with(netns, name, authority, http2, None)
    }

    /// One that answers so many requests a second, and lets the others wait. It notes the `X-Tier` of each.
    pub fn paced(netns: &Netns, name: &str, authority: &Authority, rate: u32) -> Result<Self> {
        Self::with(netns, name, authority, false, Some(rate))
    }

    fn with(
        netns: &Netns,
        name: &str,
        authority: &Authority,
        http2: bool,
        rate: Option<u32>,
    ) -> Result<Self> {
        let http2 = if http2 { "http2" } else { "" };
        let zone = rate
            .map(|rate| format!("limit_req_zone $server_port zone=all:1m rate={rate}r/s;\n"))
            .unwrap_or_default();
        let folder = Folder::new()?;
        // An answer by `return` comes before the limit: a file comes after it.
        let (answer, log) = if rate.is_some() {
            let log = format!(
                "log_format tier '$msec $http_x_tier';\naccess_log {} tier",
                folder.path().join("log").display()
            );
            ("limit_req zone=all burst=10000;\ntry_files /answer =404;", log)
        } else {
            ("return 200 'ok';", "access_log off".to_owned())
        };
        let credentials = authority.issue(name)?;
        folder.write("certificate.pem", &credentials.certificate_pem)?;
        folder.write("key.pem", &credentials.key_pem)?;
        folder.write("answer", "ok")?;
        let path = folder.path().display();
        let text = format!(
            "daemon off;\nmaster_process off;\nworker_processes 1;\nworker_rlimit_nofile {FILES};\n\
             error_log stderr warn;\npid {path}/pid;\n\
             events {{ worker_connections 8192; }}\n\
             http {{\n\
               {log};\nkeepalive_requests 100000000;\n\
               client_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
               fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\nscgi_temp_path {path}/scgi;\n\
               {zone}server {{\n\
                 root {path};\n\
                 listen {HTTP} backlog=4096;\nlisten {HTTPS} ssl {http2} backlog=4096;\n\
                 ssl_certificate {path}/certificate.pem;\nssl_certificate_key {path}/key.pem;\n\
                 ssl_protocols TLSv1.2 TLSv1.3;\n\
                 ssl_session_cache shared:sessions:4m;\nssl_session_tickets off;\n\
                 location / {{ {answer} }}\nlocation = /status {{ stub_status; }}\n\
               }}\n\
             }}\n"
        );
        let config = folder.write("nginx.conf", &text)?;
        let mut command = netns.command("nginx");
        command.arg("-p").arg(folder.path()).arg("-c").arg(&config);
        let mut process = Process::start(command, None)
            .context("starting nginx; `cargo xtask setup` says how to get it")?;
        process.listens(netns, SocketAddr::new(IpAddr::from([127, 0, 0, 1]), HTTPS)).context("nginx")?;
        Ok(Self { process, folder })
    }

    /// How many requests of each `X-Tier` a [paced](Self::paced) one has answered in a time.
    pub fn tiers(&self, from: SystemTime, time: Duration) -> Result<BTreeMap<String, u64>> {
        let path: PathBuf = self.folder.path().join("log");
        let log = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let from = from.duration_since(UNIX_EPOCH)?.as_secs_f64();
        let mut all = BTreeMap::new();
        for line in log.lines() {
            let (at, tier) = line.split_once(' ').context("a line of nginx's log")?;
            if (0.0..time.as_secs_f64()).contains(&(at.parse::<f64>()? - from)) {
                *all.entry(tier.to_owned()).or_default() += 1;
            }
        }
        Ok(all)
    }
}
