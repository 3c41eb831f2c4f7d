//! Types of columns: from `pg_type` and its neighbours to neutral kinds and the statements that create them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use event::{ColumnType, TypeDefinition, TypeKind};

use super::conn::Connection;
use super::sql::{ident, literal, qualified};
use crate::Error;

/// Types with smaller ids come with every server.
const FIRST_USER_OID: u32 = 16_384;

/// The types that some columns need, with everything that they are made of.
#[derive(Default)]
pub(crate) struct Types {
    rows: BTreeMap<u32, TypeRow>,
}

struct TypeRow {
    schema: String,
    name: String,
    /// `b`, `c`, `d`, `e`, `p`, `r` or `m`.
    class: u8,
    /// Element type of a true array.
    element: Option<u32>,
    base: u32,
    base_typmod: i32,
    base_sql: String,
    not_null: bool,
    default: Option<String>,
    collation: Option<String>,
    extension: Option<String>,
    /// A type of its own, not the row type of a table.
    standalone: bool,
    labels: Vec<String>,
    checks: Vec<(String, String)>,
    fields: Vec<Field>,
    range: Option<Range>,
}

struct Field {
    name: String,
    ty: u32,
    sql: String,
}

struct Range {
    /// What it is made of: the subtype of a range, the range of a multirange.
    of: u32,
    subtype_sql: String,
    options: String,
    multirange: bool,
}

impl Types {
    /// Loads `wanted` and all that they consist of.
    pub(crate) async fn load(conn: &mut Connection, wanted: BTreeSet<u32>) -> Result<Self, Error> {
        Self::load_all(conn, wanted, true).await
    }

    /// As [`Types::load`], without those that are gone: the columns that had them may be gone too.
    pub(crate) async fn load_existing(conn: &mut Connection, wanted: BTreeSet<u32>) -> Result<Self, Error> {
        Self::load_all(conn, wanted, false).await
    }

    async fn load_all(conn: &mut Connection, wanted: BTreeSet<u32>, strict: bool) -> Result<Self, Error> {
        let mut types = Self::default();
        let mut missing = wanted;
        // Each round descends one level; a type cannot contain itself, so the rounds end.
        while !missing.is_empty() {
            let list = missing.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            types.load_rows(conn, &list).await?;
            types.load_parts(conn, &list).await?;
            let mut next = BTreeSet::new();
            for oid in &missing {
                match types.rows.get(oid) {
                    Some(row) => next.extend(row.parts()),
                    None if strict => {
                        return Err(Error::protocol(format_args!("type {oid} is not in the catalog")));
                    }
                    None => {}
                }
            }
            next.retain(|oid| !types.rows.contains_key(oid) && !missing.contains(oid));
            missing = next;
        }
        Ok(types)
    }

    async fn load_rows(&mut self, conn: &mut Connection, list: &str) -> Result<(), Error> {
        let sql = format!(
            "SELECT t.oid, n.nspname, t.typname, t.typtype, \
               CASE WHEN t.typcategory = 'A' AND t.typlen = -1 AND t.typname NOT IN ('int2vector', 'oidvector') \
                 THEN t.typelem ELSE 0 END, \
               t.typbasetype, t.typtypmod, \
               CASE WHEN t.typbasetype <> 0 THEN format_type(t.typbasetype, t.typtypmod) END, \
               t.typnotnull, t.typdefault, \
               CASE WHEN t.typcollation <> 0 AND t.typcollation <> b.typcollation \
                 THEN quote_ident(cn.nspname) || '.' || quote_ident(co.collname) END, \
               (SELECT e.extname FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid \
                 WHERE d.classid = 'pg_catalog.pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e' \
                   AND d.refclassid = 'pg_catalog.pg_extension'::regclass LIMIT 1), \
               t.typrelid = 0 OR EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = t.typrelid AND c.relkind = 'c') \
             FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace \
             LEFT JOIN pg_catalog.pg_type b ON b.oid = t.typbasetype \
             LEFT JOIN pg_catalog.pg_collation co ON co.oid = t.typcollation \
             LEFT JOIN pg_catalog.pg_namespace cn ON cn.oid = co.collnamespace \
             WHERE t.oid IN ({list})"
        );
        for row in conn.query("list types", &sql).await? {
            let element: u32 = row.number(4)?;
            self.rows.insert(
                row.number(0)?,
                TypeRow {
                    schema: row.text(1).to_owned(),
                    name: row.text(2).to_owned(),
                    class: row.text(3).bytes().next().unwrap_or(b'b'),
                    element: (element != 0).then_some(element),
                    base: row.number(5)?,
                    base_typmod: row.number(6)?,
                    base_sql: row.text(7).to_owned(),
                    not_null: row.flag(8),
                    default: row.opt(9).map(ToOwned::to_owned),
                    collation: row.opt(10).map(ToOwned::to_owned),
                    extension: row.opt(11).map(ToOwned::to_owned),
                    standalone: row.flag(12),
                    labels: Vec::new(),
                    checks: Vec::new(),
                    fields: Vec::new(),
                    range: None,
                },
            );
        }
        Ok(())
    }

