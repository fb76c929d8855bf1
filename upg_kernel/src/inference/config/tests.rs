use super::*;
use serde_json::json;

fn parse(config: &Value) -> Result<ModelConfig> {
    ModelConfig::from_json(&config.to_string(), None)
}

/// Returns a small valid config of a family, with keys replaced; `null` removes a key.
fn with(family: &str, changes: Value) -> Value {
    let mut config = json!({
        "model_type": family, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "eos_token_id": 2, "sliding_window": null,
    });
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
    config
}

/// Shapes of one published model.
struct Published {
    json: &'static str,
    family: &'static str,
    /// Sizes: vocab, hidden, intermediate, layers, heads, key/value heads,
    /// head dimension, context.
    sizes: [usize; 8],
    theta: f64,
    rotated: usize,
    tied: bool,
    window: Option<usize>,
    eos: u32,
}

/// The configs have the keys and values of the published models that affect the arithmetic.
///
/// The exception is the longrope factors of Phi-4-mini, which only have the right number.
#[test]
fn published_configs_have_their_known_shapes() {
    let models = [
        Published {
            json: include_str!("published/smollm2-135m.json"),
            family: "llama",
            sizes: [49152, 576, 1536, 30, 9, 3, 64, 8192],
            theta: 100_000.0,
            rotated: 64,
            tied: true,
            window: None,
            eos: 0,
        },
        Published {
            json: include_str!("published/llama-3.2-1b.json"),
            family: "llama",
            sizes: [128_256, 2048, 8192, 16, 32, 8, 64, 131_072],
            theta: 500_000.0,
            rotated: 64,
            tied: true,
            window: None,
            eos: 128_001,
        },
        Published {
            json: include_str!("published/mistral-7b-v0.1.json"),
            family: "mistral",
            sizes: [32000, 4096, 14336, 32, 32, 8, 128, 32768],
            theta: 10_000.0,
            rotated: 128,
            tied: false,
            window: Some(4096),
            eos: 2,
        },
        Published {
            json: include_str!("published/qwen2.5-0.5b.json"),
            family: "qwen2",
            sizes: [151_936, 896, 4864, 24, 14, 2, 64, 32768],
            theta: 1_000_000.0,
            rotated: 64,
            tied: true,
            window: None,
            eos: 151_643,
        },
        Published {
            json: include_str!("published/qwen3-0.6b.json"),
            family: "qwen3",
            sizes: [151_936, 1024, 3072, 28, 16, 8, 128, 40960],
            theta: 1_000_000.0,
            rotated: 128,
            tied: true,
            window: None,
            eos: 151_645,
        },
        Published {
            json: include_str!("published/phi-4.json"),
            family: "phi3",
            sizes: [100_352, 5120, 17920, 40, 40, 10, 128, 16384],
            theta: 250_000.0,
            rotated: 128,
            tied: false,
            window: None,
            eos: 100_265,
        },
        Published {
            json: include_str!("published/phi-4-mini.json"),
            family: "phi3",
            sizes: [200_064, 3072, 8192, 32, 24, 8, 128, 131_072],
            theta: 10_000.0,
            rotated: 96,
            tied: true,
            // 262,144 has no effect in a context of 131,072.
            window: None,
            eos: 199_999,
        },
    ];
    for model in models {
        let c = ModelConfig::from_json(model.json, None).unwrap();
        assert_eq!(c.family.name, model.family);
        let sizes = [
            c.vocab_size,
            c.hidden_size,
            c.intermediate_size,
            c.num_layers,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.context,
        ];
        assert_eq!(sizes, model.sizes);
        assert_eq!((c.rope.theta, c.rope.dim), (model.theta, model.rotated));
        assert_eq!(c.tie_word_embeddings, model.tied);
        assert_eq!(c.windows, vec![model.window; c.num_layers]);
        assert_eq!(c.eos_ids, [model.eos]);
        assert_eq!(c.qkv_bias, model.family == "qwen2");
        assert!(!c.output_bias && !c.mlp_bias);
    }
}

#[test]
fn longrope_of_phi_4_mini() {
    let config = ModelConfig::from_json(include_str!("published/phi-4-mini.json"), None).unwrap();
    let RopeScaling::LongRope {
        short,
        long,
        original_context,
        attention_factor,
    } = config.rope.scaling
    else {
        panic!("not longrope");
    };
    assert_eq!((short.len(), long.len(), original_context), (48, 48, 4096));
    // sqrt(1 + ln(32) / ln(4096)) = sqrt(1 + 5 / 12)
    assert!((attention_factor - (17.0f64 / 12.0).sqrt()).abs() < 1e-12);
}

