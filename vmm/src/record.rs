//! The exit record.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_vmm_api::{ExitReason, ExitRecord, VERSION};

use crate::device::console::Console;
use crate::journal;

/// Where the record goes. Clones share it; the first reason counts.
#[derive(Clone)]
pub struct Record {
    file: Arc<File>,
    written: Arc<AtomicBool>,
    console: Console,
}

impl Record {
    /// An unwritten record, to which the console's tail will be added.
    pub fn new(file: OwnedFd, console: Console) -> Self {
        Self {
            file: Arc::new(file.into()),
            written: Arc::default(),
            console,
        }
    }

    /// Writes the record, unless one was written.
    pub fn write(&self, reason: ExitReason) {
        if self.written.swap(true, Ordering::SeqCst) {
            return;
        }
        let record = ExitRecord {
            version: VERSION,
            reason,
            console_tail: self.console.tail(),
        };
        let written = serde_json::to_vec(&record)
            .map_err(std::io::Error::from)
            .and_then(|bytes| (&*self.file).write_all(&bytes));
        if let Err(error) = written {
            journal::write(format_args!(
                "The exit record ({}) could not be written: {error}.",
                record.reason
            ));
        }
    }
}
