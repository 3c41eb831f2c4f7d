//! Compares tables of two servers by their full content.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// Most rows of a difference that are shown.
const SHOWN_ROWS: usize = 3;

/// What one table looks like at one end: a hash over every row, and their number. `None`: it is missing.
type Content = Option<(String, i64)>;

/// One table at both ends.
#[derive(Clone, Debug)]
pub struct TableComparison {
    /// Its name, quoted as in SQL.
    pub table: String,
    upstream: Content,
    downstream: Content,
    /// Rows that one end has more often than the other, shortened.
    details: Vec<String>,
}

impl TableComparison {
    /// Whether both ends have the same rows, each as often.
    #[must_use]
    pub fn equal(&self) -> bool {
        self.upstream.is_some() && self.upstream == self.downstream
    }
}

/// Every table at both ends; shown as a table for people.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// In the order in which they were named.
    pub tables: Vec<TableComparison>,
}

impl Comparison {
    /// Whether every table is equal.
    #[must_use]
    pub fn equal(&self) -> bool {
        self.tables.iter().all(TableComparison::equal)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.tables.iter().map(|table| table.table.len()).max().unwrap_or_default().max(5);
        writeln!(f, "{:width$}  {:>10}  {:>10}  result", "table", "upstream", "downstream")?;
        for table in &self.tables {
            let rows = |content: &Content| {
                content.as_ref().map_or("missing".to_owned(), |(_, rows)| rows.to_string())
            };
            let result = if table.equal() { "equal" } else { "DIFFERENT" };
            let (up, down) = (rows(&table.upstream), rows(&table.downstream));
            writeln!(f, "{:width$}  {up:>10}  {down:>10}  {result}", table.table)?;
            for line in &table.details {
                writeln!(f, "  {line}")?;
            }
        }
        Ok(())
    }
}

/// Compares tables, named as in SQL. Neither end may change meanwhile.
///
/// # Errors
/// When an end cannot be read; a table that is missing is a difference, not an error.
pub async fn compare(upstream: &Client, downstream: &Client, tables: &[&str]) -> Result<Comparison> {
    let mut all = Vec::new();
    for &table in tables {
        let mut result = TableComparison {
            table: table.to_owned(),
            upstream: content(upstream, table).await?,
            downstream: content(downstream, table).await?,
            details: Vec::new(),
        };
        if !result.equal() && result.upstream.is_some() && result.downstream.is_some() {
            result.details = details(upstream, downstream, table).await?;
        }
        all.push(result);
    }
    Ok(Comparison { tables: all })
}

async fn content(client: &Client, table: &str) -> Result<Content> {
    let query = format!(
        "SELECT coalesce(md5(string_agg(t::text, E'\\n' ORDER BY t::text COLLATE \"C\")), ''), count(*) FROM {table} t"
    );
    match client.query_one(&query, &[]).await {
        Ok(row) => Ok(Some((row.get(0), row.get(1)))),
        Err(error) => match error.code() {
            Some(code) if [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME].contains(code) => {
                Ok(None)
            }
            Some(_) | None => Err(error.into()),
        },
    }
}

/// How often each row is there, by the hash of its text.
async fn hashes(client: &Client, table: &str) -> Result<BTreeMap<String, i64>> {
    let query = format!("SELECT md5(t::text), count(*) FROM {table} t GROUP BY 1");
    Ok(client.query(&query, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn details(upstream: &Client, downstream: &Client, table: &str) -> Result<Vec<String>> {
    let (up, down) = (hashes(upstream, table).await?, hashes(downstream, table).await?);
    let mut lines = Vec::new();
    for (client, here, there, words) in [
        (upstream, &up, &down, "upstream has more often"),
        (downstream, &down, &up, "downstream has more often"),
    ] {
        let excess: Vec<(&String, i64)> = here
            .iter()
            .map(|(hash, count)| (hash, count - there.get(hash).copied().unwrap_or_default()))
            .filter(|(_, more)| *more > 0)
            .collect();
        if excess.is_empty() {
            continue;
        }
        lines.push(format!("{words}: {} rows", excess.iter().map(|(_, more)| more).sum::<i64>()));
        for (hash, more) in excess.into_iter().take(SHOWN_ROWS) {
            let query = format!("SELECT left(t::text, 160) FROM {table} t WHERE md5(t::text) = $1 LIMIT 1");
            for row in client.query(&query, &[hash]).await? {
                lines.push(format!("  {more} x {}", row.get::<_, String>(0)));
            }
        }
    }
    Ok(lines)
}
