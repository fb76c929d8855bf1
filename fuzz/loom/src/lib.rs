//! Model checking of the hand-over of a loop to a team of threads, with loom.
//!
//! `cargo test --release -p upg_loom` compiles `upg_kernel/src/cpu/team/handover.rs` with loom's
//! primitives instead of those of the standard library. Loom then runs each test under every
//! schedule and every value that the memory model lets a load return. It checks the accesses to the
//! job: two at once, of which one writes, are an error, as is a thread that sleeps for ever.

#[cfg(test)]
mod team;
