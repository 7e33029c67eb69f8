//! Which compiler builds the BPF objects.
//!
//! No toolchain ships a ready `core` for BPF, so the compiler must have the sources of `core` beside it,
//! and must accept `-Z build-std`: a nightly does, any other does with `RUSTC_BOOTSTRAP=1`.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use crate::{
    pins,
    process::{at_root, cargo_proxy, output_of},
};

/// A release number; order is by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FromStr for Version {
    type Err = ();

    /// Reads `1.96.0`, `1.97.0-nightly`, and the second word of `rustc 1.96.0 (ac68faa20 2026-05-25)`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let word = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        let mut numbers = word.ok_or(())?.split(['.', '-', '+']).map(str::parse);
        match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch))) => Ok(Self(major, minor, patch)),
            _ => Err(()),
        }
    }
}

/// A compiler that might build the BPF objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Compiler {
    /// Named by `DISPATCHER_BPF_RUSTC`.
    Chosen(PathBuf),
    /// rustup's nightly.
    Nightly,
    /// The toolchain that runs this command.
    Active,
    /// The distribution's own package.
    Distribution(PathBuf),
}

/// What was found out about one compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) compiler: Compiler,
    pub(crate) version: Option<Version>,
    pub(crate) has_sources: bool,
}

impl Candidate {
    /// Why it cannot be used, if it cannot.
    pub(crate) fn objection(&self) -> Option<String> {
        let Some(version) = self.version else {
            return Some(format!("{} is not there", self.compiler));
        };
        if version < pins::OLDEST_RUSTC {
            return Some(format!("{} is {version}, older than {}", self.compiler, pins::OLDEST_RUSTC));
        }
        (!self.has_sources)
            .then(|| format!("{} {version} has no sources of `core` (rust-src)", self.compiler))
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            Some(version) => write!(f, "{} {version}", self.compiler),
            None => write!(f, "{}", self.compiler),
        }
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen(path) => write!(f, "DISPATCHER_BPF_RUSTC={}", path.display()),
            Self::Nightly => write!(f, "rustup's nightly"),
            Self::Active => write!(f, "the active toolchain"),
            Self::Distribution(path) => write!(f, "the distribution's {}", path.display()),
        }
    }
}

impl Compiler {
    /// A cargo that compiles with this compiler.
    pub(crate) fn cargo(&self) -> Command {
        self.employ(cargo_proxy())
    }

    /// The `cargo-clippy` beside a compiler that is not rustup's.
    pub(crate) fn own_clippy(&self) -> Option<Command> {
        match self {
            Self::Chosen(path) | Self::Distribution(path) => {
                let program = path.with_file_name("cargo-clippy");
                program.is_file().then(|| self.employ(at_root(Command::new(program))))
            }
            Self::Nightly | Self::Active => None,
        }
    }

    fn employ(&self, mut command: Command) -> Command {
        command.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTC_WRAPPER").env_remove("RUSTC_WORKSPACE_WRAPPER");
        match self {
            Self::Chosen(path) | Self::Distribution(path) => command.env("RUSTC", path),
            Self::Nightly => command.env_remove("RUSTC").env("RUSTUP_TOOLCHAIN", "nightly"),
            Self::Active => command.env_remove("RUSTC"),
        };
        command
    }
}

/// The first candidate without an objection; a compiler that was chosen by name is never replaced.
pub(crate) fn choose(mut candidates: impl Iterator<Item = Candidate>) -> Result<Candidate, Vec<String>> {
    let mut objections = Vec::new();
    for candidate in candidates.by_ref() {
        let Some(objection) = candidate.objection() else {
            return Ok(candidate);
        };
        objections.push(objection);
        if matches!(candidate.compiler, Compiler::Chosen(_)) {
            break;
        }
    }
    Err(objections)
}

/// Looks at this machine; the later candidates are looked at only if the earlier ones will not do.
pub(crate) fn detect() -> Result<Candidate, Vec<String>> {
    choose(preference(env::var_os("DISPATCHER_BPF_RUSTC").map(PathBuf::from)).into_iter().map(examine))
}

