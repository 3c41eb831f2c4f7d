//! The indexes of a table beside its primary key, as the downstream needs to be told them.

use event::CopyIndex;

use super::super::catalog::CatalogTable;
use super::super::conn::Connection;
use super::super::sql::literal;
use crate::Error;

/// Those that a table has now. Not: those with a column that is not replicated, also in an expression or a condition;
/// exclusion constraints, and unique constraints that may be deferred, which a target that is written by several workers at
/// once could not keep.
pub(super) async fn of(conn: &mut Connection, table: &CatalogTable) -> Result<Vec<CopyIndex>, Error> {
    let listed = match &table.part.columns {
        None => String::new(),
        Some(columns) => format!(
            " AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 \
               AND NOT a.attisdropped AND a.attname::text <> ALL (ARRAY[{}]::text[]) \
               AND (a.attnum = ANY (i.indkey::int2[]) OR EXISTS (SELECT FROM pg_catalog.pg_depend d \
                 WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = i.indexrelid \
                   AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = c.oid \
                   AND d.refobjsubid = a.attnum)))",
            columns.iter().map(|name| literal(name)).collect::<Vec<_>>().join(", ")
        ),
    };
    let sql = format!(
        "SELECT x.relname, i.indisunique, k.oid IS NOT NULL, \
           COALESCE(pg_get_constraintdef(k.oid), substr(pg_get_indexdef(i.indexrelid), 1 + length(format(\
             'CREATE %sINDEX %I ON %s%I.%I USING ', CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END, x.relname, \
             CASE WHEN x.relkind = 'I' THEN 'ONLY ' ELSE '' END, n.nspname, c.relname)))), \
           CASE WHEN i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL THEN to_json(ARRAY(\
             SELECT a.attname FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS p (number, place) \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = p.number \
             WHERE p.place <= i.indnkeyatts ORDER BY p.place)) END \
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid \
         JOIN pg_catalog.pg_class c ON c.oid = i.indrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN pg_catalog.pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x') \
         WHERE c.oid = {} AND i.indisvalid AND i.indislive AND i.indimmediate AND NOT i.indisprimary \
           AND NOT i.indisexclusion{listed} ORDER BY x.relname",
        table.info.id.0
    );
    let mut indexes = Vec::new();
    for row in conn.query("list the indexes of a table", &sql).await? {
        let columns = row.opt(4).map_or(Ok(Vec::new()), serde_json::from_str);
        indexes.push(CopyIndex {
            name: row.text(0).to_owned(),
            unique: row.flag(1),
            columns: columns.map_err(|_| Error::protocol("an index has malformed columns"))?,
            constraint: row.flag(2),
            definition: row.text(3).to_owned(),
        });
    }
    Ok(indexes)
}
