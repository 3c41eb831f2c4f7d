//! A connection for somebody else than the sink.

use tokio_postgres::Client;

use super::config::PgConfig;
use super::connection::Session;
use crate::Error;

/// Connects to a PostgreSQL database as the sink with this URI would, TLS included, and sets nothing up. The connection ends
/// with the client.
///
/// # Errors
/// When the URI is not usable, or the server refuses.
pub async fn connect_postgres(uri: &str) -> Result<Client, Error> {
    let config = PgConfig::parse(uri)?;
    Ok(Session::open(&config).await.map_err(super::failure::Failure::into_error)?.client)
}
