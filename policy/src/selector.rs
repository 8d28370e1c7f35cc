//! Calico's selector language: expressions over labels.
//!
//! Grammar (Calico's documentation, "Selectors"; blanks are spaces and tabs):
//!
//! ```text
//! expression  = conjunction { "||" conjunction }
//! conjunction = negation { "&&" negation }
//! negation    = { "!" } term
//! term        = "(" expression ")" | "has(" label ")" | "all()" | "global()" | label operator
//! operator    = "==" string | "!=" string | "contains" string | "starts with" string | "ends with" string
//!             | "in" set | "not in" set
//! set         = "{" [ string { "," string } [ "," ] ] "}"
//! string      = "'" text "'" | '"' text '"'            (no escapes)
//! ```
//!
//! The words of operators count only right after a label, so labels may have their names; the blanks inside them are
//! optional. Parsing is by recursive descent, with a limit to the depth of parentheses, because selectors come from
//! whoever may write a policy.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use thiserror::Error;

/// Labels of one thing.
pub type Labels = BTreeMap<String, String>;

/// Parentheses nested deeper than this are refused.
const MAX_DEPTH: usize = 128;

/// The longest label name, in bytes.
const MAX_LABEL_BYTES: usize = 512;

/// An expression over labels.
///
/// Equal values are equal expressions as written, not in meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Selector {
    /// `all()`: always true. The empty selector.
    #[default]
    All,
    /// `global()`: always true; as a rule's namespace selector it stands for things outside any namespace, which
    /// whoever builds the model expresses as `!has(projectcalico.org/namespace)`.
    Global,
    /// `label == 'value'`.
    Equals(String, String),
    /// `label != 'value'`; true when the label is missing.
    NotEquals(String, String),
    /// `label in {'value', ...}`.
    In(String, BTreeSet<String>),
    /// `label not in {'value', ...}`; true when the label is missing.
    NotIn(String, BTreeSet<String>),
    /// `has(label)`.
    Has(String),
    /// `label contains 'text'`.
    Contains(String, String),
    /// `label starts with 'text'`.
    StartsWith(String, String),
    /// `label ends with 'text'`.
    EndsWith(String, String),
    /// All of these; true when empty.
    And(Vec<Selector>),
    /// Any of these; false when empty.
    Or(Vec<Selector>),
    /// Not this.
    Not(Box<Selector>),
}

/// Why a text is no selector.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message} (at character {})", offset + 1)]
pub struct SelectorError {
    /// Where, in bytes from the start of the text.
    pub offset: usize,
    /// What is wrong and what was expected.
    pub message: String,
}

impl Selector {
    /// Parses a selector; an empty or blank text is [`Selector::All`].
    ///
    /// # Errors
    /// [`SelectorError`] with the place and what was expected there.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { text, at: 0 };
        parser.skip_blanks();
        if parser.rest().is_empty() {
            return Ok(Self::All);
        }
        let selector = parser.expression(0)?;
        if !parser.rest().is_empty() {
            return Err(parser.error("expected &&, || or the end of the selector"));
        }
        Ok(selector)
    }

    /// `!has(label)`.
    pub fn lacks(label: impl Into<String>) -> Self {
        Self::Not(Box::new(Self::Has(label.into())))
    }

    /// All of these: one of them alone stays itself, none is [`Selector::All`].
    pub fn all_of(parts: impl IntoIterator<Item = Self>) -> Self {
        let mut parts: Vec<Self> = parts.into_iter().filter(|part| *part != Self::All).collect();
        match parts.len() {
            0 => Self::All,
            1 => parts.remove(0),
            _ => Self::And(parts),
        }
    }

    /// Whether things with these labels are selected.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = |label: &str| labels.get(label).map(String::as_str);
        match self {
            Self::All | Self::Global => true,
            Self::Equals(label, wanted) => value(label) == Some(wanted),
            Self::NotEquals(label, unwanted) => value(label) != Some(unwanted),
            Self::In(label, wanted) => value(label).is_some_and(|value| wanted.contains(value)),
            Self::NotIn(label, unwanted) => value(label).is_none_or(|value| !unwanted.contains(value)),
            Self::Has(label) => labels.contains_key(label),
            Self::Contains(label, text) => value(label).is_some_and(|value| value.contains(text.as_str())),
            Self::StartsWith(label, text) => value(label).is_some_and(|value| value.starts_with(text.as_str())),
            Self::EndsWith(label, text) => value(label).is_some_and(|value| value.ends_with(text.as_str())),
            Self::And(parts) => parts.iter().all(|part| part.matches(labels)),
            Self::Or(parts) => parts.iter().any(|part| part.matches(labels)),
            Self::Not(part) => !part.matches(labels),
        }
    }
}

