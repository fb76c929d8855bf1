//! Keys and values of the positions that were computed, for the queries that come later.
#![forbid(unsafe_code)]

mod entries;

use super::config::ModelConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::attention::{BLOCK, Head};
use entries::{Kind, Stored};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CacheType {
    /// 4 bytes an element, as they were computed.
    F32,
    /// 2 bytes an element.
    #[default]
    F16,
    /// 1 byte an element, and 4 for each head and position.
    Int8,
}

/// The cache of a whole model. Grows on demand, up to a size that is known from the start.
///
/// Layers with a sliding window keep only what a query can still see.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<LayerCache>,
    /// Positions that every layer holds, counted from the first of the sequence.
    len: usize,
    context: usize,
    /// Most positions that are appended at once.
    chunk: usize,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(crate) struct LayerCache {
    heads: Vec<HeadCache>,
    window: Option<usize>,
    /// The position of the first entry that is kept.
    first: usize,
}

/// Keys and values of one key/value head, from the first position on that is kept.
#[derive(Debug)]
struct HeadCache {
    keys: Stored,
    values: Stored,
    /// Positions.
    len: usize,
    dim: usize,
}

impl KvCache {
    /// An empty cache for `context` positions that come at most `chunk` at a time.
    pub(crate) fn new(
        config: &ModelConfig,
        context: usize,
        chunk: usize,
        cache_type: CacheType,
    ) -> Self {
        let head = || HeadCache {
            keys: Stored::new(cache_type, Kind::Keys, config.head_dim),
            values: Stored::new(cache_type, Kind::Values, config.head_dim),
            len: 0,
            dim: config.head_dim,
        };
        let layer = |&window: &Option<usize>| LayerCache {
            heads: (0..config.num_kv_heads).map(|_| head()).collect(),
            window,
            first: 0,
        };
        Self {
            layers: config.windows.iter().map(layer).collect(),
            len: 0,
            context,
            chunk,
        }
    }

    /// Bytes that the cache of this model takes at most.
    ///
    /// Errors (`TooLarge`): more than fit into a number of this machine.
    pub(crate) fn max_bytes(
        config: &ModelConfig,
        context: usize,
        chunk: usize,
        cache_type: CacheType,
    ) -> Result<usize> {
        let positions = config.windows.iter().try_fold(0usize, |sum, &window| {
            sum.checked_add(entries(window, context, chunk)?)
        });
        let position = Stored::position_bytes(cache_type, config.head_dim)
            .and_then(|bytes| bytes.checked_mul(2 * config.num_kv_heads));
        positions
            .zip(position)
            .and_then(|(n, bytes)| n.checked_mul(bytes))
            .ok_or_else(|| too_large(context))
    }

    /// Number of positions held.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Makes room for `n` more positions in every layer, so that appending them cannot fail.
    ///
    /// Errors (`TooLarge`): beyond the context, or out of memory.
    pub(crate) fn reserve(&mut self, n: usize) -> Result<()> {
        let len = self.len;
        if len.checked_add(n).is_none_or(|end| end > self.context) {
            return Err(too_large(self.context));
        }
        for layer in &mut self.layers {
            let too_large = || too_large(self.context);
            let most = entries(layer.window, self.context, self.chunk).ok_or_else(too_large)?;
            layer.drop_unseen(len, n, most);
            let needed = len - layer.first + n;
            for head in &mut layer.heads {
                for stored in [&mut head.keys, &mut head.values] {
                    stored.reserve(needed, most).ok_or_else(too_large)?;
                }
            }
        }
        Ok(())
    }

    /// Appends a key and a value for each row of `rows`: the keys of all heads and then their values
    /// are its last elements. They count only after [`KvCache::commit`].
    pub(crate) fn append(&mut self, layer: usize, rows: &[f32], width: usize) {
        let layer = &mut self.layers[layer];
        let head_dim = layer.heads.first().map_or(1, |head| head.dim);
        let kv = layer.heads.len() * head_dim;
        for row in rows.chunks_exact(width) {
            let (keys, values) = row[width - 2 * kv..].split_at(kv);
            let heads = keys
                .chunks_exact(head_dim)
                .zip(values.chunks_exact(head_dim));
            for (head, (key, value)) in layer.heads.iter_mut().zip(heads) {
                head.keys.set(head.len, key);
                head.values.set(head.len, value);
                head.len += 1;
            }
        }
    }

