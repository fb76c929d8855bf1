//! A second device, in plain f32 loops, which records the steps of a pass and computes them when it
//! is read: the seam holds if tiny models of all families give the same logits on it.

#[path = "../../tests/common/data.rs"]
mod data;
#[path = "../../tests/common/dense.rs"]
mod dense;
#[path = "../../tests/common/tiny.rs"]
mod tiny;

use super::{Device, Heads, Linear, Norm, Write};
use crate::error::{ErrorKind, Result};
use crate::inference::cache::{BLOCK, CacheLayout, first_seen};
use crate::inference::pass::Pass;
use crate::inference::rope::Rope;
use crate::inference::{Context, Logits, Model, SessionOptions};
use crate::matrix::Matrix;
use dense::{LOGIT_TOLERANCE, config, source};
use std::collections::HashMap;
use std::mem::take;
use std::sync::{Arc, Mutex};
use tiny::{MODELS, cases, exact, largest_difference};

/// A value that recorded steps share.
type Shared<T> = Arc<Mutex<T>>;

type Step = Box<dyn FnOnce() + Send>;

/// The steps that are not computed yet, and the names of all that ever were.
#[derive(Default, Clone)]
struct Recorder {
    steps: Shared<Vec<Step>>,
    names: Shared<Vec<&'static str>>,
}

impl Recorder {
    fn record(&self, name: &'static str, step: impl FnOnce() + Send + 'static) {
        self.names.lock().unwrap().push(name);
        self.steps.lock().unwrap().push(Box::new(step));
    }
}

/// A matrix as rows of f32.
#[derive(Clone)]
struct Rows {
    values: Arc<Vec<f32>>,
    cols: usize,
}

/// Keys and values by layer and position in the cache, which is a block and an entry in it.
type Entries = HashMap<(usize, u32, usize), (Vec<f32>, Vec<f32>)>;

#[derive(Clone)]
struct Cache {
    layout: CacheLayout,
    entries: Shared<Entries>,
}

/// Arguments of the last [`Device::begin`].
#[derive(Default, Clone)]
struct Begun {
    heads: Option<Heads>,
    frequencies: [Vec<f64>; 2],
    factor: f64,
}

/// Finds where an entry of a sequence is.
fn place(pass: &Pass, segment: usize, group: usize, position: usize) -> (u32, usize) {
    let view = pass.view(segment, group);
    let entry = position - view.first;
    (pass.blocks(view)[entry / BLOCK], entry % BLOCK)
}

fn normalize(x: &mut [f32], gain: &[f32], eps: f32) {
    let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
    let scale = 1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt();
    for (x, gain) in x.iter_mut().zip(gain) {
        *x = (f64::from(*x) * scale) as f32 * gain;
    }
}

/// Rotates a head to a position.
fn rotate(head: &mut [f32], position: usize, frequencies: &[f64], factor: f64) {
    let half = frequencies.len();
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
        head[i] = ((a * cos - b * sin) * factor) as f32;
        head[i + half] = ((b * cos + a * sin) * factor) as f32;
    }
}

fn attend(query: &[f32], seen: &[&(Vec<f32>, Vec<f32>)], part: std::ops::Range<usize>) -> Vec<f32> {
    let dot = |key: &[f32]| -> f64 {
        let products = query.iter().zip(key);
        products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
    };
    let scale = 1.0 / (query.len() as f64).sqrt();
    let scores: Vec<_> = seen
        .iter()
        .map(|(k, _)| dot(&k[part.clone()]) * scale)
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<_> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; query.len()];
    for (weight, (_, value)) in weights.iter().zip(seen) {
        for (out, value) in out.iter_mut().zip(&value[part.clone()]) {
            *out += weight / total * f64::from(*value);
        }
    }
    out.into_iter().map(|x| x as f32).collect()
}

impl Device for Recorder {
    type Buffer = Shared<Vec<f32>>;
    type Weight = Rows;
    type Vector = Arc<Vec<f32>>;
    type Cache = Cache;
    type Scratch = Shared<Begun>;

    fn matrix(&self, matrix: Matrix) -> Result<Rows> {
        Ok(Rows {
            values: Arc::new(matrix.to_dense()),
            cols: matrix.cols(),
        })
    }

