//! Every order of events in the hand-over of a loop to a team of threads, tried by the model checker loom.
//!
//! `cargo test --release -p upg_loom` compiles `upg_kernel/src/cpu/team/handover.rs` with loom's primitives in the place of
//! those of the standard library. Loom then runs each test under every schedule and every value that the memory model
//! lets a load return, and watches the accesses to the job: two at once, of which one writes, are an error, as is a
//! thread that sleeps for ever.

#[cfg(test)]
mod team;
