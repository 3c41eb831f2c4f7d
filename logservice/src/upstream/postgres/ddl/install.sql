-- What follows schema changes in an upstream: a history of the shapes of its tables, and event triggers that write
-- each change into the log, at its place in the transaction that makes it. All changefeeds of a database share it.
-- Every statement may be repeated. The functions run with their owner's rights, so that they do not depend on those of
-- whoever changes a table; each has a search path of its own, so that names mean the same to everybody.

CREATE SCHEMA IF NOT EXISTS millrace_capture;
COMMENT ON SCHEMA millrace_capture IS 'schema changes for millrace; goes with the last changefeed';

CREATE TABLE IF NOT EXISTS millrace_capture.feeds (
    slot name PRIMARY KEY,
    -- What the changefeed wants, in order; the last rule that matches decides: {"i": include, "s": schema, "t": table}.
    rules jsonb NOT NULL,
    -- Whether tables without a key are wanted, which log whole rows.
    force boolean NOT NULL,
    -- Where the changefeed begins; an initial copy has what is there then, and not what was there at the start.
    start bigint,
    -- Changes that were made before the changefeed began to read.
    applied bigint[] NOT NULL DEFAULT '{}'
);

-- The newest shape of each object. Whoever notes a change locks its row: changes of one object have an order.
CREATE TABLE IF NOT EXISTS millrace_capture.shapes (
    class text NOT NULL,
    object oid NOT NULL,
    shape jsonb NOT NULL,
    PRIMARY KEY (class, object)
);
CREATE INDEX IF NOT EXISTS shapes_of_partitions ON millrace_capture.shapes ((shape ->> 'parent'))
    WHERE shape ->> 'parent' IS NOT NULL;

-- Changes that some changefeed may have in front of it.
CREATE TABLE IF NOT EXISTS millrace_capture.changes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The transaction, and the number of the change among its changes, from 1.
    xid bigint NOT NULL,
    seq bigint NOT NULL,
    -- Where its message is in the log.
    at bigint NOT NULL,
    -- Where the commit record of its transaction begins, once a reader has told it.
    committed bigint,
    class text NOT NULL,
    object oid NOT NULL,
    before jsonb
);
CREATE INDEX IF NOT EXISTS changes_of_transaction ON millrace_capture.changes (xid);

-- Whether rules want a table.
CREATE OR REPLACE FUNCTION millrace_capture.wants(rules jsonb, in_schema name, of_name name) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT in_schema !~ '^pg_' AND in_schema NOT IN ('information_schema', 'millrace', 'millrace_capture')
        AND COALESCE((SELECT (r.rule ->> 'i')::boolean FROM jsonb_array_elements(rules) WITH ORDINALITY AS r (rule, place)
            WHERE in_schema ~ (r.rule ->> 's') AND of_name ~ (r.rule ->> 't') ORDER BY r.place DESC LIMIT 1), false)
$function$;

