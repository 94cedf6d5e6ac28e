//! Figures, what several runs say of each, and tables of them.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// What was measured: a value per run by the name of the one measured and of the figure, such as
/// `qemu init`.
pub type Figures = BTreeMap<String, Vec<u64>>;

/// A unit of figures.
#[derive(Clone, Copy)]
pub struct Unit {
    /// As printed.
    pub name: &'static str,
    /// How much of what was measured makes one.
    pub size: f64,
}

/// Bytes in a MiB.
pub const MIB: f64 = 1_048_576.0;

/// A table that compares this project's part with another.
pub struct Table<'a> {
    /// This project's, as named in the figures.
    pub own: &'a str,
    /// The other, as named in the figures.
    pub other: &'a str,
}

impl Table<'_> {
    /// Prints the title and the heads of the columns.
    pub fn head(&self, title: &str, own: &str, other: &str) {
        println!("\n{title}");
        println!("{:<36}{own:>24}{other:>24}{:>8}", "", "ratio");
    }

    /// Prints a figure of both, and own ÷ other.
    pub fn row(&self, words: &str, figures: &Figures, figure: &str, unit: Unit) -> Result<()> {
        let own = Summary::find(figures, self.own, figure)?;
        let other = Summary::find(figures, self.other, figure)?;
        println!(
            "{words:<36}{:>24}{:>24}{:>8.3}",
            own.shown(unit),
            other.shown(unit),
            own.median / other.median
        );
        Ok(())
    }

    /// Prints a figure that only this project's part has.
    pub fn own_row(&self, words: &str, figures: &Figures, figure: &str, unit: Unit) -> Result<()> {
        let own = Summary::find(figures, self.own, figure)?;
        println!("{words:<36}{:>24}", own.shown(unit));
        Ok(())
    }
}

/// What several runs say.
#[derive(Debug, PartialEq)]
struct Summary {
    median: f64,
    /// Largest less smallest, as a part of the median.
    spread: f64,
}

impl Summary {
    fn of(values: &[u64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable();
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let lower = if sorted.len().is_multiple_of(2) {
            *sorted.get(middle - 1)?
        } else {
            upper
        };
        let median = (lower as f64 + upper as f64) / 2.0;
        Some(Self {
            median,
            spread: (last - first) as f64 / median,
        })
    }

    fn find(figures: &Figures, who: &str, figure: &str) -> Result<Self> {
        let name = format!("{who} {figure}");
        let values = figures.get(&name).and_then(|values| Self::of(values));
        values.with_context(|| format!("no figure {name}"))
    }

    fn shown(&self, unit: Unit) -> String {
        let median = self.median / unit.size;
        let name = unit.name;
        if self.spread > 0.0 {
            format!("{median:.2} {name} ({:.2} %)", self.spread * 100.0)
        } else {
            format!("{median:.2} {name}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        let summary = Summary::of(&[10, 40, 20, 30]).unwrap();
        assert_eq!(
            summary,
            Summary {
                median: 25.0,
                spread: 1.2
            }
        );
        assert_eq!(
            Summary::of(&[7]).unwrap(),
            Summary {
                median: 7.0,
                spread: 0.0
            }
        );
        assert_eq!(Summary::of(&[]), None);
    }
}
