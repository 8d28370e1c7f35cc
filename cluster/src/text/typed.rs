//! Rust types read out of a tree, by serde, with every fault reported at its place.
//!
//! serde stops at the first error of a value. To report all, a faulty node is marked as dropped and the value is read
//! again without it, until it reads or its root is at fault. A "missing field" that only follows from a drop is not
//! reported. Fields that a type does not know are collected with the nearest name that it does know.

use std::{cell::RefCell, fmt};

use serde::{
    de::{
        DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess, VariantAccess,
        Visitor, value::StrDeserializer,
    },
    forward_to_deserialize_any,
};

use super::{
    problem::{Problems, Severity, nearest},
    source::Span,
    tree::{Node, Value},
};

/// Faults reported for one object before reading it is given up; each costs one more reading.
const MAX_FAULTS: usize = 64;

/// Reads a `T` out of `root`. Faults are errors of `problems`, with `subject` ("Service default/web: ", may be empty)
/// before their message; a field that `T` does not know is a problem of the severity that `unknown` gives its path. `None` where the root
/// itself is at fault; a value whose inner parts were at fault lacks those (see [`Node::has_dropped`]).
pub fn read<'t, T: serde::Deserialize<'t>>(
    root: &'t Node,
    subject: &str,
    unknown: impl Fn(&str) -> Severity,
    problems: &mut Problems,
) -> Option<T> {
    read_part(root, subject, |_| &[], |path, _| Some(unknown(path)), problems)
}

/// As [`read`], for types that have a part of what they stand for. `besides` gives the other fields by the name of such a type: those are
/// known, and passed over. `unknown` gets a field's path and the known one that it is nearest to; `None`: nothing is said of it.
pub fn read_part<'t, T: serde::Deserialize<'t>>(
    root: &'t Node,
    subject: &str,
    besides: fn(&str) -> &'static [&'static str],
    unknown: impl Fn(&str, Option<&str>) -> Option<Severity>,
    problems: &mut Problems,
) -> Option<T> {
    for _ in 0..MAX_FAULTS {
        let reading = Reading { unknown: RefCell::default(), besides };
        let outcome = T::deserialize(NodeReader { node: root, reading: &reading, trail: &Trail::Root });
        match outcome {
            Ok(value) => {
                for field in reading.unknown.into_inner() {
                    let Some(severity) = unknown(&field.path, field.nearest) else { continue };
                    let message = format!("{subject}unknown field {}", field.path);
                    let help = match field.nearest {
                        Some(known) => Some(format!("did you mean {known}?")),
                        None => Some(format!("known here: {}", field.known.join(", "))),
                    };
                    problems.push(super::Diagnostic { severity, span: field.span, message, help, topic: None });
                }
                return Some(value);
            }
            Err(fault) => {
                let span = fault.span.unwrap_or(root.span);
                if !fault.follows_from_drop {
                    let path = fault.path.as_deref().filter(|path| !path.is_empty());
                    let path = path.map_or(String::new(), |path| format!("{path}: "));
                    problems.error(span, format!("{subject}{path}{}", fault.message), fault.help);
                }
                if root.is_dropped() || fault.span.is_none() {
                    return None;
                }
            }
        }
    }
    None
}

/// A field that the type read does not have.
struct UnknownField {
    span: Span,
    path: String,
    nearest: Option<&'static str>,
    known: Vec<&'static str>,
}

struct Reading {
    unknown: RefCell<Vec<UnknownField>>,
    besides: fn(&str) -> &'static [&'static str],
}

/// The fields of a type.
#[derive(Clone, Copy)]
struct Fields {
    /// Those that are read.
    own: &'static [&'static str],
    /// Those that are known besides.
    besides: &'static [&'static str],
}

impl Fields {
    fn all(self) -> impl Iterator<Item = &'static str> {
        self.own.iter().chain(self.besides).copied()
    }
}

/// The way from the root to a node.
enum Trail<'p> {
    Root,
    Key(&'p Trail<'p>, &'p str),
    Index(&'p Trail<'p>, usize),
}

impl fmt::Display for Trail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Key(Self::Root, key) => f.write_str(key),
            Self::Key(parent, key) => write!(f, "{parent}.{key}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// A fault, with its place once a reader of a node has seen it.
#[derive(Debug)]
struct Fault {
    message: String,
    help: Option<String>,
    span: Option<Span>,
    path: Option<String>,
    missing_field: bool,
    follows_from_drop: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl serde::de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        let text = message.to_string();
        // Types of this project pass advice after a line break.
        let (message, help) = match text.split_once('\n') {
            Some((message, help)) => (message.to_owned(), Some(help.to_owned())),
            None => (text, None),
        };
        Self { message, help, span: None, path: None, missing_field: false, follows_from_drop: false }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { missing_field: true, ..Self::custom(format!("{field} is missing")) }
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::custom(format!("{field} is given twice, under different spellings"))
    }
}

