//! `cargo xtask setup`: finds what the other commands need, and installs what is missing.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{
    pins::{self, Need, TOOLS, Tool},
    process::{cargo, find, find_nginx_module, is_root, output_of, root, run, shown, target_dir, try_within},
    toolchain::{self, Candidate, Compiler, Version},
};

/// Find or install the BPF toolchain and the programs that the demo and the tests call
///
/// Says for each item what was found or why it is needed. Installs with rustup, `cargo install` and, as
/// root where there is apt-get, with Debian's packages; elsewhere prints the command to run. Changes
/// nothing where nothing is missing. The other commands do the same for what they need themselves.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Only report; fail if something is missing
    #[arg(long)]
    check: bool,
    /// For which commands
    #[arg(long = "for", value_enum, default_value_t = For::All, value_name = "WHAT")]
    purpose: For,
}

#[derive(Clone, Copy, ValueEnum)]
enum For {
    /// `build`
    Build,
    /// `run`: the same, and what the built-in demo calls
    Run,
    /// `test` and `bench`: everything
    All,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let need = match args.purpose {
        For::Build => Need::Build,
        For::Run => Need::Run,
        For::All => Need::Test,
    };
    let found = look(need);
    found.print(need);
    if found.complete() {
        return Ok(());
    }
    if args.check {
        bail!("some items are missing; `cargo xtask setup` installs them");
    }
    install(found)?;
    let after = look(need);
    after.print(need);
    if !after.missing.is_empty() {
        bail!("still missing. Install by hand:\n{}", by_hand(&after.missing));
    }
    if after.packages == Some(false) {
        bail!("still missing: the Python packages of {}; see above", pins::REQUIREMENTS);
    }
    Ok(())
}

/// What a command needs, installed if missing; silent if all is there.
///
/// Programs that only some scenarios call are not worth giving up all the others.
pub(crate) fn ensure(need: Need) -> Result<Compiler> {
    let found = look(need);
    if found.complete()
        && let Ok(candidate) = found.compiler
    {
        return Ok(candidate.compiler);
    }
    found.print(need);
    let compiler = install(found)?;
    let after = look(need);
    let missing = |needed: fn(&Tool) -> bool| {
        let names = after.missing.iter().filter(|tool| needed(tool)).map(|tool| tool.program);
        names.collect::<Vec<_>>().join(", ")
    };
    if after.packages == Some(false) {
        eprintln!("xtask: going on without the Python packages of {}", pins::REQUIREMENTS);
    }
    let (required, optional) =
        (missing(|tool| tool.need < Need::Test), missing(|tool| tool.need == Need::Test));
    if !required.is_empty() {
        bail!("{required} could not be installed. Install by hand:\n{}", by_hand(&after.missing));
    }
    if !optional.is_empty() {
        eprintln!("xtask: going on without {optional}: what calls them will fail");
    }
    Ok(compiler)
}

/// The compiler for BPF if both it and the linker are there; installs nothing.
pub(crate) fn present() -> Option<Compiler> {
    let found = look(Need::Build);
    found.linker.is_ok().then(|| found.compiler.ok()).flatten().map(|candidate| candidate.compiler)
}

/// The state of this machine.
struct Found {
    compiler: Result<Candidate, Vec<String>>,
    linker: Result<Version, String>,
    tools: Vec<(&'static Tool, PathBuf)>,
    missing: Vec<&'static Tool>,
    /// Whether Python's packages are there, where they are needed.
    packages: Option<bool>,
}

impl Found {
    fn complete(&self) -> bool {
        self.compiler.is_ok()
            && self.linker.is_ok()
            && self.missing.is_empty()
            && self.packages != Some(false)
    }

