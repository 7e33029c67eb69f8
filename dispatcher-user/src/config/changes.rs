//! What is different between two configurations, in the words of the file.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Config, written};
use crate::counted;

/// The differences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What a reload does, a line each: `+` comes, `-` goes, `~` changes.
    pub lines: Vec<String>,
    /// What only a restart can change.
    pub restart: Vec<String>,
}

/// From one configuration to another. Both are compared as they are written, with all defaults.
#[must_use]
pub fn changes(old: &Config, new: &Config) -> Changes {
    let value = |config| serde_json::to_value(written(config)).unwrap_or_default();
    let (old, new) = (value(old), value(new));
    let mut changes = Changes::default();
    settings("", &old, &new, &["class", "interface", "service"], &mut changes.restart);
    let lines = &mut changes.lines;
    named("interface", "", &old["interface"], &new["interface"], lines, |what, old, new, lines| {
        settings(&format!("{what}: "), old, new, &[], lines);
    });
    named("class", "", &old["class"], &new["class"], lines, |what, old, new, lines| {
        settings(&format!("{what}: "), old, new, &[], lines);
    });
    named("service", "", &old["service"], &new["service"], lines, |what, old, new, lines| {
        settings(&format!("{what}: "), old, new, &["backend"], lines);
        let name = new["name"].as_str().unwrap_or_default();
        let above = format!("{name}/");
        named("backend", &above, &old["backend"], &new["backend"], lines, |what, old, new, lines| {
            settings(&format!("{what}: "), old, new, &[], lines);
        });
    });
    changes
}

/// Tables that come, go and stay, by their names.
fn named(
    kind: &str,
    above: &str,
    old: &Value,
    new: &Value,
    lines: &mut Vec<String>,
    both: impl Fn(&str, &Value, &Value, &mut Vec<String>),
) {
    let tables = |list| Value::as_array(list).into_iter().flatten();
    let name = |table: &Value| format!("{kind} {above}{}", table["name"].as_str().unwrap_or_default());
    let inside = |table: &Value| match table["backend"].as_array() {
        Some(backends) => format!(" ({})", counted(backends.len(), "backend")),
        None => String::new(),
    };
    let before: BTreeMap<String, &Value> = tables(old).map(|table| (name(table), table)).collect();
    let after: BTreeSet<String> = tables(new).map(name).collect();
    for table in tables(old).filter(|table| !after.contains(&name(table))) {
        lines.push(format!("- {}{}", name(table), inside(table)));
    }
    for table in tables(new) {
        match before.get(&name(table)) {
            None => lines.push(format!("+ {}{}", name(table), inside(table))),
            Some(old) => both(&name(table), old, table, lines),
        }
    }
}

/// Values that differ, a line each.
fn settings(what: &str, old: &Value, new: &Value, but: &[&str], lines: &mut Vec<String>) {
    let keys = |table| Value::as_object(table).into_iter().flat_map(|table| table.keys());
    for key in keys(old).chain(keys(new)).collect::<BTreeSet<_>>() {
        let (old, new) = (&old[key], &new[key]);
        if old.is_object() && new.is_object() {
            settings(&format!("{what}{key}."), old, new, &[], lines);
        } else if old != new && !but.contains(&key.as_str()) {
            lines.push(format!("~ {what}{key}: {} -> {}", shown(old), shown(new)));
        }
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(list) => format!("[{}]", list.iter().map(shown).collect::<Vec<_>>().join(", ")),
        Value::Object(table) => {
            let pairs: Vec<String> =
                table.iter().map(|(key, value)| format!("{key} = {}", shown(value))).collect();
            format!("{{ {} }}", pairs.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n\
                        [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\n\
                        [[service.backend]]\nname = \"b\"\naddress = \"10.0.0.2:443\"\n";

    fn of(text: &str) -> Changes {
        let parse = |text: &str| Config::parse(text, &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
        changes(&parse(TEXT), &parse(text))
    }

    #[test]
    fn nothing_is_nothing() {
        assert_eq!(of(TEXT), Changes::default());
    }

    #[test]
    fn what_comes_goes_and_changes() {
        let text = TEXT
            .replace("name = \"b\"", "name = \"c\"")
            .replace("name = \"web\"", "name = \"web\"\nbalance = \"weighted-round-robin\"")
            .replace("10.0.0.1:443\"", "10.0.0.1:443\"\nweight = 3")
            .replace("\"eth0\"", "\"eth1\"");
        assert_eq!(
            of(&text).lines,
            [
                "- interface eth0",
                "+ interface eth1",
                "~ service web: balance: maglev -> weighted-round-robin",
                "- backend web/b",
                "~ backend web/a: weight: 1 -> 3",
                "+ backend web/c",
            ]
        );
        let renamed = of(&TEXT.replace("\"web\"", "\"shop\""));
        assert_eq!(renamed.lines, ["- service web (2 backends)", "+ service shop (2 backends)"]);
    }

    #[test]
    fn settings_of_a_service() {
        let with = |lines: &str| TEXT.replace("name = \"web\"", &format!("name = \"web\"\n{lines}"));
        let found = of(&with("slow_start = \"30s\"\nhealth = { check = \"tcp\" }"));
        assert_eq!(
            found.lines,
            [
                "~ service web: health: none -> { check = tcp, fall = 3, interval = 5s, rise = 2, timeout = 2s }",
                "~ service web: slow_start: none -> 30s",
            ]
        );
        assert_eq!(found.restart, [""; 0]);
        let parse = |text: &str| Config::parse(text, &[]).expect("good");
        let health = |lines: &str| parse(&with(&format!("health = {{ check = \"tcp\", {lines} }}")));
        assert_eq!(
            changes(&health("rise = 1"), &health("interval = \"90s\"")).lines,
            ["~ service web: health.interval: 5s -> 1m30s", "~ service web: health.rise: 1 -> 2"]
        );
        let found = of(&TEXT.replace("\"192.0.2.1:443\"", "[\"192.0.2.1:443\", \"192.0.2.2:443\"]"));
        assert_eq!(found.lines, ["~ service web: vip: 192.0.2.1:443 -> [192.0.2.1:443, 192.0.2.2:443]"]);
    }

    #[test]
    fn what_needs_a_restart() {
        let text = TEXT.replace("[[service]]", "[capacity]\nflows = 1024\n[[service]]");
        let found = of(&text);
        assert_eq!((found.lines.len(), found.restart.len()), (0, 1));
        assert_eq!(found.restart, ["~ capacity.flows: 262144 -> 1024"]);
        for line in [
            "control = \"/run/x\"",
            "control_group = \"adm\"",
            "pin = \"none\"",
            "state = \"none\"",
            "metrics = \"127.0.0.1:9100\"",
        ] {
            let found = of(&format!("{line}\n{TEXT}"));
            assert_eq!((found.lines.len(), found.restart.len()), (0, 1), "{line}");
        }
    }
}
