//! Tests of values (`x is iterable`) as jinja2 defines them for Python's values.
#![forbid(unsafe_code)]

use minijinja::Environment;
use minijinja::value::{Value, ValueKind};

/// Replaces the tests that the engine defines in another way.
pub(super) fn install(env: &mut Environment<'_>) {
    env.add_test("iterable", |value: &Value| is_iterable(value.kind()));
    env.add_test("sequence", |value: &Value| {
        // Everything with a length and an index, as `len` and `__getitem__` show in Python.
        is_iterable(value.kind()) && value.kind() != ValueKind::Iterable
    });
    env.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

/// Returns whether values of this kind have an iterator in Python: text, lists, maps, and what is
/// undefined, but not none.
fn is_iterable(kind: ValueKind) -> bool {
    matches!(
        kind,
        ValueKind::String
            | ValueKind::Bytes
            | ValueKind::Seq
            | ValueKind::Map
            | ValueKind::Iterable
            | ValueKind::Undefined
    )
}
