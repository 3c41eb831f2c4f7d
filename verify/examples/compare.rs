//! Compares a table of two databases that nobody changes: `cargo run -p verify --example compare`.

use std::error::Error;

use heartbeatpb::Ts;
use testkit::PgServer;
use verify::{Checkpoint, Options, TableName, TablePair, Verifier};

/// The target always has everything.
struct Everything;

impl Checkpoint for Everything {
    async fn checkpoint(&self) -> Result<Ts, String> {
        Ok(Ts(u64::MAX))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = PgServer::start().await?;
    for (database, rows) in [("here", 1000), ("there", 999)] {
        server.sql("postgres", &format!("CREATE DATABASE {database}")).await?;
        let table = "CREATE TABLE t AS SELECT n AS id, md5(n::text) AS v FROM generate_series(1, ";
        server.sql(database, &format!("{table}{rows}) n; ALTER TABLE t ADD PRIMARY KEY (id)")).await?;
    }
    let (here, there) = (server.client("here").await?, server.client("there").await?);
    let name = || TableName { schema: "public".to_owned(), name: "t".to_owned() };
    let verifier = Verifier::new(here, there, Everything, Options::default()).await?;
    let report = verifier.run(&[TablePair::same(name())], |_| {}).await?;
    print!("{report}");
    assert_eq!(report.tables[0].differences, 1);
    Ok(())
}
