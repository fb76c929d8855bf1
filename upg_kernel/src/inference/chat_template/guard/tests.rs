use super::*;

#[test]
fn filters_stand_after_operands() {
    for (source, expected) in [
        ("{{ a + b }}", "{{ a|F + b }}"),
        ("{{ 'x' + b }}", "{{ 'x' + b }}"),
        ("a + b * c", "a + b * c"),
        (
            "{{ -a[0].b(1)|f(2) + (b) + c }}",
            "{{ -(a|X)[0].b(1)|f(2)|F + (b)|F + c }}",
        ),
        ("{{ 2 * a.b[1](2)|f }}", "{{ 2 * (a.b|X)[1](2)|f|C }}"),
        (
            "{{ n * -a.b[(1)](2)|f - 1 }}",
            "{{ n|C * -(a.b|X)[(1)|X](2)|f|C - 1 }}",
        ),
        ("{% if a*(1) + b %}", "{% if a|C*(1)|C|F + b %}"),
        (
            "{{ f(*a, **b) }}{{ a ** b }}",
            "{{ f(*a, **b) }}{{ a ** b }}",
        ),
        (
            "{# a + b #}{% raw %}{{ a + b }}{% endraw %}",
            "{# a + b #}{% raw %}{{ a + b }}{% endraw %}",
        ),
        ("é{{ u + 'ü+ü' }}", "é{{ u|F + 'ü+ü' }}"),
    ] {
        assert_eq!(short(source), expected);
    }
}

#[test]
fn filters_stand_after_what_is_compared_tested_and_indexed() {
    for (source, expected) in [
        ("{% if a == b %}", "{% if a|W == b %}"),
        (
            "{% if a.b(1) < 2 and 3 != c %}",
            "{% if a.b(1)|W < 2 and 3 != c %}",
        ),
        ("{% if a is not eq(b) %}", "{% if a|W is not eq(b) %}"),
        ("{% if a is defined %}", "{% if a|X is defined %}"),
        ("{{ a[b]['c'][0] }}", "{{ (((a|X)[b|X]|X)['c']|X)[0] }}"),
        ("{{ a[1:] + a[::-1] }}", "{{ (a|X)[1:]|F + (a|X)[::-1] }}"),
        ("{{ -f(x).b[0] in c }}", "{{ -(f(x).b|X)[0] in c }}"),
        ("{% if not (a)[0] %}", "{% if not ((a)|X)[0] %}"),
        ("{{ a.0['b'] }}", "{{ (a.0|X)['b'] }}"),
        ("{% if a is eq [1] %}", "{% if a|W is eq ([1]|S) %}"),
        ("{% if a is eq (b)[0] %}", "{% if a|W is eq ((b)|X)[0] %}"),
        ("{% if a is not in(b, c) %}", "{% if a|W is not in(b, c) %}"),
        ("{% do (a)[0].f() %}", "{% do ((a)|X)[0].f() %}"),
        ("{{ a.is }}{{ is(b) }}", "{{ a.is }}{{ is(b) }}"),
        ("{{ f(a=b)|map('x', c=1) }}", "{{ f(a=b)|map('x', c=1) }}"),
    ] {
        assert_eq!(short(source), expected);
    }
}

#[test]
fn filters_stand_around_literals_and_sets() {
    for (source, expected) in [
        ("{{ [1, x[2]] }}", "{{ ([1, (x|X)[2]]|S) }}"),
        (
            "{{ {'a': [b]}.items() }}",
            "{{ ({'a': ([b]|S)}|S).items() }}",
        ),
        (
            "{{ (1, 2) }}{{ (1) }}{{ f(1, 2) }}",
            "{{ ((1, 2)|S) }}{{ (1) }}{{ f(1, 2) }}",
        ),
        ("{% for (a, b) in [c] %}", "{% for (a, b) in ([c]|S) %}"),
        (
            "{% for i, (k, v) in ((1, 2), c) %}",
            "{% for i, (k, v) in ((((1, 2)|S), c)|S) %}",
        ),
        ("{% set a, (b, c) = x %}", "{% set a, (b, c) =(( x)|S) %}"),
        ("{% for a in x recursive %}", "{% for a in x recursive %}"),
        ("{% set x = a, a %}", "{% set x =(( a, a)|S) %}"),
        (
            "{% set n.x = n if a else 0 %}",
            "{% set n.x =(( n if a else 0)|T) %}",
        ),
        (
            "{%- set n.x = a + [b] -%}",
            "{%- set n.x =(( a|F + ([b]|S))|T) -%}",
        ),
        (
            "{% set x %}{{ f(a=1) }}{% endset %}",
            "{% set x %}{{ f(a=1) }}{% endset %}",
        ),
        ("{% macro m(a, b=[]) %}", "{% macro m(a, b=([]|S)) %}"),
        ("{% if x in ['a', 'b'] %}", "{% if x in (['a', 'b']|S) %}"),
    ] {
        assert_eq!(short(source), expected);
    }
}

/// Returns the guarded source with the names of the filters cut to one letter.
fn short(source: &str) -> String {
    guarded(source, SyntaxConfig::default())
        .unwrap()
        .replace("_upg_flat", "F")
        .replace("_upg_scalar", "C")
        .replace("_upg_sized", "S")
        .replace("_upg_stored", "T")
        .replace("_upg_text", "X")
        .replace("_upg_whole", "W")
}
