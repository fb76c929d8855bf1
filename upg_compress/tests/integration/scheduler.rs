//! Requests that share forward passes get the same result as alone,
//! whatever happens to the others.

use crate::common::copy_model;
use serde_json::{Map, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use upg_compress::{Choice, CompressOptions, compress, source};
use upg_kernel::format::Encoding;
use upg_kernel::inference::{
    Event, FinishReason, Request, RequestId, Sampler, SamplingOptions, Scheduler, SessionOptions,
};
use upg_kernel::{ErrorKind, UPGModel};

/// Token whose embedding is NaN: a prompt with it gives no valid logits.
const POISON: u32 = 77;

/// Creates the model with a poisoned token.
fn poisoned_model(folder: &Path) -> UPGModel {
    drop(model(folder));
    let path = folder.join("model.safetensors");
    poison(&path);
    UPGModel::from_file(&path).unwrap()
}

/// Creates the tiny phi3 as `q8` with a tokenizer of single characters;
/// its embedding is not compressed.
fn model(folder: &Path) -> UPGModel {
    let source = folder.join("source");
    copy_model("phi3", "phi3", &source);
    let character = |id: u32| char::from_u32(0x4e00 + id).unwrap().to_string();
    let vocab: Map<_, _> = (0..256).map(|id| (character(id), json!(id))).collect();
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    std::fs::write(source.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut options = CompressOptions::new(Choice::Encode(Encoding::Q8));
    options.embedding = Some(Choice::Keep);
    options.overrides = vec!["lm_head.weight=q8".parse().unwrap()];
    let path = folder.join("model.safetensors");
    let source = source::open(&source).unwrap();
    compress(source.as_ref(), &path, &options, &()).unwrap();
    UPGModel::from_file(&path).unwrap()
}

/// Overwrites the embedding of [`POISON`].
fn poison(path: &Path) {
    let row = {
        let model = UPGModel::from_file(path).unwrap();
        let hidden = model.model().config().hidden_size;
        let embedding = model.file().bytes("model.embed_tokens.weight").unwrap();
        embedding
            .chunks_exact(2 * hidden)
            .nth(POISON as usize)
            .unwrap()
            .to_vec()
    };
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes
        .windows(row.len())
        .position(|window| window == row)
        .unwrap();
    for value in bytes[at..at + row.len()].as_chunks_mut::<2>().0 {
        *value = half::bf16::NAN.to_le_bytes();
    }
    std::fs::write(path, bytes).unwrap();
}

fn request(model: &UPGModel, prompt: &[u32], max_tokens: usize, seed: u64) -> Request {
    let options = SamplingOptions {
        temperature: [0.0, 0.8][seed as usize % 2],
        seed,
        ..SamplingOptions::default()
    };
    let mut request = model.request(prompt.to_vec(), max_tokens);
    request.sampler = Sampler::new(options).unwrap();
    request
}

/// Returns prompts of 1 to 50 tokens without the poisoned one.
fn prompt(number: u32) -> Vec<u32> {
    let len = [5, 50, 1, 17, 33, 2, 16, 9][number as usize % 8];
    let id = |i: u32| 3 + (i * 37 + number * 101) % 200;
    let harmless = (0..).map(id).filter(|&id| id != POISON);
    harmless.take(len).collect()
}

/// Text and end of a request.
#[derive(Debug, Default)]
struct Outcome {
    text: String,
    end: Option<Result<FinishReason, ErrorKind>>,
}

fn take_events(scheduler: &mut Scheduler, outcomes: &mut HashMap<RequestId, Outcome>) {
    for (id, event) in scheduler.step() {
        let outcome = outcomes.entry(id).or_default();
        assert!(outcome.end.is_none(), "news after the end");
        match event {
            Event::Text(text) => outcome.text.push_str(&text),
            Event::Finished(reason, _) => outcome.end = Some(Ok(reason)),
            Event::Failed(error, _) => outcome.end = Some(Err(error.kind())),
            Event::Token(..) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn run(scheduler: &mut Scheduler, outcomes: &mut HashMap<RequestId, Outcome>) {
    while !scheduler.is_idle() {
        take_events(scheduler, outcomes);
    }
}

fn alone(model: &UPGModel, options: &SessionOptions, request: Request) -> Outcome {
    let mut scheduler = model.scheduler(1, options).unwrap();
    let id = scheduler.submit(request).unwrap();
    let mut outcomes = HashMap::new();
    run(&mut scheduler, &mut outcomes);
    outcomes.remove(&id).unwrap()
}

#[test]
fn a_request_that_fails_leaves_the_others_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let model = poisoned_model(folder.path());
    let options = SessionOptions {
        prefill_chunk: 24,
        ..SessionOptions::default()
    };
    let mut scheduler = model.scheduler(10, &options).unwrap();
    let (mut good, mut outcomes) = (Vec::new(), HashMap::new());
    let mut poisoned = prompt(1);
    poisoned[40] = POISON;
    let mut bad = Vec::new();
    for number in 0..7 {
        good.push(
            scheduler
                .submit(request(&model, &prompt(number), 30, number.into()))
                .unwrap(),
        );
        match number {
            2 => bad.push(scheduler.submit(request(&model, &poisoned, 30, 0)).unwrap()),
            4 => bad.push(
                scheduler
                    .submit(request(&model, &prompt(7), 30, 0))
                    .unwrap(),
            ),
            _ => {}
        }
    }
    for _ in 0..5 {
        take_events(&mut scheduler, &mut outcomes);
    }
    assert!(scheduler.cancel(bad[1]) && !scheduler.cancel(bad[1]));
    run(&mut scheduler, &mut outcomes);
    assert_eq!(outcomes[&bad[0]].end, Some(Err(ErrorKind::Invalid)));
    assert!(
        outcomes
            .get(&bad[1])
            .is_none_or(|outcome| outcome.end.is_none())
    );
    let mut complete = 0;
    for (number, id) in (0..).zip(good) {
        let expected = alone(
            &model,
            &options,
            request(&model, &prompt(number), 30, number.into()),
        );
        assert_eq!(outcomes[&id].text, expected.text, "request {number}");
        assert_eq!(outcomes[&id].end, expected.end, "request {number}");
        complete += usize::from(matches!(expected.end, Some(Ok(_))));
    }
    // A sampler may choose the poisoned token.
    assert!(complete >= 5, "{complete}");
    scheduler.forget();
    assert_eq!(scheduler.cache_bytes(), 0);
}

#[test]
fn requests_wait_for_the_memory_that_they_may_need() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let unlimited = SessionOptions::default();
    // Two of these requests fit, or one with twice as many positions.
    let of_one = {
        let mut scheduler = model.scheduler(1, &unlimited).unwrap();
        scheduler
            .submit(request(&model, &prompt(0), 43, 0))
            .unwrap();
        while scheduler.cache_bytes() == 0 {
            scheduler.step();
        }
        3 * scheduler.cache_bytes()
    };
    let options = SessionOptions {
        max_cache_bytes: Some(2 * of_one),
        ..SessionOptions::default()
    };
    let mut scheduler = model.scheduler(10, &options).unwrap();
    let (mut outcomes, mut most) = (HashMap::new(), 0);
    for seed in 0..6 {
        scheduler
            .submit(request(&model, &prompt(0), 43, seed))
            .unwrap();
    }
    let error = scheduler
        .submit(request(&model, &prompt(0), 200, 0))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    while !scheduler.is_idle() {
        take_events(&mut scheduler, &mut outcomes);
        most = most.max(scheduler.requests().0);
        assert!(scheduler.cache_bytes() <= 2 * of_one);
    }
    assert_eq!(most, 2);
    for (id, outcome) in &outcomes {
        assert!(matches!(outcome.end, Some(Ok(_))), "{id:?}");
    }
    let mut texts: Vec<_> = outcomes.into_iter().collect();
    texts.sort_by_key(|(id, _)| *id);
    for (seed, (_, outcome)) in (0..).zip(texts) {
        let expected = alone(&model, &unlimited, request(&model, &prompt(0), 43, seed));
        assert_eq!(outcome.text, expected.text);
    }
}

#[test]
fn an_interrupt_ends_what_runs_and_bad_requests_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let interrupt = Arc::new(AtomicBool::new(false));
    let options = SessionOptions {
        interrupt: Some(Arc::clone(&interrupt)),
        ..SessionOptions::default()
    };
    assert!(model.scheduler(0, &options).is_err());
    let mut scheduler = model.scheduler(1, &options).unwrap();
    for bad in [&[][..], &[256], &[1; 10_000]] {
        let error = scheduler.submit(request(&model, bad, 5, 0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Argument, "{error}");
    }
    let mut empty_stop = request(&model, &[1], 5, 0);
    empty_stop.stop_strings = vec![String::new()];
    assert!(scheduler.submit(empty_stop).is_err());
    assert!(scheduler.is_idle() && scheduler.step().is_empty());

    let ids = [0, 1].map(|seed| {
        scheduler
            .submit(request(&model, &prompt(0), 5, seed))
            .unwrap()
    });
    let mut outcomes = HashMap::new();
    take_events(&mut scheduler, &mut outcomes);
    interrupt.store(true, Ordering::Relaxed);
    take_events(&mut scheduler, &mut outcomes);
    assert_eq!(outcomes[&ids[0]].end, Some(Err(ErrorKind::Interrupted)));
    interrupt.store(false, Ordering::Relaxed);
    run(&mut scheduler, &mut outcomes);
    assert_eq!(outcomes[&ids[1]].end, Some(Ok(FinishReason::MaxTokens)));
    // Log-probabilities of the tokens, and of the two most probable ones.
    let mut greedy = request(&model, &prompt(0), 5, 0);
    greedy.log_probs = Some(2);
    let id = scheduler.submit(greedy).unwrap();
    let mut tokens = 0;
    while !scheduler.is_idle() {
        for (found, event) in scheduler.step() {
            if let Event::Token(token, Some(log_probs)) = event {
                assert_eq!((found, log_probs.top.len()), (id, 2));
                assert_eq!(log_probs.top[0], (token, log_probs.chosen));
                assert!(log_probs.chosen < 0.0);
                tokens += 1;
            }
        }
    }
    assert!((1..=5).contains(&tokens));
    // Nothing to generate: the prompt is computed, and that is all.
    let id = scheduler.submit(request(&model, &prompt(0), 0, 0)).unwrap();
    run(&mut scheduler, &mut outcomes);
    assert_eq!(outcomes[&id].text, "");
    assert_eq!(outcomes[&id].end, Some(Ok(FinishReason::MaxTokens)));
}

#[test]
fn a_prompt_shares_its_beginning_with_a_request_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let options = SessionOptions::default();
    let mut scheduler = model.scheduler(3, &options).unwrap();
    let prompts = [0, 1, 2].map(|tail| {
        let mut prompt = prompt(1);
        prompt.extend([9, 8, 7 + tail]);
        prompt
    });
    let mut outcomes = HashMap::new();
    let mut ids = Vec::new();
    for prompt in &prompts {
        let id = scheduler.submit(request(&model, prompt, 20, 1)).unwrap();
        take_events(&mut scheduler, &mut outcomes);
        let common = if ids.is_empty() { 0 } else { prompt.len() - 1 };
        assert_eq!(scheduler.timings(id).unwrap().cached_tokens, common);
        ids.push(id);
    }
    // What two sequences share is there once.
    let shared = scheduler.cache_bytes();
    run(&mut scheduler, &mut outcomes);
    scheduler.forget();
    for prompt in &prompts {
        scheduler.submit(request(&model, prompt, 20, 1)).unwrap();
    }
    take_events(&mut scheduler, &mut outcomes);
    assert!(shared < scheduler.cache_bytes() * 2 / 3);
    for (id, prompt) in ids.iter().zip(&prompts) {
        let expected = alone(&model, &options, request(&model, prompt, 20, 1));
        assert_eq!(outcomes[id].text, expected.text);
        assert_eq!(outcomes[id].end, expected.end);
    }
}
