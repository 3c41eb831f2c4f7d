//! The loss of the node that copies a table while the changefeed goes on: another one does it, and no row is lost or written
//! twice.

use serde_json::{Value, json};

use crate::common::{Cluster, TARGET, copying, eventually};

/// Rows of the table that is copied.
const WIDE: i64 = 20_000;

async fn number(cluster: &Cluster, sql: &str) -> i64 {
    cluster.target.client(TARGET).await.unwrap().query_one(sql, &[]).await.unwrap().get(0)
}

/// Kills the maintainer when the copy of `shop.wide` is in its midst, which `locker` holds up; everything is at the target in
/// the end, and only as many rows as `before` until then.
async fn survives(cluster: &mut Cluster, locker: tokio_postgres::Client, before: i64, seed: u64) {
    let load = cluster.load(seed, 100).await;
    let removes =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DELETE FROM %' AND wait_event_type = 'Lock'";
    eventually("the copy has begun", async || number(cluster, removes).await > 0).await;
    let maintainer = cluster.maintainer().await;
    cluster.nodes[maintainer].kill().unwrap();
    // Rows that are at the target unless none is, for an update brings back what is not; and none that is locked.
    let changes =
        "UPDATE shop.wide SET v = 'while nobody maintained it' WHERE id BETWEEN 101 AND 200 AND id % 2 = 1";
    cluster.source.sql("postgres", changes).await.unwrap();
    assert_eq!(number(cluster, "SELECT count(*) FROM shop.wide").await, before);
    let outage = cluster.outage().await;
    println!("rows of other tables waited {outage:?} after a kill");
    locker.batch_execute("ROLLBACK").await.unwrap();
    eventually("the request is answered", async || {
        let list = cluster.some().api().get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
        assert_ne!(list["items"][0]["state"], "failed", "{list}");
        let rows = number(cluster, "SELECT count(*) FROM shop.wide").await;
        assert!(rows == before || rows == WIDE, "{rows} rows");
        list["items"][0]["state"] == "done"
    })
    .await;
    load.stop().await.unwrap();
    cluster.equal().await;
    cluster.same("shop.wide").await;
}

fn wide(schema: &str) -> String {
    format!(
        "CREATE SCHEMA IF NOT EXISTS {schema}; CREATE TABLE {schema}.wide (id int PRIMARY KEY, v text, big text); \
         ALTER TABLE {schema}.wide ALTER big SET STORAGE EXTERNAL; \
         INSERT INTO {schema}.wide SELECT i, 'old', repeat(md5(i::text), 100) FROM generate_series(1, {WIDE}) i"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_maintainer_is_killed_while_it_copies_a_table_again() {
    let mut cluster = Cluster::start(3, "").await;
    cluster.source.sql("postgres", &wide("shop")).await.unwrap();
    cluster.create(1, &copying()).await;
    cluster.caught_up().await;
    cluster.target.sql(TARGET, "DELETE FROM shop.wide WHERE id % 2 = 0").await.unwrap();
    let locker = cluster.target.client(TARGET).await.unwrap();
    locker.batch_execute("BEGIN; SELECT FROM shop.wide WHERE id = 1 FOR UPDATE").await.unwrap();
    let asked = json!({ "table": "shop.wide" });
    cluster.some().api().post("/api/v2/changefeeds/f/resync_table", &asked).await.unwrap();
    survives(&mut cluster, locker, WIDE / 2, 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_maintainer_is_killed_while_it_copies_a_table_that_has_come() {
    let mut cluster = Cluster::start(3, "").await;
    cluster.source.sql("postgres", &wide("elsewhere")).await.unwrap();
    let mut config: Value = copying();
    config["filter"] = json!({ "rules": ["*.*", "!elsewhere.*"] });
    cluster.create(1, &config).await;
    cluster.caught_up().await;
    let table = "CREATE TABLE shop.wide (id int PRIMARY KEY, v text, big text)";
    cluster.target.sql(TARGET, table).await.unwrap();
    let locker = cluster.target.client(TARGET).await.unwrap();
    locker.batch_execute("BEGIN; LOCK TABLE shop.wide IN EXCLUSIVE MODE").await.unwrap();
    cluster.source.sql("postgres", "ALTER TABLE elsewhere.wide SET SCHEMA shop").await.unwrap();
    survives(&mut cluster, locker, 0, 8).await;
}
