//! Keys and values of the positions that were computed, for the queries that come later.
#![forbid(unsafe_code)]

use super::config::ModelConfig;
use crate::error::{Error, ErrorKind, Result};

/// How a key or value is stored: the one place that says so.
pub(crate) type Stored = f32;

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
    head_dim: usize,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(crate) struct LayerCache {
    heads: Vec<HeadCache>,
    window: Option<usize>,
    /// The position of the first entry that is kept.
    first: usize,
}

/// Keys and values of one key/value head, `[positions from first on, head_dim]`.
#[derive(Debug, Default)]
pub(crate) struct HeadCache {
    pub(crate) keys: Vec<Stored>,
    pub(crate) values: Vec<Stored>,
}

impl KvCache {
    /// An empty cache for `context` positions that come at most `chunk` at a time.
    pub(crate) fn new(config: &ModelConfig, context: usize, chunk: usize) -> Self {
        let layer = |&window: &Option<usize>| LayerCache {
            heads: (0..config.num_kv_heads)
                .map(|_| HeadCache::default())
                .collect(),
            window,
            first: 0,
        };
        Self {
            layers: config.windows.iter().map(layer).collect(),
            len: 0,
            context,
            chunk,
            head_dim: config.head_dim,
        }
    }

    /// Bytes that the cache of this model takes at most.
    ///
    /// Errors (`TooLarge`): more than fit into a number of this machine.
    pub(crate) fn max_bytes(config: &ModelConfig, context: usize, chunk: usize) -> Result<usize> {
        let positions = config.windows.iter().try_fold(0usize, |sum, &window| {
            sum.checked_add(entries(window, context, chunk))
        });
        let position = config.kv_size().checked_mul(2 * size_of::<Stored>());
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
        let (len, head_dim) = (self.len, self.head_dim);
        if len.checked_add(n).is_none_or(|end| end > self.context) {
            return Err(too_large(self.context));
        }
        for layer in &mut self.layers {
            let most = entries(layer.window, self.context, self.chunk);
            layer.drop_unseen(len, n, most, head_dim);
            let needed = len - layer.first + n;
            for head in &mut layer.heads {
                head.reserve(needed, most, head_dim)
                    .ok_or_else(|| too_large(self.context))?;
            }
        }
        Ok(())
    }

    /// Appends a key and a value for each row of `rows`: the keys of all heads and then their values
    /// are its last elements. They count only after [`KvCache::commit`]. Returns the layer.
    pub(crate) fn append(&mut self, layer: usize, rows: &[f32], width: usize) -> &LayerCache {
        let head_dim = self.head_dim;
        let layer = &mut self.layers[layer];
        let kv = layer.heads.len() * head_dim;
        for row in rows.chunks_exact(width) {
            let (keys, values) = row[width - 2 * kv..].split_at(kv);
            let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
            for (head, (key, value)) in layer.heads.iter_mut().zip(heads) {
                head.keys.extend_from_slice(key);
                head.values.extend_from_slice(value);
            }
        }
        layer
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
            let kept = (len - layer.first) * self.head_dim;
            for head in &mut layer.heads {
                head.keys.truncate(kept);
                head.values.truncate(kept);
            }
        }
        self.len = len;
    }
}

impl LayerCache {
    /// Drops what no query from position `len` on sees, if `n` more would not fit into `most`.
    fn drop_unseen(&mut self, len: usize, n: usize, most: usize, head_dim: usize) {
        let first = first_seen(self.window, len);
        if len - self.first + n <= most || first <= self.first {
            return;
        }
        let dropped = (first - self.first) * head_dim;
        for head in &mut self.heads {
            head.keys.drain(..dropped);
            head.values.drain(..dropped);
        }
        self.first = first;
    }

    /// The key/value head of query head `head` of `num_heads`, which share them evenly.
    pub(crate) fn head(&self, head: usize, num_heads: usize) -> &HeadCache {
        &self.heads[head / (num_heads / self.heads.len())]
    }

    /// Which entries the query at `position` sees.
    pub(crate) fn seen(&self, position: usize) -> std::ops::Range<usize> {
        first_seen(self.window, position) - self.first..position + 1 - self.first
    }
}

