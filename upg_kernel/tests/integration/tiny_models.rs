//! Tiny random models of every family, compared with the logits and greedy tokens
//! of transformers.
//!
//! `tests/data/tiny-models/make_expected.py` creates them.

use crate::common::{
    CUT_TOLERANCE, DenseSource, LOGIT_TOLERANCE, MODELS, answer, cases, config, exact,
    largest_difference, model, session, source,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use upg_kernel::inference::config::FAMILIES;
use upg_kernel::inference::{
    CacheType, FinishReason, LayerInput, Layerwise, Model, ModelConfig, Request, Scheduler,
    Session, SessionOptions, WeightSource,
};
use upg_kernel::{Error, ErrorKind, Matrix};

/// Tolerance of an int8 cache; measured: 0.046, and 0.093 without a rotation.
const INT8_TOLERANCE: f32 = 0.065;

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

#[test]
fn logits_are_those_of_transformers() {
    for (name, _) in MODELS {
        let model = model(name);
        for (i, case) in cases(name).iter().enumerate() {
            let logits = session(&model).forward(&case.prompt).unwrap();
            let tail = &logits[logits.len() - case.logits.len()..];
            let difference = largest_difference(tail, &case.logits);
            println!(
                "{name} case{i}: {} logits up to {:.2}, largest difference {difference:.1e}",
                tail.len(),
                largest(&case.logits)
            );
            assert!(
                difference <= LOGIT_TOLERANCE,
                "{name} case{i}: {difference}"
            );
        }
    }
}

fn scheduler(model: &Arc<Model>, options: &SessionOptions) -> Scheduler {
    Scheduler::new(Arc::clone(model), 1, options).expect("a scheduler")
}

/// Layer by layer with two sequences at once, then norm and head by hand.
#[test]
fn layer_by_layer_gives_the_logits_of_transformers() {
    for (name, weights) in MODELS {
        let (config, source) = (config(name), source(weights));
        let case = cases(name).pop().unwrap();
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = source
            .matrix("model.embed_tokens.weight", vocab, hidden)
            .unwrap();
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => source.matrix("lm_head.weight", vocab, hidden).unwrap(),
        };
        let gains = source.vector("model.norm.weight", hidden).unwrap();
        let len = case.prompt.len();
        // Another sequence beside it reveals one that sees the other.
        let other: Vec<u32> = case.prompt.iter().rev().copied().collect();
        let tail = len - case.logits.len() / vocab;
        let of_other = session(&model(name)).forward(&other).unwrap();
        let expected = [case.logits, of_other[tail * vocab..].to_vec()];
        let tokens = [case.prompt, other].concat();
        let mut run = Layerwise::new(config.clone(), &embedding, &tokens, len).unwrap();
        let normed = |x: &[f32], gains: &[f32]| -> Vec<f32> {
            let squares = x.iter().map(|x| x * x).sum::<f32>() / hidden as f32;
            let factor = 1.0 / (squares + config.rms_norm_eps).sqrt();
            x.iter()
                .zip(gains)
                .map(|(x, gain)| x * factor * gain)
                .collect()
        };
        for layer in 0..config.num_layers {
            let gains = format!("model.layers.{layer}.input_layernorm.weight");
            let gains = source.vector(&gains, hidden).unwrap();
            let first = normed(&run.hidden()[..hidden], &gains);
            let mut inputs = Vec::new();
            run.layer(layer, &source, &mut |input, n, x| {
                assert!(n == 2 * len && x.len().is_multiple_of(n));
                if input == LayerInput::Attention {
                    let difference = largest_difference(&x[..hidden], &first);
                    assert!(difference <= LOGIT_TOLERANCE, "{name}: {difference}");
                }
                inputs.push(input);
                Ok(())
            })
            .unwrap();
            let all = [
                LayerInput::Attention,
                LayerInput::Output,
                LayerInput::FeedForward,
                LayerInput::Down,
            ];
            assert_eq!(inputs, all);
        }
        for (sequence, expected) in run.hidden().chunks_exact(len * hidden).zip(&expected) {
            let mut logits = Vec::new();
            for x in sequence[tail * hidden..].chunks_exact(hidden) {
                logits.extend(head.spmv(&normed(x, &gains)).unwrap());
            }
            let difference = largest_difference(&logits, expected);
            assert!(difference <= LOGIT_TOLERANCE, "{name}: {difference}");
        }
        let error = |tokens: &[u32], len| {
            let run = Layerwise::new(config.clone(), &embedding, tokens, len);
            run.unwrap_err().kind()
        };
        assert_eq!(error(&[1; 5], 3), ErrorKind::Argument);
        assert_eq!(error(&[1; 5], 0), ErrorKind::Argument);
        assert_eq!(error(&[], 1), ErrorKind::Argument);
        assert_eq!(error(&[vocab as u32], 1), ErrorKind::Argument);
        let beyond = run.layer(config.num_layers, &source, &mut |_, _, _| Ok(()));
        assert_eq!(beyond.unwrap_err().kind(), ErrorKind::Argument);
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for (name, _) in MODELS {
        let model = model(name);
        for (i, case) in cases(name).iter().enumerate() {
            let request = Request::new(case.prompt.clone(), case.greedy.len());
            let (tokens, reason, _) = answer(&mut scheduler(&model, &exact()), request);
            assert_eq!(tokens, case.greedy, "{name} case{i}");
            assert_eq!(reason, FinishReason::MaxTokens);
        }
    }
}

#[test]
fn the_cut_of_a_prompt_does_not_matter() {
    for (name, _) in MODELS {
        let model = model(name);
        let case = cases(name).pop().unwrap();
        let whole = session(&model).prefill(&case.prompt).unwrap();
        for piece in [1, 3, 7, 16, 17, 33] {
            let mut calls = session(&model);
            let mut last = Vec::new();
            for tokens in case.prompt.chunks(piece) {
                last = calls.prefill(tokens).unwrap();
            }
            let options = SessionOptions {
                prefill_chunk: piece,
                ..exact()
            };
            let mut chunked = Session::new(Arc::clone(&model), &options).unwrap();
            let every = chunked.forward(&case.prompt).unwrap();
            let chunked = &every[every.len() - whole.len()..];
            let difference =
                largest_difference(&whole, &last).max(largest_difference(&whole, chunked));
            println!("{name} in pieces of {piece}: largest difference {difference:.1e}");
            assert!(difference <= CUT_TOLERANCE, "{name} {piece}: {difference}");
            let tail = &every[every.len() - case.logits.len()..];
            assert!(largest_difference(tail, &case.logits) <= LOGIT_TOLERANCE);
        }
    }
}

/// A session that is truncated to before a sliding window or the longrope switch and grows
/// again equals a new one.
#[test]
fn a_session_cut_back_is_as_good_as_new() {
    for (name, _) in MODELS {
        let model = model(name);
        let prompt = cases(name).pop().unwrap().prompt;
        let options = SessionOptions {
            prefill_chunk: 5,
            ..exact()
        };
        for kept in [0, 1, 10, 31, 32, 33, 70, 79, 80, 200] {
            let mut used = Session::new(Arc::clone(&model), &options).unwrap();
            used.prefill(&prompt).unwrap();
            used.truncate(kept);
            let kept = kept.min(prompt.len());
            assert_eq!(used.tokens(), &prompt[..kept]);
            let mut fresh = session(&model);
            let mut tokens = prompt[..kept].to_vec();
            tokens.extend([9, 8, 7]);
            let difference = largest_difference(
                &used.prefill(&[9, 8, 7]).unwrap(),
                &fresh.prefill(&tokens).unwrap(),
            );
            assert!(difference <= CUT_TOLERANCE, "{name} {kept}: {difference}");
            let replaced = used.replace(&prompt).unwrap();
            let whole = session(&model).prefill(&prompt).unwrap();
            assert!(largest_difference(&replaced, &whole) <= CUT_TOLERANCE);
            assert_eq!(used.tokens(), prompt);
        }
    }
}

/// Greedy continuations across the longrope switch (32 positions), from `generate` of
/// transformers 5.23.0.
///
/// It uses the same files, and also recomputes the cache at the switch.
#[test]
fn generation_crosses_the_longrope_switch_as_transformers_does() {
    let model = model("phi4-mini-longrope");
    let prompt: Vec<u32> = (0..28).map(|i| 3 + (i * 37 + 11) % 250).collect();
    let expected: [u32; 16] = [
        244, 244, 244, 244, 162, 162, 162, 162, 162, 133, 60, 60, 60, 60, 60, 60,
    ];
    let request = Request::new(prompt, expected.len());
    let (tokens, ..) = answer(&mut scheduler(&model, &exact()), request);
    assert_eq!(tokens, expected);
}

/// Weights whose keys have two elements far larger than the others, like those of Qwen2.5.
struct LargeKeys(DenseSource);

impl WeightSource for LargeKeys {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, Error> {
        self.0.matrix(name, rows, cols)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let mut vector = self.0.vector(name, len)?;
        if name.ends_with("k_proj.bias") {
            (vector[8], vector[20]) = (100.0, 100.0);
        }
        Ok(vector)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// Without a rotation, rounding large elements to 8 bits would erase the others.
#[test]
fn an_int8_cache_bears_a_few_large_elements_of_keys() {
    let model = Model::load(config("qwen2"), &LargeKeys(source("qwen2"))).unwrap();
    let model = Arc::new(model);
    let prompt = cases("qwen2").pop().unwrap().prompt;
    let logits = |cache_type| {
        let options = SessionOptions {
            cache_type,
            ..exact()
        };
        let mut session = Session::new(Arc::clone(&model), &options).unwrap();
        session.forward(&prompt).unwrap()
    };
    let (exact, rounded) = (logits(CacheType::F32), logits(CacheType::Int8));
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let difference: Vec<f32> = exact.iter().zip(&rounded).map(|(a, b)| a - b).collect();
    let error = norm(&difference) / norm(&exact);
    println!("relative error {error:.1e}");
    assert!(error <= INT8_TOLERANCE, "{error}");
}

#[test]
fn bad_calls_are_refused_and_leave_the_session_as_it_was() {
    let model = model("llama3-rope");
    let mut used = session(&model);
    let first = used.prefill(&[5, 6, 7]).unwrap();
    for (tokens, expected) in [
        (vec![], "no tokens to compute"),
        (vec![1, 256], "token id 256 is not in the vocabulary of 256"),
        (
            vec![1; 254],
            "sequence of 257 tokens does not fit the context of 256",
        ),
    ] {
        for error in [used.prefill(&tokens), used.forward(&tokens)] {
            let error = error.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Argument);
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        assert_eq!(used.tokens(), [5, 6, 7]);
    }
    assert!(used.replace(&[]).is_err() && used.replace(&[300]).is_err());
    assert_eq!(used.replace(&[5, 6, 7]).unwrap().len(), first.len());
    used.prefill(&[1; 253]).unwrap();
    assert!(used.step(1).is_err());

    let of = |context, prefill_chunk, max_cache_bytes| SessionOptions {
        context,
        prefill_chunk,
        max_cache_bytes,
        ..exact()
    };
    // 256 positions, 2 layers, 2 heads of 24, keys and values of 4 bytes.
    let bytes = 256 * 2 * 2 * 24 * 2 * 4;
    for (options, kind) in [
        (of(Some(0), 512, None), Some(ErrorKind::Argument)),
        (of(Some(257), 512, None), Some(ErrorKind::Argument)),
        (of(None, 0, None), Some(ErrorKind::Argument)),
        (of(None, usize::MAX, None), Some(ErrorKind::Argument)),
        (of(None, 512, Some(bytes - 1)), Some(ErrorKind::TooLarge)),
        (of(None, 512, Some(bytes)), None),
    ] {
        let result = Session::new(Arc::clone(&model), &options);
        assert_eq!(result.err().map(|e| e.kind()), kind);
    }
}

#[test]
fn an_interrupted_session_is_as_before_and_goes_on() {
    let model = model("mistral");
    let prompt = cases("mistral").pop().unwrap().prompt;
    let interrupt = Arc::new(AtomicBool::new(false));
    let options = SessionOptions {
        interrupt: Some(Arc::clone(&interrupt)),
        ..exact()
    };
    let mut used = Session::new(Arc::clone(&model), &options).unwrap();
    used.prefill(&prompt[..40]).unwrap();
    interrupt.store(true, Ordering::Relaxed);
    for error in [used.prefill(&prompt[40..]), used.forward(&prompt[40..])] {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Interrupted);
        assert_eq!(used.tokens(), &prompt[..40]);
    }
    interrupt.store(false, Ordering::Relaxed);
    let logits = used.prefill(&prompt[40..]).unwrap();
    let whole = session(&model).prefill(&prompt).unwrap();
    assert!(largest_difference(&logits, &whole) <= CUT_TOLERANCE);
}

#[test]
fn timings_count_what_was_computed() {
    let mut scheduler = scheduler(&model("qwen3"), &exact());
    for (prompt, cached) in [(vec![5, 6, 7], 0), (vec![5, 6, 8, 9], 2)] {
        let computed = prompt.len() - cached;
        let (tokens, _, timings) = answer(&mut scheduler, Request::new(prompt, 4));
        assert_eq!((tokens.len(), timings.generated_tokens), (4, 4));
        assert_eq!(
            (timings.cached_tokens, timings.prompt_tokens),
            (cached, computed)
        );
        assert!(timings.prompt_rate() > 0.0 && timings.step_rate() > 0.0);
    }
}

/// Whatever sequence its beginning was taken from, and however far that was cut back, an answer is
/// that of transformers.
#[test]
fn a_prompt_continues_what_is_in_the_cache() {
    for (name, _) in MODELS {
        let model = model(name);
        let case = cases(name).pop().unwrap();
        let mut scheduler = scheduler(&model, &exact());
        for kept in [1, 16, 31, 40, 79, 80] {
            let mut other = case.prompt[..kept].to_vec();
            other.extend([9, 8, 7]);
            answer(&mut scheduler, Request::new(other, 20));
            let request = Request::new(case.prompt.clone(), case.greedy.len());
            let (tokens, _, timings) = answer(&mut scheduler, request);
            assert_eq!(tokens, case.greedy, "{name} {kept}");
            assert_eq!(
                timings.cached_tokens + timings.prompt_tokens,
                case.prompt.len()
            );
        }
        assert!(scheduler.cache_bytes() > 0);
        scheduler.forget();
        assert_eq!(scheduler.cache_bytes(), 0);
    }
}

#[test]
fn generation_stops_at_stop_ids_and_at_the_end_of_the_context() {
    let name = "qwen3";
    let model = model(name);
    let case = cases(name).remove(1);
    let run = |context, max_tokens, stop_ids| {
        let options = SessionOptions { context, ..exact() };
        let mut request = Request::new(case.prompt.clone(), max_tokens);
        request.stop_ids = stop_ids;
        let (tokens, reason, timings) = answer(&mut scheduler(&model, &options), request);
        assert_eq!(tokens, case.greedy[..tokens.len()]);
        assert_eq!(timings.generated_tokens, tokens.len());
        (tokens.len(), reason)
    };
    let stop = case.greedy[4];
    let first = case.greedy.iter().position(|&t| t == stop).unwrap();
    assert_eq!(
        run(None, 8, vec![stop]),
        (first, FinishReason::StopToken(stop))
    );
    assert_eq!(run(None, 0, vec![]), (0, FinishReason::MaxTokens));
    // The last token needs no position: nothing is computed from it.
    assert_eq!(run(Some(10), 8, vec![]), (4, FinishReason::ContextFull));
    assert_eq!(run(Some(7), 8, vec![]), (1, FinishReason::ContextFull));
}

#[test]
fn a_stream_says_how_much_of_its_prompt_is_computed() {
    let options = SessionOptions {
        prefill_chunk: 2,
        ..exact()
    };
    let mut scheduler = scheduler(&model("qwen3"), &options);
    let case = cases("qwen3").remove(1);
    let mut request = Request::new(case.prompt.clone(), case.greedy.len());
    request.decoder = Some(Box::new(|id| Ok(format!("<{id}>"))));
    let mut stream = scheduler.stream(request).unwrap();
    let mut seen = Vec::new();
    stream.compute_prompt(|done, all| seen.push((done, all)));
    let all = case.prompt.len();
    let expected: Vec<_> = (0..all).step_by(2).map(|done| (done, all)).collect();
    assert!(seen.len() > 1);
    assert_eq!(seen, expected);
    stream.compute_prompt(|done, all| panic!("{done} of {all} again"));
    let text: String = case.greedy.iter().map(|id| format!("<{id}>")).collect();
    assert_eq!(stream.map(Result::unwrap).collect::<String>(), text);
}

#[test]
fn text_ends_before_a_stop_string() {
    let mut scheduler = scheduler(&model("qwen3"), &exact());
    let case = cases("qwen3").remove(1);
    let text: String = case.greedy.iter().map(|id| format!("<{id}>")).collect();
    let request = |stop_strings| {
        let mut request = Request::new(case.prompt.clone(), case.greedy.len());
        request.decoder = Some(Box::new(|id| Ok(format!("<{id}>"))));
        request.stop_strings = stop_strings;
        request
    };
    let mut run = |stops: Vec<String>| {
        let mut stream = scheduler.stream(request(stops)).unwrap();
        let pieces: Vec<String> = stream.by_ref().collect::<Result<_, Error>>().unwrap();
        assert!(stream.next().is_none() && pieces.iter().all(|p| !p.is_empty()));
        (pieces.concat(), stream.finish_reason().unwrap())
    };
    assert_eq!(run(vec![]), (text.clone(), FinishReason::MaxTokens));
    // Held back to the end, and then returned.
    let nearly = format!("{text}!");
    assert_eq!(run(vec![nearly]), (text.clone(), FinishReason::MaxTokens));
    // A stop string across the edge between two pieces.
    let (before, after) = text.split_at(text.len() / 2);
    let stop = format!("{}{}", &before[before.len() - 2..], &after[..4]);
    let expected = text.find(&stop).map(|at| text[..at].to_owned()).unwrap();
    let stops = vec!["never".to_owned(), stop];
    assert_eq!(run(stops), (expected, FinishReason::StopString(1)));

    // A stream that is dropped leaves the scheduler to others, and its sequence to continue.
    let mut stream = scheduler.stream(request(vec![])).unwrap();
    stream.next().unwrap().unwrap();
    drop(stream);
    assert!(scheduler.is_idle());
    let mut stream = scheduler.stream(request(vec![])).unwrap();
    assert_eq!(
        stream.by_ref().map(Result::unwrap).collect::<String>(),
        text
    );
    assert_eq!(stream.timings().prompt_tokens, 1);
    drop(stream);

    let mut without_decoder = Request::new(case.prompt.clone(), 1);
    assert!(
        scheduler
            .stream(Request::new(case.prompt.clone(), 1))
            .is_err()
    );
    without_decoder.stop_strings = vec!["a".into()];
    assert!(scheduler.submit(without_decoder).is_err());
    scheduler.submit(request(vec![])).unwrap();
    assert!(
        scheduler.stream(request(vec![])).is_err(),
        "beside another request"
    );
}

#[test]
fn a_model_with_other_weights_than_its_config_says_is_refused() {
    let load = |name: &str, change: &dyn Fn(&mut ModelConfig)| {
        let mut config = config(name);
        change(&mut config);
        Model::load(config, &source(name)).unwrap_err()
    };
    let e = load("llama3-rope", &|c| c.intermediate_size = 161);
    assert_eq!(e.kind(), ErrorKind::Shape);
    assert_eq!(
        e.to_string(),
        "tensor 'model.layers.0.mlp.gate_proj.weight': has the shape [160, 96], config.json asks \
         for [161, 96]"
    );
    let e = load("llama3-rope", &|c| c.tie_word_embeddings = false);
    assert_eq!(
        (e.kind(), e.tensor_name()),
        (ErrorKind::Missing, Some("lm_head.weight"))
    );
    let e = load("qwen2", &|c| c.qkv_bias = false);
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert_eq!(
        e.tensor_name(),
        Some("model.layers.0.self_attn.q_proj.bias")
    );
    let e = load("qwen3", &|c| c.family = &FAMILIES[0]);
    assert_eq!(
        e.tensor_name(),
        Some("model.layers.0.self_attn.q_norm.weight")
    );
    let e = load("qwen2", &|c| c.num_kv_heads = 0);
    assert_eq!(e.kind(), ErrorKind::Invalid);
}
