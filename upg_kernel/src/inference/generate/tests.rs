use super::*;

/// Everything that comes out, and what was found.
fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>) {
    let mut matcher = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect()).unwrap();
    let mut texts = Vec::new();
    for piece in pieces {
        let (text, stopped) = matcher.push(piece);
        texts.push(text);
        if stopped.is_some() {
            // Nothing comes after the end.
            assert_eq!(matcher.push("more"), (String::new(), stopped));
            assert_eq!(matcher.flush(), "");
            return (texts, stopped);
        }
    }
    texts.push(matcher.flush());
    (texts, None)
}

#[test]
fn holds_back_only_what_may_be_the_beginning_of_a_stop_string() {
    assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
    assert_eq!(run(&["END"], &["xE", "N", "x"]).0, ["x", "", "ENx", ""]);
    assert_eq!(
        run(&["END"], &["xEN", "D tail"]),
        (vec!["x".into(), "".into()], Some(0))
    );
    assert_eq!(
        run(&["END"], &["EEN", "D"]),
        (vec!["E".into(), "".into()], Some(0))
    );
    assert_eq!(run(&["END"], &["all EN"]).0, ["all ", "EN"]);
    assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).0.concat(), "a");
    // The one that is complete first wins, even inside a longer one.
    assert_eq!(
        run(&["abcd", "c"], &["xabcd"]),
        (vec!["xab".into()], Some(1))
    );
    // Of two that end together, the one that began first.
    assert_eq!(run(&["c", "abc"], &["xabc"]), (vec!["x".into()], Some(1)));
    assert!(StopStrings::new(vec!["a".into(), String::new()]).is_err());
}

#[test]
fn the_cut_into_pieces_does_not_matter() {
    let text = "aé<|im_e<|im_end|>ü日本<<END日本語";
    let sets: [&[&str]; 6] = [
        &["<|im_end|>"],
        &["日本語"],
        &["<END", "END", "é<"],
        &["|>ü", "im_end|>"],
        &["never", "日本語!"],
        &["aé<|im_e<|im_end|>ü日本<<END日本語"],
    ];
    let chars: Vec<String> = text.chars().map(String::from).collect();
    for stops in sets {
        let (whole, found) = run(stops, &[text]);
        for size in 1..chars.len() {
            let pieces: Vec<String> = chars.chunks(size).map(<[String]>::concat).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (texts, stopped) = run(stops, &pieces);
            assert_eq!(
                (texts.concat(), stopped),
                (whole.concat(), found),
                "{stops:?} {size}"
            );
        }
        if found.is_none() {
            assert_eq!(whole.concat(), text);
        }
    }
}