/// Compilers in the order in which we ask them.
fn preference(chosen: Option<PathBuf>) -> Vec<Compiler> {
    let usual =
        [Compiler::Nightly, Compiler::Active, Compiler::Distribution(pins::DISTRIBUTION_RUSTC.into())];
    chosen.map(Compiler::Chosen).into_iter().chain(usual).collect()
}

fn examine(compiler: Compiler) -> Candidate {
    match &compiler {
        Compiler::Chosen(path) | Compiler::Distribution(path) => examine_rustc(compiler.clone(), path),
        Compiler::Active => examine_rustc(compiler, Path::new("rustc")),
        Compiler::Nightly => {
            // Without asking rustup, which is slow to start and might download.
            let toolchain = rustup_home().and_then(|home| nightly_under(&home));
            match toolchain {
                Some(sysroot) => examine_rustc(compiler, &sysroot.join("bin/rustc")),
                None => Candidate { compiler, version: None, has_sources: false },
            }
        }
    }
}

fn examine_rustc(compiler: Compiler, rustc: &Path) -> Candidate {
    let version =
        output_of(Command::new(rustc).arg("--version")).and_then(|text| Version::from_str(&text).ok());
    let sysroot = version.and_then(|_| output_of(Command::new(rustc).args(["--print", "sysroot"])));
    let has_sources = sysroot.is_some_and(|sysroot| has_sources(Path::new(&sysroot)));
    Candidate { compiler, version, has_sources }
}

fn has_sources(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

fn rustup_home() -> Option<PathBuf> {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")))
}

fn nightly_under(rustup_home: &Path) -> Option<PathBuf> {
    let name = format!("nightly-{}-unknown-linux-gnu", env::consts::ARCH);
    Some(rustup_home.join("toolchains").join(name)).filter(|path| path.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(compiler: Compiler, version: Option<Version>, has_sources: bool) -> Candidate {
        Candidate { compiler, version, has_sources }
    }

    const NEW: Option<Version> = Some(Version(1, 96, 0));

    #[test]
    fn versions_are_read_as_programs_print_them() {
        for (text, version) in [
            ("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)", Version(1, 96, 0)),
            ("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)", Version(1, 97, 0)),
            ("bpf-linker 0.10.3", Version(0, 10, 3)),
            ("0.10.3", Version(0, 10, 3)),
        ] {
            assert_eq!(text.parse(), Ok(version), "{text}");
        }
        for text in ["", "rustc", "rustc 1", "rustc 1.x.0"] {
            assert_eq!(text.parse::<Version>(), Err(()), "{text}");
        }
        assert!(Version(1, 100, 0) > Version(1, 99, 9));
    }

    #[test]
    fn first_usable_candidate_wins() {
        let debian = candidate(Compiler::Distribution("/usr/bin/rustc".into()), NEW, true);
        let found = choose(
            [
                candidate(Compiler::Nightly, NEW, false),
                candidate(Compiler::Active, NEW, false),
                debian.clone(),
            ]
            .into_iter(),
        );
        assert_eq!(found, Ok(debian));
    }

    #[test]
    fn old_compilers_are_refused_even_with_sources() {
        let old = candidate(Compiler::Active, Some(Version(1, 63, 0)), true);
        assert!(old.objection().is_some_and(|text| text.contains("1.63.0, older than")));
    }

    #[test]
    fn a_compiler_chosen_by_name_is_not_replaced() {
        let found = choose(
            [
                candidate(Compiler::Chosen("/x/rustc".into()), None, false),
                candidate(Compiler::Nightly, NEW, true),
            ]
            .into_iter(),
        );
        assert_eq!(found, Err(vec!["DISPATCHER_BPF_RUSTC=/x/rustc is not there".to_owned()]));
    }

    #[test]
    fn every_objection_is_told() {
        let found = choose(
            [candidate(Compiler::Nightly, None, false), candidate(Compiler::Active, NEW, false)].into_iter(),
        );
        assert_eq!(found.map_err(|objections| objections.len()), Err(2));
    }

    #[test]
    fn the_chosen_compiler_is_asked_first() {
        assert_eq!(preference(Some("/x".into())).first(), Some(&Compiler::Chosen("/x".into())));
        assert_eq!(preference(None).first(), Some(&Compiler::Nightly));
    }
}
