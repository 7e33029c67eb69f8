//! What is different between two configurations, in words.

use std::fmt::{Debug, Write as _};

use super::{Backend, Config, Service};
use crate::counted;

/// The differences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What a reload does, a line each: `+` comes, `-` goes, `~` changes.
    pub lines: Vec<String>,
    /// What only a restart can change.
    pub restart: Vec<String>,
}

/// From one configuration to another.
#[must_use]
pub fn changes(old: &Config, new: &Config) -> Changes {
    let mut changes = Changes::default();
    // Named one by one, so that a new field is not forgotten.
    let Config { control: _, control_group: _, metrics: _, interfaces: _, capacities: _, services: _ } = new;
    let restart = &mut changes.restart;
    differ(restart, "control", &old.control, &new.control);
    differ(restart, "control_group", &old.control_group, &new.control_group);
    differ(restart, "metrics", &old.metrics, &new.metrics);
    differ(restart, "capacity", &old.capacities, &new.capacities);
    let lines = &mut changes.lines;
    pairs(
        lines,
        (&old.interfaces, &new.interfaces),
        |one| one.name.clone(),
        |one| format!("interface {}", one.name),
        |before, after, lines| {
            differ(lines, &format!("interface {}: attach", after.name), &before.attach, &after.attach);
        },
    );
    pairs(
        lines,
        (&old.services, &new.services),
        |one| one.name.clone(),
        |one| format!("service {} ({})", one.name, counted(one.backends.len(), "backend")),
        service,
    );
    changes
}

/// Elements that come, go and stay, by their names.
fn pairs<T>(
    lines: &mut Vec<String>,
    (old, new): (&[T], &[T]),
    key: impl Fn(&T) -> String,
    shown: impl Fn(&T) -> String,
    mut both: impl FnMut(&T, &T, &mut Vec<String>),
) {
    for before in old {
        if !new.iter().any(|after| key(after) == key(before)) {
            lines.push(format!("- {}", shown(before)));
        }
    }
    for after in new {
        match old.iter().find(|before| key(before) == key(after)) {
            None => lines.push(format!("+ {}", shown(after))),
            Some(before) => both(before, after, lines),
        }
    }
}

fn differ<T: PartialEq + Debug>(lines: &mut Vec<String>, what: &str, before: &T, after: &T) {
    if before != after {
        let mut line = format!("~ {what}: ");
        // Writing to a string cannot fail.
        let _ = write!(line, "{before:?} -> {after:?}");
        lines.push(line);
    }
}

macro_rules! fields {
    ($lines:ident, $what:expr, $before:ident, $after:ident: $($field:ident)+) => {
        $(differ($lines, &format!("{} {}", $what, stringify!($field)), &$before.$field, &$after.$field);)+
    };
}

fn service(before: &Service, after: &Service, lines: &mut Vec<String>) {
    let Service {
        name,
        id: _,
        vips: _,
        protocol: _,
        mode: _,
        miss: _,
        source: _,
        proxy_protocol: _,
        balance: _,
        table_size: _,
        session_ttl: _,
        provisional_ttl: _,
        wscale: _,
        mss: _,
        timestamps: _,
        sack: _,
        affinity: _,
        tickets: _,
        ticket: _,
        health: _,
        slow_start: _,
        quic_lb: _,
        backends: _,
    } = after;
    let what = format!("service {name}:");
    fields!(lines, what, before, after: vips protocol mode miss source proxy_protocol balance table_size
        session_ttl provisional_ttl wscale mss timestamps sack affinity tickets ticket health slow_start
        quic_lb);
    pairs(
        lines,
        (&before.backends, &after.backends),
        |one| one.name.clone(),
        |one| format!("backend {name}/{}", one.name),
        |before, after, lines| backend(name, before, after, lines),
    );
}

fn backend(service: &str, before: &Backend, after: &Backend, lines: &mut Vec<String>) {
    let Backend { name, id: _, v4: _, v6: _, weight: _, state: _, quic_server_ids: _ } = after;
    let what = format!("backend {service}/{name}:");
    fields!(lines, what, before, after: v4 v6 weight state quic_server_ids);
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
                "~ service web: balance: Maglev -> WeightedRoundRobin",
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
        let lines = "slow_start = \"30s\"\nhealth = { check = \"tcp\" }";
        let found = of(&TEXT.replace("name = \"web\"", &format!("name = \"web\"\n{lines}")));
        assert_eq!(found.lines.len(), 2, "{found:?}");
        assert!(
            found.lines[0].starts_with("~ service web: health: None -> Some(Health { interval: 5"),
            "{found:?}"
        );
        assert_eq!(found.lines[1], "~ service web: slow_start: 0 -> 30");
        assert_eq!(found.restart, [""; 0]);
    }

    #[test]
    fn what_needs_a_restart() {
        let text = TEXT.replace("[[service]]", "[capacity]\nflows = 1024\n[[service]]");
        let found = of(&text);
        assert_eq!((found.lines.len(), found.restart.len()), (0, 1));
        assert!(found.restart[0].starts_with("~ capacity: Capacities { flows: 262144"), "{found:?}");
        for line in ["control = \"/run/x\"", "control_group = \"adm\"", "metrics = \"127.0.0.1:9100\""] {
            let found = of(&format!("{line}\n{TEXT}"));
            assert_eq!((found.lines.len(), found.restart.len()), (0, 1), "{line}");
        }
    }
}
