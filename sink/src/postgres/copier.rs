//! Copies of existing rows, past the stream: `COPY` in, part by part, over connections of their own.
//!
//! Each part is one transaction, which holds to a registration of its own as every transaction of a sink does: the copier
//! counts as a node beside its node, so that it does not end the node's sink, and a maintainer that fences all but the
//! nodes that it knows ends it. So do those that write parts for it on other nodes. What a copy of an earlier version left in
//! a table is removed before the first part.

use std::sync::Arc;

use async_trait::async_trait;
use event::{
    CopiedPart, CopiedTable, CopyError, CopyFormat, CopyIndex, CopyPart, CopyRight, CopySession, CopyTarget,
    PartWriter, Resync, ResyncChange, TableInfo,
};
use heartbeatpb::{MaintainerEpoch, NodeId, TableId, Ts, WallTime};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::apply;
use super::config::{OnExistingRows, PgConfig};
use super::connection::Connection;
use super::created::Notes;
use super::failure::{Failure, classify};
use super::part::{Copier, Opened, Part};
use super::pieces::Range;
use super::registration::{self, Registration, Whose};
use super::resync;
use super::target::{self, Target};
use super::{copied, created, ddl, progress};
use crate::{Error, SinkOptions};

impl From<Error> for CopyError {
    fn from(error: Error) -> Self {
        CopyError { code: error.code(), message: error.to_string(), retryable: error.is_retryable() }
    }
}

impl From<Failure> for CopyError {
    fn from(failure: Failure) -> Self {
        // Whoever tries again looks first at what is there.
        let again = matches!(failure, Failure::Again(_) | Failure::Lost(_));
        let error = CopyError::from(failure.into_error());
        CopyError { retryable: again || error.retryable, ..error }
    }
}

/// Built-in types whose binary form is the same in all supported versions and on all machines, by oid; and arrays of them.
const BINARY_TYPES: &[u32] = &[
    16, 17, 18, 19, 20, 21, 23, 25, 26, 114, 600, 601, 602, 603, 604, 628, 650, 700, 701, 718, 774, 829, 869,
    1042, 1043, 1082, 1083, 1114, 1184, 1186, 1266, 1560, 1562, 1700, 2950, 3802, // arrays:
    199, 651, 1000, 1001, 1005, 1007, 1009, 1014, 1015, 1016, 1021, 1022, 1028, 1041, 1115, 1182, 1183, 1185,
    1187, 1231, 1270, 2951, 3807,
];

/// Copies into the database of a `postgres://` URI.
pub(crate) struct PostgresCopies {
    config: PgConfig,
    options: SinkOptions,
}

impl PostgresCopies {
    pub(crate) fn new(uri: &str, options: &SinkOptions) -> Result<Self, Error> {
        Ok(Self { config: PgConfig::parse(uri)?, options: options.clone() })
    }
}

#[async_trait]
impl CopyTarget for PostgresCopies {
    async fn begin(&self) -> Result<Option<Arc<dyn CopySession>>, CopyError> {
        // Rows that were there before are met one by one, as the stream does.
        if self.config.on_existing_rows == OnExistingRows::Append {
            return Ok(None);
        }
        self.options.permit.granted().await;
        Ok(Some(Arc::new(Session::begin(&self.config, &self.options).await?)))
    }

