//! What both ends say about a table: which columns can be compared, and by which key its rows are told apart.

use tokio_postgres::Client;

use crate::Error;
use crate::sql::TableName;

/// A column of the key, as one end calls its type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct KeyColumn {
    pub(crate) name: String,
    pub(crate) type_name: String,
}

/// What is read of a table at one end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    /// What is compared, in the order of the source.
    pub(crate) columns: Vec<String>,
    /// What rows are told apart by; empty: by everything.
    pub(crate) key: Vec<KeyColumn>,
}

/// How a table is compared.
#[derive(Debug)]
pub(crate) struct Method {
    pub(crate) source: Shape,
    pub(crate) target: Shape,
    /// Whether the key's order is the same at both ends, and both have an index of it.
    pub(crate) by_range: bool,
    /// Rows at the source, about.
    pub(crate) expected_rows: u64,
    /// What people should know.
    pub(crate) notes: Vec<String>,
    /// Whether the target lacks something.
    pub(crate) lacking: bool,
}

/// A column at one end.
#[derive(Clone, Debug)]
struct Column {
    name: String,
    type_name: String,
    /// Whether every PostgreSQL server puts its values into the same order.
    orderly: bool,
    not_null: bool,
}

/// A table at one end.
#[derive(Debug)]
struct Described {
    rows: f64,
    columns: Vec<Column>,
    /// The columns of each unique index that tells all rows apart, the best one first.
    keys: Vec<Vec<String>>,
}

impl Described {
    fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }
}

const TABLE: &str = "SELECT c.oid, \
    greatest(c.reltuples, (SELECT sum(greatest(p.reltuples, 0)) FROM pg_partition_tree(c.oid) t JOIN pg_class p ON p.oid = t.relid), 0)::float8 \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1::text AND c.relname = $2::text AND c.relkind IN ('r', 'p')";

/// Texts are in one order everywhere only as bytes (PostgreSQL manual, "Collation Support"). Which provider a database uses
/// by default is told since version 15.
const COLUMNS: &str = "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, \
    a.atttypid = ANY('{int2,int4,int8,numeric,date,timestamp,timestamptz,uuid,bytea,bool,oid}'::regtype[]) \
    OR coalesce(a.atttypid = ANY('{text,varchar,bpchar}'::regtype[]) AND CASE l.collprovider \
        WHEN 'c' THEN l.collcollate IN ('C', 'POSIX') \
        WHEN 'd' THEN d.datcollate IN ('C', 'POSIX') AND coalesce(to_jsonb(d) ->> 'datlocprovider', 'c') = 'c' \
        ELSE false END, false) \
    FROM pg_attribute a LEFT JOIN pg_collation l ON l.oid = a.attcollation \
    CROSS JOIN (SELECT * FROM pg_database WHERE datname = current_database()) d \
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

const KEYS: &str = "SELECT (SELECT array_agg(a.attname::text ORDER BY k.at) \
        FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, at) \
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.at <= i.indnkeyatts) \
    FROM pg_index i WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indimmediate \
    AND i.indpred IS NULL AND i.indexprs IS NULL \
    ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indnkeyatts, i.indexrelid";

async fn describe(client: &Client, end: &'static str, table: &TableName) -> Result<Option<Described>, Error> {
    let failed = |doing| move |source| Error::Database { end, doing, source };
    let found = client
        .query_opt(TABLE, &[&table.schema, &table.name])
        .await
        .map_err(failed("say whether a table exists"))?;
    let Some(row) = found else { return Ok(None) };
    let (oid, rows): (u32, f64) = (row.get(0), row.get(1));
    let columns = client.query(COLUMNS, &[&oid]).await.map_err(failed("list the columns of a table"))?;
    let columns: Vec<Column> = columns
        .iter()
        .map(|row| Column {
            name: row.get(0),
            type_name: row.get(1),
            not_null: row.get(2),
            orderly: row.get(3),
        })
        .collect();
    let keys = client.query(KEYS, &[&oid]).await.map_err(failed("list the indexes of a table"))?;
    let total = |name: &String| columns.iter().any(|column| column.name == *name && column.not_null);
    let keys = keys
        .iter()
        .filter_map(|row| row.get::<_, Option<Vec<String>>>(0))
        .filter(|key| key.iter().all(total))
        .collect();
    Ok(Some(Described { rows, columns, keys }))
}

