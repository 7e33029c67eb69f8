//! nginx as server and `openssl s_client` as client: peers that are not ours.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    daemon::{Folder, Process},
    netns::{Netns, execute},
    tls::{Authority, Credentials, Failure, HOST, Identity, Version},
};

/// Asks eight times who answers, each time on a new connection, and shows the answers.
const PAGE: &str = "<pre id=seen></pre><script>(async () => { let seen = []; for (let i = 0; i < 8; i++) { \
     let answer = await fetch(\"/close?\" + i, { cache: \"no-store\" }); seen.push(await answer.text()); } \
     document.getElementById(\"seen\").textContent = \"[\" + seen.join(\",\") + \"]\"; })()</script>";

/// Port of an [`Nginx`] in clear: `/login` sets the cookie `sid`.
pub const CLEAR: u16 = 80;

/// An nginx with a session cache of its own.
#[derive(Debug)]
pub struct Nginx {
    _process: Process,
    _folder: Folder,
}

impl Nginx {
    /// Starts one that serves TLS on `port` without tickets, and waits until it listens.
    pub fn start(netns: &Netns, name: &str, port: u16, authority: &Authority) -> Result<Self> {
        Self::with_keys(netns, name, port, authority, None, "")
    }

    /// The same with HTTP/2.
    pub fn with_http2(netns: &Netns, name: &str, port: u16, authority: &Authority) -> Result<Self> {
        Self::with_keys(netns, name, port, authority, None, "http2")
    }

    /// The same with tickets: sealed with a key of its own, or with this one (80 bytes) and a certificate
    /// that others have too: nginx accepts no ticket of a session with another certificate.
    pub fn with_tickets(
        netns: &Netns,
        name: &str,
        port: u16,
        authority: &Authority,
        shared: Option<(&[u8; 80], &Credentials)>,
    ) -> Result<Self> {
        Self::with_keys(netns, name, port, authority, Some(shared), "")
    }

    fn with_keys(
        netns: &Netns,
        name: &str,
        port: u16,
        authority: &Authority,
        tickets: Option<Option<(&[u8; 80], &Credentials)>>,
        http: &str,
    ) -> Result<Self> {
        let folder = Folder::new()?;
        let own = authority.issue(name)?;
        let credentials = tickets.flatten().map_or(&own, |(_, shared)| shared);
        let certificate = folder.write("certificate.pem", &credentials.certificate_pem)?;
        let key = folder.write("key.pem", &credentials.key_pem)?;
        let path = folder.path().display();
        let tickets = match tickets {
            None => "ssl_session_tickets off;".to_owned(),
            Some(None) => "ssl_session_tickets on;".to_owned(),
            Some(Some((key, _))) => {
                let file = folder.path().join("ticket.key");
                std::fs::write(&file, key)?;
                format!("ssl_session_tickets on;\nssl_session_ticket_key {};", file.display())
            }
        };
        let identity = format!(
            r#"{{"backend":"{name}","reused":"$ssl_session_reused","protocol":"$ssl_protocol","peer":"$remote_addr:$remote_port","proxied":""}}"#
        );
        let text = format!(
            "daemon off;\nmaster_process off;\nworker_processes 1;\nerror_log stderr warn;\npid {path}/pid;\n\
             events {{ worker_connections 1024; }}\n\
             http {{\n\
               access_log off;\ndefault_type application/json;\n\
               client_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\nfastcgi_temp_path {path}/fastcgi;\n\
               uwsgi_temp_path {path}/uwsgi;\nscgi_temp_path {path}/scgi;\n\
               server {{\n\
                 listen {port} ssl {http};\nlisten [::]:{port} ssl {http};\n\
                 ssl_certificate {};\nssl_certificate_key {};\nssl_protocols TLSv1.2 TLSv1.3;\n\
                 ssl_session_cache shared:sessions:4m;\n{tickets}\nssl_session_timeout 10m;\n\
                 location / {{ return 200 '{identity}'; }}\n\
                 location = /login {{ add_header Set-Cookie \"sid=$request_id; Path=/; HttpOnly\"; return 200 '{identity}'; }}\n\
                 location = /close {{ keepalive_timeout 0; return 200 '{identity}'; }}\n\
                 location = /page {{ keepalive_timeout 0; default_type text/html; return 200 '{PAGE}'; }}\n\
               }}\n\
               server {{\n\
                 listen {CLEAR};\nlisten [::]:{CLEAR};\n\
                 location / {{ return 200 '{identity}'; }}\n\
                 location = /login {{ add_header Set-Cookie \"sid=$request_id; Path=/; HttpOnly\"; return 200 '{identity}'; }}\n\
               }}\n\
             }}\n",
            certificate.display(),
            key.display()
        );
        let config = folder.write("nginx.conf", &text)?;
        let mut command = netns.command("nginx");
        command.arg("-p").arg(folder.path()).arg("-c").arg(&config);
        let mut process = Process::start(command, None).context("starting nginx; is it installed?")?;
        process.listens(netns, SocketAddr::from(([127, 0, 0, 1], port))).context("nginx")?;
        Ok(Self { _process: process, _folder: folder })
    }
}

