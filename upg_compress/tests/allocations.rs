//! A generation step allocates nothing, with any encoding.
//!
//! This is the only test of this program, because every allocation of the process is counted.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../upg_kernel/tests/common/counting.rs"]
mod counting;
#[path = "../../upg_kernel/tests/common/data.rs"]
mod data;

use counting::allocations;
use data::data;
use std::sync::Arc;
use upg_compress::{CompressOptions, compress, source};
use upg_kernel::UPGModel;
use upg_kernel::format::Encoding;
use upg_kernel::inference::{Context, Logits, SessionOptions};

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

#[test]
fn a_step_allocates_nothing() {
    // A thread allocates its scratch when it takes its first task, at a random time.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    pool.build_global().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let source = source::open(data("tiny-models/phi3")).unwrap();
    for encoding in ["keep"]
        .into_iter()
        .chain(Encoding::ALL.map(Encoding::name))
    {
        let out = folder.path().join(encoding);
        let options = CompressOptions::new(encoding.parse().unwrap());
        compress(source.as_ref(), &out, &options, &()).unwrap();
        let model = UPGModel::from_file(&out).unwrap();
        let mut session = model.session(&SessionOptions::default()).unwrap();
        let mut logits = session.prefill(&[7; 20]).unwrap();
        // Scratch in the sizes of a step; the cache has room for whole blocks of 16.
        session.step_into(1, &mut logits).unwrap();
        let before = allocations();
        for token in 2..10 {
            session.step_into(token, &mut logits).unwrap();
        }
        assert_eq!(allocations(), before, "{encoding}");

        let decoder = Arc::clone(model.model());
        let mut context = Context::new(decoder, &SessionOptions::default()).unwrap();
        let (mut one, mut other) = (context.sequence(), context.sequence());
        let mut step = |a: &[u32], b: &[u32], logits: &mut Vec<f32>| {
            let mut parts = [(&mut one, a), (&mut other, b)];
            context.extend(&mut parts, Logits::Last, logits).unwrap();
        };
        // The prompt of one is computed while the other one takes a step.
        step(&[1], &[7; 18], &mut logits);
        step(&[1], &[1], &mut logits);
        let before = allocations();
        step(&[2], &[3], &mut logits);
        assert_eq!(allocations(), before, "{encoding}");
    }
    assert!(allocations() > 0);
}
