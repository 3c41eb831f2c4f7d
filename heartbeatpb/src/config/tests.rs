//! The configuration as its three spellings see it.

use serde_json::{Value, json};

use super::*;
use crate::{ChangefeedId, MaintainerEpoch, Ts};

/// Every key of the schema with a value that differs from its default.
fn everything_changed() -> ReplicaConfig {
    let mut config = ReplicaConfig {
        filter: FilterConfig {
            rules: vec!["shop.*".to_owned()],
            ignore_txn_start_ts: vec![7],
            event_filters: vec![EventFilter { matcher: vec!["a.b".to_owned()], ..Default::default() }],
            publish: vec![PublishRule {
                matcher: vec!["a.b".to_owned()],
                columns: vec!["id".to_owned()],
                condition: "id > 0".to_owned(),
            }],
        },
        ..Default::default()
    };
    config.sink.transaction_atomicity = Some(TransactionAtomicity::Table);
    config.sink.dispatchers = vec![DispatchRule::default()];
    config.sink.column_selectors = vec![ColumnSelector::default()];
    config.sink.cloud_storage_config = CloudStorageConfig {
        worker_count: Some(3),
        flush_interval: Some(HumanDuration::from_secs(9)),
        file_size: Some(4096),
        flush_concurrency: Some(2),
        ..Default::default()
    };
    let mut value = config.to_value();
    change_leaves(&mut value);
    serde_json::from_value(value).expect("changed values keep their type")
}

fn change_leaves(value: &mut Value) {
    match value {
        Value::Object(map) => map.values_mut().for_each(change_leaves),
        Value::Array(items) if items.is_empty() => items.push(json!("x")),
        Value::Array(items) => items.iter_mut().for_each(change_leaves),
        Value::Bool(flag) => *flag = !*flag,
        Value::Number(number) => {
            *value = match (number.as_i64(), number.as_f64()) {
                (Some(whole), _) => json!(whole + 1),
                (None, Some(part)) => json!(part + 0.5),
                (None, None) => unreachable!("a number is one of the two"),
            };
        }
        Value::String(text) => {
            *text = match text.as_str() {
                "throughput" => "low-latency".to_owned(),
                "day" => "month".to_owned(),
                "table" => "none".to_owned(),
                "auto" => "on".to_owned(),
                "apply" => "ignore".to_owned(),
                other => match HumanDuration::parse(other) {
                    Some(HumanDuration(time)) => {
                        HumanDuration(time + std::time::Duration::from_millis(1500)).to_string()
                    }
                    None => format!("{other}x"),
                },
            };
        }
        Value::Null => panic!("a leaf without a value cannot be compared"),
    }
}

