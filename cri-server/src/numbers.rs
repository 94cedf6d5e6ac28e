//! Lists of CPUs and memory nodes as the kernel writes them: `0-3,8` (cpuset(7), "List format").

use std::collections::BTreeSet;
use std::fmt;

/// The most CPUs or memory nodes a kernel can be built for (`NR_CPUS`).
const MOST: u32 = 8192;

/// Numbers of CPUs or memory nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers(BTreeSet<u32>);

impl Numbers {
    /// Reads a list; an empty one has no numbers. The error says what is wrong with the list.
    pub fn parse(list: &str) -> Result<Self, String> {
        let mut numbers = BTreeSet::new();
        for part in list.trim().split(',').filter(|_| !list.trim().is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last => numbers.extend(first..=last),
                _ => {
                    let part: String = part.chars().take(40).collect();
                    return Err(format!(
                        "{part:?} is neither a number below {MOST} nor a range as 0-3"
                    ));
                }
            }
        }
        Ok(Self(numbers))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes in those of `other`.
    pub fn add(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Whether `other` has all of them.
    pub fn within(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }
}

fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.then(|| text.parse().ok()).flatten();
    number.filter(|number| *number < MOST)
}

/// The shortest list.
impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if_eq(&(last + 1)) {
                last = next;
            }
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(list: &str) -> Numbers {
        Numbers::parse(list).unwrap()
    }

    #[test]
    fn lists_are_read_and_written_shortest() {
        for (list, count, written) in [
            ("", 0, ""),
            ("\n", 0, ""),
            ("0", 1, "0"),
            ("0-3,8\n", 5, "0-3,8"),
            ("5,3,4,1", 4, "1,3-5"),
            ("0-3,2-6", 7, "0-6"),
            ("8191", 1, "8191"),
        ] {
            let numbers = numbers(list);
            assert_eq!(
                (numbers.count(), numbers.to_string()),
                (count, written.into())
            );
        }
    }

    #[test]
    fn what_is_no_list_is_refused_with_the_part() {
        for (list, part) in [
            ("0,x", "\"x\""),
            ("3-1", "\"3-1\""),
            ("0-", "\"0-\""),
            ("-1", "\"-1\""),
            ("+1", "\"+1\""),
            ("0,,1", "\"\""),
            ("8192", "\"8192\""),
            ("0-4294967295", "\"0-4294967295\""),
            ("all", "\"all\""),
            ("0-31:1/2", "\"0-31:1/2\""),
        ] {
            let refusal = Numbers::parse(list).unwrap_err();
            assert!(refusal.contains(part), "{list}: {refusal}");
        }
    }

    #[test]
    fn sets_are_united_and_compared() {
        let mut all = numbers("0-1");
        all.add(numbers("4"));
        assert_eq!(all, numbers("0,1,4"));
        assert!(numbers("1,4").within(&all) && !numbers("2").within(&all));
        assert!(Numbers::default().within(&all));
    }
}
