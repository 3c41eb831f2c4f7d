//! Whether the program sees what it is there to see: rows are lost, doubled and reordered on purpose, at the target,
//! behind the back of the replication, and each must be counted as what it is, and nothing else.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio_postgres::Client;

use crate::history::Counts;
use crate::round::calm;
use crate::tables::QUIET_KEY;
use crate::world::{LOOK, World};

/// How long a change may take to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
/// What has not arrived after this time was swallowed.
const MISSING_FOR_GOOD: Duration = Duration::from_secs(5);
/// A table whose changes are written one by one, and one in which a later change may replace an earlier one.
const EXACT: i32 = 0;
const NEWEST: i32 = 1;

/// What is done at the target.
#[derive(Clone, Copy, Debug)]
enum Trick {
    Nothing,
    /// The last change is swallowed.
    LoseLast(i32),
    /// A change is swallowed and the next one is written, so that both ends are equal.
    LoseOne,
    /// A change is written again, so that both ends are equal.
    Double(i32),
    /// A change is written once more after the next one, and then the one after.
    DoubleOld,
    /// A change is written after the next one, and then the one after, so that both ends are equal.
    Reorder,
    /// A line of the table without a key is there twice.
    DoubleLine,
    /// A row is deleted that nobody deleted.
    Delete,
}

/// Plays every trick, or the most important ones, and compares what was counted with what was done. True when all were
/// seen.
pub(crate) async fn run(world: &mut World, short: bool, say: &(dyn Fn(&str) + Sync)) -> Result<bool> {
    let counts =
        |lost, doubled, reordered, invented| Counts { changes: 0, lost, doubled, reordered, invented };
    let tricks = [
        ("nothing is done", Trick::Nothing, counts(0, 0, 0, 0)),
        ("the last change of a row is lost", Trick::LoseLast(EXACT), counts(1, 0, 0, 0)),
        ("the last change of a row of a batched table is lost", Trick::LoseLast(NEWEST), counts(1, 0, 0, 0)),
        ("a change is lost and the next one arrives", Trick::LoseOne, counts(1, 0, 0, 0)),
        ("a change is written twice", Trick::Double(EXACT), counts(0, 1, 0, 0)),
        ("a change of a batched table is written twice", Trick::Double(NEWEST), counts(0, 1, 0, 0)),
        ("an old change is written again", Trick::DoubleOld, counts(0, 1, 0, 0)),
        ("two changes of a row change places", Trick::Reorder, counts(0, 0, 1, 0)),
        ("a line of a table without a key is there twice", Trick::DoubleLine, counts(0, 1, 0, 0)),
        ("a row is deleted that nobody deleted", Trick::Delete, counts(0, 0, 0, 1)),
        ("nothing is done any more", Trick::Nothing, counts(0, 0, 0, 0)),
    ];
    let mut all_seen = true;
    let important = |trick| matches!(trick, Trick::LoseOne | Trick::Double(NEWEST) | Trick::Reorder);
    for (what, trick, wanted) in tricks.into_iter().filter(|(_, trick, _)| !short || important(*trick)) {
        calm(world, PATIENCE).await?;
        world.play(trick).await?;
        let mut verdict = world.verify_within(MISSING_FOR_GOOD).await?;
        verdict.counts.changes = 0;
        let seen = verdict.counts == wanted;
        all_seen &= seen;
        let Counts { lost, doubled, reordered, invented, .. } = verdict.counts;
        say(&format!(
            "{:6} {what}: lost {lost} doubled {doubled} reordered {reordered} invented {invented}, ends {}",
            if seen { "seen" } else { "MISSED" },
            if verdict.equal { "equal" } else { "differ" },
        ));
        world.repair(trick).await?;
    }
    Ok(all_seen)
}

impl World {
    async fn play(&self, trick: Trick) -> Result<()> {
        let (source, target) = (self.source_client().await?, self.target_client().await?);
        let name = |table| self.plan.tables.name(table);
        match trick {
            Trick::Nothing => {}
            Trick::LoseLast(table) => {
                swallow(&target, &name(table)).await?;
                let version = change(&source, &name(table)).await?;
                self.passed().await?;
                let_through(&target, &name(table)).await?;
                self.expect_version(table, version - 1).await?;
            }
            Trick::LoseOne => {
                self.lose_one(&source, &target).await?;
                change(&source, &name(EXACT)).await?;
            }
            Trick::Double(table) => {
                let version = change(&source, &name(table)).await?;
                self.arrived(table, version).await?;
                write(&target, &name(table), version).await?;
            }
            Trick::DoubleOld => {
                let old = change(&source, &name(EXACT)).await?;
                let new = change(&source, &name(EXACT)).await?;
                self.arrived(EXACT, new).await?;
                write(&target, &name(EXACT), old).await?;
                change(&source, &name(EXACT)).await?;
            }
            Trick::Reorder => {
                let lost = self.lose_one(&source, &target).await?;
                let next = change(&source, &name(EXACT)).await?;
                self.arrived(EXACT, next).await?;
                write(&target, &name(EXACT), lost).await?;
                change(&source, &name(EXACT)).await?;
            }
            Trick::DoubleLine => {
                let name = self.plan.tables.name(self.plan.tables.keyed);
                target.batch_execute(&format!("INSERT INTO {name} SELECT * FROM {name} LIMIT 1")).await?;
            }
            Trick::Delete => {
                let name = name(EXACT);
                target.batch_execute(&format!("DELETE FROM {name} WHERE id = {QUIET_KEY}")).await?;
            }
        }
        Ok(())
    }

