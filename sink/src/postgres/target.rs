//! The target table: created where it is missing, checked where it exists, and described for statements.

use std::sync::Arc;

use event::{Column, TableInfo, UniqueKey};
use tokio_postgres::Client;

use super::failure::{Failure, classify};
use super::plan::Texts;
use super::progress::CREATE_LOCK;
use super::route::{self, Locate, Routing};
use super::sql::{qualified, quote};
use crate::Error;

/// How a value is compared where rows are found by all their values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Compare {
    /// By `=`, for which the table may have an index: equal values are the same, and none is NULL.
    Equals,
    /// By `IS NOT DISTINCT FROM`: equal values are the same.
    NotDistinct,
    /// By their texts.
    Text,
}

impl Compare {
    /// Of a column of a type, as `format_type` names it without a modifier, with the collation of a text.
    fn of(cast: &str, not_null: bool, deterministic: Option<bool>) -> Self {
        let exact = match cast {
            "boolean"
            | "smallint"
            | "integer"
            | "bigint"
            | "oid"
            | "uuid"
            | "bytea"
            | "date"
            | "time without time zone"
            | "timestamp without time zone"
            | "timestamp with time zone" => true,
            "text" | "character varying" => deterministic == Some(true),
            _ => false,
        };
        match (exact, not_null) {
            (true, true) => Self::Equals,
            (true, false) => Self::NotDistinct,
            (false, _) => Self::Text,
        }
    }
}

/// A column of the target that the sink writes.
#[derive(Clone, Debug)]
pub(crate) struct TargetColumn {
    /// Position in [`TableInfo::columns`].
    pub(crate) source: usize,
    /// Quoted name.
    pub(crate) name: String,
    /// Type without modifiers and below domains: the cast reads the text, the assignment checks the rest.
    pub(crate) cast: String,
    /// `GENERATED ALWAYS AS IDENTITY`: may be inserted with an override, never updated.
    pub(crate) identity_always: bool,
    /// How values of the key are compared; `=` of the index's own operator class.
    pub(crate) equals: String,
    /// How its values are compared where rows are found by all of them.
    pub(crate) compare: Compare,
}

/// What statements need to know about one table.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) info: Arc<TableInfo>,
    pub(crate) routing: Routing,
    /// Quoted and qualified.
    pub(crate) name: String,
    pub(crate) columns: Vec<TargetColumn>,
    /// Positions in `columns` of the key that finds rows; empty when a row is found by all its values.
    pub(crate) key: Vec<usize>,
    /// Some constraint may be deferred.
    pub(crate) deferrable: bool,
    /// `TRUNCATE` is possible: permitted, and no foreign key refers to the table.
    pub(crate) truncatable: bool,
    /// Its rows lie in partitions.
    pub(crate) partitioned: bool,
    /// What was written about it so far.
    pub(crate) texts: Texts,
}

fn rejected(code: &'static str, what: String) -> Failure {
    Failure::Fatal(Error::Rejected { code, what })
}

struct Found {
    oid: u32,
    deferrable: bool,
    truncatable: bool,
    partitioned: bool,
}

async fn find(client: &Client, schema: &str, name: &str) -> Result<Option<Found>, Failure> {
    let row = client
        .query_opt(
            "SELECT c.oid, \
                EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.condeferrable), \
                pg_catalog.has_table_privilege(c.oid, 'TRUNCATE') AND NOT EXISTS (SELECT FROM \
                    pg_catalog.pg_constraint k WHERE k.confrelid = c.oid AND k.contype = 'f' AND k.conrelid <> c.oid), \
                c.relkind::text \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname = $2",
            &[&schema, &name],
        )
        .await
        .map_err(|e| classify(e, "looking for a target table"))?;
    let Some(row) = row else { return Ok(None) };
    let kind: String = row.get(3);
    if kind != "r" && kind != "p" {
        return Err(rejected(
            "CDC:ErrTargetNotTable",
            format!("{} exists in the target but is not a table", qualified(schema, name)),
        ));
    }
    Ok(Some(Found {
        oid: row.get(0),
        deferrable: row.get(1),
        truncatable: row.get(2),
        partitioned: kind == "p",
    }))
}

