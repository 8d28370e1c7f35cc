//! A matrix as a picture: scalable, readable without colours, with the deciding rules as tooltips.

use std::fmt::Write as _;

use weir_cluster::policy::{
    groups::{self, Groups},
    matrix::{Cell, Matrix, Verdict},
};

const FONT: &str = "'DejaVu Sans','Segoe UI',Helvetica,Arial,sans-serif";
/// Width of a letter of the font, in parts of its size: a little more than the average.
const LETTER: f64 = 0.58;
const MARGIN: f64 = 24.0;
/// Letters of a name; longer ones are cut, and whole in their tooltip.
const NAME_LETTERS: usize = 36;
/// Space between the pods of two namespaces.
const NAMESPACE_GAP: f64 = 6.0;

/// Class, sign, and words of a cell.
fn look(cell: Cell) -> (&'static str, &'static str, &'static str) {
    match cell {
        Cell::Allowed => ("allowed", "", "allowed"),
        Cell::Some => ("some", "~", "some ports only"),
        Cell::Denied(Verdict::DeniedByEgress) => ("egress", "E", "denied by egress"),
        Cell::Denied(Verdict::DeniedByIngress) => ("ingress", "I", "denied by ingress"),
        Cell::Denied(_) => ("both", "X", "denied by both"),
        Cell::Itself => ("itself", "", "itself"),
        Cell::NoWay => ("noway", "", "no address family in common"),
    }
}

/// Colours that people who see few of them can tell apart (after Okabe and Ito), each with the colour of its sign.
const STYLE: &str = "\
text{fill:#24292f}\
.title{font-weight:bold}\
.note{fill:#57606a}\
.namespace{font-weight:bold;fill:#24292f}\
.line{stroke:#d0d7de;stroke-width:1}\
.sign{text-anchor:middle;font-weight:bold}\
.allowed{fill:#009e73}.some{fill:#8fd3b6}.egress{fill:#e69f00}.ingress{fill:#56b4e9}.both{fill:#6e4a7e}\
.itself{fill:#eaeef2}.noway{fill:#ffffff;stroke:#d0d7de}\
.on-some,.on-egress,.on-ingress{fill:#24292f}.on-both{fill:#ffffff}\
rect.cell:hover{stroke:#24292f;stroke-width:2}";

/// Sizes by how many rows or columns there are.
struct Sizes {
    cell: f64,
    text: f64,
    has_signs: bool,
}

impl Sizes {
    fn of(most: usize) -> Self {
        let (cell, text) = match most {
            0..=16 => (28.0, 13.0),
            17..=32 => (20.0, 12.0),
            33..=70 => (15.0, 11.0),
            71..=140 => (11.0, 9.0),
            _ => (8.0, 7.0),
        };
        Self { cell, text, has_signs: cell >= 15.0 }
    }
}

/// The rows, or the columns, and where they begin.
struct Axis<'m> {
    matrix: &'m Matrix,
    groups: Vec<&'m [usize]>,
    starts: Vec<f64>,
    length: f64,
    names: f64,
    namespaces: f64,
}

impl<'m> Axis<'m> {
    fn new(matrix: &'m Matrix, groups: Vec<&'m [usize]>, sizes: &Sizes) -> Self {
        let namespace = |group: &[usize]| matrix.pods[group[0]].namespace();
        let (mut starts, mut at) = (Vec::with_capacity(groups.len()), 0.0);
        for (number, group) in groups.iter().enumerate() {
            if number > 0 && namespace(groups[number - 1]) != namespace(group) {
                at += NAMESPACE_GAP;
            }
            starts.push(at);
            at += sizes.cell;
        }
        let width = |letters: usize| letters.min(NAME_LETTERS) as f64 * sizes.text * LETTER;
        let longest = |of: &dyn Fn(&[usize]) -> usize| groups.iter().map(|group| of(group)).max().unwrap_or(0);
        let names = width(longest(&|group| groups::short_name(matrix, group).chars().count())) + 12.0;
        let namespaces = width(longest(&|group| namespace(group).chars().count()) + 1) + 12.0;
        Self { matrix, groups, starts, length: at, names, namespaces }
    }

    /// Room for names and namespaces.
    fn head(&self) -> f64 {
        self.names + self.namespaces
    }

    /// The namespaces, and where each begins and ends.
    fn blocks(&self, sizes: &Sizes) -> Vec<(&'m str, f64, f64)> {
        let mut blocks: Vec<(&str, f64, f64)> = Vec::new();
        for (group, start) in self.groups.iter().zip(&self.starts) {
            let namespace = self.matrix.pods[group[0]].namespace();
            let end = start + sizes.cell;
            match blocks.last_mut().filter(|(name, ..)| *name == namespace) {
                Some(block) => block.2 = end,
                None => blocks.push((namespace, *start, end)),
            }
        }
        blocks
    }
}

