//! One table of JSON records, by text key.

use redb::{ReadTransaction, ReadableTable, TableDefinition, TableError, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};

use crate::StoreError;

pub(crate) type Definition = TableDefinition<'static, &'static str, &'static [u8]>;

/// A record that has a table of its own.
pub(crate) trait Record: Serialize + DeserializeOwned {
    const TABLE: &'static str;

    fn key(&self) -> String;

    fn definition() -> Definition {
        TableDefinition::new(Self::TABLE)
    }
}

fn decode<R: Record>(key: &str, bytes: &[u8]) -> Result<R, StoreError> {
    serde_json::from_slice(bytes).map_err(|source| StoreError::Record {
        table: R::TABLE,
        key: key.to_owned(),
        source,
    })
}

pub(crate) fn get<R: Record>(txn: &ReadTransaction, key: &str) -> Result<Option<R>, StoreError> {
    let table = match txn.open_table(R::definition()) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(StoreError::engine("open a table")(error)),
    };
    let found = table.get(key).map_err(StoreError::engine("read a record"))?;
    found.map(|bytes| decode(key, bytes.value())).transpose()
}

/// Every record of the table for which `wanted` says yes, in the order of their keys.
pub(crate) fn list<R: Record>(
    txn: &ReadTransaction,
    wanted: impl Fn(&R) -> bool,
) -> Result<Vec<R>, StoreError> {
    let table = match txn.open_table(R::definition()) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::engine("open a table")(error)),
    };
    scan(&table, wanted)
}

pub(crate) fn scan<R: Record>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    wanted: impl Fn(&R) -> bool,
) -> Result<Vec<R>, StoreError> {
    let mut records = Vec::new();
    for entry in table.iter().map_err(StoreError::engine("read a table"))? {
        let (key, bytes) = entry.map_err(StoreError::engine("read a table"))?;
        let record = decode(key.value(), bytes.value())?;
        if wanted(&record) {
            records.push(record);
        }
    }
    Ok(records)
}

/// The record of `key` as the write transaction sees it.
pub(crate) fn get_mut<R: Record>(
    txn: &WriteTransaction,
    key: &str,
) -> Result<Option<R>, StoreError> {
    let table = txn.open_table(R::definition()).map_err(StoreError::engine("open a table"))?;
    let found = table.get(key).map_err(StoreError::engine("read a record"))?;
    found.map(|bytes| decode(key, bytes.value())).transpose()
}

pub(crate) fn put<R: Record>(txn: &WriteTransaction, record: &R) -> Result<(), StoreError> {
    let key = record.key();
    let bytes = serde_json::to_vec(record).map_err(|source| StoreError::Record {
        table: R::TABLE,
        key: key.clone(),
        source,
    })?;
    let mut table = txn.open_table(R::definition()).map_err(StoreError::engine("open a table"))?;
    table.insert(key.as_str(), bytes.as_slice()).map_err(StoreError::engine("write a record"))?;
    Ok(())
}

/// Removes every record whose key is `above`, a `/`, and more.
pub(crate) fn remove_below<R: Record>(
    txn: &WriteTransaction,
    above: &str,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(R::definition()).map_err(StoreError::engine("open a table"))?;
    let (first, end) = below(above);
    table
        .retain_in(first.as_str()..end.as_str(), |_, _| false)
        .map_err(StoreError::engine("remove records"))
}

/// Every record whose key is `above`, a `/`, and more, in the order of their keys.
pub(crate) fn list_below<R: Record>(
    txn: &ReadTransaction,
    above: &str,
) -> Result<Vec<R>, StoreError> {
    let table = match txn.open_table(R::definition()) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::engine("open a table")(error)),
    };
    let (first, end) = below(above);
    let range = table.range(first.as_str()..end.as_str());
    let mut records = Vec::new();
    for entry in range.map_err(StoreError::engine("read a table"))? {
        let (key, bytes) = entry.map_err(StoreError::engine("read a table"))?;
        records.push(decode(key.value(), bytes.value())?);
    }
    Ok(records)
}

/// How many records have such a key.
pub(crate) fn count_below<R: Record>(
    txn: &WriteTransaction,
    above: &str,
) -> Result<usize, StoreError> {
    let table = txn.open_table(R::definition()).map_err(StoreError::engine("open a table"))?;
    let (first, end) = below(above);
    let range = table.range(first.as_str()..end.as_str());
    Ok(range.map_err(StoreError::engine("read a table"))?.count())
}

/// The first key below `above`, and the first that is not any more.
fn below(above: &str) -> (String, String) {
    // `0` comes after `/`.
    (format!("{above}/"), format!("{above}0"))
}

/// Whether there was such a record.
pub(crate) fn remove<R: Record>(txn: &WriteTransaction, key: &str) -> Result<bool, StoreError> {
    let mut table = txn.open_table(R::definition()).map_err(StoreError::engine("open a table"))?;
    let removed = table.remove(key).map_err(StoreError::engine("remove a record"))?;
    Ok(removed.is_some())
}
