use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::*;

/// Far above the time of any template (up to two seconds): only a hang takes longer.
/// Nothing but a clock shows it: fuel counts instructions, whatever each of them takes.
const HANG: Duration = Duration::from_secs(60);

fn data(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat_templates");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn user(text: &str) -> Vec<Message> {
    vec![Message::new("user", text)]
}

/// Templates in the styles of published models, and one that covers the language, compared
/// with transformers.
#[test]
fn renders_as_transformers() {
    let file: Json = serde_json::from_str(&data("expected.json")).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 200);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let conversation = case["conversation"].as_str().unwrap();
        let messages: Vec<Message> =
            serde_json::from_value(file["conversations"][conversation].clone()).unwrap();
        let mut template = ChatTemplate::new(
            &data(&format!("{name}.jinja")),
            case["bos_token"].as_str(),
            case["eos_token"].as_str(),
        )
        .unwrap();
        if case["date"].is_array() {
            template = template.with_date(Date::new(2024, 7, 26).unwrap());
        }
        let generate = case["add_generation_prompt"].as_bool().unwrap();
        let found = template.render(&messages, generate);
        match case["refused"].as_str() {
            None => {
                let expected = case["expected"].as_str().unwrap();
                assert_eq!(found.unwrap(), expected, "{name} {conversation}");
            }
            Some(words) => {
                let e = found.unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
                assert!(e.to_string().ends_with(words), "{e}");
            }
        }
    }
}

#[test]
fn templates_see_no_clock_unless_told() {
    let source =
        "{% if strftime_now is defined %}{{ strftime_now('%F') }}{% else %}none{% endif %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "none");
    let template = template.with_date(Date::new(2025, 1, 2).unwrap());
    assert_eq!(template.render(&[], false).unwrap(), "2025-01-02");
}

#[test]
fn template_of_a_tokenizer_config() {
    let of = |config: &str| ChatTemplate::from_tokenizer_config(config);
    assert!(of("{}").unwrap().is_none());
    assert!(of(r#"{"chat_template": null}"#).unwrap().is_none());
    let config = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": [{"name": "tool_use", "template": "no"},
                          {"name": "default", "template": "{{ bos_token }}x{{ eos_token }}"}]}"#;
    let template = of(config).unwrap().unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "<s>x</s>");
    for bad in [
        "[",
        r#"{"chat_template": 1}"#,
        r#"{"chat_template": [{"name": "x", "template": "y"}]}"#,
    ] {
        assert_eq!(of(bad).unwrap_err().kind(), ErrorKind::Malformed, "{bad}");
    }
}

#[test]
fn what_is_no_chat_template_is_refused() {
    for source in [
        "{% if %}",
        "{{ 'open }}",
        "{% for m in messages %}",
        "{% include 'secret' %}",
        "{% import 'secret' as s %}",
        "{% extends 'secret' %}",
        "{% nothing %}",
    ] {
        let e = ChatTemplate::new(source, None, None).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Malformed, "{source}: {e}");
    }
    let long = "x".repeat(MAX_TEMPLATE_BYTES + 1);
    let e = ChatTemplate::new(&long, None, None).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TooLarge);
    for source in [
        "{{ open('/etc/passwd') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
        "{{ debug() }}",
        "{{ 'x' | nothing }}",
        "{{ messages | tojson(indent=99999999) }}",
    ] {
        let e = ChatTemplate::new(source, None, None)
            .and_then(|t| t.render(&user("hi"), true))
            .unwrap_err();
        assert!(
            matches!(e.kind(), ErrorKind::Invalid | ErrorKind::Malformed),
            "{source}: {e}"
        );
    }
}

