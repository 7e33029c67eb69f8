//! Calling other programs, with errors that say what was called.

use std::{
    env,
    ffi::OsString,
    io::{BufRead as _, BufReader, Read},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// The workspace's root folder.
pub(crate) fn root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's output folder for the host.
pub(crate) fn target_dir() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// A command that runs the cargo which runs us, in the workspace's root.
pub(crate) fn cargo() -> Command {
    at_root(Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())))
}

/// A command that runs the `cargo` found on the search path: with rustup that is the one which
/// heeds `RUSTUP_TOOLCHAIN`.
pub(crate) fn cargo_proxy() -> Command {
    find("cargo").map_or_else(cargo, |path| at_root(Command::new(path)))
}

/// The command, run in the workspace's root and with [`search_path`]. It does not see what cargo says of
/// this package: with it, build scripts would run again after every call without it, and back.
pub(crate) fn at_root(mut command: Command) -> Command {
    command.current_dir(root()).env("PATH", search_path());
    let own = |name: &OsString| {
        name.to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
    };
    for (name, _) in env::vars_os().filter(|(name, _)| own(name)) {
        command.env_remove(name);
    }
    command
}

/// `PATH` and the places that it often lacks: cargo's own programs (linkers among them), and the
/// administrator's ones.
pub(crate) fn search_path() -> OsString {
    let given = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&given).collect();
    let extra = cargo_bin().into_iter().chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    for folder in extra {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    env::join_paths(folders).unwrap_or(given)
}

fn cargo_bin() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    Some(home?.join("bin"))
}

/// Where a program is, looking through [`search_path`].
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|folder| folder.join(program)).find(|path| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// A module of nginx: its file, or nginx itself where it was built with it.
pub(crate) fn find_nginx_module(file: &str) -> Option<PathBuf> {
    let folders = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"].map(PathBuf::from);
    let there = folders.into_iter().map(|folder| folder.join(file)).find(|path| path.is_file());
    there.or_else(|| {
        let nginx = find("nginx")?;
        // On standard error: "--with-stream", or "--with-stream=dynamic" where the module is a file.
        let told = Command::new(&nginx).arg("-V").output().ok()?;
        let name = file.strip_prefix("ngx_")?.strip_suffix("_module.so")?;
        let with = format!("--with-{name}");
        String::from_utf8_lossy(&told.stderr).split_whitespace().any(|word| word == with).then_some(nginx)
    })
}

/// Whether we are the superuser.
pub(crate) fn is_root() -> bool {
    // Field 2 of "Uid:\treal\teffective\t.." without a dependency on libc.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective_uid(&status) == Some(0)
}

fn effective_uid(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Fails with one sentence if we are not the superuser.
pub(crate) fn demand_root(what: &str, otherwise: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    // sudo replaces PATH, and with it goes cargo, even under -E.
    let given: Vec<_> = env::args().skip(1).collect();
    bail!(
        "{what} needs root: run `sudo -E env \"PATH=$PATH\" cargo xtask {}`, or the same with doas{otherwise}.",
        given.join(" ")
    )
}

/// The command as one would type it, for messages.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    // Which cargo it is depends on how we were started and matters to nobody.
    let cargo = program.file_name().filter(|&name| name == "cargo");
    let mut text = cargo.unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Runs to the end, output to the terminal; fails unless the program succeeds.
pub(crate) fn run(command: &mut Command, then: &str) -> Result<()> {
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("starting `{}`", shown(command)))?;
    succeed(command, status, then)
}

/// Runs to the end; the output is shown only if the program fails.
pub(crate) fn run_quietly(command: &mut Command, then: &str) -> Result<()> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting `{}`", shown(command)))?;
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stdout));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
    }
    succeed(command, output.status, then)
}

/// Standard output of a program, if it starts and succeeds.
pub(crate) fn output_of(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs for at most `limit`, without output; the error has the last lines that the program complained with.
pub(crate) fn try_within(command: &mut Command, limit: Duration) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{}`", shown(command)))?;
    let errors = child.stderr.take().map(last_lines_of);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(());
            }
            let lines = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
            bail!("`{}` failed ({status}): {lines}", shown(command));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("`{}` did not finish in {} s", shown(command), limit.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Reads to the end beside the caller, so that the writer never waits for us.
fn last_lines_of(pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    const KEPT: usize = 3;
    thread::spawn(move || {
        let lines = BufReader::new(pipe).lines().map_while(Result::ok);
        let lines: Vec<_> = lines.filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(KEPT)..].join(" | ")
    })
}

/// Becomes the program, so that signals and the exit code are its own.
pub(crate) fn exec(command: &mut Command, then: &str) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("starting `{}`; {then}", shown(command)))
}

fn succeed(command: &Command, status: ExitStatus, then: &str) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    bail!("`{}` failed ({status}); {then}", shown(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_uid_is_the_second_number() {
        assert_eq!(effective_uid("Name:\tx\nUid:\t1000\t0\t0\t0\n"), Some(0));
        assert_eq!(effective_uid("Uid:\t0\t1000\t0\t0\n"), Some(1000));
        assert_eq!(effective_uid("Name:\tx\n"), None);
    }

    #[test]
    fn a_program_that_hangs_is_given_up() {
        let error = try_within(Command::new("sleep").arg("60"), Duration::from_millis(50));
        assert!(error.expect_err("sleep was not stopped").to_string().contains("did not finish"));
    }

    #[test]
    fn a_failure_shows_the_last_lines_of_the_errors() {
        let mut command = Command::new("sh");
        command.args(["-c", "for i in 1 2 3 4; do echo $i >&2; done; exit 3"]);
        let error = try_within(&mut command, Duration::from_secs(10)).expect_err("exit 3 was accepted");
        assert!(error.to_string().ends_with("): 2 | 3 | 4"), "{error}");
    }

    #[test]
    fn cargo_is_shown_without_its_folder() {
        let shown = |program: &str| shown(Command::new(program).args(["build", "x"]));
        assert_eq!(shown("/opt/rust/bin/cargo"), "cargo build x");
        assert_eq!(shown("/opt/bin/dispatcherd"), "/opt/bin/dispatcherd build x");
    }

    #[test]
    fn programs_are_found_by_name() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-anywhere"), None);
    }
}