    async fn load_parts(&mut self, conn: &mut Connection, list: &str) -> Result<(), Error> {
        let sql = format!(
            "SELECT enumtypid, enumlabel FROM pg_catalog.pg_enum WHERE enumtypid IN ({list}) \
             ORDER BY enumtypid, enumsortorder"
        );
        for row in conn.query("list enum labels", &sql).await? {
            if let Some(ty) = self.rows.get_mut(&row.number(0)?) {
                ty.labels.push(row.text(1).to_owned());
            }
        }
        let sql = format!(
            "SELECT contypid, conname, pg_get_constraintdef(oid) FROM pg_catalog.pg_constraint \
             WHERE contypid IN ({list}) AND contype = 'c' ORDER BY contypid, conname"
        );
        for row in conn.query("list domain constraints", &sql).await? {
            if let Some(ty) = self.rows.get_mut(&row.number(0)?) {
                ty.checks.push((row.text(1).to_owned(), row.text(2).to_owned()));
            }
        }
        let sql = format!(
            "SELECT t.oid, a.attname, a.atttypid, format_type(a.atttypid, a.atttypmod) \
             FROM pg_catalog.pg_type t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.typrelid \
             WHERE t.oid IN ({list}) AND t.typrelid <> 0 AND a.attnum > 0 AND NOT a.attisdropped \
             ORDER BY t.oid, a.attnum"
        );
        for row in conn.query("list composite types", &sql).await? {
            if let Some(ty) = self.rows.get_mut(&row.number(0)?) {
                let field =
                    Field { name: row.text(1).to_owned(), ty: row.number(2)?, sql: row.text(3).to_owned() };
                ty.fields.push(field);
            }
        }
        let sql = format!(
            "SELECT t.oid, CASE WHEN t.oid = r.rngmultitypid THEN r.rngtypid ELSE r.rngsubtype END, \
               format_type(r.rngsubtype, NULL), \
               CASE WHEN NOT oc.opcdefault THEN quote_ident(ocn.nspname) || '.' || quote_ident(oc.opcname) END, \
               CASE WHEN r.rngcollation <> 0 AND r.rngcollation <> s.typcollation \
                 THEN quote_ident(con.nspname) || '.' || quote_ident(co.collname) END, \
               NULLIF(r.rngsubdiff::text, '-'), quote_ident(m.typname), t.oid = r.rngmultitypid \
             FROM pg_catalog.pg_type t \
             JOIN pg_catalog.pg_range r ON t.oid IN (r.rngtypid, r.rngmultitypid) \
             JOIN pg_catalog.pg_type s ON s.oid = r.rngsubtype \
             JOIN pg_catalog.pg_type m ON m.oid = r.rngmultitypid \
             JOIN pg_catalog.pg_opclass oc ON oc.oid = r.rngsubopc \
             JOIN pg_catalog.pg_namespace ocn ON ocn.oid = oc.opcnamespace \
             LEFT JOIN pg_catalog.pg_collation co ON co.oid = r.rngcollation \
             LEFT JOIN pg_catalog.pg_namespace con ON con.oid = co.collnamespace \
             WHERE t.oid IN ({list})"
        );
        for row in conn.query("list range types", &sql).await? {
            if let Some(ty) = self.rows.get_mut(&row.number(0)?) {
                let mut options = String::new();
                for (word, column) in [("SUBTYPE_OPCLASS", 3), ("COLLATION", 4), ("SUBTYPE_DIFF", 5)] {
                    if let Some(value) = row.opt(column) {
                        let _ = write!(options, ", {word} = {value}");
                    }
                }
                let _ = write!(options, ", MULTIRANGE_TYPE_NAME = {}.{}", ident(&ty.schema), row.text(6));
                ty.range = Some(Range {
                    of: row.number(1)?,
                    subtype_sql: row.text(2).to_owned(),
                    options,
                    multirange: row.flag(7),
                });
            }
        }
        Ok(())
    }

    /// The type of a column.
    pub(crate) fn column(&self, oid: u32, typmod: i32, sql: &str) -> ColumnType {
        let mut definitions = Vec::new();
        self.define(oid, &mut definitions);
        ColumnType { kind: self.kind(oid, typmod), sql: sql.to_owned(), oid, definitions }
    }

    fn kind(&self, oid: u32, typmod: i32) -> TypeKind {
        let Some(row) = self.rows.get(&oid) else { return TypeKind::Other };
        if let Some(element) = row.element {
            return TypeKind::Array(Box::new(self.kind(element, typmod)));
        }
        match row.class {
            b'd' => TypeKind::Domain(Box::new(self.kind(row.base, row.base_typmod))),
            b'e' => TypeKind::Enum(row.labels.clone()),
            _ => builtin_kind(oid, typmod),
        }
    }

