//! Tables of the target that a copy has created: the only ones that it may drop, and to which it adds indexes.
//!
//! The transaction that creates a table notes its relation and the statement. A table that has another shape or name when
//! the copy begins again, or that nobody wants any more, is dropped if it is still that relation under that name and holds
//! only rows that the copy has written:
//!
//! ```text
//!   missing ──► created, noted ──► parts ──► indexes, one by one ──► the stream
//!      ▲              │              │
//!      └── dropped ◄──┴── another shape: all rows are the copy's ◄──┘
//!                         or else the note goes and the table stays, as if somebody else had made it
//! ```

use std::sync::Arc;

use event::{CopyIndex, TableInfo};
use heartbeatpb::TableId;
use tokio_postgres::Client;

use super::config::PgConfig;
use super::failure::{Failure, classify};
use super::progress::{CREATE_LOCK, create_missing, end};
use super::registration::{self, Registration};
use super::sql::{qualified, quote};
use super::{copied, target};
use crate::Error;

/// Where notes are kept, and by whom.
#[derive(Clone, Copy)]
pub(crate) struct Notes<'a> {
    /// Quoted schema of the sink's own tables.
    pub(crate) own: &'a str,
    pub(crate) changefeed: &'a str,
    pub(crate) registration: &'a Registration,
}

/// A table that the copy has created.
struct Note {
    table: TableId,
    relation: u32,
    schema: String,
    name: String,
    statement: String,
}

/// Creates the table of notes where it is missing.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let statements = format!(
        "CREATE TABLE IF NOT EXISTS {schema}.created (changefeed text NOT NULL, table_id bigint NOT NULL, \
             relation oid NOT NULL, schema_name text NOT NULL, table_name text NOT NULL, statement text NOT NULL, \
             indexes text[] NOT NULL DEFAULT '{{}}', PRIMARY KEY (changefeed, table_id));"
    );
    create_missing(client, config, &["created"], &statements).await
}

fn noting(error: tokio_postgres::Error) -> Failure {
    classify(error, "noting a table that the initial copy has created")
}

