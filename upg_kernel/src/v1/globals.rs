//! Globals that a version 1 file may name, and the meaning of a call of one.
//!
//! Nothing is imported or called.
#![forbid(unsafe_code)]

use super::bytes::Bytes;
use super::numpy::{Dtype, NdArray};
use super::objects::{Csr, Id, Object, Objects};
use crate::error::{Error, ErrorKind, Result};
use std::fmt;

/// Allowed global.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    /// Type of empty bytes, which protocol 2 creates by calling it.
    EmptyBytes,
    /// Function by which protocol 2 makes bytes of a text.
    Encode,
    NdArray,
    Dtype,
    Reconstruct,
    FromBuffer,
    Scalar,
    CsrMatrix,
}

/// Exact module and name of each allowed global.
///
/// The modules of numpy have moved with version 2, those of scipy with 1.8, and protocol 2 uses the
/// names of Python 2.
const ALLOWED: [(&str, &str, Global); 15] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("__builtin__", "bytes", Global::EmptyBytes),
    ("builtins", "bytes", Global::EmptyBytes),
    ("_codecs", "encode", Global::Encode),
    ("numpy", "ndarray", Global::NdArray),
    ("numpy", "dtype", Global::Dtype),
    ("numpy.core.multiarray", "_reconstruct", Global::Reconstruct),
    (
        "numpy._core.multiarray",
        "_reconstruct",
        Global::Reconstruct,
    ),
    ("numpy.core.numeric", "_frombuffer", Global::FromBuffer),
    ("numpy._core.numeric", "_frombuffer", Global::FromBuffer),
    ("numpy.core.multiarray", "scalar", Global::Scalar),
    ("numpy._core.multiarray", "scalar", Global::Scalar),
    ("scipy.sparse.csr", "csr_matrix", Global::CsrMatrix),
    ("scipy.sparse._csr", "csr_matrix", Global::CsrMatrix),
    ("scipy.sparse._csr", "csr_array", Global::CsrMatrix),
];

impl fmt::Display for Global {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = ALLOWED.iter().find(|(.., global)| global == self);
        listed.map_or(Ok(()), |(module, name, _)| write!(f, "{module}.{name}"))
    }
}

/// Returns the allowed global. Errors (`Unsupported`): it is not on the list.
pub(super) fn find(module: &str, name: &str) -> Result<Global> {
    let listed = ALLOWED.iter().find(|(m, n, _)| (*m, *n) == (module, name));
    listed.map(|(.., global)| *global).ok_or_else(|| {
        let shown: String = format!("{module}.{name}").chars().take(120).collect();
        let message = format!(
            "it asks for the global '{shown}', which no version 1 file has; nothing of it was run"
        );
        Error::new(ErrorKind::Unsupported, message)
            .hint("do not load this file with Python's pickle")
    })
}

/// Returns the object that a call of `global` with `arguments` stands for.
///
/// Errors (`Unsupported`): no version 1 file has such a call; those of [`NdArray::new`].
pub(super) fn call(
    objects: &Objects,
    global: Global,
    arguments: &[Id],
    is_new: bool,
) -> Result<Object> {
    let refused = || {
        let shown: Vec<_> = arguments
            .iter()
            .take(6)
            .map(|&id| objects.describe(id))
            .collect();
        let message = format!("a call of '{global}' with ({})", shown.join(", "));
        Error::new(ErrorKind::Unsupported, message)
    };
    if is_new != (global == Global::CsrMatrix) {
        return Err(refused());
    }
    let made = match (global, arguments) {
        (Global::CsrMatrix, []) => Some(Object::NewCsr),
        (Global::OrderedDict, []) => Some(Object::Dict(Vec::new())),
        (Global::EmptyBytes, []) => Some(Object::Bytes(EMPTY)),
        (Global::Encode, &[text, codec]) => encoded(objects, text, codec),
        (Global::Dtype, &[code, align, copy]) => dtype(objects, code, align, copy)?,
        (Global::Reconstruct, &[class, shape, code]) => {
            let is_plain = matches!(objects.get(class), Object::Global(Global::NdArray))
                && objects.sizes(shape).is_some()
                && matches!(objects.get(code), Object::Bytes(_));
            is_plain.then_some(Object::NewArray)
        }
        // Newer versions also name the order of the axes, if there is more than one.
        (Global::FromBuffer, &[bytes, dtype, shape, order])
        | (Global::FromBuffer, &[bytes, dtype, shape, order, _]) => {
            from_buffer(objects, bytes, dtype, shape, order)?
        }
        (Global::Scalar, &[dtype, bytes]) => scalar(objects, dtype, bytes)?,
        _ => None,
    };
    made.ok_or_else(refused)
}

const EMPTY: Bytes = Bytes {
    file: 0,
    start: 0,
    len: 0,
    latin1: false,
};

fn encoded(objects: &Objects, text: Id, codec: Id) -> Option<Object> {
    if objects.text(codec).map(|t| &**t) != Some("latin1") {
        return None;
    }
    let bytes = match objects.get(text) {
        Object::Text { place, .. } | Object::LongText(place) => place.clone(),
        _ => return None,
    };
    Some(Object::Bytes(Bytes {
        latin1: true,
        ..bytes
    }))
}