impl fmt::Display for Selector {
    /// Writes the selector so that parsing it gives an equal one, if it came from parsing one; else one that is equal in
    /// meaning, unless a string has both kinds of quotes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A string has no escapes.
        let quote = |text: &str| if text.contains('\'') { format!("\"{text}\"") } else { format!("'{text}'") };
        let set = |values: &BTreeSet<String>| values.iter().map(|value| quote(value)).collect::<Vec<_>>().join(", ");
        // Parentheses only where they are needed, as their depth is limited.
        let join = |f: &mut fmt::Formatter<'_>, parts: &[Self], operator: &str, needs: fn(&Self) -> bool| {
            for (index, part) in parts.iter().enumerate() {
                let operator = if index > 0 { operator } else { "" };
                if needs(part) { write!(f, "{operator}({part})")? } else { write!(f, "{operator}{part}")? }
            }
            Ok(())
        };
        match self {
            Self::All => f.write_str("all()"),
            Self::Global => f.write_str("global()"),
            Self::Equals(label, value) => write!(f, "{label} == {}", quote(value)),
            Self::NotEquals(label, value) => write!(f, "{label} != {}", quote(value)),
            Self::In(label, values) => write!(f, "{label} in {{{}}}", set(values)),
            Self::NotIn(label, values) => write!(f, "{label} not in {{{}}}", set(values)),
            Self::Has(label) => write!(f, "has({label})"),
            Self::Contains(label, text) => write!(f, "{label} contains {}", quote(text)),
            Self::StartsWith(label, text) => write!(f, "{label} starts with {}", quote(text)),
            Self::EndsWith(label, text) => write!(f, "{label} ends with {}", quote(text)),
            Self::And(parts) if parts.is_empty() => f.write_str("all()"),
            Self::Or(parts) if parts.is_empty() => f.write_str("!all()"),
            Self::And(parts) => join(f, parts, " && ", |part| matches!(part, Self::And(_) | Self::Or(_))),
            Self::Or(parts) => join(f, parts, " || ", |part| matches!(part, Self::Or(_))),
            Self::Not(part) if matches!(**part, Self::And(_) | Self::Or(_) | Self::Not(_)) => write!(f, "!({part})"),
            Self::Not(part) => write!(f, "!{part}"),
        }
    }
}

/// A place in the text. Every method leaves it after the blanks that follow what it took.
struct Parser<'text> {
    text: &'text str,
    at: usize,
}

