//! What is wrong with a configuration: collected, never the first fault only, and shown with the offending line.

use std::{collections::BTreeMap, fmt, sync::Arc};

use miette::{
    GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError, MietteSpanContents, SourceCode, SourceSpan,
    SpanContents,
};
use serde::Serialize;

use super::source::{Source, Span};

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// It is accepted, but is hardly what was meant.
    Warning,
    /// Something that an operator may want to know.
    Note,
}

/// One problem at one place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Where.
    pub span: Span,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Of a note: what it is counted under where notes are told in short.
    pub topic: Option<Topic>,
}

/// What notes say that are alike but for their object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Topic {
    /// Objects of a kind, "Deployment of apps/v1", that weir does not read.
    Skipped(Arc<str>),
    /// Services without a cluster IP.
    NoClusterIp,
    /// Pods without an address.
    NoAddress,
    /// EndpointSlices of no service.
    NoService,
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skipped(kind) => write!(f, "{kind}: skipped"),
            Self::NoClusterIp => f.write_str("Service: without a cluster IP, so not served"),
            Self::NoAddress => f.write_str("Pod: without an address yet, so left out"),
            Self::NoService => f.write_str("EndpointSlice: of no service"),
        }
    }
}

/// A diagnostic in the form that programs read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct JsonDiagnostic {
    /// The file's name; of an object that no file has, its own, with its version.
    pub file: String,
    /// Line, from 1; 0 where there is no file.
    pub line: usize,
    /// Column in characters, from 1; 0 where there is no file.
    pub column: usize,
    /// The field, where there is no file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// Everything that was found, with the texts that it was found in. Displays all of it, with the offending lines.
#[derive(Clone, Debug, Default)]
pub struct Problems {
    sources: Vec<Arc<Source>>,
    diagnostics: Vec<Diagnostic>,
}

impl Problems {
    /// Makes a text known; its number stands in spans.
    pub fn add_source(&mut self, source: Source) -> u32 {
        self.sources.push(Arc::new(source));
        (self.sources.len() - 1) as u32
    }

    /// Makes a text known that was read before.
    pub fn share_source(&mut self, source: Arc<Source>) -> u32 {
        self.sources.push(source);
        (self.sources.len() - 1) as u32
    }

    /// The same texts, of which nothing is said yet.
    pub fn without_diagnostics(&self) -> Self {
        Self { sources: self.sources.clone(), diagnostics: Vec::new() }
    }

    /// The text with this number.
    ///
    /// # Panics
    /// Where no [`Problems::add_source`] gave that number.
    pub fn source(&self, file: u32) -> &Arc<Source> {
        &self.sources[file as usize]
    }

    /// File, line and column of a place, as "file:line:column"; or the object and the path of its field.
    pub fn place(&self, span: Span) -> String {
        self.source(span.file).place(span)
    }

    /// Lets go of the trees that places were looked up in.
    pub(crate) fn forget_trees(&self) {
        self.sources.iter().for_each(|source| source.forget_tree());
    }

    /// Adds one.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    /// Adds an error.
    pub fn error(&mut self, span: Span, message: impl Into<String>, help: impl Into<Option<String>>) {
        self.push(Diagnostic {
            severity: Severity::Error,
            span,
            message: message.into(),
            help: help.into(),
            topic: None,
        });
    }

    /// Adds a warning.
    pub fn warning(&mut self, span: Span, message: impl Into<String>, help: impl Into<Option<String>>) {
        self.push(Diagnostic {
            severity: Severity::Warning,
            span,
            message: message.into(),
            help: help.into(),
            topic: None,
        });
    }

    /// Adds a note.
    pub fn note(&mut self, span: Span, message: impl Into<String>) {
        self.push(Diagnostic { severity: Severity::Note, span, message: message.into(), help: None, topic: None });
    }

    /// Adds a note of which there may be many alike.
    pub fn note_on(&mut self, topic: Topic, span: Span, message: impl Into<String>) {
        let topic = Some(topic);
        self.push(Diagnostic { severity: Severity::Note, span, message: message.into(), help: None, topic });
    }

    /// How many notes there are on each topic.
    pub fn topics(&self) -> BTreeMap<&Topic, usize> {
        let mut topics = BTreeMap::new();
        for topic in self.diagnostics.iter().filter_map(|diagnostic| diagnostic.topic.as_ref()) {
            *topics.entry(topic).or_default() += 1;
        }
        topics
    }

    /// Leaves out the notes on some topics.
    pub fn leave_out(&mut self, which: impl Fn(&Topic) -> bool) {
        self.diagnostics.retain(|diagnostic| !diagnostic.topic.as_ref().is_some_and(&which));
    }