    /// Swallows one change. Its version.
    async fn lose_one(&self, source: &Client, target: &Client) -> Result<i64> {
        let name = self.plan.tables.name(EXACT);
        swallow(target, &name).await?;
        let lost = change(source, &name).await?;
        self.passed().await?;
        let_through(target, &name).await?;
        Ok(lost)
    }

    /// Makes both ends equal again, without the history noticing.
    async fn repair(&self, trick: Trick) -> Result<()> {
        let target = self.target_client().await?;
        let quietly = |name: &str, statement: String| {
            format!(
                "BEGIN; ALTER TABLE {name} DISABLE TRIGGER note; {statement}; \
                     ALTER TABLE {name} ENABLE ALWAYS TRIGGER note; COMMIT;"
            )
        };
        let tables = self.plan.tables;
        match trick {
            Trick::Nothing | Trick::LoseOne | Trick::Double(_) | Trick::DoubleOld | Trick::Reorder => {}
            Trick::LoseLast(table) => {
                let name = tables.name(table);
                let statement = format!("UPDATE {name} SET v = v + 1 WHERE id = {QUIET_KEY}");
                target.batch_execute(&quietly(&name, statement)).await?;
                // The row's other columns follow with its next change.
                change(&self.source_client().await?, &name).await?;
            }
            Trick::DoubleLine => {
                let name = tables.name(tables.keyed);
                let statement = format!(
                    "DELETE FROM {name} WHERE ctid IN (SELECT max(ctid) FROM {name} GROUP BY id HAVING count(*) > 1)"
                );
                target.batch_execute(&quietly(&name, statement)).await?;
            }
            Trick::Delete => {
                change(&self.source_client().await?, &tables.name(EXACT)).await?;
            }
        }
        Ok(())
    }

    /// Waits until what was committed before has been written, or swallowed: two beats, since workers race.
    async fn passed(&self) -> Result<()> {
        calm(self, PATIENCE).await
    }

    async fn arrived(&self, table: i32, version: i64) -> Result<()> {
        let target = self.target_client().await?;
        let deadline = Instant::now() + PATIENCE;
        while quiet_version(&target, &self.plan.tables.name(table)).await? != version {
            if Instant::now() > deadline {
                bail!("version {version} did not arrive");
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn expect_version(&self, table: i32, version: i64) -> Result<()> {
        let found = quiet_version(&self.target_client().await?, &self.plan.tables.name(table)).await?;
        if found != version {
            bail!("the trick did not work: version {found} is at the target, not {version}");
        }
        Ok(())
    }
}

async fn quiet_version(client: &Client, name: &str) -> Result<i64> {
    let text = format!("SELECT v FROM {name} WHERE id = {QUIET_KEY}");
    Ok(client.query_opt(&text, &[]).await?.map_or(0, |row| row.get(0)))
}

/// Changes the row that nobody else changes. Its new version.
async fn change(source: &Client, name: &str) -> Result<i64> {
    let text =
        format!("UPDATE {name} SET v = v + 1, at = clock_timestamp() WHERE id = {QUIET_KEY} RETURNING v");
    Ok(source.query_one(&text, &[]).await?.get(0))
}

/// Writes a version as a careless sink would.
async fn write(target: &Client, name: &str, version: i64) -> Result<()> {
    let text = format!("UPDATE {name} SET v = {version} WHERE id = {QUIET_KEY}");
    Ok(target.batch_execute(&text).await?)
}

/// From now on the target forgets changes of the row, and says that it made them.
async fn swallow(target: &Client, name: &str) -> Result<()> {
    let text = format!(
        "CREATE OR REPLACE FUNCTION chaos_check.swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER a_swallow BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW WHEN (NEW.id = {QUIET_KEY})
             EXECUTE FUNCTION chaos_check.swallow();
         ALTER TABLE {name} ENABLE ALWAYS TRIGGER a_swallow;"
    );
    Ok(target.batch_execute(&text).await?)
}

async fn let_through(target: &Client, name: &str) -> Result<()> {
    Ok(target.batch_execute(&format!("DROP TRIGGER a_swallow ON {name}")).await?)
}