    /// Appends the statements that create a type, what it is made of first.
    fn define(&self, oid: u32, out: &mut Vec<TypeDefinition>) {
        let Some(row) = self.rows.get(&oid) else { return };
        // From version 18 on the array of an extension's type belongs to the extension too.
        if row.extension.is_none() || row.element.is_some() {
            for part in row.parts() {
                self.define(part, out);
            }
        }
        if oid < FIRST_USER_OID || row.element.is_some() {
            return;
        }
        let Some(create_sql) = row.create_sql() else { return };
        let definition = TypeDefinition { schema: row.schema.clone(), name: row.name.clone(), create_sql };
        if !out.contains(&definition) {
            out.push(definition);
        }
    }
}

impl TypeRow {
    /// The types that must exist before this one.
    fn parts(&self) -> Vec<u32> {
        let mut parts: Vec<u32> = self.fields.iter().map(|field| field.ty).collect();
        parts.extend(self.element);
        if self.class == b'd' {
            parts.push(self.base);
        }
        parts.extend(self.range.as_ref().map(|range| range.of));
        parts
    }

    /// `None` when only its own module can create the type.
    fn create_sql(&self) -> Option<String> {
        let name = qualified(&self.schema, &self.name);
        if let Some(extension) = &self.extension {
            let schema = ident(&self.schema);
            return Some(format!("CREATE EXTENSION IF NOT EXISTS {} WITH SCHEMA {schema}", ident(extension)));
        }
        match self.class {
            b'e' => {
                let labels = self.labels.iter().map(|label| literal(label)).collect::<Vec<_>>().join(", ");
                Some(format!("CREATE TYPE {name} AS ENUM ({labels})"))
            }
            b'c' if self.standalone => {
                let fields = self
                    .fields
                    .iter()
                    .map(|field| format!("{} {}", ident(&field.name), field.sql))
                    .collect::<Vec<_>>()
                    .join(", ");
                Some(format!("CREATE TYPE {name} AS ({fields})"))
            }
            b'd' => {
                let mut sql = format!("CREATE DOMAIN {name} AS {}", self.base_sql);
                if let Some(collation) = &self.collation {
                    let _ = write!(sql, " COLLATE {collation}");
                }
                if let Some(default) = &self.default {
                    let _ = write!(sql, " DEFAULT {default}");
                }
                if self.not_null {
                    sql.push_str(" NOT NULL");
                }
                for (constraint, check) in &self.checks {
                    let _ = write!(sql, " CONSTRAINT {} {check}", ident(constraint));
                }
                Some(sql)
            }
            // A multirange comes with its range.
            b'r' => {
                let range = self.range.as_ref().filter(|range| !range.multirange)?;
                Some(format!(
                    "CREATE TYPE {name} AS RANGE (SUBTYPE = {}{})",
                    range.subtype_sql, range.options
                ))
            }
            _ => None,
        }
    }
}

fn builtin_kind(oid: u32, typmod: i32) -> TypeKind {
    let length = |offset: i32| u32::try_from(typmod - offset).ok().filter(|_| typmod >= offset);
    match oid {
        16 => TypeKind::Bool,
        17 => TypeKind::Bytes,
        18 | 19 | 25 => TypeKind::Text,
        20 | 26 => TypeKind::Int64,
        21 => TypeKind::Int16,
        23 => TypeKind::Int32,
        114 => TypeKind::Json,
        142 => TypeKind::Xml,
        700 => TypeKind::Float32,
        701 => TypeKind::Float64,
        1042 => TypeKind::Char(length(4)),
        1043 => TypeKind::Varchar(length(4)),
        1082 => TypeKind::Date,
        1083 => TypeKind::Time,
        1114 => TypeKind::Timestamp,
        1184 => TypeKind::TimestampTz,
        1186 => TypeKind::Interval,
        1266 => TypeKind::TimeTz,
        1560 | 1562 => TypeKind::Bit(length(0)),
        1700 => {
            let modifier = length(4);
            TypeKind::Numeric {
                precision: modifier.map(|modifier| modifier >> 16),
                // Eleven bits with a sign, since a scale may be negative.
                scale: modifier.map_or(0, |modifier| {
                    (i32::try_from(modifier & 0x7ff).unwrap_or_default() ^ 1024) - 1024
                }),
            }
        }
        2950 => TypeKind::Uuid,
        3802 => TypeKind::Jsonb,
        _ => TypeKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modifiers_of_builtin_types_are_read() {
        assert_eq!(builtin_kind(1043, 14), TypeKind::Varchar(Some(10)));
        assert_eq!(builtin_kind(1043, -1), TypeKind::Varchar(None));
        assert_eq!(builtin_kind(1560, 8), TypeKind::Bit(Some(8)));
        assert_eq!(builtin_kind(1700, -1), TypeKind::Numeric { precision: None, scale: 0 });
        assert_eq!(
            builtin_kind(1700, (10 << 16) + 2 + 4),
            TypeKind::Numeric { precision: Some(10), scale: 2 }
        );
        // numeric(3, -2)
        assert_eq!(
            builtin_kind(1700, (3 << 16) + (-2 & 0x7ff) + 4),
            TypeKind::Numeric { precision: Some(3), scale: -2 }
        );
        assert_eq!(builtin_kind(869, -1), TypeKind::Other);
    }
}
