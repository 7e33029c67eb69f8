//! `cargo xtask train`: what the daemon does under load, for the compiler.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build::{self, Objects, program, stage},
    pins::Need,
    process::{at_root, cargo, demand_root, find, output_of, run, run_quietly, target_dir},
    setup,
};

/// Train `build --dist` (root): run the daemon under load, so that the compiler knows what it does
///
/// Builds a daemon that takes note of which ways its instructions go, puts it under load in namespaces, and
/// keeps the notes in target/trained. `build --dist` and `bench` use the last ones as long as they are there: the
/// daemon needs about a tenth less processor time for each request. To be done again when much has
/// changed, and with another compiler: notes on what is not there any more do no harm, and bring nothing.
/// Takes about ten minutes on two cores.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {}

pub(crate) fn main(_: &Args) -> Result<()> {
    demand_root("putting the daemon under load", "")?;
    let compiler = setup::ensure(Need::Test)?;
    let merger = merger()?;
    let objects = build::all(&compiler)?;
    let (folder, notes) = (folder(), folder().join("notes"));
    let daemon = stage("a daemon that takes notes", || instrumented(&objects, &notes))?;
    // Programs of the build took notes, too.
    fs::remove_dir_all(&notes).with_context(|| notes.display().to_string())?;
    stage("the daemon under load", || {
        let mut load = Command::new(program("dispatcher-bench"));
        load.args(["tunnels", "--quick", "--against"]).arg(&daemon);
        run_quietly(&mut load, "the messages above are the load's")
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    // Cargo looks at names of flags only: other notes have another name.
    let merged = folder.join(format!("{now}.profdata"));
    let mut command = Command::new(merger);
    command.args(["merge", "--output"]).arg(&merged).arg(&notes);
    run(&mut command, "the daemon may not have ended by itself")?;
    for old in all(&folder).into_iter().filter(|one| *one != merged) {
        fs::remove_file(&old).with_context(|| old.display().to_string())?;
    }
    println!("{}\nNow: cargo xtask build --dist", merged.display());
    Ok(())
}

/// The compiler's flag for what the last training told, if there was one.
pub(crate) fn flag() -> Option<String> {
    let last = all(&folder()).into_iter().max()?;
    Some(format!("-Cprofile-use={}", last.display()))
}

fn folder() -> PathBuf {
    target_dir().join("trained")
}

/// By the seconds in their names, which have as many digits until 2286.
fn all(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|one| one.path());
    files.filter(|path| path.extension().is_some_and(|end| end == "profdata")).collect()
}

fn instrumented(objects: &Objects, notes: &Path) -> Result<PathBuf> {
    let place = folder().join("build");
    let mut command = cargo();
    command
        .args(["build", "--profile=dist", "--bin=dispatcherd", "--target-dir"])
        .arg(&place)
        .env("CARGO_ENCODED_RUSTFLAGS", format!("-Cprofile-generate={}", notes.display()));
    run_quietly(objects.tell(&mut command), "the messages above are the compiler's")?;
    Ok(place.join("dist").join("dispatcherd"))
}

/// What puts notes together, of the compiler's own LLVM.
fn merger() -> Result<PathBuf> {
    let rustc = || at_root(Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())));
    let roots = output_of(rustc().args(["--print", "sysroot"])).context("rustc --print sysroot")?;
    let about = output_of(rustc().arg("-vV")).context("rustc -vV")?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV has no host")?;
    let place = Path::new(&roots).join("lib/rustlib").join(host).join("bin/llvm-profdata");
    if !place.exists() {
        let by_hand = "`rustup component add llvm-tools` brings llvm-profdata of the compiler's LLVM";
        if find("rustup").is_none() {
            bail!("{} is missing; {by_hand}, and here is no rustup", place.display());
        }
        println!("installing llvm-tools by rustup");
        run(at_root(Command::new("rustup")).args(["component", "add", "llvm-tools"]), by_hand)?;
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_training_counts() -> Result<()> {
        let folder = env::temp_dir().join(format!("dispatcher-trained-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        for name in ["1763900000.profdata", "1763911111.profdata", "1763922222.other"] {
            fs::write(folder.join(name), "")?;
        }
        let last = all(&folder).into_iter().max();
        fs::remove_dir_all(&folder)?;
        assert_eq!(last, Some(folder.join("1763911111.profdata")));
        Ok(())
    }
}