impl<'text> Parser<'text> {
    fn rest(&self) -> &'text str {
        &self.text[self.at..]
    }

    fn error(&self, message: impl Into<String>) -> SelectorError {
        SelectorError { offset: self.at, message: message.into() }
    }

    fn skip_blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start_matches([' ', '\t']).len();
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
            self.skip_blanks();
        }
        found
    }

    fn expect(&mut self, token: &str, after: &str) -> Result<(), SelectorError> {
        if self.take(token) { Ok(()) } else { Err(self.error(format!("expected {token} {after}"))) }
    }

    fn expression(&mut self, depth: usize) -> Result<Selector, SelectorError> {
        let mut parts = vec![self.conjunction(depth)?];
        while self.take("||") {
            parts.push(self.conjunction(depth)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Selector::Or(parts) })
    }

    fn conjunction(&mut self, depth: usize) -> Result<Selector, SelectorError> {
        let mut parts = vec![self.negation(depth)?];
        while self.take("&&") {
            parts.push(self.negation(depth)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Selector::And(parts) })
    }

    fn negation(&mut self, depth: usize) -> Result<Selector, SelectorError> {
        let mut negated = false;
        while !self.rest().starts_with("!=") && self.take("!") {
            negated = !negated;
        }
        let term = self.term(depth)?;
        Ok(if negated { Selector::Not(Box::new(term)) } else { term })
    }

    fn term(&mut self, depth: usize) -> Result<Selector, SelectorError> {
        if self.rest().starts_with('(') {
            if depth == MAX_DEPTH {
                return Err(self.error(format!("parentheses nested deeper than {MAX_DEPTH}")));
            }
            self.take("(");
            let inner = self.expression(depth + 1)?;
            self.expect(")", "or an operator")?;
            return Ok(inner);
        }
        if self.take("has(") {
            let label = self.label("a label name in has()")?;
            self.expect(")", "after the label in has()")?;
            return Ok(Selector::Has(label));
        }
        if self.take("all(") {
            self.expect(")", "after all(")?;
            return Ok(Selector::All);
        }
        if self.take("global(") {
            self.expect(")", "after global(")?;
            return Ok(Selector::Global);
        }
        let label = self.label("a label, has(), all(), global(), ! or (")?;
        self.operator(label)
    }

    fn operator(&mut self, label: String) -> Result<Selector, SelectorError> {
        if self.take("==") {
            Ok(Selector::Equals(label, self.string()?))
        } else if self.take("!=") {
            Ok(Selector::NotEquals(label, self.string()?))
        } else if self.take("contains") {
            Ok(Selector::Contains(label, self.string()?))
        } else if self.take("starts") {
            self.expect("with", "after starts")?;
            Ok(Selector::StartsWith(label, self.string()?))
        } else if self.take("ends") {
            self.expect("with", "after ends")?;
            Ok(Selector::EndsWith(label, self.string()?))
        } else if self.take("in") {
            Ok(Selector::In(label, self.set()?))
        } else if self.take("not") {
            self.expect("in", "after not")?;
            Ok(Selector::NotIn(label, self.set()?))
        } else {
            Err(self.error(format!(
                "expected ==, !=, in, not in, contains, starts with or ends with after the label {label}"
            )))
        }
    }

    fn label(&mut self, expected: &str) -> Result<String, SelectorError> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_./-".contains(&byte);
        let length = self.rest().bytes().take_while(|byte| is_name(*byte)).count();
        if length == 0 {
            return Err(self.error(format!("expected {expected}")));
        }
        if length > MAX_LABEL_BYTES {
            return Err(self.error(format!("a label name of more than {MAX_LABEL_BYTES} characters")));
        }
        let label = self.rest()[..length].to_owned();
        self.at += length;
        self.skip_blanks();
        Ok(label)
    }

    fn string(&mut self) -> Result<String, SelectorError> {
        let Some(quote) = self.rest().chars().next().filter(|quote| ['\'', '"'].contains(quote)) else {
            return Err(self.error("expected a string in ' or \""));
        };
        let body = &self.rest()[1..];
        let Some(length) = body.find(quote) else {
            return Err(self.error("the string that starts here does not end"));
        };
        let value = body[..length].to_owned();
        self.at += length + 2;
        self.skip_blanks();
        Ok(value)
    }

    fn set(&mut self) -> Result<BTreeSet<String>, SelectorError> {
        self.expect("{", "and a set of strings")?;
        let mut values = BTreeSet::new();
        while !self.rest().starts_with('}') {
            values.insert(self.string()?);
            if !self.take(",") {
                break;
            }
        }
        self.expect("}", "at the end of the set")?;
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn holds(text: &str, pairs: &[(&str, &str)]) -> bool {
        Selector::parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).matches(&labels(pairs))
    }

    #[test]
    fn missing_labels_fail_every_test_but_the_negated_ones() {
        for text in ["a == 'x'", "a in {'x'}", "a contains ''", "a starts with ''", "a ends with ''", "has(a)"] {
            assert!(!holds(text, &[]), "{text}");
            assert!(holds(&format!("!{text}"), &[]), "!{text}");
        }
        for text in ["a != 'x'", "a not in {'x'}", "a notin {}"] {
            assert!(holds(text, &[]), "{text}");
        }
    }

    #[test]
    fn and_binds_tighter_than_or_and_not_takes_one_term() {
        assert!(holds("has(a) || has(b) && has(c)", &[("a", "")]));
        assert!(!holds("(has(a) || has(b)) && has(c)", &[("a", "")]));
        assert!(!holds("!has(a) && has(b)", &[]));
        assert!(!holds("!a == 'x'", &[("a", "x")]));
        assert!(holds("!!a == 'x'", &[("a", "x")]));
        assert!(holds("! ! !has(a)", &[]));
    }

    #[test]
    fn words_may_be_split_by_blanks_or_not_at_all() {
        for text in ["a startswith'x'", "a starts \t with 'x'", "a starts with\t\"x\""] {
            assert!(holds(text, &[("a", "xy")]), "{text}");
        }
        for text in ["a endswith 'y'", "a ends   with 'y'", "a not  in{'z'}", "a notin {'z'}", " a  in {'xy',} "] {
            assert!(holds(text, &[("a", "xy")]), "{text}");
        }
        assert!(Selector::parse("a ==\n'x'").is_err());
    }

    #[test]
    fn operator_words_are_labels_where_a_label_stands() {
        assert!(holds("contains contains \"contains\"", &[("contains", "contains")]));
        assert!(holds(
            "in in {'in'} && not != 'x' && has == 'y' && all == 'z'",
            &[("in", "in"), ("has", "y"), ("all", "z")]
        ));
        assert!(holds("has(has) && has( all )", &[("has", ""), ("all", "")]));
    }

    #[test]
    fn empty_and_trailing_comma_sets_parse() {
        assert!(!holds("a in {}", &[("a", "")]));
        assert!(holds("a in {'b', 'a', 'b',}", &[("a", "a")]));
        assert_eq!(Selector::parse("a in {'b','a'}"), Selector::parse("a in {\"a\", 'b', 'a',}"));
    }

    #[test]
    fn blank_text_selects_all() {
        assert_eq!(Selector::parse(" \t"), Ok(Selector::All));
        assert_eq!(Selector::parse(""), Ok(Selector::All));
    }

    #[test]
    fn errors_name_the_place() {
        for (text, offset) in [
            ("a = 'x'", 2),
            ("a == 'x' & b == 'y'", 9),
            ("a == 'x' | b == 'y'", 9),
            ("foo", 3),
            ("a == b", 5),
            ("'a' == b", 0),
            ("()", 1),
            ("(has(a)", 7),
            ("has(a))", 6),
            ("a == 'x", 5),
            ("a in {'x'", 9),
            ("a in {,}", 6),
            ("a in {'x' 'y'}", 10),
            ("a starts 'x'", 9),
            ("has (a)", 4),
            ("has(a) &&", 9),
            ("é == 'x'", 0),
        ] {
            let error = Selector::parse(text).expect_err(text);
            assert_eq!(error.offset, offset, "{text}: {error}");
        }
        assert!(Selector::parse(&format!("{} == 'x'", "a".repeat(513))).is_err());
        assert!(Selector::parse(&format!("{} == 'x'", "a".repeat(512))).is_ok());
    }

    #[test]
    fn depth_is_limited_but_negations_are_not() {
        assert!(Selector::parse(&format!("{}all(){}", "(".repeat(128), ")".repeat(128))).is_ok());
        assert!(Selector::parse(&format!("{}all(){}", "(".repeat(129), ")".repeat(129))).is_err());
        assert!(Selector::parse(&format!("{}all()", "!".repeat(100_000))).is_ok());
    }

    #[test]
    fn display_parses_back() {
        for text in [
            "a == 'x' && !(b in {'y', \"it's\"} || has(c))",
            "has(a) && (has(b) && has(c)) || (has(d) || has(e))",
            "(has(a) || has(b)) && !(!has(c))",
            "!a contains 'q'",
            "a not in {}",
            "global()",
        ] {
            let selector = Selector::parse(text).unwrap();
            assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector, "{selector}");
        }
    }
}
