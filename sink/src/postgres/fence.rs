//! Keeps the sinks of lost nodes from writing, on behalf of a maintainer.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::codes;

use super::config::PgConfig;
use super::connection::Connection;
use super::failure::Failure;
use super::progress;
use super::registration::{self, Drained, Marking};
use crate::Error;
use crate::fence::{FenceRequest, Fenced, Whom};

/// See [`crate::fence()`].
pub(crate) async fn fence(uri: &str, request: &FenceRequest) -> Result<Fenced, Error> {
    let config = PgConfig::parse(uri)?;
    let connection = Connection::open(&config).await.map_err(Failure::into_error)?;
    fence_connected(&connection, &config, request).await.map_err(Failure::into_error)
}

async fn fence_connected(
    connection: &Connection,
    config: &PgConfig,
    request: &FenceRequest,
) -> Result<Fenced, Failure> {
    let client = connection.client();
    progress::prepare(client, config).await?;
    registration::prepare(client, config).await?;
    let gid = request.changefeed.gid.to_string();
    let (nodes, all_but) = match &request.whom {
        Whom::AllBut(nodes) => (nodes, true),
        Whom::Nodes(nodes) => (nodes, false),
    };
    let nodes = nodes.iter().map(heartbeatpb::NodeId::as_str).collect();
    let marking = Marking { changefeed: &gid, epoch: request.epoch, newest: request.newest, nodes, all_but };
    let Some(marked) = registration::mark(client, &config.own_schema, &marking).await? else {
        return Err(Failure::Fatal(Error::Rejected {
            code: codes::SINK_FENCE_SUPERSEDED,
            what: "a newer maintainer of the changefeed has fenced its writers".into(),
        }));
    };
    let mut busy = BTreeMap::new();
    let mut writers = BTreeSet::new();
    for writer in marked {
        if !writer.is_fenced {
            writers.insert(writer.node);
            continue;
        }
        match registration::drain(client, writer.incarnation).await? {
            Drained::Yes => registration::forget(client, &config.own_schema, writer.incarnation).await?,
            Drained::No(why) => drop(busy.insert(writer.node, why)),
        }
    }
    Ok(Fenced { busy, writers: all_but.then_some(writers) })
}
