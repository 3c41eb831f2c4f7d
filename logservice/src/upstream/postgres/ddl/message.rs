//! What the event triggers write into the log: one object before and after a statement.

use serde::Deserialize;

use super::sequences::SequenceValue;
use crate::Error;

/// Prefix of our messages in the log.
pub(crate) const PREFIX: &str = "millrace.ddl";

/// Bits of [`Notice::rewritten`]: why a table was written anew (PostgreSQL manual, "Table Rewriting Event").
pub(crate) const NEW_VALUES: u32 = 2;
/// See [`NEW_VALUES`].
pub(crate) const NEW_TYPE: u32 = 4;

/// One message.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct Notice {
    version: u32,
    class: String,
    /// Id of the object in the catalog of its class.
    pub(crate) object: u32,
    /// The command tag of the statement.
    pub(crate) tag: String,
    /// `search_path` of the session.
    #[serde(default)]
    pub(crate) path: String,
    /// The statement took other objects along.
    #[serde(default)]
    pub(crate) wide: bool,
    before: Option<serde_json::Value>,
    after: Option<serde_json::Value>,
    /// The table was written anew, and why.
    pub(crate) rewritten: Option<u32>,
    /// Whether it has rows; told when it was written anew, attached or detached.
    #[serde(default)]
    pub(crate) rows: bool,
    /// What the session was executing, where the catalog does not tell all.
    pub(crate) query: Option<String>,
    /// Tables that have the type in them.
    #[serde(default)]
    pub(crate) users: Vec<u32>,
    /// Slot of the changefeed that it is for; for values of sequences.
    #[serde(default)]
    slot: String,
    #[serde(default)]
    values: Vec<SequenceValue>,
    #[serde(default)]
    too_large: bool,
    schema: Option<String>,
    name: Option<String>,
    /// What a publication does not carry any more.
    lost: Option<String>,
}

/// What a message tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// A table.
    Table {
        /// Before the statement; `None` for one that was not there.
        before: Option<Box<TableShape>>,
        /// Afterwards; `None` for one that is gone.
        after: Option<Box<TableShape>>,
    },
    /// A schema, by its names.
    Schema {
        /// Before the statement.
        before: Option<String>,
        /// Afterwards.
        after: Option<String>,
    },
    /// A view, a sequence, or a type of its own.
    Object {
        /// Before the statement.
        before: Option<Box<ObjectShape>>,
        /// Afterwards.
        after: Option<Box<ObjectShape>>,
    },
    /// A partition lost its rows, alone or with those below it.
    Truncate {
        /// The partition.
        table: Box<TableShape>,
    },
    /// Sequences have other values.
    Sequences {
        /// Slot of the changefeed that asked.
        slot: String,
        /// What they are set to.
        values: Vec<SequenceValue>,
    },
    /// Somebody altered the publication of a changefeed.
    Publication {
        /// Slot of the changefeed.
        slot: String,
        /// What is missing from the log from here on.
        lost: Lost,
    },
    /// The triggers could not tell what happened.
    Untold {
        /// Why.
        what: String,
    },
}

/// What a publication does not carry any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Lost {
    /// It is gone itself.
    All,
    /// Some kinds of changes.
    Kinds,
    /// Some rows or columns of a table: schema and name.
    Rows(String, String),
    /// A table: schema and name.
    Table(String, String),
}

/// A table of the catalog.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct TableShape {
    pub(crate) schema_oid: i64,
    pub(crate) schema: String,
    pub(crate) name: String,
    /// `r` or `p`.
    pub(crate) kind: char,
    /// `p` or `u`.
    pub(crate) persistence: char,
    /// `d`, `n`, `f` or `i`.
    pub(crate) identity: char,
    /// The partitioned table of which it is a partition.
    pub(crate) parent: Option<u32>,
    /// Quoted name of the same.
    pub(crate) parent_name: Option<String>,
    /// How the same divides its rows.
    #[serde(default)]
    pub(crate) parent_key: Option<String>,
    /// The table at the top of which it is a part.
    pub(crate) root: Option<u32>,
    /// Which rows go to this partition, as `ATTACH PARTITION` says it.
    pub(crate) bound: Option<String>,
    /// Which rows go to this partition, as a condition.
    pub(crate) condition: Option<String>,
    /// How a partitioned table divides its rows.
    pub(crate) partition_key: Option<String>,
    pub(crate) columns: Vec<ColumnShape>,
    pub(crate) indexes: Vec<IndexShape>,
    pub(crate) constraints: Vec<ConstraintShape>,
    /// Slots of the changefeeds that follow it.
    #[serde(default)]
    pub(crate) published: Vec<String>,
}

