//! Tables in Markdown that are also readable as text.

use std::fmt;

/// A table; numbers go to the right.
#[derive(Clone, Debug, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Self {
        Self { header: header.into_iter().map(Into::into).collect(), rows: vec![] }
    }

    /// Adds a row.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    fn columns(&self) -> usize {
        self.rows.iter().map(Vec::len).chain([self.header.len()]).max().unwrap_or(0)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = || std::iter::once(&self.header).chain(&self.rows);
        let cell = |row: &'_ [String], i: usize| row.get(i).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..self.columns())
            .map(|i| all().map(|row| cell(row, i).chars().count()).max().unwrap_or(0).max(2))
            .collect();
        // The first column names; the others are numbers.
        let line = |row: &[String]| -> String {
            let cells = widths.iter().enumerate().map(|(i, &width)| match i {
                0 => format!(" {:<width$} |", cell(row, i)),
                _ => format!(" {:>width$} |", cell(row, i)),
            });
            format!("|{}", cells.collect::<String>())
        };
        writeln!(f, "{}", line(&self.header))?;
        let rule = widths.iter().enumerate().map(|(i, &width)| match i {
            0 => format!("{}|", "-".repeat(width + 2)),
            _ => format!("{}:|", "-".repeat(width + 1)),
        });
        writeln!(f, "|{}", rule.collect::<String>())?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{}", line(row)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["", "tokens/s"]);
        table.row(["firebox", "1,410"]);
        table.row(["torch-eager", "962"]);
        let expected = "\
|             | tokens/s |
|-------------|---------:|
| firebox     |    1,410 |
| torch-eager |      962 |
";
        assert_eq!(table.to_string(), expected);
    }
}
