//! How a dispatcher manager gets its sink.

use std::sync::Arc;

use async_trait::async_trait;
use heartbeatpb::config::DispatcherManagerConfig;
use sink::Sink;

/// Makes the sink of a changefeed; the node plugs in `sink::open`.
#[async_trait]
pub trait SinkFactory: Send + Sync + 'static {
    /// A sink for the changefeed of `config`. May be slow; dropping the call abandons it.
    ///
    /// # Errors
    /// As the sink says.
    async fn create(&self, config: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, sink::Error>;
}