#[derive(Clone, Copy)]
struct NodeReader<'t, 'p> {
    node: &'t Node,
    reading: &'p Reading,
    trail: &'p Trail<'p>,
}

impl<'t> NodeReader<'t, '_> {
    fn expected(&self, what: &str) -> Fault {
        Fault::custom(format!("expected {what}, found {}", self.node.describe()))
    }

    fn advised(&self, what: &str, help: String) -> Fault {
        Fault { help: Some(help), ..self.expected(what) }
    }

    /// Gives a fault its place, the first time that a reader sees it.
    fn place<T>(&self, outcome: Result<T, Fault>) -> Result<T, Fault> {
        outcome.map_err(|mut fault| {
            if fault.span.is_none() {
                fault.span = Some(self.node.span);
                fault.path = Some(self.trail.to_string());
                fault.follows_from_drop = fault.missing_field && self.node.has_dropped();
                self.node.drop_from_reading();
            }
            fault
        })
    }

    fn integer(&self, low: i128, high: i128) -> Result<i128, Fault> {
        match &self.node.value {
            Value::Integer(value) if (low..=high).contains(value) => Ok(*value),
            Value::Integer(value) => {
                Err(Fault::custom(format!("{value} is out of range: expected a number from {low} to {high}")))
            }
            Value::String(text) if text.parse::<i128>().is_ok() => {
                Err(self.advised("a number", format!("remove the quotes: {text}")))
            }
            _ => Err(self.expected("a number")),
        }
    }

    fn string(&self) -> Result<&'t str, Fault> {
        match &self.node.value {
            Value::String(text) => Ok(text),
            // A Go map of strings reads null as the empty string; so do Kubernetes's labels.
            Value::Null => Ok(""),
            Value::Bool(_) | Value::Integer(_) | Value::Float(_) => {
                Err(self.advised("a string", "put the value in quotes".to_owned()))
            }
            _ => Err(self.expected("a string")),
        }
    }

    fn map<V: Visitor<'t>>(self, fields: Option<Fields>, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Map(_) => visitor.visit_map(Entries { reader: self, fields, next: 0 }),
            Value::Null => Err(self.advised("an object", "write {} for an empty one".to_owned())),
            _ => Err(self.expected("an object")),
        }
    }
}

macro_rules! read_integers {
    ($($method:ident $visit:ident $type:ty;)+) => {
        $(fn $method<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
            let value = self.integer(<$type>::MIN as i128, <$type>::MAX as i128);
            self.place(value.and_then(|value| visitor.$visit(value as $type)))
        })+
    };
}

impl<'t> Deserializer<'t> for NodeReader<'t, '_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.place(match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Integer(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => visitor.visit_i64(value),
                (_, Ok(value)) => visitor.visit_u64(value),
                _ => visitor.visit_i128(*value),
            },
            Value::Float(value) => visitor.visit_f64(*value),
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::List(_) => visitor.visit_seq(Items { reader: self, next: 0, index: 0 }),
            Value::Map(_) => self.map(None, visitor),
        })
    }

    fn deserialize_bool<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.place(match &self.node.value {
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::String(text) if text == "true" || text == "false" => {
                Err(self.advised("true or false", format!("remove the quotes: {text}")))
            }
            _ => Err(self.expected("true or false")),
        })
    }

    read_integers! {
        deserialize_i8 visit_i8 i8;
        deserialize_i16 visit_i16 i16;
        deserialize_i32 visit_i32 i32;
        deserialize_i64 visit_i64 i64;
        deserialize_u8 visit_u8 u8;
        deserialize_u16 visit_u16 u16;
        deserialize_u32 visit_u32 u32;
        deserialize_u64 visit_u64 u64;
    }

    fn deserialize_f32<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.place(match &self.node.value {
            Value::Integer(value) => visitor.visit_f64(*value as f64),
            Value::Float(value) => visitor.visit_f64(*value),
            _ => Err(self.expected("a number")),
        })
    }

    fn deserialize_str<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.place(self.string().and_then(|text| visitor.visit_borrowed_str(text)))
    }

    fn deserialize_string<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Null => self.place(visitor.visit_none()),
            _ => self.place(visitor.visit_some(self)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'t>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        self.place(visitor.visit_newtype_struct(self))
    }

    fn deserialize_seq<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.place(match &self.node.value {
            Value::List(_) => visitor.visit_seq(Items { reader: self, next: 0, index: 0 }),
            Value::Null => Err(self.advised("a list", "write [] for an empty one".to_owned())),
            _ => Err(self.expected("a list")),
        })
    }

    fn deserialize_map<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.place(self.map(None, visitor))
    }

    fn deserialize_struct<V: Visitor<'t>>(
        self,
        name: &'static str,
        own: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let fields = Fields { own, besides: (self.reading.besides)(name) };
        self.place(self.map(Some(fields), visitor))
    }

    fn deserialize_enum<V: Visitor<'t>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let known = variants.join(", ");
        self.place(match &self.node.value {
            Value::String(text) if variants.contains(&text.as_str()) => visitor.visit_enum(Variant(text)),
            // To YAML an off without quotes is false.
            Value::Bool(false) if variants.contains(&"off") => visitor.visit_enum(Variant("off")),
            Value::String(text) => {
                let help = nearest(text, variants.iter().copied()).map(|name| format!("did you mean {name}?"));
                Err(Fault { help, ..Fault::custom(format!("{text:?} is none of: {known}")) })
            }
            _ => Err(self.expected(&format!("one of: {known}"))),
        })
    }

    fn deserialize_identifier<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'t>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! { <V: Visitor<'t>> i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct }
}