/// Describes an existing table for the shape of `info`, creating it first where allowed.
pub(crate) async fn open(client: &Client, info: &Arc<TableInfo>, create: bool) -> Result<Target, Failure> {
    let found = match find(client, &info.schema, &info.name).await? {
        Some(found) => found,
        None if create => {
            create_table(client, info).await?;
            find(client, &info.schema, &info.name).await?.ok_or_else(|| missing(info))?
        }
        None => return Err(missing(info)),
    };
    describe(client, info, &found).await
}

fn missing(info: &TableInfo) -> Failure {
    rejected(
        "CDC:ErrTargetTableMissing",
        format!("table {} does not exist in the target; create it, or allow create-tables", full_name(info)),
    )
}

fn full_name(info: &TableInfo) -> String {
    qualified(&info.schema, &info.name)
}

const COLUMNS: &str = "SELECT a.attname::text, a.attidentity::text, a.attgenerated::text, \
        a.attnotnull AND NOT a.atthasdef AND a.attidentity = '', \
        pg_catalog.format_type((WITH RECURSIVE below AS (\
            SELECT t.oid, t.typtype, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid \
            UNION ALL SELECT t.oid, t.typtype, t.typbasetype FROM below \
                JOIN pg_catalog.pg_type t ON t.oid = below.typbasetype WHERE below.typtype = 'd') \
            SELECT oid FROM below WHERE typtype <> 'd'), -1), \
        a.attnotnull, (SELECT c.collisdeterministic FROM pg_catalog.pg_collation c WHERE c.oid = a.attcollation) \
     FROM pg_catalog.pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

const KEYS: &str = "SELECT pg_catalog.array_agg(a.attname::text ORDER BY k.ord), pg_catalog.array_agg((\
            SELECT pg_catalog.format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_catalog.pg_opclass c \
            JOIN pg_catalog.pg_amop m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype \
                AND m.amoprighttype = c.opcintype AND m.amopstrategy = 3 \
            JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr \
            JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace \
            WHERE c.oid = i.indclass[(k.ord - 1)::integer]) ORDER BY k.ord) \
     FROM pg_catalog.pg_index i, \
        LATERAL pg_catalog.unnest(i.indkey::smallint[]) WITH ORDINALITY AS k(attnum, ord) \
        JOIN pg_catalog.pg_attribute a ON a.attrelid = $1 AND a.attnum = k.attnum \
     WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL \
        AND i.indexprs IS NULL AND k.ord <= i.indnkeyatts GROUP BY i.indexrelid ORDER BY i.indexrelid";

async fn describe(client: &Client, info: &Arc<TableInfo>, found: &Found) -> Result<Target, Failure> {
    let failed = |e| classify(e, "reading the shape of a target table");
    let rows = client.query(COLUMNS, &[&found.oid]).await.map_err(failed)?;
    let mut columns = Vec::new();
    for (source, column) in info.columns.iter().enumerate().filter(|(_, c)| c.generated.is_none()) {
        let row = rows.iter().find(|row| row.get::<_, &str>(0) == column.name);
        let Some(row) = row else {
            return Err(rejected(
                "CDC:ErrTargetColumnMissing",
                format!(
                    "table {} in the target has no column {}; run `ALTER TABLE {} ADD COLUMN {} {}` there",
                    full_name(info),
                    quote(&column.name),
                    full_name(info),
                    quote(&column.name),
                    column.ty.sql
                ),
            ));
        };
        if !row.get::<_, &str>(2).is_empty() {
            return Err(rejected(
                "CDC:ErrTargetColumnGenerated",
                format!("column {} of {} is computed in the target", quote(&column.name), full_name(info)),
            ));
        }
        let compare = Compare::of(row.get(4), row.get(5), row.get(6));
        columns.push(TargetColumn {
            source,
            name: quote(&column.name),
            cast: row.get(4),
            identity_always: row.get::<_, &str>(1) == "a",
            equals: "=".into(),
            compare,
        });
    }
    for row in &rows {
        let name: &str = row.get(0);
        if row.get::<_, bool>(3) && info.column_index(name).is_none() {
            return Err(rejected(
                "CDC:ErrTargetColumnExtra",
                format!(
                    "column {} of {} exists only in the target and accepts no NULL; give it a default there",
                    quote(name),
                    full_name(info)
                ),
            ));
        }
    }
    let routing = Routing::new(info);
    let key = match &routing.locate {
        Locate::FullRow => Vec::new(),
        Locate::Key(wanted) => find_key(client, info, found.oid, wanted, &mut columns).await?,
    };
    Ok(Target {
        info: Arc::clone(info),
        routing,
        name: full_name(info),
        columns,
        key,
        deferrable: found.deferrable,
        truncatable: found.truncatable,
        partitioned: found.partitioned,
        texts: Texts::default(),
    })
}