    async fn write_for(
        &self,
        right: CopyRight,
        table: &Arc<TableInfo>,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError> {
        let registration = Registration::of(&self.config.own_schema, right.0);
        let copier = Arc::new(Copier::new(&self.config, &self.options, registration));
        let connection = copier.take().await?;
        let opened = Opened::new(target::open(connection.client(), table, false).await?);
        copier.give_back(connection);
        let mut part = copier.begin(Arc::new(opened), part, snapshot).await?;
        part.start(format).await?;
        Ok(Box::new(part))
    }

    async fn resyncs(&self) -> Result<Option<Vec<Resync>>, CopyError> {
        if self.config.on_existing_rows == OnExistingRows::Append {
            return Ok(None);
        }
        let connection = Connection::open(&self.config).await?;
        let gid = self.options.changefeed.gid.to_string();
        Ok(Some(resync::list(connection.client(), &self.config.own_schema, &gid).await?))
    }

    async fn change_resync(&self, table: TableId, change: &ResyncChange) -> Result<bool, CopyError> {
        self.options.permit.granted().await;
        let connection = Connection::open(&self.config).await?;
        if matches!(change, ResyncChange::Ask { .. }) {
            progress::prepare(connection.client(), &self.config).await?;
            resync::prepare(connection.client(), &self.config).await?;
        }
        let gid = self.options.changefeed.gid.to_string();
        let owner = (gid.as_str(), table);
        Ok(resync::change(connection.client(), &self.config, owner, change, WallTime::now()).await?)
    }
}

struct Session {
    copier: Arc<Copier>,
    /// As which it is registered; its helpers under names of their own behind it.
    name: NodeId,
    epoch: Option<MaintainerEpoch>,
    control: tokio::sync::Mutex<Connection>,
    tables: Mutex<FxHashMap<TableId, Arc<Opened>>>,
}

impl Session {
    async fn begin(config: &PgConfig, options: &SinkOptions) -> Result<Self, Failure> {
        let connection = Connection::open(config).await?;
        let client = connection.client();
        progress::prepare(client, config).await?;
        ddl::prepare(client, config).await?;
        registration::prepare(client, config).await?;
        copied::prepare(client, config).await?;
        created::prepare(client, config).await?;
        resync::prepare(client, config).await?;
        let gid = options.changefeed.gid.to_string();
        let name = NodeId::from(format!("{}/copy", options.node));
        let own = registration::register(client, config, &gid, &name, options.epoch).await?;
        // Those of a copy before that could not say goodbye.
        registration::close(
            client,
            &config.own_schema,
            Whose::Under { changefeed: &gid, name: name.as_str() },
        )
        .await?;
        Ok(Self {
            copier: Arc::new(Copier::new(config, options, own)),
            name,
            epoch: options.epoch,
            control: tokio::sync::Mutex::new(connection),
            tables: Mutex::default(),
        })
    }

    /// The connection for everything but parts, once the node may write.
    async fn control(&self) -> tokio::sync::MutexGuard<'_, Connection> {
        let connection = self.control.lock().await;
        self.copier.permit.granted().await;
        connection
    }

