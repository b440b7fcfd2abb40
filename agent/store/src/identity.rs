//! Keys that tokens of identities are signed with.

use crate::{
    SigningKeyRecord, Store, StoreError,
    table::{self, Record},
};

impl Record for SigningKeyRecord {
    const TABLE: &'static str = "signing_keys";

    fn key(&self) -> String {
        self.id.clone()
    }
}

impl Store {
    /// Those that sign, will sign, or have signed what is good still.
    pub fn signing_keys(&self) -> Result<Vec<SigningKeyRecord>, StoreError> {
        self.list(|_: &SigningKeyRecord| true)
    }

    /// Writes a new one and removes others, in one transaction.
    pub fn change_signing_keys(
        &self,
        made: Option<&SigningKeyRecord>,
        removed: &[String],
    ) -> Result<(), StoreError> {
        self.write("change keys of tokens", |txn| {
            for id in removed {
                table::remove::<SigningKeyRecord>(txn, id)?;
            }
            made.map_or(Ok(()), |made| table::put(txn, made))
        })
    }
}
