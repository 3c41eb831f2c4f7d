//! Compares the two ends of a changefeed, row by row.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use heartbeatpb::Ts;
use heartbeatpb::config::{ReplicaConfig, Uri};
use logservice::TableFilter;
use tokio_postgres::{Client, NoTls};

/// Most differences that are told one by one; the rest is counted.
const SHOWN_DIFFERENCES: usize = 20;

/// One row: the text of every column; NULL is `None`.
type Row = Vec<Option<String>>;

/// A table's rows with how often each is there, and the columns that they show.
#[derive(Debug, Default)]
struct Table {
    columns: Vec<String>,
    rows: BTreeMap<Row, u64>,
}

impl Table {
    fn add(&mut self, row: Row) {
        *self.rows.entry(row).or_insert(0) += 1;
    }

    fn count(&self) -> u64 {
        self.rows.values().sum()
    }
}

/// Tables by schema and name.
type Tables = BTreeMap<(String, String), Table>;

/// What a comparison found.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) tables: usize,
    pub(super) rows: u64,
    pub(super) differences: Vec<String>,
}

/// Compares upstream and downstream as of `checkpoint`. Differences name tables and counts, never values.
pub(super) async fn compare(
    from: &str,
    to: &str,
    checkpoint: Ts,
    filters: &[String],
) -> anyhow::Result<Outcome> {
    let rules = if filters.is_empty() { vec!["*.*".to_owned()] } else { filters.to_vec() };
    let filter = TableFilter::new(&rules, false).context("the filter rules are not usable")?;
    // Files say how far they are; a database is read once it has caught up.
    let (downstream_files, at) = match to.strip_prefix("file://") {
        Some(_) => {
            let (tables, at) = read_files(to, checkpoint)?;
            (Some(tables), at)
        }
        None => (None, checkpoint),
    };
    let upstream = read_upstream(from, at, &filter).await?;
    let downstream = match downstream_files {
        Some(tables) => tables,
        None if to.starts_with("postgres") => read_same_tables(to, &upstream).await?,
        None => bail!("this downstream keeps nothing that could be compared; use postgres:// or file://"),
    };
    Ok(differences(&upstream, &downstream))
}

async fn read_upstream(from: &str, at: Ts, filter: &TableFilter) -> anyhow::Result<Tables> {
    if from.starts_with("postgres") {
        let client = connect(from).await?;
        let mut tables = Tables::new();
        for (schema, name) in list_tables(&client).await? {
            if filter.matches(&schema, &name) {
                let columns = list_columns(&client, &schema, &name).await?;
                let table = read_table(&client, &schema, &name, columns).await?;
                tables.insert((schema, name), table);
            }
        }
        return Ok(tables);
    }
    let expected = logservice::upstream::generator::expected_state(from, at)?;
    Ok(expected
        .into_values()
        .filter(|table| filter.matches(&table.info.schema, &table.info.name))
        .map(|table| {
            let columns = table.info.columns.iter().map(|column| column.name.clone()).collect();
            let mut read = Table { columns, rows: BTreeMap::new() };
            table.rows.into_values().for_each(|row| read.add(row));
            ((table.info.schema.clone(), table.info.name.clone()), read)
        })
        .collect())
}

fn read_files(to: &str, checkpoint: Ts) -> anyhow::Result<(Tables, Ts)> {
    let uri = Uri::parse(to).map_err(|what| anyhow::anyhow!("the sink URI is not usable: {what}"))?;
    let mut replica = ReplicaConfig::default();
    replica.validate_and_adjust(to)?;
    let config = sink::FileConfig::for_changefeed(to, &replica)?;
    let replay = sink::replay(Path::new(&uri.path), &config.encode, Some(checkpoint))?;
    let tables = replay
        .tables
        .into_iter()
        .map(|(name, table)| {
            let mut read = Table { columns: table.columns, rows: BTreeMap::new() };
            table.rows.into_values().for_each(|row| read.add(row));
            (name, read)
        })
        .collect();
    Ok((tables, replay.checkpoint))
}

async fn connect(uri: &str) -> anyhow::Result<Client> {
    let base = uri.split_once('?').map_or(uri, |(base, _)| base);
    let (client, connection) = tokio_postgres::connect(base, NoTls)
        .await
        .context("cannot connect for the comparison (it uses no TLS)")?;
    tokio::spawn(connection);
    // The text form of a value must not depend on the settings of either server.
    client
        .batch_execute(
            "SET extra_float_digits = 1; SET datestyle = 'ISO, MDY'; SET timezone = 'UTC'; \
             SET intervalstyle = 'postgres'; SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET xmloption = content",
        )
        .await?;
    Ok(client)
}

