//! Arguments of the kernels: the Rust version of `kernels/spmv_args.h`, which describes them.
#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use std::mem::{offset_of, size_of};

/// Defines a struct and asserts the offsets of its fields.
macro_rules! arguments {
    ($(#[$doc:meta])* $name:ident: $size:literal { $($field:ident: $type:ty = $offset:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
        #[repr(C)]
        #[allow(missing_docs, reason = "they are described in the header")]
        pub struct $name {
            $(pub $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };

        impl $name {
            /// Assertions that the header must contain.
            #[cfg(test)]
            const ASSERTED: &[&str] = &[
                concat!("UPG_SIZE(Upg", stringify!($name), ", ", stringify!($size), ");"),
                $(concat!(
                    "UPG_AT(Upg", stringify!($name), ", ", stringify!($field), ", ", stringify!($offset), ");"
                ),)*
            ];
        }
    };
}

arguments! {
    /// Arguments of `mdcsr_*` (`UpgSparseArgs`).
    SparseArgs: 28 {
        rows: u32 = 0,
        cols: u32 = 4,
        vectors: u32 = 8,
        x_stride: u32 = 12,
        y_stride: u32 = 16,
        entries: u32 = 20,
        window: u32 = 24,
    }
}

arguments! {
    /// Arguments of all packed encodings (`UpgStripArgs`).
    StripArgs: 40 {
        rows: u32 = 0,
        cols: u32 = 4,
        vectors: u32 = 8,
        x_stride: u32 = 12,
        y_stride: u32 = 16,
        group: u32 = 20,
        groups: u32 = 24,
        strip_bytes: u32 = 28,
        multiplier: u32 = 32,
        stored: u32 = 36,
    }
}

arguments! {
    /// Arguments of `rotate_*` (`UpgRotateArgs`).
    RotateArgs: 36 {
        first: u32 = 0,
        size: u32 = 4,
        cols: u32 = 8,
        copies: u32 = 12,
        x_stride: u32 = 16,
        y_stride: u32 = 20,
        block: u32 = 24,
        radix: u32 = 28,
        factor: f32 = 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_asserts_the_same_sizes_and_places() {
        let header = include_str!("../../kernels/spmv_args.h");
        let found: Vec<&str> = header
            .lines()
            .filter(|line| line.starts_with("UPG_"))
            .collect();
        let all = [
            SparseArgs::ASSERTED,
            StripArgs::ASSERTED,
            RotateArgs::ASSERTED,
        ];
        assert_eq!(found, all.concat());
    }
}