/// How to compare a table; `Err` inside says in words why it cannot be.
pub(crate) async fn method(
    source: (&Client, &TableName),
    target: (&Client, &TableName),
) -> Result<Result<Method, String>, Error> {
    let Some(here) = describe(source.0, "source", source.1).await? else {
        return Ok(Err("the table does not exist at the source".to_owned()));
    };
    let Some(there) = describe(target.0, "target", target.1).await? else {
        return Ok(Err(format!("the target has no table {}", target.1)));
    };
    Ok(Ok(decide(&here, &there)))
}

fn decide(here: &Described, there: &Described) -> Method {
    let mut notes = Vec::new();
    let mut common = Vec::new();
    let mut lacking = false;
    for column in &here.columns {
        match there.column(&column.name) {
            Some(other) => {
                if other.type_name != column.type_name {
                    let (one, two) = (&column.type_name, &other.type_name);
                    notes.push(format!(
                        "column {} is {one} at the source and {two} at the target: their texts are compared",
                        column.name
                    ));
                }
                common.push(column.name.clone());
            }
            None => {
                lacking = true;
                notes.push(format!("the target has no column {}", column.name));
            }
        }
    }
    let added = there.columns.iter().filter(|column| here.column(&column.name).is_none());
    notes.extend(
        added.map(|column| format!("column {} exists only at the target and is not compared", column.name)),
    );
    let usable = |key: &&Vec<String>| key.iter().all(|name| common.contains(name));
    let shared = here.keys.iter().filter(usable).find(|key| there.keys.contains(key));
    let key = shared.or_else(|| here.keys.iter().find(usable)).cloned().unwrap_or_default();
    let alike = |name: &String| match (here.column(name), there.column(name)) {
        (Some(one), Some(two)) => one.orderly && two.orderly && one.type_name == two.type_name,
        (None, _) | (_, None) => false,
    };
    let shape = |side: &Described| Shape {
        columns: common.clone(),
        key: key
            .iter()
            .filter_map(|name| side.column(name))
            .map(|column| KeyColumn { name: column.name.clone(), type_name: column.type_name.clone() })
            .collect(),
    };
    Method {
        by_range: shared.is_some() && key.iter().all(alike),
        source: shape(here),
        target: shape(there),
        expected_rows: rounded(here.rows),
        notes,
        lacking,
    }
}

/// A number of rows as statistics have it, which are no exact numbers.
fn rounded(rows: f64) -> u64 {
    format!("{:.0}", rows.max(0.0)).parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(columns: &[(&str, &str, bool)], keys: &[&[&str]]) -> Described {
        let columns = columns
            .iter()
            .map(|(name, type_name, orderly)| Column {
                name: (*name).to_owned(),
                type_name: (*type_name).to_owned(),
                orderly: *orderly,
                not_null: true,
            })
            .collect();
        let keys = keys.iter().map(|key| key.iter().map(|name| (*name).to_owned()).collect()).collect();
        Described { rows: 5.0, columns, keys }
    }

    #[test]
    fn ranges_need_a_key_that_both_ends_have_and_order_alike() {
        let numbers = table(&[("id", "bigint", true), ("v", "text", false)], &[&["id"]]);
        assert!(decide(&numbers, &numbers).by_range);
        let texts = table(&[("id", "text", false)], &[&["id"]]);
        let method = decide(&texts, &texts);
        assert!(!method.by_range && method.source.key.len() == 1, "buckets, but rows have a name");
        let without = table(&[("id", "bigint", true), ("v", "text", false)], &[]);
        let method = decide(&numbers, &without);
        assert!(!method.by_range, "the target would read everything for each range");
        let other = table(&[("id", "integer", true), ("v", "text", false)], &[&["id"]]);
        assert!(!decide(&numbers, &other).by_range);
        assert!(decide(&without, &numbers).source.key.is_empty());
    }

    #[test]
    fn what_the_target_lacks_is_a_difference_and_what_it_adds_is_a_note() {
        let small = table(&[("id", "bigint", true)], &[&["id"]]);
        let large = table(&[("id", "bigint", true), ("v", "text", false)], &[&["id"], &["v", "id"]]);
        let method = decide(&large, &small);
        assert!(method.lacking);
        assert_eq!(method.notes, ["the target has no column v"]);
        assert_eq!(method.source.columns, ["id"]);
        let method = decide(&small, &large);
        assert!(!method.lacking && method.notes.len() == 1);
    }
}