    fn print(&self, need: Need) {
        match &self.compiler {
            Ok(candidate) => item(true, "compiler for BPF", &candidate.to_string()),
            Err(objections) => {
                item(false, "compiler for BPF", "builds `core` for the BPF target; looked at:");
                for objection in objections {
                    println!("{:30}- {objection}", "");
                }
            }
        }
        match &self.linker {
            Ok(version) => item(true, "bpf-linker", &version.to_string()),
            Err(reason) => item(false, "bpf-linker", &format!("links BPF objects; {reason}")),
        }
        for tool in TOOLS.iter().filter(|tool| tool.need <= need) {
            match self.tools.iter().find(|(present, _)| *present == tool) {
                Some((_, path)) => item(true, tool.program, &path.display().to_string()),
                None => item(false, tool.program, &format!("for {} (package {})", tool.why, tool.debian)),
            }
        }
        if let Some(there) = self.packages {
            let text = if there {
                python().display().to_string()
            } else {
                format!("fuzz the control API ({})", pins::REQUIREMENTS)
            };
            item(there, "Python packages", &text);
        }
    }
}

fn item(present: bool, name: &str, text: &str) {
    println!("{:<9} {name:<18}  {text}", if present { "ok" } else { "missing" });
}

fn look(need: Need) -> Found {
    let packages = (need >= Need::Test).then(packages_are_there);
    let mut found = Found {
        compiler: toolchain::detect(),
        linker: linker(),
        tools: Vec::new(),
        missing: Vec::new(),
        packages,
    };
    for tool in TOOLS.iter().filter(|tool| tool.need <= need) {
        let place =
            if tool.program.ends_with(".so") { find_nginx_module(tool.program) } else { find(tool.program) };
        match place {
            Some(path) => found.tools.push((tool, path)),
            None => found.missing.push(tool),
        }
    }
    found
}

fn linker() -> Result<Version, String> {
    let wanted = format!("version {} is needed", pins::BPF_LINKER);
    let path = find("bpf-linker").ok_or_else(|| format!("not found; {wanted}"))?;
    let printed = output_of(Command::new(&path).arg("--version")).unwrap_or_default();
    match (printed.parse::<Version>(), pins::BPF_LINKER.parse::<Version>()) {
        (Ok(version), Ok(pinned)) if compatible(version, pinned) => Ok(version),
        (Ok(version), _) => Err(format!("{} is {version}; {wanted}", path.display())),
        (Err(()), _) => Err(format!("{} --version printed {printed:?}; {wanted}", path.display())),
    }
}

/// The same release series, no older: what cargo calls a compatible release below 1.0.
fn compatible(version: Version, pinned: Version) -> bool {
    (version.0, version.1) == (pinned.0, pinned.1) && version.2 >= pinned.2
}

/// Compiler and linker or an error; of the programs those that can be had.
fn install(found: Found) -> Result<Compiler> {
    let compiler = match found.compiler {
        Ok(candidate) => candidate.compiler,
        Err(_) => install_compiler()?,
    };
    if found.linker.is_err() {
        install_linker()?;
        if let Err(reason) = linker() {
            bail!("bpf-linker was installed, but {reason}; is another one earlier on PATH?");
        }
    }
    install_tools(&found.missing);
    if found.packages == Some(false)
        && let Err(error) = install_packages()
    {
        println!("          {error:#}");
    }
    Ok(compiler)
}

/// Python's packages have a folder of their own, so that the system's stay as they are.
fn python() -> PathBuf {
    target_dir().join("python")
}

/// The list of what is installed lies beside it.
fn packages_are_there() -> bool {
    let wanted = fs::read(root().join(pins::REQUIREMENTS));
    wanted.is_ok_and(|wanted| fs::read(python().join("requirements.txt")).is_ok_and(|have| have == wanted))
}

fn install_packages() -> Result<()> {
    let (folder, wanted) = (python(), root().join(pins::REQUIREMENTS));
    println!("install   Python packages of {} into {}", pins::REQUIREMENTS, folder.display());
    let make = || {
        let mut command = Command::new("python3");
        command.args(["-m", "venv", "--clear"]).arg(&folder);
        try_within(&mut command, Duration::from_secs(120))
    };
    // Debian has a package of its own for it.
    if make().is_err() {
        apt_install(&["python3-venv"])?;
        make()?;
    }
    let mut command = Command::new(folder.join("bin/pip"));
    command.args(["install", "--quiet", "--disable-pip-version-check", "--requirement"]).arg(&wanted);
    try_within(&mut command, Duration::from_secs(300))?;
    fs::copy(&wanted, folder.join("requirements.txt"))?;
    Ok(())
}

fn install_compiler() -> Result<Compiler> {
    if env::var_os("DISPATCHER_BPF_RUSTC").is_some() {
        bail!(
            "DISPATCHER_BPF_RUSTC names a compiler that cannot build BPF objects (see above); correct or unset it"
        );
    }
    let mut tried = Vec::new();
    if find("rustup").is_some() {
        let mut command = Command::new("rustup");
        command.args(["component", "add", "rust-src"]).env("RUST_BACKTRACE", "0");
        println!("install   {}", shown(&command));
        match try_within(&mut command, Duration::from_secs(90)) {
            Ok(()) => match toolchain::detect() {
                Ok(candidate) => return Ok(candidate.compiler),
                Err(objections) => tried.extend(objections),
            },
            Err(error) => {
                println!("          {error:#}; trying the distribution's compiler");
                tried.push(format!("{error:#}"));
            }
        }
    }
    match apt_install(pins::DEBIAN_RUSTC) {
        Ok(()) => match toolchain::detect() {
            Ok(candidate) => return Ok(candidate.compiler),
            Err(objections) => tried.extend(objections),
        },
        Err(error) => tried.push(format!("{error:#}")),
    }
    bail!(
        "no compiler for BPF. Tried:\n  - {}\nDo one of these, then run the command again:\n  \
         rustup component add rust-src                            (any rustup toolchain from {oldest} on)\n  \
         rustup toolchain install nightly --component rust-src\n  \
         apt-get install {debian}                  (Debian)\n  \
         DISPATCHER_BPF_RUSTC=/path/to/rustc                      (one with the sources of `core`)",
        tried.join("\n  - "),
        oldest = pins::OLDEST_RUSTC,
        debian = pins::DEBIAN_RUSTC.join(" "),
    )
}

fn install_linker() -> Result<()> {
    let mut command = cargo();
    command.args(["install", "--locked", "bpf-linker", "--version", pins::BPF_LINKER]);
    println!("install   {} (compiles it: one to three minutes)", shown(&command));
    run(&mut command, "bpf-linker is needed to build BPF objects; is the crates registry reachable?")
}

fn install_tools(missing: &[&'static Tool]) {
    let packages: Vec<_> = missing.iter().map(|tool| tool.debian).collect();
    if packages.is_empty() {
        return;
    }
    let Err(error) = apt_install(&packages) else { return };
    println!("          {error:#}");
    // One package that is not to be had makes apt-get refuse all.
    if packages.len() > 1 && find("apt-get").is_some() && is_root() {
        for package in packages {
            if let Err(error) = apt_install(&[package]) {
                println!("          {error:#}");
            }
        }
    }
}

fn by_hand(missing: &[&'static Tool]) -> String {
    let list = |package: fn(&Tool) -> &'static str| {
        missing.iter().map(|tool| package(tool)).collect::<Vec<_>>().join(" ")
    };
    format!(
        "  Debian, Ubuntu:  sudo apt-get install --no-install-recommends {}\n  \
         Fedora:          sudo dnf install {}\n  \
         Arch:            sudo pacman -S {}",
        list(|tool| tool.debian),
        list(|tool| tool.fedora),
        list(|tool| tool.arch)
    )
}

/// Installs Debian packages, without starting the services that some of them bring.
pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("there is no apt-get to install {names} with");
    }
    if !is_root() {
        bail!("installing {names} needs root");
    }
    println!("install   Debian packages {names}");
    let _quiet = NoServices::new(Path::new("/usr/sbin/policy-rc.d"));
    let update = apt_get([OsStr::new("update")]);
    if let Err(error) = try_within(&mut { update }, Duration::from_secs(180)) {
        println!("          {error:#}; trying with the package lists of before");
    }
    let fixed = ["install", "--yes", "--no-install-recommends", "--quiet"];
    let mut command = apt_get(fixed.iter().chain(packages).map(OsStr::new));
    try_within(&mut command, Duration::from_secs(900))
}