    fn vector(&self, vector: Vec<f32>) -> Result<Self::Vector> {
        Ok(Arc::new(vector))
    }

    fn cache(&self, layout: &CacheLayout) -> Result<Cache> {
        Ok(Cache {
            layout: layout.clone(),
            entries: Shared::default(),
        })
    }

    fn begin(
        &self,
        pass: &Pass,
        rope: &Rope,
        heads: Heads,
        cache: &mut Cache,
        scratch: &mut Self::Scratch,
    ) -> Result<()> {
        // What an earlier pass, which has failed, had left.
        self.steps.lock().unwrap().clear();
        let begun = Begun {
            heads: Some(heads),
            frequencies: [false, true].map(|long| rope.frequencies(long).to_vec()),
            factor: rope.attention_factor(),
        };
        let (scratch, cache, copies) = (Arc::clone(scratch), cache.clone(), pass.copies.clone());
        self.record("begin", move || {
            *scratch.lock().unwrap() = begun;
            let mut entries = cache.entries.lock().unwrap();
            for copy in copies {
                let layers = cache.layout.layers.iter().enumerate();
                for (layer, _) in layers.filter(|(_, place)| place.0 == copy.group) {
                    for entry in 0..BLOCK {
                        if let Some(found) = entries.get(&(layer, copy.from, entry)).cloned() {
                            entries.insert((layer, copy.to, entry), found);
                        }
                    }
                }
            }
        });
        Ok(())
    }

    fn gather(&self, embedding: &Rows, tokens: &[u32], out: &mut Self::Buffer) -> Result<()> {
        let (embedding, tokens, out) = (embedding.clone(), tokens.to_vec(), Arc::clone(out));
        self.record("gather", move || {
            let rows = tokens.iter().map(|&token| token as usize * embedding.cols);
            let rows = rows.flat_map(|at| embedding.values[at..at + embedding.cols].to_vec());
            *out.lock().unwrap() = rows.collect();
        });
        Ok(())
    }

    fn norm(&self, norm: &Norm<Self::Vector>, x: &Self::Buffer, out: &mut Self::Buffer) {
        let (gain, eps) = (Arc::clone(&norm.gain), norm.eps);
        let (x, out) = (Arc::clone(x), Arc::clone(out));
        self.record("norm", move || {
            let mut rows = x.lock().unwrap().clone();
            for row in rows.chunks_exact_mut(gain.len()) {
                normalize(row, &gain, eps);
            }
            *out.lock().unwrap() = rows;
        });
    }

    fn linear(
        &self,
        parts: &[Linear<Rows, Self::Vector>],
        x: &Self::Buffer,
        n: usize,
        write: Write,
        _: &mut Self::Scratch,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let parts: Vec<_> = parts
            .iter()
            .map(|part| (part.weight.clone(), part.bias.clone()))
            .collect();
        let (x, out) = (Arc::clone(x), Arc::clone(out));
        self.record("linear", move || {
            let x = x.lock().unwrap().clone();
            let mut products = Vec::new();
            for x in x.chunks_exact(x.len() / n) {
                for (weight, bias) in &parts {
                    for (i, row) in weight.values.chunks_exact(weight.cols).enumerate() {
                        let pairs = row.iter().zip(x);
                        let sum: f64 = pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        products.push(sum as f32 + bias.as_ref().map_or(0.0, |bias| bias[i]));
                    }
                }
            }
            let mut out = out.lock().unwrap();
            match write {
                Write::Set => *out = products,
                Write::Add => out.iter_mut().zip(products).for_each(|(out, x)| *out += x),
            }
        });
        Ok(())
    }

