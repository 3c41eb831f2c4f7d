//! The documents of operations, written under the same fence as everything else.

use super::{CAS_DELAY, Meta};
use crate::backend::{Compare, Op, Txn};
use crate::error::Error;
use crate::operations::OperationDoc;

/// Attempts to store an operation: its asker waits.
const ATTEMPTS: usize = 3;

impl Meta {
    /// Reads what people asked to be changed, and the ids of documents that cannot be read.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn get_operations(&self) -> Result<(Vec<OperationDoc>, Vec<String>), Error> {
        let prefix = self.layout.operation_prefix();
        let (mut docs, mut unreadable) = (Vec::new(), Vec::new());
        for kv in self.store.scan(&prefix).await?.found {
            let id = kv.key.strip_prefix(&prefix).unwrap_or_default();
            match serde_json::from_slice::<OperationDoc>(&kv.value) {
                Ok(doc) if doc.id == id => docs.push(doc),
                Ok(_) | Err(_) => unreadable.push(id.to_owned()),
            }
        }
        Ok((docs, unreadable))
    }

    /// Stores what is known of an operation and deletes others. With `from` only if that is what is stored; returns
    /// whether it was. An answer that is lost is asked for again: it says the same.
    ///
    /// # Errors
    /// When the store fails or this coordinator was replaced.
    pub async fn put_operation(
        &self,
        doc: &OperationDoc,
        from: Option<&OperationDoc>,
        drop: &[String],
    ) -> Result<bool, Error> {
        let key = self.layout.operation(&doc.id);
        let value = doc.to_json();
        let was = from.map(|from| Compare::Value { key: key.clone(), value: from.to_json() });
        let deletes = drop.iter().filter(|id| **id != doc.id).map(|id| Op::delete(self.layout.operation(id)));
        let txn = Txn {
            when: [self.fence()].into_iter().chain(was).collect(),
            then: [Op::put(key.clone(), value.clone())].into_iter().chain(deletes).collect(),
            or_else: Vec::new(),
        };
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(CAS_DELAY).await;
            }
            match self.store.txn(txn.clone()).await {
                Ok(outcome) if outcome.succeeded => return Ok(true),
                Ok(_) => {
                    self.still_owner().await?;
                    // An attempt before may have been applied though its answer was lost.
                    let stored = self.store.get(&key).await?.found;
                    return Ok(stored.is_some_and(|kv| kv.value == value));
                }
                Err(error) if !error.is_retryable() || attempt + 1 == ATTEMPTS => {
                    return Err(error.into());
                }
                Err(_) => {}
            }
        }
        Ok(false)
    }
}