-- The shape of a table; NULL for what is no table, for a temporary one, and for one that is gone.
CREATE OR REPLACE FUNCTION millrace_capture.table_shape(relation oid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT jsonb_build_object(
        'schema_oid', n.oid::bigint, 'schema', n.nspname, 'name', c.relname, 'kind', c.relkind,
        'persistence', c.relpersistence, 'identity', c.relreplident,
        'parent', (SELECT i.inhparent::bigint FROM pg_inherits i
            WHERE i.inhrelid = c.oid AND c.relispartition ORDER BY i.inhseqno LIMIT 1),
        'parent_name', (SELECT format('%I.%I', pn.nspname, pc.relname)
            FROM pg_inherits i JOIN pg_class pc ON pc.oid = i.inhparent JOIN pg_namespace pn ON pn.oid = pc.relnamespace
            WHERE i.inhrelid = c.oid AND c.relispartition ORDER BY i.inhseqno LIMIT 1),
        'parent_key', (SELECT pg_get_partkeydef(i.inhparent) FROM pg_inherits i
            WHERE i.inhrelid = c.oid AND c.relispartition ORDER BY i.inhseqno LIMIT 1),
        'root', CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::oid::bigint END,
        'bound', pg_get_expr(c.relpartbound, c.oid),
        'condition', CASE WHEN c.relispartition THEN pg_get_partition_constraintdef(c.oid) END,
        'partition_key', CASE WHEN c.relkind = 'p' THEN pg_get_partkeydef(c.oid) END,
        'inherits', NOT c.relispartition AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid),
        'columns', COALESCE((SELECT jsonb_agg(jsonb_build_object(
                'number', a.attnum, 'name', a.attname, 'type', a.atttypid::bigint, 'mod', a.atttypmod,
                'sql', format_type(a.atttypid, a.atttypmod), 'not_null', a.attnotnull,
                'generated', a.attgenerated, 'identity', a.attidentity,
                'default', pg_get_expr(d.adbin, d.adrelid),
                'portable', NOT EXISTS (SELECT FROM pg_depend p LEFT JOIN pg_class s
                        ON p.refclassid = 'pg_class'::regclass AND s.oid = p.refobjid AND s.relkind = 'S'
                    WHERE p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
                        AND (s.oid IS NOT NULL OR p.refclassid = 'pg_proc'::regclass)),
                'missing', CASE WHEN a.atthasmissing THEN (a.attmissingval::text::text[])[1] END,
                'collation', CASE WHEN a.attcollation <> 0 AND a.attcollation <> t.typcollation
                    THEN format('%I.%I', cn.nspname, co.collname) END,
                'nondeterministic', NOT COALESCE(co.collisdeterministic, true)) ORDER BY a.attnum)
            FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                LEFT JOIN pg_collation co ON co.oid = a.attcollation
                LEFT JOIN pg_namespace cn ON cn.oid = co.collnamespace
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '[]'),
        'indexes', COALESCE((SELECT jsonb_agg(jsonb_build_object(
                'oid', i.indexrelid::bigint, 'name', x.relname, 'primary', i.indisprimary, 'unique', i.indisunique,
                'replica', i.indisreplident, 'immediate', i.indimmediate, 'exclusion', i.indisexclusion,
                'plain', i.indpred IS NULL AND i.indexprs IS NULL,
                'nulls_not_distinct', COALESCE((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false),
                'key', to_jsonb((i.indkey::smallint[])[0:i.indnkeyatts - 1]),
                'constraint', EXISTS (SELECT FROM pg_constraint k
                    WHERE k.conrelid = c.oid AND k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x')),
                'definition', substr(pg_get_indexdef(i.indexrelid), 1 + length(format('CREATE %sINDEX %I ON %s%I.%I USING ',
                    CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END, x.relname,
                    CASE WHEN x.relkind = 'I' THEN 'ONLY ' ELSE '' END, n.nspname, c.relname)))) ORDER BY i.indexrelid)
            FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
            WHERE i.indrelid = c.oid AND (i.indisvalid OR c.relkind = 'p')), '[]'),
        'constraints', COALESCE((SELECT jsonb_agg(jsonb_build_object(
                'oid', k.oid::bigint, 'name', k.conname, 'type', k.contype, 'definition', pg_get_constraintdef(k.oid),
                'refers', k.confrelid::bigint, 'validated', k.convalidated, 'deferrable', k.condeferrable,
                'deferred', k.condeferred, 'inherited', k.coninhcount > 0) ORDER BY k.oid)
            FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x', 'c', 'f')), '[]'))
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = relation AND c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
        AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'millrace_capture')
$function$;

-- The shape of a schema; NULL for one of the system's, for ours, and for one that is gone.
CREATE OR REPLACE FUNCTION millrace_capture.schema_shape(namespace oid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT jsonb_build_object('name', n.nspname) FROM pg_namespace n
    WHERE n.oid = namespace AND n.nspname !~ '^pg_'
        AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture')
$function$;

-- The shape of a view, of a sequence that belongs to no identity column, or of a type of its own; NULL for anything else.
CREATE OR REPLACE FUNCTION millrace_capture.object_shape(of_class text, object oid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT jsonb_build_object('schema', n.nspname, 'name', c.relname, 'kind', 'view',
        'definition', pg_get_viewdef(c.oid), 'options', COALESCE(array_to_string(c.reloptions, ', '), ''))
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE of_class = 'view' AND c.oid = object AND c.relkind = 'v' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_'
        AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture')
    UNION ALL
    SELECT jsonb_build_object('schema', n.nspname, 'name', c.relname, 'kind', 'sequence',
        'definition', format('AS %s INCREMENT BY %s MINVALUE %s MAXVALUE %s START WITH %s CACHE %s %s',
            format_type(s.seqtypid, NULL), s.seqincrement, s.seqmin, s.seqmax, s.seqstart, s.seqcache,
            CASE WHEN s.seqcycle THEN 'CYCLE' ELSE 'NO CYCLE' END))
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence s ON s.seqrelid = c.oid
    WHERE of_class = 'sequence' AND c.oid = object AND c.relpersistence = 'p' AND n.nspname !~ '^pg_'
        AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture')
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
            AND d.deptype = 'i')
    UNION ALL
    SELECT jsonb_build_object('schema', n.nspname, 'name', t.typname, 'kind', CASE t.typtype
            WHEN 'e' THEN 'enum' WHEN 'd' THEN 'domain' WHEN 'c' THEN 'composite' ELSE 'range' END,
        'definition', CASE t.typtype WHEN 'd' THEN format_type(t.typbasetype, t.typtypmod) WHEN 'c' THEN (
            SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum)
            FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped) ELSE '' END,
        'fields', CASE WHEN t.typtype = 'c' THEN COALESCE((SELECT jsonb_agg(jsonb_build_object('number', a.attnum,
                'name', a.attname, 'type', a.atttypid::bigint, 'mod', a.atttypmod,
                'sql', format_type(a.atttypid, a.atttypmod),
                'collation', CASE WHEN a.attcollation <> 0 AND a.attcollation <> ft.typcollation
                    THEN format('%I.%I', cn.nspname, co.collname) END) ORDER BY a.attnum)
            FROM pg_attribute a JOIN pg_type ft ON ft.oid = a.atttypid LEFT JOIN pg_collation co ON co.oid = a.attcollation
                LEFT JOIN pg_namespace cn ON cn.oid = co.collnamespace
            WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped), '[]') END,
        'labels', COALESCE((SELECT jsonb_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e
            WHERE e.enumtypid = t.oid), '[]'),
        'not_null', t.typnotnull, 'default', t.typdefault,
        'checks', COALESCE((SELECT jsonb_object_agg(k.conname, pg_get_constraintdef(k.oid)) FROM pg_constraint k
            WHERE k.contypid = t.oid AND k.contype = 'c'), '{}'))
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_class c ON c.oid = t.typrelid
    WHERE of_class = 'type' AND t.oid = object AND t.typtype IN ('e', 'd', 'c', 'r') AND n.nspname !~ '^pg_'
        AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture')
        AND (t.typrelid = 0 OR c.relkind = 'c')
$function$;

-- The tables that have a type in them, in whatever other types.
CREATE OR REPLACE FUNCTION millrace_capture.users_of(type oid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH RECURSIVE made_of (class, object) AS (
        SELECT 'pg_type'::regclass::oid, type
        UNION
        SELECT e.class, e.object FROM made_of m, LATERAL (
            SELECT d.classid, d.objid FROM pg_depend d WHERE d.refclassid = m.class AND d.refobjid = m.object
                AND d.classid IN ('pg_type'::regclass, 'pg_class'::regclass)
            UNION ALL
            -- The fields of a composite type depend on it, not it on them.
            SELECT 'pg_type'::regclass, c.reltype FROM pg_class c
            WHERE m.class = 'pg_class'::regclass AND c.oid = m.object AND c.relkind = 'c') AS e (class, object))
    SELECT COALESCE(jsonb_agg(c.oid::bigint ORDER BY c.oid), '[]')
    FROM made_of m JOIN pg_class c ON m.class = 'pg_class'::regclass AND c.oid = m.object AND c.relkind IN ('r', 'p')
$function$;

-- Whether the log of a table tells which rows were changed.
CREATE OR REPLACE FUNCTION millrace_capture.identified(relation oid, force boolean) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    WITH keys AS (
        SELECT i.indisprimary AS is_primary, i.indisreplident AS is_identity,
            bool_and(a.attnotnull) AS complete, bool_or(a.attgenerated <> '') AS generated,
            array_agg(a.attnum) AS columns
        FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
            AND a.attnum = ANY ((i.indkey::smallint[])[0:i.indnkeyatts - 1])
        WHERE i.indrelid = relation AND i.indisunique AND i.indisvalid AND i.indimmediate
            AND i.indpred IS NULL AND i.indexprs IS NULL
        GROUP BY i.indexrelid, i.indisprimary, i.indisreplident)
    SELECT CASE c.relreplident
        WHEN 'd' THEN EXISTS (SELECT FROM keys WHERE is_primary AND NOT generated)
        WHEN 'i' THEN EXISTS (SELECT FROM keys i WHERE i.is_identity AND NOT i.generated
            AND NOT EXISTS (SELECT FROM keys p WHERE p.is_primary AND NOT p.columns <@ i.columns))
        WHEN 'f' THEN force OR EXISTS (SELECT FROM keys WHERE complete)
        ELSE false END
    FROM pg_class c WHERE c.oid = relation
$function$;

-- Takes a table in or out of the publications of changefeeds; answers the slots of those that follow it. A table that
-- has rows already is not taken in, since nobody would bring those, unless it was a part of one that is followed.
CREATE OR REPLACE FUNCTION millrace_capture.publish(relation oid, shape jsonb, former_root oid) RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    feed record;
    wanted boolean;
    full_name text := format('%I.%I', shape ->> 'schema', shape ->> 'name');
    is_root boolean := shape ->> 'persistence' = 'p' AND shape ->> 'parent' IS NULL;
    has_rows boolean;
    followed jsonb := '[]';
BEGIN
    FOR feed IN
        SELECT f.slot, f.rules, f.force, EXISTS (SELECT FROM pg_publication_rel r
            WHERE r.prpubid = p.oid AND r.prrelid = relation) AS member
        FROM millrace_capture.feeds f JOIN pg_publication p ON p.pubname = f.slot ORDER BY f.slot
    LOOP
        wanted := millrace_capture.wants(feed.rules, (shape ->> 'schema')::name, (shape ->> 'name')::name);
        -- What follows is no change that anybody made.
        PERFORM set_config('millrace_capture.own', 'on', true);
        IF feed.member AND NOT (wanted AND is_root) THEN
            EXECUTE format('ALTER PUBLICATION %I DROP TABLE ONLY %s', feed.slot, full_name);
            feed.member := false;
            wanted := false;
        END IF;
        IF NOT feed.member AND wanted AND is_root AND millrace_capture.identified(relation, feed.force) THEN
            IF has_rows IS NULL THEN
                EXECUTE format('SELECT EXISTS (SELECT FROM %s)', full_name) INTO has_rows;
            END IF;
            IF NOT has_rows OR EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                WHERE p.pubname = feed.slot AND r.prrelid = former_root)
            THEN
                EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %s', feed.slot, full_name);
                feed.member := true;
            END IF;
        END IF;
        PERFORM set_config('millrace_capture.own', 'off', true);
        IF feed.member THEN
            followed := followed || to_jsonb(feed.slot);
        END IF;
    END LOOP;
    RETURN followed;
END $function$;

-- Writes a change into the log and the history, if it is one.
CREATE OR REPLACE FUNCTION millrace_capture.note(
    of_class text, of_object oid, after jsonb, tag text, path text, wide boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    -- Longer messages carry only what they concern.
    longest CONSTANT integer := 16777216;
    before jsonb;
    rewritten integer;
    place pg_lsn;
    message jsonb;
    running bigint := pg_current_xact_id()::text::bigint & 4294967295;
    earlier bigint;
BEGIN
    SELECT s.shape INTO before FROM millrace_capture.shapes s
    WHERE s.class = of_class AND s.object = of_object FOR UPDATE;
    IF of_class = 'table' THEN
        IF before IS NULL AND after IS NULL THEN
            RETURN;
        END IF;
        -- Another transaction may have changed it while its row was waited for.
        after := millrace_capture.table_shape(of_object);
        IF after IS NOT NULL THEN
            after := after || jsonb_build_object('published', millrace_capture.publish(of_object, after,
                (before ->> 'root')::oid));
        END IF;
        rewritten := substring(' ' || current_setting('millrace_capture.rewritten', true) || ' '
            FROM ' ' || of_object || ':([0-9]+) ')::integer;
    END IF;
    -- Only tables are written anew.
    IF before IS NOT DISTINCT FROM after AND rewritten IS NULL THEN
        RETURN;
    END IF;
    message := jsonb_build_object('version', 1, 'class', of_class, 'object', of_object::bigint, 'tag', tag,
        'path', path, 'wide', wide, 'before', before, 'after', after);
    IF of_class = 'table' AND after IS NOT NULL
        AND (rewritten IS NOT NULL OR before -> 'parent' IS DISTINCT FROM after -> 'parent')
    THEN
        DECLARE
            has_rows boolean;
        BEGIN
            EXECUTE format('SELECT EXISTS (SELECT FROM %I.%I)', after ->> 'schema', after ->> 'name') INTO has_rows;
            message := message || jsonb_build_object('rewritten', rewritten, 'rows', has_rows,
                'query', CASE WHEN has_rows AND rewritten IS NOT NULL AND length(current_query()) < 1048576 THEN current_query() END);
        END;
    END IF;
    IF of_class = 'type' THEN
        message := message || jsonb_build_object('users', millrace_capture.users_of(of_object));
    END IF;
    IF octet_length(message::text) > longest THEN
        message := (message - 'before' - 'after' - 'query') || jsonb_build_object('too_large', true,
            'name', COALESCE(before, after) ->> 'name');
    END IF;
    place := pg_logical_emit_message(true, 'millrace.ddl', message::text);
    SELECT count(*) INTO earlier FROM millrace_capture.changes c WHERE c.xid = running;
    INSERT INTO millrace_capture.changes (xid, seq, at, class, object, before)
    VALUES (running, earlier + 1, (place - '0/0'::pg_lsn)::bigint, of_class, of_object, before);
    IF after IS NULL THEN
        DELETE FROM millrace_capture.shapes s WHERE s.class = of_class AND s.object = of_object;
    ELSE
        INSERT INTO millrace_capture.shapes (class, object, shape) VALUES (of_class, of_object, after)
        ON CONFLICT (class, object) DO UPDATE SET shape = excluded.shape;
    END IF;
    IF of_class = 'table' AND after IS NOT NULL THEN
        PERFORM millrace_capture.guard(u.relation) FROM millrace_capture.unguarded(of_object) AS u (relation);
    END IF;
END $function$;

-- A truncation of one partition is not in the log of the table that it is a part of, so its trigger tells it.
CREATE OR REPLACE FUNCTION millrace_capture.note_truncate(relation oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    place pg_lsn;
    running bigint := pg_current_xact_id()::text::bigint & 4294967295;
BEGIN
    place := pg_logical_emit_message(true, 'millrace.ddl', jsonb_build_object('version', 1, 'class', 'truncate',
        'object', relation::bigint, 'tag', 'TRUNCATE', 'before', NULL,
        'after', millrace_capture.table_shape(relation))::text);
    INSERT INTO millrace_capture.changes (xid, seq, at, class, object)
    SELECT running, 1 + count(*), (place - '0/0'::pg_lsn)::bigint, 'truncate', relation
    FROM millrace_capture.changes c WHERE c.xid = running;
END $function$;

-- Before a truncation, of each table that it concerns: those above come first, and speak for those below.
CREATE OR REPLACE FUNCTION millrace_capture.on_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    spoken text := COALESCE(current_setting('millrace_capture.truncated', true), '');
    mine text := format('<%s>', TG_RELID);
BEGIN
    IF TG_WHEN = 'AFTER' THEN
        PERFORM set_config('millrace_capture.truncated', replace(spoken, mine, ''), true);
        RETURN NULL;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_partition_ancestors(TG_RELID) a
            WHERE a.relid <> TG_RELID AND strpos(spoken, format('<%s>', a.relid::oid)) > 0)
        AND EXISTS (SELECT FROM millrace_capture.feeds f JOIN pg_publication p ON p.pubname = f.slot
            JOIN pg_publication_rel r ON r.prpubid = p.oid
            WHERE r.prrelid = pg_partition_root(TG_RELID) AND r.prrelid <> TG_RELID)
    THEN
        PERFORM millrace_capture.note_truncate(TG_RELID);
    END IF;
    IF EXISTS (SELECT FROM pg_class c WHERE c.oid = TG_RELID AND c.relkind = 'p') THEN
        PERFORM set_config('millrace_capture.truncated', spoken || mine, true);
    END IF;
    RETURN NULL;
EXCEPTION
    WHEN transaction_rollback OR lock_not_available THEN
        RAISE;
    WHEN OTHERS THEN
        PERFORM millrace_capture.give_up('TRUNCATE', SQLERRM);
        RETURN NULL;
END $function$;

-- Tables of followed partitioned tables whose truncation nobody would tell; of one of them, and what is below it, or all.
CREATE OR REPLACE FUNCTION millrace_capture.unguarded(of_relation oid) RETURNS SETOF oid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT DISTINCT t.relid::oid
    FROM millrace_capture.feeds f JOIN pg_publication p ON p.pubname = f.slot
        JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid AND c.relkind = 'p',
        LATERAL pg_partition_tree(COALESCE(of_relation, c.oid)) t JOIN pg_class m ON m.oid = t.relid
    WHERE m.relkind IN ('r', 'p') AND m.relpersistence = 'p'
        AND (of_relation IS NULL OR pg_partition_root(of_relation) = c.oid)
        AND NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = t.relid AND g.tgname = 'millrace_truncate')
$function$;

-- Has the truncation of a table told. The triggers fire whatever session_replication_role says.
CREATE OR REPLACE FUNCTION millrace_capture.guard(relation oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    full_name text;
    divided boolean;
BEGIN
    SELECT format('%I.%I', n.nspname, c.relname), c.relkind = 'p' INTO full_name, divided
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation;
    IF full_name IS NULL THEN
        RETURN;
    END IF;
    -- What follows is no change that anybody made.
    PERFORM set_config('millrace_capture.own', 'on', true);
    EXECUTE format('CREATE OR REPLACE TRIGGER millrace_truncate BEFORE TRUNCATE ON %s '
        'FOR EACH STATEMENT EXECUTE FUNCTION millrace_capture.on_truncate()', full_name);
    EXECUTE format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER millrace_truncate', full_name);
    IF divided THEN
        EXECUTE format('CREATE OR REPLACE TRIGGER millrace_truncated AFTER TRUNCATE ON %s '
            'FOR EACH STATEMENT EXECUTE FUNCTION millrace_capture.on_truncate()', full_name);
        EXECUTE format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER millrace_truncated', full_name);
    END IF;
    PERFORM set_config('millrace_capture.own', 'off', true);
END $function$;

-- Notes what became of tables, of those below them, and of those that were. Which rows a default partition takes
-- depends on what is beside it.
CREATE OR REPLACE FUNCTION millrace_capture.note_tables(relations oid[], tag text, path text, wide boolean)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    relation oid;
BEGIN
    FOR relation IN
        WITH RECURSIVE below (relation, place, depth) AS (
            SELECT r.relation, r.place, 0 FROM unnest(relations) WITH ORDINALITY AS r (relation, place)
            UNION ALL
            SELECT p.partdefid, r.place, 1 FROM unnest(relations) WITH ORDINALITY AS r (relation, place)
                JOIN pg_inherits i ON i.inhrelid = r.relation JOIN pg_partitioned_table p ON p.partrelid = i.inhparent
            WHERE p.partdefid <> 0
            UNION ALL
            SELECT i.inhrelid, b.place, b.depth + 1 FROM below b JOIN pg_inherits i ON i.inhparent = b.relation)
        SELECT t.relation FROM (
            SELECT b.relation, b.place, b.depth FROM below b
            UNION ALL
            SELECT s.object, r.place, 1 FROM unnest(relations) WITH ORDINALITY AS r (relation, place)
                JOIN millrace_capture.shapes s ON s.shape ->> 'parent' = r.relation::text AND s.class = 'table'
            ) AS t
        GROUP BY t.relation ORDER BY min(t.place), min(t.depth), t.relation
    LOOP
        PERFORM millrace_capture.note('table', relation, millrace_capture.table_shape(relation), tag, path, wide);
    END LOOP;
END $function$;

-- The changefeeds learn that something happened that could not be told.
CREATE OR REPLACE FUNCTION millrace_capture.give_up(tag text, what text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    PERFORM pg_logical_emit_message(true, 'millrace.ddl',
        jsonb_build_object('version', 1, 'class', 'failure', 'object', 0, 'tag', tag, 'name', what)::text);
    RAISE WARNING 'millrace cannot follow this %: %', tag, what;
END $function$;

-- Changefeeds whose publication somebody has altered learn where in the log: what it does not carry any more is missing
-- from there on, also if it is put back before a reader looks.
CREATE OR REPLACE FUNCTION millrace_capture.tell_altered(tag text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_logical_emit_message(true, 'millrace.ddl', jsonb_build_object('version', 1, 'class', 'publication',
        'object', 0, 'tag', tag, 'slot', a.slot, 'lost', a.lost, 'schema', a.in_schema, 'name', a.of_name)::text)
    FROM (
        SELECT f.slot, CASE WHEN p.oid IS NULL THEN 'gone' ELSE 'changes' END AS lost, NULL AS in_schema, NULL AS of_name
        FROM millrace_capture.feeds f LEFT JOIN pg_publication p ON p.pubname = f.slot
        WHERE p.oid IS NULL OR p.puballtables
            OR NOT (p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate AND p.pubviaroot)
        UNION ALL
        SELECT f.slot, 'rows', n.nspname, c.relname
        FROM millrace_capture.feeds f JOIN pg_publication p ON p.pubname = f.slot
            JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
            JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE COALESCE(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') IS NOT NULL) a
$function$;

-- As tell_altered, of publications that are dropped and of tables that are taken out of them and are still there.
CREATE OR REPLACE FUNCTION millrace_capture.tell_taken_out(tag text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_logical_emit_message(true, 'millrace.ddl', jsonb_build_object('version', 1, 'class', 'publication',
        'object', 0, 'tag', tag, 'slot', a.slot, 'lost', a.lost, 'schema', a.in_schema, 'name', a.of_name)::text)
    FROM (
        SELECT f.slot, 'gone' AS lost, NULL AS in_schema, NULL AS of_name
        FROM pg_event_trigger_dropped_objects() d JOIN millrace_capture.feeds f ON f.slot = d.object_name
        WHERE d.object_type = 'publication'
        UNION ALL
        SELECT f.slot, 'table', n.nspname, c.relname
        FROM pg_event_trigger_dropped_objects() d JOIN millrace_capture.feeds f ON f.slot = d.address_args[1]
            JOIN pg_publication p ON p.pubname = f.slot
            JOIN pg_namespace n ON n.nspname = d.address_names[1]
            JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = d.address_names[2]
        WHERE d.object_type = 'publication relation') a
$function$;

-- At the end of a statement: what it made and altered.
CREATE OR REPLACE FUNCTION millrace_capture.command_end(tag text, path text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    command record;
    class text;
    relation oid;
    relations oid[] := '{}';
BEGIN
    IF current_setting('millrace_capture.own', true) = 'on' OR NOT EXISTS (SELECT FROM millrace_capture.feeds) THEN
        RETURN;
    END IF;
    IF tag = 'ALTER PUBLICATION' THEN
        PERFORM millrace_capture.tell_altered(tag);
        -- What somebody has put in is followed from here on.
        PERFORM millrace_capture.note('table', t.relation, millrace_capture.table_shape(t.relation), tag, path, false)
        FROM (SELECT DISTINCT r.prrelid AS relation
            FROM millrace_capture.feeds f JOIN pg_publication p ON p.pubname = f.slot
                JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
                JOIN pg_namespace n ON n.oid = c.relnamespace
                LEFT JOIN millrace_capture.shapes s ON s.class = 'table' AND s.object = r.prrelid
            WHERE NOT COALESCE(s.shape -> 'published' ? f.slot::text, false) AND NOT c.relispartition
                AND c.relpersistence = 'p' AND millrace_capture.wants(f.rules, n.nspname, c.relname)
                AND millrace_capture.identified(c.oid, f.force)) t;
        RETURN;
    END IF;
    FOR command IN
        SELECT c.classid, c.objid, c.command_tag FROM pg_event_trigger_ddl_commands() c WHERE NOT c.in_extension
    LOOP
        relation := NULL;
        class := CASE command.classid
            WHEN 'pg_type'::regclass THEN 'type'
            WHEN 'pg_class'::regclass THEN (SELECT CASE c.relkind WHEN 'v' THEN 'view' WHEN 'S' THEN 'sequence'
                WHEN 'c' THEN 'composite' END FROM pg_class c WHERE c.oid = command.objid)
            END;
        IF class = 'composite' THEN
            class := 'type';
            command.objid := (SELECT c.reltype FROM pg_class c WHERE c.oid = command.objid);
        END IF;
        IF class IS NOT NULL THEN
            PERFORM millrace_capture.note(class, command.objid, millrace_capture.object_shape(class, command.objid),
                tag, path, false);
            IF class = 'type' AND tag = 'ALTER TYPE' THEN
                -- Tables made of it have its fields.
                relations := relations || ARRAY(SELECT c.oid FROM pg_class c WHERE c.reloftype = command.objid ORDER BY c.oid);
            END IF;
        ELSIF command.classid = 'pg_constraint'::regclass
            AND EXISTS (SELECT FROM pg_constraint k WHERE k.oid = command.objid AND k.contypid <> 0)
        THEN
            command.objid := (SELECT k.contypid FROM pg_constraint k WHERE k.oid = command.objid);
            PERFORM millrace_capture.note('type', command.objid, millrace_capture.object_shape('type', command.objid),
                tag, path, false);
        ELSIF command.classid = 'pg_class'::regclass THEN
            relation := COALESCE((SELECT i.indrelid FROM pg_index i WHERE i.indexrelid = command.objid), command.objid);
        ELSIF command.classid = 'pg_constraint'::regclass THEN
            relation := (SELECT NULLIF(k.conrelid, 0) FROM pg_constraint k WHERE k.oid = command.objid);
        ELSIF command.classid = 'pg_namespace'::regclass THEN
            PERFORM millrace_capture.note('schema', command.objid, millrace_capture.schema_shape(command.objid),
                tag, path, false);
            -- Its tables have new names.
            relations := relations || ARRAY(SELECT c.oid FROM pg_class c JOIN millrace_capture.shapes s
                ON s.class = 'table' AND s.object = c.oid WHERE c.relnamespace = command.objid ORDER BY c.oid);
        END IF;
        IF relation IS NOT NULL AND relation <> ALL (relations) THEN
            relations := relations || relation;
        END IF;
    END LOOP;
    PERFORM millrace_capture.note_tables(relations, tag, path, false);
    PERFORM set_config('millrace_capture.rewritten', '', true);
EXCEPTION
    WHEN transaction_rollback OR lock_not_available THEN
        RAISE;
    WHEN OTHERS THEN
        PERFORM millrace_capture.give_up(tag, SQLERRM);
END $function$;

-- After objects went: first what they leave changed, then themselves, each before what it may be made of.
CREATE OR REPLACE FUNCTION millrace_capture.objects_dropped(tag text, path text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    relations oid[];
    beside oid[];
    object record;
    wide boolean;
BEGIN
    IF current_setting('millrace_capture.own', true) = 'on' OR NOT EXISTS (SELECT FROM millrace_capture.feeds) THEN
        RETURN;
    END IF;
    PERFORM millrace_capture.tell_taken_out(tag);
    SELECT count(*) FILTER (WHERE d.original) > 1 OR COALESCE(bool_or(d.normal AND NOT d.original), false) INTO wide
    FROM pg_event_trigger_dropped_objects() d;
    SELECT COALESCE(array_agg(DISTINCT c.oid), '{}') INTO relations
    FROM pg_event_trigger_dropped_objects() d, LATERAL (
        SELECT d.objid AS relation WHERE d.object_type = 'table column'
        UNION ALL
        SELECT s.object FROM millrace_capture.shapes s
        WHERE d.object_type = 'index' AND s.class = 'table' AND s.shape ->> 'schema' = d.schema_name
            AND s.shape @> jsonb_build_object('indexes', jsonb_build_array(jsonb_build_object('oid', d.objid::bigint)))
        UNION ALL
        SELECT t.oid FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE d.object_type IN ('table constraint', 'default value')
            AND n.nspname = d.address_names[1] AND t.relname = d.address_names[2]) AS touched
        JOIN pg_class c ON c.oid = touched.relation
    WHERE NOT d.is_temporary;
    SELECT COALESCE(array_agg(DISTINCT p.partdefid), '{}') INTO beside
    FROM pg_event_trigger_dropped_objects() d JOIN millrace_capture.shapes s ON s.class = 'table' AND s.object = d.objid
        JOIN pg_partitioned_table p ON p.partrelid = (s.shape ->> 'parent')::oid
    WHERE d.objsubid = 0 AND d.classid = 'pg_class'::regclass AND p.partdefid <> 0;
    PERFORM millrace_capture.note_tables(relations, tag, path, wide);
    FOR object IN
        SELECT s.class, s.object FROM pg_event_trigger_dropped_objects() d JOIN millrace_capture.shapes s
            ON s.object = d.objid AND (s.class, d.classid) IN
                (('view', 'pg_class'::regclass), ('table', 'pg_class'::regclass), ('sequence', 'pg_class'::regclass),
                 ('type', 'pg_type'::regclass), ('schema', 'pg_namespace'::regclass))
        WHERE d.objsubid = 0
        ORDER BY array_position(ARRAY['view', 'table', 'sequence', 'type', 'schema'], s.class), s.object DESC
    LOOP
        PERFORM millrace_capture.note(object.class, object.object, NULL, tag, path, wide);
    END LOOP;
    PERFORM millrace_capture.note_tables(beside, tag, path, wide);
EXCEPTION
    WHEN transaction_rollback OR lock_not_available THEN
        RAISE;
    WHEN OTHERS THEN
        PERFORM millrace_capture.give_up(tag, SQLERRM);
END $function$;

-- The event triggers' own functions keep the search path of the session, which statements depend on, and therefore
-- name everything in full.
CREATE OR REPLACE FUNCTION millrace_capture.on_command_end() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER AS $function$
BEGIN
    PERFORM millrace_capture.command_end(tg_tag, pg_catalog.current_setting('search_path'));
END $function$;

CREATE OR REPLACE FUNCTION millrace_capture.on_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER AS $function$
BEGIN
    PERFORM millrace_capture.objects_dropped(tg_tag, pg_catalog.current_setting('search_path'));
END $function$;

-- A table is written anew: 2 for the values of a new column, 4 for a new type.
CREATE OR REPLACE FUNCTION millrace_capture.on_rewrite() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    PERFORM set_config('millrace_capture.rewritten', concat_ws(' ',
        current_setting('millrace_capture.rewritten', true),
        pg_event_trigger_table_rewrite_oid() || ':' || pg_event_trigger_table_rewrite_reason()), true);
END $function$;

-- Notes the shapes of what was there before, or changed while nobody looked; tells nobody. That a changefeed had published
-- a table is kept: its reader finds out whether somebody took it out.
CREATE OR REPLACE FUNCTION millrace_capture.look() RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $function$
    INSERT INTO millrace_capture.shapes (class, object, shape)
    SELECT 'table', c.oid, t.shape || jsonb_build_object('published', COALESCE((
            SELECT jsonb_agg(f.slot ORDER BY f.slot) FROM millrace_capture.feeds f
            WHERE EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
                    WHERE p.pubname = f.slot AND r.prrelid = c.oid)
                OR EXISTS (SELECT FROM millrace_capture.shapes s
                    WHERE s.class = 'table' AND s.object = c.oid AND s.shape -> 'published' ? f.slot::text)), '[]'))
    FROM pg_class c CROSS JOIN LATERAL millrace_capture.table_shape(c.oid) AS t (shape)
    WHERE c.relkind IN ('r', 'p') AND t.shape IS NOT NULL
    UNION ALL
    SELECT 'schema', n.oid, s.shape FROM pg_namespace n CROSS JOIN LATERAL millrace_capture.schema_shape(n.oid) AS s (shape)
    WHERE s.shape IS NOT NULL
    UNION ALL
    SELECT k.class, c.oid, s.shape
    FROM pg_class c JOIN (VALUES ('view', 'v'::"char"), ('sequence', 'S')) AS k (class, kind) ON k.kind = c.relkind
        CROSS JOIN LATERAL millrace_capture.object_shape(k.class, c.oid) AS s (shape)
    WHERE s.shape IS NOT NULL
    UNION ALL
    SELECT 'type', t.oid, s.shape
    FROM pg_type t CROSS JOIN LATERAL millrace_capture.object_shape('type', t.oid) AS s (shape)
    WHERE t.typtype IN ('e', 'd', 'c', 'r') AND t.oid >= 16384 AND s.shape IS NOT NULL
    ON CONFLICT (class, object) DO UPDATE SET shape = excluded.shape WHERE shapes.shape <> excluded.shape
$function$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA millrace_capture FROM PUBLIC;