impl HeadCache {
    /// Room for `needed` positions in all; doubles, but not beyond `most`. `None`: out of memory.
    fn reserve(&mut self, needed: usize, most: usize, head_dim: usize) -> Option<()> {
        for stored in [&mut self.keys, &mut self.values] {
            let wanted = needed.checked_mul(head_dim)?;
            if wanted > stored.capacity() {
                let doubled = stored.capacity().saturating_mul(2);
                let target = doubled.min(most.checked_mul(head_dim)?).max(wanted);
                stored.try_reserve_exact(target - stored.len()).ok()?;
            }
        }
        Some(())
    }
}

/// The first position that a query at `position` sees.
fn first_seen(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// How many positions a layer holds at most.
fn entries(window: Option<usize>, context: usize, chunk: usize) -> usize {
    window.map_or(context, |window| {
        context.min((window - 1).saturating_add(chunk))
    })
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
        let row = |p| {
            [-1.0, 0.0, 0.0, 0.5, 0.5, 100.0, 100.0, 100.5, 100.5].map(|x: f32| x + p as f32)
        };
        let rows: Vec<f32> = (cache.len..cache.len + n).flat_map(row).collect();
        for layer in 0..3 {
            cache.append(layer, &rows, 9);
        }
        cache.commit(n);
    }

    #[test]
    fn a_window_bounds_what_is_kept_and_hides_nothing_that_is_seen() {
        let (window, chunk) = (5, 3);
        let config = config(window);
        let mut cache = KvCache::new(&config, 64, chunk);
        for n in [1, 3, 2, 3, 3, 3, 3, 1, 1, 1, 3, 3] {
            let first = cache.len();
            append(&mut cache, n);
            for position in first..first + n {
                for (layer, window) in [(0, 64), (1, window)] {
                    let layer = &cache.layers[layer];
                    let seen = layer.seen(position);
                    let head = layer.head(3, 4);
                    let expected: Vec<f32> = ((position + 1).saturating_sub(window)..=position)
                        .flat_map(|p| [p as f32 + 0.5; 2])
                        .collect();
                    assert_eq!(head.keys[seen.start * 2..seen.end * 2], expected);
                    assert_eq!(head.values[seen.end * 2 - 1], 100.5 + position as f32);
                }
            }
            let kept = &cache.layers[1].heads[0];
            assert!(kept.keys.capacity() <= (window - 1 + chunk) * 2);
        }
        let full = &cache.layers[0].heads[0];
        assert!(full.keys.capacity() <= 64 * 2);
        // (64 + 7 + 64) positions of 2 heads of 2, keys and values, 4 bytes.
        let bytes = KvCache::max_bytes(&config, 64, chunk).unwrap();
        assert_eq!(bytes, (64 + 7 + 64) * 2 * 2 * 2 * 4);
    }

    #[test]
    fn cutting_back_behind_the_window_empties_the_cache() {
        let mut cache = KvCache::new(&config(5), 64, 3);
        (0..10).for_each(|_| append(&mut cache, 3));
        cache.truncate(30);
        assert_eq!(cache.len(), 30);
        let first = cache.layers[1].first;
        // The query at `first + 4` still sees from `first` on.
        cache.truncate(first + 4);
        assert_eq!(cache.len(), first + 4);
        assert_eq!(cache.layers[1].heads[1].keys.len(), 4 * 2);
        cache.truncate(first + 3);
        assert_eq!((cache.len(), cache.layers[0].heads[0].keys.len()), (0, 0));
        append(&mut cache, 3);
        assert_eq!(cache.layers[1].seen(2), 0..3);
    }

    #[test]
    fn appended_but_not_committed_is_taken_back() {
        let mut cache = KvCache::new(&config(5), 64, 8);
        append(&mut cache, 8);
        cache.reserve(2).unwrap();
        cache.append(0, &[9.0; 16], 8);
        cache.truncate(8);
        assert_eq!(cache.layers[0].heads[0].keys.len(), 8 * 2);
        assert_eq!(cache.reserve(57).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}
