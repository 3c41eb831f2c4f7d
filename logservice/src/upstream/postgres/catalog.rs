//! Tables as the catalog describes them, and whether they can be replicated.
//!
//! A partitioned table is one table: the publication reports changes under the root's name. Its partitions
//! must therefore log the same old image as the root says. The schemas `millrace` and `millrace_capture` are left out: they
//! hold what a changefeed that writes into this database keeps about itself, and the history of its shapes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use event::{Column, IdentityKind, ReplicaIdentity, TableInfo, TypeKind, UniqueKey};
use heartbeatpb::{ChangefeedId, SchemaId, TableId, Ts};

use super::conn::Connection;
use super::names::Names;
use super::publication;
use super::sql::{ident, qualified};
use super::types::Types;
use crate::upstream::{SourceTable, TablePart};
use crate::{Error, TableFilter};

/// A wanted table and all that decides about it.
#[derive(Clone, Debug)]
pub(crate) struct CatalogTable {
    /// Its shape.
    pub(crate) info: Arc<TableInfo>,
    /// Type modifiers of the columns, in order; a change of length has no other trace on the wire.
    pub(crate) type_mods: Vec<i32>,
    /// Whether it is partitioned.
    pub(crate) partitioned: bool,
    /// Size in pages: which to copy first.
    pub(crate) pages: u64,
    /// Whether our role may read it.
    pub(crate) readable: bool,
    /// Whether our role owns it.
    pub(crate) owned: bool,
    /// Whether an index beside the primary key keeps rows apart, also one that is no key to us: partial, over
    /// expressions, deferrable, of a partition, an exclusion. Rows of different key ranges may then be in each other's way.
    pub(crate) other_unique: bool,
    /// Why it cannot be replicated.
    pub(crate) obstacle: Option<String>,
    /// What of it is replicated; `info` has only these columns.
    pub(crate) part: TablePart,
}

impl CatalogTable {
    /// What the rest of the program sees.
    pub(crate) fn source(&self) -> SourceTable {
        let splittable = self.info.is_divisible() && !self.other_unique;
        SourceTable { info: Arc::clone(&self.info), splittable, part: self.part.clone() }
    }

    /// Quoted name for statements.
    pub(crate) fn sql_name(&self) -> String {
        qualified(&self.info.schema, &self.info.name)
    }
}

/// A table before its columns and keys are known.
pub(super) struct Head {
    pub(super) id: u32,
    pub(super) schema_id: i64,
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) kind: u8,
    pub(super) persistence: u8,
    pub(super) identity: u8,
    pub(super) pages: u64,
    pub(super) readable: bool,
    pub(super) owned: bool,
    pub(super) other_unique: bool,
}

/// What to list.
pub(crate) struct Selection<'a> {
    pub(crate) filter: &'a TableFilter,
    /// Whether a table without a key may be replicated by whole rows.
    pub(crate) force_replicate: bool,
    /// Version of the shapes.
    pub(crate) version: Ts,
    /// This table and no other.
    pub(crate) only: Option<TableId>,
    /// Whose publication tells what of each table is replicated; `None`: all of each.
    pub(crate) publishes: Option<&'a ChangefeedId>,
}

/// Lists the wanted tables in order of their ids, eligible or not.
pub(crate) async fn load(
    conn: &mut Connection,
    selection: &Selection<'_>,
) -> Result<Vec<CatalogTable>, Error> {
    let mut heads = load_heads(conn, selection.only).await?;
    heads.retain(|head| selection.filter.matches(&head.schema, &head.name));
    if heads.is_empty() {
        return Ok(Vec::new());
    }
    let list = heads.iter().map(|head| head.id.to_string()).collect::<Vec<_>>().join(",");
    let mut columns = load_columns(conn, &list).await?;
    let mut keys = load_keys(conn, &list).await?;
    let mut partitions = load_leaves(conn, &list).await?;
    let mut parts = match selection.publishes {
        Some(changefeed) => publication::parts(conn, &Names::of(changefeed)).await?,
        None => BTreeMap::new(),
    };
    let mut tables = Vec::with_capacity(heads.len());
    for head in heads {
        let part = parts.remove(&i64::from(head.id)).unwrap_or_default();
        let mut columns: Vec<CatalogColumn> = columns.remove(&head.id).unwrap_or_default();
        let keys = keys.remove(&head.id).unwrap_or_default();
        let leaves = partitions.remove(&head.id).unwrap_or_default();
        // What is not in the list is not there for us: no column, and no key that has it.
        columns.retain(|column| part.has(&column.column.name));
        tables.push(CatalogTable { part, ..assemble(head, columns, keys, &leaves, selection) });
    }
    Ok(tables)
}

