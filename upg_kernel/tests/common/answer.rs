//! The tokens of an answer.

use upg_kernel::inference::{Event, FinishReason, Request, Scheduler, Timings};

/// Computes a request to its end, alone.
pub(crate) fn answer(
    scheduler: &mut Scheduler,
    request: Request,
) -> (Vec<u32>, FinishReason, Timings) {
    scheduler.submit(request).expect("a good request");
    let mut tokens = Vec::new();
    loop {
        for (_, event) in scheduler.step() {
            match event {
                Event::Token(token, _) => tokens.push(token),
                Event::Text(_) => {}
                Event::Finished(reason, timings) => return (tokens, reason, timings),
                other => panic!("{other:?}"),
            }
        }
    }
}
