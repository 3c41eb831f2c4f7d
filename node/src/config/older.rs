//! Keys of TiCDC's server file that mean nothing here: they are taken with a warning, so that a file can be kept
//! (api-cli-config §10, marks D and A).

use toml::Table;

/// Key, and what there is instead.
const OLDER: [(&str, &str); 14] = [
    ("newarch", "there is one architecture"),
    (
        "gc-ttl",
        "a source keeps its log for as long as the changefeed exists, and lets go of it when it is removed",
    ),
    ("tz", "times are UTC; what is written to a target has the zone of its column"),
    ("enable-legacy-safepoint", "a source keeps its log by a replication slot"),
    ("owner-flush-interval", "checkpoints are stored twice a second"),
    ("processor-flush-interval", "progress is told when it changes"),
    ("gc-tuner-memory-threshold", "there is no garbage collector"),
    ("per-table-memory-quota", "the memory-quota of a changefeed bounds its memory"),
    ("max-memory-percentage", "event-store.memory-bytes and the memory-quota of a changefeed bound memory"),
    ("memory-limit-percentage", "event-store.memory-bytes and the memory-quota of a changefeed bound memory"),
    ("sorter", "the event store is in the data directory; event-store bounds it"),
    ("kv-client", "sources are read by their own protocol"),
    ("encryption", "sources hand their log over in clear"),
    ("debug", "what it sets has no counterpart"),
];

/// Takes these keys out of a file, and tells what was left out and why.
pub(super) fn take(table: &mut Table) -> Vec<String> {
    let mut told: Vec<String> = OLDER
        .iter()
        .filter(|(key, _)| table.remove(*key).is_some())
        .map(|(key, instead)| format!("{key} is ignored: {instead}"))
        .collect();
    let log = table.get_mut("log").and_then(toml::Value::as_table_mut);
    if log.is_some_and(|log| log.remove("error-output").is_some()) {
        told.push("log.error-output is ignored: errors of the log itself go to standard error".to_owned());
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_reference_is_taken_with_a_word_about_what_it_cannot_set() {
        let text = "newarch = true\ngc-ttl = 172800\ncluster-id = \"prod\"\n[log]\nerror-output = \"stderr\"\n\
                    [kv-client]\nworker-concurrent = 8\n[debug.scheduler]\ncheck-balance-interval = \"30s\"\n";
        let mut table: Table = toml::from_str(text).unwrap();
        let told = take(&mut table);
        assert_eq!(table.keys().collect::<Vec<_>>(), ["cluster-id", "log"]);
        let keys: Vec<&str> = told.iter().filter_map(|words| words.split(' ').next()).collect();
        assert_eq!(keys, ["newarch", "gc-ttl", "kv-client", "debug", "log.error-output"]);
        assert!(take(&mut table).is_empty());
    }
}