async fn load_heads(conn: &mut Connection, only: Option<TableId>) -> Result<Vec<Head>, Error> {
    let only = only.map(|table| format!("AND c.oid = {}", table.0)).unwrap_or_default();
    // Where most tables have no partitions, only the others are asked for theirs: there may be tens of thousands.
    let apart = "(i.indisunique OR i.indisexclusion) AND NOT i.indisprimary";
    let sql = format!(
        "SELECT c.oid, n.oid, n.nspname, c.relname, c.relkind, c.relpersistence, c.relreplident, \
                 CASE c.relkind WHEN 'p' THEN (SELECT COALESCE(sum(greatest(p.relpages, 0)), 0) \
                   FROM pg_catalog.pg_partition_tree(c.oid) t JOIN pg_catalog.pg_class p ON p.oid = t.relid) \
                   ELSE greatest(c.relpages, 0) END, \
                 has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE'), \
                 pg_has_role(c.relowner, 'USAGE'), \
                 CASE c.relkind WHEN 'p' THEN EXISTS (SELECT FROM pg_catalog.pg_partition_tree(c.oid) t \
                     JOIN pg_catalog.pg_index i ON i.indrelid = t.relid WHERE {apart}) \
                   ELSE EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND {apart}) END \
               FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
               WHERE c.relkind IN ('r', 'p', 'f') AND NOT c.relispartition AND c.relpersistence <> 't' \
                 AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture') AND n.nspname !~ '^pg_' {only} \
               ORDER BY c.oid"
    );
    let rows = conn.query("list tables", &sql).await?;
    let mut heads = Vec::with_capacity(rows.len());
    for row in rows {
        let letter = |column| row.text(column).bytes().next().unwrap_or_default();
        heads.push(Head {
            id: row.number(0)?,
            schema_id: row.number(1)?,
            schema: row.text(2).to_owned(),
            name: row.text(3).to_owned(),
            kind: letter(4),
            persistence: letter(5),
            identity: letter(6),
            pages: row.number(7)?,
            readable: row.flag(8),
            owned: row.flag(9),
            other_unique: row.flag(10),
        });
    }
    Ok(heads)
}

/// A column with its number in the catalog.
pub(super) struct CatalogColumn {
    pub(super) number: i16,
    pub(super) type_mod: i32,
    pub(super) column: Column,
}

/// Functions of the server that tell an expression in words look at the tables as they are now, not as the statement sees
/// them: one that is dropped meanwhile is their error. The next look does not see the table at all.
pub(super) fn gone_meanwhile(error: Error) -> Error {
    // The server says these in no other language.
    let of_this = ["could not open relation with OID", "cache lookup failed for"];
    if let Error::UpstreamQuery { action, message, sqlstate } = &error
        && sqlstate == "XX000"
        && of_this.iter().any(|words| message.starts_with(words))
    {
        let message = format!("something was dropped while it was asked to {action}: {message}");
        return Error::UpstreamUnavailable { message };
    }
    error
}