fn each_key(value: &Value, check: &mut impl FnMut(&str)) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            check(key);
            each_key(value, check);
        }),
        Value::Array(items) => items.iter().for_each(|value| each_key(value, check)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
// behaviour: api-A-8
// behaviour: api-S-11
fn every_key_survives_the_stored_form_and_the_api_form() {
    let config = everything_changed();
    let stored = config.to_value();
    each_key(&stored, &mut |key| assert!(!key.contains('_'), "{key} is not kebab-case"));
    assert_eq!(serde_json::from_value::<ReplicaConfig>(stored.clone()).unwrap(), config);

    let api = api::to_api_keys(stored);
    each_key(&api, &mut |key| {
        assert!(
            !key.contains('-') || matches!(key, "target-schema" | "target-table"),
            "{key} is not snake_case"
        );
    });
    assert_eq!(ReplicaConfig::from_api(api).unwrap(), (config, vec![]));
}

#[test]
// behaviour: api-L-11
fn toml_and_api_spell_the_same_configuration() {
    let toml = ReplicaConfig::from_toml(
        r#"
        memory-quota = 536870912
        changefeed-error-stuck-duration = "45m"
        [filter]
        rules = ["shop.*", "!shop.tmp_*"]
        [[filter.event-filters]]
        matcher = ["shop.audit"]
        ignore-event = ["delete"]
        ignore_sql = ["^drop"]
        [sink]
        protocol = "csv"
        file-index-digit = 8
        [source]
        streaming = false
        [initial-copy]
        enabled = false
        "#,
    )
    .unwrap();
    let (api, unknown) = ReplicaConfig::from_api(json!({
        "memory_quota": 536_870_912_u64,
        "changefeed_error_stuck_duration": "45m",
        "enable_sync_point": null,
        "filter": {"rules": ["shop.*", "!shop.tmp_*"],
                   "event_filters": [{"matcher": ["shop.audit"], "ignore_event": ["delete"], "ignore_sql": ["^drop"]}]},
        "sink": {"protocol": "csv", "file_index_width": 8},
        "source": {"streaming": false},
        "initial_copy": {"enabled": false}
    }))
    .unwrap();
    assert_eq!(toml, api);
    assert!(unknown.is_empty());
    assert_eq!(toml.memory_quota, 1 << 29);
    assert_eq!(toml.sink.file_index_digit, 8);
    assert!(!toml.source.streaming && ReplicaConfig::default().source.streaming);
}

#[test]
fn unknown_keys_are_all_listed() {
    let error =
        ReplicaConfig::from_toml("memory-qouta = 1\n[sink]\nprotocl = \"csv\"\n[sink.csv]\nquotes = \"'\"")
            .unwrap_err();
    assert_eq!(
        error,
        ConfigError::UnknownKeys(vec![
            "memory-qouta".to_owned(),
            "sink.csv.quotes".to_owned(),
            "sink.protocl".to_owned(),
        ])
    );
    assert_eq!(error.code(), "CDC:ErrInvalidReplicaConfig");
    let (_, unknown) =
        ReplicaConfig::from_api(json!({"sink": {"kafka_config": {"required_acks": -1}}})).unwrap();
    assert_eq!(unknown, ["sink.kafka-config"]);
    assert!(ReplicaConfig::from_toml("memory-quota = \"much\"").unwrap_err().to_string().contains("line 1"));
    assert!(ReplicaConfig::from_api(json!({"memory_quota": 1, "memory-quota": 2})).is_err());
}

#[test]
// behaviour: api-S-7
fn values_outside_their_range_are_named() {
    let key_of =
        |toml: &str, uri: &str| match ReplicaConfig::from_toml(toml).unwrap().validate_and_adjust(uri) {
            Err(ConfigError::Invalid { key, .. }) => key,
            Err(other) => other.code().to_owned(),
            Ok(_) => "fine".to_owned(),
        };
    let pg = "postgres://h/db";
    for (toml, uri, expected) in [
        ("", pg, "fine"),
        ("changefeed-error-stuck-duration = \"10m\"", pg, "changefeed-error-stuck-duration"),
        ("event-collector-batch-count = 8193", pg, "event-collector-batch-count"),
        ("enable-sync-point = true", pg, "enable-sync-point"),
        ("[consistent]\nlevel = \"eventual\"", pg, "consistent.level"),
        ("[filter]\nrules = []", pg, "filter.rules"),
        (
            "[[filter.event-filters]]\nmatcher = [\"a.b\"]\nignore-event = [\"delete\"]",
            pg,
            "filter.event-filters",
        ),
        ("[filter]\nignore-txn-start-ts = [7]", pg, "filter.ignore-txn-start-ts"),
        ("[[filter.publish]]\nmatcher = [\"a.b\"]\nwhere = \"x > 0\"", pg, "fine"),
        ("[[filter.publish]]\nwhere = \"x > 0\"", pg, "filter.publish[0].matcher"),
        (
            "[[filter.publish]]\nmatcher = [\"a.b\"]\n[[filter.publish]]\nmatcher = [\"*.*\"]\ncolumns = [\"a\", \"a\"]",
            pg,
            "filter.publish[1].columns",
        ),
        ("[[filter.publish]]\nmatcher = [\"a.b\"]\nwhere = \" \"", pg, "filter.publish[0].where"),
        ("[ddl]\ncapture = \"on\"\n[[filter.publish]]\nmatcher = [\"a.b\"]", pg, "filter.publish"),
        ("[mounter]\nworker-num = 0", pg, "mounter.worker-num"),
        ("[scheduler]\nwrite-key-threshold = -1", pg, "fine"),
        (
            "[scheduler]\nenable-table-across-nodes = true\nwrite-key-threshold = -1",
            pg,
            "scheduler.write-key-threshold",
        ),
        ("[scheduler]\nforce-split = true", pg, "fine"),
        ("[scheduler]\nenable-table-across-nodes = true\nforce-split = true", pg, "scheduler.force-split"),
        (
            "[scheduler]\nenable-table-across-nodes = true\nbalance-score-threshold = 0",
            pg,
            "scheduler.balance-score-threshold",
        ),
        ("", "file:///tmp/out", "sink.protocol"),
        ("", "file:///tmp/out?protocol=CSV", "fine"),
        ("[sink]\nprotocol = \"avro\"", "file:///tmp/out", "sink.protocol"),
        ("[sink]\nprotocol = \"xml\"", "file:///tmp/out", "CDC:ErrSinkUnknownProtocol"),
        ("[sink.csv]\ndelimiter = \"\"", "file:///tmp/out?protocol=csv", "sink.csv.delimiter"),
        ("[sink.csv]\nquote = \",\"", "file:///tmp/out?protocol=csv", "sink.csv.quote"),
        ("[sink]\nfile-index-digit = 5", "file:///tmp/out?protocol=csv", "sink.file-index-digit"),
        ("", "file:///tmp/out?protocol=csv&worker-count=0", "sink.cloud-storage-config.worker-count"),
        ("", "kafka://h:9092?protocol=canal-json", "CDC:ErrSinkURIInvalid"),
        ("", "ftp://h/", "CDC:ErrSinkURIInvalid"),
        ("", "postgres://u:s3cr/et@h/db", "CDC:ErrSinkURIInvalid"),
    ] {
        assert_eq!(key_of(toml, uri), expected, "{toml}");
    }
}

#[test]
fn the_sink_uri_wins_and_says_so() {
    let mut config = ReplicaConfig::from_toml(
        "[sink]\nprotocol = \"csv\"\n[scheduler]\nenable-table-across-nodes = true\nregion-threshold = 5\nwrite-key-threshold = 1",
    )
    .unwrap();
    let uri = "file:///tmp/out?protocol=canal-json&flush-interval=1ms";
    let warnings = config.validate_and_adjust(uri).unwrap();
    assert_eq!(config.sink.protocol().unwrap(), Some(Protocol::CanalJson));
    assert_eq!(config.scheduler.region_count_per_span, 5);
    assert_eq!(config.scheduler.write_key_threshold, 10 << 20);
    assert_eq!(config.sink.cloud_storage_config.flush_interval.unwrap().to_string(), "100ms");
    assert_eq!(warnings.len(), 4, "{warnings:?}");
    let settled = config.clone();
    config.validate_and_adjust(uri).unwrap();
    assert_eq!(config, settled, "applying it twice changes nothing more");
}

#[test]
fn secrets_are_hidden_and_come_back_on_update() {
    let mut stored = ReplicaConfig::default();
    stored.consistent.storage = "s3://b/p?secret-access-key=s3cr".to_owned();
    let shown = stored.to_api();
    assert!(!shown.to_string().contains("s3cr"));
    let (update, _) = ReplicaConfig::from_api(shown).unwrap();
    assert_eq!(update.keep_secrets_of(&stored), stored);
    assert_eq!(format!("{stored:?}"), "ReplicaConfig { .. }");

    let mut value = json!({"x": {"sasl-password": "s3cr", "topic": "t"}});
    let original = value.clone();
    api::mask_secrets(&mut value);
    assert_eq!(value, json!({"x": {"sasl-password": "******", "topic": "t"}}));
    api::restore_secrets(&mut value, &original);
    assert_eq!(value, original);
}

#[test]
// behaviour: api-S-10
fn a_changefeed_document_reads_back_and_older_ones_are_completed() {
    let mut info = ChangefeedInfo::new(
        ChangefeedId::fresh("orders"),
        UpstreamInfo {
            kind: "postgres".to_owned(),
            uri: "postgres://u:s3cr@h/db".to_owned(),
            ..Default::default()
        },
        "postgres://u:s3cr@t/db",
        everything_changed(),
        Ts(42),
    );
    info.epoch = MaintainerEpoch::from_wire(9);
    info.state = ChangefeedState::Warning;
    let (back, assigned) = ChangefeedInfo::from_json(&info.to_json(), "k", "n").unwrap();
    assert!(!assigned);
    assert_eq!(back, info);
    assert_eq!((&*back.id.name, &*back.id.keyspace), ("orders", "default"));
    assert!(!format!("{info:?}{:?}", info.upstream_info).contains("s3cr"));

    let spec = br#"{"id":{"id":{"low":1,"high":2},"display":{"name":"a","namespace":"old"}},"upstream-id":7,
        "sink-uri":"blackhole://","start-ts":5,"upstream-info":null,"config":{"memory-quota":1},"state":"","epoch":0}"#;
    let (info, assigned) = ChangefeedInfo::from_json(spec, "k", "n").unwrap();
    assert!(!assigned && info.epoch.is_none());
    assert_eq!((&*info.id.keyspace, info.id.gid.low, info.state), ("old", 1, ChangefeedState::Uninitialized));
    assert_eq!(info.config.synced_status.synced_check_interval, 300);

    let legacy = br#"{"sink-uri":"blackhole://","start-ts":5,"config":null}"#;
    let (info, assigned) = ChangefeedInfo::from_json(legacy, "k", "n").unwrap();
    assert!(assigned && !info.id.gid.is_zero());
    assert_eq!((&*info.id.keyspace, &*info.id.name), ("k", "n"));

    let error = ChangefeedInfo::from_json(br#"{"sink-uri":"s3cr","start-ts":"s3cr"}"#, "k", "n").unwrap_err();
    assert!(!error.to_string().contains("s3cr"));

    let config = DispatcherManagerConfig::of(&back);
    assert_eq!(DispatcherManagerConfig::from_bytes(&config.to_bytes()).unwrap(), config);
}

#[test]
fn a_status_document_keeps_its_numbers() {
    let text = r#"{"checkpoint-ts":455679001234565121,"progress":2,"min-table-barrier-ts":0,"admin-job-type":0,"epoch":7}"#;
    let status = ChangefeedStatusDoc::from_json(text.as_bytes()).unwrap();
    assert_eq!((status.progress, status.epoch), (Progress::Removing, MaintainerEpoch::from_wire(7)));
    assert_eq!(String::from_utf8(status.to_json()).unwrap(), text);
    let old = ChangefeedStatusDoc::from_json(br#"{"checkpoint-ts":3,"progress":0}"#).unwrap();
    assert_eq!(old, ChangefeedStatusDoc::at(Ts(3), None));
    assert!(ChangefeedStatusDoc::from_json(br#"{"checkpoint-ts":3,"progress":9}"#).is_err());
}

#[test]
fn states_know_what_they_hold_back() {
    use ChangefeedState as S;
    for state in S::ALL {
        assert_eq!(S::parse(state.name()), Some(state));
    }
    assert!(S::Failed.blocks_retention(None), "a failed changefeed without an error holds the log");
    assert!(S::Failed.blocks_retention(Some("CDC:ErrSinkURIInvalid")));
    assert!(!S::Failed.blocks_retention(Some("CDC:ErrSnapshotLostByGC")));
    assert!(S::Stopped.blocks_retention(None) && !S::Finished.blocks_retention(None));
    assert!(is_valid_name("a-1") && !is_valid_name("a--1") && !is_valid_name("") && !is_valid_name("a_b"));
    assert!(is_valid_keyspace("") && is_valid_keyspace("a_b-1") && !is_valid_keyspace(&"k".repeat(21)));
}

#[test]
// behaviour: api-S-8
fn each_scheme_takes_the_protocols_and_options_that_fit_it() {
    let adjusted = |toml: &str, uri: &str| {
        let mut config = ReplicaConfig::from_toml(toml).unwrap();
        config.validate_and_adjust(uri).map(|warnings| (config, warnings))
    };
    let code = |toml: &str, uri: &str| match adjusted(toml, uri) {
        Ok(_) => "fine",
        Err(error) => error.code(),
    };
    let (uri, config, protocol) =
        ("CDC:ErrSinkURIInvalid", "CDC:ErrInvalidReplicaConfig", "CDC:ErrSinkUnknownProtocol");
    // Scheme × protocol.
    for (name, file, kafka, pulsar) in [
        ("canal-json", "fine", "fine", "fine"),
        ("CANAL-JSON", "fine", "fine", "fine"),
        ("csv", "fine", config, config),
        ("debezium", "fine", "fine", config),
        ("open-protocol", config, "fine", config),
        ("default", config, "fine", config),
        ("avro", config, "fine", config),
        ("flat-avro", config, "fine", config),
        ("simple", config, "fine", config),
        ("morse", protocol, protocol, protocol),
        ("canal", protocol, protocol, protocol),
        ("maxwell", protocol, protocol, protocol),
        ("craft", protocol, protocol, protocol),
    ] {
        for scheme in ["file", "s3", "gcs", "gs", "azblob", "azure", "noop"] {
            assert_eq!(code("", &format!("{scheme}://b/p?protocol={name}")), file, "{scheme} {name}");
        }
        for scheme in ["kafka", "kafka+ssl"] {
            assert_eq!(code("", &format!("{scheme}://h:1/topic?protocol={name}")), kafka, "{scheme} {name}");
        }
        for scheme in ["pulsar", "pulsar+ssl", "pulsar+http", "pulsar+https"] {
            assert_eq!(code("", &format!("{scheme}://h:1/topic?protocol={name}")), pulsar, "{scheme} {name}");
        }
    }
    for scheme in ["postgres", "postgresql", "mysql", "mysql+ssl", "tidb", "tidb+ssl", "blackhole"] {
        assert_eq!(code("", &format!("{scheme}://h/d")), "fine", "{scheme} needs no protocol");
    }
    // What belongs to a scheme, and its bounds.
    for (toml, sink, expected) in [
        ("", "kafka://h:1/topic", config),
        ("", "kafka://h:1/?protocol=canal-json", uri),
        ("", "kafka://h:1?protocol=canal-json", uri),
        ("", "file:///d", config),
        ("", "kafka://h:1/t?protocol=canal-json&transaction-atomicity=table", config),
        ("", "kafka://h:1/t?protocol=canal-json&transaction-atomicity=none", "fine"),
        ("", "postgres://h/d?transaction-atomicity=table", "fine"),
        ("", "postgres://h/d?transaction-atomicity=some", uri),
        ("", "postgres://h/d?safe-mode=maybe", uri),
        ("", "file:///d?protocol=csv&worker-count=0", config),
        ("", "file:///d?protocol=csv&worker-count=many", uri),
        ("", "file:///d?protocol=csv&flush-interval=1d", uri),
        ("", "file:///d?protocol=csv&file-size=big", uri),
        ("[sink.csv]\ndelimiter = \"abcd\"", "file:///d?protocol=csv", config),
        ("[sink.csv]\ndelimiter = \"abcd\"", "file:///d?protocol=canal-json", "fine"),
        ("[sink.csv]\ndelimiter = \"\\n\"", "file:///d?protocol=csv", config),
        ("[sink.csv]\nquote = \"ab\"", "file:///d?protocol=csv", config),
        ("[sink.csv]\nquote = \"\"", "file:///d?protocol=csv", "fine"),
        ("[sink.csv]\nbinary-encoding-method = \"octal\"", "file:///d?protocol=csv", config),
        ("[sink]\ndelete-only-output-handle-key-columns = true", "file:///d?protocol=csv", config),
        ("[sink]\ndelete-only-output-handle-key-columns = true", "file:///d?protocol=canal-json", "fine"),
        ("[sink]\nfile-index-digit = 21", "file:///d?protocol=csv", config),
        ("[[sink.dispatchers]]\nmatcher = [\"a.b\"]\ntarget-table = \"{table}_x\"", "postgres://h/d", config),
    ] {
        assert_eq!(code(toml, sink), expected, "{toml} {sink}");
    }
    // The URI wins over the file and says so; values beyond a bound are moved to it.
    let file =
        "[sink]\nprotocol = \"canal-json\"\n[sink.cloud-storage-config]\nworker-count = 3\nfile-size = 5000";
    let (config, warnings) =
        adjusted(file, "file:///d?protocol=csv&worker-count=7&flush-interval=1ms&file-size=1").unwrap();
    let storage = &config.sink.cloud_storage_config;
    assert_eq!(
        (config.sink.protocol.as_str(), storage.worker_count, storage.file_size),
        ("csv", Some(7), Some(1024))
    );
    assert_eq!(storage.flush_interval, Some(HumanDuration(std::time::Duration::from_millis(100))));
    for words in ["protocol", "worker-count", "flush-interval", "file-size"] {
        assert!(warnings.iter().any(|warning| warning.contains(words)), "{words}: {warnings:?}");
    }
    let (same, silent) = adjusted(file, "file:///d?protocol=canal-json&worker-count=3").unwrap();
    assert!(silent.is_empty() && same.sink.protocol == "canal-json", "{silent:?}");
}

#[test]
// behaviour: api-P-1
fn what_tables_are_published_by_turns_the_capture_off_and_hides_its_conditions() {
    let toml =
        "[[filter.publish]]\nmatcher = [\"public.orders\"]\ncolumns = [\"id\"]\nwhere = \"region = 'eu'\"";
    let mut config = ReplicaConfig::from_toml(toml).unwrap();
    let api = json!({"filter": {"publish": [
        {"matcher": ["public.orders"], "columns": ["id"], "where": "region = 'eu'"}]}});
    assert_eq!(ReplicaConfig::from_api(api).unwrap(), (config.clone(), vec![]));
    let warnings = config.validate_and_adjust("postgres://h/db").unwrap();
    assert_eq!(config.ddl.capture, DdlCapture::Off);
    assert!(warnings.iter().any(|warning| warning.contains("filter.publish")), "{warnings:?}");
    assert!(config.validate_and_adjust("postgres://h/db").unwrap().is_empty(), "it is settled");
    let shown = format!("{:?}", config.filter);
    assert!(shown.contains("public.orders") && !shown.contains("region"), "{shown}");
}