/// The picture.
pub fn picture(matrix: &Matrix, groups: &Groups) -> String {
    let [rows, columns] = groups.rows_and_columns(matrix);
    let sizes = Sizes::of(rows.len().max(columns.len()));
    let (rows, columns) = (Axis::new(matrix, rows, &sizes), Axis::new(matrix, columns, &sizes));
    let mut notes = vec![format!("{}.", capital(&matrix.ports_in_words()))];
    if groups.are_grouped() {
        let (lines, pods) = (groups.groups.len(), matrix.pods.len());
        notes.push(format!("Pods of a namespace that fare alike share a line: {lines} lines for {pods} pods."));
    }
    notes.push("Sources are rows, destinations columns. Point at a cell for the rules that decide.".to_owned());
    let used = used_cells(matrix, &rows.groups, &columns.groups);

    // Title and notes, then the columns' names, then the grid, then the legend.
    let line = 19.0;
    let top = MARGIN + 26.0 + line * notes.len() as f64 + columns.head() + 12.0;
    let left = MARGIN + rows.head();
    let legend_top = top + rows.length + 34.0;
    let legend_width: f64 = used.iter().map(|cell| legend_item_width(*cell)).sum();
    let notes_width = notes.iter().map(|note| note.chars().count() as f64 * 12.0 * LETTER).fold(0.0, f64::max);
    let wanted = (left + columns.length + MARGIN).max(MARGIN + notes_width + MARGIN);
    // A narrow picture has its legend in several lines.
    let width = wanted.max(legend_width.min(480.0) + 2.0 * MARGIN);
    let legend = legend_places(&used, width - 2.0 * MARGIN);
    let legend_lines = legend.iter().map(|(_, _, line)| line + 1).max().unwrap_or(0);
    let height = legend_top + 24.0 * legend_lines as f64 + MARGIN - 6.0;

    let mut svg = String::new();
    let _ = write!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"{FONT}\" font-size=\"{}\">\n\
         <title>Who reaches whom</title>\n<style>{STYLE}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"{}\" font-size=\"17\">Who reaches whom</text>\n",
        sizes.text,
        MARGIN + 12.0,
    );
    for (number, note) in notes.iter().enumerate() {
        let y = MARGIN + 14.0 + line * (number + 1) as f64;
        let _ =
            writeln!(svg, "<text class=\"note\" x=\"{MARGIN}\" y=\"{y:.0}\" font-size=\"12\">{}</text>", escaped(note));
    }
    row_names(&mut svg, &rows, &sizes, left, top);
    column_names(&mut svg, &columns, &sizes, left, top);
    for (row, y) in rows.groups.iter().zip(&rows.starts) {
        for (column, x) in columns.groups.iter().zip(&columns.starts) {
            draw_cell(&mut svg, matrix, row, column, &sizes, left + x, top + y);
        }
    }
    for (cell, x, line) in legend {
        let (class, sign, words) = look(cell);
        let (x, y) = (MARGIN + x, legend_top + 24.0 * line as f64);
        let _ = write!(svg, "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"16\" height=\"16\" rx=\"3\"/>");
        if !sign.is_empty() {
            let (x, y) = (x + 8.0, y + 12.0);
            let _ =
                write!(svg, "<text class=\"sign on-{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"11\">{sign}</text>");
        }
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"12\">{words}</text>", x + 23.0, y + 12.5);
    }
    svg.push_str("</svg>\n");
    svg
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// The kinds of cell that there are, in the order of the legend.
fn used_cells(matrix: &Matrix, rows: &[&[usize]], columns: &[&[usize]]) -> Vec<Cell> {
    let order = [
        Cell::Allowed,
        Cell::Some,
        Cell::Denied(Verdict::DeniedByEgress),
        Cell::Denied(Verdict::DeniedByIngress),
        Cell::Denied(Verdict::DeniedByBoth),
        Cell::Itself,
        Cell::NoWay,
    ];
    let is_used =
        |cell: &Cell| rows.iter().any(|row| columns.iter().any(|column| groups::cell(matrix, row, column) == *cell));
    order.into_iter().filter(is_used).collect()
}

fn legend_item_width(cell: Cell) -> f64 {
    23.0 + look(cell).2.chars().count() as f64 * 12.0 * LETTER + 18.0
}

/// Each kind of cell with its place from the left and its line.
fn legend_places(used: &[Cell], width: f64) -> Vec<(Cell, f64, usize)> {
    let (mut x, mut line) = (0.0, 0);
    let mut places = Vec::new();
    for cell in used {
        let item = legend_item_width(*cell);
        if x > 0.0 && x + item > width {
            (x, line) = (0.0, line + 1);
        }
        places.push((*cell, x, line));
        x += item;
    }
    places
}