    /// All of them, in the order of finding until [`Problems::sort`].
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    /// Those of one severity.
    pub fn of(&self, severity: Severity) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics.iter().filter(move |diagnostic| diagnostic.severity == severity)
    }

    /// Takes out the errors that `which` names.
    pub fn take_errors(&mut self, which: impl Fn(&Diagnostic) -> bool) -> Vec<Diagnostic> {
        let is_taken = |d: &mut Diagnostic| d.severity == Severity::Error && which(d);
        self.diagnostics.extract_if(.., is_taken).collect()
    }

    /// Whether the configuration must be refused.
    pub fn has_errors(&self) -> bool {
        self.of(Severity::Error).next().is_some()
    }

    /// Puts them in the order of files and lines.
    pub fn sort(&mut self) {
        self.diagnostics.sort_by_key(|diagnostic| (diagnostic.span.file, diagnostic.span.start, diagnostic.severity));
    }

    /// One diagnostic in one line: "file:line:column: message".
    pub fn line(&self, diagnostic: &Diagnostic) -> String {
        format!("{}: {}", self.place(diagnostic.span), diagnostic.message)
    }

    /// All of them for programs.
    pub fn to_json(&self) -> Vec<JsonDiagnostic> {
        let to_json = |diagnostic: &Diagnostic| {
            let (source, span) = (self.source(diagnostic.span.file), diagnostic.span);
            let (file, (line, column), path) = match source.objects() {
                Some(objects) => (objects.object(span.start), (0, 0), Some(objects.path(span.end - span.start))),
                None => (source.name().to_owned(), source.line_column(span.start), None),
            };
            JsonDiagnostic {
                file,
                line,
                column,
                path,
                severity: diagnostic.severity,
                message: diagnostic.message.clone(),
                help: diagnostic.help.clone(),
            }
        };
        self.diagnostics.iter().map(to_json).collect()
    }

    /// All of them for a person, coloured or not.
    pub fn render(&self, colour: bool) -> String {
        self.render_those(colour, |_| true)
    }

    /// As [`Problems::render`], without the notes that have a topic.
    pub fn render_in_short(&self, colour: bool) -> String {
        self.render_those(colour, |diagnostic| diagnostic.topic.is_none())
    }

    fn render_those(&self, colour: bool, which: impl Fn(&Diagnostic) -> bool) -> String {
        let theme = if colour { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        let handler = GraphicalReportHandler::new_themed(theme).with_width(RENDER_WIDTH).with_context_lines(1);
        let mut text = String::new();
        // Those of one text follow each other, and it is unpacked once for them.
        let mut last: Option<(&Source, Arc<String>)> = None;
        for diagnostic in self.diagnostics.iter().filter(|diagnostic| which(diagnostic)) {
            let source = &**self.source(diagnostic.span.file);
            let known = last.take().filter(|(of, _)| std::ptr::eq(*of, source));
            let (_, whole) = last.insert(known.unwrap_or_else(|| (source, source.text())));
            let report = Report { diagnostic, shown: Shown { source, text: whole } };
            handler.render_report(&mut text, &report).expect("writing to a string does not fail");
        }
        text
    }
}

impl Extend<Diagnostic> for Problems {
    fn extend<I: IntoIterator<Item = Diagnostic>>(&mut self, diagnostics: I) {
        self.diagnostics.extend(diagnostics);
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Problems {}

/// Columns of the printed report.
const RENDER_WIDTH: usize = 120;
/// Bytes shown of a line before and after the problem; JSON files may hold everything in one line.
const SHOWN_BYTES: usize = 160;

/// One diagnostic as miette prints it.
#[derive(Debug)]
struct Report<'a> {
    diagnostic: &'a Diagnostic,
    shown: Shown<'a>,
}

/// A text as miette reads it.
#[derive(Debug)]
struct Shown<'a> {
    source: &'a Source,
    text: &'a str,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.diagnostic.message)?;
        // There is no line to show.
        if self.shown.source.objects().is_some() {
            write!(f, "\nat {}", self.shown.source.place(self.diagnostic.span))?;
        }
        Ok(())
    }
}

impl std::error::Error for Report<'_> {}

impl miette::Diagnostic for Report<'_> {
    fn severity(&self) -> Option<miette::Severity> {
        Some(match self.diagnostic.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
            Severity::Note => miette::Severity::Advice,
        })
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.diagnostic.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.shown.source.objects().is_none().then_some(&self.shown as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        if self.shown.source.objects().is_some() {
            return None;
        }
        let Span { start, end, .. } = self.diagnostic.span;
        // Marks stay on the first line: a list or an object would otherwise be quoted whole.
        let Shown { source, text } = self.shown;
        let line_end = source.line_range(source.line_index(start)).end.max(start as usize);
        let shown_end = (end as usize).min(line_end).min(floor(text, start as usize + SHOWN_BYTES));
        let length = shown_end.saturating_sub(start as usize);
        Some(Box::new(std::iter::once(LabeledSpan::new(None, start as usize, length))))
    }
}