/// Programs that would run for ever, or exhaust memory or the stack.
#[test]
fn hostile_templates_are_stopped() {
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000));
    let lists = format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000));
    let blocks = "{% if true %}".repeat(10_000) + &"{% endif %}".repeat(10_000);
    let sum = format!("{{{{ 1{} }}}}", "+1".repeat(60_000));
    let not = format!("{{{{ {}true }}}}", "not ".repeat(50_000));
    let filters = format!("{{{{ messages{} }}}}", "|list".repeat(40_000));
    let minus = format!("{{{{ {}1 }}}}", "-".repeat(100_000));
    let powers = format!("{{{{ 1{} }}}}", "**1".repeat(60_000));
    let elses = format!("{{{{ 1{} }}}}", " if 0 else 1".repeat(20_000));
    let elifs = "{% if a %}".to_owned() + &"{% elif a %}".repeat(20_000) + "{% endif %}";
    let dots = format!("{{{{ messages{} }}}}", ".a".repeat(100_000));
    let hostile = [
        (
            "nested loops",
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        ),
        ("huge range", "{{ range(10**12) | list | length }}"),
        ("step range", "{{ range(0, 10**18, 1) | join('x') }}"),
        ("long string", "{{ 'x' * 10**9 }}"),
        ("long string, other way", "{{ 10**9 * 'x' }}"),
        (
            "texts compared",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% for i in range(90000) %}{% if x == z %}{% endif %}{% endfor %}",
        ),
        (
            "texts ordered",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% for i in range(90000) %}{% if x < z %}{% endif %}{% endfor %}",
        ),
        (
            "texts in lists compared",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% set l = [x] %}{% set m = [z] %}{% for i in range(90000) %}{% if l == m %}{% endif %}{% endfor %}",
        ),
        (
            "a text tested",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% for i in range(90000) %}{% if x is lower %}{% endif %}{% endfor %}",
        ),
        (
            "texts compared by a test",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% for i in range(90000) %}{% if x is eq(z) %}{% endif %}{% endfor %}",
        ),
        (
            "a text searched by a test",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% for i in range(90000) %}{% if x is startingwith(z) %}{% endif %}{% endfor %}",
        ),
        (
            "a text indexed",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% for i in range(90000) %}{% if x[-1] %}{% endif %}{% endfor %}",
        ),
        (
            "a text looked up",
            "{% set x = 'a' * 10000000 %}{% set z = 'a' * 10000000 %}{% set d = {x: 1} %}{% for i in range(90000) %}{% if d[x] %}{% endif %}{% endfor %}",
        ),
        (
            "a namespace in itself",
            "{% set ns = namespace(a=1) %}{% set ns.s = ns if true else 0 %}{{ ns }}",
        ),
        (
            "a namespace in itself, other way",
            "{% set ns = namespace(a=1) %}{% set ns.s = ns or 0 %}{{ ns }}",
        ),
        (
            "deep tuples",
            "{% set ns = namespace(s=0) %}{% for i in range(100000) %}{% set ns.s = ns.s, 0 %}{% endfor %}{{ ns.s | length }}",
        ),
        (
            "deep namespaces",
            "{% set ns = namespace(s=0) %}{% for i in range(100000) %}{% set ns.s = namespace(a=ns.s) if true else 0 %}{% endfor %}",
        ),
        ("long list", "{{ ([1] * 10**9) | length }}"),
        (
            "folded constant",
            "{{ ('xxxxxxxxxx' * 100000000) | length }}",
        ),
        (
            "macro calls itself",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        ),
        (
            "macro doubles",
            "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x{% endmacro %}{{ m(60) }}",
        ),
        (
            "recursive loop",
            "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        ),
        (
            "doubling string",
            "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
        ),
        (
            "doubling list",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
        ),
        (
            "shared lists, printed",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        ),
        (
            "shared lists, joined",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ (ns.s ~ '') | length }}",
        ),
        (
            "shared lists, as text",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ (ns.s | string) | length }}",
        ),
        (
            "shared lists, str.join",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ','.join(ns.s) | length }}",
        ),
        (
            "shared lists, as JSON",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
        ),
        (
            "shared lists, compared",
            "{% set a = namespace(s=[1]) %}{% set b = namespace(s=[1]) %}{% for i in range(60) %}{% set a.s = [a.s, a.s] %}{% set b.s = [b.s, b.s] %}{% endfor %}{{ a.s == b.s }}",
        ),
        (
            "shared lists, as key",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ {ns.s: 1} }}",
        ),
        (
            "shared lists, message",
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ raise_exception(ns.s) }}",
        ),
        ("padding", "{{ '%999999999d' | format(1) }}"),
        ("padding, other way", "{{ '{:>999999999}'.format(1) }}"),
        ("indent", "{{ 'a\\nb' | indent(10**9) }}"),
        (
            "replace",
            "{{ ('x' * 10000).replace('', 'y' * 10000).replace('y', 'z' * 1000) | length }}",
        ),
        ("power", "{{ 10 ** 10 ** 10 }}"),
        (
            "much output",
            "{% for a in range(100000) %}{{ messages }}{{ messages }}{% endfor %}",
        ),
        ("parentheses", &nested),
        ("brackets", &lists),
        ("blocks", &blocks),
        ("not not", &not),
        ("attributes", &dots),
        ("minus minus", &minus),
        ("powers", &powers),
        ("else else", &elses),
        ("elif elif", &elifs),
        ("padding, computed", "{{ '{:>{}}'.format(1, 10**9) }}"),
        (
            "tuples",
            "{% set ns = namespace(s=(1, 2)) %}{% for i in range(60) %}{% set ns.s = ns.s, ns.s %}{% endfor %}{{ (ns.s ~ '') | length }}",
        ),
        (
            "maps",
            "{% set ns = namespace(s=1) %}{% for i in range(60) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}{{ (ns.s ~ '') | length }}",
        ),
        (
            "namespace in itself",
            "{% set ns = namespace() %}{% set ns.s = [ns] %}{{ ns }}",
        ),
        (
            "namespace in itself, straight",
            "{% set ns = namespace() %}{% set ns.s = ns %}{{ ns }}",
        ),
        (
            "macro makes lists",
            "{% macro m(s, n) %}{% if n > 0 %}{{ m([s, s, s, s, s, s, s, s], n - 1) }}{% else %}{{ (s ~ '') | length }}{% endif %}{% endmacro %}{{ m(1, 12) }}",
        ),
    ];
    for (name, source) in hostile {
        let start = Instant::now();
        let found = ChatTemplate::new(source, None, None)
            .and_then(|t| t.render(&user(&"word ".repeat(100)), true));
        assert!(start.elapsed() < HANG, "{name}");
        let e = found.map(|text| text.len()).expect_err(name);
        assert!(e.to_string().len() < 1000, "{name}: {e}");
    }
    // These may pass or fail, but must return.
    let many_elifs = "{% if a %}".to_owned() + &"{% elif a %}".repeat(3990) + "x{% endif %}";
    let many_sums = format!("{{{{ 1{} }}}}", "+x".repeat(490));
    let many_elses = format!("{{{{ 1{} }}}}", " if 0 else 1".repeat(240));
    let many_nots = format!("{{{{ {}true }}}}", "not ".repeat(990));
    let many_minus = format!("{{{{ {}1 }}}}", "- ".repeat(990));
    let many_powers = format!("{{{{ 1{} }}}}", "**1".repeat(490));
    let many_filters = format!("{{{{ messages{} }}}}", "|list".repeat(490));
    for source in [
        &sum,
        &filters,
        // Just below the limits.
        &many_elifs,
        &many_sums,
        &many_elses,
        &many_nots,
        &many_minus,
        &many_powers,
        &many_filters,
        // A value so deep that a recursive walk over it would overflow the stack.
        "{% set ns = namespace(s=[]) %}{% for i in range(100000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s | length }}",
        "{% set ns = namespace(s={}) %}{% for i in range(40000) %}{% set ns.s = {'a': ns.s} %}{% endfor %}{{ ns.s | tojson | length }}",
        "{% set ns = namespace(s=[]) %}{% for i in range(40000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[], t=[]) %}{% for i in range(20000) %}{% set ns.s = [ns.s] %}{% set ns.t = [ns.t] %}{% endfor %}{{ ns.s == ns.t }}{{ ns.s < ns.t }}",
    ] {
        let start = Instant::now();
        let _ = ChatTemplate::new(source, None, None).and_then(|t| t.render(&user("hi"), true));
        assert!(start.elapsed() < HANG);
    }
}

