//! Log lines in the unified format: `[time] [LEVEL] [file:line] ["message"] [key=value] …`.
//!
//! Keys are in camel case and come from one vocabulary, so that one search finds every line about a changefeed; tests
//! and scripts read them.

use std::fmt;

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

const TIME: &[BorrowedFormatItem<'_>] = format_description!(
    "[year]/[month]/[day] [hour]:[minute]:[second].[subsecond digits:3] \
     [offset_hour sign:mandatory]:[offset_minute]"
);

/// Keys that code writes short, and what they are called in the log.
const VOCABULARY: [(&str, &str); 5] = [
    ("changefeed", "changefeedID"),
    ("dispatcher", "dispatcherID"),
    ("node", "nodeID"),
    ("table", "tableID"),
    ("code", "errorCode"),
];

/// Writes events and the fields of spans.
pub(super) struct Unified;

impl<S, N> FormatEvent<S, N> for Unified
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        let now = OffsetDateTime::now_utc().format(TIME).map_err(|_| fmt::Error)?;
        let file = meta.file().map_or(meta.target(), |file| file.rsplit(['/', '\\']).next().unwrap_or(file));
        write!(out, "[{now}] [{}] [{file}:{}]", meta.level(), meta.line().unwrap_or_default())?;
        let mut words = Words::default();
        event.record(&mut words);
        write!(out, " [{}]{}", quoted(&words.message), words.fields)?;
        for span in context.event_scope().into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>() {
                write!(out, "{fields}")?;
            }
        }
        writeln!(out)
    }
}

impl<'w> FormatFields<'w> for Unified {
    fn format_fields<R: tracing_subscriber::field::RecordFields>(
        &self,
        mut out: Writer<'w>,
        fields: R,
    ) -> fmt::Result {
        let mut words = Words::default();
        fields.record(&mut words);
        write!(out, "{}", words.fields)
    }
}

/// An event's message, and its fields as they are written.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.fields.push_str(&format!(" [{}={}]", key(field.name()), quoted(value)));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_str(field, &value.to_string());
    }
}

/// `took_ms` becomes `tookMs`, and `changefeed` becomes `changefeedID`.
fn key(name: &str) -> String {
    if let Some((_, known)) = VOCABULARY.iter().find(|(short, _)| *short == name) {
        return (*known).to_owned();
    }
    let mut key = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        if !c.is_ascii_alphanumeric() {
            upper = !key.is_empty();
        } else if std::mem::take(&mut upper) {
            key.extend(c.to_uppercase());
        } else {
            key.push(c);
        }
    }
    key
}

/// The text, in quotes where it would otherwise not end where it ends.
fn quoted(text: &str) -> std::borrow::Cow<'_, str> {
    let plain = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, '"' | '=' | '[' | ']' | '\\');
    if !text.is_empty() && text.chars().all(plain) {
        return text.into();
    }
    // A string always serialises.
    serde_json::to_string(text).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What `f` logs, without the time and the place.
    fn logged(f: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(Unified)
            .fmt_fields(Unified)
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), f);
        let text = String::from_utf8(sink.0.lock().clone()).unwrap();
        let (time, rest) = text.split_once(' ').unwrap();
        assert_eq!((time.len(), &time[5..6]), (11, "/"), "{text}");
        let (_, rest) = rest.split_once("] [").unwrap();
        rest.to_owned()
    }

    // behaviour: metrics-10
    #[test]
    fn a_line_has_its_level_its_place_its_message_and_camel_case_keys() {
        let line = logged(|| {
            tracing::warn!(changefeed = "default/a", took_ms = 12, error = %"no \"x\"\nhere", "it took long");
        });
        let (head, rest) = line.split_once("] [\"").unwrap();
        assert!(head.starts_with("WARN] [format.rs:"), "{head}");
        assert_eq!(
            rest,
            "it took long\"] [changefeedID=default/a] [tookMs=12] [error=\"no \\\"x\\\"\\nhere\"]\n"
        );
    }

    #[test]
    fn the_fields_of_a_span_stand_on_its_lines() {
        let line = logged(|| {
            let span = tracing::info_span!("feed", epoch = 7);
            let _entered = span.enter();
            tracing::info!("begun");
        });
        assert!(line.ends_with("[begun] [epoch=7]\n"), "{line}");
    }

    #[test]
    fn what_needs_no_quotes_has_none_and_what_is_empty_has() {
        assert_eq!((quoted("a-b.c/d:1"), quoted("")), ("a-b.c/d:1".into(), "\"\"".into()));
        for text in ["a b", "a=b", "[x]", "q\"", "back\\slash", "tab\t"] {
            assert!(quoted(text).starts_with('"'), "{text}");
        }
    }
}
