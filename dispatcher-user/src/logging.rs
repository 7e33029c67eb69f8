//! What `dispatcherd` writes to stderr: lines for people, or an object in JSON a line.

use std::io::Write as _;

use log::{Level, LevelFilter};
use serde::Serialize;

/// How lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// An object with `time`, `level`, `target` and `message` a line.
    Json,
}

#[derive(Serialize)]
struct Line<'l> {
    /// RFC 3339, with milliseconds.
    time: String,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    level: String,
    /// Who says it: a module.
    target: &'l str,
    message: String,
}

/// A line of [`Format::Json`], without its end.
fn json(level: Level, target: &str, message: String) -> serde_json::Result<String> {
    let time = format!("{:.3}", jiff::Timestamp::now());
    serde_json::to_string(&Line { time, level: level.as_str().to_ascii_lowercase(), target, message })
}

/// Starts logging. Libraries speak when something is wrong, rustls from debug on; the level is for us and our BPF programs.
pub fn start(level: LevelFilter, format: Format) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level.min(LevelFilter::Warn)).filter_module("dispatcher", level);
    // It warns of what peers send, as often as they do.
    builder.filter_module(
        "rustls",
        if level > LevelFilter::Info { LevelFilter::Warn } else { LevelFilter::Error },
    );
    if format == Format::Json {
        builder.format(|out, record| {
            let line = json(record.level(), record.target(), record.args().to_string())?;
            writeln!(out, "{line}")
        });
    }
    builder.init();
}

/// Says why the daemon ends, at any level.
pub fn last_word(format: Format, message: String) {
    match format {
        Format::Text => eprintln!("dispatcherd: {message}"),
        Format::Json => match json(Level::Error, "dispatcherd", message) {
            Ok(line) => eprintln!("{line}"),
            Err(error) => eprintln!("dispatcherd: {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object() {
        let line = json(Level::Warn, "dispatcher_user::daemon", "two\nlines, \"quoted\"".into());
        let line = line.expect("json");
        assert!(!line.contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&line).expect("json");
        assert_eq!(value["level"], "warn");
        assert_eq!(value["target"], "dispatcher_user::daemon");
        assert_eq!(value["message"], "two\nlines, \"quoted\"");
        let time = value["time"].as_str().expect("a time");
        assert!(time.parse::<jiff::Timestamp>().is_ok() && time.len() == 24, "{time}");
        assert_eq!(value.as_object().expect("an object").len(), 4);
    }
}
