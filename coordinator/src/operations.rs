//! What people asked to be changed: one document for each operation, so that a request that is repeated with its key is
//! not carried out twice, whoever leads (api-cli-config §2, §14; layout of coordinator §3).
//!
//! ```text
//!            stored before anything is done           in the transaction of its effect
//!   begin ------------------------------> running -------------------------------> applied
//!                                           |  |           if it is still running    |
//!                                           |  +--- answered (nothing to store) --+  | answered
//!                                           |                                     v  v
//!                                           |                        success, or failed with an error
//!                                           |
//!   the coordinator of a `running` one was replaced: its fence makes sure that it applies nothing any more,
//!   so the same request may be carried out again. That of an `applied` one was carried out, and is answered.
//! ```
//!
//! [`OperationLog`] decides and is pure; [`crate::CoordinatorHandle`] stores what it decided, under the fence of its coordinator.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use heartbeatpb::Gid;
use serde::{Deserialize, Serialize};

/// The newest operations that are kept for looking at, whatever they were.
pub const LAST: usize = 100;
/// The newest answers that are kept for whoever asks later, or again with the same key.
pub const MOST_KEPT: usize = 500;
/// How long these are kept, in milliseconds.
pub const KEPT_MS: i64 = 24 * 3600 * 1000;
/// Operations under way at one time: each has a task, and waits for nodes.
pub const MOST_RUNNING: usize = 100;
/// Longest answer that is kept, in bytes: a changefeed as it is shown has about four thousand. A longer one is told anew
/// from what is there.
pub const LONGEST_ANSWER: usize = 16 << 10;
/// Documents that are deleted beside a new one: together they stay within one transaction.
const MOST_DROPPED: usize = 64;

/// How far an operation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OperationState {
    /// It was begun; nothing is known to have been changed.
    #[default]
    Running,
    /// What it changes is stored; its asker has no answer yet.
    Applied,
    /// It was done.
    Success,
    /// It was refused, or failed.
    Failed,
    /// Written by a later version.
    #[serde(other)]
    Unknown,
}

/// One operation, as it is stored.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OperationDoc {
    /// Names it in the API; random.
    pub id: String,
    /// Its place among all of them, the oldest first.
    pub event: u64,
    /// What was asked for: `create`, `pause`, ….
    pub operation: String,
    /// Keyspace of the changefeed.
    pub keyspace: String,
    /// Name of the changefeed, as it was asked for.
    pub changefeed: String,
    /// Incarnation of the changefeed that is meant, the new one of a creation; none when there was no such changefeed.
    #[serde(with = "gid_doc")]
    pub gid: Option<Gid>,
    /// Of a creation: the incarnations that attempts before this one may have made something for upstream.
    #[serde(with = "gids_doc", skip_serializing_if = "Vec::is_empty")]
    pub leftover: Vec<Gid>,
    /// Who asked.
    pub user: String,
    /// How far it is.
    pub state: OperationState,
    /// When it was begun, milliseconds since 1970.
    pub begun_ms: i64,
    /// When it ended, milliseconds since 1970; zero before.
    pub ended_ms: i64,
    /// Version of the coordinator that carries it out.
    pub coordinator: u64,
    /// How often it was begun.
    pub attempt: u32,
    /// Whether somebody may ask for its answer.
    pub keeps: bool,
    /// The asker's own name for this request; empty without one. A key, so that it is hidden where documents are shown.
    pub idempotency_key: String,
    /// What was asked for under that name: tells another request with the same name.
    pub idempotency_key_request: String,
    /// HTTP status of the answer; zero before there is one.
    pub status: u16,
    /// What was changed, in words.
    pub details: String,
    /// Why it failed.
    pub error: String,
    /// The answer, JSON; none when nobody may ask for it or it is too long.
    pub answer: Option<String>,
}

