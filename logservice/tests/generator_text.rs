//! The generator writes values exactly as PostgreSQL does, so that both ends of a changefeed compare as text.

use heartbeatpb::Ts;
use logservice::upstream::generator::{ExpectedTable, expected_state};
use testkit::PgServer;

fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn literal(value: &Option<String>) -> String {
    value
        .as_ref()
        .map_or("NULL".into(), |value| format!("E'{}'", value.replace('\\', "\\\\").replace('\'', "''")))
}

/// Creates a table, fills it with the expected rows, and reads them back as text.
async fn round_trip(client: &tokio_postgres::Client, table: &ExpectedTable) -> Vec<Vec<Option<String>>> {
    let info = &table.info;
    let name = format!("{}.{}", ident(&info.schema), ident(&info.name));
    client
        .batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {}", ident(&info.schema)))
        .await
        .expect("PostgreSQL accepts it");
    for definition in info.columns.iter().flat_map(|column| &column.ty.definitions) {
        client.batch_execute(&definition.create_sql).await.expect("PostgreSQL accepts it");
    }
    let columns: Vec<String> =
        info.columns.iter().map(|column| format!("{} {}", ident(&column.name), column.ty.sql)).collect();
    client
        .batch_execute(&format!(
            "CREATE TABLE {name} ({}, PRIMARY KEY ({}))",
            columns.join(", "),
            ident(&info.columns[0].name)
        ))
        .await
        .expect("PostgreSQL accepts it");
    for chunk in table.rows.values().collect::<Vec<_>>().chunks(100) {
        let rows: Vec<String> = chunk
            .iter()
            .map(|row| format!("({})", row.iter().map(literal).collect::<Vec<_>>().join(", ")))
            .collect();
        client
            .batch_execute(&format!("INSERT INTO {name} VALUES {}", rows.join(", ")))
            .await
            .expect("PostgreSQL accepts it");
    }
    // The simple protocol sends what output functions write, as the log does.
    let messages =
        client.simple_query(&format!("SELECT * FROM {name}")).await.expect("PostgreSQL accepts it");
    messages
        .into_iter()
        .filter_map(|message| {
            let tokio_postgres::SimpleQueryMessage::Row(row) = message else { return None };
            Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect())
        })
        .collect()
}

#[tokio::test]
async fn generated_values_are_the_text_that_postgresql_writes() {
    let server = PgServer::start().await.unwrap();
    let client = server.client("postgres").await.unwrap();
    client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    for uri in
        ["generator://wide?rows=400&value-bytes=50", "generator://bank?cards=20&accounts=10&ddl-every=100"]
    {
        for table in expected_state(uri, Ts(16 * 500)).unwrap().values() {
            let mut read = round_trip(&client, table).await;
            let mut expected: Vec<_> = table.rows.values().cloned().collect();
            read.sort();
            expected.sort();
            assert_eq!(read.len(), expected.len());
            for (read, expected) in read.iter().zip(&expected) {
                for ((read, expected), column) in read.iter().zip(expected).zip(&table.info.columns) {
                    assert_eq!(read, expected, "column {} of {uri}", column.name);
                }
            }
        }
    }
}