/// The fuel limit is for hostile templates; a long conversation must fit.
#[test]
fn long_conversations_render() {
    let template = ChatTemplate::new(&data("thinking.jinja"), None, None).unwrap();
    let turn = |i: usize| {
        Message::new(
            if i.is_multiple_of(2) {
                "user"
            } else {
                "assistant"
            },
            "ok",
        )
    };
    let many: Vec<Message> = (0..4001).map(turn).collect();
    assert!(template.render(&many, true).unwrap().len() > 4001 * 20);
    let long = "Lorem ipsum </think> dolor\n".repeat(150_000);
    let big = vec![
        Message::new("user", "hi"),
        Message::new("assistant", long.clone()),
        Message::new("user", long),
    ];
    assert!(template.render(&big, true).unwrap().len() > 4_000_000);
    let huge = user(&"x".repeat(MAX_OUTPUT_BYTES));
    let e = template.render(&huge, true).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TooLarge);
}

#[test]
fn generation_tags_become_blocks() {
    for (source, expected) in [
        (
            "a{% generation %}b{% endgeneration %}",
            "a{% if true %}b{% endif %}",
        ),
        ("{%- generation -%}", "{%- if true -%}"),
        ("{% x '{% generation %}", "{% x '{% if true %}"),
        ("{% generation", "{% generation"),
        (
            "{% generations %}{{ generation }}",
            "{% generations %}{{ generation }}",
        ),
    ] {
        assert_eq!(without_generation_tags(source), expected);
    }
}