impl std::fmt::Debug for OperationDoc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OperationDoc")
            .field("id", &self.id)
            .field("event", &self.event)
            .field("operation", &self.operation)
            .field("changefeed", &self.changefeed)
            .field("state", &self.state)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl OperationDoc {
    /// The stored form.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("the schema has string keys and whole numbers only")
    }

    /// The same, when its effect is stored.
    #[must_use]
    pub fn applied(&self) -> Self {
        Self { state: OperationState::Applied, ..self.clone() }
    }

    /// Whether it has an answer.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.state, OperationState::Success | OperationState::Failed | OperationState::Unknown)
    }

    /// Whether it failed for a reason that passes: the same request may be carried out again.
    fn may_be_repeated(&self) -> bool {
        self.state == OperationState::Failed && passes(self.status)
    }

    /// The same, with its answer.
    #[must_use]
    pub fn ended(&self, end: End) -> Self {
        let keeps = self.keeps && end.answer.len() <= LONGEST_ANSWER;
        Self {
            state: if end.status < 400 { OperationState::Success } else { OperationState::Failed },
            changefeed: end.changefeed,
            ended_ms: end.now_ms,
            status: end.status,
            details: end.details,
            error: end.error,
            leftover: end.leftover,
            answer: keeps.then_some(end.answer),
            ..self.clone()
        }
    }
}

/// A wish to change something.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// A name that nobody has: used if this is a new operation.
    pub id: String,
    /// What is asked for.
    pub operation: &'static str,
    /// Keyspace of the changefeed.
    pub keyspace: String,
    /// Its name; empty when the asker left it open.
    pub changefeed: String,
    /// Its incarnation, a new one for a creation.
    pub gid: Option<Gid>,
    /// Who asks.
    pub user: String,
    /// Whether somebody may ask for the answer later.
    pub keeps: bool,
    /// The asker's name for the request, and what is asked for under it.
    pub key: Option<(String, String)>,
    /// Now, milliseconds since 1970.
    pub now_ms: i64,
}

/// How an operation ended.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// HTTP status of the answer.
    pub status: u16,
    /// The answer, JSON.
    pub answer: String,
    /// Name of the changefeed.
    pub changefeed: String,
    /// What was changed, in words.
    pub details: String,
    /// Why it failed.
    pub error: String,
    /// The incarnations for which something may be there upstream that nobody needs.
    pub leftover: Vec<Gid>,
    /// Now, milliseconds since 1970.
    pub now_ms: i64,
}

impl End {
    /// Whether the same request may go differently in a moment: whether it was done is told by what is stored.
    #[must_use]
    pub fn passes(&self) -> bool {
        passes(self.status)
    }
}

/// Whether an answer of this status says "later" rather than "no".
fn passes(status: u16) -> bool {
    status >= 500 || status == 401
}

/// What is to be done about a wish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Begin {
    /// Store the document, delete the others, carry it out.
    New {
        /// The document.
        doc: OperationDoc,
        /// Ids of documents that nobody needs.
        drop: Vec<String>,
    },
    /// As [`Begin::New`]: it was begun before, nothing that is stored was changed, and nothing of that attempt can change
    /// anything any more: it failed, or its coordinator was replaced.
    Again {
        /// The document; its `leftover` is to be cleared away first.
        doc: OperationDoc,
        /// Ids of documents that nobody needs.
        drop: Vec<String>,
    },
    /// It is under way, or has ended: the document says so.
    Before(OperationDoc),
    /// An earlier coordinator carried it out and could not answer any more.
    Applied(OperationDoc),
    /// An earlier coordinator had begun it, and the changefeed that was meant is not there any more.
    Gone(OperationDoc),
    /// The asker used the name for another request.
    OtherRequest,
    /// Too many are under way.
    Full,
}

/// The operations that one coordinator knows: its own, and those that it found stored.
#[derive(Clone, Debug)]
pub struct OperationLog {
    version: u64,
    docs: BTreeMap<u64, OperationDoc>,
    /// Stored documents that nobody needs.
    useless: Vec<String>,
}

