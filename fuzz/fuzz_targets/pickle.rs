#![no_main]

libfuzzer_sys::fuzz_target!(init: upg_fuzz::init(), |data: &[u8]| upg_fuzz::targets::pickle::run(data));