    fn rope_append(
        &self,
        pass: &Pass,
        layer: usize,
        norms: Option<&[Norm<Self::Vector>; 2]>,
        qkv: &mut Self::Buffer,
        cache: &mut Cache,
        scratch: &mut Self::Scratch,
    ) {
        let (pass, norms) = (pass.clone(), norms.cloned());
        let (qkv, cache, scratch) = (Arc::clone(qkv), cache.clone(), Arc::clone(scratch));
        self.record("rope_append", move || {
            let begun = scratch.lock().unwrap().clone();
            let heads = begun.heads.unwrap();
            let (mut qkv, mut entries) = (qkv.lock().unwrap(), cache.entries.lock().unwrap());
            let group = cache.layout.layers[layer].0;
            for (number, segment) in pass.segments.iter().enumerate() {
                for row in segment.rows.clone() {
                    let position = segment.first + row - segment.rows.start;
                    let row = &mut qkv[row * heads.width()..(row + 1) * heads.width()];
                    let rotated = &mut row[..heads.query_size() + heads.kv_size()];
                    for (index, head) in rotated.chunks_exact_mut(heads.dim).enumerate() {
                        if let Some(norms) = &norms {
                            let norm = &norms[usize::from(index >= heads.queries)];
                            normalize(head, &norm.gain, norm.eps);
                        }
                        let frequencies = &begun.frequencies[usize::from(segment.long)];
                        rotate(head, position, frequencies, begun.factor);
                    }
                    let (keys, values) = row[heads.query_size()..].split_at(heads.kv_size());
                    let (block, entry) = place(&pass, number, group, position);
                    let found = (keys.to_vec(), values.to_vec());
                    entries.insert((layer, block, entry), found);
                }
            }
        });
    }

    fn attend(
        &self,
        pass: &Pass,
        layer: usize,
        qkv: &Self::Buffer,
        cache: &Cache,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    ) {
        let (pass, cache) = (pass.clone(), cache.clone());
        let (qkv, out, scratch) = (Arc::clone(qkv), Arc::clone(out), Arc::clone(scratch));
        self.record("attend", move || {
            let heads = scratch.lock().unwrap().heads.unwrap();
            let (qkv, entries) = (qkv.lock().unwrap(), cache.entries.lock().unwrap());
            let group = cache.layout.layers[layer].0;
            let window = cache.layout.groups[group].window;
            let mut mixed = Vec::new();
            for (number, segment) in pass.segments.iter().enumerate() {
                for row in segment.rows.clone() {
                    let position = segment.first + row - segment.rows.start;
                    let seen: Vec<_> = (first_seen(window, position)..=position)
                        .map(|position| {
                            let (block, entry) = place(&pass, number, group, position);
                            &entries[&(layer, block, entry)]
                        })
                        .collect();
                    let queries = &qkv[row * heads.width()..][..heads.query_size()];
                    for (head, query) in queries.chunks_exact(heads.dim).enumerate() {
                        let first = head / heads.group() * heads.dim;
                        mixed.extend(attend(query, &seen, first..first + heads.dim));
                    }
                }
            }
            *out.lock().unwrap() = mixed;
        });
    }

    fn gated_silu(&self, gate_up: &Self::Buffer, size: usize, out: &mut Self::Buffer) {
        let (gate_up, out) = (Arc::clone(gate_up), Arc::clone(out));
        self.record("gated_silu", move || {
            let rows = gate_up.lock().unwrap();
            let rows = rows.chunks_exact(2 * size).flat_map(|row| {
                let (gate, up) = row.split_at(size);
                let pairs = gate.iter().zip(up);
                pairs.map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            });
            *out.lock().unwrap() = rows.collect();
        });
    }

    fn select(&self, x: &Self::Buffer, width: usize, rows: &[usize], out: &mut Self::Buffer) {
        let (x, rows, out) = (Arc::clone(x), rows.to_vec(), Arc::clone(out));
        self.record("select", move || {
            let x = x.lock().unwrap();
            let rows = rows
                .iter()
                .flat_map(|row| x[row * width..(row + 1) * width].to_vec());
            *out.lock().unwrap() = rows.collect();
        });
    }

    fn finish(&self) -> Result<()> {
        let steps = take(&mut *self.steps.lock().unwrap());
        steps.into_iter().for_each(|step| step());
        Ok(())
    }

    fn read(&self, x: &Self::Buffer, out: &mut Vec<f32>) -> Result<()> {
        self.names.lock().unwrap().push("read");
        self.finish()?;
        out.extend_from_slice(&x.lock().unwrap());
        Ok(())
    }
}

