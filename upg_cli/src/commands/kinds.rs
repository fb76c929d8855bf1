//! Kinds of matrices: those whose names differ only in the number of the layer.
#![forbid(unsafe_code)]

/// Most layers that are told apart; a name may have any number.
const MAX_LAYERS: usize = 1 << 16;

/// Splits a name into that of its kind and the number of its layer:
/// `model.layers.3.mlp.up_proj.weight` is `mlp.up_proj` of layer 3.
pub fn split(name: &str) -> (String, usize) {
    let plain = name.strip_suffix(".weight").unwrap_or(name);
    let parts = plain.split_once(".layers.").and_then(|(_, rest)| {
        let (number, kind) = rest.split_once('.')?;
        let number = number.parse().ok().filter(|n| *n < MAX_LAYERS)?;
        Some((kind, number))
    });
    let (kind, number) = parts.unwrap_or((plain, 0));
    (kind.escape_debug().to_string(), number)
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn names_are_split_at_the_layer() {
        let of = split;
        assert_eq!(
            of("model.layers.3.mlp.up_proj.weight"),
            ("mlp.up_proj".into(), 3)
        );
        assert_eq!(
            of("model.embed_tokens.weight"),
            ("model.embed_tokens".into(), 0)
        );
        assert_eq!(
            of("model.layers.99999999.x"),
            ("model.layers.99999999.x".into(), 0)
        );
        assert_eq!(of("a\nb"), ("a\\nb".into(), 0));
    }
}