fn apt_get<'a>(args: impl IntoIterator<Item = &'a OsStr>) -> Command {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// While it lives, packages that are installed start no services: nginx would take port 80.
struct NoServices<'a>(Option<&'a Path>);

impl<'a> NoServices<'a> {
    fn new(policy: &'a Path) -> Self {
        let written = !policy.exists()
            && fs::write(policy, "#!/bin/sh\nexit 101\n").is_ok()
            && fs::set_permissions(policy, fs::Permissions::from_mode(0o755)).is_ok();
        Self(written.then_some(policy))
    }
}

impl Drop for NoServices<'_> {
    fn drop(&mut self) {
        if let Some(policy) = self.0
            && let Err(error) = fs::remove_file(policy)
        {
            println!("          could not remove {}: {error}; remove it by hand", policy.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linkers_of_the_same_series_will_do() {
        let pinned = Version(0, 10, 3);
        assert!(compatible(Version(0, 10, 3), pinned));
        assert!(compatible(Version(0, 10, 4), pinned));
        assert!(!compatible(Version(0, 10, 2), pinned));
        assert!(!compatible(Version(0, 11, 0), pinned));
        assert!(!compatible(Version(1, 10, 3), pinned));
    }

    #[test]
    fn pinned_linker_version_is_one() {
        assert_eq!(pins::BPF_LINKER.parse(), Ok(Version(0, 10, 3)));
    }

    #[test]
    fn commands_by_hand_name_every_package() {
        let missing: Vec<_> =
            TOOLS.iter().filter(|tool| tool.program == "nginx" || tool.program == "ip").collect();
        let text = by_hand(&missing);
        for line in ["recommends iproute2 nginx-light\n", "dnf install iproute nginx\n", "-S iproute2 nginx"]
        {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn demo_needs_no_servers() {
        let demo: Vec<_> =
            TOOLS.iter().filter(|tool| tool.need <= Need::Run).map(|tool| tool.program).collect();
        assert_eq!(demo, ["ip", "ethtool"]);
    }

    #[test]
    fn policy_file_is_removed_again_and_a_foreign_one_is_kept() {
        let path = env::temp_dir().join(format!("xtask-policy-{}", std::process::id()));
        drop(NoServices::new(&path));
        assert!(!path.exists());
        fs::write(&path, "mine").expect("writing a temporary file");
        drop(NoServices::new(&path));
        assert_eq!(fs::read_to_string(&path).expect("reading it again"), "mine");
        fs::remove_file(&path).expect("removing it");
    }
}
