//! Translator from the Metal Shading Language to C++ for clang;
//! only kernel declarations differ.
//!
//! It runs after the preprocessor, so that kernels made by macros are seen. Removed text is
//! replaced by spaces, and lines keep their numbers, so that clang's errors name a place in the
//! `.metal` file.

use std::fmt::Write;

/// Kernel: its host name, and its function or template instance.
struct Kernel {
    name: String,
    function: String,
}

/// Translates a preprocessed `.metal` file to C++, with the kernels whose names are `chosen`.
///
/// The result runs with `machine.h` or, if `is_checked`, is only for type checking.
///
/// Errors: the text that is not understood.
pub(super) fn to_cpp(
    preprocessed: &str,
    chosen: impl Fn(&str) -> bool,
    is_checked: bool,
) -> Result<String, String> {
    let mut text = with_constructors(preprocessed);
    let mut kernels = instances(&mut text)?;
    let definitions = definitions(&mut text)?;
    for (name, _, is_template) in &definitions {
        if !is_template {
            kernels.push(Kernel {
                name: name.clone(),
                function: name.clone(),
            });
        }
    }
    kernels.retain(|kernel| chosen(&kernel.name));
    let mut out = format!("#include <metal_stdlib>\n{text}\n#line 1 \"calls of kernels\"\n");
    for (i, kernel) in kernels.iter().enumerate() {
        let function = &kernel.function;
        if is_checked {
            // Naming an instance is enough for its body to be checked.
            writeln!(
                out,
                "[[maybe_unused]] auto *const kernel_{i} = &{function};"
            )
            .expect("in memory");
            continue;
        }
        let template = function.split('<').next().expect("a first part").trim();
        let definition = definitions.iter().find(|(name, ..)| name == template);
        let (_, parameters, _) = definition.ok_or(format!("there is no kernel {template}"))?;
        writeln!(
            out,
            "static void run_{i}() {{\n    using metal_on_cpu::Kind;\n    static const metal_on_cpu::Parameter parameters[] = \
             {{{}}};\n    metal_on_cpu::call(&{function}, parameters);\n}}",
            parameters.join(", ")
        )
        .expect("in memory");
    }
    if !is_checked {
        out.push_str("const metal_on_cpu::Kernel metal_on_cpu::kernels[] = {\n");
        for (i, kernel) in kernels.iter().enumerate() {
            writeln!(out, "    {{\"{}\", run_{i}}},", kernel.name).expect("in memory");
        }
        out.push_str("    {nullptr, nullptr},\n};\n");
    }
    Ok(out)
}

