//! Sampling options that a model recommends in its `generation_config.json`.
#![forbid(unsafe_code)]

use super::sampler::SamplingOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::format::json;
use serde_json::Value;

const NAME: &str = "generation_config.json";

impl SamplingOptions {
    /// Returns common options for conversations: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05.
    pub fn chat() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            ..Self::default()
        }
    }

    /// Returns the options that a `generation_config.json` recommends.
    ///
    /// Uses `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`. If the
    /// file names one of the middle four, those that it does not name are off; if it names none,
    /// they are those of [`SamplingOptions::chat`]. `do_sample: false` is greedy. Values that are
    /// out of range are left out, with a warning in the log.
    ///
    /// Errors: `Malformed` if it is not a JSON object.
    pub fn from_generation_config(text: &str) -> Result<Self> {
        let keys = [
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
        ];
        let fields = match json::value(NAME, text)? {
            Value::Object(fields) => fields,
            _ => {
                let message = format!("{NAME}: not a JSON object");
                return Err(Error::new(ErrorKind::Malformed, message));
            }
        };
        let number = |key: &str| fields.get(key).and_then(Value::as_f64).map(|x| x as f32);
        let filters = keys[1..5].iter().any(|key| number(key).is_some());
        let mut options = match filters {
            true => Self {
                temperature: 1.0,
                ..Self::default()
            },
            false => Self::chat(),
        };
        for key in &keys[1..] {
            let Some(value) = number(key) else { continue };
            let mut changed = options.clone();
            match *key {
                "temperature" => changed.temperature = value,
                "top_k" => changed.top_k = value as usize,
                "top_p" => changed.top_p = value,
                "min_p" => changed.min_p = value,
                _ => changed.repetition_penalty = value,
            }
            match changed.check() {
                Ok(()) => options = changed,
                Err(e) => log::warn!("{NAME}: {e}; ignored"),
            }
        }
        if fields.get("do_sample").and_then(Value::as_bool) == Some(false) {
            options.temperature = 0.0;
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_file_and_off_where_it_names_others() {
        let of = |text| SamplingOptions::from_generation_config(text).unwrap();
        assert_eq!(of("{}"), SamplingOptions::chat());
        let found = of(r#"{"temperature": 0.6, "top_p": 0.9, "top_k": null, "eos_token_id": 3}"#);
        let expected = SamplingOptions {
            temperature: 0.6,
            top_p: 0.9,
            ..SamplingOptions::default()
        };
        assert_eq!(found, expected);
        let found = of(r#"{"top_k": 20}"#);
        assert_eq!(
            (found.temperature, found.top_k, found.top_p),
            (1.0, 20, 1.0)
        );
        let found = of(r#"{"repetition_penalty": 1.05}"#);
        assert_eq!((found.temperature, found.repetition_penalty), (0.8, 1.05));
        let found = of(r#"{"do_sample": false, "temperature": 0.6}"#);
        assert_eq!(found.temperature, 0.0);
    }

    #[test]
    fn values_out_of_range_are_left_out() {
        let of = |text| SamplingOptions::from_generation_config(text).unwrap();
        let found = of(r#"{"temperature": -1, "top_p": 7.5, "top_k": -1, "min_p": 0.1}"#);
        assert_eq!((found.temperature, found.top_p, found.top_k), (1.0, 1.0, 0));
        assert_eq!(found.min_p, 0.1);
        assert!(SamplingOptions::from_generation_config("[]").is_err());
    }
}