    fn notes(&self) -> Notes<'_> {
        Notes {
            own: &self.copier.config.own_schema,
            changefeed: &self.copier.gid,
            registration: &self.copier.registration,
        }
    }

    fn opened(&self, table: TableId) -> Result<Arc<Opened>, Failure> {
        let found = self.tables.lock().get(&table).cloned();
        found.ok_or(Failure::Fatal(Error::Rejected {
            code: "CDC:ErrSinkInternal",
            what: "a table is copied that was not opened".into(),
        }))
    }

    async fn prepare(&self, info: &Arc<TableInfo>) -> Result<CopiedTable, Failure> {
        let connection = self.control().await;
        let client = connection.client();
        if self.copier.config.create_tables {
            self.notes().create(client, info).await?;
        }
        let target = target::open(client, info, false).await?;
        let created = self.notes().has_created(client, info).await?;
        let own = &self.copier.config.own_schema;
        let (parts, finished) = copied::load(client, own, &self.copier.gid, info.id).await?;
        if parts.is_empty() {
            self.begin_table(&connection, &target).await?;
        }
        let format = self.remember(&connection, target).await?;
        Ok(CopiedTable { parts, finished, binary: format == CopyFormat::Binary, created })
    }

    /// The table is opened. Answers the best format in which its rows can travel.
    async fn remember(&self, connection: &Connection, target: Target) -> Result<CopyFormat, Failure> {
        let id = target.info.id;
        let opened = Opened::new(target);
        let binary = !opened.columns.is_empty() && same_types(connection, &opened.target).await?;
        self.tables.lock().insert(id, Arc::new(opened));
        Ok(if binary { CopyFormat::Binary } else { CopyFormat::Text })
    }

    /// Begins to replace the rows of a table, to which the stream is applied.
    async fn begin_replacement(
        &self,
        info: &Arc<TableInfo>,
        snapshot: (Ts, WallTime),
    ) -> Result<(Part, CopyFormat), Failure> {
        let format = {
            let connection = self.control().await;
            let target = target::open(connection.client(), info, false).await?;
            self.remember(&connection, target).await?
        };
        let opened = self.opened(info.id)?;
        let mut part = self.copier.begin(opened, &CopyPart::default(), snapshot).await?;
        let client = &part.connection.client();
        let before = resync::look(client, &self.copier.config.own_schema, &self.copier.gid, info.id).await?;
        if before.furthest() > snapshot.0 {
            return Err(resync::again("it has newer changes than those that a copy of it would hold"));
        }
        let own = &self.copier.config.own_schema;
        if self.copier.config.on_existing_rows == OnExistingRows::Error
            && before.is_nothing()
            && resync::is_entering(client, own, &self.copier.gid, info.id).await?
        {
            // As for an initial copy: rows of somebody else are not ours to remove.
            apply::require_empty(&part.connection, &part.opened.target, &Range::default()).await?;
        }
        // Whoever reads the table sees it as it was until all is there.
        let Target { name, partitioned, .. } = &part.opened.target;
        let sql = format!("DELETE FROM {}{name}", if *partitioned { "" } else { "ONLY " });
        client.batch_execute(&sql).await.map_err(|e| classify(e, &part.doing))?;
        part.replaces = Some(before);
        part.start(format).await?;
        Ok((part, format))
    }

    /// Nothing of the copy is in the table yet: what is, is somebody else's, or of an earlier version of this program,
    /// which noted that it had begun.
    async fn begin_table(&self, connection: &Connection, target: &Target) -> Result<(), Failure> {
        let (client, own, id) = (connection.client(), &self.copier.config.own_schema, target.info.id);
        let all = Range::default();
        in_transaction(client, async {
            self.copier.registration.begin_checked(client).await?;
            let marker = progress::copy_marker(client, own, &self.copier.gid, id, &all, Ts::MAX).await?;
            if marker != progress::Copied::No
                || self.copier.config.on_existing_rows == OnExistingRows::Truncate
            {
                apply::clear(connection, target, &all).await?;
                return progress::forget_copy_markers(client, own, &self.copier.gid, id).await;
            }
            apply::require_empty(connection, target, &all).await
        })
        .await
    }

    async fn clear_table(&self, table: TableId) -> Result<(), Failure> {
        let opened = self.opened(table)?;
        let connection = self.control().await;
        let client = connection.client();
        in_transaction(client, async {
            self.copier.registration.begin_checked(client).await?;
            apply::clear(&connection, &opened.target, &Range::default()).await?;
            copied::remove(client, &self.copier.config.own_schema, &self.copier.gid, table).await
        })
        .await
    }

    async fn finish_table(&self, table: TableId) -> Result<(), Failure> {
        let opened = self.opened(table)?;
        let connection = self.control().await;
        let (client, own) = (connection.client(), &self.copier.config.own_schema);
        in_transaction(client, async {
            self.copier.registration.begin_checked(client).await?;
            let (parts, finished) = copied::load(client, own, &self.copier.gid, table).await?;
            if finished {
                return Ok(());
            }
            let incomplete = || copied::incomplete(&opened.target.name);
            let pieces = copied::pieces(&parts).ok_or_else(incomplete)?;
            let summary = copied::summary(&parts).ok_or_else(incomplete)?;
            copied::set_progress(client, own, &self.copier.gid, table, &pieces).await?;
            copied::begin_stream(client, own, &self.copier.gid, &opened.target.info, summary.at).await?;
            copied::remove(client, own, &self.copier.gid, table).await?;
            let owner = (self.copier.gid.as_str(), table);
            match copied::add(client, own, owner, &summary, (self.copier.registration.condition(), true))
                .await?
            {
                true => Ok(()),
                false => Err(Failure::Fatal(registration::fenced())),
            }
        })
        .await
    }

    async fn note_shapes(&self, shapes: u32) -> Result<(), Failure> {
        let connection = self.control().await;
        let (client, own) = (connection.client(), &self.copier.config.own_schema);
        in_transaction(client, async {
            self.copier.registration.begin_checked(client).await?;
            copied::remove(client, own, &self.copier.gid, TableId::DDL).await?;
            let (part, time) = (CopyPart::default(), WallTime::default());
            let note = CopiedPart { part, at: Ts(u64::from(shapes)), time, rows: 0, bytes: 0 };
            let owner = (self.copier.gid.as_str(), TableId::DDL);
            match copied::add(client, own, owner, &note, (self.copier.registration.condition(), false))
                .await?
            {
                true => Ok(()),
                false => Err(Failure::Fatal(registration::fenced())),
            }
        })
        .await
    }
}

/// Commits what `work` has begun and done, or rolls it back.
async fn in_transaction(
    client: &tokio_postgres::Client,
    work: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let result = work.await;
    let ended = progress::end(client, result.is_ok()).await;
    result.and(ended)
}

