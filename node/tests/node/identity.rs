//! What finds a row at the target: every kind of replica identity, keys that change, and values that the log leaves out.

use serde_json::json;

use crate::common::{TARGET, assert_same, caught_up, create, servers, start};

const TABLES: [&str; 7] = ["by_key", "by_index", "whole", "keyless", "pair", "swapped", "late_key"];

/// Values of `big` are stored out of line; an update that leaves them alone does not log them.
const SCHEMA: &str = "
    CREATE TABLE by_key (id int PRIMARY KEY, big text, n int);
    CREATE TABLE by_index (a int NOT NULL, b text NOT NULL, big text, n int, CONSTRAINT k UNIQUE (a, b));
    ALTER TABLE by_index REPLICA IDENTITY USING INDEX k;
    CREATE TABLE whole (id int PRIMARY KEY, big text, n int); ALTER TABLE whole REPLICA IDENTITY FULL;
    CREATE TABLE keyless (a int, big text, twice int GENERATED ALWAYS AS (a * 2) STORED);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
    CREATE TABLE pair (a int, b int, big text, PRIMARY KEY (a, b));
    CREATE TABLE swapped (id int PRIMARY KEY, u int UNIQUE DEFERRABLE INITIALLY DEFERRED, w int UNIQUE);
    CREATE TABLE late_key (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, big text);
    ALTER TABLE late_key REPLICA IDENTITY FULL;
    ALTER TABLE by_key ALTER big SET STORAGE EXTERNAL; ALTER TABLE by_index ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE whole ALTER big SET STORAGE EXTERNAL; ALTER TABLE keyless ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE pair ALTER big SET STORAGE EXTERNAL; ALTER TABLE late_key ALTER big SET STORAGE EXTERNAL;";

/// Ten rows from `$0` on in each table.
const ROWS: &str = "
    INSERT INTO by_key SELECT i, repeat(i::text, 4000), i FROM generate_series($0, $0 + 9) i;
    INSERT INTO by_index SELECT i, 'b' || i, repeat(i::text, 4000), i FROM generate_series($0, $0 + 9) i;
    INSERT INTO whole SELECT i, repeat(i::text, 4000), NULL FROM generate_series($0, $0 + 9) i;
    INSERT INTO keyless SELECT i / 2 * 2, repeat('k', 4000) FROM generate_series($0, $0 + 9) i;
    INSERT INTO keyless VALUES (NULL, NULL), (NULL, NULL);
    INSERT INTO pair SELECT i, -i, repeat(i::text, 4000) FROM generate_series($0, $0 + 9) i;
    INSERT INTO swapped SELECT i, i, i FROM generate_series($0, $0 + 9) i;
    INSERT INTO late_key SELECT i, repeat('l', 4000) FROM generate_series($0, $0 + 9) i;";

/// Transactions on the rows from `$0` on. Each is one simple query, and so one transaction.
const TRANSACTIONS: [&str; 9] = [
    // Two keys change places through a third; the values beside them are not in the log.
    "UPDATE by_key SET id = -1 WHERE id = $0; UPDATE by_key SET id = $0 WHERE id = $0 + 1;
     UPDATE by_key SET id = $0 + 1 WHERE id = -1;
     UPDATE whole SET id = -1 WHERE id = $0; UPDATE whole SET id = $0 WHERE id = $0 + 1;
     UPDATE whole SET id = $0 + 1 WHERE id = -1;
     UPDATE by_index SET a = -1 WHERE a = $0; UPDATE by_index SET a = $0, b = 'b' || $0 WHERE a = $0 + 1;
     UPDATE by_index SET a = $0 + 1, b = 'b' || ($0 + 1) WHERE a = -1;
     UPDATE pair SET a = b, b = a WHERE a BETWEEN $0 AND $0 + 5",
    // A row moves to the place that another has left, over the whole table.
    "DO $do$ BEGIN FOR i IN REVERSE $0 + 9 .. $0 LOOP
         UPDATE by_key SET id = i + 100 WHERE id = i; UPDATE whole SET id = i + 1 WHERE id = i;
         UPDATE by_index SET a = i + 1 WHERE a = i; UPDATE pair SET a = i + 1 WHERE a = i;
     END LOOP; END $do$",
    "UPDATE by_key SET id = id - 100 WHERE id > $0 + 99 AND id < $0 + 110",
    // A key is freed and taken in one transaction, by an old row and by a new one.
    "DELETE FROM by_key WHERE id = $0 + 2; UPDATE by_key SET id = $0 + 2 WHERE id = $0 + 3;
     INSERT INTO by_key VALUES ($0 + 3, repeat('new', 3000), 7); UPDATE by_key SET n = 8 WHERE id = $0 + 3;
     UPDATE by_key SET n = 9 WHERE id = $0 + 2; UPDATE by_key SET id = $0 + 50, n = 10 WHERE id = $0 + 3",
    // The key and the value change at once, and only one of them in the next statement.
    "UPDATE by_key SET id = $0 + 60, big = repeat('c', 5000) WHERE id = $0 + 4;
     UPDATE by_key SET n = -1 WHERE id = $0 + 60; UPDATE by_key SET big = NULL WHERE id = $0 + 60;
     UPDATE by_key SET id = $0 + 4 WHERE id = $0 + 60;
     UPDATE by_index SET b = 'renamed', n = n + 1 WHERE a = $0 + 5;
     UPDATE by_index SET big = repeat('d', 5000) WHERE a = $0 + 5; UPDATE by_index SET n = NULL WHERE a = $0 + 5",
    // Equal rows without a key, one at a time.
    "DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a = $0 / 2 * 2 + 2);
     UPDATE keyless SET a = -a WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a = $0 / 2 * 2 + 4);
     UPDATE keyless SET big = 'set' WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a IS NULL AND big IS NULL)",
    // Values under a deferred constraint change places in one statement, and pass through each other.
    "UPDATE swapped SET u = 2 * $0 + 9 - u WHERE id BETWEEN $0 AND $0 + 9;
     UPDATE swapped SET w = NULL WHERE id = $0; UPDATE swapped SET w = $0 WHERE id = $0 + 1;
     UPDATE swapped SET w = $0 + 1 WHERE id = $0",
    "UPDATE swapped SET u = u + 1 WHERE id BETWEEN $0 AND $0 + 9; UPDATE swapped SET id = -id WHERE id BETWEEN $0 AND $0 + 9",
    // So do keys that are checked at the commit.
    "UPDATE late_key SET id = 2 * $0 + 9 - id WHERE id BETWEEN $0 AND $0 + 9; UPDATE late_key SET id = id + 1 WHERE id BETWEEN $0 AND $0 + 9;
     DELETE FROM late_key WHERE id = $0 + 5",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_found_by_every_identity_while_keys_change_and_values_are_left_out() {
    let (source, target) = servers().await;
    source.sql("postgres", SCHEMA).await.unwrap();
    source.sql("postgres", &ROWS.replace("$0", "1000")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    // Transactions of the source are divided at the target wherever that hurts.
    let sink = format!("{}?worker-count=4&max-txn-row=3", target.uri(TARGET));
    create(&client, &source, &sink, json!({ "force_replicate": true })).await.unwrap();
    caught_up(&client, &source).await;
    for table in TABLES {
        assert_same(&source, &target, table, "copied").await;
    }
    // The first rows were copied, the others come by the stream together with what is done to them.
    source.sql("postgres", &ROWS.replace("$0", "2000")).await.unwrap();
    for begin in ["1000", "2000"] {
        for transaction in TRANSACTIONS {
            let sql = transaction.replace("$0", begin);
            source.sql("postgres", &sql).await.unwrap_or_else(|error| panic!("{sql}: {error:#}"));
        }
    }
    caught_up(&client, &source).await;
    for table in TABLES {
        assert_same(&source, &target, table, "changed").await;
    }
    node.stop().await.unwrap();
}

