//! From the shape in a message to a table as the reader knows it.

use std::collections::BTreeSet;

use event::{Column, IdentityKind, TypeDefinition, TypeKind};

use super::message::{IndexShape, ObjectShape, TableShape};
use crate::Error;
use crate::upstream::postgres::catalog::{
    CatalogColumn, CatalogKey, CatalogTable, Head, Selection, assemble,
};
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::types::Types;

/// The types of the columns of some shapes, as far as the catalog still has them.
pub(crate) async fn types<'a>(
    conn: &mut Connection,
    shapes: impl IntoIterator<Item = &'a TableShape>,
) -> Result<Types, Error> {
    let columns = shapes.into_iter().flat_map(|shape| &shape.columns);
    let wanted: BTreeSet<u32> = columns.map(|column| column.type_oid).collect();
    Types::load_existing(conn, wanted).await
}

/// The statements for the types that fields of a composite type need, as far as the catalog still has them.
pub(crate) async fn field_types(
    conn: &mut Connection,
    shape: &ObjectShape,
) -> Result<Vec<TypeDefinition>, Error> {
    let fields = shape.fields.as_deref().unwrap_or_default();
    let wanted: BTreeSet<u32> = fields.iter().map(|field| field.type_oid).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let types = Types::load_existing(conn, wanted).await?;
    let mut out: Vec<TypeDefinition> = Vec::new();
    for field in fields {
        for definition in types.column(field.type_oid, -1, &field.sql).definitions {
            if !out.contains(&definition) {
                out.push(definition);
            }
        }
    }
    Ok(out)
}

/// A table of the catalog with this shape.
pub(crate) fn table(
    object: u32,
    shape: &TableShape,
    types: &Types,
    selection: &Selection<'_>,
) -> CatalogTable {
    let letter = |c: char| u8::try_from(c).unwrap_or_default();
    let is_other = |index: &&IndexShape| (index.unique || index.exclusion) && !index.primary;
    let head = Head {
        id: object,
        schema_id: shape.schema_oid,
        schema: shape.schema.clone(),
        name: shape.name.clone(),
        kind: letter(shape.kind),
        persistence: letter(shape.persistence),
        identity: letter(shape.identity),
        pages: 0,
        readable: true,
        owned: true,
        other_unique: shape.indexes.iter().any(|index| is_other(&index)),
    };
    let columns = shape.columns.iter().map(|column| {
        let mut ty = types.column(column.type_oid, column.type_mod, &column.sql);
        if column.nondeterministic {
            ty.kind = TypeKind::Nondeterministic(Box::new(ty.kind));
        }
        let generated = !column.generated.is_empty();
        CatalogColumn {
            number: column.number,
            type_mod: column.type_mod,
            column: Column {
                name: column.name.clone(),
                ty,
                nullable: !column.not_null,
                generated: generated.then(|| column.default.clone().unwrap_or_default()),
                identity: match column.identity.as_str() {
                    "a" => IdentityKind::Always,
                    "d" => IdentityKind::ByDefault,
                    _ => IdentityKind::None,
                },
                default: column.default.clone().filter(|_| !generated),
            },
        }
    });
    let is_key = |index: &&IndexShape| index.unique && index.immediate && !index.exclusion && index.plain;
    let mut keys: Vec<&IndexShape> = shape.indexes.iter().filter(is_key).collect();
    // The order of the catalog's own list.
    keys.sort_by(|a, b| (b.primary, b.replica, &a.name).cmp(&(a.primary, a.replica, &b.name)));
    let keys = keys.into_iter().map(|index| CatalogKey {
        name: index.name.clone(),
        primary: index.primary,
        identity: index.replica,
        nulls_not_distinct: index.nulls_not_distinct,
        columns: index.key.clone(),
    });
    assemble(head, columns.collect(), keys.collect(), &[], selection)
}

/// The statements for the types that columns of a table need.
pub(crate) fn definitions(table: &CatalogTable) -> Vec<TypeDefinition> {
    let mut out: Vec<TypeDefinition> = Vec::new();
    for definition in table.info.columns.iter().flat_map(|column| &column.ty.definitions) {
        if !out.contains(definition) {
            out.push(definition.clone());
        }
    }
    out
}