/// Positions in `columns` of the key that finds rows, which must be a unique key of the target too.
async fn find_key(
    client: &Client,
    info: &TableInfo,
    oid: u32,
    wanted: &[usize],
    columns: &mut [TargetColumn],
) -> Result<Vec<usize>, Failure> {
    let rows =
        client.query(KEYS, &[&oid]).await.map_err(|e| classify(e, "reading the keys of a target table"))?;
    let wanted_names: Vec<&str> = wanted.iter().map(|&c| info.columns[c].name.as_str()).collect();
    let keys = rows.iter().map(|row| (row.get::<_, Vec<String>>(0), row.get::<_, Vec<Option<String>>>(1)));
    let found = keys.into_iter().find(|(names, _)| {
        names.len() == wanted_names.len() && names.iter().all(|name| wanted_names.contains(&name.as_str()))
    });
    let Some((names, operators)) = found else {
        let list: Vec<String> = wanted_names.iter().map(|name| quote(name)).collect();
        return Err(rejected(
            "CDC:ErrTargetKeyMissing",
            format!(
                "table {} in the target has no unique key on ({}); run `CREATE UNIQUE INDEX ON {} ({})` there",
                full_name(info),
                list.join(", "),
                full_name(info),
                list.join(", ")
            ),
        ));
    };
    let mut key = Vec::with_capacity(names.len());
    for (name, operator) in names.iter().zip(operators) {
        let position = columns.iter().position(|column| info.columns[column.source].name == *name);
        if let Some(position) = position {
            columns[position].equals = operator.unwrap_or_else(|| "=".into());
            key.push(position);
        }
    }
    Ok(key)
}

async fn create_table(client: &Client, info: &TableInfo) -> Result<(), Failure> {
    let name = full_name(info);
    let result = create_in_transaction(client, info).await;
    let Err(error) = result else { return Ok(()) };
    // The connection may be used again; a failed rollback shows at its next use.
    let _ = client.batch_execute("ROLLBACK").await;
    // Someone created it in the meantime: the caller looks again.
    if is_there_already(&error) {
        return Ok(());
    }
    Err(classify(error, &format!("creating table {name} in the target")))
}

async fn create_in_transaction(client: &Client, info: &TableInfo) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("BEGIN; {CREATE_LOCK}")).await?;
    create_types(client, info).await?;
    client.batch_execute(&create_sql(info)).await?;
    client.batch_execute("COMMIT").await
}

/// Whether a statement failed because somebody else has just created the table, one of its types or its schema.
pub(super) fn is_there_already(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| matches!(code.code(), "42P07" | "42710" | "42P06"))
}

/// Creates the schema of a table, and the types of its columns with theirs, where they are missing.
pub(super) async fn create_types(client: &Client, info: &TableInfo) -> Result<(), tokio_postgres::Error> {
    create_schema(client, &info.schema).await?;
    for definition in info.columns.iter().flat_map(|column| &column.ty.definitions) {
        create_schema(client, &definition.schema).await?;
        let exists = client
            .query_one(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n \
                 ON n.oid = t.typnamespace WHERE n.nspname = $1 AND t.typname = $2)",
                &[&definition.schema, &definition.name],
            )
            .await?;
        if !exists.get::<_, bool>(0) {
            client.batch_execute(&definition.create_sql).await?;
        }
    }
    Ok(())
}

