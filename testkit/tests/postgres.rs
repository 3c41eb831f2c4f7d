//! The server helper keeps what its documentation says.

use testkit::{PgServer, StopMode};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_survives_a_kill_and_disappears_when_dropped() {
    let server = PgServer::builder().setting("work_mem", "5MB").start().await.expect("start");
    server.sql("postgres", "CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await.expect("sql");
    server.kill().expect("kill");
    server.resume().await.expect("resume");
    server.restart(StopMode::Fast).await.expect("restart");
    let client = server.client("postgres").await.expect("client");
    let row = client.query_one("SELECT a, current_setting('work_mem') FROM t", &[]).await.expect("query");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1)), (1, "5MB"));
    let dir = server.socket_dir().to_owned();
    drop(server);
    assert!(!dir.exists());
}
