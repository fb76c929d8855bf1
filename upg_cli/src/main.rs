//! The `upg` command.

fn main() {}