/// Replaces `float4(x)`, which clang does not have, by a call of `make`.
///
/// A declaration like `float4 (&x)[2]` stays.
fn with_constructors(text: &str) -> String {
    const VECTORS: [&str; 12] = [
        "char2", "char4", "uchar2", "uchar4", "short4", "ushort4", "int2", "int4", "uint2",
        "uint4", "half4", "float4",
    ];
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(is_name) {
        let name = &rest[start..];
        let name = &name[..name.find(|c| !is_name(c)).unwrap_or(name.len())];
        let after = &rest[start + name.len()..];
        out.push_str(&rest[..start]);
        let is_call =
            after.starts_with('(') && !after.starts_with("(&") && !after.starts_with("(*");
        match VECTORS.contains(&name) && is_call {
            true => out.push_str(&format!("metal_on_cpu::make<{name}>")),
            false => out.push_str(name),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Removes `template [[host_name("NAME")]] [[kernel]] decltype(F) F;`.
fn instances(text: &mut String) -> Result<Vec<Kernel>, String> {
    let mut kernels = Vec::new();
    while let Some(start) = text.find("template [[host_name(") {
        let rest = &text[start..];
        let end = rest.find(';').ok_or("an instance without an end")? + 1;
        let instance = &rest[..end];
        let name = instance
            .split('"')
            .nth(1)
            .ok_or("an instance without a name")?;
        let declared = instance
            .find("decltype(")
            .ok_or("an instance without decltype")?
            + "decltype".len();
        let function = &instance[declared..];
        let function = &function[1..closing(function)?];
        if squeezed(instance[..end - 1].rsplit(')').next().unwrap_or("")) != squeezed(function) {
            return Err(format!("{name} is declared as {function} and is another"));
        }
        kernels.push(Kernel {
            name: name.to_string(),
            function: function.to_string(),
        });
        blank(text, start, start + end);
    }
    Ok(kernels)
}

/// Returns names and parameters of kernel functions, and whether they are templates;
/// removes `[[kernel]]`.
#[allow(clippy::type_complexity, reason = "of two uses")]
fn definitions(text: &mut String) -> Result<Vec<(String, Vec<String>, bool)>, String> {
    const KERNEL: &str = "[[kernel]]";
    let mut found = Vec::new();
    while let Some(start) = text.find(KERNEL) {
        let is_template = text[..start].trim_end().ends_with('>');
        let rest = &text[start + KERNEL.len()..];
        let open = rest.find('(').ok_or("a kernel without parameters")?;
        let name = rest[..open]
            .trim()
            .strip_prefix("void ")
            .ok_or("a kernel that is not void")?
            .trim();
        let list = &rest[open..];
        let list = &list[..closing(list)?];
        let parameters = at_top(&list[1..])
            .into_iter()
            .map(|parameter| described(&parameter, name));
        let end = start + KERNEL.len() + open + list.len();
        found.push((
            name.to_string(),
            parameters.collect::<Result<_, _>>()?,
            is_template,
        ));
        blank(text, start, start + KERNEL.len());
        // The attributes are known now, and one of them has the name of an address space.
        let mut at = start;
        while let Some(first) = text[at..end].find("[[") {
            let last = text[at + first..end]
                .find("]]")
                .ok_or("an attribute without an end")?;
            blank(text, at + first, at + first + last + 2);
            at += first;
        }
    }
    Ok(found)
}

/// Returns a parameter as C++ of `metal_on_cpu::Parameter`, by its attribute.
fn described(parameter: &str, kernel: &str) -> Result<String, String> {
    let (_, attribute) = parameter.split_once("[[").ok_or_else(|| {
        format!(
            "a parameter of {kernel} has no attribute: {}",
            parameter.trim()
        )
    })?;
    let attribute: String = attribute
        .split("]]")
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let indexed = |name: &str| {
        let index = attribute
            .strip_prefix(name)?
            .strip_prefix('(')?
            .strip_suffix(')')?;
        index.parse::<u32>().ok()
    };
    let kind = match attribute.as_str() {
        "thread_position_in_grid" => "PositionInGrid",
        "thread_position_in_threadgroup" => "PositionInThreadgroup",
        "threadgroup_position_in_grid" => "ThreadgroupInGrid",
        "threads_per_threadgroup" => "ThreadsPerThreadgroup",
        "threadgroups_per_grid" => "ThreadgroupsPerGrid",
        "thread_index_in_threadgroup" => "IndexInThreadgroup",
        "thread_index_in_simdgroup" => "IndexInSimdgroup",
        "simdgroup_index_in_threadgroup" => "SimdgroupIndex",
        "simdgroups_per_threadgroup" => "Simdgroups",
        "threads_per_simdgroup" => "ThreadsPerSimdgroup",
        _ => {
            return match (indexed("buffer"), indexed("threadgroup")) {
                (Some(index), _) => Ok(format!("{{Kind::Buffer, {index}}}")),
                (_, Some(index)) => Ok(format!("{{Kind::Threadgroup, {index}}}")),
                _ => Err(format!("{kernel} has a parameter with [[{attribute}]]")),
            };
        }
    };
    Ok(format!("{{Kind::{kind}, 0}}"))
}

/// Returns the position of the parenthesis that closes the first one of `text`.
fn closing(text: &str) -> Result<usize, String> {
    let mut depth = 0;
    for (i, c) in text.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 {
            return Ok(i);
        }
    }
    Err(format!(
        "'{}...' does not close",
        &text[..text.len().min(30)]
    ))
}

/// Splits at commas outside of parentheses.
fn at_top(list: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    // Line markers of the preprocessor.
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        for c in line.chars() {
            depth += i32::from("([<".contains(c)) - i32::from(")]>".contains(c));
            match (c, depth) {
                (',', 0) => parts.push(String::new()),
                _ => parts.last_mut().expect("one at least").push(c),
            }
        }
    }
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn squeezed(text: &str) -> String {
    text.split_whitespace().collect()
}

/// Replaces everything except line ends by spaces.
fn blank(text: &mut String, start: usize, end: usize) {
    let spaces: String = text[start..end]
        .chars()
        .map(|c| if c == '\n' { c } else { ' ' })
        .collect();
    text.replace_range(start..end, &spaces);
}
