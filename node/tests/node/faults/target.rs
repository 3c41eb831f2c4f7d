//! Targets that refuse rows: each changefeed says why, the others go on, and after the repair nothing is missing.

use serde_json::json;

use super::{assert_error, becomes, becomes_one_of};
use crate::common::{TARGET, same, servers, start};

/// One way in which a target can refuse.
struct Case {
    /// Name of the table and of its changefeed.
    table: &'static str,
    /// Parameters of the sink URI.
    parameters: &'static str,
    /// Made in the target before the changefeed; `None`: the changefeed makes its table.
    target: Option<&'static str>,
    /// Done to the target when the first row has arrived.
    harm: &'static str,
    /// Written to the source then.
    rows: &'static str,
    code: &'static str,
    /// Words that the error has.
    words: &'static [&'static str],
    /// Done to the target.
    repair: &'static str,
}

const CASES: &[Case] = &[
    Case {
        table: "fires",
        parameters: "",
        target: None,
        harm: "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'canary %', NEW.v; END $$; \
               CREATE TRIGGER refuses BEFORE INSERT ON fires FOR EACH ROW EXECUTE FUNCTION refuse(); \
               ALTER TABLE fires ENABLE ALWAYS TRIGGER refuses",
        rows: "INSERT INTO fires VALUES (2, 2, 'canary'), (3, NULL, 'x')",
        code: "CDC:ErrSinkSQL",
        words: &["fires", "P0001"],
        repair: "DROP TRIGGER refuses ON fires",
    },
    Case {
        table: "refers",
        parameters: "&session-replication-role=origin",
        target: None,
        harm: "CREATE TABLE parents (n int PRIMARY KEY); INSERT INTO parents VALUES (1); \
               ALTER TABLE refers ADD CONSTRAINT has_parent FOREIGN KEY (n) REFERENCES parents",
        rows: "INSERT INTO refers VALUES (2, 2, 'canary')",
        code: "CDC:ErrSinkConstraint",
        words: &["refers", "has_parent"],
        repair: "INSERT INTO parents VALUES (2)",
    },
    Case {
        table: "forbidden",
        parameters: "&schema=guest_own",
        target: Some(
            "CREATE TABLE forbidden (id int PRIMARY KEY, n int, v text); \
                      GRANT ALL ON forbidden TO guest",
        ),
        harm: "REVOKE INSERT ON forbidden FROM guest",
        rows: "INSERT INTO forbidden VALUES (2, 2, 'canary')",
        code: "CDC:ErrSinkPermission",
        words: &["forbidden"],
        repair: "GRANT INSERT ON forbidden TO guest",
    },
    Case {
        table: "narrow",
        parameters: "",
        target: Some("CREATE TABLE narrow (id int PRIMARY KEY, n int)"),
        harm: "",
        rows: "INSERT INTO narrow VALUES (2, 2, 'canary')",
        code: "CDC:ErrTargetColumnMissing",
        words: &["narrow", "v", "ALTER TABLE"],
        repair: "ALTER TABLE narrow ADD COLUMN v text",
    },
    Case {
        table: "strict",
        parameters: "",
        target: None,
        harm: "ALTER TABLE strict ALTER n SET NOT NULL",
        rows: "INSERT INTO strict VALUES (2, NULL, 'canary')",
        code: "CDC:ErrSinkConstraint",
        words: &["strict", "n"],
        repair: "ALTER TABLE strict ALTER n DROP NOT NULL",
    },
    Case {
        table: "checked",
        parameters: "",
        target: None,
        harm: "ALTER TABLE checked ADD CONSTRAINT is_small CHECK (n < 10)",
        rows: "UPDATE checked SET n = 11",
        code: "CDC:ErrSinkConstraint",
        words: &["checked", "is_small"],
        repair: "ALTER TABLE checked DROP CONSTRAINT is_small",
    },
    Case {
        table: "taken",
        parameters: "",
        target: None,
        harm: "ALTER TABLE taken ADD CONSTRAINT one_of_each UNIQUE (n); INSERT INTO taken VALUES (9, 2, 'other')",
        rows: "INSERT INTO taken VALUES (2, 2, 'canary')",
        code: "CDC:ErrSinkConflict",
        words: &["taken", "one_of_each"],
        repair: "DELETE FROM taken WHERE id = 9",
    },
    Case {
        table: "absent",
        parameters: "&create-tables=false",
        target: Some(""),
        harm: "",
        rows: "INSERT INTO absent VALUES (2, 2, 'canary')",
        code: "CDC:ErrTargetTableMissing",
        words: &["absent", "create"],
        repair: "CREATE TABLE absent (id int PRIMARY KEY, n int, v text)",
    },
    Case {
        table: "dropped",
        parameters: "",
        target: None,
        harm: "ALTER TABLE dropped RENAME TO hidden",
        rows: "INSERT INTO dropped VALUES (2, 2, 'canary')",
        code: "CDC:ErrSinkSchema",
        words: &["dropped"],
        repair: "ALTER TABLE hidden RENAME TO dropped",
    },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_refuses_is_named_and_after_its_repair_nothing_is_missing() {
    let (source, target) = servers().await;
    let guest = "CREATE ROLE guest LOGIN PASSWORD 'guest word'; \
        GRANT SET ON PARAMETER session_replication_role TO guest; GRANT CREATE ON DATABASE target TO guest";
    target.sql(TARGET, guest).await.unwrap();
    source.sql("postgres", "CREATE TABLE healthy (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let make = async |table: &str, uri: String| {
        let body = json!({
            "changefeed_id": table, "sink_uri": uri, "upstream": { "uri": source.uri("postgres") },
            "replica_config": { "filter": { "rules": [format!("public.{table}")] }, "initial_copy": { "enabled": false } },
        });
        client.post("/api/v2/changefeeds", &body).await.unwrap();
    };
    make("healthy", format!("{}?worker-count=1", target.uri(TARGET))).await;
    for case in CASES {
        let Case { table, parameters, .. } = case;
        source
            .sql("postgres", &format!("CREATE TABLE {table} (id int PRIMARY KEY, n int, v text)"))
            .await
            .unwrap();
        target.sql(TARGET, case.target.unwrap_or_default()).await.unwrap();
        let uri = if *table == "forbidden" {
            target.uri_as("guest", "guest word", TARGET)
        } else {
            target.uri(TARGET)
        };
        make(table, format!("{uri}?worker-count=1{parameters}")).await;
    }
    for case in CASES {
        let Case { table, .. } = case;
        if !case.harm.is_empty() {
            source.sql("postgres", &format!("INSERT INTO {table} VALUES (1, 1, 'first')")).await.unwrap();
            same(&source, &target, table).await;
        }
        target.sql(TARGET, case.harm).await.unwrap();
        source.sql("postgres", case.rows).await.unwrap();
    }
    for case in CASES {
        let told = becomes_one_of(&client, case.table, &["failed", "warning"]).await;
        assert_error(&told, case.code, case.words);
        assert!(!told["error"].to_string().contains("canary"), "{}", told["error"]);
        println!("{}: {} {}", case.table, told["state"], told["error"]["message"]);
    }
    source.sql("postgres", "INSERT INTO healthy SELECT generate_series(1, 1000)").await.unwrap();
    same(&source, &target, "healthy").await;
    becomes(&client, "healthy", "normal").await;

    for case in CASES {
        target.sql(TARGET, case.repair).await.unwrap();
    }
    for case in CASES {
        let path = format!("/api/v2/changefeeds/{}/resume", case.table);
        // What is being tried again needs nobody.
        if becomes_one_of(&client, case.table, &["failed", "warning", "normal"]).await["state"] == "failed" {
            client.post(&path, &json!({})).await.unwrap();
        }
    }
    for case in CASES {
        same(&source, &target, case.table).await;
        becomes(&client, case.table, "normal").await;
    }
    node.stop().await.unwrap();
}
