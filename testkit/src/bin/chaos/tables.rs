//! The tables of the load, and the triggers that write the history of each row at both ends.

use anyhow::{Context, Result};
use tokio_postgres::Client;

use crate::history::{Entry, Ledger, Op, Rule};

/// Balance of each account at the start.
const BALANCE: i64 = 1000;
/// The row of each table that the beat changes.
pub(crate) const BEAT_KEY: i64 = 0;
/// A row of each table that only the self-check changes.
pub(crate) const QUIET_KEY: i64 = -1;

/// The tables: numbered ones with a key, and one without.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    /// Tables with a key.
    pub(crate) keyed: i32,
    /// Accounts in each of them. As many keys again come and go.
    pub(crate) accounts: i64,
}

impl Tables {
    /// Name of a table as in SQL.
    pub(crate) fn name(self, table: i32) -> String {
        if table == self.keyed { "chaos.log".to_owned() } else { format!("chaos.t{table:02}") }
    }

    /// Each third table has a second unique key, so that each change of it is written by itself; the table without a
    /// key as well.
    pub(crate) fn rule(self, table: i32) -> Rule {
        if table % 3 == 0 || table == self.keyed { Rule::Exact } else { Rule::Newest }
    }

    /// What the balances of all accounts come to, always.
    pub(crate) fn total(self) -> i64 {
        i64::from(self.keyed) * self.accounts * BALANCE
    }

    /// Makes the tables at an end.
    async fn create(self, client: &Client) -> Result<()> {
        let mut text = "CREATE SCHEMA chaos; CREATE SCHEMA chaos_check;
            CREATE SEQUENCE chaos_check.ids;
            CREATE TABLE chaos_check.history (
                seq bigserial PRIMARY KEY, tab int NOT NULL, key bigint NOT NULL, gone boolean NOT NULL, v bigint NOT NULL);
            CREATE TABLE chaos.log (id bigint, v bigint NOT NULL DEFAULT 1, at timestamptz, note text);
            ALTER TABLE chaos.log REPLICA IDENTITY FULL;"
            .to_owned();
        for table in 0..self.keyed {
            let unique = if self.rule(table) == Rule::Exact { ", UNIQUE (code)" } else { "" };
            text.push_str(&format!(
                "CREATE TABLE {} (id bigint PRIMARY KEY, v bigint NOT NULL DEFAULT 1, at timestamptz, \
                 balance bigint NOT NULL DEFAULT 0, code bigint, note text{unique});",
                self.name(table)
            ));
        }
        client.batch_execute(&text).await.context("create the tables")
    }

    /// Makes the tables at the source, fills them, and lets triggers count versions and keep the history.
    pub(crate) async fn create_source(self, client: &Client) -> Result<()> {
        // A row's version is read before it is known whether somebody is removing the row: whoever inserts or deletes one
        // that comes and goes holds its lock.
        self.create(client).await?;
        for table in 0..self.keyed {
            let fill = format!(
                "INSERT INTO {} (id, at, balance, code) SELECT i, clock_timestamp(), \
                 CASE WHEN i > 0 THEN {BALANCE} ELSE 0 END, i FROM generate_series({QUIET_KEY}, {}) i",
                self.name(table),
                self.accounts
            );
            client.batch_execute(&fill).await.context("fill the tables")?;
        }
        client
            .batch_execute(
                "CREATE TABLE chaos_check.graves (tab int, key bigint, v bigint NOT NULL, PRIMARY KEY (tab, key));
                 CREATE FUNCTION chaos_check.comes_back() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     NEW.v := 1 + coalesce((SELECT g.v FROM chaos_check.graves g
                         WHERE g.tab = TG_ARGV[0]::int AND g.key = NEW.id), 0);
                     RETURN NEW;
                 END $$;
                 CREATE FUNCTION chaos_check.bury() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     INSERT INTO chaos_check.graves VALUES (TG_ARGV[0]::int, OLD.id, OLD.v + 1)
                         ON CONFLICT (tab, key) DO UPDATE SET v = EXCLUDED.v;
                     RETURN OLD;
                 END $$;",
            )
            .await?;
        let mut text = String::new();
        for table in 0..self.keyed {
            let name = self.name(table);
            text.push_str(&format!(
                "CREATE TRIGGER back BEFORE INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION chaos_check.comes_back({table});
                 CREATE TRIGGER bury AFTER DELETE ON {name} FOR EACH ROW EXECUTE FUNCTION chaos_check.bury({table});"
            ));
        }
        client.batch_execute(&text).await.context("count versions")?;
        self.keep_history(client).await
    }