#[test]
fn arguments_are_names_of_the_template() {
    let source =
        "{{ think }} {{ n + 1 }} {{ list[1].a }} {{ none is none }} {{ messages | length }}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let arguments = |text: &str| serde_json::from_str(text).unwrap();
    let given = arguments(r#"{"think": false, "n": 41, "list": [0, {"a": "b"}], "none": null}"#);
    let template = template.with_arguments(given).unwrap();
    let found = template.render(&user("hi"), true).unwrap();
    assert_eq!(found, "False 42 b True 1");
    let e = template
        .with_arguments(arguments(r#"{"messages": []}"#))
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
}

/// Results of jinja2 3.1.6.
#[test]
fn tests_of_values_are_those_of_python() {
    let values = [
        ("none", "...."),
        ("undefined_name", "IS.."),
        ("'abc'", "IS.."),
        ("''", "IS.."),
        ("[1]", "IS.."),
        ("(1, 2)", "IS.."),
        ("{'a': 1}", "ISM."),
        ("1", "...N"),
        ("1.5", "...N"),
        ("true", "...N"),
    ];
    for (value, expected) in values {
        let tests = ["iterable", "sequence", "mapping", "number"];
        let source: String = tests
            .iter()
            .zip(["I", "S", "M", "N"])
            .map(|(test, letter)| format!("{{{{ '{letter}' if {value} is {test} else '.' }}}}"))
            .collect();
        let template = ChatTemplate::new(&source, None, None).unwrap();
        assert_eq!(template.render(&[], false).unwrap(), expected, "{value}");
    }
    // As in published templates.
    let source = "{% if tools is iterable and tools | length > 0 %}T{% else %}-{% endif %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "-");
}

#[test]
fn errors_say_what_and_where() {
    let render = |source: &str| {
        let template = ChatTemplate::new(source, None, None)?;
        template.render(&[Message::new("user", "hi")], false)
    };
    for (source, expected) in [
        (
            "a\n  {{ messages[0].tool.name }}",
            "chat template, line 2: undefined value: in '{{ messages[0].tool.name }}'",
        ),
        (
            "{{ 'a'|nothing }}",
            "chat template, line 1: unknown filter: filter nothing is unknown",
        ),
        ("{% if %}", "chat template, line 1: syntax error: "),
    ] {
        let error = render(source).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(
            !error.contains("no detail") && !error.contains("_upg"),
            "{error}"
        );
    }
}
