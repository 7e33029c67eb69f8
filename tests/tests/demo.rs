//! The demo itself, as `cargo xtask run` starts it.

use std::{path::Path, process::Command, time::Duration};

use dispatcher_tests::{
    daemon::{Folder, Process, program},
    demo::Summary,
};

/// Namespaces of a process that are still there.
fn namespaces(owner: u32) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&format!("dispatcher-{owner}-"))).collect()
}

/// Runs the demo with these arguments; sends SIGINT where it would not end by itself.
fn demo(arguments: &[&str], interrupt: bool) -> Summary {
    let folder = Folder::new().expect("a folder");
    let json = folder.path().join("summary.json");
    let mut command = Command::new(program("dispatcher-demo").expect("the demo"));
    command.args(arguments).arg("--json").arg(&json);
    let mut process = Process::start(command, None).expect("starts");
    let owner = process.id();
    if interrupt {
        for _ in 0..300 {
            if process.log().contains(" 5 s: ") {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(!namespaces(owner).is_empty(), "it is running:\n{}", process.log());
        process.signal(libc::SIGINT);
    }
    let status = process.wait(Duration::from_secs(60)).expect("ends");
    assert!(status.success(), "{status}:\n{}", process.log());
    assert_eq!(namespaces(owner), Vec::<String>::new());
    let folders = std::env::temp_dir().join(format!("dispatcher-{owner}-0"));
    assert!(!Path::new(&folders).exists(), "{} is still there", folders.display());
    serde_json::from_str(&std::fs::read_to_string(&json).expect("a summary"))
        .expect("exactly the known fields")
}

fn assert_good(summary: &Summary) {
    assert!(summary.returning > 0 && summary.hits > 0, "{summary:?}");
    assert_eq!(summary.returning_same_backend, summary.returning, "{summary:?}");
    assert_eq!(summary.handshakes_failed, 0, "{summary:?}");
    assert!(summary.connections >= summary.handshakes_ok, "{summary:?}");
    // Whoever came back was known, and nobody else.
    assert_eq!(summary.hits, summary.returning, "{summary:?}");
    assert!(summary.resumed >= summary.returning, "{summary:?}");
    assert!(summary.shoppers_returning > 0 && summary.requests > summary.shoppers_returning, "{summary:?}");
    assert_eq!(summary.shoppers_same_backend, summary.shoppers_returning, "{summary:?}");
}

#[test]
fn for_some_seconds() {
    let summary = demo(&["--seconds", "6"], false);
    assert_good(&summary);
    assert!(summary.connections >= 60, "{summary:?}");
}

#[test]
fn until_it_is_interrupted() {
    assert_good(&demo(&[], true));
}

#[test]
fn with_nginx_and_openssl() {
    assert_good(&demo(&["--seconds", "5", "--peers", "system", "--backends", "2"], false));
}
