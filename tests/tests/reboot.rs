//! Sessions outlive what the maps do not: a start with nothing pinned finds what a reboot leaves.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::PathBuf,
    time::Duration,
};

use dispatcher_tests::{
    daemon::{Daemon, Folder, Pins, Process, UNPINNED, config, program},
    netns::Netns,
    stage::{Stage, web},
    tls::{User, Version},
    topology::Family,
};
use dispatcher_user::api;

/// Dropped in the order of its fields.
struct Scene {
    stage: Stage,
    /// Of a daemon that keeps its sessions.
    text: String,
    folder: Folder,
}

impl Scene {
    fn new(pins: Option<&Pins>) -> Self {
        let mut stage = Stage::usual();
        let folder = Folder::new().expect("a folder");
        let text = config(&stage.topology, "native", &[web()]);
        let text = pins.map_or(text.clone(), |pins| pins.within(&text)).replace(
            "state = \"none\"",
            &format!("state = \"{}\"", folder.path().join("own/state.redb").display()),
        );
        stage.daemon.stop().expect("ends");
        let mut scene = Self { stage, text, folder };
        scene.start();
        scene
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("own/state.redb")
    }

    fn start(&mut self) {
        let text = self.text.clone();
        self.start_with(&text);
    }

    fn start_with(&mut self, text: &str) {
        self.stage.daemon.again(&self.stage.topology.dispatcher, text).expect("dispatcherd again");
    }

    fn said(&mut self, what: &str) -> bool {
        self.stage.daemon.process().log().contains(what)
    }

    /// Users who have a session, with the backend that knows it.
    fn users(&self, count: usize) -> Vec<(User, String)> {
        let known = |turn: usize| {
            let user = self.stage.user(Version::Tls12);
            let home = self.stage.visit(&user, Family::BOTH[turn % 2], turn).backend;
            (user, home)
        };
        (0..count).map(known).collect()
    }

    /// Fails unless these come home, from other addresses, and are known there and here.
    fn come_home<'u>(&self, users: impl IntoIterator<Item = &'u (User, String)>) {
        let before = self.stage.daemon.status().expect("status").hits;
        let mut came = 0;
        for (turn, (user, home)) in users.into_iter().enumerate() {
            let identity = self.stage.visit(user, Family::BOTH[(turn + 1) % 2], turn + 3);
            assert_eq!((&identity.backend, identity.reused.as_str()), (home, "r"), "{identity:?}");
            came += 1;
        }
        assert_eq!(self.stage.daemon.status().expect("status").hits - before, came);
    }
}

fn homes(users: &[(User, String)]) -> BTreeSet<&str> {
    users.iter().map(|(_, home)| home.as_str()).collect()
}

#[test]
fn sessions_are_restored_after_an_orderly_end() {
    let mut scene = Scene::new(None);
    let users = scene.users(8);
    assert!(homes(&users).len() > 1, "all sessions on one server prove nothing");
    let pin = ["sessions", "pin", "0a0b", "--service", "web", "--backend", "b3"];
    scene.stage.daemon.ask::<serde_json::Value>(&pin).expect("pinned");
    let mut before = scene.stage.daemon.sessions().expect("sessions");
    before.retain(|one| one.state != "provisional");
    assert_eq!(before.len(), 9, "{before:?}");
    scene.stage.daemon.stop().expect("ends");
    let saved = format!("dispatcherd: saved 9 sessions in {}", scene.file().display());
    assert!(scene.said(&saved));
    let mode = |path: PathBuf| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(scene.file()), mode(scene.folder.path().join("own"))), (0o600, 0o750));

    scene.start();
    assert!(scene.said("dispatcherd: restored 9 sessions\n"));
    let after = scene.stage.daemon.sessions().expect("sessions");
    assert_eq!(after.len(), 9, "{after:?}");
    for one in &after {
        let old = before.iter().find(|old| old.id == one.id).expect("it was there before");
        assert_eq!((&old.backend, &old.state, &old.kind), (&one.backend, &one.state, &one.kind));
        assert_eq!(old.expires_in_seconds.is_none(), one.expires_in_seconds.is_none());
        assert!(one.expires_in_seconds <= old.expires_in_seconds, "no session gains time");
        assert!(one.age_seconds >= old.age_seconds, "nor is it younger");
    }
    scene.come_home(&users);

    // Another name is another backend, which knows nobody; the others' sessions stay.
    scene.stage.daemon.stop().expect("ends");
    let renamed = scene.text.replace("name = \"b3\"", "name = \"other\"");
    scene.start_with(&renamed);
    let gone = 1 + users.iter().filter(|(_, home)| home == "b3").count();
    assert!(scene.said(&format!("restored {} sessions; {gone} left out", 9 - gone)));
    scene.come_home(users.iter().filter(|(_, home)| home != "b3"));

    // Without a file there is nothing, and nothing can be saved.
    scene.stage.daemon.stop().expect("ends");
    let none = scene.text.replace(&format!("\"{}\"", scene.file().display()), "\"none\"");
    scene.start_with(&none);
    assert!(scene.stage.daemon.sessions().expect("sessions").is_empty());
    let error = scene.stage.daemon.told(&["sessions", "save"]).expect_err("nowhere");
    assert!(error.to_string().contains("there is no state file"), "{error}");
}