fn dtype(objects: &Objects, code: Id, align: Id, copy: Id) -> Result<Option<Object>> {
    let is_bool = |id| matches!(objects.get(id), Object::Bool(_) | Object::Int(0 | 1));
    let Some(code) = objects
        .text(code)
        .filter(|_| is_bool(align) && is_bool(copy))
    else {
        return Ok(None);
    };
    match Dtype::parse(code) {
        Some(dtype) => Ok(Some(Object::Dtype(dtype))),
        None => {
            let shown: String = code.chars().take(20).collect();
            let message =
                format!("an array of dtype '{shown}', expected integers or floats of 1 to 8 bytes");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

/// Handles `_frombuffer(bytes, dtype, shape, order)`: an array from protocol 5 on.
fn from_buffer(
    objects: &Objects,
    bytes: Id,
    dtype: Id,
    shape: Id,
    order: Id,
) -> Result<Option<Object>> {
    let fortran = match objects.text(order).map(|t| &**t) {
        Some("C" | "K" | "A") => false,
        Some("F") => true,
        _ => return Ok(None),
    };
    match (objects.get(bytes), objects.get(dtype), objects.sizes(shape)) {
        (Object::Bytes(bytes), Object::Dtype(dtype), Some(shape)) => {
            array(*dtype, shape, fortran, bytes).map(Some)
        }
        _ => Ok(None),
    }
}

/// Reads a numpy number, which is an array without dimensions.
fn scalar(objects: &Objects, dtype: Id, bytes: Id) -> Result<Option<Object>> {
    match (objects.get(dtype), objects.get(bytes)) {
        (Object::Dtype(dtype), Object::Bytes(bytes)) => {
            array(*dtype, Vec::new(), false, bytes).map(Some)
        }
        _ => Ok(None),
    }
}

fn array(dtype: Dtype, shape: Vec<u64>, fortran: bool, bytes: &Bytes) -> Result<Object> {
    let array = NdArray::new(dtype, shape, fortran, bytes.clone())?;
    Ok(Object::Array(Box::new(array)))
}

/// Handles BUILD: returns the object `target` with its `state`.
///
/// Errors (`Unsupported`): no version 1 file has such a state; those of [`NdArray::new`].
pub(super) fn build(objects: &Objects, target: Id, state: Id) -> Result<Object> {
    let built = match objects.get(target) {
        Object::Dtype(dtype) => built_dtype(objects, *dtype, state),
        Object::NewArray => built_array(objects, state)?,
        Object::NewCsr => built_csr(objects, state),
        _ => None,
    };
    built.ok_or_else(|| {
        let message = format!(
            "{} as the state of {}",
            objects.describe(state),
            objects.describe(target)
        );
        Error::new(ErrorKind::Unsupported, message)
    })
}

/// Handles `(3, byte order, None, None, None, -1, -1, 0)`:
/// no fields, no subarray, no metadata.
fn built_dtype(objects: &Objects, dtype: Dtype, state: Id) -> Option<Object> {
    let state = objects.tuple(state)?;
    let &[version, order, a, b, c, size, alignment, flags] = state else {
        return None;
    };
    let is = |id, n: i64| matches!(objects.get(id), Object::Int(found) if *found == n);
    let is_none = |id| matches!(objects.get(id), Object::None);
    let is_plain = is(version, 3)
        && [a, b, c].into_iter().all(is_none)
        && is(size, -1)
        && is(alignment, -1)
        && is(flags, 0);
    let order = objects.text(order).filter(|_| is_plain)?;
    dtype.ordered(order).map(Object::Dtype)
}

/// Handles `(1, shape, dtype, is_fortran, bytes)`.
fn built_array(objects: &Objects, state: Id) -> Result<Option<Object>> {
    let Some(&[version, shape, dtype, fortran, bytes]) = objects.tuple(state) else {
        return Ok(None);
    };
    let fortran = match (objects.get(version), objects.get(fortran)) {
        (Object::Int(1), Object::Bool(fortran)) => *fortran,
        _ => return Ok(None),
    };
    match (objects.get(bytes), objects.get(dtype), objects.sizes(shape)) {
        (Object::Bytes(bytes), Object::Dtype(dtype), Some(shape)) => {
            array(*dtype, shape, fortran, bytes).map(Some)
        }
        _ => Ok(None),
    }
}

/// Maximum keys of the state of a csr_matrix.
const MOST_OF_A_STATE: usize = 64;

/// Handles a dict with `_shape`, `data`, `indices` and `indptr`; its other keys are internal
/// to scipy.
fn built_csr(objects: &Objects, state: Id) -> Option<Object> {
    let Object::Dict(state) = objects.get(state) else {
        return None;
    };
    // scipy has about ten.
    if state.len() > MOST_OF_A_STATE {
        return None;
    }
    let item = |name: &str| Some(state.iter().find(|(key, _)| **key == *name)?.1);
    let part = |name: &str| {
        let id = item(name)?;
        matches!(objects.get(id), Object::Array(_)).then_some(id)
    };
    let shape = objects.sizes(item("_shape")?)?;
    Some(Object::Csr(Box::new(Csr {
        shape,
        data: part("data")?,
        indices: part("indices")?,
        indptr: part("indptr")?,
    })))
}