/// The largest character boundary up to `offset`.
fn floor(text: &str, offset: usize) -> usize {
    (0..=offset.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

impl SourceCode for Shown<'_> {
    /// The lines around a span, without walking the whole text as miette's own sources do, and cut where very long.
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let Self { source, text } = *self;
        if span.offset() + span.len() > text.len() {
            return Err(MietteError::OutOfBounds);
        }
        let line = source.line_index(span.offset() as u32);
        let last = source.line_index((span.offset() + span.len()) as u32);
        let (_, column) = source.line_column(span.offset() as u32);
        let own = source.line_range(line);
        let (first, range) = if lines_before == 0 && lines_after == 0 {
            (line, span.offset()..span.offset() + span.len())
        } else if own.len() > 2 * SHOWN_BYTES {
            let start = floor(text, span.offset().saturating_sub(SHOWN_BYTES)).max(own.start);
            (line, start..floor(text, span.offset() + span.len() + SHOWN_BYTES).min(own.end))
        } else {
            let short = |index: &usize| source.line_range(*index).len() <= 2 * SHOWN_BYTES;
            let first = (line.saturating_sub(lines_before)..line).rev().take_while(short).last().unwrap_or(line);
            let end = (last + 1..source.line_count().min(last + 1 + lines_after)).take_while(short).last();
            (first, source.line_range(first).start..source.line_range(end.unwrap_or(last)).end)
        };
        let covered = SourceSpan::new(range.start.into(), range.len());
        let column = if range.start == span.offset() { column - 1 } else { 0 };
        Ok(Box::new(MietteSpanContents::new_named(
            source.name().to_owned(),
            text[range].as_bytes(),
            covered,
            first,
            column,
            source.line_count(),
        )))
    }
}

/// The known name that a misspelt one probably stands for: at most a third of its letters wrong.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (edit_distance(&name.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (name.len().max(candidate.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Whether at most so many letters of a name are wrong, whatever their case.
pub fn is_near(name: &str, known: &str, wrong: usize) -> bool {
    edit_distance(&name.to_lowercase(), &known.to_lowercase()) <= wrong
}

/// Optimal string alignment distance: insertions, deletions, substitutions, and swaps of neighbours.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let substitution = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let swap = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                let best = substitution.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if swap { best.min(rows[i - 2][j - 2] + 1) } else { best }
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_name_by_edit_distance() {
        let known = ["nodeName", "manifests", "podCIDRs", "serviceCIDRs"];
        assert_eq!(nearest("nodename", known), Some("nodeName"));
        assert_eq!(nearest("manifest", known), Some("manifests"));
        assert_eq!(nearest("podCDIRs", known), Some("podCIDRs"));
        assert_eq!(nearest("completelyElse", known), None);
        assert_eq!(edit_distance("ab", "ba"), 1);
        assert_eq!(edit_distance("", "abc"), 3);
    }

    #[test]
    fn a_report_names_place_and_shows_the_line() {
        let mut problems = Problems::default();
        let file = problems.add_source(Source::new("dir/weir.yaml", "a: 1\nnodename: x\nb: 2\n".into()));
        problems.error(Span { file, start: 5, end: 13 }, "unknown key nodename", "did you mean nodeName?".to_owned());
        let text = problems.to_string();
        assert!(text.contains("[dir/weir.yaml:2:1]"), "{text}");
        assert!(text.contains("2 │ nodename: x"), "{text}");
        assert!(text.contains("did you mean nodeName?"), "{text}");
    }

    #[test]
    fn a_very_long_line_is_cut_but_its_column_is_kept() {
        let mut problems = Problems::default();
        let text = format!("[{}X{}]", "é, ".repeat(4000), " y,".repeat(4000));
        let start = text.find('X').unwrap() as u32;
        let file = problems.add_source(Source::new("one.json", text));
        problems.error(Span { file, start, end: start + 1 }, "bad", None);
        let shown = problems.to_string();
        assert!(shown.contains("[one.json:1:12002]"), "{shown}");
        assert!(shown.len() < 2000, "{}", shown.len());
    }

    #[test]
    fn a_problem_at_the_very_end_of_a_file_is_shown() {
        for text in ["", "a: [", "a: [\n", "\u{e9}"] {
            let mut problems = Problems::default();
            let end = text.len() as u32;
            let file = problems.add_source(Source::new("f.yaml", text.into()));
            problems.error(Span { file, start: end, end }, "unfinished", None);
            let shown = problems.to_string();
            assert!(shown.contains("f.yaml:"), "{text:?} {shown}");
        }
    }
}