impl Notes<'_> {
    /// Creates a table that is missing, with the keys by which rows are found and without other indexes.
    pub(crate) async fn create(&self, client: &Client, info: &TableInfo) -> Result<(), Failure> {
        let exists = "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
                      ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2)";
        let row = client.query_one(exists, &[&info.schema, &info.name]).await;
        let row = row.map_err(|e| classify(e, "looking for a target table"))?;
        if row.get(0) {
            return Ok(());
        }
        self.registration.begin_checked(client).await?;
        let result = self.create_and_note(client, info).await;
        let ended = end(client, result.is_ok()).await;
        let Err(error) = result else { return ended };
        // Somebody has created it in the meantime: the caller looks again.
        if target::is_there_already(&error) {
            return Ok(());
        }
        let name = qualified(&info.schema, &info.name);
        Err(classify(error, &format!("creating table {name} in the target")))
    }

    async fn create_and_note(&self, client: &Client, info: &TableInfo) -> Result<(), tokio_postgres::Error> {
        client.batch_execute(CREATE_LOCK).await?;
        target::create_types(client, info).await?;
        let statement = target::create_for_copy(info);
        client.batch_execute(&statement).await?;
        let relation = client
            .query_one(
                "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE n.nspname = $1 AND c.relname = $2",
                &[&info.schema, &info.name],
            )
            .await?;
        let relation: u32 = relation.get(0);
        let sql = format!(
            "INSERT INTO {0}.created AS c (changefeed, table_id, relation, schema_name, table_name, statement) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (changefeed, table_id) DO UPDATE SET \
                 relation = EXCLUDED.relation, schema_name = EXCLUDED.schema_name, table_name = EXCLUDED.table_name, \
                 statement = EXCLUDED.statement, indexes = '{{}}'",
            self.own
        );
        client
            .execute(&sql, &[&self.changefeed, &info.id.0, &relation, &info.schema, &info.name, &statement])
            .await?;
        // What is noted of a table that somebody has dropped meanwhile is in none.
        let parts = format!("DELETE FROM {}.parts WHERE changefeed = $1 AND table_id = $2", self.own);
        client.execute(&parts, &[&self.changefeed, &info.id.0]).await.map(drop)
    }

    /// Whether a table is there that the copy has created.
    pub(crate) async fn has_created(&self, client: &Client, info: &TableInfo) -> Result<bool, Failure> {
        Ok(match self.load(client, Some(info.id)).await?.pop() {
            Some(note) => self.is_there(client, &note).await? && note.is_of(info),
            None => false,
        })
    }

    async fn load(&self, client: &Client, only: Option<TableId>) -> Result<Vec<Note>, Failure> {
        let sql = format!(
            "SELECT table_id, relation, schema_name, table_name, statement FROM {}.created \
             WHERE changefeed = $1 AND ($2::bigint IS NULL OR table_id = $2) ORDER BY table_id",
            self.own
        );
        let rows = client.query(&sql, &[&self.changefeed, &only.map(|table| table.0)]).await;
        let rows = rows.map_err(|e| classify(e, "reading which tables the initial copy has created"))?;
        let note = |row: &tokio_postgres::Row| Note {
            table: TableId(row.get(0)),
            relation: row.get(1),
            schema: row.get(2),
            name: row.get(3),
            statement: row.get(4),
        };
        Ok(rows.iter().map(note).collect())
    }

    /// Whether the relation still is what the copy has created, under its name.
    async fn is_there(&self, client: &Client, note: &Note) -> Result<bool, Failure> {
        let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
                   ON n.oid = c.relnamespace WHERE c.oid = $1 AND c.relkind = 'r' AND n.nspname = $2 AND c.relname = $3)";
        let row = client.query_one(sql, &[&note.relation, &note.schema, &note.name]).await;
        Ok(row.map_err(|e| classify(e, "looking for a target table"))?.get(0))
    }

    /// Drops the tables that an earlier run has created and that are not wanted, or not in this shape, any more, and
    /// forgets what was copied into them.
    pub(crate) async fn retain(&self, client: &Client, tables: &[Arc<TableInfo>]) -> Result<(), Failure> {
        for note in self.load(client, None).await? {
            let wanted = tables.iter().find(|info| info.id == note.table);
            if wanted.is_some_and(|info| note.is_of(info)) {
                continue;
            }
            self.registration.begin_checked(client).await?;
            let result = self.drop_or_leave(client, &note).await;
            let ended = end(client, result.is_ok()).await;
            result.and(ended)?;
        }
        Ok(())
    }

    /// Makes an index of a table that the copy has created, unless it is there. Without one that the target cannot have, and
    /// that keeps no rows apart, the table is as good; so that is left out.
    pub(crate) async fn index(
        &self,
        client: &Client,
        info: &TableInfo,
        index: &CopyIndex,
    ) -> Result<(), Failure> {
        let Some(note) = self.load(client, Some(info.id)).await?.pop() else { return Ok(()) };
        if !note.is_of(info) || !self.is_there(client, &note).await? {
            return Ok(());
        }
        self.registration.begin_checked(client).await?;
        let result = self.make(client, &note, index).await;
        let ended = end(client, result.is_ok()).await;
        match result {
            Err(Failure::Fatal(Error::Rejected { what, .. })) if !index.unique => {
                tracing::warn!(
                    error = what,
                    "the target cannot have an index of the source, which is left out"
                );
                ended
            }
            result => result.and(ended),
        }
    }

    async fn make(&self, client: &Client, note: &Note, index: &CopyIndex) -> Result<(), Failure> {
        let (table, name) = (qualified(&note.schema, &note.name), quote(&index.name));
        let doing = format!("creating index {name} of table {table}");
        let failed = |e| classify(e, &doing);
        let look = format!(
            "SELECT $3 = ANY (c.indexes), EXISTS (SELECT FROM pg_catalog.pg_class x JOIN pg_catalog.pg_namespace n \
                 ON n.oid = x.relnamespace WHERE n.nspname = c.schema_name AND x.relname = $3), \
                 EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.relation AND i.indisunique AND i.indisvalid \
                     AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL AND $4::text[] = ARRAY(\
                         SELECT a.attname::text FROM pg_catalog.unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (number, place) \
                         JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number \
                         WHERE k.place <= i.indnkeyatts ORDER BY k.place)) \
             FROM {}.created AS c WHERE c.changefeed = $1 AND c.table_id = $2",
            self.own
        );
        let row = client
            .query_opt(&look, &[&self.changefeed, &note.table.0, &index.name, &index.columns])
            .await
            .map_err(failed)?;
        let Some(row) = row else { return Ok(()) };
        let (made, taken, same): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
        if made || (same && index.unique) {
            return Ok(());
        }
        // Where somebody else has the name, the server chooses another.
        let named = if taken { String::new() } else { format!(" {name}") };
        let unique = if index.unique { "UNIQUE " } else { "" };
        let sql = match (index.constraint, taken) {
            (true, true) => format!("ALTER TABLE {table} ADD {}", index.definition),
            (true, false) => format!("ALTER TABLE {table} ADD CONSTRAINT {name} {}", index.definition),
            (false, _) => format!("CREATE {unique}INDEX{named} ON {table} USING {}", index.definition),
        };
        client.batch_execute(&sql).await.map_err(failed)?;
        let note_sql = format!(
            "UPDATE {}.created SET indexes = indexes || $3::text WHERE changefeed = $1 AND table_id = $2 AND {}",
            self.own,
            self.registration.condition()
        );
        let noted = client.execute(&note_sql, &[&self.changefeed, &note.table.0, &index.name]).await;
        match noted.map_err(noting)? {
            1 => Ok(()),
            _ => Err(Failure::Fatal(registration::fenced())),
        }
    }

    async fn drop_or_leave(&self, client: &Client, note: &Note) -> Result<(), Failure> {
        let name = qualified(&note.schema, &note.name);
        let failed = |e| classify(e, &format!("dropping table {name}, which the initial copy has created"));
        let sql = format!("DELETE FROM {}.created WHERE changefeed = $1 AND table_id = $2", self.own);
        client.execute(&sql, &[&self.changefeed, &note.table.0]).await.map_err(noting)?;
        if !self.is_there(client, note).await? {
            return copied::remove(client, self.own, self.changefeed, note.table).await;
        }
        // From here on nobody writes to it, and nobody gives its name to another.
        let lock = format!("LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE");
        client.batch_execute(&lock).await.map_err(failed)?;
        let (parts, _) = copied::load(client, self.own, self.changefeed, note.table).await?;
        let copied: u64 = parts.iter().map(|part| part.rows).sum();
        let rows = client.query_one(&format!("SELECT count(*) FROM {name}"), &[]).await.map_err(failed)?;
        if !self.is_there(client, note).await? || u64::try_from(rows.get::<_, i64>(0)) != Ok(copied) {
            tracing::warn!(
                table = name,
                "the table at the source has changed, and its target, which the initial copy has created, has rows of \
                 somebody else: it stays as it is"
            );
            return Ok(());
        }
        tracing::info!(
            table = name,
            "dropped a target table that the initial copy has created in another shape"
        );
        client.batch_execute(&format!("DROP TABLE {name}")).await.map_err(failed)?;
        copied::remove(client, self.own, self.changefeed, note.table).await
    }
}

impl Note {
    /// Whether the table was created for this shape.
    fn is_of(&self, info: &TableInfo) -> bool {
        self.statement == target::create_for_copy(info)
    }
}
