//! The access log: a line of JSON for each request, when its answer has ended.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
};

use jiff::{Timestamp, Unit};
use rustix::fs::Access;
use serde::Serialize;

/// Lines that wait to be written; more are lost rather than waited for.
const WAITING: usize = 8192;

/// A file to which lines are added, by a thread of its own: a slow disk holds up no request.
pub(super) struct Log {
    path: PathBuf,
    lines: Option<SyncSender<Vec<u8>>>,
    writer: Option<JoinHandle<()>>,
    /// Lines that were lost since the last complaint.
    lost: Arc<AtomicU64>,
}

impl Log {
    /// Opens a file, which only its owner and group may read.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
        let (lines, waiting) = sync_channel(WAITING);
        let name = path.to_owned();
        let lost = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&lost);
        let work = move || write_all(file, &waiting, &name, &counter);
        let writer = thread::Builder::new().name("access-log".to_owned()).spawn(work)?;
        Ok(Self { path: path.to_owned(), lines: Some(lines), writer: Some(writer), lost })
    }

    /// Whether it could be opened; makes no file.
    pub(super) fn check(path: &Path) -> io::Result<()> {
        if path.exists() {
            return OpenOptions::new().append(true).open(path).map(drop);
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let ways = Access::WRITE_OK | Access::EXEC_OK;
        Ok(rustix::fs::access(folder.unwrap_or(Path::new(".")), ways)?)
    }

    pub(super) fn write(&self, line: &Line<'_>) {
        let Ok(mut text) = serde_json::to_vec(line) else { return };
        text.push(b'\n');
        let Some(lines) = &self.lines else { return };
        if lines.try_send(text).is_err() {
            self.lost.fetch_add(1, Relaxed);
        } else if let lost @ 1.. = self.lost.swap(0, Relaxed) {
            log::warn!(
                "{}: {lost} lines were lost: it could not be written fast enough",
                self.path.display()
            );
        }
    }
}

/// What waits is written.
impl Drop for Log {
    fn drop(&mut self) {
        self.lines = None;
        if let Some(Err(_)) = self.writer.take().map(JoinHandle::join) {
            log::error!("{}: its writer panicked", self.path.display());
        }
    }
}

fn write_all(file: File, waiting: &Receiver<Vec<u8>>, path: &Path, lost: &AtomicU64) {
    let mut file = BufWriter::new(file);
    let mut failed = false;
    while let Ok(line) = waiting.recv() {
        let all: Vec<_> = std::iter::once(line).chain(waiting.try_iter()).take(WAITING).collect();
        // What was cut short stands on a line of its own.
        let start: &[u8] = if failed { b"\n" } else { b"" };
        let written =
            file.write_all(start).and_then(|()| all.iter().try_for_each(|line| file.write_all(line)));
        match written.and_then(|()| file.flush()) {
            Ok(()) => failed = false,
            Err(error) => {
                lost.fetch_add(all.len() as u64, Relaxed);
                if !failed {
                    log::error!(
                        "{}: {error}; requests are not logged until it can be written",
                        path.display()
                    );
                }
                failed = true;
                file = BufWriter::new(file.into_parts().0);
                continue;
            }
        }
        if let lost @ 1.. = lost.swap(0, Relaxed) {
            log::warn!("{}: {lost} lines were lost: they could not be written in time", path.display());
        }
    }
}

/// One request. Neither its query nor its cookies are told, which may hold secrets.
#[derive(Serialize)]
pub(super) struct Line<'l> {
    /// When it came, RFC 3339, UTC.
    pub(super) time: String,
    pub(super) service: &'l str,
    pub(super) client: IpAddr,
    pub(super) method: &'l str,
    pub(super) host: Option<&'l str>,
    pub(super) path: &'l str,
    pub(super) version: &'l str,
    pub(super) status: u16,
    /// Bytes of the answer's body that were given to the client.
    pub(super) sent_bytes: u64,
    /// Until the answer's head was there, and until its end, milliseconds.
    pub(super) head_ms: f64,
    pub(super) ms: f64,
    pub(super) backend: Option<&'l str>,
    /// Its class, and how long it waited for its turn, milliseconds: where the backend takes so many requests at a time.
    pub(super) class: Option<&'l str>,
    pub(super) queued_ms: Option<f64>,
    /// The tunnel's number; none for a request in clear.
    pub(super) tunnel: Option<u32>,
    /// Tunnels that it was offered to.
    pub(super) tries: usize,
    /// The body was sent to its end.
    pub(super) complete: bool,
    /// Why we answered ourselves, or why the answer was not sent to its end.
    pub(super) error: Option<&'l str>,
    pub(super) request_id: &'l str,
}

/// The time now, as lines have it.
pub(super) fn time() -> String {
    let now = Timestamp::now();
    now.round(Unit::Millisecond).unwrap_or(now).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(path: &str) -> Line<'_> {
        Line {
            time: time(),
            service: "shop",
            client: IpAddr::from([192, 0, 2, 1]),
            method: "GET",
            host: None,
            path,
            version: "2",
            status: 200,
            sent_bytes: 1,
            head_ms: 0.5,
            ms: 1.0,
            backend: None,
            class: None,
            queued_ms: None,
            error: None,
            tunnel: None,
            tries: 1,
            complete: true,
            request_id: "1",
        }
    }

    #[test]
    fn what_waits_is_written_at_the_end() {
        let path = std::env::temp_dir().join(format!("dispatcher-access-{}", std::process::id()));
        for count in [3, 4] {
            let log = Log::open(&path).expect("opened");
            (0..count).for_each(|_| log.write(&line("/a\n\"b")));
        }
        let text = std::fs::read_to_string(&path).expect("written");
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(text.lines().count(), 7, "added to what was there");
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            assert_eq!(line["path"], "/a\n\"b");
        }
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        // Every write fails: no room.
        let log = Log::open(Path::new("/dev/full")).expect("opened");
        log.write(&line("/"));
        let lost = Arc::clone(&log.lost);
        drop(log);
        assert_eq!(lost.load(Relaxed), 1);
    }
}