/// A user with `openssl s_client` and a session in a file.
#[derive(Debug)]
pub struct OpensslUser {
    folder: Folder,
    authority: PathBuf,
    version: Version,
    tickets: bool,
}

impl OpensslUser {
    /// The same user, who takes tickets.
    #[must_use]
    pub fn with_tickets(self) -> Self {
        Self { tickets: true, ..self }
    }

    /// One without a session.
    pub fn new(authority: &Authority, version: Version) -> Result<Self> {
        let folder = Folder::new()?;
        let authority = folder.write("authority.pem", &authority.pem())?;
        Ok(Self { folder, authority, version, tickets: false })
    }

    /// Connects, asks who answers, and closes.
    pub fn visit(&self, netns: &Netns, from: IpAddr, to: SocketAddr) -> Result<Identity, Failure> {
        let session = self.folder.path().join("session.pem");
        let mut command = netns.command("timeout");
        command.args(["10", "openssl", "s_client", "-ign_eof", "-verify_return_error"]);
        if !self.tickets {
            command.arg("-no_ticket");
        }
        command.args(["-servername", HOST, "-connect", &to.to_string()]);
        command.args(["-bind", &SocketAddr::new(from, 0).to_string()]);
        command.arg(match self.version {
            Version::Tls12 => "-tls1_2",
            Version::Tls13 => "-tls1_3",
        });
        command.arg("-CAfile").arg(&self.authority).arg("-sess_out").arg(&session);
        match session.metadata().map_err(|error| error.kind()) {
            Ok(_) => {
                command.arg("-sess_in").arg(&session);
            }
            Err(ErrorKind::NotFound) => {}
            Err(kind) => return Err(Failure::Connect(anyhow::anyhow!("{}: {kind}", session.display()))),
        }
        let request = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
        let text = execute(&mut command, Some(&request))
            .with_context(|| format!("from {from} to {to}"))
            .map_err(Failure::Handshake)?;
        let reused = text.lines().any(|line| line.starts_with("Reused, TLSv1"));
        let read = || {
            let line = text
                .lines()
                .find(|line| line.starts_with("{\"backend\""))
                .context("no identity in the answer")?;
            // s_client says `closed` right behind the body.
            let end = line.rfind('}').context("the identity is cut short")?;
            let identity: Identity = serde_json::from_str(&line[..=end])?;
            if reused != (identity.reused == "r") {
                bail!("client and server disagree: reused {reused}, {identity:?}");
            }
            Ok(identity)
        };
        read().with_context(|| format!("openssl said:\n{text}")).map_err(Failure::Request)
    }
}