#[test]
fn sessions_are_restored_after_a_crash_from_the_last_time_they_were_saved() {
    let mut scene = Scene::new(None);
    let users = scene.users(6);
    let told = scene.stage.daemon.told(&["sessions", "save"]).expect("saved");
    assert_eq!(told, format!("saved 6 sessions in {}\n", scene.file().display()));
    let late = scene.users(2);
    let saved: api::Saved = scene.stage.daemon.ask(&["sessions", "save"]).expect("saved again");
    assert_eq!((saved.sessions, saved.state), (8, scene.file()));
    let later = scene.users(1);
    scene.stage.daemon.kill().expect("killed");
    scene.start();
    assert!(scene.said("dispatcherd: restored 8 sessions\n"));
    scene.come_home(users.iter().chain(&late));
    let misses = |scene: &Scene| scene.stage.daemon.status().expect("status").misses;
    assert_eq!(misses(&scene), 0);
    let _ = scene.stage.visit(&later[0].0, Family::V4, 0);
    assert_eq!(misses(&scene), 1, "a session that was not saved is not known");
}

#[test]
fn a_state_file_that_is_moved_away_takes_nothing_with_it() {
    let mut scene = Scene::new(None);
    let users = scene.users(3);
    let drain = ["backend", "web/b1", "drain"];
    scene.stage.daemon.ask::<serde_json::Value>(&drain).expect("drains");
    let save = |scene: &Scene| scene.stage.daemon.told(&["sessions", "save"]).expect("saved");
    let saved = save(&scene);
    assert!(!scene.said("it was moved or removed"));
    let away = scene.folder.path().join("away");
    fs::rename(scene.file(), &away).expect("moved");
    assert_eq!(save(&scene), saved, "as many, into a new file");
    let line = format!("state file {}: it was moved or removed", scene.file().display());
    assert!(scene.said(&line));
    assert!(away.exists() && scene.file().exists());
    // Nothing that was said or learned before is missing after a start from the new one.
    scene.stage.daemon.kill().expect("killed");
    scene.start();
    assert!(scene.said("restored 3 sessions") && scene.said("by the operator: "));
    assert_eq!(scene.stage.daemon.backends().expect("backends")[0].state, "drain");
    scene.come_home(&users);
}

#[test]
fn what_is_pinned_comes_first() {
    let pins = Pins::new();
    let mut scene = Scene::new(Some(&pins));
    let users = scene.users(4);
    scene.stage.daemon.stop().expect("ends");
    let late = scene.users(2);
    scene.start();
    assert!(!scene.said("restored"), "maps that are taken over need nothing");
    scene.come_home(users.iter().chain(&late));
    scene.stage.daemon.stop().expect("ends");
    // To the maps a reboot is as this.
    let arguments = ["detach", "--pin", &pins.path().to_string_lossy()];
    scene.stage.daemon.told(&arguments).expect("detached");
    scene.start();
    assert!(scene.said("dispatcherd: restored 6 sessions\n"));
    scene.come_home(users.iter().chain(&late));
}

#[test]
fn a_state_file_is_refused_or_moved_aside() {
    let netns = Netns::new("reboot").expect("a namespace");
    let folder = Folder::new().expect("a folder");
    let text = |path: PathBuf| {
        let none = format!("{UNPINNED}\ninterfaces = [\"lo\"]\nattach = \"generic\"\n");
        none.replace("state = \"none\"", &format!("state = \"{}\"", path.display()))
    };
    let file = folder.path().join("state.redb");
    let mut daemon = Daemon::start_with(&netns, &text(file.clone())).expect("dispatcherd");
    let refused = |path: PathBuf| {
        let other = Netns::new("reboot").expect("a namespace");
        let own = Folder::new().expect("a folder");
        let mut command = other.command(program("dispatcherd").expect("dispatcherd"));
        command.arg("--config").arg(own.write("dispatcher.toml", &text(path)).expect("a file"));
        command.arg("--control").arg(own.path().join("control.sock"));
        let mut process = Process::start(command, None).expect("starts");
        assert!(!process.wait(Duration::from_secs(60)).expect("ends").success());
        process.log()
    };
    let said = refused(file.clone());
    assert!(said.contains("another dispatcherd uses the state file"), "{said}");
    let said = refused(folder.path().join("no/such/state.redb"));
    assert!(said.contains("does not exist; make it"), "{said}");
    let precious = folder.write("precious", "not ours").expect("a file");
    let said = refused(precious.clone());
    assert!(said.contains("is no state file") && said.contains("left alone"), "{said}");
    assert_eq!(fs::read_to_string(precious).expect("still there"), "not ours");

    daemon.stop().expect("ends");
    let disk = fs::OpenOptions::new().write(true).open(&file).expect("the file");
    disk.write_all_at(&[0xa5; 128], 16).expect("damage");
    daemon.again(&netns, &text(file.clone())).expect("it goes on");
    let said = daemon.process().log();
    assert!(said.contains("ERROR") && said.contains("state.redb.damaged"), "{said}");
    assert!(folder.path().join("state.redb.damaged").exists() && file.exists());
    let told = daemon.told(&["sessions", "save"]).expect("saved");
    assert!(told.starts_with("saved 0 sessions"), "{told}");
}