/// Both ends have the same tables, whose rows need each other.
const CYCLES: &str = "
    CREATE TABLE people (id int PRIMARY KEY, boss int, team int);
    CREATE TABLE teams (id int PRIMARY KEY, lead int NOT NULL, place int UNIQUE DEFERRABLE);
    ALTER TABLE people ADD FOREIGN KEY (boss) REFERENCES people ON DELETE CASCADE ON UPDATE CASCADE;
    ALTER TABLE people ADD CONSTRAINT team FOREIGN KEY (team) REFERENCES teams ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED;
    ALTER TABLE teams ADD CONSTRAINT lead FOREIGN KEY (lead) REFERENCES people ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED;
    CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, person int);
    CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO public.log (person) VALUES (NEW.id); RETURN NEW; END';
    CREATE TRIGGER told AFTER INSERT OR UPDATE ON people FOR EACH ROW EXECUTE FUNCTION tell();";

const CYCLE_CHANGES: [&str; 6] = [
    "INSERT INTO teams SELECT t, t * 10, t FROM generate_series(1, 20) t;
     INSERT INTO people SELECT t * 10, NULL, t FROM generate_series(1, 20) t;
     INSERT INTO people SELECT t * 10 + n, t * 10 + n - 1, t FROM generate_series(1, 20) t, generate_series(1, 5) n",
    "UPDATE people SET id = id + 1000 WHERE id % 100 = 10",
    "SET CONSTRAINTS ALL DEFERRED; UPDATE teams SET place = 21 - place",
    "UPDATE teams SET lead = 21 WHERE id = 3; DELETE FROM people WHERE id = 30",
    "DELETE FROM teams WHERE id = 2; DELETE FROM people WHERE id = 22",
    "INSERT INTO teams VALUES (30, 300, 30); INSERT INTO people VALUES (301, NULL, 30), (300, 301, 30); UPDATE people SET boss = 300 WHERE id = 301",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_need_each_other_across_tables_arrive_where_the_target_has_the_same_constraints() {
    let (source, target) = servers().await;
    source.sql("postgres", CYCLES).await.unwrap();
    target.sql(TARGET, CYCLES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let sink = format!("{}?worker-count=4&max-txn-row=2", target.uri(TARGET));
    create(&client, &source, &sink, json!({})).await.unwrap();
    for changes in CYCLE_CHANGES {
        source.sql("postgres", changes).await.unwrap_or_else(|error| panic!("{changes}: {error:#}"));
    }
    caught_up(&client, &source).await;
    for table in ["people", "teams", "log"] {
        assert_same(&source, &target, table, "changed").await;
    }
    // Nothing was switched off for good: the target still checks what others do there.
    let refused = target.sql(TARGET, "INSERT INTO people VALUES (1, 99999, NULL)").await;
    assert!(refused.is_err_and(|error| format!("{error:#}").contains("people_boss_fkey")
        || format!("{error:?}").contains("foreign key")));
    let valid = "ALTER TABLE people DROP CONSTRAINT team, ADD FOREIGN KEY (team) REFERENCES teams; \
        ALTER TABLE teams DROP CONSTRAINT lead, ADD FOREIGN KEY (lead) REFERENCES people";
    target.sql(TARGET, valid).await.expect("every row has what it refers to");
    node.stop().await.unwrap();
}