impl OperationLog {
    /// What a coordinator of this version found, before it has begun any: everything that has not ended belongs to
    /// earlier ones. `unreadable` are ids of documents that cannot be read.
    #[must_use]
    pub fn new(version: u64, found: Vec<OperationDoc>, unreadable: Vec<String>) -> Self {
        let mut log = Self { version, docs: BTreeMap::new(), useless: unreadable };
        for mut doc in found {
            // Of a store that came from elsewhere versions mean nothing.
            if doc.coordinator == version {
                doc.coordinator = 0;
            }
            if log.docs.contains_key(&doc.event) {
                // A place that two coordinators gave: only the order matters.
                doc.event = log.next_event();
            }
            log.docs.insert(doc.event, doc);
        }
        log
    }

    /// The coordinator that knows this.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The newest operations, the newest first.
    pub fn last(&self) -> impl Iterator<Item = &OperationDoc> {
        self.docs.values().rev().take(LAST)
    }

    /// One operation.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&OperationDoc> {
        self.docs.values().rev().find(|doc| doc.id == id)
    }

    /// Whether this coordinator is carrying an operation out.
    #[must_use]
    pub fn is_under_way(&self, doc: &OperationDoc) -> bool {
        !doc.has_ended() && doc.coordinator == self.version
    }

    fn next_event(&self) -> u64 {
        self.docs.last_key_value().map_or(1, |(event, _)| event.saturating_add(1))
    }

    /// Somebody asks for something. What is begun counts as under way from now on: [`OperationLog::abandon`] it if it
    /// cannot be stored.
    pub fn begin(&mut self, asked: Asked) -> Begin {
        self.forget(asked.now_ms);
        let before = asked.key.as_ref().and_then(|(key, _)| {
            self.docs.values().rev().find(|doc| doc.idempotency_key == *key && !key.is_empty())
        });
        if let Some(before) = before.cloned() {
            return self.repeat(before, &asked);
        }
        if self.docs.values().filter(|doc| self.is_under_way(doc)).count() >= MOST_RUNNING {
            return Begin::Full;
        }
        let (key, request) = asked.key.unwrap_or_default();
        let doc = OperationDoc {
            id: asked.id,
            event: self.next_event(),
            operation: asked.operation.to_owned(),
            keyspace: asked.keyspace,
            changefeed: asked.changefeed,
            gid: asked.gid,
            user: asked.user,
            begun_ms: asked.now_ms,
            coordinator: self.version,
            attempt: 1,
            keeps: asked.keeps,
            idempotency_key: key,
            idempotency_key_request: request,
            ..OperationDoc::default()
        };
        self.docs.insert(doc.event, doc.clone());
        Begin::New { doc, drop: self.drop_some() }
    }

    /// The same key was used before.
    fn repeat(&mut self, before: OperationDoc, asked: &Asked) -> Begin {
        let same = asked.key.as_ref().is_some_and(|(_, request)| *request == before.idempotency_key_request);
        if !same {
            return Begin::OtherRequest;
        }
        let again = before.may_be_repeated();
        if (before.has_ended() && !again) || self.is_under_way(&before) {
            return Begin::Before(before);
        }
        if before.state == OperationState::Applied {
            return Begin::Applied(before);
        }
        let creates = before.operation == "create";
        if !creates && before.gid != asked.gid {
            return Begin::Gone(before);
        }
        // A process that only slept may still undo what it made for its incarnation: a new attempt has its own. One that
        // ended has told what it left; one that was killed may have left whatever it was about to make.
        let killed = before.gid.filter(|_| creates && !before.has_ended());
        let mut leftover = before.leftover.clone();
        leftover.extend(killed.filter(|gid| !leftover.contains(gid)));
        let doc = OperationDoc {
            gid: asked.gid,
            leftover,
            begun_ms: asked.now_ms,
            coordinator: self.version,
            attempt: before.attempt.saturating_add(1),
            state: OperationState::Running,
            ended_ms: 0,
            status: 0,
            details: String::new(),
            error: String::new(),
            answer: None,
            ..before
        };
        self.docs.insert(doc.event, doc.clone());
        Begin::Again { doc, drop: self.drop_some() }
    }

    /// A document was stored as it is here.
    pub fn settle(&mut self, doc: OperationDoc) {
        if let Some(known) = self.docs.get_mut(&doc.event)
            && known.id == doc.id
        {
            *known = doc;
        }
    }

    /// What was begun could not be stored, as far as anybody knows: it was not begun. What attempts before it may have
    /// left stays known.
    pub fn abandon(&mut self, doc: &OperationDoc) {
        let Some(known) = self.docs.get_mut(&doc.event).filter(|known| known.id == doc.id) else { return };
        if known.leftover.is_empty() {
            self.docs.remove(&doc.event);
            self.useless.push(doc.id.clone());
        } else {
            (known.state, known.status) = (OperationState::Failed, 503);
        }
    }

    /// Documents whose deletion did not work are to be deleted with the next one.
    pub fn keep_dropping(&mut self, drop: Vec<String>) {
        self.useless.extend(drop);
    }

    /// Lets go of what nobody needs any more: neither among the last, nor young enough to be asked for.
    fn forget(&mut self, now_ms: i64) {
        let (mut seen, mut kept) = (0, 0);
        let mut needless = Vec::new();
        for doc in self.docs.values().rev() {
            seen += 1;
            let young = doc.keeps && now_ms.saturating_sub(doc.begun_ms) < KEPT_MS;
            kept += usize::from(young);
            let needed = seen <= LAST || (young && kept <= MOST_KEPT) || self.is_under_way(doc);
            if !needed {
                needless.push(doc.event);
            }
        }
        for event in needless {
            self.useless.extend(self.docs.remove(&event).map(|doc| doc.id));
        }
        // Its key is free again, though it can be looked at.
        for doc in self.docs.values_mut().filter(|doc| doc.has_ended()) {
            if now_ms.saturating_sub(doc.begun_ms) >= KEPT_MS {
                doc.idempotency_key.clear();
                doc.answer = None;
            }
        }
    }

    fn drop_some(&mut self) -> Vec<String> {
        let rest = self.useless.split_off(self.useless.len().min(MOST_DROPPED));
        std::mem::replace(&mut self.useless, rest)
    }
}

