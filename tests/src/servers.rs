//! TLS servers of several makes: how each is started, and what becomes of clients that return to it.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};

use crate::{
    daemon::{Folder, Process},
    netns::Netns,
    system::Nginx,
    tls::{Authority, Manners, Server, User, Version},
};

/// What a client comes back with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    /// For people.
    pub name: &'static str,
    /// The version that it speaks.
    pub version: Version,
    /// It takes tickets of TLS 1.2.
    pub tickets: bool,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 3] = [
        Self { name: "TLS 1.2 session ID", version: Version::Tls12, tickets: false },
        Self { name: "TLS 1.2 ticket", version: Version::Tls12, tickets: true },
        Self { name: "TLS 1.3 ticket", version: Version::Tls13, tickets: true },
    ];

    /// A client of this way.
    pub fn user(self, authority: &Authority) -> Result<User> {
        let user = User::new(authority, self.version)?;
        Ok(if self.tickets { user.with_tickets() } else { user })
    }
}

/// How many of a client's returns are resumed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resumed {
    /// All.
    All,
    /// Those that the balancer happens to send home: nothing in the hello says where that is.
    Chance,
    /// None: the server resumes no session in this way, wherever its clients come from.
    Never,
    /// The server does not speak the version.
    Unspoken,
}

/// What is expected of a make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// The state that `dispatcherctl identities` shows.
    pub state: &'static str,
    /// Bytes of a key's name; 0 where tickets carry none.
    pub name_len: usize,
    /// The versions that it issues tickets in.
    pub versions: &'static [&'static str],
    /// Its clients, in the order of [`Way::ALL`].
    pub resumed: [Resumed; 3],
}

/// A kind of server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Make {
    /// nginx with OpenSSL.
    Nginx,
    /// `gnutls-serv`.
    Gnutls,
    /// The same without tickets: `--noticket`.
    Ticketless,
    /// rustls, in this process.
    Rustls,
    /// lighttpd with mbedTLS 2.28: TLS 1.2 at most, key names of 4 bytes, no session cache.
    Mbedtls,
    /// `openssl s_server -no_ticket`: no tickets in TLS 1.2; those of TLS 1.3 are random numbers that the
    /// server remembers.
    Stateful,
    /// rustls with tickets that begin with random bytes, as those of Go from 1.21 on.
    Nameless,
}

impl Make {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Nginx,
        Self::Gnutls,
        Self::Rustls,
        Self::Mbedtls,
        Self::Nameless,
        Self::Stateful,
        Self::Ticketless,
    ];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Gnutls => "gnutls-serv",
            Self::Ticketless => "gnutls-noticket",
            Self::Rustls => "rustls",
            Self::Mbedtls => "lighttpd-mbedtls",
            Self::Stateful => "openssl-no-ticket",
            Self::Nameless => "rustls-nameless",
        }
    }

    /// What is expected.
    #[must_use]
    pub fn expected(self) -> Expected {
        use Resumed::{All, Chance, Never, Unspoken};
        const BOTH: &[&str] = &["TLSv1.3", "TLSv1.2"];
        let routable = Expected { state: "routable", name_len: 16, versions: BOTH, resumed: [All; 3] };
        let opaque = Expected { state: "opaque", name_len: 0, versions: BOTH, resumed: [All, All, Chance] };
        match self {
            Self::Nginx | Self::Gnutls | Self::Rustls => routable,
            Self::Mbedtls => {
                Expected { name_len: 4, versions: &["TLSv1.2"], resumed: [Never, All, Unspoken], ..routable }
            }
            Self::Stateful => Expected { versions: &["TLSv1.3"], ..opaque },
            Self::Nameless => opaque,
            Self::Ticketless => {
                Expected { state: "no-tickets", versions: &[], resumed: [All, All, Never], ..opaque }
            }
        }
    }

    /// Starts a server with session cache and keys of its own, and waits until it listens.
    pub fn start(self, netns: &Netns, name: &str, port: u16, authority: &Authority) -> Result<Running> {
        let rustls = |nameless| {
            let manners = Manners { tickets: true, nameless, ..Manners::default() };
            Server::start(netns, name, port, authority, manners).map(Running::Rustls)
        };
        match self {
            Self::Nginx => Nginx::with_tickets(netns, name, port, authority, None).map(Running::Nginx),
            Self::Rustls => rustls(false),
            Self::Nameless => rustls(true),
            Self::Gnutls | Self::Ticketless => {
                let tickets = if self == Self::Ticketless { "--noticket" } else { "" };
                program("gnutls-serv", "gnutls-bin", netns, name, port, authority, |_| {
                    words(&format!(
                        "--http --quiet --disable-client-cert --port {port} {tickets} \
                         --x509certfile {CERTIFICATE} --x509keyfile {KEY}"
                    ))
                })
            }
            Self::Stateful => program("openssl", "openssl", netns, name, port, authority, |_| {
                words(&format!("s_server -www -no_ticket -accept {port} -cert {CERTIFICATE} -key {KEY}"))
            }),
            Self::Mbedtls => {
                program("lighttpd", "lighttpd-mod-mbedtls", netns, name, port, authority, |folder| {
                    folder.write("index.html", name)?;
                    let path = folder.path().display();
                    folder.write(
                        "lighttpd.conf",
                        &format!(
                            "server.modules = (\"mod_mbedtls\")\nserver.document-root = \"{path}\"\n\
                         index-file.names = (\"index.html\")\nserver.port = {port}\n\
                         ssl.engine = \"enable\"\nssl.pemfile = \"{path}/{CERTIFICATE}\"\n\
                         ssl.privkey = \"{path}/{KEY}\"\n\
                         $SERVER[\"socket\"] == \"[::]:{port}\" {{ ssl.engine = \"enable\" }}\n"
                        ),
                    )?;
                    words("-D -f lighttpd.conf")
                })
            }
        }
        .with_context(|| format!("starting {} as {name}", self.name()))
    }
}

/// A server. It stops when dropped.
#[derive(Debug)]
pub enum Running {
    /// nginx.
    Nginx(Nginx),
    /// One in this process.
    Rustls(Server),
    /// Another program.
    Program {
        /// The program.
        process: Process,
        /// Its files.
        folder: Folder,
    },
}

const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";

fn words(text: &str) -> Result<Vec<String>> {
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// Starts a program of a Debian package in a folder with certificate and key. `arguments` may add files.
fn program(
    program: &str,
    package: &str,
    netns: &Netns,
    name: &str,
    port: u16,
    authority: &Authority,
    arguments: impl FnOnce(&Folder) -> Result<Vec<String>>,
) -> Result<Running> {
    let folder = Folder::new()?;
    let credentials = authority.issue(name)?;
    folder.write(CERTIFICATE, &credentials.certificate_pem)?;
    folder.write(KEY, &credentials.key_pem)?;
    let mut command = netns.command(program);
    command.args(arguments(&folder)?).current_dir(folder.path());
    let missing = || format!("is it installed? (`cargo xtask setup`, or Debian: apt-get install {package})");
    let mut process = Process::start(command, None).with_context(missing)?;
    process.listens(netns, SocketAddr::from((Ipv4Addr::LOCALHOST, port))).with_context(missing)?;
    Ok(Running::Program { process, folder })
}
