//! What both ends say about a table: which columns can be compared, and by which key its rows are told apart.

use tokio_postgres::{Client, Row, SimpleQueryMessage};

use crate::Error;
use crate::collation::{Collation, Order};
use crate::report::Reading;
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
    /// Whether an index has the key in its order, so that a few rows are found without reading the others.
    pub(crate) is_indexed: bool,
}

/// How a table is compared.
#[derive(Debug)]
pub(crate) struct Method {
    pub(crate) source: Shape,
    pub(crate) target: Shape,
    /// By ranges where the key's order is the same at both ends, and both have an index of it.
    pub(crate) reading: Reading,
    /// Rows at the source, about; those that fulfil the condition.
    pub(crate) expected_rows: u64,
    /// Rows that the source reads for each of them, about.
    pub(crate) reads_per_row: u64,
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
    order: Order,
    not_null: bool,
}

/// A unique index that tells all rows apart.
#[derive(Debug)]
struct Key {
    columns: Vec<String>,
    /// Whether it is in the order of its columns: an index may have another collation than they have.
    is_sorted: bool,
}

/// A table at one end.
#[derive(Debug)]
struct Described {
    rows: f64,
    columns: Vec<Column>,
    /// The best one first.
    keys: Vec<Key>,
}

impl Described {
    fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    fn has_key(&self, columns: &[String]) -> bool {
        self.keys.iter().any(|key| key.columns == columns)
    }

    /// Whether an index has these columns in their order.
    fn is_indexed(&self, columns: &[String]) -> bool {
        self.keys.iter().any(|key| key.columns == columns && key.is_sorted)
    }
}

const TABLE: &str = "SELECT c.oid, \
    greatest(c.reltuples, (SELECT sum(greatest(p.reltuples, 0)) FROM pg_partition_tree(c.oid) t JOIN pg_class p ON p.oid = t.relid), 0)::float8, \
    current_setting('server_version_num')::int4 \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1::text AND c.relname = $2::text AND c.relkind IN ('r', 'p')";

/// Columns, and of texts the collation. Where its locale and rules are kept is not the same in any three versions, hence the
/// JSON; a column with the database's collation has it as its own, of the provider `d`.
fn columns(server: i32) -> String {
    let actual = if server >= 150_000 {
        "pg_database_collation_actual_version(d.oid)"
    } else {
        // Databases have libc's collations only, and cannot be asked. The C library has one version for all of its locales
        // where PostgreSQL runs most.
        "(SELECT pg_collation_actual_version(c.oid) FROM pg_collation c WHERE c.collprovider = 'c' \
         AND c.collcollate <> '' AND pg_collation_actual_version(c.oid) IS NOT NULL \
         ORDER BY c.collcollate = d.datcollate DESC, c.oid LIMIT 1)"
    };
    format!(
        "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, \
         a.atttypid = ANY('{{int2,int4,int8,numeric,date,timestamp,timestamptz,uuid,bytea,bool,oid}}'::regtype[]), \
         CASE WHEN l.own THEN l.facts ->> 'collprovider' ELSE coalesce(d.facts ->> 'datlocprovider', 'c') END, \
         CASE WHEN l.own THEN coalesce(l.facts ->> 'colllocale', l.facts ->> 'colliculocale', l.facts ->> 'collcollate') \
             ELSE coalesce(d.facts ->> 'datlocale', d.facts ->> 'daticulocale', d.facts ->> 'datcollate') END, \
         CASE WHEN l.own THEN l.facts ->> 'collicurules' ELSE d.facts ->> 'daticurules' END, \
         l.deterministic, CASE WHEN l.own THEN pg_collation_actual_version(l.oid) ELSE {actual} END, \
         getdatabaseencoding()::text \
         FROM pg_attribute a \
         LEFT JOIN (SELECT oid, collprovider <> 'd' AS own, collisdeterministic AS deterministic, to_jsonb(l) AS facts \
             FROM pg_collation l) l \
             ON l.oid = a.attcollation AND a.atttypid = ANY('{{text,varchar,bpchar}}'::regtype[]) \
         CROSS JOIN (SELECT oid, datcollate, to_jsonb(d) AS facts FROM pg_database d WHERE datname = current_database()) d \
         WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
    )
}

