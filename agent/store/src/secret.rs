//! Values of groups that rules refer to.

use holdfast_model::GroupKey;

use crate::{
    SecretRecord, Store, StoreError,
    table::{self, Record},
};

impl Record for SecretRecord {
    const TABLE: &'static str = "secrets";

    fn key(&self) -> String {
        key(&self.group, &self.id)
    }
}

fn key(group: &GroupKey, id: &str) -> String {
    format!("{group}/{id}")
}

impl Store {
    /// Writes a secret in place of the one of its id, whose age it keeps. Gives what is written, or
    /// `None` if the group has `max` others already.
    pub fn put_secret(
        &self,
        mut record: SecretRecord,
        max: usize,
    ) -> Result<Option<SecretRecord>, StoreError> {
        self.write("put a secret", |txn| {
            match table::get_mut::<SecretRecord>(txn, &record.key())? {
                Some(known) => record.created_at_ms = known.created_at_ms,
                None => {
                    let others =
                        table::count_below::<SecretRecord>(txn, &record.group.to_string())?;
                    if others >= max {
                        return Ok(None);
                    }
                }
            }
            table::put(txn, &record)?;
            Ok(Some(record))
        })
    }

    pub fn secret(&self, group: &GroupKey, id: &str) -> Result<Option<SecretRecord>, StoreError> {
        self.get(&key(group, id))
    }

    /// The group's secrets in the order of their ids.
    pub fn secrets(&self, group: &GroupKey) -> Result<Vec<SecretRecord>, StoreError> {
        self.read(|txn| table::list_below(txn, &group.to_string()))
    }

    /// Whether there was one.
    pub fn remove_secret(&self, group: &GroupKey, id: &str) -> Result<bool, StoreError> {
        self.remove::<SecretRecord>(&key(group, id))
    }
}
