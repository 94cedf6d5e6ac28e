//! Values of arguments.

/// A pod's name is its hostname too: a DNS label.
pub fn name(text: &str) -> Result<String, String> {
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let good = (1..=63).contains(&text.len())
        && text.chars().all(|letter| plain(letter) || letter == '-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if good {
        return Ok(text.to_owned());
    }
    Err("a name has 1 to 63 of a-z, 0-9 and -, and no - at its ends".to_owned())
}

/// An environment variable, `NAME=VALUE`, or `NAME` for this process's.
pub fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => match std::env::var(text) {
            Ok(value) => (text, value),
            Err(_) => return Err(format!("{text} is not set here; give it a value: {text}=…")),
        },
    };
    if name.is_empty() {
        return Err("the variable has no name".to_owned());
    }
    Ok((name.to_owned(), value))
}

/// An amount of memory, such as 256M.
pub fn bytes(text: &str) -> Result<i64, String> {
    let wrong = || format!("`{text}` is not an amount of memory such as 256M or 2G");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = text
        .get(digits.len()..)
        .unwrap_or_default()
        .to_ascii_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let number: i64 = digits.parse().map_err(|_| wrong())?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory_are_read_with_their_units() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("256M"), Ok(256 << 20));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        for wrong in ["", "M", "-1M", "0", "1x", "9999999999T"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_dns_labels() {
        assert!(name("web-1").is_ok());
        for wrong in ["", "-a", "a-", "A", "a.b", &"a".repeat(64)] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn variables_come_with_a_value_or_from_the_environment() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(variable("A="), Ok(("A".into(), String::new())));
        assert!(variable("=b").is_err());
        assert!(variable("PATH").is_ok());
        assert!(variable("NO_SUCH_VARIABLE_HERE").is_err());
    }
}