const KEYS: &str = "SELECT (SELECT array_agg(a.attname::text ORDER BY k.at) \
        FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, at) \
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.at <= i.indnkeyatts), \
    (SELECT bool_and(a.attcollation = k.sorted_by AND o.opcdefault) \
        FROM unnest(i.indkey::int2[], i.indcollation::oid[], i.indclass::oid[]) WITH ORDINALITY AS k(attnum, sorted_by, class, at) \
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
        JOIN pg_opclass o ON o.oid = k.class WHERE k.at <= i.indnkeyatts) \
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
    let (oid, rows, server): (u32, f64, i32) = (row.get(0), row.get(1), row.get(2));
    let columns =
        client.query(&columns(server), &[&oid]).await.map_err(failed("list the columns of a table"))?;
    let columns: Vec<Column> = columns
        .iter()
        .map(|row| Column {
            name: row.get(0),
            type_name: row.get(1),
            not_null: row.get(2),
            order: Order::of(row.get(3), collation(row)),
        })
        .collect();
    let keys = client.query(KEYS, &[&oid]).await.map_err(failed("list the indexes of a table"))?;
    let total = |name: &String| columns.iter().any(|column| column.name == *name && column.not_null);
    let keys = keys
        .iter()
        .filter_map(|row| {
            let is_sorted = row.get::<_, Option<bool>>(1).unwrap_or(false);
            row.get::<_, Option<Vec<String>>>(0).map(|columns| Key { columns, is_sorted })
        })
        .filter(|key| key.columns.iter().all(total))
        .collect();
    Ok(Some(Described { rows, columns, keys }))
}

/// The collation of a column, if it has one that matters.
fn collation(row: &Row) -> Option<Collation> {
    row.get::<_, Option<bool>>(7).map(|is_deterministic| Collation {
        provider: row.get(4),
        locale: row.get(5),
        rules: row.get(6),
        is_deterministic,
        version: row.get(8),
        encoding: row.get(9),
    })
}

/// About how many rows of a table fulfil a condition, as the server plans.
async fn planned(client: &Client, table: &TableName, condition: &str) -> Result<Option<f64>, Error> {
    let sql = format!("EXPLAIN SELECT FROM {} WHERE ({condition}\n)", table.quoted());
    let failed = |source| Error::Database { end: "source", doing: "estimate the rows of a table", source };
    let messages = client.simple_query(&sql).await.map_err(failed)?;
    let line = messages
        .iter()
        .find_map(|message| if let SimpleQueryMessage::Row(row) = message { row.get(0) } else { None });
    let rows = line.and_then(|line| line.split("rows=").nth(1)).and_then(|rest| rest.split(' ').next());
    Ok(rows.and_then(|rows| rows.parse().ok()))
}

