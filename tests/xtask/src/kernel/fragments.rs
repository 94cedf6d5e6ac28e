//! The fragments of the configuration, and the check that each of their lines survived.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// All fragments together.
#[derive(Debug)]
pub struct Fragments {
    /// Option to the value asked for; none for "is not set".
    wanted: BTreeMap<String, Option<String>>,
}

impl Fragments {
    /// Reads all `*.config` of `directory`, in the order of their names.
    pub fn read(directory: &Path) -> Result<Self> {
        let entries = fs::read_dir(directory)
            .with_context(|| format!("cannot read {}", directory.display()))?;
        let mut files = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "config")
            {
                files.push(path);
            }
        }
        files.sort();
        let mut text = String::new();
        for file in files {
            text += &fs::read_to_string(&file)
                .with_context(|| format!("cannot read {}", file.display()))?;
        }
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut wanted = BTreeMap::new();
        for line in text.lines() {
            let Some((option, value)) = promise(line) else {
                if !line.trim().is_empty() && !line.starts_with("# ") && line != "#" {
                    bail!("kernel-config: not an option, comment or empty line: {line}");
                }
                continue;
            };
            if wanted
                .insert(option.to_owned(), value.map(str::to_owned))
                .is_some()
            {
                bail!("kernel-config: {option} is named twice");
            }
        }
        Ok(Self { wanted })
    }

    /// All options in one order and without comments, in the form `KCONFIG_ALLCONFIG` takes.
    pub fn text(&self) -> String {
        self.wanted
            .iter()
            .map(|(option, value)| match value {
                Some(value) => format!("CONFIG_{option}={value}\n"),
                None => format!("# CONFIG_{option} is not set\n"),
            })
            .collect()
    }

    /// How many options are asked for.
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    /// What `config` (the text of a `.config`) does not keep, one sentence each.
    pub fn broken_promises(&self, config: &str) -> Vec<String> {
        let is: BTreeMap<&str, &str> = config
            .lines()
            .filter_map(promise)
            .filter_map(|(option, value)| Some((option, value?)))
            .collect();
        self.wanted
            .iter()
            .filter_map(
                |(option, wanted)| match (wanted.as_deref(), is.get(option.as_str())) {
                    (None, None) => None,
                    (Some(wanted), Some(&value)) if wanted == value => None,
                    (None, Some(value)) => {
                        Some(format!("{option} should not be set but is {value}"))
                    }
                    (Some(wanted), Some(value)) => {
                        Some(format!("{option} should be {wanted} but is {value}"))
                    }
                    (Some(wanted), None) => {
                        Some(format!("{option} should be {wanted} but is not set"))
                    }
                },
            )
            .collect()
    }
}

/// The option a line sets or unsets; `=n` is the same as "is not set".
fn promise(line: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = line.strip_prefix("# CONFIG_") {
        let option = rest.strip_suffix(" is not set")?;
        return Some((option, None));
    }
    let (option, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
    Some((option, Some(value).filter(|value| *value != "n")))
}

#[cfg(test)]
mod tests {
    use super::Fragments;

    fn fragments(text: &str) -> Fragments {
        Fragments::parse(text).unwrap()
    }

    #[test]
    fn a_kept_configuration_breaks_nothing() {
        let asked = fragments(
            "# Why.\nCONFIG_A=y\nCONFIG_N=64\nCONFIG_S=\"a,b\"\n# CONFIG_B is not set\nCONFIG_C=n\n",
        );
        let config =
            "CONFIG_A=y\nCONFIG_N=64\nCONFIG_S=\"a,b\"\n# CONFIG_B is not set\nCONFIG_X=y\n";
        assert_eq!(asked.broken_promises(config), Vec::<String>::new());
        assert_eq!(asked.len(), 5);
    }

    #[test]
    fn every_broken_promise_is_named() {
        let asked = fragments(
            "CONFIG_A=y\nCONFIG_N=64\nCONFIG_GONE=y\n# CONFIG_B is not set\nCONFIG_C=n\n",
        );
        let config = "# CONFIG_A is not set\nCONFIG_N=8\nCONFIG_B=y\nCONFIG_C=m\n";
        assert_eq!(
            asked.broken_promises(config),
            [
                "A should be y but is not set",
                "B should not be set but is y",
                "C should not be set but is m",
                "GONE should be y but is not set",
                "N should be 64 but is 8",
            ]
        );
    }

    #[test]
    fn a_line_that_is_no_option_is_refused() {
        let error = Fragments::parse("CONFIG-A=y\n").unwrap_err();
        assert!(error.to_string().contains("CONFIG-A=y"));
    }

    #[test]
    fn an_option_named_twice_is_refused() {
        let error = Fragments::parse("CONFIG_A=y\n# CONFIG_A is not set\n").unwrap_err();
        assert!(error.to_string().contains("A is named twice"));
    }
}