fn context(name: &str, prefill_chunk: usize) -> (Recorder, Context) {
    let recorder = Recorder::default();
    let (_, weights) = MODELS.iter().find(|model| model.0 == name).unwrap();
    let model = Model::on_device(recorder.clone(), config(name), &source(weights)).unwrap();
    let options = SessionOptions {
        prefill_chunk,
        ..exact()
    };
    (recorder, Context::new(Arc::new(model), &options).unwrap())
}

#[test]
fn tiny_models_of_all_families_give_the_logits_of_transformers() {
    for (name, _) in MODELS {
        // Windows give back blocks where chunks are small.
        for chunk in [512, 5] {
            let (_, mut context) = context(name, chunk);
            let mut logits = Vec::new();
            for case in cases(name) {
                let mut sequence = context.sequence();
                let parts = &mut [(&mut sequence, &case.prompt[..])];
                context.extend(parts, Logits::All, &mut logits).unwrap();
                let last = &logits[logits.len() - case.logits.len()..];
                let difference = largest_difference(last, &case.logits);
                assert!(
                    difference <= LOGIT_TOLERANCE,
                    "{name} {chunk}: {difference}"
                );
                let vocab = context.model().config().vocab_size;
                let row = &logits[logits.len() - vocab..];
                let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
                assert_eq!(best, Some(case.greedy[0] as usize), "{name} {chunk}");
                assert!(
                    difference <= LOGIT_TOLERANCE,
                    "{name} {chunk}: {difference}"
                );
                // Passes before the last one want no logits.
                let mut sequence = context.sequence();
                let parts = &mut [(&mut sequence, &case.prompt[..])];
                context.extend(parts, Logits::Last, &mut logits).unwrap();
                let expected = &case.logits[case.logits.len() - logits.len()..];
                let difference = largest_difference(&logits, expected);
                assert!(
                    difference <= LOGIT_TOLERANCE,
                    "{name} {chunk}: {difference}"
                );
            }
        }
    }
}

#[test]
fn a_pass_is_recorded_whole_before_it_is_computed() {
    let (recorder, mut context) = context("qwen3", 512);
    let layers = context.model().config().num_layers;
    let (mut one, mut two) = (context.sequence(), context.sequence());
    let mut logits = Vec::new();
    let parts = &mut [(&mut one, &[1, 2, 3][..]), (&mut two, &[4])];
    context.extend(parts, Logits::Last, &mut logits).unwrap();
    let layer = [
        "norm",
        "linear",
        "rope_append",
        "attend",
        "linear",
        "norm",
        "linear",
        "gated_silu",
        "linear",
    ];
    let mut expected = vec!["begin", "gather"];
    (0..layers).for_each(|_| expected.extend(layer));
    expected.extend(["select", "norm", "linear", "read"]);
    assert_eq!(*recorder.names.lock().unwrap(), expected);
    assert!(recorder.steps.lock().unwrap().is_empty());
}

#[test]
fn forks_and_failed_calls_leave_other_sequences_as_they_are() {
    let (_, mut context) = context("mistral", 512);
    let prompt = &cases("mistral").pop().unwrap().prompt[..22];
    let extend = |context: &mut Context, sequence: &mut _, tokens: &[u32]| {
        let mut logits = Vec::new();
        let parts = &mut [(sequence, tokens)];
        context
            .extend(parts, Logits::Last, &mut logits)
            .map(|()| logits)
    };
    let mut one = context.sequence();
    extend(&mut context, &mut one, prompt).unwrap();
    let (mut fork, mut other) = (one.clone(), context.sequence());
    let of_fork = extend(&mut context, &mut fork, &[7, 8]).unwrap();
    let error = extend(&mut context, &mut one, &[u32::MAX]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Argument);
    let of_one = extend(&mut context, &mut one, &[7, 8]).unwrap();
    assert_eq!(of_one, of_fork);
    let tokens = [prompt, &[7, 8]].concat();
    let alone = extend(&mut context, &mut other, &tokens).unwrap();
    assert!(largest_difference(&alone, &of_one) <= LOGIT_TOLERANCE);
}