    /// Makes the tables at the target, with triggers that keep the history of what is written, whoever writes.
    pub(crate) async fn create_target(self, client: &Client) -> Result<()> {
        self.create(client).await
    }

    /// From now on every change of a row is noted, in the order in which the row sees it: the row is locked while the
    /// note gets its number, and a transaction that is rolled back takes its notes along. `ALWAYS`, because
    /// replication switches ordinary triggers off.
    pub(crate) async fn keep_history(self, client: &Client) -> Result<()> {
        let mut text = "CREATE FUNCTION chaos_check.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF TG_OP = 'DELETE' THEN
                    INSERT INTO chaos_check.history (tab, key, gone, v) VALUES (TG_ARGV[0]::int, OLD.id, true, OLD.v + 1);
                ELSE
                    INSERT INTO chaos_check.history (tab, key, gone, v) VALUES (TG_ARGV[0]::int, NEW.id, false, NEW.v);
                END IF;
                RETURN NULL;
            END $$;"
            .to_owned();
        for table in 0..=self.keyed {
            let name = self.name(table);
            text.push_str(&format!(
                "CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON {name} \
                 FOR EACH ROW EXECUTE FUNCTION chaos_check.note({table});
                 ALTER TABLE {name} ENABLE ALWAYS TRIGGER note;"
            ));
        }
        client.batch_execute(&text).await.context("keep the history of each row")
    }

    /// Tables, columns and indexes of an end, in words; and the names of the tables as in SQL.
    pub(crate) async fn shape(client: &Client) -> Result<(Vec<String>, Vec<String>)> {
        let text = "SELECT format('%I.%I', n.nspname, c.relname), (SELECT string_agg(format('%s %s%s %s', a.attname,
                        format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN ' NOT NULL' END,
                        pg_get_expr(d.adbin, d.adrelid)), ', ' ORDER BY a.attname)
                    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
                    (SELECT coalesce(string_agg(pg_get_indexdef(indexrelid), ', ' ORDER BY pg_get_indexdef(indexrelid)), '')
                     FROM pg_index WHERE indrelid = c.oid)
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'chaos' AND c.relkind = 'r' ORDER BY 1";
        let rows = client.query(text, &[]).await?;
        let words = |row: &tokio_postgres::Row| {
            let (name, columns, indexes): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            format!("{name}: {columns}; {indexes}")
        };
        Ok((rows.iter().map(words).collect(), rows.iter().map(|row| row.get(0)).collect()))
    }

    /// The versions of all rows, as the beginning of a ledger.
    pub(crate) async fn ledger(self, client: &Client) -> Result<Ledger> {
        let rows = client.query(&self.union("id, v"), &[]).await?;
        Ok(Ledger::begin(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2)))))
    }

    /// A number for each table that differs when anything was added, lost or changed.
    pub(crate) async fn sums(self, client: &Client) -> Result<Vec<(i32, i64, i64)>> {
        let text = self.union("count(*)::bigint, coalesce(sum(v + id), 0)::bigint");
        let mut sums: Vec<(i32, i64, i64)> =
            client.query(&text, &[]).await?.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
        sums.sort_unstable();
        Ok(sums)
    }

    /// What the balances of all accounts come to at an end.
    pub(crate) async fn balances(self, client: &Client) -> Result<i64> {
        let tables: Vec<String> =
            (0..self.keyed).map(|table| format!("SELECT balance FROM {}", self.name(table))).collect();
        let text =
            format!("SELECT coalesce(sum(balance), 0)::bigint FROM ({}) a", tables.join(" UNION ALL "));
        Ok(client.query_one(&text, &[]).await?.get(0))
    }

    fn union(self, columns: &str) -> String {
        let parts: Vec<String> = (0..=self.keyed)
            .map(|table| format!("SELECT {table}, {columns} FROM {}", self.name(table)))
            .collect();
        parts.join(" UNION ALL ")
    }
}

/// Takes what was noted since the last call. A note that becomes visible later, however late, is in a later call.
pub(crate) async fn take_history(client: &Client) -> Result<Vec<Entry>> {
    let text = "WITH taken AS (DELETE FROM chaos_check.history RETURNING *) \
                SELECT tab, key, gone, v FROM taken ORDER BY seq";
    let entry = |row: &tokio_postgres::Row| Entry {
        table: row.get(0),
        key: row.get(1),
        op: if row.get(2) { Op::Delete } else { Op::Put },
        version: row.get(3),
    };
    Ok(client.query(text, &[]).await?.iter().map(entry).collect())
}