/// A [`Gid`] as it is stored.
#[derive(Serialize, Deserialize)]
struct Halves {
    low: u64,
    high: u64,
}

impl From<Gid> for Halves {
    fn from(gid: Gid) -> Self {
        Self { low: gid.low, high: gid.high }
    }
}

impl From<Halves> for Gid {
    fn from(halves: Halves) -> Self {
        Self { low: halves.low, high: halves.high }
    }
}

/// Those of several.
mod gids_doc {
    use heartbeatpb::Gid;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Halves;

    pub(super) fn serialize<S: Serializer>(gids: &[Gid], serializer: S) -> Result<S::Ok, S::Error> {
        gids.iter().copied().map(Halves::from).collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Gid>, D::Error> {
        let halves = Vec::<Halves>::deserialize(deserializer)?;
        Ok(halves.into_iter().map(Gid::from).collect())
    }
}

/// The identity of a changefeed as documents have it.
mod gid_doc {
    use heartbeatpb::Gid;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Halves;

    pub(super) fn serialize<S: Serializer>(gid: &Option<Gid>, serializer: S) -> Result<S::Ok, S::Error> {
        gid.map(Halves::from).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Gid>, D::Error> {
        let halves = Option::<Halves>::deserialize(deserializer)?;
        Ok(halves.map(Gid::from))
    }
}
