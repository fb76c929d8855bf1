//! Catalogue of a version 1 file: the descriptions of its tensors.
#![forbid(unsafe_code)]

use super::lists::NumberList;
use super::numbers::Numbers;
use super::objects::{Id, Object, Objects};
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Name of the version 1 arithmetic: `scale * prime * value`, entry by entry.
const METHOD: &str = "prime_sparse_v1";

/// Informative keys of the whole, of a file in it and of a tensor.
const TOP_KEYS: [&str; 5] = [
    "model_type",
    "source",
    "compression_method",
    "target_compression",
    "files",
];
const FILE_KEYS: [&str; 2] = ["filename", "tensors"];
const TENSOR_KEYS: [&str; 9] = [
    "name",
    "shape",
    "dtype",
    "original_bytes",
    "compressed_bytes",
    "compression_method",
    "sparsity_level",
    "quantization",
    "manifold_encoded",
];

/// Parts of compressed sparse rows, each with its possible names.
const VALUES: &[&str] = &["values", "data"];
const INDICES: &[&str] = &["indices", "col_indices"];
const POINTERS: &[&str] = &["indptr", "row_pointers"];
const PRIMES: &[&str] = &["prime_indices"];
const SCALES: &[&str] = &["scale", "scales"];

/// Catalogue of a version 1 file.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Catalogue {
    /// Kind of model, for example `phi-4-upg`.
    pub model_type: Option<String>,
    /// Name of the source model.
    pub source: Option<String>,
    /// Compression method: `prime_sparse_v1`.
    pub compression_method: Option<String>,
    /// Target compression of the writer, any value that is not a container.
    pub target_compression: Value,
    /// Every tensor, in file order.
    pub tensors: Vec<CatalogueEntry>,
}

/// Tensor of a [`Catalogue`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CatalogueEntry {
    /// File of the source model that it comes from.
    pub file: Option<Arc<str>>,
    /// Hugging Face name.
    pub name: String,
    /// Shape: `[rows, cols]` of a matrix, `[n]` of a vector.
    pub shape: Vec<u64>,
    /// Other properties (`dtype`, `original_bytes` and so on),
    /// which the weights do not depend on.
    pub notes: BTreeMap<&'static str, Value>,
    pub(super) parts: Option<Parts>,
}

impl CatalogueEntry {
    /// Returns whether the file has its weights.
    pub fn has_weights(&self) -> bool {
        self.parts.is_some()
    }
}

/// Weights of a tensor: compressed sparse rows.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    pub values: Numbers,
    pub indices: Numbers,
    pub pointers: Numbers,
    pub primes: Numbers,
    pub scale: Scale,
}

/// Scale of the rows.
#[derive(Debug, Clone)]
pub(super) enum Scale {
    /// One scale for all rows.
    One(f64),
    /// One number, or one for each row.
    Many(Numbers),
}

impl Catalogue {
    /// Reads the catalogue from the objects of the pickle.
    ///
    /// Errors: `Invalid`, `Missing`, `Shape` or `Unsupported` for any deviation from the schema,
    /// with what was found.
    pub(super) fn read(objects: &Objects, top: Id) -> Result<Self> {
        let reader = Reader {
            objects,
            lists: RefCell::default(),
        };
        let top = reader.dict(top, "the file", &TOP_KEYS, &[])?;
        let files = top.get("files").ok_or_else(|| {
            let message = format!(
                "no 'files' in the file, which has [{}]",
                top.keys().copied().collect::<Vec<_>>().join(", ")
            );
            Error::new(ErrorKind::Missing, message)
                .hint("it is a pickle, but not of a version 1 model")
        })?;
        let method = reader.optional_text(&top, "compression_method")?;
        let (mut tensors, mut names) = (Vec::new(), HashSet::new());
        for &file in reader.list(*files, "'files'")? {
            let file = reader.dict(file, "an entry of 'files'", &FILE_KEYS, &[])?;
            let filename = reader.optional_text(&file, "filename")?.map(Arc::from);
            let listed = file.get("tensors").ok_or_else(|| {
                Error::new(ErrorKind::Missing, "no 'tensors' in an entry of 'files'")
            })?;
            for &tensor in reader.list(*listed, "'tensors'")? {
                let tensor = reader.tensor(tensor, filename.clone(), method.as_deref())?;
                // A list can hold the same tensor a million times at no cost.
                if !names.insert(tensor.name.clone()) {
                    let message = "listed twice";
                    return Err(Error::new(ErrorKind::Invalid, message).tensor(tensor.name));
                }
                if names.len() > rules::MOST_LAYERS {
                    let message = format!("more than {} tensors", rules::MOST_LAYERS);
                    return Err(Error::new(ErrorKind::TooLarge, message));
                }
                tensors.push(tensor);
            }
        }
        Ok(Self {
            model_type: reader.optional_text(&top, "model_type")?,
            source: reader.optional_text(&top, "source")?,
            target_compression: reader.note(&top, "target_compression")?,
            compression_method: method,
            tensors,
        })
    }