/// The default of a column names no other column, and is told without its table, which somebody may have locked or
/// dropped ([`gone_meanwhile`]).
async fn load_columns(conn: &mut Connection, list: &str) -> Result<BTreeMap<u32, Vec<CatalogColumn>>, Error> {
    let sql = format!(
        "SELECT a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, format_type(a.atttypid, a.atttypmod), \
           a.attnotnull, a.attgenerated, a.attidentity, \
           pg_get_expr(d.adbin, CASE WHEN a.attgenerated = '' THEN 0 ELSE d.adrelid END), \
           NOT COALESCE(co.collisdeterministic, true) \
         FROM pg_catalog.pg_attribute a \
         LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
         LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation \
         WHERE a.attrelid IN ({list}) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum"
    );
    let rows = conn.query("list columns", &sql).await.map_err(gone_meanwhile)?;
    let mut wanted = BTreeSet::new();
    for row in &rows {
        wanted.insert(row.number(3)?);
    }
    let types = Types::load(conn, wanted).await?;
    let mut columns: BTreeMap<u32, Vec<CatalogColumn>> = BTreeMap::new();
    for row in rows {
        let type_mod = row.number(4)?;
        let expression = row.opt(9).map(ToOwned::to_owned);
        let is_generated = !row.text(7).is_empty();
        let mut ty = types.column(row.number(3)?, type_mod, row.text(5));
        if row.flag(10) {
            ty.kind = TypeKind::Nondeterministic(Box::new(ty.kind));
        }
        let column = Column {
            name: row.text(2).to_owned(),
            ty,
            nullable: !row.flag(6),
            generated: is_generated.then(|| expression.clone().unwrap_or_default()),
            identity: match row.text(8) {
                "a" => IdentityKind::Always,
                "d" => IdentityKind::ByDefault,
                _ => IdentityKind::None,
            },
            default: expression.filter(|_| !is_generated),
        };
        let column = CatalogColumn { number: row.number(1)?, type_mod, column };
        columns.entry(row.number(0)?).or_default().push(column);
    }
    Ok(columns)
}

/// A key by the numbers of its columns.
pub(super) struct CatalogKey {
    pub(super) name: String,
    pub(super) primary: bool,
    pub(super) identity: bool,
    pub(super) nulls_not_distinct: bool,
    pub(super) columns: Vec<i16>,
}

/// Complete, immediate unique indexes over plain columns.
async fn load_keys(conn: &mut Connection, list: &str) -> Result<BTreeMap<u32, Vec<CatalogKey>>, Error> {
    let nulls = if conn.version() >= 15 { "i.indnullsnotdistinct" } else { "false" };
    let sql = format!(
        "SELECT i.indrelid, c.relname, i.indisprimary, i.indisreplident, {nulls}, i.indnkeyatts, i.indkey::text \
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid \
         WHERE i.indrelid IN ({list}) AND i.indisunique AND i.indisvalid AND i.indimmediate \
           AND NOT i.indisexclusion AND i.indpred IS NULL AND i.indexprs IS NULL \
         ORDER BY i.indrelid, i.indisprimary DESC, i.indisreplident DESC, c.relname"
    );
    let mut keys: BTreeMap<u32, Vec<CatalogKey>> = BTreeMap::new();
    for row in conn.query("list unique keys", &sql).await? {
        let count: usize = row.number(5)?;
        let numbers: Result<Vec<i16>, _> = row.text(6).split(' ').take(count).map(str::parse).collect();
        let columns = numbers.map_err(|_| Error::protocol("an index has malformed columns"))?;
        keys.entry(row.number(0)?).or_default().push(CatalogKey {
            name: row.text(1).to_owned(),
            primary: row.flag(2),
            identity: row.flag(3),
            nulls_not_distinct: row.flag(4),
            columns,
        });
    }
    Ok(keys)
}

/// A partition, as far as it must agree with its root.
pub(super) struct Leaf {
    name: String,
    kind: u8,
    persistence: u8,
    identity: u8,
    key: BTreeSet<String>,
}

async fn load_leaves(conn: &mut Connection, list: &str) -> Result<BTreeMap<u32, Vec<Leaf>>, Error> {
    let sql = format!(
        "SELECT r.oid, quote_ident(n.nspname) || '.' || quote_ident(l.relname), l.relkind, l.relpersistence, \
           l.relreplident, a.attname \
         FROM pg_catalog.pg_class r CROSS JOIN LATERAL pg_catalog.pg_partition_tree(r.oid) t \
         JOIN pg_catalog.pg_class l ON l.oid = t.relid JOIN pg_catalog.pg_namespace n ON n.oid = l.relnamespace \
         LEFT JOIN pg_catalog.pg_index i ON i.indrelid = l.oid AND i.indisvalid AND i.indimmediate \
           AND CASE l.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END \
         LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = l.oid \
           AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) \
         WHERE r.oid IN ({list}) AND r.relkind = 'p' AND t.isleaf AND l.oid <> r.oid ORDER BY r.oid, l.oid"
    );
    let mut leaves: BTreeMap<u32, Vec<Leaf>> = BTreeMap::new();
    for row in conn.query("list partitions", &sql).await? {
        let letter = |column| row.text(column).bytes().next().unwrap_or_default();
        let list = leaves.entry(row.number(0)?).or_default();
        if list.last().is_none_or(|leaf| leaf.name != row.text(1)) {
            list.push(Leaf {
                name: row.text(1).to_owned(),
                kind: letter(2),
                persistence: letter(3),
                identity: letter(4),
                key: BTreeSet::new(),
            });
        }
        if let (Some(leaf), Some(column)) = (list.last_mut(), row.opt(5)) {
            leaf.key.insert(column.to_owned());
        }
    }
    Ok(leaves)
}