/// Whether every column that travels has the same built-in type at both ends.
async fn same_types(connection: &Connection, target: &Target) -> Result<bool, Failure> {
    let sql = "SELECT attname::text, atttypid FROM pg_catalog.pg_attribute \
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
    let rows = connection.client().query(sql, &[&target.name]).await;
    let rows = rows.map_err(|e| classify(e, "reading the shape of a target table"))?;
    let types: FxHashMap<&str, u32> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    Ok(target.columns.iter().all(|column| {
        let column = &target.info.columns[column.source];
        BINARY_TYPES.contains(&column.ty.oid) && types.get(column.name.as_str()) == Some(&column.ty.oid)
    }))
}

#[async_trait]
impl CopySession for Session {
    async fn shapes(&self) -> Result<Option<u32>, CopyError> {
        let connection = self.control().await;
        Ok(copied::shapes(connection.client(), &self.copier.config.own_schema, &self.copier.gid).await?)
    }

    async fn set_shapes(&self, shapes: u32) -> Result<(), CopyError> {
        Ok(self.note_shapes(shapes).await?)
    }

    async fn retain(&self, tables: &[Arc<TableInfo>]) -> Result<(), CopyError> {
        let connection = self.control().await;
        Ok(self.notes().retain(connection.client(), tables).await?)
    }

    async fn finished(&self) -> Result<Vec<(TableId, CopiedPart)>, CopyError> {
        let connection = self.control.lock().await;
        Ok(copied::finished(connection.client(), &self.copier.config.own_schema, &self.copier.gid).await?)
    }

    async fn open(&self, table: &Arc<TableInfo>) -> Result<CopiedTable, CopyError> {
        Ok(self.prepare(table).await?)
    }

    async fn clear(&self, table: TableId) -> Result<(), CopyError> {
        Ok(self.clear_table(table).await?)
    }

    async fn write(
        &self,
        table: TableId,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError> {
        let mut part = self.copier.begin(self.opened(table)?, part, snapshot).await?;
        part.start(format).await?;
        Ok(Box::new(part))
    }

    async fn replace(
        &self,
        table: &Arc<TableInfo>,
        snapshot: (Ts, WallTime),
    ) -> Result<(Box<dyn PartWriter>, CopyFormat), CopyError> {
        let (part, format) = self.begin_replacement(table, snapshot).await?;
        Ok((Box::new(part), format))
    }

    async fn index(&self, table: TableId, index: &CopyIndex) -> Result<(), CopyError> {
        let opened = self.opened(table)?;
        let connection = self.copier.take().await?;
        self.notes().index(connection.client(), &opened.target.info, index).await?;
        self.copier.give_back(connection);
        Ok(())
    }

    async fn parts(&self, table: TableId) -> Result<Vec<CopiedPart>, CopyError> {
        let (connection, own) = (self.control().await, &self.copier.config.own_schema);
        let (parts, _) = copied::load(connection.client(), own, &self.copier.gid, table).await?;
        Ok(parts)
    }

    async fn admit(&self, node: &NodeId) -> Result<CopyRight, CopyError> {
        let connection = self.control().await;
        let (config, gid) = (&self.copier.config, &self.copier.gid);
        let name = NodeId::from(format!("{}/{node}", self.name));
        let helper = registration::register(connection.client(), config, gid, &name, self.epoch).await?;
        Ok(CopyRight(helper.incarnation()))
    }

    async fn dismiss(&self, right: CopyRight) -> Result<(), CopyError> {
        let (connection, own) = (self.control().await, &self.copier.config.own_schema);
        Ok(registration::close(connection.client(), own, Whose::Incarnation(right.0)).await?)
    }

    async fn finish(&self, table: TableId) -> Result<(), CopyError> {
        Ok(self.finish_table(table).await?)
    }

    async fn end(&self) {
        self.copier.close_idle();
        let own = &self.copier.config.own_schema;
        let helpers = Whose::Under { changefeed: &self.copier.gid, name: self.name.as_str() };
        if let Err(failure) = registration::close(self.control.lock().await.client(), own, helpers).await {
            let error = failure.into_error();
            tracing::debug!(%error, "the registrations of helpers are left to the next copy");
        }
        registration::retire(&self.copier.config, &self.copier.registration).await;
    }
}
