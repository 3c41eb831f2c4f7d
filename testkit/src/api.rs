//! A client of Millrace's HTTP API: one connection per request, JSON in and out.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long one request may take; creating a changefeed asks both databases.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// The API of a server on 127.0.0.1.
#[derive(Clone, Copy, Debug)]
pub struct Api {
    port: u16,
}

/// What `GET /api/v2/changefeeds/{id}/progress` says, as far as the programs need it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// `normal`, `warning`, `failed`, …
    pub state: String,
    /// Everything up to this position is downstream.
    pub checkpoint: u64,
    /// Rows of the initial copy that were read.
    pub copy_rows: u64,
    /// Row changes that were read from the log.
    pub rows_read: u64,
    /// Rows that the sink has flushed.
    pub rows_written: u64,
    /// The whole answer.
    pub all: Value,
}

impl Api {
    /// The API that listens on a port of this machine.
    #[must_use]
    pub fn new(port: u16) -> Self {
        Self { port }
    }

    /// Where it is, for other programs.
    #[must_use]
    pub fn base(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `GET`.
    ///
    /// # Errors
    /// When the server does not answer, or refuses; then the text has its words.
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.request("GET", path, None).await
    }

    /// `POST` of a JSON body.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.request("POST", path, Some(body)).await
    }

    /// `PUT` of a JSON body.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.request("PUT", path, Some(body)).await
    }

    /// Creates a changefeed.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn create(&self, name: &str, from: &str, to: &str, config: &Value) -> Result<Value> {
        let body = json!({
            "changefeed_id": name, "upstream": { "uri": from }, "sink_uri": to, "replica_config": config,
        });
        self.post("/api/v2/changefeeds", &body).await
    }

    /// Pauses a changefeed.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn pause(&self, name: &str) -> Result<()> {
        self.post(&format!("/api/v2/changefeeds/{name}/pause"), &json!({})).await.map(drop)
    }

    /// Resumes a changefeed.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn resume(&self, name: &str) -> Result<()> {
        self.post(&format!("/api/v2/changefeeds/{name}/resume"), &json!({})).await.map(drop)
    }

    /// How far a changefeed is.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn progress(&self, name: &str) -> Result<Progress> {
        let all = self.get(&format!("/api/v2/changefeeds/{name}/progress")).await?;
        let number = |key: &str| {
            let value = &all[key];
            value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
        };
        Ok(Progress {
            state: all["state"].as_str().unwrap_or_default().to_owned(),
            checkpoint: number("checkpoint_ts"),
            copy_rows: number("copy_rows"),
            rows_read: number("rows_read"),
            rows_written: number("rows_written"),
            all,
        })
    }

    /// `GET /metrics`: the server's series as text.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn metrics(&self) -> Result<String> {
        self.answer("GET", "/metrics", None).await
    }

    async fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let body = self.answer(method, path, body).await?;
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&body).with_context(|| format!("{method} {path}: the answer is not JSON"))
    }

    async fn answer(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        tokio::time::timeout(REQUEST_LIMIT, self.exchange(method, path, body))
            .await
            .map_err(|_| anyhow!("no answer within {REQUEST_LIMIT:?}"))
            .and_then(|result| result)
            .with_context(|| format!("{method} {path}"))
    }

    async fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.port,
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        read_answer(&answer).map(ToOwned::to_owned)
    }
}

/// Takes an answer apart that ended with its connection.
fn read_answer(answer: &[u8]) -> Result<&str> {
    let text = std::str::from_utf8(answer).context("the answer is not UTF-8")?;
    let (head, body) = text.split_once("\r\n\r\n").context("the answer has no end of its head")?;
    let status: u16 = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status code")?;
    if !(200..300).contains(&status) {
        bail!("{status}: {}", body.trim());
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_values_and_refusals_are_errors_with_their_words() {
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}";
        assert_eq!(read_answer(ok).unwrap(), "{\"a\":1}");
        let refused = b"HTTP/1.1 400 Bad Request\r\n\r\n{\"error_code\":\"CDC:ErrX\"}";
        assert_eq!(read_answer(refused).unwrap_err().to_string(), "400: {\"error_code\":\"CDC:ErrX\"}");
        assert!(read_answer(b"").is_err());
    }
}