#[test]
fn end_ids_come_from_the_generation_config_first() {
    let config = with("llama", json!({"eos_token_id": [7, 8], "bos_token_id": 1})).to_string();
    let eos = |generation| {
        let config = ModelConfig::from_json(&config, generation).unwrap();
        assert_eq!(config.bos_id, Some(1));
        config.eos_ids
    };
    assert_eq!(eos(None), [7, 8]);
    assert_eq!(
        eos(Some(r#"{"eos_token_id": [100257, 7]}"#)),
        [100_257, 7, 8]
    );
    assert_eq!(eos(Some(r#"{"eos_token_id": 5}"#)), [5, 7, 8]);
    assert_eq!(eos(Some(r#"{"eos_token_id": null}"#)), [7, 8]);
    assert_eq!(eos(Some("{}")), [7, 8]);
    let none = with("llama", json!({"eos_token_id": null}));
    assert!(parse(&none).unwrap().eos_ids.is_empty());
    for bad in ["[", "7", r#"{"eos_token_id": "end"}"#] {
        assert!(ModelConfig::from_json(&config, Some(bad)).is_err());
    }
}

#[test]
fn old_and_new_spelling_of_the_rotary_embedding_are_one() {
    let factors = json!([1.0, 1.1, 1.2]);
    let scalings = [
        ("llama", json!({"rope_type": "default"}), json!({})),
        (
            "qwen2",
            json!({"rope_type": "linear", "factor": 2.0}),
            json!({}),
        ),
        (
            "llama",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
            json!({}),
        ),
        (
            "qwen3",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
            json!({}),
        ),
        (
            "phi3",
            json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors}),
            json!({"original_max_position_embeddings": 32, "partial_rotary_factor": 0.75}),
        ),
    ];
    for (family, scaling, outer) in scalings {
        let mut old = with(family, outer.clone());
        old["rope_theta"] = json!(5e5);
        old["rope_scaling"] = scaling.clone();
        let mut new = with(family, json!({"rope_theta": null}));
        new["rope_parameters"] = scaling.clone();
        new["rope_parameters"]["rope_theta"] = json!(5e5);
        for (key, value) in outer.as_object().unwrap() {
            new["rope_parameters"][key] = value.clone();
        }
        let mut older = old.clone();
        let name = older["rope_scaling"]["rope_type"].take();
        older["rope_scaling"]["type"] = name;
        let expected = parse(&old).unwrap();
        assert_eq!(expected.rope.theta, 5e5);
        assert_eq!(parse(&new).unwrap(), expected, "{scaling}");
        assert_eq!(parse(&older).unwrap(), expected, "{scaling}");
    }
    // Up to max_position_embeddings, dynamic scaling changes nothing.
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    assert_eq!(
        parse(&with("llama", dynamic)).unwrap(),
        parse(&with("llama", json!({}))).unwrap()
    );
    // Early Phi-3 files call longrope by other names.
    let su = json!({"rope_scaling":
        {"type": "su", "short_factor": vec![1.0; 4], "long_factor": vec![2.0; 4]}});
    let su = parse(&with("phi3", su)).unwrap();
    assert!(matches!(su.rope.scaling, RopeScaling::LongRope { .. }));
}

#[test]
fn yarn_extends_the_context() {
    let yarn = |original| {
        let yarn = json!({"rope_scaling":
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}});
        parse(&with("qwen2", yarn)).unwrap().context
    };
    assert_eq!((yarn(128), yarn(16)), (512, 128));
}

/// Source: `_compute_yarn_parameters` of transformers 5.24.
#[test]
fn rotary_keys_that_change_nothing() {
    let yarn = |more: Value| {
        let mut scaling = json!({"type": "yarn", "factor": 4.0});
        scaling
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        parse(&with("llama", json!({"rope_scaling": scaling}))).unwrap()
    };
    let plain = yarn(json!({}));
    for same in [
        json!({"mscale": 1.0, "mscale_all_dim": 0}),
        json!({"mscale": 0.0, "mscale_all_dim": 0.7}),
        json!({"beta_fast": 0, "beta_slow": 0}),
        json!({"unheard_of": null, "unknown": false, "other": [], "more": {}}),
    ] {
        assert_eq!(yarn(same), plain);
    }
    let ignored = yarn(json!({"attn_factor": 0.87}));
    assert_eq!(ignored.rope, plain.rope);
    assert!(plain.notes.is_empty());
    assert_eq!(
        ignored.notes,
        ["config.json: 'attn_factor' of the rotary embedding is ignored, as in transformers"]
    );
}

#[test]
fn windows_by_family() {
    let windows = |family, changes| parse(&with(family, changes)).unwrap().windows;
    let (none, sixteen) = (None, Some(16));
    assert_eq!(
        windows("mistral", json!({"sliding_window": 16})),
        [sixteen; 4]
    );
    assert_eq!(windows("phi3", json!({"sliding_window": 16})), [sixteen; 4]);
    assert_eq!(
        windows("mistral", json!({"sliding_window": 128})),
        [none; 4]
    );
    assert_eq!(windows("llama", json!({"sliding_window": 4096})), [none; 4]);
    assert_eq!(windows("qwen2", json!({"sliding_window": 16})), [none; 4]);
    let used = json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(windows("qwen2", used), [none, none, none, sixteen]);
    let all = json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 0});
    assert_eq!(windows("qwen3", all), [sixteen; 4]);
    let (full, sliding) = ("full_attention", "sliding_attention");
    let types = json!({"sliding_window": 16, "use_sliding_window": true,
        "layer_types": [sliding, full, sliding, full]});
    assert_eq!(windows("qwen3", types), [sixteen, none, sixteen, none]);
    for off in [json!(0), json!(-1)] {
        assert_eq!(
            windows("mistral", json!({"sliding_window": off})),
            [none; 4]
        );
        assert_eq!(windows("qwen2", json!({"sliding_window": off})), [none; 4]);
    }
    for unused in [json!(16), json!("any")] {
        let unused = json!({"sliding_window": unused, "use_sliding_window": false});
        assert_eq!(windows("llama", unused.clone()), [none; 4]);
        assert_eq!(windows("qwen2", unused), [none; 4]);
    }
    // The family has no such switch.
    let switch = json!({"sliding_window": 16, "use_sliding_window": false});
    assert_eq!(windows("mistral", switch), [sixteen; 4]);
    // An absent window is 4,096 for Mistral.
    let long = json!({"sliding_window": null, "max_position_embeddings": 8192});
    assert_eq!(windows("mistral", long), [Some(4096); 4]);
}

#[test]
fn bad_configs_give_their_kind_of_error() {
    use ErrorKind::{Invalid, Malformed, Missing, TooLarge, Unsupported};
    let rope = |scaling: Value| json!({ "rope_scaling": scaling });
    let cases = [
        ("llama", json!({"model_type": null}), Missing),
        ("mamba", json!({}), Unsupported),
        ("llama", json!({"model_type": 3}), Invalid),
        ("llama", json!({"vocab_size": null}), Missing),
        ("llama", json!({"num_hidden_layers": null}), Missing),
        ("llama", json!({"max_position_embeddings": null}), Missing),
        ("llama", json!({"hidden_size": 0}), Invalid),
        ("llama", json!({"hidden_size": -64}), Invalid),
        ("llama", json!({"hidden_size": 64.5}), Invalid),
        ("llama", json!({"hidden_size": "64"}), Invalid),
        ("llama", json!({"hidden_size": 65}), Invalid),
        ("llama", json!({"num_key_value_heads": 3}), Invalid),
        ("llama", json!({"num_key_value_heads": 16}), Invalid),
        ("llama", json!({"head_dim": 7}), Invalid),
        ("llama", json!({"num_hidden_layers": 1_000_000}), TooLarge),
        ("llama", json!({"vocab_size": u64::MAX}), TooLarge),
        ("llama", json!({"hidden_size": 1u64 << 40}), TooLarge),
        ("llama", json!({"intermediate_size": 1u64 << 40}), TooLarge),
        (
            "llama",
            json!({"max_position_embeddings": 1u64 << 60}),
            TooLarge,
        ),
        ("llama", json!({"num_attention_heads": 1 << 20}), TooLarge),
        ("llama", json!({"head_dim": 1 << 20}), TooLarge),
        (
            "llama",
            json!({"hidden_size": 1 << 17, "num_attention_heads": 1, "head_dim": null}),
            TooLarge,
        ),
        ("llama", json!({"rms_norm_eps": 0.0}), Invalid),
        ("llama", json!({"rms_norm_eps": 1e-60}), Invalid),
        ("llama", json!({"rope_theta": -1.0}), Invalid),
        ("llama", json!({"rope_theta": 0.5}), Invalid),
        ("llama", json!({"tie_word_embeddings": "yes"}), Invalid),
        ("llama", json!({"hidden_act": "gelu"}), Unsupported),
        (
            "llama",
            json!({"attention_multiplier": 0.0078125}),
            Unsupported,
        ),
        ("llama", json!({"logits_scaling": 8.0}), Unsupported),
        ("mistral", json!({"num_local_experts": 8}), Unsupported),
        ("qwen3", json!({"num_experts": 128}), Unsupported),
        (
            "llama",
            json!({"quantization_config": {"bits": 4}}),
            Unsupported,
        ),
        ("qwen2", json!({"use_mrope": true}), Unsupported),
        ("llama", json!({"sliding_window": 16}), Unsupported),
        ("mistral", json!({"sliding_window": -2}), Invalid),
        ("mistral", json!({"sliding_window": "none"}), Invalid),
        ("llama", json!({"partial_rotary_factor": 0.5}), Unsupported),
        ("phi3", json!({"partial_rotary_factor": 1.5}), Invalid),
        ("phi3", json!({"partial_rotary_factor": 0.01}), Invalid),
        ("llama", json!({"eos_token_id": -1}), Invalid),
        ("llama", json!({"eos_token_id": vec![1; 1000]}), TooLarge),
        ("llama", json!({"layer_types": ["full_attention"]}), Invalid),
        (
            "llama",
            json!({"layer_types": vec!["linear_attention"; 4]}),
            Unsupported,
        ),
        (
            "qwen3",
            json!({"layer_types": vec!["sliding_attention"; 4]}),
            Invalid,
        ),
        (
            "mistral",
            json!({"sliding_window": 16, "layer_types": vec!["full_attention"; 4]}),
            Unsupported,
        ),
        ("llama", json!({"rope_scaling": 3}), Invalid),
        ("llama", rope(json!({"type": "new"})), Unsupported),
        ("llama", rope(json!({"type": "linear"})), Missing),
        (
            "llama",
            rope(json!({"type": "linear", "factor": 0.0})),
            Invalid,
        ),
        (
            "llama",
            rope(json!({"type": "default", "mrope_section": [1, 2]})),
            Unsupported,
        ),
        (
            "llama",
            rope(json!({"full_attention": {"rope_theta": 1e4}})),
            Unsupported,
        ),
        (
            "llama",
            rope(json!({"rope_type": "llama3", "factor": 8.0})),
            Missing,
        ),
        (
            "llama",
            rope(
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0}),
            ),
            Invalid,
        ),
        (
            "llama",
            rope(json!({"type": "yarn", "factor": 1e9})),
            TooLarge,
        ),
        (
            "llama",
            rope(json!({"type": "longrope", "short_factor": [1], "long_factor": [2]})),
            Unsupported,
        ),
        ("phi3", rope(json!({"type": "longrope"})), Missing),
        (
            "phi3",
            rope(json!({"type": "longrope", "short_factor": [1], "long_factor": [1]})),
            Invalid,
        ),
        (
            "phi3",
            rope(json!({"type": "longrope", "short_factor": [1, 1, 1, 0],
                "long_factor": [1, 1, 1, 1]})),
            Invalid,
        ),
    ];
    for (family, changes, kind) in cases {
        let error = parse(&with(family, changes.clone())).expect_err(&changes.to_string());
        assert_eq!(error.kind(), kind, "{family} {changes}: {error}");
        assert!(error.to_string().starts_with("config.json: "), "{error}");
        assert!(error.to_string().len() < 250, "{error}");
    }
    for text in ["", "{", "[]", "null", &"[".repeat(100_000)] {
        let error = ModelConfig::from_json(text, None).unwrap_err();
        assert_eq!(error.kind(), Malformed);
    }
    let error = parse(&with("mamba", json!({}))).unwrap_err().to_string();
    assert!(error.contains("'mamba'") && error.contains("llama, mistral, qwen2, qwen3, phi3"));
    // Numbers that JSON lacks are refused where they count.
    let bad = with("llama", json!({"rope_theta": 123.0})).to_string();
    let error = ModelConfig::from_json(&bad.replace("123.0", "Infinity"), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "config.json: 'rope_theta' is \"Infinity\", expected a finite number above 0"
    );
    let unused = with("llama", json!({"limit": [0, 123.0]})).to_string();
    ModelConfig::from_json(&unused.replace("123.0", "-Infinity"), None).unwrap();
    // Settings that do not change the arithmetic are accepted.
    let harmless = json!({"logits_scaling": 1.0, "num_local_experts": 0, "use_mrope": false,
        "quantization_config": {}, "hidden_act": "swish", "unheard_of": [1, 2]});
    parse(&with("llama", harmless)).unwrap();
}