/// Creates a schema where it is missing.
pub(super) async fn create_schema(client: &Client, schema: &str) -> Result<(), tokio_postgres::Error> {
    let exists = client
        .query_one("SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1)", &[&schema])
        .await?;
    if !exists.get::<_, bool>(0) {
        client.batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {}", quote(schema))).await?;
    }
    Ok(())
}

/// `CREATE TABLE` with columns, types, NOT NULL and unique keys. Defaults and sequences stay behind: the
/// upstream computes the values.
pub(crate) fn create_sql(info: &TableInfo) -> String {
    create_with("CREATE TABLE IF NOT EXISTS", info, &info.keys.iter().collect::<Vec<_>>())
}

/// The same for a table that is still to be filled and must not be there: of its keys only the primary one, and the one by
/// which rows are found.
pub(crate) fn create_for_copy(info: &TableInfo) -> String {
    let finds = match route::locate(info) {
        Locate::Key(mut columns) => {
            columns.sort_unstable();
            info.keys.iter().find(|key| {
                let mut own = key.columns.clone();
                own.sort_unstable();
                own == columns
            })
        }
        Locate::FullRow => None,
    };
    let primary = info.primary_key();
    let keys: Vec<&UniqueKey> =
        primary.into_iter().chain(finds.filter(|key| primary != Some(*key))).collect();
    create_with("CREATE TABLE", info, &keys)
}

fn create_with(start: &str, info: &TableInfo, keys: &[&UniqueKey]) -> String {
    let mut parts: Vec<String> = info.columns.iter().map(column_sql).collect();
    for key in keys {
        let names: Vec<String> = key.columns.iter().map(|&c| quote(&info.columns[c].name)).collect();
        let kind = match (key.primary, key.nulls_not_distinct) {
            (true, _) => "PRIMARY KEY",
            (false, false) => "UNIQUE",
            (false, true) => "UNIQUE NULLS NOT DISTINCT",
        };
        parts.push(format!("{kind} ({})", names.join(", ")));
    }
    format!("{start} {} ({})", full_name(info), parts.join(", "))
}

fn column_sql(column: &Column) -> String {
    let mut sql = format!("{} {}", quote(&column.name), column.ty.sql);
    if let Some(expression) = &column.generated {
        sql.push_str(&format!(" GENERATED ALWAYS AS ({expression}) STORED"));
    }
    if !column.nullable {
        sql.push_str(" NOT NULL");
    }
    sql
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{column, key};
    use event::TypeKind;

    #[test]
    fn a_table_is_created_with_its_types_and_keys() {
        let mut info = (*crate::testing::table(1, 2)).clone();
        info.name = "Straße \"x\"".into();
        info.columns
            .push(Column { generated: Some("c1 || 'x'".into()), ..column("g", TypeKind::Text, "text") });
        info.keys.push(event::UniqueKey { nulls_not_distinct: true, ..key(&[1], false) });
        assert_eq!(
            create_sql(&info),
            "CREATE TABLE IF NOT EXISTS \"public\".\"Straße \"\"x\"\"\" (\"c0\" text NOT NULL, \"c1\" text, \
             \"g\" text GENERATED ALWAYS AS (c1 || 'x') STORED NOT NULL, PRIMARY KEY (\"c0\"), \
             UNIQUE NULLS NOT DISTINCT (\"c1\"))"
        );
        assert_eq!(
            create_for_copy(&info),
            "CREATE TABLE \"public\".\"Straße \"\"x\"\"\" (\"c0\" text NOT NULL, \"c1\" text, \
             \"g\" text GENERATED ALWAYS AS (c1 || 'x') STORED NOT NULL, PRIMARY KEY (\"c0\"))"
        );
        info.identity = event::ReplicaIdentity::Key(vec![1]);
        assert!(
            create_for_copy(&info).ends_with("PRIMARY KEY (\"c0\"), UNIQUE NULLS NOT DISTINCT (\"c1\"))")
        );
    }
}
