use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A folder of one test, removed when dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dispatcher-store-{}-{number}", std::process::id()));
        fs::create_dir(&path).expect("a folder");
        Self(path)
    }

    /// Where a test's file is.
    pub(crate) fn file(&self) -> PathBuf {
        self.0.join("state.redb")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

#[test]
fn documents_come_back() {
    let folder = Folder::new();
    let path = folder.0.join("own").join("state.redb");
    let store = Store::open(&path).expect("opens");
    assert_eq!((mode(&path), mode(&folder.0.join("own"))), (0o600, 0o750));
    assert_eq!(store.document::<String>("a").expect("readable"), None);
    store.keep("a", &["x", "y"]).expect("kept");
    store.keep("b", &1).expect("kept");
    store.keep("a", &["z"]).expect("kept");
    drop(store);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("somebody opened it to all");
    let store = Store::open(&path).expect("opens again");
    assert_eq!(mode(&path), 0o600);
    assert_eq!(store.document::<Vec<String>>("a").expect("readable"), Some(vec!["z".to_owned()]));
    assert_eq!(store.document::<u32>("b").expect("readable"), Some(1));
    let said = store.document::<String>("b").expect_err("no text").to_string();
    assert!(said.contains("state.redb: b: ") && said.contains("another version"), "{said}");
}

#[test]
fn one_daemon_has_it() {
    let folder = Folder::new();
    let store = Store::open(&folder.file()).expect("opens");
    let said = Store::open(&folder.file()).expect_err("it is open").to_string();
    assert!(
        said.starts_with("another dispatcherd uses the state file") && said.contains("`state`"),
        "{said}"
    );
    store.keep("a", &1).expect("the first one goes on");
    drop(store);
    Store::open(&folder.file()).expect("now it is free");
}

#[test]
fn what_is_no_state_file_is_left_alone() {
    let folder = Folder::new();
    let said = |path: &Path| Store::open(path).expect_err("refused").to_string();
    let text = folder.0.join("text");
    fs::write(&text, "interfaces = []").expect("written");
    for path in [&text, &folder.0] {
        let said = said(path);
        assert!(said.contains("is no state file") && said.contains("move it away"), "{said}");
    }
    assert_eq!(fs::read_to_string(&text).expect("still there"), "interfaces = []");
    let said = said(&folder.0.join("no/such/state.redb"));
    assert!(said.contains("no/such, does not exist; make it"), "{said}");
    assert!(!folder.0.join("no").exists());
}

#[test]
fn a_file_that_is_moved_away_is_made_again_with_what_was_said() {
    let folder = Folder::new();
    let store = Store::open(&folder.file()).expect("opens");
    store.keep("a", &1).expect("kept");
    store.keep("b", &2).expect("kept");
    let read = |path: &Path, name| {
        let store = Store::open(path).expect("opens");
        store.document::<u32>(name).expect("readable")
    };
    // Moved away: the next write is for a new one.
    let away = folder.0.join("away");
    fs::rename(folder.file(), &away).expect("moved");
    store.keep("a", &3).expect("kept");
    assert_eq!(
        (read(&away, "a"), read(&away, "b")),
        (Some(1), Some(2)),
        "the old one is as it was, and free"
    );
    assert_eq!(mode(&folder.file()), 0o600);
    assert_eq!(store.document::<u32>("b").expect("readable"), Some(2), "it was not said again");
    // Another one in its place: what is in force counts.
    fs::rename(&away, folder.file()).expect("moved back");
    assert_eq!(store.document::<u32>("a").expect("readable"), Some(3));
    // Removed, where no new one can be made: nothing is forgotten.
    fs::remove_file(folder.file()).expect("removed");
    fs::create_dir(folder.file()).expect("in the way");
    let said = store.keep("c", &4).expect_err("no place").to_string();
    assert!(said.contains("is no state file") && said.contains("move it away"), "{said}");
    fs::remove_dir(folder.file()).expect("out of the way");
    store.keep("c", &4).expect("kept");
    drop(store);
    for (name, value) in [("a", 3), ("b", 2), ("c", 4)] {
        assert_eq!(read(&folder.file(), name), Some(value), "{name}");
    }
}

#[test]
fn a_damaged_file_is_moved_aside() {
    let folder = Folder::new();
    let aside = folder.0.join("state.redb.damaged");
    Store::open(&folder.file()).and_then(|store| store.keep("a", &"x".repeat(9000))).expect("kept");
    let good = fs::read(folder.file()).expect("readable");
    let of_a = good.windows(64).position(|bytes| bytes == [b'x'; 64]).expect("in clear");
    let mut bent = good.clone();
    bent[of_a] = b'y';
    // A byte of what is kept, half a file, and the zeros that a crash can leave.
    for bytes in [bent, good[..good.len() / 2].to_vec(), vec![0; good.len()]] {
        fs::write(folder.file(), &bytes).expect("written");
        let store = Store::open(&folder.file()).expect("starts anew");
        assert_eq!(store.document::<String>("a").expect("readable"), None);
        assert_eq!(fs::read(&aside).expect("moved").len(), bytes.len());
        fs::remove_file(&aside).expect("there");
    }
    fs::write(folder.file(), &good).expect("written");
    let store = Store::open(&folder.file()).expect("opens");
    assert!(store.document::<String>("a").expect("readable").is_some() && !aside.exists());
}

/// Runs a test in a folder that is a disk of its own, of 3 MiB, which only the test's thread sees. Nothing is
/// tested where that is not allowed.
pub(super) fn on_a_small_disk(test: impl FnOnce(&Folder) + Send) {
    let folder = Folder::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if small_disk(&folder.0).is_some() {
                test(&folder);
            }
        });
    });
}

fn small_disk(folder: &Path) -> Option<()> {
    let at = std::ffi::CString::new(&*folder.to_string_lossy()).expect("no zero in it");
    let (kind, root, none, size) = (c"tmpfs", c"/", std::ptr::null(), c"size=3m".as_ptr().cast());
    // SAFETY: a call with integers only.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return None;
    }
    // SAFETY: strings that end with a zero byte and outlive the calls.
    let done = unsafe {
        let private = libc::MS_REC | libc::MS_PRIVATE;
        libc::mount(none, root.as_ptr(), none, private, none.cast()) == 0
            && libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, size) == 0
    };
    done.then_some(())
}

/// As root.
#[test]
fn a_full_disk_takes_nothing_that_was_kept() {
    on_a_small_disk(|folder| {
        let store = Store::open(&folder.file()).expect("opens");
        store.keep("a", &1).expect("kept");
        let said = store.keep("b", &"x".repeat(4 << 20)).expect_err("no room").to_string();
        assert!(said.contains("No space left") && said.contains("make room"), "{said}");
        assert_eq!(store.document::<u32>("a").expect("readable"), Some(1));
        store.keep("a", &2).expect("what fits is kept again");
        drop(store);
        fs::write(folder.0.join("other"), vec![1; 4 << 20]).expect_err("the disk is full now");
        let store = Store::open(&folder.file()).expect("opens on a full disk");
        assert_eq!(store.document::<u32>("a").expect("readable"), Some(2));
        let said = Store::open(&folder.0.join("second")).expect_err("no room").to_string();
        assert!(said.contains("make room"), "{said}");
        assert!(!folder.0.join("second").exists(), "half a file is removed");
    });
}
