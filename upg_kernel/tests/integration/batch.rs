//! Sequences that share passes, compared with the same sequences alone.

use crate::common::{
    CUT_TOLERANCE, MODELS, cases, config, exact, largest_difference, model, session, source,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use upg_kernel::inference::{Context, Logits, Model, Sequence, Session, SessionOptions};
use upg_kernel::kernels::Kernels;
use upg_kernel::{Cpu, ErrorKind};

/// Sequence of a schedule: its remaining tokens, and the session that computes it alone.
struct Twin {
    joins: usize,
    tokens: Vec<u32>,
    batched: Sequence,
    alone: Session,
}

impl Twin {
    /// Cuts different prompts so that windows and the longrope switch occur in different passes.
    fn new(context: &Context, index: usize, prompt: &[u32]) -> Self {
        let mut tokens = prompt.to_vec();
        tokens.rotate_left(index);
        tokens.truncate([80, 33, 64, 7][index % 4]);
        let options = SessionOptions {
            prefill_chunk: [512, 5, 16][index % 3],
            ..exact()
        };
        let alone = Session::new(Arc::clone(context.model()), &options);
        Self {
            joins: index * 2,
            tokens,
            batched: context.sequence(),
            alone: alone.expect("good options"),
        }
    }

    /// Returns how many tokens it takes in a pass: one, or a piece of a prompt.
    fn takes(&self, pass: usize) -> usize {
        let left = self.tokens.len() - self.alone.tokens().len();
        left.min([1, 20, 1, 3, 1, 1, 9][(pass + self.joins) % 7])
    }
}

fn new_context(model: &Arc<Model>, prefill_chunk: usize) -> Context {
    let options = SessionOptions {
        prefill_chunk,
        ..exact()
    };
    Context::new(Arc::clone(model), &options).expect("good options")
}

/// They take turns on the three threads of one device.
#[test]
fn callers_at_once_get_what_one_gets_alone() {
    let cpu = Cpu::new(Kernels::best(), 3);
    let weights = source("qwen3");
    let model = Model::load_on(cpu, config("qwen3"), &weights).unwrap();
    let model = Arc::new(model);
    let case = cases("qwen3").pop().unwrap();
    let expected = session(&model).forward(&case.prompt).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let logits = session(&model).forward(&case.prompt).unwrap();
                    assert_eq!(logits, expected);
                }
            });
        }
    });
}

#[test]
fn logits_are_those_of_a_sequence_alone() {
    for (name, _) in MODELS {
        let model = model(name);
        let vocab = model.config().vocab_size;
        let prompt = cases(name).pop().unwrap().prompt;
        for count in [1, 2, 3, 5, 9] {
            let mut context = new_context(&model, [512, 5, 16][count % 3]);
            let mut twins: Vec<_> = (0..count)
                .map(|i| Twin::new(&context, i, &prompt))
                .collect();
            let mut logits = Vec::new();
            let mut worst = 0f32;
            let mut pass = 0;
            while twins.iter().any(|twin| twin.takes(pass) > 0) {
                let mut expected = Vec::new();
                let mut parts = Vec::new();
                for twin in twins.iter_mut().filter(|twin| twin.joins <= pass) {
                    let n = twin.takes(pass);
                    let start = twin.alone.tokens().len();
                    let tokens = &twin.tokens[start..start + n];
                    if n > 0 {
                        expected.extend(twin.alone.prefill(tokens).unwrap());
                        parts.push((&mut twin.batched, tokens));
                    }
                }
                context
                    .extend(&mut parts, Logits::Last, &mut logits)
                    .unwrap();
                assert_eq!(logits.len(), parts.len() * vocab);
                worst = worst.max(largest_difference(&logits, &expected));
                pass += 1;
            }
            println!("{name}, {count} sequences: largest difference {worst:.1e}");
            assert!(worst <= CUT_TOLERANCE, "{name} {count}: {worst}");
            assert!(twins.iter().all(|t| t.batched.tokens() == t.tokens));
        }
    }
}

