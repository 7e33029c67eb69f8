//! Everything whose version or name is fixed, in one place.

use crate::toolchain::Version;

/// The BPF target: little-endian, as are the hosts we support.
pub(crate) const BPF_TARGET: &str = "bpfel-unknown-none";

/// Instruction set of the BPF objects. v3 has 32-bit registers and the atomic exchange and
/// compare-and-exchange that the flow and stash slots are claimed with (Linux 5.12).
pub(crate) const BPF_CPU: &str = "v3";

/// The linker we test with; `cargo xtask setup` installs exactly this one.
pub(crate) const BPF_LINKER: &str = "0.10.3";

/// Oldest compiler that builds the workspace: `rust-version` of the root manifest.
pub(crate) const OLDEST_RUSTC: Version = Version(1, 95, 0);

/// Debian's packages of a recent compiler and of the sources of `core`.
pub(crate) const DEBIAN_RUSTC: &[&str] = &["rustc-web", "rust-web-src"];

/// Debian's package of the clippy that belongs to [`DEBIAN_RUSTC`].
pub(crate) const DEBIAN_CLIPPY: &str = "rust-web-clippy";

/// Where a distribution puts its compiler.
pub(crate) const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";

/// The licence checker that `cargo xtask check` offers to install.
pub(crate) const CARGO_DENY: &str = "0.20.2";

/// Python packages that scenarios call, with their versions.
pub(crate) const REQUIREMENTS: &str = "tests/requirements.txt";

/// What needs a tool; each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Compiling the objects and the host programs.
    Build,
    /// The demo with built-in peers, and the daemon on real interfaces.
    Run,
    /// Scenarios and measurements against other people's software.
    Test,
}

/// A program that we call at run time, or a module of nginx (`.so`), and the packages that bring it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) why: &'static str,
    pub(crate) need: Need,
    pub(crate) debian: &'static str,
    pub(crate) fedora: &'static str,
    pub(crate) arch: &'static str,
}

const fn tool(
    program: &'static str,
    need: Need,
    [debian, fedora, arch]: [&'static str; 3],
    why: &'static str,
) -> Tool {
    Tool { program, why, need, debian, fedora, arch }
}

/// Programs by need, the most basic first.
pub(crate) const TOOLS: &[Tool] = &[
    tool("ip", Need::Run, ["iproute2", "iproute", "iproute2"], "namespaces and veth pairs"),
    tool("ethtool", Need::Run, ["ethtool", "ethtool", "ethtool"], "checksum and GRO settings of veth"),
    tool("nft", Need::Test, ["nftables", "nftables", "nftables"], "packet loss in scenarios"),
    tool("openssl", Need::Test, ["openssl", "openssl", "openssl"], "certificates, TLS clients and servers"),
    tool("curl", Need::Test, ["curl", "curl", "curl"], "HTTP clients"),
    tool("nginx", Need::Test, ["nginx-light", "nginx", "nginx"], "TLS backends"),
    tool(
        "ngx_stream_module.so",
        Need::Test,
        ["libnginx-mod-stream", "nginx-mod-stream", "nginx"],
        "TLS backends with nginx that only unwrap",
    ),
    tool("gnutls-serv", Need::Test, ["gnutls-bin", "gnutls-utils", "gnutls"], "TLS backends with GnuTLS"),
    tool(
        "lighttpd",
        Need::Test,
        ["lighttpd-mod-mbedtls", "lighttpd-mod_mbedtls", "lighttpd"],
        "TLS backends with mbedTLS",
    ),
    tool("haproxy", Need::Test, ["haproxy", "haproxy", "haproxy"], "the proxy we compare with"),
    tool("stunnel4", Need::Test, ["stunnel4", "stunnel", "stunnel"], "TLS backends that only unwrap"),
    tool("tcpdump", Need::Test, ["tcpdump", "tcpdump", "tcpdump"], "captures of failed scenarios"),
    tool("python3", Need::Test, ["python3", "python3", "python"], "small peers with odd manners"),
    tool("wrk", Need::Test, ["wrk", "wrk", "wrk"], "load"),
    tool("h2load", Need::Test, ["nghttp2-client", "nghttp2", "nghttp2"], "load over HTTP/2"),
];