/// A column.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct ColumnShape {
    /// Stays with the column for as long as it lives.
    pub(crate) number: i16,
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) type_oid: u32,
    #[serde(rename = "mod")]
    pub(crate) type_mod: i32,
    pub(crate) sql: String,
    pub(crate) not_null: bool,
    /// Empty, `s` or `v`.
    pub(crate) generated: String,
    /// Empty, `a` or `d`.
    pub(crate) identity: String,
    /// Default, or what generates it.
    pub(crate) default: Option<String>,
    /// The default needs no function or sequence of this database.
    pub(crate) portable: bool,
    /// The value that rows have which are older than the column.
    pub(crate) missing: Option<String>,
    /// Collation, if not that of the type.
    pub(crate) collation: Option<String>,
    pub(crate) nondeterministic: bool,
}

/// An index.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct IndexShape {
    pub(crate) oid: u32,
    pub(crate) name: String,
    pub(crate) primary: bool,
    pub(crate) unique: bool,
    /// Chosen as replica identity.
    pub(crate) replica: bool,
    pub(crate) immediate: bool,
    pub(crate) exclusion: bool,
    /// Of columns, and of all rows.
    pub(crate) plain: bool,
    pub(crate) nulls_not_distinct: bool,
    /// Numbers of its key columns; 0 is an expression.
    pub(crate) key: Vec<i16>,
    /// Belongs to a constraint.
    pub(crate) constraint: bool,
    /// What follows `USING`.
    pub(crate) definition: String,
}

/// A constraint.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct ConstraintShape {
    pub(crate) oid: u32,
    pub(crate) name: String,
    /// `p`, `u`, `x`, `c` or `f`.
    #[serde(rename = "type")]
    pub(crate) kind: char,
    pub(crate) definition: String,
    /// Id of the table that a foreign key refers to, or 0.
    pub(crate) refers: u32,
    pub(crate) validated: bool,
    pub(crate) deferrable: bool,
    pub(crate) deferred: bool,
    /// Comes from a partitioned table.
    pub(crate) inherited: bool,
}

/// A view, a sequence, or a type.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct ObjectShape {
    pub(crate) schema: String,
    pub(crate) name: String,
    pub(crate) kind: ObjectKind,
    /// Query of a view, properties of a sequence, base type of a domain, fields of a composite type.
    pub(crate) definition: String,
    /// Of a composite type, in order; `None` where an earlier version noted it.
    #[serde(default)]
    pub(crate) fields: Option<Vec<FieldShape>>,
    /// Of a view.
    #[serde(default)]
    pub(crate) options: String,
    /// Of an enumeration, in order.
    #[serde(default)]
    pub(crate) labels: Vec<String>,
    /// Of a domain.
    #[serde(default)]
    pub(crate) not_null: bool,
    /// Of a domain.
    #[serde(default)]
    pub(crate) default: Option<String>,
    /// Of a domain: name and definition of its constraints.
    #[serde(default)]
    pub(crate) checks: std::collections::BTreeMap<String, String>,
}

/// A field of a composite type.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub(crate) struct FieldShape {
    /// Stays with the field for as long as it lives.
    pub(crate) number: i16,
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) type_oid: u32,
    #[serde(rename = "mod")]
    pub(crate) type_mod: i32,
    pub(crate) sql: String,
    /// Collation, if not that of the type.
    pub(crate) collation: Option<String>,
}

/// What an [`ObjectShape`] describes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ObjectKind {
    /// `CREATE VIEW`.
    View,
    /// `CREATE SEQUENCE`.
    Sequence,
    /// `CREATE TYPE … AS ENUM`.
    Enum,
    /// `CREATE DOMAIN`.
    Domain,
    /// `CREATE TYPE … AS (…)`.
    Composite,
    /// `CREATE TYPE … AS RANGE`.
    Range,
}

#[derive(Deserialize)]
struct SchemaShape {
    name: String,
}

fn malformed(error: &serde_json::Error) -> Error {
    // Its text may quote the message, and with it a default of a column.
    Error::protocol(format_args!("a schema change in the log is malformed ({:?})", error.classify()))
}

impl Notice {
    /// Reads a message.
    ///
    /// # Errors
    /// When it is none of ours, or of a version that is not known.
    pub(crate) fn read(content: &[u8]) -> Result<Self, Error> {
        let notice: Self = serde_json::from_slice(content).map_err(|error| malformed(&error))?;
        if notice.version == 1 {
            return Ok(notice);
        }
        let version = notice.version;
        Err(Error::protocol(format_args!("schema changes in the log have version {version}, 1 is known")))
    }