/// An object's entries. Where they are a struct's fields, unknown ones are collected, and null is as good as absent,
/// which is how the API server reads them.
struct Entries<'t, 'p> {
    reader: NodeReader<'t, 'p>,
    fields: Option<Fields>,
    next: usize,
}

impl<'t> MapAccess<'t> for Entries<'t, '_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'t>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        while let Some((key, node)) = self.reader.node.entries().get(self.next) {
            self.next += 1;
            if node.is_dropped() {
                continue;
            }
            if let Some(fields) = self.fields {
                if !fields.own.contains(&key.text.as_str()) {
                    if !fields.besides.contains(&key.text.as_str()) {
                        let path = Trail::Key(self.reader.trail, &key.text).to_string();
                        let nearest = nearest(&key.text, fields.all());
                        let mut known: Vec<_> = fields.all().collect();
                        if !fields.besides.is_empty() {
                            known.sort_unstable();
                        }
                        let unknown = UnknownField { span: key.span, path, nearest, known };
                        self.reader.reading.unknown.borrow_mut().push(unknown);
                    }
                    continue;
                }
                if matches!(node.value, Value::Null) {
                    continue;
                }
            }
            let text: StrDeserializer<'t, Fault> = key.text.as_str().into_deserializer();
            return seed.deserialize(text).map(Some);
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'t>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let (key, node) = &self.reader.node.entries()[self.next - 1];
        let trail = Trail::Key(self.reader.trail, &key.text);
        let reader = NodeReader { node, reading: self.reader.reading, trail: &trail };
        let value = seed.deserialize(reader);
        reader.place(value)
    }
}

struct Items<'t, 'p> {
    reader: NodeReader<'t, 'p>,
    next: usize,
    index: usize,
}

impl<'t> SeqAccess<'t> for Items<'t, '_> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'t>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        let Value::List(items) = &self.reader.node.value else { return Ok(None) };
        while let Some(node) = items.get(self.next) {
            let trail = Trail::Index(self.reader.trail, self.next);
            self.next += 1;
            if node.is_dropped() {
                continue;
            }
            self.index += 1;
            let reader = NodeReader { node, reading: self.reader.reading, trail: &trail };
            let value = seed.deserialize(reader);
            return reader.place(value).map(Some);
        }
        Ok(None)
    }
}

/// A unit variant, by its name.
struct Variant<'t>(&'t str);

impl<'t> EnumAccess<'t> for Variant<'t> {
    type Error = Fault;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'t>>(self, seed: S) -> Result<(S::Value, Self), Fault> {
        let text: StrDeserializer<'t, Fault> = self.0.into_deserializer();
        Ok((seed.deserialize(text)?, self))
    }
}

impl<'t> VariantAccess<'t> for Variant<'t> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'t>>(self, _: S) -> Result<S::Value, Fault> {
        Err(Fault::custom("a name without a value cannot be read here"))
    }

    fn tuple_variant<V: Visitor<'t>>(self, _: usize, _: V) -> Result<V::Value, Fault> {
        Err(Fault::custom("a name without a value cannot be read here"))
    }

    fn struct_variant<V: Visitor<'t>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Fault> {
        Err(Fault::custom("a name without a value cannot be read here"))
    }
}
