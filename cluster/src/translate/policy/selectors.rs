//! Selectors in the terms of the labels that endpoints carry: Kubernetes's label selectors, and Calico's expressions with
//! their limits by namespace and service account.

use weir_policy::Selector;

use super::labels::{NAMESPACE_LABEL, ORCHESTRATOR_LABEL};
use crate::{
    resources::{
        at::{At, Reporter},
        meta::LabelSelector,
    },
    text::problem::nearest,
};

/// The things of a namespace.
pub(super) fn in_namespace(namespace: &str) -> Selector {
    Selector::Equals(NAMESPACE_LABEL.to_owned(), namespace.to_owned())
}

/// The pods of a namespace.
pub(super) fn pods_of(namespace: &str) -> Selector {
    Selector::all_of([in_namespace(namespace), pods()])
}

/// All pods, and nothing else that has labels.
pub(super) fn pods() -> Selector {
    Selector::Equals(ORCHESTRATOR_LABEL.to_owned(), "k8s".to_owned())
}

/// Calico's expression. What is at fault is reported and selects all: nothing is made of a configuration with errors.
///
/// `global()` means something only in the namespace selectors of rules, see [`namespaces`].
pub(super) fn expression(text: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Selector {
    let selector = any_expression(text, at, field, report);
    warn_of_global(&selector, "everything", at, field, report);
    selector
}

fn warn_of_global(selector: &Selector, what: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) {
    if has_global(selector) {
        let help = "write all(): global() means something in the namespaceSelector of a rule only".to_owned();
        report.warning(at, format_args!("{field}: global() selects {what} here"), help);
    }
}

fn any_expression(text: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Selector {
    Selector::parse(text).unwrap_or_else(|error| {
        report.error(at, format_args!("{field}: {error}"), None);
        Selector::All
    })
}

fn has_global(selector: &Selector) -> bool {
    match selector {
        Selector::Global => true,
        Selector::And(parts) | Selector::Or(parts) => parts.iter().any(has_global),
        Selector::Not(part) => has_global(part),
        _ => false,
    }
}

/// An expression over labels that things inherit under `prefix`. `all()` stands for whatever inherits any, which `known_by` tells.
pub(super) fn inherited(
    text: &str,
    prefix: &str,
    known_by: &str,
    at: At<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) -> Selector {
    let selector = any_expression(text, at, field, report);
    warn_of_global(&selector, "no pod", at, field, report);
    with_prefix(selector, prefix, known_by)
}

/// A rule's namespace selector: `all()` is whatever is in a namespace, `global()` what is in none.
pub(super) fn namespaces(text: &str, prefix: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) -> Selector {
    with_prefix(any_expression(text, at, field, report), prefix, NAMESPACE_LABEL)
}

fn with_prefix(selector: Selector, prefix: &str, known_by: &str) -> Selector {
    let label = |label: String| format!("{prefix}{label}");
    let all = |parts: Vec<Selector>| parts.into_iter().map(|part| with_prefix(part, prefix, known_by)).collect();
    match selector {
        Selector::All => Selector::Has(known_by.to_owned()),
        Selector::Global => Selector::lacks(known_by),
        Selector::Equals(key, value) => Selector::Equals(label(key), value),
        Selector::NotEquals(key, value) => Selector::NotEquals(label(key), value),
        Selector::In(key, values) => Selector::In(label(key), values),
        Selector::NotIn(key, values) => Selector::NotIn(label(key), values),
        Selector::Has(key) => Selector::Has(label(key)),
        Selector::Contains(key, text) => Selector::Contains(label(key), text),
        Selector::StartsWith(key, text) => Selector::StartsWith(label(key), text),
        Selector::EndsWith(key, text) => Selector::EndsWith(label(key), text),
        Selector::And(parts) => Selector::And(all(parts)),
        Selector::Or(parts) => Selector::Or(all(parts)),
        Selector::Not(part) => Selector::Not(Box::new(with_prefix(*part, prefix, known_by))),
    }
}

/// A Kubernetes label selector; `prefix` stands before the keys of inherited labels. What is at fault selects nothing.
pub(super) fn label_selector(
    selector: &LabelSelector,
    prefix: &str,
    at: At<'_>,
    field: &str,
    report: &mut Reporter<'_>,
) -> Selector {
    let mut parts = Vec::new();
    for (key, value) in selector.match_labels.iter().flatten() {
        let at = at.key("matchLabels").key(key);
        check_label_value(value, at, &format!("{field}.matchLabels.{key}"), report);
        parts.push(Selector::Equals(format!("{prefix}{key}"), value.clone()));
    }
    for (index, expression) in selector.match_expressions.iter().flatten().enumerate() {
        let at = at.key("matchExpressions").item(index);
        let field = format!("{field}.matchExpressions[{index}]");
        let key = format!("{prefix}{}", expression.key);
        if expression.key.is_empty() {
            report.error(at.key("key"), format_args!("{field}.key is missing"), None);
        }
        let values = expression.values.as_deref().unwrap_or_default();
        for (index, value) in values.iter().enumerate() {
            check_label_value(value, at.key("values").item(index), &format!("{field}.values[{index}]"), report);
        }
        let operator = expression.operator.as_str();
        match operator {
            "In" | "NotIn" if values.is_empty() => {
                let help = "write the values, or use Exists or DoesNotExist".to_owned();
                report.error(at.key("values"), format_args!("{field}: {operator} needs values"), help);
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let help = "take the values out, or use In or NotIn".to_owned();
                report.error(at.key("values"), format_args!("{field}: {operator} has no values"), help);
            }
            "In" => parts.push(Selector::In(key, values.iter().cloned().collect())),
            "NotIn" => parts.push(Selector::NotIn(key, values.iter().cloned().collect())),
            "Exists" => parts.push(Selector::Has(key)),
            "DoesNotExist" => parts.push(Selector::lacks(key)),
            other => {
                let known = ["In", "NotIn", "Exists", "DoesNotExist"];
                let help = match nearest(other, known) {
                    Some(name) => format!("did you mean {name}?"),
                    None => format!("it is one of {}", known.join(", ")),
                };
                report.error(at.key("operator"), format_args!("{field}.operator: {other:?} is not known"), help);
            }
        }
    }
    Selector::all_of(parts)
}

/// Kubernetes: at most 63 characters, letters and digits at both ends.
fn check_label_value(value: &str, at: At<'_>, field: &str, report: &mut Reporter<'_>) {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let end = |byte: Option<u8>| byte.is_none_or(|byte| byte.is_ascii_alphanumeric());
    let bytes = value.as_bytes();
    if value.len() > 63 || !value.bytes().all(inner) || !end(bytes.first().copied()) || !end(bytes.last().copied()) {
        let help =
            "a label's value has up to 63 letters, digits, '-', '_' and '.', and begins and ends with a letter or \
                    digit"
                .to_owned();
        report.error(at, format_args!("{field}: {value:?} cannot be a label's value"), help);
    }
}
