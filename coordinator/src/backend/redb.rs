//! The embedded store on disk: one redb file in a directory that is locked while it is open.

use std::fs::{File, TryLockError};
use std::path::Path;

use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use super::image::{Change, Image};
use super::local::Journal;
use super::{KeyValue, LeaseId, LocalStore, StoreError};

const ENTRIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("entries");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const REVISION: &str = "revision";
const IDENTITY: &str = "identity";
/// Create revision, modification revision and lease stand before the value of an entry.
const HEADER: usize = 24;
/// The metadata of thousands of changefeeds fits; the rest of the memory belongs to events.
const CACHE_BYTES: usize = 4 << 20;

/// Opens, or creates, the store in `dir`. Waits for the disk: call it before the runtime is busy, or from
/// a thread that may block.
///
/// # Errors
/// [`StoreError::Locked`] when another process uses the directory, [`StoreError::Broken`] when the disk or
/// the file is.
pub fn open(dir: &Path) -> Result<LocalStore, StoreError> {
    std::fs::create_dir_all(dir).map_err(|e| broken("cannot create the directory", dir, &e))?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join("LOCK"))
        .map_err(|e| broken("cannot open the lock file in", dir, &e))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::Locked(dir.display().to_string())),
        Err(TryLockError::Error(e)) => return Err(broken("cannot lock", dir, &e)),
    }
    let database = match Database::builder().set_cache_size(CACHE_BYTES).create(dir.join("meta.redb")) {
        Ok(database) => database,
        Err(DatabaseError::DatabaseAlreadyOpen) => return Err(StoreError::Locked(dir.display().to_string())),
        Err(e) => return Err(broken("cannot open the database in", dir, &e)),
    };
    let (image, identity) = load(&database).map_err(|e| broken("cannot read the database in", dir, &e))?;
    LocalStore::start(image, identity, Box::new(RedbJournal { database, _lock: lock }))
}

fn broken(what: &str, dir: &Path, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError::Broken(format!("{what} {}: {cause}", dir.display()))
}

/// Reads everything, and gives a new file its tables and its identity.
fn load(database: &Database) -> Result<(Image, u64), redb::Error> {
    let mut txn = database.begin_write()?;
    txn.set_durability(Durability::Immediate)?;
    {
        txn.open_table(ENTRIES)?;
        let mut numbers = txn.open_table(NUMBERS)?;
        if numbers.get(IDENTITY)?.is_none() {
            numbers.insert(IDENTITY, uuid::Uuid::new_v4().as_u64_pair().0.max(1))?;
        }
    }
    txn.commit()?;

    let txn = database.begin_read()?;
    let numbers = txn.open_table(NUMBERS)?;
    let number = |name| Ok::<_, redb::Error>(numbers.get(name)?.map_or(0, |value| value.value()));
    let mut entries = Vec::new();
    for row in txn.open_table(ENTRIES)?.iter()? {
        let (key, bytes) = row?;
        let entry = decode(key.value(), bytes.value())
            .ok_or_else(|| redb::Error::Corrupted(format!("entry {} is too short", key.value())))?;
        entries.push(entry);
    }
    Ok((Image::new(number(REVISION)?, entries), number(IDENTITY)?))
}

/// The lock is released when the journal is dropped, after the database.
struct RedbJournal {
    database: Database,
    _lock: File,
}

impl RedbJournal {
    fn write(&self, change: &Change) -> Result<(), redb::Error> {
        let mut txn = self.database.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        {
            let mut entries = txn.open_table(ENTRIES)?;
            for key in &change.deletes {
                entries.remove(key.as_str())?;
            }
            for kv in &change.puts {
                entries.insert(kv.key.as_str(), encode(kv).as_slice())?;
            }
            txn.open_table(NUMBERS)?.insert(REVISION, change.revision)?;
        }
        txn.commit()?;
        Ok(())
    }
}

impl Journal for RedbJournal {
    fn append(&mut self, change: &Change) -> Result<(), String> {
        self.write(change).map_err(|e| e.to_string())
    }

    fn blocks(&self) -> bool {
        true
    }
}

fn encode(kv: &KeyValue) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + kv.value.len());
    out.extend_from_slice(&kv.create_revision.to_le_bytes());
    out.extend_from_slice(&kv.mod_revision.to_le_bytes());
    out.extend_from_slice(&kv.lease.map_or(0, |lease| lease.0).to_le_bytes());
    out.extend_from_slice(&kv.value);
    out
}

fn decode(key: &str, bytes: &[u8]) -> Option<KeyValue> {
    let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let lease = number(16)?;
    Some(KeyValue {
        key: key.to_owned(),
        value: bytes.get(HEADER..)?.to_vec(),
        create_revision: number(0)?,
        mod_revision: number(8)?,
        lease: (lease != 0).then_some(LeaseId(lease)),
    })
}