    /// What a layer remembers, appended positions included.
    pub(crate) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    /// Counts `n` positions that were appended to every layer.
    pub(crate) fn commit(&mut self, n: usize) {
        self.len += n;
    }

    /// Keeps the first `len` positions, or nothing if a window has dropped what the next query
    /// would have to see. Also takes back what was appended but not committed.
    pub(crate) fn truncate(&mut self, len: usize) {
        let len = len.min(self.len);
        let lost = |layer: &LayerCache| layer.first > first_seen(layer.window, len);
        let len = match self.layers.iter().any(lost) {
            true => 0,
            false => len,
        };
        for layer in &mut self.layers {
            if len == 0 {
                layer.first = 0;
            }
            for head in &mut layer.heads {
                // What lies beyond is not looked at before it is written again.
                head.len = len - layer.first;
            }
        }
        self.len = len;
    }
}

impl LayerCache {
    /// Drops what no query from position `len` on sees, as far as it is whole blocks, if `n` more would not
    /// fit into `most`.
    fn drop_unseen(&mut self, len: usize, n: usize, most: usize) {
        let first = first_seen(self.window, len);
        if len - self.first + n <= most || first <= self.first {
            return;
        }
        let blocks = (first - self.first) / BLOCK;
        for head in &mut self.heads {
            head.keys.drop_blocks(blocks);
            head.values.drop_blocks(blocks);
            head.len -= blocks * BLOCK;
        }
        self.first += blocks * BLOCK;
    }

    /// What key/value head `index` remembers.
    pub(crate) fn head(&self, index: usize) -> Head<'_> {
        let head = &self.heads[index];
        Head {
            keys: head.keys.entries(),
            values: head.values.entries(),
            head_dim: head.dim,
        }
    }

    /// The position of the first entry, a multiple of [`BLOCK`].
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Which entries the query at `position` sees.
    pub(crate) fn seen(&self, position: usize) -> std::ops::Range<usize> {
        first_seen(self.window, position) - self.first..position + 1 - self.first
    }
}