/// Puts a table together.
pub(super) fn assemble(
    head: Head,
    columns: Vec<CatalogColumn>,
    catalog_keys: Vec<CatalogKey>,
    leaves: &[Leaf],
    selection: &Selection<'_>,
) -> CatalogTable {
    let position = |number: i16| columns.iter().position(|column| column.number == number);
    let mut identity = if head.identity == b'f' { ReplicaIdentity::Full } else { ReplicaIdentity::Nothing };
    let mut keys = Vec::new();
    for key in catalog_keys {
        let Some(positions) = key.columns.iter().map(|&n| position(n)).collect::<Option<Vec<_>>>() else {
            continue;
        };
        if (head.identity == b'd' && key.primary) || (head.identity == b'i' && key.identity) {
            identity = ReplicaIdentity::Key(positions.clone());
        }
        keys.push(UniqueKey {
            name: key.name,
            columns: positions,
            primary: key.primary,
            nulls_not_distinct: key.nulls_not_distinct,
        });
    }
    let type_mods = columns.iter().map(|column| column.type_mod).collect();
    let info = TableInfo {
        id: TableId(i64::from(head.id)),
        schema_id: SchemaId(head.schema_id),
        schema: head.schema,
        name: head.name,
        version: selection.version,
        columns: columns.into_iter().map(|column| column.column).collect(),
        keys,
        identity,
    };
    let obstacle = kind_obstacle(head.kind, head.persistence)
        .or_else(|| identity_obstacle(&info, selection.force_replicate))
        .or_else(|| leaves.iter().find_map(|leaf| leaf_obstacle(&info, leaf)));
    CatalogTable {
        info: Arc::new(info),
        type_mods,
        partitioned: head.kind == b'p',
        pages: head.pages,
        readable: head.readable,
        owned: head.owned,
        other_unique: head.other_unique,
        obstacle,
        part: TablePart::default(),
    }
}

fn kind_obstacle(kind: u8, persistence: u8) -> Option<String> {
    if kind == b'f' {
        return Some("it is a foreign table, whose changes are not in the log".to_owned());
    }
    if persistence == b'u' {
        return Some("it is unlogged; run: ALTER TABLE … SET LOGGED".to_owned());
    }
    None
}

/// A published table without a usable identity would make the upstream refuse its updates and deletes, so such
/// a table is never published, whatever the changefeed's options say.
fn identity_obstacle(info: &TableInfo, force_replicate: bool) -> Option<String> {
    let name = qualified(&info.schema, &info.name);
    let handle = info.handle_key();
    match (&info.identity, handle) {
        (ReplicaIdentity::Nothing, Some(key)) => Some(format!(
            "it has no replica identity, so updates and deletes cannot be replicated; run: \
             ALTER TABLE {name} REPLICA IDENTITY USING INDEX {} (or FULL)",
            ident(&key.name)
        )),
        (ReplicaIdentity::Nothing, None) => Some(format!(
            "it has no primary key or other unique key over NOT NULL columns; add one, or set force-replicate and \
             run: ALTER TABLE {name} REPLICA IDENTITY FULL (updates and deletes of a table without a key need it)"
        )),
        (ReplicaIdentity::Full, None) if !force_replicate => Some(
            "it has no primary key or other unique key over NOT NULL columns; add one, or set force-replicate to \
             find its rows by all their columns"
                .to_owned(),
        ),
        (ReplicaIdentity::Full, _) => None,
        (ReplicaIdentity::Key(columns), handle) => {
            if let Some(&column) = columns.iter().find(|&&column| info.columns[column].generated.is_some()) {
                return Some(format!(
                    "its replica identity contains the generated column {:?}, which is not in the log; run: \
                     ALTER TABLE {name} REPLICA IDENTITY FULL",
                    info.columns[column].name
                ));
            }
            let covered = handle.is_some_and(|key| key.columns.iter().all(|column| columns.contains(column)));
            (!covered).then(|| {
                format!(
                    "its replica identity does not contain its primary key, so old rows cannot be found; run: \
                     ALTER TABLE {name} REPLICA IDENTITY DEFAULT (or FULL)"
                )
            })
        }
    }
}

