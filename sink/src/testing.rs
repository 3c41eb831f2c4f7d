//! Hand-made tables for the tests of this crate, beside those that all crates share.

use std::sync::Arc;

pub(crate) use event::testing::{BatchBuilder, key};
use event::{Column, ColumnType, IdentityKind, ReplicaIdentity, TableInfo, TypeKind};
use heartbeatpb::{SchemaId, TableId, Ts};

/// A NOT NULL column of a built-in type.
pub(crate) fn column(name: &str, kind: TypeKind, sql: &str) -> Column {
    Column {
        name: name.into(),
        ty: ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() },
        nullable: false,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    }
}

/// A table `t<id>` with `columns` text columns, of which the first is the primary key and the others are nullable.
pub(crate) fn table(id: i64, columns: usize) -> Arc<TableInfo> {
    let columns = (0..columns)
        .map(|i| Column { nullable: i > 0, ..column(&format!("c{i}"), TypeKind::Text, "text") })
        .collect();
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "public".into(),
        name: format!("t{id}"),
        version: Ts(1),
        columns,
        keys: vec![key(&[0], true)],
        identity: ReplicaIdentity::Key(vec![0]),
    })
}
