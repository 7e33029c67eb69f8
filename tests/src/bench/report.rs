//! What a measurement found: a table for people, JSON for everything else.

use std::{fs, io::Write, path::Path};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Rows and goals of one measurement.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// Name of the measurement.
    pub bench: &'static str,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What should be reached.
    pub goals: Vec<Goal>,
}

/// One figure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    /// Under which conditions.
    pub case: String,
    /// Of whom.
    pub subject: String,
    /// What; begins with `not run: ` and says why where there is no figure.
    pub metric: String,
    /// Its unit.
    pub unit: &'static str,
    /// Median over the rounds.
    pub median: Option<f64>,
    /// Least.
    pub min: Option<f64>,
    /// Most.
    pub max: Option<f64>,
    /// Number of rounds.
    pub n: usize,
}

/// A figure and its limit.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Goal {
    /// What should be reached.
    pub goal: String,
    /// What was reached; nothing where it was not measured.
    pub value: Option<f64>,
    /// The limit.
    pub limit: f64,
    /// `lower` or `higher`.
    pub better: &'static str,
    /// Reached.
    pub met: bool,
}

impl Row {
    /// A row of one value a round.
    #[must_use]
    pub fn new(case: &str, subject: &str, metric: &str, unit: &'static str, values: &[f64]) -> Self {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        Self {
            case: case.to_owned(),
            subject: subject.to_owned(),
            metric: metric.to_owned(),
            unit,
            median: median(values).map(round),
            min: values.iter().copied().reduce(f64::min).map(round),
            max: values.iter().copied().reduce(f64::max).map(round),
            n: values.len(),
        }
    }

    /// A row that says why there is no figure.
    #[must_use]
    pub fn not_run(case: &str, subject: &str, why: &str, unit: &'static str) -> Self {
        Self::new(case, subject, &format!("not run: {why}"), unit, &[])
    }
}

impl Goal {
    /// At most `limit`.
    #[must_use]
    pub fn at_most(goal: &str, value: Option<f64>, limit: f64) -> Self {
        let value = value.map(|value| (value * 1000.0).round() / 1000.0);
        let met = value.is_some_and(|value| value <= limit);
        Self { goal: goal.to_owned(), value, limit, better: "lower", met }
    }

    /// At least `limit`.
    #[must_use]
    pub fn at_least(goal: &str, value: Option<f64>, limit: f64) -> Self {
        let value = value.map(|value| (value * 1000.0).round() / 1000.0);
        let met = value.is_some_and(|value| value >= limit);
        Self { goal: goal.to_owned(), value, limit, better: "higher", met }
    }
}

impl Report {
    /// Prints the table, and writes the JSON where a file is given.
    pub fn publish(&self, out: &mut impl Write, json: Option<&Path>) -> Result<()> {
        self.table(out)?;
        let Some(path) = json else { return Ok(()) };
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }

    fn table(&self, out: &mut impl Write) -> Result<()> {
        let show = |value: Option<f64>| match value {
            None => "-".to_owned(),
            Some(value) if value.abs() < 1.0 => format!("{value:.3}"),
            Some(value) if value.abs() < 100.0 => format!("{value:.2}"),
            Some(value) => format!("{value:.0}"),
        };
        let header = ["case", "subject", "metric", "unit", "median", "min", "max", "n"].map(str::to_owned);
        let rows = self.rows.iter().map(|row| {
            let (unit, n) = (row.unit.to_owned(), row.n.to_string());
            let (case, subject, metric) = (row.case.clone(), row.subject.clone(), row.metric.clone());
            [case, subject, metric, unit, show(row.median), show(row.min), show(row.max), n]
        });
        columns(out, std::iter::once(header).chain(rows).collect(), 4)?;
        if self.goals.is_empty() {
            return Ok(());
        }
        writeln!(out)?;
        let header = ["goal", "value", "limit", "met"].map(str::to_owned);
        let goals = self.goals.iter().map(|goal| {
            let sign = if goal.better == "lower" { "<=" } else { ">=" };
            let met = if goal.met { "yes" } else { "NO" };
            [goal.goal.clone(), show(goal.value), format!("{sign} {:.2}", goal.limit), met.to_owned()]
        });
        columns(out, std::iter::once(header).chain(goals).collect(), 1)
    }
}

/// Prints rows in columns; those from `right` on are aligned to the right.
fn columns<const N: usize>(out: &mut impl Write, rows: Vec<[String; N]>, right: usize) -> Result<()> {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column < right { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// The median, the mean of the middle two where their number is even.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let high = sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(*high);
    }
    sorted.get(middle.checked_sub(1)?).map(|low| (low + high) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn what_was_not_measured_is_no_goal_met() {
        assert!(!Goal::at_most("x", None, 1.0).met);
        assert!(!Goal::at_least("x", None, 1.0).met);
        assert!(Goal::at_most("x", Some(1.0), 1.0).met);
    }

    #[test]
    fn the_table_has_every_row_and_goal() {
        let rows = vec![Row::new("a", "b", "c", "ns", &[1.0]), Row::not_run("d", "e", "no f", "ns")];
        let report = Report { bench: "x", rows, goals: vec![Goal::at_most("g", Some(2.0), 1.0)] };
        let mut out = Vec::new();
        report.publish(&mut out, None).expect("writes");
        let text = String::from_utf8(out).expect("text");
        assert!(text.contains("not run: no f") && text.contains("NO"), "{text}");
    }
}