async fn list_tables(client: &Client) -> anyhow::Result<Vec<(String, String)>> {
    let query = "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition \
                 AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'millrace') AND n.nspname NOT LIKE 'pg_toast%' \
                 AND (c.relreplident = 'f' OR EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid \
                      AND (i.indisprimary OR i.indisreplident))) ORDER BY 1, 2";
    let rows = client.query(query, &[]).await?;
    Ok(rows.into_iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn list_columns(client: &Client, schema: &str, name: &str) -> anyhow::Result<Vec<String>> {
    let query = "SELECT a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
                 JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2 \
                 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    let rows = client.query(query, &[&schema, &name]).await?;
    Ok(rows.into_iter().map(|row| row.get(0)).collect())
}

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn read_table(
    client: &Client,
    schema: &str,
    name: &str,
    columns: Vec<String>,
) -> anyhow::Result<Table> {
    use futures_util::TryStreamExt as _;

    let list: Vec<String> = columns.iter().map(|column| format!("{}::text", quote(column))).collect();
    let query = format!("SELECT {} FROM {}.{}", list.join(", "), quote(schema), quote(name));
    let rows = client.query_raw(&query, std::iter::empty::<&str>()).await?;
    let mut rows = std::pin::pin!(rows);
    let mut table = Table { columns, rows: BTreeMap::new() };
    while let Some(row) = rows.try_next().await? {
        table.add((0..row.len()).map(|at| row.get(at)).collect());
    }
    Ok(table)
}

/// Reads the tables that the upstream has, with its columns; one that is missing has no rows.
async fn read_same_tables(to: &str, upstream: &Tables) -> anyhow::Result<Tables> {
    let client = connect(to).await?;
    let mut tables = Tables::new();
    for ((schema, name), table) in upstream {
        let known = list_columns(&client, schema, name).await?;
        if table.columns.iter().all(|column| known.contains(column)) {
            let read = read_table(&client, schema, name, table.columns.clone()).await?;
            tables.insert((schema.clone(), name.clone()), read);
        }
    }
    Ok(tables)
}

/// A row's values in another order of columns; a column that the row does not have stays out of the comparison.
fn reordered(table: &Table, columns: &[String]) -> BTreeMap<Row, u64> {
    let places: Vec<Option<usize>> =
        columns.iter().map(|column| table.columns.iter().position(|known| known == column)).collect();
    let mut rows = BTreeMap::new();
    for (row, count) in &table.rows {
        let row: Row =
            places.iter().map(|place| place.and_then(|at| row.get(at).cloned().flatten())).collect();
        *rows.entry(row).or_insert(0) += count;
    }
    rows
}

fn differences(upstream: &Tables, downstream: &Tables) -> Outcome {
    let mut outcome = Outcome { tables: upstream.len(), ..Outcome::default() };
    let nothing = Table::default();
    for ((schema, name), table) in upstream {
        outcome.rows += table.count();
        let other = downstream.get(&(schema.clone(), name.clone())).unwrap_or(&nothing);
        let same_columns = table.columns == other.columns || other.rows.is_empty();
        let theirs = if same_columns { other.rows.clone() } else { reordered(other, &table.columns) };
        let missing: u64 =
            table.rows.iter().map(|(r, n)| n.saturating_sub(*theirs.get(r).unwrap_or(&0))).sum();
        let extra: u64 = theirs.iter().map(|(r, n)| n.saturating_sub(*table.rows.get(r).unwrap_or(&0))).sum();
        if missing > 0 || extra > 0 {
            outcome.differences.push(format!(
                "{schema}.{name}: {missing} rows of the upstream are missing downstream, {extra} are there too much"
            ));
        }
    }
    if outcome.differences.len() > SHOWN_DIFFERENCES {
        let more = outcome.differences.len() - SHOWN_DIFFERENCES;
        outcome.differences.truncate(SHOWN_DIFFERENCES);
        outcome.differences.push(format!("and {more} more tables"));
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(rows: &[(&str, u64)]) -> Tables {
        let rows = rows.iter().map(|(value, count)| (vec![Some((*value).to_owned())], *count)).collect();
        let name = ("public".to_owned(), "t".to_owned());
        Tables::from([(name, Table { columns: vec!["a".to_owned()], rows })])
    }

    #[test]
    fn a_missing_a_doubled_and_a_changed_row_are_differences() {
        let upstream = tables(&[("1", 1), ("2", 1)]);
        assert!(differences(&upstream, &tables(&[("1", 1), ("2", 1)])).differences.is_empty());
        for wrong in [&[("1", 1)][..], &[("1", 2), ("2", 1)], &[("1", 1), ("3", 1)], &[]] {
            assert_eq!(differences(&upstream, &tables(wrong)).differences.len(), 1, "{wrong:?}");
        }
    }
}