/// One sequence crosses the longrope switch, where the cache is recomputed, while another
/// stays below it.
#[test]
fn every_sequence_has_its_own_frequencies() {
    let model = model("phi4-mini-longrope");
    let prompts =
        [28, 3].map(|n| -> Vec<u32> { (0..n).map(|i| 3 + (i * 37 + 11) % 250).collect() });
    let mut context = new_context(&model, 512);
    let [mut long, mut short] = [context.sequence(), context.sequence()];
    let [mut long_alone, mut short_alone] = [session(&model), session(&model)];
    let mut logits = Vec::new();
    let mut pieces = prompts.clone();
    for step in 0..12 {
        let [a, b] = &pieces;
        let parts = &mut [(&mut long, &a[..]), (&mut short, &b[..])];
        context.extend(parts, Logits::Last, &mut logits).unwrap();
        let expected = [
            long_alone.prefill(a).unwrap(),
            short_alone.prefill(b).unwrap(),
        ]
        .concat();
        let difference = largest_difference(&logits, &expected);
        assert!(difference <= CUT_TOLERANCE, "step {step}: {difference}");
        pieces = [vec![step + 3], vec![step + 90]];
    }
    assert_eq!((long.tokens().len(), short.tokens().len()), (39, 14));
}

#[test]
fn after_an_error_every_sequence_is_as_before() {
    let name = "mistral";
    let model = model(name);
    let interrupt = Arc::new(AtomicBool::new(false));
    let small = SessionOptions {
        context: Some(42),
        interrupt: Some(Arc::clone(&interrupt)),
        ..exact()
    };
    let prompt = cases(name).pop().unwrap().prompt;
    let mut context = Context::new(Arc::clone(&model), &small).unwrap();
    let (mut one, mut two) = (context.sequence(), context.sequence());
    let mut stranger = new_context(&model, 512).sequence();
    let (prompt, mut logits) = (&prompt[..40], Vec::new());
    let parts = &mut [(&mut one, &prompt[..30]), (&mut two, prompt)];
    context.extend(parts, Logits::Last, &mut logits).unwrap();
    let mut refused = |tokens: &[u32], kind: ErrorKind| {
        let mut parts = [(&mut one, &[5, 6][..]), (&mut two, tokens)];
        let error = context.extend(&mut parts, Logits::Last, &mut logits);
        let error = error.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(one.tokens(), &prompt[..30]);
        assert_eq!(two.tokens(), prompt);
        let mut parts = [(&mut one, &[5, 6][..]), (&mut stranger, &[1])];
        let error = context.extend(&mut parts, Logits::Last, &mut logits);
        let error = error.unwrap_err();
        assert!(error.to_string().contains("another context"), "{error}");
        assert!(one.tokens() == &prompt[..30] && stranger.tokens().is_empty());
    };
    refused(&[], ErrorKind::Argument);
    refused(&[256], ErrorKind::Argument);
    refused(&[1, 2, 3], ErrorKind::Argument);
    interrupt.store(true, Ordering::Relaxed);
    refused(&[1], ErrorKind::Interrupted);
    interrupt.store(false, Ordering::Relaxed);

    let mut parts = [(&mut one, &[5, 6][..]), (&mut two, &[7])];
    context
        .extend(&mut parts, Logits::Last, &mut logits)
        .unwrap();
    let mut expected = Vec::new();
    for (prompt, tokens) in [(&prompt[..30], &[5, 6][..]), (prompt, &[7])] {
        let mut alone = session(&model);
        expected.extend(alone.prefill(&[prompt, tokens].concat()).unwrap());
    }
    assert!(largest_difference(&logits, &expected) <= CUT_TOLERANCE);

    context.extend(&mut [], Logits::Last, &mut logits).unwrap();
    assert!(logits.is_empty());
}

/// A fork diverges from the middle of a block on, and costs only what differs.
#[test]
fn forks_share_what_they_have_in_common() {
    for (name, _) in MODELS {
        let model = model(name);
        let prompt = &cases(name).pop().unwrap().prompt[..22];
        let mut context = new_context(&model, 512);
        let mut logits = Vec::new();
        let mut one = context.sequence();
        let parts = &mut [(&mut one, prompt)];
        context.extend(parts, Logits::Last, &mut logits).unwrap();
        let used = context.cache_bytes();
        let mut two = one.clone();
        assert_eq!(context.cache_bytes(), used, "{name}");
        let parts = &mut [(&mut one, &[5, 6][..]), (&mut two, &[7, 8])];
        context.extend(parts, Logits::All, &mut logits).unwrap();
        assert!(context.cache_bytes() < 2 * used, "{name}");
        let mut expected = Vec::new();
        for tokens in [[5, 6], [7, 8]] {
            let mut alone = session(&model);
            alone.prefill(prompt).unwrap();
            expected.extend(alone.forward(&tokens).unwrap());
        }
        let difference = largest_difference(&logits, &expected);
        assert!(difference <= CUT_TOLERANCE, "{name}: {difference}");
        drop((one, two));
        assert_eq!(context.cache_bytes(), 0, "{name}");
    }
}