fn row_names(svg: &mut String, rows: &Axis<'_>, sizes: &Sizes, left: f64, top: f64) {
    for (group, start) in rows.groups.iter().zip(&rows.starts) {
        let y = top + start + sizes.cell / 2.0 + sizes.text * 0.36;
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{}{}</text>",
            left - 8.0,
            members(rows.matrix, group),
            escaped(&cut(&groups::short_name(rows.matrix, group))),
        );
    }
    let x = left - rows.names - 4.0;
    for (namespace, start, end) in rows.blocks(sizes) {
        let (start, end) = (top + start, top + end);
        let y = (start + end) / 2.0 + sizes.text * 0.36;
        let _ = writeln!(
            svg,
            "<path class=\"line\" d=\"M{x:.1} {start:.1}V{end:.1}\"/>\
             <text class=\"namespace\" x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>",
            x - 7.0,
            escaped(&cut(namespace)),
        );
    }
}

fn column_names(svg: &mut String, columns: &Axis<'_>, sizes: &Sizes, left: f64, top: f64) {
    for (group, start) in columns.groups.iter().zip(&columns.starts) {
        let (x, y) = (left + start + sizes.cell / 2.0 + sizes.text * 0.36, top - 8.0);
        let _ = writeln!(
            svg,
            "<text transform=\"translate({x:.1} {y:.1}) rotate(-90)\">{}{}</text>",
            members(columns.matrix, group),
            escaped(&cut(&groups::short_name(columns.matrix, group))),
        );
    }
    let y = top - columns.names - 4.0;
    for (namespace, start, end) in columns.blocks(sizes) {
        let (start, end) = (left + start, left + end);
        let x = (start + end) / 2.0 + sizes.text * 0.36;
        let _ = writeln!(
            svg,
            "<path class=\"line\" d=\"M{start:.1} {y:.1}H{end:.1}\"/>\
             <text class=\"namespace\" transform=\"translate({x:.1} {:.1}) rotate(-90)\">{}</text>",
            y - 7.0,
            escaped(&cut(namespace)),
        );
    }
}

fn draw_cell(svg: &mut String, matrix: &Matrix, row: &[usize], column: &[usize], sizes: &Sizes, x: f64, y: f64) {
    let cell = groups::cell(matrix, row, column);
    let (class, sign, _) = look(cell);
    let side = sizes.cell - if sizes.cell > 12.0 { 2.0 } else { 1.0 };
    let round = if sizes.cell > 18.0 { 3 } else { 2 };
    let _ = write!(
        svg,
        "<g><title>{}</title><rect class=\"cell {class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side}\" height=\"{side}\" \
         rx=\"{round}\"/>",
        escaped(&explanation(matrix, row, column)),
    );
    if sizes.has_signs && !sign.is_empty() {
        let size = sizes.cell * 0.5;
        let (x, y) = (x + side / 2.0, y + side / 2.0 + size * 0.36);
        let _ = write!(
            svg,
            "<text class=\"sign on-{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size:.1}\" \
             pointer-events=\"none\">{sign}</text>"
        );
    }
    svg.push_str("</g>\n");
}

/// What a cell stands for: each port with its verdict and the rules that decide.
fn explanation(matrix: &Matrix, row: &[usize], column: &[usize]) -> String {
    let (source, destination) = groups::example(row, column);
    let mut text = String::new();
    if row.len() > 1 || column.len() > 1 {
        text.push_str("for example ");
    }
    let _ = write!(text, "{} > {}", matrix.pods[source].name, matrix.pods[destination].name);
    if source == destination {
        text.push_str("\na pod always reaches itself");
        return text;
    }
    for (probe, answer) in matrix.probes(destination).iter().zip(matrix.answers(source, destination)) {
        let Some(answer) = answer else { continue };
        let _ = write!(
            text,
            "\n{}: {}\n    egress: {}\n    ingress: {}",
            matrix.probe_name(destination, *probe),
            answer.verdict().words(),
            matrix.authority(&answer.egress),
            matrix.authority(&answer.ingress),
        );
    }
    text
}

/// The whole name, or all names, as a tooltip where the label does not say it.
fn members(matrix: &Matrix, group: &[usize]) -> String {
    let names: Vec<&str> = group.iter().map(|pod| matrix.pods[*pod].name.as_str()).collect();
    format!("<title>{}</title>", escaped(&names.join("\n")))
}

fn cut(name: &str) -> String {
    if name.chars().count() <= NAME_LETTERS {
        return name.to_owned();
    }
    // Both ends tell pods apart.
    let (letters, kept) = (name.chars().collect::<Vec<_>>(), NAME_LETTERS - 1);
    let (head, tail) = (&letters[..kept / 2], &letters[letters.len() - (kept - kept / 2)..]);
    head.iter().chain(&['\u{2026}']).chain(tail).collect()
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}
