//! A matrix as text: a row for each source, a column for each destination, a letter for each pair.

use std::fmt::Write as _;

use weir_cluster::policy::{
    groups::{self, Groups},
    matrix::{Cell, Matrix, Verdict},
};

use crate::common::plural;

/// Pairs that are open for some ports only, and groups, are listed up to so many lines.
const LISTED: usize = 40;
/// Members of a group that are named.
const NAMED: usize = 12;
const RESET: &str = "\x1b[0m";

/// The letter of a cell, and its colour on a terminal.
fn letter(cell: Cell) -> (char, &'static str) {
    match cell {
        Cell::Itself => ('.', "\x1b[2m"),
        Cell::NoWay => ('-', "\x1b[2m"),
        Cell::Allowed => ('+', "\x1b[32m"),
        Cell::Some => ('~', "\x1b[33m"),
        Cell::Denied(Verdict::DeniedByEgress) => ('E', "\x1b[31m"),
        Cell::Denied(Verdict::DeniedByIngress) => ('I', "\x1b[31m"),
        Cell::Denied(_) => ('X', "\x1b[31m"),
    }
}

const LEGEND: [(Cell, &str); 7] = [
    (Cell::Allowed, "allowed"),
    (Cell::Some, "some ports only, listed below"),
    (Cell::Denied(Verdict::DeniedByEgress), "denied by the source's egress policy"),
    (Cell::Denied(Verdict::DeniedByIngress), "denied by the destination's ingress policy"),
    (Cell::Denied(Verdict::DeniedByBoth), "denied by both"),
    (Cell::Itself, "itself: never denied"),
    (Cell::NoWay, "no address family in common"),
];

/// The matrix for a person. `colour`: with a terminal's escape codes.
pub fn text(matrix: &Matrix, groups: &Groups, colour: bool) -> String {
    let mut text = String::new();
    let pods = matrix.pods.len();
    let _ = writeln!(text, "Who reaches whom: {pods} pod{}, {}.", plural(pods), matrix.ports_in_words());
    if groups.are_grouped() {
        let alike = "Pods of a namespace that fare alike share a line";
        let _ = writeln!(text, "{alike}: {} lines for {pods} pods (--every-pod: one for each).", groups.groups.len());
    }
    let [rows, columns] = groups.rows_and_columns(matrix);
    let number_of = |group: &[usize]| groups.groups.partition_point(|other| other[0] < group[0]) + 1;
    let name = |group: &[usize]| {
        let namespace = matrix.pods[group[0]].namespace();
        format!("{namespace}/{}", groups::short_name(matrix, group))
    };
    let digits = groups.groups.len().to_string().len();
    let name_width = rows.iter().map(|row| name(row).chars().count()).max().unwrap_or(0);
    let is_new = |groups: &[&[usize]], at: usize| {
        at > 0 && matrix.pods[groups[at][0]].namespace() != matrix.pods[groups[at - 1][0]].namespace()
    };

    // The columns' numbers stand upright, a digit below the other.
    for digit in 0..digits {
        let _ = write!(text, "\n{:width$}", "", width = digits + 1 + name_width + 1);
        for (at, column) in columns.iter().enumerate() {
            let number = format!("{:>digits$}", number_of(column));
            let gap = if is_new(&columns, at) { "  " } else { " " };
            let _ = write!(text, "{gap}{}", &number[digit..=digit]);
        }
        trim_line(&mut text);
    }
    text.push('\n');
    let mut used: Vec<Cell> = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        if is_new(&rows, at) {
            text.push('\n');
        }
        let _ = write!(text, "{:>digits$} {:<name_width$} ", number_of(row), name(row));
        for (at, column) in columns.iter().enumerate() {
            let cell = groups::cell(matrix, row, column);
            if !used.contains(&cell) {
                used.push(cell);
            }
            text.push_str(if is_new(&columns, at) { "  " } else { " " });
            let (letter, escape) = letter(cell);
            match colour {
                true => drop(write!(text, "{escape}{letter}{RESET}")),
                false => text.push(letter),
            }
        }
        text.push('\n');
    }
    let only_columns: Vec<&&[usize]> = columns.iter().filter(|column| !rows.contains(column)).collect();
    if !only_columns.is_empty() {
        text.push_str("\nColumns:\n");
        for column in only_columns {
            let _ = writeln!(text, "{:>digits$} {}", number_of(column), name(column));
        }
    }

    text.push('\n');
    for (cell, words) in LEGEND.iter().filter(|(cell, _)| used.contains(cell)) {
        let _ = writeln!(text, "  {}  {words}", letter(*cell).0);
    }
    some_ports(&mut text, matrix, &rows, &columns, &name);
    members(&mut text, matrix, groups);
    text
}

fn trim_line(text: &mut String) {
    text.truncate(text.trim_end_matches(' ').len());
}

/// What is allowed and what not where not all ports are alike.
fn some_ports(
    text: &mut String,
    matrix: &Matrix,
    rows: &[&[usize]],
    columns: &[&[usize]],
    name: &impl Fn(&[usize]) -> String,
) {
    let pairs = rows.iter().flat_map(|row| columns.iter().map(move |column| (row, column)));
    let pairs: Vec<_> = pairs.filter(|(row, column)| groups::cell(matrix, row, column) == Cell::Some).collect();
    if pairs.is_empty() {
        return;
    }
    text.push_str("\nSome ports only:\n");
    for (row, column) in pairs.iter().take(LISTED) {
        let (source, destination) = groups::example(row, column);
        let mut by_verdict: Vec<(Verdict, Vec<String>)> = Vec::new();
        for (probe, answer) in matrix.probes(destination).iter().zip(matrix.answers(source, destination)) {
            let Some(verdict) = answer.map(|answer| answer.verdict()) else { continue };
            let port = matrix.probe_name(destination, *probe);
            match by_verdict.iter_mut().find(|(known, _)| *known == verdict) {
                Some((_, ports)) => ports.push(port),
                None => by_verdict.push((verdict, vec![port])),
            }
        }
        by_verdict.sort();
        let parts: Vec<String> =
            by_verdict.iter().map(|(verdict, ports)| format!("{} {}", ports.join(", "), verdict.words())).collect();
        let _ = writeln!(text, "  {} > {}: {}", name(row), name(column), parts.join("; "));
    }
    more(text, pairs.len());
}

/// Who stands behind a group's name.
fn members(text: &mut String, matrix: &Matrix, groups: &Groups) {
    let together: Vec<&Vec<usize>> = groups.groups.iter().filter(|group| group.len() > 1).collect();
    if together.is_empty() {
        return;
    }
    text.push_str("\nTogether:\n");
    for group in together.iter().take(LISTED) {
        let names: Vec<&str> = group.iter().take(NAMED).map(|pod| matrix.pods[*pod].short_name()).collect();
        let number = groups.groups.partition_point(|other| other[0] < group[0]) + 1;
        let _ = write!(text, "  {number} {}/ {}", matrix.pods[group[0]].namespace(), names.join(" "));
        match group.len() - names.len() {
            0 => text.push('\n'),
            more => drop(writeln!(text, " and {more} more")),
        }
    }
    more(text, together.len());
}

fn more(text: &mut String, all: usize) {
    if all > LISTED {
        let _ = writeln!(text, "  and {} more; --output json has all", all - LISTED);
    }
}