    /// What it tells.
    ///
    /// # Errors
    /// When the object's shape is malformed.
    pub(crate) fn change(&mut self) -> Result<Change, Error> {
        if self.too_large {
            let name = self.name.clone().unwrap_or_default();
            return Ok(Change::Untold { what: format!("the description of {name:?} is larger than 16 MiB") });
        }
        let (before, after) = (self.before.take(), self.after.take());
        match self.class.as_str() {
            "table" => Ok(Change::Table {
                before: before.map(TableShape::read).transpose()?.map(Box::new),
                after: after.map(TableShape::read).transpose()?.map(Box::new),
            }),
            "truncate" => {
                let table = TableShape::read(after.unwrap_or_default())?;
                Ok(Change::Truncate { table: Box::new(table) })
            }
            "schema" => {
                let name = |shape: Option<serde_json::Value>| -> Result<Option<String>, Error> {
                    let shape = shape.map(serde_json::from_value::<SchemaShape>).transpose();
                    Ok(shape.map_err(|error| malformed(&error))?.map(|shape| shape.name))
                };
                Ok(Change::Schema { before: name(before)?, after: name(after)? })
            }
            "view" | "sequence" | "type" => {
                let read = |shape: Option<serde_json::Value>| -> Result<Option<Box<ObjectShape>>, Error> {
                    shape.map(serde_json::from_value).transpose().map_err(|error| malformed(&error))
                };
                Ok(Change::Object { before: read(before)?, after: read(after)? })
            }
            "sequences" => {
                let values = std::mem::take(&mut self.values);
                Ok(Change::Sequences { slot: std::mem::take(&mut self.slot), values })
            }
            "publication" => {
                let of = (self.schema.take().unwrap_or_default(), self.name.take().unwrap_or_default());
                let lost = match self.lost.as_deref() {
                    Some("gone") => Lost::All,
                    Some("changes") => Lost::Kinds,
                    Some("rows") => Lost::Rows(of.0, of.1),
                    Some("table") => Lost::Table(of.0, of.1),
                    Some(_) | None => {
                        return Err(Error::protocol("what a publication has lost is not known"));
                    }
                };
                Ok(Change::Publication { slot: std::mem::take(&mut self.slot), lost })
            }
            "failure" => Ok(Change::Untold { what: self.name.clone().unwrap_or_default() }),
            class => Err(Error::protocol(format_args!("a schema change of class {class:?}"))),
        }
    }
}

impl TableShape {
    /// Reads a shape.
    ///
    /// # Errors
    /// When it is malformed.
    pub(crate) fn read(shape: serde_json::Value) -> Result<Self, Error> {
        serde_json::from_value(shape).map_err(|error| malformed(&error))
    }

    /// Quoted name for statements.
    pub(crate) fn sql_name(&self) -> String {
        super::super::sql::qualified(&self.schema, &self.name)
    }

    /// `schema.name` for people.
    pub(crate) fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// The column with a number.
    pub(crate) fn column(&self, number: i16) -> Option<&ColumnShape> {
        self.columns.iter().find(|column| column.number == number)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A table `app.t` with columns of a type.
    pub(in super::super) fn table(columns: &[(i16, &str, &str)]) -> TableShape {
        let columns: Vec<_> = columns
            .iter()
            .map(|(number, name, sql)| {
                json!({ "number": number, "name": name, "type": 23, "mod": -1, "sql": sql, "not_null": false,
                    "generated": "", "identity": "", "default": null, "portable": true, "missing": null,
                    "collation": null, "nondeterministic": false })
            })
            .collect();
        TableShape::read(
            json!({ "schema_oid": 7, "schema": "app", "name": "t", "kind": "r", "persistence": "p",
            "identity": "d", "parent": null, "bound": null, "partition_key": null, "columns": columns,
            "indexes": [], "constraints": [], "published": ["slot"] }),
        )
        .expect("shape")
    }

    #[test]
    fn a_message_is_read_with_its_shapes_and_one_that_is_not_ours_is_refused() {
        let message = json!({ "version": 1, "class": "schema", "object": 5, "tag": "ALTER SCHEMA", "path": "public",
            "wide": false, "before": { "name": "a" }, "after": { "name": "b" } });
        let mut notice = Notice::read(message.to_string().as_bytes()).expect("notice");
        let expected = Change::Schema { before: Some("a".to_owned()), after: Some("b".to_owned()) };
        assert_eq!(notice.change().expect("change"), expected);
        for wrong in [
            json!({}),
            json!({ "version": 2, "class": "schema", "object": 5, "tag": "" }),
            json!({ "version": 1, "class": "schema", "object": -5, "tag": "" }),
        ] {
            assert!(Notice::read(wrong.to_string().as_bytes()).is_err(), "{wrong}");
        }
        let mut strange = Notice::read(br#"{"version":1,"class":"x","object":1,"tag":""}"#).expect("notice");
        assert!(strange.change().is_err());
    }
}