/// How to compare a table, of which `listed` columns of the rows that fulfil `condition` are to be at the target; `Err`
/// inside says in words why it cannot be.
pub(crate) async fn method(
    source: (&Client, &TableName),
    target: (&Client, &TableName),
    (listed, condition): (Option<&[String]>, Option<&str>),
) -> Result<Result<Method, String>, Error> {
    let Some(mut here) = describe(source.0, "source", source.1).await? else {
        return Ok(Err("the table does not exist at the source".to_owned()));
    };
    let Some(there) = describe(target.0, "target", target.1).await? else {
        return Ok(Err(format!("the target has no table {}", target.1)));
    };
    if let Some(listed) = listed {
        // What is not in the list need not be at the target.
        here.columns.retain(|column| listed.contains(&column.name));
    }
    let all = here.rows;
    if let Some(condition) = condition {
        here.rows = planned(source.0, source.1, condition).await?.unwrap_or(all);
    }
    let reads_per_row = rounded(all / here.rows.max(1.0)).max(1);
    Ok(Ok(Method { reads_per_row, ..decide(&here, &there) }))
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
    let usable = |key: &&Key| key.columns.iter().all(|name| common.contains(name));
    let shared = here.keys.iter().filter(usable).find(|key| there.has_key(&key.columns));
    let key =
        shared.or_else(|| here.keys.iter().find(usable)).map_or_else(Vec::new, |key| key.columns.clone());
    let alike = |name: &String| match (here.column(name), there.column(name)) {
        (Some(one), Some(two)) => one.type_name == two.type_name && one.order.is_that_of(&two.order),
        (None, _) | (_, None) => false,
    };
    let shape = |side: &Described| Shape {
        columns: common.clone(),
        key: key
            .iter()
            .filter_map(|name| side.column(name))
            .map(|column| KeyColumn { name: column.name.clone(), type_name: column.type_name.clone() })
            .collect(),
        is_indexed: !key.is_empty() && side.is_indexed(&key),
    };
    let (source, target) = (shape(here), shape(there));
    let why_whole = if key.is_empty() {
        Some("it has no key")
    } else if !source.is_indexed || !target.is_indexed {
        Some("not both ends have an index in the order of its key")
    } else if !key.iter().all(alike) {
        Some("both ends may put its key into different orders")
    } else {
        None
    };
    notes.extend(why_whole.map(|why| format!("it is read whole, in one scan of each end: {why}")));
    Method {
        reading: if why_whole.is_none() { Reading::Ranges } else { Reading::Scans },
        source,
        target,
        expected_rows: rounded(here.rows),
        reads_per_row: 1,
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

    fn table(columns: &[(&str, &str, Order)], keys: &[&[&str]]) -> Described {
        let columns = columns
            .iter()
            .map(|(name, type_name, order)| Column {
                name: (*name).to_owned(),
                type_name: (*type_name).to_owned(),
                order: order.clone(),
                not_null: true,
            })
            .collect();
        let keys = keys
            .iter()
            .map(|key| Key { columns: key.iter().map(|name| (*name).to_owned()).collect(), is_sorted: true })
            .collect();
        Described { rows: 5.0, columns, keys }
    }

    fn german(version: &str) -> Order {
        let collation = Collation {
            provider: "i".to_owned(),
            locale: Some("de".to_owned()),
            rules: None,
            is_deterministic: true,
            version: Some(version.to_owned()),
            encoding: "UTF8".to_owned(),
        };
        Order::of(false, Some(collation))
    }

    #[test]
    fn ranges_need_a_key_that_both_ends_have_and_order_alike() {
        let v = ("v", "text", Order::Own);
        let numbers = table(&[("id", "bigint", Order::Everywhere), v.clone()], &[&["id"]]);
        assert_eq!(decide(&numbers, &numbers).reading, Reading::Ranges);
        let without = table(&[("id", "bigint", Order::Everywhere), v.clone()], &[]);
        let method = decide(&numbers, &without);
        assert_eq!(method.reading, Reading::Scans, "the target would read everything for each range");
        assert_eq!(
            method.notes,
            [
                "it is read whole, in one scan of each end: not both ends have an index in the order of its key"
            ]
        );
        assert!(method.source.is_indexed && !method.target.is_indexed);
        let other = table(&[("id", "integer", Order::Everywhere), v], &[&["id"]]);
        assert_eq!(decide(&numbers, &other).reading, Reading::Scans);
        let method = decide(&without, &numbers);
        assert!(method.source.key.is_empty() && !method.source.is_indexed && !method.target.is_indexed);
        assert_eq!(method.notes, ["it is read whole, in one scan of each end: it has no key"]);
    }

    #[test]
    fn texts_are_read_by_ranges_where_both_ends_have_the_same_collation() {
        let texts = |order| table(&[("id", "text", order)], &[&["id"]]);
        let (old, new) = (texts(german("153.112")), texts(german("153.120")));
        assert_eq!(decide(&old, &old).reading, Reading::Ranges);
        for (here, there) in [(&old, &new), (&old, &texts(Order::Everywhere)), (&old, &texts(Order::Own))] {
            let method = decide(here, there);
            assert_eq!(method.reading, Reading::Scans);
            assert!(method.source.is_indexed && method.source.key.len() == 1, "rows have a name");
        }
        let mut unsorted = texts(german("153.112"));
        unsorted.keys[0].is_sorted = false;
        assert_eq!(decide(&old, &unsorted).reading, Reading::Scans, "its index has another collation");
    }

    #[test]
    fn what_the_target_lacks_is_a_difference_and_what_it_adds_is_a_note() {
        let small = table(&[("id", "bigint", Order::Everywhere)], &[&["id"]]);
        let large = table(
            &[("id", "bigint", Order::Everywhere), ("v", "text", Order::Own)],
            &[&["id"], &["v", "id"]],
        );
        let method = decide(&large, &small);
        assert!(method.lacking);
        assert_eq!(method.notes, ["the target has no column v"]);
        assert_eq!(method.source.columns, ["id"]);
        let method = decide(&small, &large);
        assert!(!method.lacking && method.notes.len() == 1);
    }

    #[tokio::test]
    async fn servers_before_version_15_are_asked_in_words_that_they_know_and_say_the_same() {
        let server = testkit::PgServer::start().await.unwrap();
        let client = server.client("postgres").await.unwrap();
        let make = "CREATE TABLE t (id int, a text COLLATE \"en-x-icu\", b text, c varchar(5) COLLATE \"C\", \
            d char(3) COLLATE ucs_basic, e text[], f xml)";
        client.batch_execute(make).await.unwrap();
        let mut told = Vec::new();
        let version: i32 = client
            .query_one("SHOW server_version_num", &[])
            .await
            .unwrap()
            .get::<_, String>(0)
            .parse()
            .unwrap();
        for version in [140_000, version] {
            let rows = client.query(&columns(version).replace("$1", "'t'::regclass"), &[]).await.unwrap();
            told.push(rows.iter().map(|row| Order::of(row.get(3), collation(row))).collect::<Vec<Order>>());
        }
        assert_eq!(told[0], told[1]);
        let Order::Collated(english) = &told[0][1] else { panic!("{told:?}") };
        assert_eq!((english.provider.as_str(), english.is_deterministic), ("i", true));
        assert!(english.version.is_some() && matches!(told[0][2], Order::Collated(_)), "{told:?}");
        let (everywhere, own) = (Order::Everywhere, Order::Own);
        assert_eq!([&told[0][0], &told[0][3], &told[0][4]], [&everywhere; 3]);
        assert_eq!([&told[0][5], &told[0][6]], [&own; 2]);
    }
}
