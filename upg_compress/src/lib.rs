//! Makes UPG files: reads models, rounds their weights and writes them as one file.

pub mod source;