fn leaf_obstacle(root: &TableInfo, leaf: &Leaf) -> Option<String> {
    if let Some(obstacle) = kind_obstacle(leaf.kind, leaf.persistence) {
        return Some(format!("partition {} cannot be replicated: {obstacle}", leaf.name));
    }
    let same = match &root.identity {
        ReplicaIdentity::Full => leaf.identity == b'f',
        ReplicaIdentity::Nothing => false,
        ReplicaIdentity::Key(columns) => {
            columns.iter().map(|&column| root.columns[column].name.clone()).collect::<BTreeSet<_>>()
                == leaf.key
        }
    };
    (!same).then(|| {
        format!(
            "partition {0} has another replica identity than the partitioned table; run: \
             ALTER TABLE {0} REPLICA IDENTITY … as for the table itself",
            leaf.name
        )
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use testkit::PgServer;

    use super::super::admin::connect;
    use super::super::options::ConnectOptions;
    use super::*;

    /// Waits until a statement waits for a lock.
    async fn somebody_waits(server: &PgServer) {
        let client = server.client("postgres").await.expect("client");
        let waits = async || {
            let row = client.query_one("SELECT count(*) FROM pg_locks WHERE NOT granted", &[]).await;
            row.expect("locks").get::<_, i64>(0) > 0
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !waits().await {
            assert!(Instant::now() < deadline, "nobody waits");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_table_that_is_dropped_while_the_catalog_is_read_is_no_reason_to_stop() {
        let server = PgServer::start().await.expect("server");
        let tables = "CREATE TABLE stays (id int PRIMARY KEY, n int DEFAULT 1 + 1);
            CREATE TABLE goes (id int PRIMARY KEY, n int GENERATED ALWAYS AS (id + 1) STORED)";
        server.sql("postgres", tables).await.expect("tables");
        let options = ConnectOptions::parse(&server.uri("postgres")).expect("options");
        let mut conn = connect(&options).await.expect("connect");
        let others = server.client("postgres").await.expect("client");
        let filter = TableFilter::new(&["public.*"], true).expect("filter");
        let selection = Selection {
            filter: &filter,
            force_replicate: false,
            version: Ts(1),
            only: None,
            publishes: None,
        };

        // A plain default is told without a look at its table, which somebody may have locked.
        others.batch_execute("BEGIN; DROP TABLE goes; LOCK TABLE stays").await.expect("drop");
        let (seen, ()) = tokio::join!(load(&mut conn, &selection), async {
            somebody_waits(&server).await;
            others.batch_execute("COMMIT").await.expect("commit");
        });
        // It was there when the statement began. Newer servers leave its expression out.
        if let Err(error) = seen {
            assert!(error.is_retryable(), "{error}");
        }

        others.batch_execute("BEGIN; LOCK TABLE stays").await.expect("lock");
        let seen = load(&mut conn, &selection).await.expect("the next look");
        assert_eq!(Vec::from_iter(seen.iter().map(|table| &*table.info.name)), ["stays"]);
        assert_eq!(seen[0].info.columns[1].default.as_deref(), Some("(1 + 1)"));
    }

    #[test]
    fn what_was_dropped_meanwhile_is_looked_for_again_and_what_is_wrong_is_not() {
        let error = |sqlstate: &str, message: &str| {
            let (action, message) = ("list columns".to_owned(), message.to_owned());
            gone_meanwhile(Error::UpstreamQuery { action, message, sqlstate: sqlstate.to_owned() })
        };
        assert!(error("XX000", "could not open relation with OID 16744").is_retryable());
        assert!(error("XX000", "cache lookup failed for relation 16744").is_retryable());
        assert!(!error("XX000", "unexpected chunk number 1").is_retryable());
        assert!(!error("42P01", "relation does not exist").is_retryable());
    }
}