    /// Returns whether the file lists tensors, but has no weights.
    pub fn is_list_only(&self) -> bool {
        self.tensors.iter().all(|t| t.parts.is_none())
    }
}

type Dict<'a> = BTreeMap<&'a str, Id>;

/// Maximum bytes of a text that is only displayed.
const LONGEST_NOTE: usize = 256;

struct Reader<'a> {
    objects: &'a Objects,
    /// Number lists that were read: tensors can share them at no cost.
    lists: RefCell<HashMap<Id, Arc<NumberList>>>,
}

impl<'a> Reader<'a> {
    /// Reads a dict whose keys must all be known. A key with the value None counts as missing.
    fn dict(&self, id: Id, what: &str, known: &[&str], parts: &[&[&str]]) -> Result<Dict<'a>> {
        let Object::Dict(items) = self.objects.get(id) else {
            let message = format!("{what} is {}, expected a dict", self.objects.describe(id));
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let is_known = |key: &str| known.contains(&key) || parts.iter().any(|p| p.contains(&key));
        let unknown = items.iter().filter(|(key, _)| !is_known(key));
        if let Some((key, value)) = unknown.min_by_key(|(key, _)| key) {
            let shown: String = key.chars().take(80).collect();
            let parts: Vec<String> = parts.iter().map(|names| names.join("/")).collect();
            let expected = [known.join(", "), parts.join(", ")];
            let expected: Vec<_> = expected.iter().filter(|e| !e.is_empty()).cloned().collect();
            let message = format!(
                "{what} has '{shown}' ({}), which version 1 does not have; it has {}",
                self.objects.describe(*value),
                expected.join(", ")
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let is_there =
            |(_, value): &&(Arc<str>, Id)| !matches!(self.objects.get(*value), Object::None);
        let items = items.iter().filter(is_there);
        Ok(items.map(|(key, value)| (&**key, *value)).collect())
    }

    fn list(&self, id: Id, what: &str) -> Result<&'a [Id]> {
        self.objects.items(id).ok_or_else(|| {
            let message = format!("{what} is {}, expected a list", self.objects.describe(id));
            Error::new(ErrorKind::Unsupported, message)
        })
    }

    fn optional_text(&self, dict: &Dict<'_>, key: &str) -> Result<Option<String>> {
        let Some(&id) = dict.get(key) else {
            return Ok(None);
        };
        match self.objects.text(id) {
            Some(text) => Ok(Some(text.to_string())),
            None => {
                let message = format!("'{key}' is {}, expected a text", self.objects.describe(id));
                Err(Error::new(ErrorKind::Unsupported, message))
            }
        }
    }

    /// Returns a number, a text or a boolean; null if the key is missing.
    fn note(&self, dict: &Dict<'_>, key: &str) -> Result<Value> {
        let Some(&id) = dict.get(key) else {
            return Ok(Value::Null);
        };
        Ok(match self.objects.get(id) {
            Object::Bool(value) => (*value).into(),
            Object::Int(n) => (*n).into(),
            Object::Float(n) => (*n).into(),
            Object::Text { text, .. } if text.len() <= LONGEST_NOTE => (&**text).into(),
            Object::Dtype(dtype) => dtype.to_string().into(),
            _ => {
                let found = self.objects.describe(id);
                let message =
                    format!("'{key}' is {found}, expected a number, a short text or a truth value");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        })
    }

    fn tensor(
        &self,
        id: Id,
        file: Option<Arc<str>>,
        method: Option<&str>,
    ) -> Result<CatalogueEntry> {
        let all_parts = [VALUES, INDICES, POINTERS, PRIMES, SCALES];
        // The name is not known yet.
        let unnamed = self.dict(id, "a tensor", &TENSOR_KEYS, &all_parts);
        let tensor = unnamed.map_err(|e| match self.name_of(id) {
            Some(name) => e.tensor(name),
            None => e,
        })?;
        let name = self.optional_text(&tensor, "name")?.ok_or_else(|| {
            let found = self.objects.describe(id);
            Error::new(
                ErrorKind::Missing,
                format!("a tensor without a name: {found}"),
            )
        })?;
        self.named(&tensor, &name, file, method)
            .map_err(|e| e.tensor(name))
    }

    fn name_of(&self, id: Id) -> Option<&str> {
        match self.objects.get(id) {
            Object::Dict(items) => {
                let (_, name) = items.iter().find(|(key, _)| **key == *"name")?;
                self.objects.text(*name).map(|name| &**name)
            }
            _ => None,
        }
    }

    fn named(
        &self,
        tensor: &Dict<'_>,
        name: &str,
        file: Option<Arc<str>>,
        method: Option<&str>,
    ) -> Result<CatalogueEntry> {
        let shape = tensor
            .get("shape")
            .ok_or_else(|| Error::new(ErrorKind::Missing, "a tensor without a shape"))?;
        let shape = self.objects.sizes(*shape).ok_or_else(|| {
            let message = format!(
                "'shape' is {}, expected a tuple of sizes",
                self.objects.describe(*shape)
            );
            Error::new(ErrorKind::Unsupported, message)
        })?;
        let mut notes = BTreeMap::new();
        for key in TENSOR_KEYS.iter().skip(2) {
            match self.note(tensor, key)? {
                Value::Null => {}
                note => {
                    notes.insert(*key, note);
                }
            }
        }
        let parts = self.parts(tensor)?;
        let own_method = notes.get("compression_method").and_then(Value::as_str);
        if let (true, Some(other)) = (
            parts.is_some(),
            own_method.or(method).filter(|method| *method != METHOD),
        ) {
            let message = format!("compressed by the method '{other}', expected '{METHOD}'");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(CatalogueEntry {
            file,
            name: name.to_owned(),
            shape,
            notes,
            parts,
        })
    }

    fn parts(&self, tensor: &Dict<'_>) -> Result<Option<Parts>> {
        let all = [VALUES, INDICES, POINTERS, PRIMES, SCALES];
        let mut found = [None; 5];
        for (found, names) in found.iter_mut().zip(all) {
            let mut there = names
                .iter()
                .filter_map(|name| Some((*name, *tensor.get(name)?)));
            *found = there.next();
            if let (Some((first, _)), Some((second, _))) = (*found, there.next()) {
                let message = format!("both '{first}' and '{second}'");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        if found.iter().all(Option::is_none) {
            return Ok(None);
        }
        let missing = |names: &[&str]| {
            let there = found.iter().flatten().map(|(name, _)| *name);
            let there: Vec<_> = there.collect();
            let message = format!("no '{}', but [{}]", names.join("' or '"), there.join(", "));
            Error::new(ErrorKind::Missing, message)
        };
        let array = |part: usize| {
            let (name, id) = found[part].ok_or_else(|| missing(all[part]))?;
            self.integers(name, id)
        };
        let primes = array(3)?;
        let (scale_name, scale) = found[4].ok_or_else(|| missing(all[4]))?;
        let scale = match self.objects.get(scale) {
            Object::Int(n) => Scale::One(*n as f64),
            Object::Float(n) => Scale::One(*n),
            _ => Scale::Many(self.numbers(scale_name, scale, "a number or an array")?),
        };
        // A csr_matrix in place of the values also has the columns and pointers.
        let csr = found[0].and_then(|(_, id)| match self.objects.get(id) {
            Object::Csr(csr) => Some(csr),
            _ => None,
        });
        let Some(csr) = csr else {
            return Ok(Some(Parts {
                values: array(0)?,
                indices: array(1)?,
                pointers: array(2)?,
                primes,
                scale,
            }));
        };
        if let Some((name, _)) = found[1].or(found[2]) {
            let message = format!("a csr_matrix, and '{name}' beside it");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if Some(csr.shape.clone()) != tensor.get("shape").and_then(|&id| self.objects.sizes(id)) {
            let message = format!("a csr_matrix {:?}, which is not its shape", csr.shape);
            return Err(Error::new(ErrorKind::Shape, message));
        }
        Ok(Some(Parts {
            values: self.integers("data", csr.data)?,
            indices: self.integers("indices", csr.indices)?,
            pointers: self.integers("indptr", csr.indptr)?,
            primes,
            scale,
        }))
    }

    /// Reads a one-dimensional array or list of integers.
    fn integers(&self, name: &str, id: Id) -> Result<Numbers> {
        let numbers = self.numbers(name, id, "an array")?;
        numbers.check_integers(name)?;
        Ok(numbers)
    }

    /// Reads an array, or a list or tuple in place of one.
    fn numbers(&self, name: &str, id: Id, expected: &str) -> Result<Numbers> {
        match self.objects.get(id) {
            Object::Array(array) => return Ok(Numbers::Array(array.as_ref().clone())),
            Object::List(_) | Object::Tuple(_) => {}
            _ => {
                let found = self.objects.describe(id);
                let message = format!("'{name}' is {found}, expected {expected}");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        }
        if let Some(list) = self.lists.borrow().get(&id) {
            return Ok(Numbers::List(Arc::clone(list)));
        }
        let list = Arc::new(NumberList::new(self.objects, id, name)?);
        self.lists.borrow_mut().insert(id, Arc::clone(&list));
        Ok(Numbers::List(list))
    }
}
