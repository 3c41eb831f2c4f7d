//! A connection for somebody else than the sink.

use tokio_postgres::Client;

use super::config::PgConfig;
use super::connection::connecting;
use crate::Error;

/// Connects to a PostgreSQL database as the sink with this URI would, TLS included, and sets nothing up. The connection ends
/// with the client.
///
/// # Errors
/// When the URI is not usable, or the server refuses.
pub async fn connect_postgres(uri: &str) -> Result<Client, Error> {
    let config = PgConfig::parse(uri)?;
    let (client, connection) = config
        .driver
        .connect(config.tls.clone())
        .await
        .map_err(|error| connecting(error, &config.address()).into_error())?;
    tokio::spawn(async move {
        // Whoever uses the client is told.
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a database ended");
        }
    });
    Ok(client)
}