/// The first position that a query at `position` sees.
fn first_seen(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// How many positions a layer holds at most: whole blocks, and what lies in the block of the first one that
/// is seen. `None`: overflow.
fn entries(window: Option<usize>, context: usize, chunk: usize) -> Option<usize> {
    let all = context.checked_next_multiple_of(BLOCK)?;
    let Some(window) = window else {
        return Some(all);
    };
    let seen = (window - 1).checked_add(chunk)?.checked_add(BLOCK - 1)?;
    Some(all.min(seen.checked_next_multiple_of(BLOCK)?))
}

fn too_large(context: usize) -> Error {
    Error::new(
        ErrorKind::TooLarge,
        format!("no memory for a KV cache of up to {context} positions"),
    )
    .hint("ask for a smaller context")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::attention::Entries;

    /// 3 layers, the middle one with a window; 2 key/value heads of 2.
    fn config(window: usize) -> ModelConfig {
        let json = r#"{"model_type": "llama", "vocab_size": 9, "hidden_size": 8,
            "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64}"#;
        let mut config = ModelConfig::from_json(json, None).unwrap();
        config.windows[1] = Some(window);
        config
    }

    /// Appends `n` positions whose keys say position and head.
    fn append(cache: &mut KvCache, n: usize) {
        cache.reserve(n).unwrap();
        // A query element in front, which is not looked at.
        let row =
            |p| [-1.0, 0.0, 0.0, 0.5, 0.5, 100.0, 100.0, 100.5, 100.5].map(|x: f32| x + p as f32);
        let rows: Vec<f32> = (cache.len..cache.len + n).flat_map(row).collect();
        for layer in 0..3 {
            cache.append(layer, &rows, 9);
        }
        cache.commit(n);
    }

    /// Elements of the keys or values of head 1 at some entries.
    fn stored(layer: &LayerCache, is_key: bool, range: std::ops::Range<usize>) -> Vec<[f32; 2]> {
        let head = layer.head(1);
        let stored = if is_key { head.keys } else { head.values };
        let Entries::F32(stored) = stored else {
            panic!("{stored:?}")
        };
        let element = |i: usize, d: usize| match is_key {
            true => stored[i / BLOCK * BLOCK * 2 + d * BLOCK + i % BLOCK],
            false => stored[i * 2 + d],
        };
        range.map(|i| [element(i, 0), element(i, 1)]).collect()
    }

    #[test]
    fn a_window_bounds_what_is_kept_and_hides_nothing_that_is_seen() {
        let (window, chunk) = (5, 3);
        let config = config(window);
        let mut cache = KvCache::new(&config, 64, chunk, CacheType::F32);
        for round in 0..27 {
            let n = [1, 3, 2, 3, 3, 1][round % 6];
            let first = cache.len();
            append(&mut cache, n);
            for position in first..first + n {
                for (layer, window) in [(0, 64), (1, window)] {
                    let layer = &cache.layers[layer];
                    let seen = layer.seen(position);
                    let positions = (position + 1).saturating_sub(window)..=position;
                    let expected = |offset: f32| -> Vec<_> {
                        let value = |p: usize| [p as f32 + offset; 2];
                        positions.clone().map(value).collect()
                    };
                    assert_eq!(stored(layer, true, seen.clone()), expected(0.5));
                    assert_eq!(stored(layer, false, seen), expected(100.5));
                }
            }
            // What is seen, what comes, and what lies in the same block as the first that is seen.
            assert!(cache.layers[1].heads[0].keys.capacity() <= 32);
        }
        assert!(cache.layers[0].heads[0].values.capacity() <= 64);
        // (64 + 32 + 64) positions of 2 heads of 2, keys and values.
        let bytes = |t| KvCache::max_bytes(&config, 64, chunk, t).unwrap();
        assert_eq!(bytes(CacheType::F32), (64 + 32 + 64) * 2 * 2 * 2 * 4);
        assert_eq!(bytes(CacheType::F16), (64 + 32 + 64) * 2 * 2 * 2 * 2);
        assert_eq!(bytes(CacheType::Int8), (64 + 32 + 64) * 2 * 2 * (2 + 4));
    }

    #[test]
    fn cutting_back_behind_the_window_empties_the_cache() {
        let mut cache = KvCache::new(&config(5), 64, 3, CacheType::F32);
        (0..20).for_each(|_| append(&mut cache, 3));
        cache.truncate(60);
        assert_eq!(cache.len(), 60);
        let first = cache.layers[1].first;
        assert!(first >= BLOCK);
        // The query at `first + 4` still sees from `first` on.
        cache.truncate(first + 4);
        assert_eq!(cache.len(), first + 4);
        assert_eq!(cache.layers[1].heads[1].len, 4);
        cache.truncate(first + 3);
        assert_eq!((cache.len(), cache.layers[0].heads[0].len), (0, 0));
        append(&mut cache, 3);
        assert_eq!(cache.layers[1].seen(2), 0..3);
    }

    #[test]
    fn appended_but_not_committed_is_taken_back() {
        let mut cache = KvCache::new(&config(5), 64, 8, CacheType::F32);
        append(&mut cache, 8);
        cache.reserve(2).unwrap();
        cache.append(0, &[9.0; 16], 8);
        cache.truncate(8);
        assert_eq!(cache.layers[0].heads[0].len, 8);
        append(&mut cache, 1);
        assert_eq!(stored(&cache.layers[0], true, 8..9), [[8.5; 2]]);
        assert_eq!(cache.reserve(57).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}
